//! Tokens, agents and their certificates.

use afterimage_blockdev::{AgentId, MachineId, Timestamp};
use afterimage_protocol::rest::server::Agent;
use rusqlite::{OptionalExtension, Transaction, params};

use super::{Catalogue, CatalogueError, from_sql, parse_id, sql, to_sql};
use crate::ca::PeerIdentity;

/// A certificate to be noted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewCertificate {
    /// Its serial number.
    pub serial: Vec<u8>,
    /// When it expires.
    pub expires: Timestamp,
}

/// What an enrolment gives.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Enrolment {
    /// Whoever may write for the machine from now on: the new agent, or whoever held it before.
    pub holder: AgentId,
}

fn token_hash(secret: &[u8; 32]) -> Vec<u8> {
    // Only hashes are compared, so that the time of a lookup says nothing of a secret.
    blake3::hash(secret).as_bytes().to_vec()
}

impl Catalogue {
    /// Notes a new token, and forgets those that have long expired.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn add_token(
        &self,
        secret: &[u8; 32],
        now: Timestamp,
        expires: Timestamp,
    ) -> Result<(), CatalogueError> {
        const KEPT_NS: i64 = 30 * 86_400 * 1_000_000_000;
        self.with("add a token", |connection| {
            let transaction = connection.transaction()?;
            let oldest = to_sql(now).saturating_sub(KEPT_NS);
            transaction.execute("DELETE FROM tokens WHERE expires < ?1", [oldest])?;
            transaction.execute(
                "INSERT INTO tokens (hash, created, expires) VALUES (?1, ?2, ?3)",
                params![token_hash(secret), to_sql(now), to_sql(expires)],
            )?;
            transaction.commit()
        })
    }

    /// Says whether a token could be used now, without using it.
    ///
    /// # Errors
    /// `TokenUnknown`, `TokenExpired`, `TokenUsed`.
    pub fn check_token(&self, secret: &[u8; 32], now: Timestamp) -> Result<(), CatalogueError> {
        let mut connection = self.connection.lock();
        let transaction = connection.transaction().map_err(sql("check a token"))?;
        token_state(&transaction, secret, now)
    }

    /// Uses a token: notes agent, machine and certificate, and grants the machine to the agent
    /// unless another one holds it.
    ///
    /// # Errors
    /// `TokenUnknown`, `TokenExpired`, `TokenUsed`, `AgentRevoked`, `NameTaken`; then nothing has
    /// changed.
    pub fn enrol(
        &self,
        secret: &[u8; 32],
        agent: AgentId,
        machine: MachineId,
        machine_name: &str,
        certificate: &NewCertificate,
        now: Timestamp,
    ) -> Result<Enrolment, CatalogueError> {
        let fail = sql("enrol");
        let mut connection = self.connection.lock();
        let transaction = connection.transaction().map_err(&fail)?;
        token_state(&transaction, secret, now)?;
        free_name(&transaction, machine, machine_name)?;
        note_certificate(&transaction, agent, certificate, now)?;
        let (agent_text, machine_text) = (agent.to_string(), machine.to_string());
        let rest = || -> rusqlite::Result<AgentId> {
            transaction.execute(
                "UPDATE tokens SET used = ?2, used_by = ?3 WHERE hash = ?1",
                params![token_hash(secret), to_sql(now), agent_text],
            )?;
            transaction.execute(
                "INSERT INTO machines (machine, name) VALUES (?1, ?2)
                 ON CONFLICT (machine) DO UPDATE SET name = excluded.name",
                params![machine_text, machine_name],
            )?;
            transaction.execute(
                "INSERT INTO grants (machine, agent, since) VALUES (?1, ?2, ?3)
                 ON CONFLICT (machine) DO NOTHING",
                params![machine_text, agent_text, to_sql(now)],
            )?;
            let holder: String = transaction.query_row(
                "SELECT agent FROM grants WHERE machine = ?1",
                [&machine_text],
                |row| row.get(0),
            )?;
            parse_id(0, &holder)
        };
        let holder = rest().map_err(&fail)?;
        transaction.commit().map_err(&fail)?;
        Ok(Enrolment { holder })
    }

    /// Notes a renewed certificate of an agent.
    ///
    /// # Errors
    /// `NoAgent`, `AgentRevoked`.
    pub fn renew(
        &self,
        agent: AgentId,
        certificate: &NewCertificate,
        now: Timestamp,
    ) -> Result<(), CatalogueError> {
        let fail = sql("renew");
        let mut connection = self.connection.lock();
        let transaction = connection.transaction().map_err(&fail)?;
        let is_known = transaction
            .query_row(
                "SELECT 1 FROM agents WHERE agent = ?1",
                [agent.to_string()],
                |_| Ok(()),
            )
            .optional()
            .map_err(&fail)?;
        if is_known.is_none() {
            return Err(CatalogueError::NoAgent {
                agent: agent.to_string(),
            });
        }
        note_certificate(&transaction, agent, certificate, now)?;
        transaction.commit().map_err(&fail)
    }

    /// Notes an admin's certificate.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn add_admin(
        &self,
        name: &str,
        certificate: &NewCertificate,
        now: Timestamp,
    ) -> Result<(), CatalogueError> {
        self.with("add an admin", |connection| {
            connection.execute(
                "INSERT INTO certificates (serial, admin, issued, expires)
                 VALUES (?1, ?2, ?3, ?4)",
                params![
                    certificate.serial,
                    name,
                    to_sql(now),
                    to_sql(certificate.expires)
                ],
            )
        })?;
        Ok(())
    }

    /// Says whether a certificate that TLS has verified was issued here and not revoked.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn is_valid(&self, serial: &[u8], identity: &PeerIdentity) -> Result<bool, CatalogueError> {
        let agent = match identity {
            PeerIdentity::Agent(agent) => Some(agent.to_string()),
            PeerIdentity::Admin(_) => None,
        };
        self.with("check a certificate", |connection| {
            connection
                .query_row(
                    "SELECT 1 FROM certificates
                     WHERE serial = ?1 AND agent IS ?2 AND revoked IS NULL",
                    params![serial, agent],
                    |_| Ok(()),
                )
                .optional()
                .map(|found| found.is_some())
        })
    }

    /// Revokes an agent and all its certificates.
    ///
    /// # Errors
    /// `NoAgent`.
    pub fn revoke(&self, agent: AgentId, now: Timestamp) -> Result<(), CatalogueError> {
        let text = agent.to_string();
        let changed = self.with("revoke", |connection| {
            let transaction = connection.transaction()?;
            let changed = transaction.execute(
                "UPDATE agents SET revoked = coalesce(revoked, ?2) WHERE agent = ?1",
                params![text, to_sql(now)],
            )?;
            transaction.execute(
                "UPDATE certificates SET revoked = ?2 WHERE agent = ?1 AND revoked IS NULL",
                params![text, to_sql(now)],
            )?;
            transaction.commit()?;
            Ok(changed)
        })?;
        if changed == 0 {
            Err(CatalogueError::NoAgent { agent: text })
        } else {
            Ok(())
        }
    }

    /// Lists the agents.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn agents(&self) -> Result<Vec<Agent>, CatalogueError> {
        self.with("list agents", |connection| {
            let mut agents = connection.prepare(
                "SELECT agent, enrolled, expires, revoked FROM agents ORDER BY enrolled, agent",
            )?;
            let mut machines = connection
                .prepare("SELECT machine FROM grants WHERE agent = ?1 ORDER BY machine")?;
            let mut listed = Vec::new();
            let mut rows = agents.query([])?;
            while let Some(row) = rows.next()? {
                let text: String = row.get(0)?;
                let granted = machines
                    .query_map([&text], |row| parse_id(0, &row.get::<_, String>(0)?))?
                    .collect::<rusqlite::Result<Vec<_>>>()?;
                listed.push(Agent {
                    agent: parse_id(0, &text)?,
                    enrolled: from_sql(row.get(1)?),
                    expires: from_sql(row.get(2)?),
                    is_revoked: row.get::<_, Option<i64>>(3)?.is_some(),
                    machines: granted,
                });
            }
            Ok(listed)
        })
    }
}

fn token_state(
    transaction: &Transaction<'_>,
    secret: &[u8; 32],
    now: Timestamp,
) -> Result<(), CatalogueError> {
    let found: Option<(i64, Option<i64>)> = transaction
        .query_row(
            "SELECT expires, used FROM tokens WHERE hash = ?1",
            [token_hash(secret)],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()
        .map_err(sql("read a token"))?;
    match found {
        None => Err(CatalogueError::TokenUnknown),
        Some((_, Some(_))) => Err(CatalogueError::TokenUsed),
        Some((expires, None)) if from_sql(expires) <= now => Err(CatalogueError::TokenExpired),
        Some(_) => Ok(()),
    }
}

/// Refuses a name that another machine has. One that nobody may write for any more gives it up.
fn free_name(
    transaction: &Transaction<'_>,
    machine: MachineId,
    name: &str,
) -> Result<(), CatalogueError> {
    let fail = sql("look up a name");
    let own = machine.to_string();
    let holder: Option<String> = transaction
        .query_row(
            "SELECT grants.agent FROM machines JOIN grants USING (machine) JOIN agents USING (agent)
             WHERE name = ?1 AND machine <> ?2 AND revoked IS NULL LIMIT 1",
            params![name, own],
            |row| row.get(0),
        )
        .optional()
        .map_err(&fail)?;
    if let Some(holder) = holder {
        let name = name.to_owned();
        return Err(CatalogueError::NameTaken { name, holder });
    }
    let others = "SELECT machine FROM machines WHERE name = ?1 AND machine <> ?2";
    for table in ["grants", "machines"] {
        let statement = format!("DELETE FROM {table} WHERE machine IN ({others})");
        let done = transaction.execute(&statement, params![name, own]);
        done.map_err(&fail)?;
    }
    Ok(())
}

fn note_certificate(
    transaction: &Transaction<'_>,
    agent: AgentId,
    certificate: &NewCertificate,
    now: Timestamp,
) -> Result<(), CatalogueError> {
    let fail = sql("note a certificate");
    let agent = agent.to_string();
    let (now, expires) = (to_sql(now), to_sql(certificate.expires));
    transaction
        .execute(
            "INSERT INTO agents (agent, enrolled, expires) VALUES (?1, ?2, ?3)
             ON CONFLICT (agent) DO UPDATE SET expires = excluded.expires",
            params![agent, now, expires],
        )
        .map_err(&fail)?;
    let revoked: Option<i64> = transaction
        .query_row(
            "SELECT revoked FROM agents WHERE agent = ?1",
            [&agent],
            |row| row.get(0),
        )
        .map_err(&fail)?;
    if revoked.is_some() {
        return Err(CatalogueError::AgentRevoked { agent });
    }
    transaction
        .execute(
            "DELETE FROM certificates WHERE agent = ?1 AND expires < ?2",
            params![agent, now],
        )
        .and_then(|_| {
            transaction.execute(
                "INSERT INTO certificates (serial, agent, issued, expires)
                 VALUES (?1, ?2, ?3, ?4)",
                params![certificate.serial, agent, now, expires],
            )
        })
        .map_err(&fail)?;
    Ok(())
}
