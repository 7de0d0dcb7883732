//! Decoder for the messages of the output plugin `pgoutput`, protocol versions 1 to 4 without two-phase commit: straight from
//! the frame into a batch, one copy of the bytes. (Manual: "Logical Replication Message Formats".)
//!
//! Invariants: malformed input is an error, never a panic; a row is only ever taken under the table version that it was
//! written under.

mod relation;
pub mod streamed;
mod types;

use super::errors::violation;
use super::lsn::Lsn;
use super::replication::cursor::Cursor;
use crate::engine::batch::{Batch, CellKind, Change, Image, Op};
use crate::engine::error::Result;
use crate::engine::table::{MappedTable, TableVersion};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
pub use types::binary_allowed;

/// Prefix of the logical messages that are our own.
pub const MESSAGE_PREFIX: &str = "sluice";
/// Longest content of a message of our own, in bytes: anybody may write messages, and of any length.
const LONGEST_CONTENT: usize = 1024;

/// What a message was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction begins.
    Begin {
        /// Start of its commit record: before its end and not before the end of any earlier transaction.
        commit_start: Lsn,
    },
    /// A transaction ends.
    Commit {
        /// End of its commit record.
        end: Lsn,
        /// When it committed.
        committed_at: SystemTime,
    },
    /// Changes were added to the batch; none when the table is not mapped.
    Changes,
    /// A logical message of our own, in a transaction.
    Own {
        /// What was written.
        content: &'a str,
    },
    /// Nothing that matters here.
    Other,
}

/// A relation as this connection knows it.
enum Relation {
    Mapped(Arc<TableVersion>),
    /// In the publication, but not among the mapped tables.
    Foreign,
}

/// Decoder of one connection: relations are announced anew on each.
pub struct Decoder {
    mapped: HashMap<u32, Arc<TableVersion>>,
    relations: HashMap<u32, Relation>,
    truncates: u32,
}

impl Decoder {
    /// A decoder for rows of these tables; rows of others are passed over.
    #[must_use]
    pub fn new(tables: &[MappedTable]) -> Self {
        let mapped = tables.iter().map(|table| (table.version.id, Arc::clone(&table.version))).collect();
        Self { mapped, relations: HashMap::new(), truncates: 0 }
    }

    /// A decoder for rows of the same tables that knows no relation yet.
    #[must_use]
    pub fn anew(&self) -> Self {
        Self { mapped: self.mapped.clone(), relations: HashMap::new(), truncates: 0 }
    }

    /// Learns what another decoder was told of relations on the same connection since.
    pub fn learn(&mut self, other: Self) {
        self.relations.extend(other.relations);
    }

    /// Whether a message may add changes to the batch.
    #[must_use]
    pub fn adds_changes(message: &[u8]) -> bool {
        matches!(message.first(), Some(b'I' | b'U' | b'D' | b'T'))
    }

    /// The mapped table that a message describes: rows behind it are of another version than those before it. `skip`: bytes between its
    /// kind and what it says.
    #[must_use]
    pub fn describes(&self, message: &[u8], skip: usize) -> Option<u32> {
        let id = message.get(1 + skip..5 + skip).filter(|_| message[0] == b'R')?;
        let id = u32::from_be_bytes(id.try_into().ok()?);
        self.mapped.contains_key(&id).then_some(id)
    }

    /// Decodes one message; its changes are added to `batch`, which must have [`Batch::room`] for the whole message.
    pub fn decode<'a>(&mut self, message: &'a [u8], batch: &mut Batch) -> Result<Message<'a>> {
        let mut body = Cursor::new(message);
        let tag = body.u8()?;
        self.decode_body(tag, body, batch)
    }

    /// The same for a message inside a streamed transaction, which names its (sub)transaction.
    pub fn decode_streamed<'a>(&mut self, message: &'a [u8], batch: &mut Batch) -> Result<Message<'a>> {
        let mut body = Cursor::new(message);
        let tag = body.u8()?;
        let _subxid = body.u32()?;
        self.decode_body(tag, body, batch)
    }

    fn decode_body<'a>(&mut self, tag: u8, mut body: Cursor<'a>, batch: &mut Batch) -> Result<Message<'a>> {
        let decoded = match tag {
            b'B' => begin(&mut body)?,
            b'C' => commit(&mut body)?,
            b'I' => self.insert(&mut body, batch)?,
            b'U' => self.update(&mut body, batch)?,
            b'D' => self.delete(&mut body, batch)?,
            b'T' => self.truncate(&mut body, batch)?,
            b'R' => self.relation(&mut body)?,
            b'M' => logical(&mut body)?,
            // Origin, type: rows are named by OID, origins are not kept.
            b'O' | b'Y' => return Ok(Message::Other),
            tag => return Err(violation(format!("pgoutput: unknown message {:?}", char::from(tag)))),
        };
        Ok(decoded)
    }

    fn relation(&mut self, body: &mut Cursor<'_>) -> Result<Message<'static>> {
        let announced = relation::Announced::read(body)?;
        let relation = announced.version(&self.mapped).map_or(Relation::Foreign, Relation::Mapped);
        self.relations.insert(announced.id, relation);
        Ok(Message::Other)
    }

    /// The table that a row belongs to, by its relation; `None` when it is not mapped.
    pub fn table(&self, id: u32) -> Result<Option<&Arc<TableVersion>>> {
        match self.relations.get(&id) {
            Some(Relation::Mapped(version)) => Ok(Some(version)),
            Some(Relation::Foreign) => Ok(None),
            None => Err(violation(format!("pgoutput: a change of table {id} before its relation"))),
        }
    }

    fn insert(&self, body: &mut Cursor<'_>, batch: &mut Batch) -> Result<Message<'static>> {
        let Some(version) = self.table(body.u32()?)? else { return Ok(Message::Changes) };
        expect(body, b'N')?;
        let new = tuple(body, version, batch)?;
        finish(body)?;
        let table = batch.intern_table(version);
        batch.push(Change { op: Op::Insert, table, old: Image::ABSENT, old_is_full: false, new, group: 0 });
        Ok(Message::Changes)
    }

    fn update(&self, body: &mut Cursor<'_>, batch: &mut Batch) -> Result<Message<'static>> {
        let Some(version) = self.table(body.u32()?)? else { return Ok(Message::Changes) };
        let (old, old_is_full) = match body.u8()? {
            b'N' => (Image::ABSENT, false),
            kind @ (b'K' | b'O') => {
                let old = tuple(body, version, batch)?;
                expect(body, b'N')?;
                (old, kind == b'O')
            }
            kind => return Err(unknown_tuple(kind)),
        };
        let new = tuple(body, version, batch)?;
        finish(body)?;
        let table = batch.intern_table(version);
        batch.push(Change { op: Op::Update, table, old, old_is_full, new, group: 0 });
        Ok(Message::Changes)
    }

    fn delete(&self, body: &mut Cursor<'_>, batch: &mut Batch) -> Result<Message<'static>> {
        let Some(version) = self.table(body.u32()?)? else { return Ok(Message::Changes) };
        let old_is_full = match body.u8()? {
            b'K' => false,
            b'O' => true,
            kind => return Err(unknown_tuple(kind)),
        };
        let old = tuple(body, version, batch)?;
        finish(body)?;
        let table = batch.intern_table(version);
        batch.push(Change { op: Op::Delete, table, old, old_is_full, new: Image::ABSENT, group: 0 });
        Ok(Message::Changes)
    }

    /// One message names all tables of a statement. Its options (CASCADE, RESTART IDENTITY) have done their work on the source:
    /// CASCADE's tables are in the list, sequences are not streamed.
    fn truncate(&mut self, body: &mut Cursor<'_>, batch: &mut Batch) -> Result<Message<'static>> {
        let count = body.u32()?;
        let _options = body.u8()?;
        self.truncates = self.truncates.wrapping_add(1);
        for _ in 0..count {
            if let Some(version) = self.table(body.u32()?)? {
                let table = batch.intern_table(version);
                let group = self.truncates;
                batch.push(Change { op: Op::Truncate, table, old: Image::ABSENT, old_is_full: false, new: Image::ABSENT, group });
            }
        }
        finish(body)?;
        Ok(Message::Changes)
    }
}

fn begin(body: &mut Cursor<'_>) -> Result<Message<'static>> {
    let commit_start = Lsn(body.u64()?);
    let _committed_at = body.i64()?;
    let _xid = body.u32()?;
    finish(body)?;
    Ok(Message::Begin { commit_start })
}

fn commit(body: &mut Cursor<'_>) -> Result<Message<'static>> {
    let _flags = body.u8()?;
    let _commit_start = body.u64()?;
    let end = Lsn(body.u64()?);
    let committed_at = timestamp(body.i64()?);
    finish(body)?;
    Ok(Message::Commit { end, committed_at })
}

/// Messages of others, and those that stand in no transaction, only move the position.
fn logical<'a>(body: &mut Cursor<'a>) -> Result<Message<'a>> {
    const TRANSACTIONAL: u8 = 1;
    let flags = body.u8()?;
    let _position = body.u64()?;
    // Not as text: the prefix of others may be anything.
    let is_own = body.rest().strip_prefix(MESSAGE_PREFIX.as_bytes()).is_some_and(|rest| rest.first() == Some(&0));
    if flags & TRANSACTIONAL == 0 || !is_own {
        return Ok(Message::Other);
    }
    body.take(MESSAGE_PREFIX.len() + 1)?;
    let length = body.u32()? as usize;
    let content = body.take(length)?;
    finish(body)?;
    let content = std::str::from_utf8(content).ok().filter(|content| content.len() <= LONGEST_CONTENT);
    Ok(content.map_or(Message::Other, |content| Message::Own { content }))
}

/// Reads one row: a cell per column of the version.
fn tuple(body: &mut Cursor<'_>, version: &TableVersion, batch: &mut Batch) -> Result<Image> {
    let count = usize::from(body.u16()?);
    if count != version.columns.len() {
        return Err(violation(format!("pgoutput: a row of {} has {count} columns instead of {}", version.name, version.columns.len())));
    }
    let image = batch.begin_image();
    for _ in 0..count {
        match body.u8()? {
            b'n' => batch.push_cell(CellKind::Null, &[]),
            b'u' => batch.push_cell(CellKind::Unchanged, &[]),
            kind @ (b't' | b'b') => {
                let length = body.u32()? as usize;
                let kind = if kind == b't' { CellKind::Text } else { CellKind::Binary };
                batch.push_cell(kind, body.take(length)?);
            }
            kind => return Err(violation(format!("pgoutput: unknown kind of value {:?} in {}", char::from(kind), version.name))),
        }
    }
    Ok(batch.end_image(image))
}

fn expect(body: &mut Cursor<'_>, kind: u8) -> Result<()> {
    match body.u8()? {
        found if found == kind => Ok(()),
        found => Err(unknown_tuple(found)),
    }
}

fn unknown_tuple(kind: u8) -> crate::engine::error::Error {
    violation(format!("pgoutput: unexpected kind of row {:?}", char::from(kind)))
}

fn finish(body: &Cursor<'_>) -> Result<()> {
    if body.is_empty() { Ok(()) } else { Err(violation(format!("pgoutput: {} bytes too many in a message", body.len()))) }
}

/// Microseconds since 2000-01-01 00:00 UTC.
fn timestamp(microseconds: i64) -> SystemTime {
    /// 2000-01-01 in seconds since 1970-01-01.
    const EPOCH: u64 = 946_684_800;
    let epoch = SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH);
    let distance = Duration::from_micros(microseconds.unsigned_abs());
    let moment = if microseconds < 0 { epoch.checked_sub(distance) } else { epoch.checked_add(distance) };
    moment.unwrap_or(epoch)
}

#[cfg(test)]
pub(super) mod tests;
