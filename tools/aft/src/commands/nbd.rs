//! `aft nbd`.

use std::path::Path;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::nbd::{NbdExport, NbdExports};
use serde::Serialize;

use super::admin::write_secret;
use crate::client::Client;
use crate::error::AftError;
use crate::nbd_args::NbdCommand;
use crate::output::{Output, Table, printable};

/// What is shown of an export.
#[derive(Serialize)]
struct Shown {
    name: String,
    description: String,
    /// For clients on the appliance's machine.
    local: Option<String>,
    /// For clients elsewhere, with a certificate.
    remote: Option<String>,
}

pub(super) async fn run(
    command: NbdCommand,
    server: &Client,
    host: Option<&str>,
    output: &Output,
) -> Result<(), AftError> {
    let place = match command {
        NbdCommand::List { place } => place,
        NbdCommand::Credentials {
            identity,
            directory,
        } => return credentials(&identity, &directory, output),
    };
    let mut found: NbdExports = server.get("/v1/nbd").await?;
    if let Some(place) = place {
        found.exports.retain(|export| is_of(&export.name, &place));
    }
    let all: Vec<Shown> = found
        .exports
        .iter()
        .map(|one| show(one, &found, host))
        .collect();
    output.answer(&all, || table(&all));
    Ok(())
}

/// Takes an identity apart: certificate, authority and key are blocks of one file, in any order
/// but that of the certificates.
fn credentials(identity: &Path, directory: &Path, output: &Output) -> Result<(), AftError> {
    let failed = |what: &Path, error: &dyn std::fmt::Display| {
        AftError::new(
            ErrorClass::Operator,
            format!("{}: {error}", what.display()),
            "",
        )
    };
    let pem = std::fs::read_to_string(identity).map_err(|error| failed(identity, &error))?;
    let (certificates, keys) = blocks(&pem);
    let ([certificate, authority], [key]) = (&certificates[..], &keys[..]) else {
        let why = "it does not hold two certificates and a key";
        return Err(AftError::new(
            ErrorClass::Refused,
            format!("{} is no identity: {why}", identity.display()),
            "give the file that `aft cert issue-admin` wrote",
        ));
    };
    std::fs::create_dir_all(directory).map_err(|error| failed(directory, &error))?;
    let files = [
        ("ca-cert.pem", authority),
        ("client-cert.pem", certificate),
        ("client-key.pem", key),
    ];
    let mut written = Vec::new();
    for (name, text) in files {
        let path = directory.join(name);
        write_secret(&path, text.as_bytes()).map_err(|error| failed(&path, &error))?;
        written.push(path.display().to_string());
    }
    output.answer(&written, || format!("wrote {}\n", written.join(", ")));
    Ok(())
}

/// The certificates and the keys of a file.
fn blocks(pem: &str) -> (Vec<String>, Vec<String>) {
    let (mut certificates, mut keys) = (Vec::new(), Vec::new());
    let mut block = String::new();
    for line in pem.lines() {
        if line.starts_with("-----BEGIN ") {
            block.clear();
        }
        block.push_str(line);
        block.push('\n');
        if line.starts_with("-----END CERTIFICATE") {
            certificates.push(std::mem::take(&mut block));
        } else if line.starts_with("-----END ") && line.contains("PRIVATE KEY") {
            keys.push(std::mem::take(&mut block));
        }
    }
    (certificates, keys)
}

fn is_of(name: &str, place: &str) -> bool {
    let disk = name.split_once('@').map_or(name, |(disk, _)| disk);
    disk == place
        || disk
            .split_once('/')
            .is_some_and(|(machine, _)| machine == place)
}

fn show(export: &NbdExport, found: &NbdExports, host: Option<&str>) -> Shown {
    let name = encoded(&export.name);
    let local = found
        .socket
        .as_ref()
        .map(|socket| format!("nbd+unix:///{name}?socket={}", encoded(socket)));
    let host = host.unwrap_or("localhost");
    let remote = found
        .port
        .map(|port| format!("nbds://{host}:{port}/{name}"));
    Shown {
        name: export.name.clone(),
        description: export.description.clone(),
        local,
        remote,
    }
}

/// A name within a URI. What clients read as it is stays as it is.
fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/@:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn table(all: &[Shown]) -> String {
    if all.is_empty() {
        return "No disk has a whole copy yet.\n".to_owned();
    }
    if all
        .iter()
        .all(|one| one.local.is_none() && one.remote.is_none())
    {
        return "NBD is not served: set nbd.is_local or nbd.listen.\n".to_owned();
    }
    let mut table = Table::new(&["EXPORT", "URI", "WHAT"]);
    for one in all {
        for uri in [&one.local, &one.remote].into_iter().flatten() {
            table.row([printable(&one.name), uri.clone(), one.description.clone()]);
        }
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_within_uris_keep_what_clients_keep() {
        assert_eq!(encoded("web1/root@branch:a"), "web1/root@branch:a");
        assert_eq!(encoded("a b?c#d%é"), "a%20b%3Fc%23d%25%C3%A9");
    }

    #[test]
    fn exports_belong_to_their_machine_and_disk() {
        assert!(is_of("web1/root@latest", "web1"));
        assert!(is_of("web1/root@latest", "web1/root"));
        assert!(!is_of("web1/root@latest", "web"));
        assert!(!is_of("web1/root@latest", "web1/r"));
    }
}
