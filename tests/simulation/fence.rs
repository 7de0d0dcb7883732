//! The source's server as far as workers change it: their sessions, the locks that these hold, what they have sent and the server has not
//! done yet.
//!
//! Who may change the source is a rule of the connector's SQL (src/connectors/postgres/fence.rs). The simulated source follows it
//! step by step ([`crate::source::SimSource`]); the server knows sessions and locks, and judges: once a claim has taken the source, nothing is done
//! there under an earlier one, and no worker ends the session of a later one.

use crate::history::{History, Rows, Slot, TABLES, Tables};
use crate::mutants::Mutant;
use crate::oracle::{Held, Oracle};
use crate::seen::Rare;
use crate::world::World;
use sluice::engine::error::{Error, Result, reason};

/// The advisory locks of the stream: one for the session that sends statements, one for the session that makes slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    Statements,
    Slots,
}

impl Lock {
    pub const ALL: [Self; 2] = [Self::Statements, Self::Slots];
}

/// What changes the source. It may have to wait there, for users' locks or for their transactions.
pub enum Statement {
    /// Tables come into the publication and go out of it; what else is in it stays as it is.
    Alter { add: [bool; TABLES], remove: [bool; TABLES] },
    /// Makes a slot. It waits for the writers that are open when it begins.
    MakeSlot { lasting: bool, waits_for: Option<Vec<u64>> },
    /// Drops the lasting slot.
    DropSlot,
}

/// What a slot begins with.
pub struct ConsistentPoint {
    pub position: u64,
    pub tables: Tables,
    pub definitions: [usize; TABLES],
}

type Answer = Result<Option<ConsistentPoint>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Serves,
    /// Its client is gone, which the server notices when it has done what was sent.
    Orphan,
    /// Its client is gone, and the server will not notice.
    Hangs,
    /// It was told to end: what was sent may just so come to its end.
    Ending,
}

struct Session {
    number: usize,
    /// The claim of its worker. No server knows it: it is there to judge.
    epoch: i64,
    state: State,
    sent: Option<Statement>,
    answer: Option<Answer>,
}

#[derive(Default)]
pub struct SourceServer {
    /// Those that are not gone.
    sessions: Vec<Session>,
    counter: usize,
    locks: [Option<usize>; 2],
    /// The latest claim under which the source was taken.
    taken: i64,
}

impl SourceServer {
    pub fn connect(&mut self, epoch: i64) -> usize {
        self.counter += 1;
        self.sessions.push(Session { number: self.counter, epoch, state: State::Serves, sent: None, answer: None });
        self.counter
    }

    fn session(&mut self, number: usize) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|session| session.number == number)
    }

    pub fn serves(&self, number: usize) -> bool {
        self.sessions.iter().any(|session| session.number == number && session.state == State::Serves)
    }

    /// The client is gone.
    pub fn disconnect(&mut self, number: usize, hangs: bool) {
        if let Some(session) = self.session(number).filter(|session| session.state == State::Serves) {
            session.state = if hangs { State::Hangs } else { State::Orphan };
        }
    }

    /// `pg_terminate_backend`, which does not wait.
    fn end(&mut self, number: usize) {
        if let Some(session) = self.session(number) {
            session.state = State::Ending;
        }
    }

    /// What a session has begun is rolled back before its locks go.
    fn gone(&mut self, number: usize) {
        self.sessions.retain(|session| session.number != number);
        self.locks.iter_mut().for_each(|holder| *holder = holder.filter(|holder| *holder != number));
    }

    /// The server goes down.
    pub fn crash(&mut self) {
        self.sessions.clear();
        self.locks = [None; 2];
    }

    /// `pg_try_advisory_lock`.
    pub fn try_lock(&mut self, number: usize, lock: Lock) -> Result<bool> {
        if !self.serves(number) {
            return Err(unreachable());
        }
        Ok(*self.locks[lock as usize].get_or_insert(number) == number)
    }

    pub fn holder(&self, lock: Lock) -> Option<usize> {
        self.locks[lock as usize]
    }

    pub fn send(&mut self, number: usize, statement: Statement) -> Result<()> {
        let serves = self.serves(number);
        let session = self.session(number).filter(|_| serves).ok_or_else(unreachable)?;
        session.sent = Some(statement);
        Ok(())
    }

    /// The answer, when it is there.
    ///
    /// # Errors
    /// The session is gone.
    pub fn answer(&mut self, number: usize) -> Result<Option<Answer>> {
        let serves = self.serves(number);
        let session = self.session(number).filter(|_| serves).ok_or_else(unreachable)?;
        Ok(session.answer.take())
    }

    /// The lasting slot is being made.
    pub fn is_making_slot(&self) -> bool {
        let makes = |session: &Session| matches!(session.sent, Some(Statement::MakeSlot { lasting: true, waits_for: Some(_) }));
        self.sessions.iter().any(makes)
    }
}

impl World {
    /// A worker ends a session that is in its way.
    pub fn end_holder(&mut self, number: usize, epoch: i64) {
        let ended = self.source.session(number).filter(|session| session.state != State::Ending).map(|session| session.epoch);
        let Some(ended) = ended else { return };
        self.require(ended < epoch, || format!("a worker of claim {epoch} has ended a session of claim {ended}"));
        self.seen.note(Rare::HolderEnded);
        self.source.end(number);
    }

    /// A worker has taken the source: whoever does so later must have claimed later.
    pub fn source_taken(&mut self, epoch: i64) {
        self.changed_under(epoch, "the source was taken");
        self.source.taken = self.source.taken.max(epoch);
    }

    /// The source's server goes on with one of its sessions.
    pub fn serve_source(&mut self) {
        let is_busy = |session: &Session| session.sent.is_some() || matches!(session.state, State::Orphan | State::Ending);
        let busy: Vec<usize> = (0..self.source.sessions.len()).filter(|place| is_busy(&self.source.sessions[*place])).collect();
        // A server takes its time.
        if busy.is_empty() || self.dice.chance(300) {
            return;
        }
        let place = busy[self.dice.below(busy.len() as u32) as usize];
        let (number, state) = (self.source.sessions[place].number, self.source.sessions[place].state);
        let Some(statement) = self.source.sessions[place].sent.take() else { return self.source.gone(number) };
        if state == State::Ending && self.dice.chance(300) {
            self.seen.note(Rare::StatementRolledBack);
            return self.source.gone(number);
        }
        let epoch = self.source.sessions[place].epoch;
        match self.run(statement, epoch) {
            Ok(answer) => {
                self.seen.note_all(Rare::OrphanStatement, (state != State::Serves).into());
                self.source.sessions[place].answer = Some(answer);
            }
            Err(waits) => self.source.sessions[place].sent = Some(waits),
        }
    }

    /// Runs a statement, or gives it back since it has to wait.
    fn run(&mut self, statement: Statement, epoch: i64) -> Result<Answer, Statement> {
        match statement {
            Statement::Alter { add, remove } => {
                let mut tables = self.history.published();
                for table in 0..TABLES {
                    if (add[table] && tables[table]) || (remove[table] && !tables[table]) {
                        return Ok(Err(Error::retry(reason::LEFT_PUBLICATION, "the table is not part of the publication")));
                    }
                    tables[table] = (tables[table] || add[table]) && !remove[table];
                }
                self.changed_under(epoch, "the publication was altered");
                self.history.publish(tables);
                Ok(Ok(None))
            }
            Statement::DropSlot => {
                self.changed_under(epoch, "the slot was dropped");
                self.history.slot = None;
                Ok(Ok(None))
            }
            Statement::MakeSlot { lasting: true, waits_for: None } if self.history.slot.is_some() || self.source.is_making_slot() => {
                // As the connector classifies "already exists" (errors.rs).
                Ok(Err(Error::stop(reason::INTERNAL_ERROR, "there is a slot of that name")))
            }
            Statement::MakeSlot { lasting, waits_for: None } => {
                let waits_for = if self.breaks(Mutant::OrdinarySnapshot) { Vec::new() } else { self.history.open_writers() };
                Err(Statement::MakeSlot { lasting, waits_for: Some(waits_for) })
            }
            Statement::MakeSlot { lasting, waits_for: Some(writers) } if self.history.any_open(&writers) => {
                self.seen.note(Rare::WaitedForWriter);
                Err(Statement::MakeSlot { lasting, waits_for: Some(writers) })
            }
            Statement::MakeSlot { lasting, waits_for: Some(_) } => {
                let point = self.consistent_point();
                if lasting {
                    self.changed_under(epoch, "a slot was made");
                    self.history.slot = Some(Slot { made_at: point.position, confirmed: point.position });
                }
                Ok(Ok(Some(point)))
            }
        }
    }

    /// The rule: nothing is done under a claim when a later one has taken the source.
    fn changed_under(&mut self, epoch: i64, what: &str) {
        let taken = self.source.taken;
        self.require(epoch >= taken, || format!("{what} under claim {epoch} when claim {taken} had taken the source"));
    }

    /// A slot's snapshot reads what is committed from the log.
    fn consistent_point(&mut self) -> ConsistentPoint {
        // Making a slot writes a record of its own; another source's may not.
        let record = self.dice.chance(600);
        self.history.end += if record { 16 } else { 0 };
        let position = self.history.end;
        self.seen.note_all(Rare::StalledAtSnapshot, self.history.has_stalled().into());
        let ordinary = self.breaks(Mutant::OrdinarySnapshot);
        let tables =
            if ordinary { self.history.visible() } else { std::array::from_fn(|table| everything(&self.history, table, position)) };
        ConsistentPoint { position, tables, definitions: std::array::from_fn(|table| self.history.definition(table)) }
    }
}

/// A table with all that the log holds up to a position.
fn everything(history: &History, table: usize, position: u64) -> Rows {
    let held = Held { table, timeline: history.timeline(), copied_at: position, definition: 0 };
    Oracle::default().at(history, held, position).expect("nothing is passed over")
}

/// The session has ended, or the server is another one.
pub fn unreachable() -> Error {
    Error::retry(reason::SOURCE_UNREACHABLE, "the server is not what it was")
}
