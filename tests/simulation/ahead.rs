//! Rows that are handed over before their transaction has ended, as the connector's log does it (src/connectors/postgres/log: early.rs,
//! desk.rs, feed.rs): in pieces behind all that had ended when they were written, with a word when they come to nothing.

use crate::history::{History, Kind, RowChange, TABLES, Transaction};
use crate::loads::{COPIED_AT_ONCE, RollBack};
use crate::log::push;
use crate::mutants::Mutant;
use crate::seen::Rare;
use crate::tables::table;
use crate::world::World;
use sluice::connectors::postgres::Lsn;
use sluice::engine::batch::{Early, Part};
use sluice::engine::error::{Error, Result, reason};
use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pieces that may be unanswered.
const UNANSWERED: u64 = 2;

/// How far the log was read.
pub struct Place<'a> {
    /// The first transaction that was not.
    pub next: usize,
    pub received: u64,
    /// Under which the tables are mapped.
    pub definitions: &'a [Option<usize>; TABLES],
}

#[derive(Default)]
pub struct Ahead {
    desk: Mutex<Desk>,
    attempt: Option<Attempt>,
    /// Transactions that are not begun with again.
    avoided: HashSet<u64>,
}

/// Where log and consumer agree.
#[derive(Default)]
struct Desk {
    wanted: HashSet<u32>,
    attempt: u64,
    sent: u64,
    written: u64,
    refused: bool,
    sealed: bool,
}

impl Desk {
    /// Whether a piece was refused, and how many are not answered.
    fn unanswered(&self) -> (bool, u64) {
        (self.refused, self.sent.saturating_sub(self.written))
    }
}

/// What went ahead of one transaction.
struct Attempt {
    number: u64,
    transaction: u64,
    wanted: HashSet<u32>,
    /// Changes of it that are gone.
    handed: usize,
    sent: bool,
    /// Roll-backs of all transactions that were read.
    heard: usize,
}

impl Attempt {
    /// The first roll-back of the transaction that was not heard.
    fn unheard(&self, history: &History) -> Option<RollBack> {
        history.roll_backs[self.heard..].iter().find(|roll_back| roll_back.number == self.transaction).copied()
    }
}

/// How a transaction that has ended is handed over.
pub enum Replay {
    /// Not before the pieces are answered.
    Waits,
    Whole,
    /// Behind so many changes, which are written.
    Rest(usize),
}

impl Ahead {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn want(&self, tables: HashSet<u32>) {
        self.desk().wanted = tables;
    }

    pub fn answer(&self, attempt: u64, written: bool) -> Result<()> {
        let mut desk = self.desk();
        match written {
            _ if attempt != desk.attempt || desk.refused => {}
            true => desk.written += 1,
            false if desk.sealed => return Err(Error::retry(reason::WRITE_REFUSED, "what went ahead is lost")),
            false => desk.refused = true,
        }
        Ok(())
    }

    /// The next piece, or the word that pieces came to nothing. Between transactions only.
    pub fn step(&mut self, world: &mut World, place: &Place<'_>) -> Option<Part<Lsn>> {
        if world.dice.chance(if self.attempt.is_some() { 20 } else { 1 }) {
            return self.reconnect(world, place.received);
        }
        self.begin(world, place);
        let attempt = self.attempt.as_ref()?;
        let next = world.history.transactions.get(place.next);
        if let Some(roll_back) = attempt.unheard(&world.history) {
            let comes = next.map_or(world.dice.chance(500), |next| next.commit_start >= roll_back.at);
            return if comes { self.rolled_back(world, roll_back, place.received) } else { None };
        }
        let (refused, unanswered) = self.desk().unanswered();
        if refused {
            world.seen.note(Rare::PieceRefused);
            self.avoid();
            return None;
        }
        if world.dice.chance(8) {
            // Nothing has come for long, so to say.
            return self.end(place.received);
        }
        if unanswered >= UNANSWERED || world.dice.chance(300) {
            return None;
        }
        self.piece(world, place)
    }

    fn begin(&mut self, world: &mut World, place: &Place<'_>) {
        let wanted = self.desk().wanted.clone();
        if self.attempt.is_some() || wanted.is_empty() || world.dice.chance(300) {
            return;
        }
        let is_wanted = |(number, changes): &(u64, &[RowChange])| {
            !self.avoided.contains(number) && changes.first().is_some_and(|first| wanted.contains(&(first.table as u32)))
        };
        let largest = known(&world.history, place.next).filter(is_wanted).max_by_key(|(_, changes)| changes.len());
        let Some(transaction) = largest.filter(|(_, changes)| changes.len() > COPIED_AT_ONCE).map(|(number, _)| number) else { return };
        let heard = world.history.roll_backs.partition_point(|roll_back| roll_back.at <= place.received);
        let number = {
            let mut desk = self.desk();
            *desk = Desk { wanted: wanted.clone(), attempt: desk.attempt + 1, ..Desk::default() };
            desk.attempt
        };
        self.attempt = Some(Attempt { number, transaction, wanted, handed: 0, sent: false, heard });
    }

    /// Rows that come, of tables of which such rows are wanted, up to the first other change.
    fn piece(&mut self, world: &mut World, place: &Place<'_>) -> Option<Part<Lsn>> {
        let overtakes = world.breaks(Mutant::PieceOvertakes);
        let behind = if world.breaks(Mutant::RowsBehindLeftOut) { 0 } else { COPIED_AT_ONCE };
        let size = 1 + world.dice.below(2) as usize;
        let attempt = self.attempt.as_mut()?;
        let (_, changes) = known(&world.history, place.next).find(|(number, _)| *number == attempt.transaction)?;
        // Whatever had ended when a row was written goes before it.
        let next_end = world.history.transactions.get(place.next).map_or(u64::MAX, |next| next.end);
        let read = changes.partition_point(|change| change.at < next_end || overtakes);
        let mut part = Part { open: true, continues: attempt.sent, ..Part::idle(Lsn(place.received)) };
        let mut handed = attempt.handed;
        for change in changes[..read].iter().skip(attempt.handed) {
            if part.batch.changes().len() == size {
                break;
            }
            let is_wanted = matches!(change.kind, Kind::Insert { .. })
                && attempt.wanted.contains(&(change.table as u32))
                && place.definitions[change.table] == Some(change.definition);
            if change.published && !is_wanted {
                break;
            }
            handed += 1;
            if change.published {
                push(&mut part.batch, &table(change.table, change.definition).version, change, false);
            }
        }
        let sent_behind = changes[handed.min(read)..read].iter().filter(|change| change.published).count();
        if part.batch.is_empty() || sent_behind < behind {
            return None;
        }
        (attempt.handed, attempt.sent) = (handed, true);
        part.early = Some(Early::Piece { attempt: attempt.number });
        self.desk().sent += 1;
        world.seen.note(Rare::Piece);
        Some(part)
    }

    /// Something of the transaction was rolled back.
    fn rolled_back(&mut self, world: &mut World, roll_back: RollBack, received: u64) -> Option<Part<Lsn>> {
        let attempt = self.attempt.as_mut()?;
        world
            .seen
            .note_all(if roll_back.kept.is_some() { Rare::SavepointBehindPieces } else { Rare::RollBackBehindPieces }, attempt.sent.into());
        match roll_back.kept {
            Some(kept) if world.breaks(Mutant::SavepointNotHeard) => {
                attempt.heard = world.history.roll_backs.partition_point(|other| other.at <= roll_back.at);
                attempt.handed = attempt.handed.min(kept);
                None
            }
            None if world.breaks(Mutant::RollBackNotHeard) => {
                self.avoid();
                None
            }
            _ => self.end(received),
        }
    }

    /// The log goes on with another connection: what has not ended comes anew, perhaps whole.
    fn reconnect(&mut self, world: &mut World, received: u64) -> Option<Part<Lsn>> {
        let end = self.end(received);
        world.seen.note_all(Rare::ReconnectBehindPieces, end.is_some().into());
        if !world.dice.chance(500) {
            self.avoided.clear();
        }
        end.filter(|_| !world.breaks(Mutant::ReconnectNotHeard))
    }

    /// Nothing more goes ahead of the transaction. The consumer must hear of it when it has got pieces.
    fn end(&mut self, received: u64) -> Option<Part<Lsn>> {
        self.avoid().then(|| Part::dropped(Lsn(received)))
    }

    /// Says whether pieces are gone.
    fn avoid(&mut self) -> bool {
        let Some(attempt) = self.attempt.take() else { return false };
        self.avoided.insert(attempt.transaction);
        attempt.sent
    }

    /// A transaction that has ended comes next.
    pub fn replay(&mut self, transaction: u64) -> Replay {
        let Some(attempt) = self.attempt.take_if(|attempt| attempt.transaction == transaction) else { return Replay::Whole };
        let (refused, unanswered) = self.desk().unanswered();
        if !attempt.sent || refused {
            return Replay::Whole;
        }
        if unanswered > 0 {
            self.attempt = Some(attempt);
            return Replay::Waits;
        }
        self.desk().sealed = true;
        Replay::Rest(attempt.handed)
    }

    /// Whether a transaction must not be put behind others into one part.
    pub fn concerns(&self, history: &History, transaction: &Transaction) -> bool {
        self.attempt.as_ref().is_some_and(|attempt| {
            let heard_before = attempt.unheard(history).is_some_and(|roll_back| roll_back.at <= transaction.commit_start);
            attempt.transaction == transaction.number || heard_before
        })
    }
}

/// Transactions that were not handed over: those that have ended, and those that have not.
fn known(history: &History, next: usize) -> impl Iterator<Item = (u64, &[RowChange])> {
    let ended = history.transactions[next.min(history.transactions.len())..].iter();
    ended.map(|transaction| (transaction.number, &*transaction.changes)).chain(history.open_transactions())
}
