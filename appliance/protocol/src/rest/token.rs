//! The text of an enrolment token: `<secret>.<fingerprint>`, both 64 hexadecimal digits. The
//! secret stands for the person who made the token; the fingerprint is the BLAKE3 hash of the
//! authority's certificate (DER), so that the agent knows whom it talks to before it trusts.

use core::fmt::Write;

/// Bytes of either part.
pub const PART_BYTES: usize = 32;

/// A token in parts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TokenText {
    /// Goes into [`Enrol`](super::server::Enrol) in hexadecimal.
    pub secret: [u8; PART_BYTES],
    /// BLAKE3 hash of the authority's certificate.
    pub fingerprint: [u8; PART_BYTES],
}

impl TokenText {
    /// Reads a token; white space around it is ignored. `None` when it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (secret, fingerprint) = text.trim().split_once('.')?;
        Some(Self {
            secret: parse_hex(secret)?,
            fingerprint: parse_hex(fingerprint)?,
        })
    }

    /// Writes the token.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{}.{}", hex(&self.secret), hex(&self.fingerprint))
    }
}

/// Writes bytes as lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a string cannot fail.
        let _always_ok = write!(text, "{byte:02x}");
    }
    text
}

/// Reads exactly 64 hexadecimal digits.
#[must_use]
pub fn parse_hex(text: &str) -> Option<[u8; PART_BYTES]> {
    let digits = text.as_bytes();
    if digits.len() != PART_BYTES * 2 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; PART_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(core::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_a_wrong_one_does_not_parse() {
        let token = TokenText {
            secret: [0xA5; 32],
            fingerprint: [7; 32],
        };
        let text = token.text();
        assert_eq!(text.len(), 129);
        assert!(TokenText::parse(&format!(" {text}\n")) == Some(token));
        for wrong in [
            "",
            ".",
            &text[1..],
            &text.replace('.', ""),
            &text.replace("a5", "+5"),
        ] {
            assert!(TokenText::parse(wrong).is_none(), "{wrong}");
        }
    }
}
