//! The connection on which a transaction is written before it has ended on the source, after src/connectors/postgres/applier/early.rs.

use crate::history::Row;
use crate::target::Connection;
use crate::world::World;
use sluice::engine::roles::Applied;
use std::collections::VecDeque;

/// Rows with their keys.
type Keyed = Vec<(usize, Row)>;

#[derive(Default)]
pub struct EarlyLane {
    /// While a transaction is open on it.
    connection: Option<Connection>,
    /// Being written.
    pieces: VecDeque<(u64, Keyed)>,
    /// Written.
    rows: Keyed,
}

impl EarlyLane {
    pub fn is_open(&self) -> bool {
        self.connection.is_some()
    }

    pub fn is_writing(&self) -> bool {
        !self.pieces.is_empty()
    }

    pub fn backend(&self) -> Option<usize> {
        self.connection.as_ref().map(|connection| connection.backend)
    }

    pub fn begin(&mut self, connection: Connection) {
        *self = Self { connection: Some(connection), ..Self::default() };
    }

    /// A piece was sent.
    pub fn sent(&mut self, number: u64, rows: Keyed) {
        self.pieces.push_back((number, rows));
    }

    /// The outcome of the oldest piece, when it is there. `None`: nothing is written any more.
    pub fn outcome(&mut self, world: &mut World) -> Option<Option<Applied>> {
        let is_alive = world.server.is_alive(self.backend()?);
        let over = self.pieces.front().and_then(|(number, _)| world.server.outcome(*number));
        match over {
            Some(Ok(())) => {
                let (_, rows) = self.pieces.pop_front()?;
                let applied = Applied { inserts: rows.len() as u64, ..Applied::default() };
                self.rows.extend(rows);
                Some(Some(applied))
            }
            None if is_alive => None,
            Some(Err(_)) | None => Some(None),
        }
    }

    /// Rolls back.
    pub fn roll_back(&mut self, world: &mut World) -> Option<Connection> {
        let Self { connection, .. } = std::mem::take(self);
        if let Some(connection) = &connection {
            world.server.end(connection.backend);
        }
        connection
    }

    /// The connection and what is written on it, and whether that is all that came.
    pub fn lend(&mut self, world: &World) -> (Option<Connection>, Keyed, bool) {
        let is_complete = self.pieces.is_empty() && self.backend().is_some_and(|backend| world.server.is_alive(backend));
        let Self { connection, rows, .. } = std::mem::take(self);
        (connection, rows, is_complete)
    }
}
