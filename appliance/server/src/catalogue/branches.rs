//! What people call branches, and what they want of them. The branches themselves are the engine's.

use afterimage_blockdev::{DiskId, HistoryId, Lsn, MachineId, Timestamp};
use rusqlite::{Row, params};

use super::{Catalogue, CatalogueError, from_sql, parse_id, to_sql};

/// What is noted of a branch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BranchRow {
    /// Its history.
    pub history: HistoryId,
    /// The machine.
    pub machine: MachineId,
    /// The disk.
    pub disk: DiskId,
    /// Its name, unique among the branches of the disk.
    pub name: String,
    /// The history forked from.
    pub parent: HistoryId,
    /// The LSN forked from.
    pub lsn: Lsn,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// When it was made.
    pub created: Timestamp,
    /// The most that it may hold of its own, in bytes.
    pub quota_bytes: Option<u64>,
    /// What it held when it was closed last, in bytes.
    pub used_bytes: u64,
    /// The image that it is or was promoted to.
    pub promotion: Option<PromotionRow>,
}

/// What is noted of a promotion.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PromotionRow {
    /// The image.
    pub target: String,
    /// The LSN of the branch that the image shows.
    pub lsn: Lsn,
    /// It came to its end, and was verified.
    pub is_done: bool,
}

const COLUMNS: &str = "history, machine, disk, name, parent, lsn, size_bytes, created,
    quota_bytes, used_bytes, promotion_target, promotion_lsn, promotion_done";

fn count(bytes: u64) -> i64 {
    to_sql(Timestamp(bytes))
}

fn branch(row: &Row<'_>) -> rusqlite::Result<BranchRow> {
    let number = |column| -> rusqlite::Result<u64> { Ok(from_sql(row.get(column)?).0) };
    let target: Option<String> = row.get(10)?;
    let promotion = match target {
        None => None,
        Some(target) => Some(PromotionRow {
            target,
            lsn: Lsn(number(11)?),
            is_done: row.get(12)?,
        }),
    };
    let quota: Option<i64> = row.get(8)?;
    Ok(BranchRow {
        history: parse_id(0, &row.get::<_, String>(0)?)?,
        machine: parse_id(1, &row.get::<_, String>(1)?)?,
        disk: parse_id(2, &row.get::<_, String>(2)?)?,
        name: row.get(3)?,
        parent: parse_id(4, &row.get::<_, String>(4)?)?,
        lsn: Lsn(number(5)?),
        size_bytes: number(6)?,
        created: from_sql(row.get(7)?),
        quota_bytes: quota.map(|quota| from_sql(quota).0),
        used_bytes: number(9)?,
        promotion,
    })
}

impl Catalogue {
    /// Lists what is noted of branches.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn branches(&self) -> Result<Vec<BranchRow>, CatalogueError> {
        self.with("list branches", |connection| {
            connection
                .prepare(&format!("SELECT {COLUMNS} FROM branches ORDER BY created"))?
                .query_map([], branch)?
                .collect()
        })
    }

    /// Notes a branch, or notes it anew.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn put_branch(&self, row: &BranchRow) -> Result<(), CatalogueError> {
        let promotion = row.promotion.as_ref();
        self.with("note a branch", |connection| {
            connection
                .execute(
                    &format!(
                        "INSERT OR REPLACE INTO branches ({COLUMNS})
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)"
                    ),
                    params![
                        row.history.to_string(),
                        row.machine.to_string(),
                        row.disk.to_string(),
                        row.name,
                        row.parent.to_string(),
                        count(row.lsn.0),
                        count(row.size_bytes),
                        to_sql(row.created),
                        row.quota_bytes.map(count),
                        count(row.used_bytes),
                        promotion.map(|promotion| promotion.target.as_str()),
                        promotion.map(|promotion| count(promotion.lsn.0)),
                        promotion.is_some_and(|promotion| promotion.is_done),
                    ],
                )
                .map(|_| ())
        })
    }

    /// Forgets a branch.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn forget_branch(&self, history: HistoryId) -> Result<(), CatalogueError> {
        self.with("forget a branch", |connection| {
            let history = history.to_string();
            connection
                .execute("DELETE FROM branches WHERE history = ?1", [history])
                .map(|_| ())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_branch_is_noted_noted_anew_and_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("catalogue.db");
        let mut row = BranchRow {
            history: HistoryId([1; 16]),
            machine: MachineId([2; 16]),
            disk: DiskId([3; 16]),
            name: "try'; DROP TABLE branches".to_owned(),
            parent: HistoryId([4; 16]),
            lsn: Lsn(5),
            size_bytes: 6 << 40,
            created: Timestamp(7),
            quota_bytes: None,
            used_bytes: 0,
            promotion: None,
        };
        Catalogue::open(&path, 10)
            .unwrap()
            .put_branch(&row)
            .unwrap();
        let catalogue = Catalogue::open(&path, 10).unwrap();
        assert_eq!(catalogue.branches().unwrap(), std::slice::from_ref(&row));
        row.quota_bytes = Some(8);
        row.used_bytes = 9;
        row.promotion = Some(PromotionRow {
            target: "/images/a.img".to_owned(),
            lsn: Lsn(10),
            is_done: true,
        });
        catalogue.put_branch(&row).unwrap();
        assert_eq!(catalogue.branches().unwrap(), std::slice::from_ref(&row));
        catalogue.forget_branch(row.history).unwrap();
        assert_eq!(catalogue.branches().unwrap(), []);
    }
}
