//! Which agent may write for which machine, and what people call machines.

use afterimage_blockdev::{AgentId, MachineId, Timestamp};
use rusqlite::{OptionalExtension, params};

use super::{Catalogue, CatalogueError, parse_id, sql, to_sql};

/// Whether an agent may write for a machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Grant {
    /// It may.
    Held,
    /// Another one may.
    HeldByOther(AgentId),
    /// Nobody may.
    Nobody,
}

/// What a move changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MoveOutcome {
    /// Who held the machine before.
    pub before: Option<AgentId>,
}

impl Catalogue {
    /// Says whether an agent may write for a machine.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn grant(&self, machine: MachineId, agent: AgentId) -> Result<Grant, CatalogueError> {
        Ok(match self.holder(machine)? {
            None => Grant::Nobody,
            Some(holder) if holder == agent => Grant::Held,
            Some(holder) => Grant::HeldByOther(holder),
        })
    }

    fn holder(&self, machine: MachineId) -> Result<Option<AgentId>, CatalogueError> {
        self.with("read a grant", |connection| {
            connection
                .query_row(
                    "SELECT agent FROM grants WHERE machine = ?1",
                    [machine.to_string()],
                    |row| row.get::<_, String>(0),
                )
                .optional()?
                .map(|text| parse_id(0, &text))
                .transpose()
        })
    }

    /// Gives a machine to an agent.
    ///
    /// # Errors
    /// `NoAgent`, `AgentRevoked`.
    pub fn move_machine(
        &self,
        machine: MachineId,
        agent: AgentId,
        now: Timestamp,
    ) -> Result<MoveOutcome, CatalogueError> {
        let before = self.holder(machine)?;
        let fail = sql("move a machine");
        let mut connection = self.connection.lock();
        let transaction = connection.transaction().map_err(&fail)?;
        let text = agent.to_string();
        let revoked: Option<Option<i64>> = transaction
            .query_row(
                "SELECT revoked FROM agents WHERE agent = ?1",
                [&text],
                |row| row.get(0),
            )
            .optional()
            .map_err(&fail)?;
        match revoked {
            None => return Err(CatalogueError::NoAgent { agent: text }),
            Some(Some(_)) => return Err(CatalogueError::AgentRevoked { agent: text }),
            Some(None) => {}
        }
        transaction
            .execute(
                "INSERT INTO grants (machine, agent, since) VALUES (?1, ?2, ?3)
                 ON CONFLICT (machine) DO UPDATE
                 SET agent = excluded.agent, since = excluded.since",
                params![machine.to_string(), text, to_sql(now)],
            )
            .map_err(&fail)?;
        transaction.commit().map_err(&fail)?;
        Ok(MoveOutcome { before })
    }

    /// Machines that enrolled, and their names.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn machines(&self) -> Result<Vec<(MachineId, String)>, CatalogueError> {
        self.with("list machines", |connection| {
            connection
                .prepare("SELECT machine, name FROM machines ORDER BY name, machine")?
                .query_map([], |row| {
                    Ok((parse_id(0, &row.get::<_, String>(0)?)?, row.get(1)?))
                })?
                .collect()
        })
    }
}
