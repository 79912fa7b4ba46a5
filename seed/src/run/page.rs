//! Pages of entries, and where they lie in the file.

use afterimage_cache::Damage;
use afterimage_cache::bytes::{array, get_u16, get_u32, put};

use super::{PAGE_BYTES, PAGE_ENTRIES, PAGE_HEADER_BYTES, RunId, STRIPE_PAGES};
use crate::entry::{ENTRY_BYTES, Entry};

/// Where a page and its copy lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Byte offset of the page.
    pub offset: u64,
    /// Byte offset of its copy.
    pub copy: u64,
    /// Pages from this one to the end of its stripe; they lie behind each other.
    pub adjoining: u32,
}

/// The place of a page in a file of so many pages.
#[must_use]
pub fn place_of(page: u32, file_pages: u32) -> Place {
    let stripe = page / STRIPE_PAGES;
    let within = page % STRIPE_PAGES;
    // The last stripe may be short, and its copies follow at once.
    let width = file_pages
        .saturating_sub(stripe * STRIPE_PAGES)
        .clamp(1, STRIPE_PAGES);
    let first = 1 + 2 * u64::from(stripe) * u64::from(STRIPE_PAGES) + u64::from(within);
    Place {
        offset: first * PAGE_BYTES as u64,
        copy: (first + u64::from(width)) * PAGE_BYTES as u64,
        adjoining: width.saturating_sub(within),
    }
}

/// Lays out a page.
pub(super) fn encode_page(entries: &[Entry], run: RunId, number: u32) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    let count = u16::try_from(entries.len()).unwrap_or(u16::MAX);
    put(&mut page, 8, &count.to_le_bytes());
    put(&mut page, 12, &number.to_le_bytes());
    for (place, entry) in entries.iter().enumerate() {
        let at = PAGE_HEADER_BYTES + place * ENTRY_BYTES;
        put(&mut page, at, &entry.encode());
    }
    let hash = page_hash(&page, run);
    put(&mut page, 0, &hash);
    page
}

fn page_hash(bytes: &[u8], run: RunId) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&run.0.to_le_bytes());
    hasher.update(&bytes[8..PAGE_BYTES]);
    array(hasher.finalize().as_bytes(), 0).unwrap_or_default()
}

/// Reads a page's entries.
///
/// # Errors
/// [`Damage`].
pub fn decode_page(bytes: &[u8], run: RunId, page: u32) -> Result<Vec<Entry>, Damage> {
    const PAGE: &str = "map page";
    let short = || Damage::Short { structure: PAGE };
    let bytes = bytes.get(..PAGE_BYTES).ok_or_else(short)?;
    let hash: [u8; 8] = array(bytes, 0).ok_or_else(short)?;
    if hash != page_hash(bytes, run) {
        return Err(Damage::Hash { structure: PAGE });
    }
    let count = usize::from(get_u16(bytes, 8).ok_or_else(short)?);
    if count > PAGE_ENTRIES || get_u32(bytes, 12) != Some(page) {
        return Err(Damage::Field {
            structure: PAGE,
            field: "count or number",
        });
    }
    bytes[PAGE_HEADER_BYTES..]
        .chunks_exact(ENTRY_BYTES)
        .take(count)
        .map(|entry| {
            Entry::decode(entry).ok_or(Damage::Field {
                structure: PAGE,
                field: "entry",
            })
        })
        .collect()
}
