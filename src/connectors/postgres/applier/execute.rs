//! Runs the steps of a plan: statements are sent ahead of their answers, and every answer is checked.

use super::super::checkpoint::Claim;
use super::super::connect::Side as Server;
use super::super::errors::{ServerError, classify, classify_server, does_not_fit};
use super::super::statements::{Encodings, Parameter, TableWriter, truncate};
use super::super::target::failed;
use super::encode::{
    COPY_HEADER, COPY_PIECE, COPY_TRAILER, Chunk, OneCell, STATEMENT_BYTES, SetArgument, copy_row, encoding, key_text, next_chunk,
};
use super::lane::CheckpointMove;
use crate::engine::coalesce::{Action, ColumnSet, Images, Plan, Row, Step, Write};
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::Applied;
use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, MaybeDone, maybe_done};
use futures::{SinkExt as _, TryStreamExt as _};
use std::collections::{HashMap, VecDeque};
use std::pin::{Pin, pin};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};

/// Rows from which an insert is a `COPY` and no statement with arrays.
const COPY_FROM: usize = 200;
/// Statements whose answers may be outstanding.
const AHEAD: usize = 64;
/// Prepared statements that are kept; each table has a handful.
const STATEMENTS: usize = 512;

/// Names a prepared statement.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct StatementKey {
    table: u32,
    action: Action,
    columns: ColumnSet,
    shape: Shape,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Shape {
    Row,
    Set(Encodings),
    Copy { binary: bool },
}

/// Prepared statements of one connection.
#[derive(Default)]
pub(super) struct Statements(HashMap<StatementKey, Statement>);

impl Statements {
    /// Forgets all: tables may have changed.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// What a statement has answered.
enum Answer {
    /// Rows that it touched.
    Rows(u64),
    /// Numbers, from 1, of the rows that it hit.
    Hits(Vec<i32>),
}

type PendingAnswer<'a> = MaybeDone<BoxFuture<'a, Result<Answer, tokio_postgres::Error>>>;

/// A statement that was sent.
struct Pending<'a> {
    answer: PendingAnswer<'a>,
    bytes: usize,
    wrote: Wrote<'a>,
}

/// What a statement writes.
enum Wrote<'a> {
    Nothing,
    Truncate(&'a TableWriter),
    Rows(Sent<'a>),
    Checkpoint,
}

/// Rows that a statement writes.
#[derive(Clone, Copy)]
struct Sent<'a> {
    writer: &'a TableWriter,
    action: Action,
    rows: &'a [Row],
}

/// Runs statements for one part.
pub(super) struct Executor<'a> {
    client: &'a Client,
    statements: &'a mut Statements,
    images: &'a Images<'a>,
    /// By index of the batch's tables; `None` for tables without a due change.
    writers: &'a [Option<&'a TableWriter>],
    pending: VecDeque<Pending<'a>>,
    bytes_ahead: usize,
    pub applied: Applied,
    /// The checkpoint's row was there to be moved.
    pub moved: bool,
}

impl<'a> Executor<'a> {
    pub fn new(client: &'a Client, statements: &'a mut Statements, images: &'a Images<'a>, writers: &'a [Option<&'a TableWriter>]) -> Self {
        Self { client, statements, images, writers, pending: VecDeque::new(), bytes_ahead: 0, applied: Applied::default(), moved: false }
    }

    /// Sends a statement without rows, for example `BEGIN`.
    pub async fn command(&mut self, sql: &'static str) -> Result<()> {
        let client = self.client;
        let run = Box::pin(async move { client.batch_execute(sql).await.map(|()| Answer::Rows(0)) });
        self.send(run, 0, Wrote::Nothing).await
    }

    /// Sends the statement that moves the checkpoint and proves the claim.
    pub async fn move_checkpoint(&mut self, statement: &Statement, claim: &'a Claim, checkpoint: &CheckpointMove) -> Result<()> {
        let (client, statement) = (self.client, statement.clone());
        let (from, to) = (checkpoint.from.to_string(), checkpoint.to.max(checkpoint.from).to_string());
        let rows = checkpoint.rows;
        let run = Box::pin(async move {
            let key = &claim.key;
            let parameters: [&(dyn ToSql + Sync); 7] = [&key.system_identifier, &key.database, &key.slot, &claim.epoch, &to, &from, &rows];
            client.execute(&statement, &parameters).await.map(Answer::Rows)
        });
        self.send(run, 0, Wrote::Checkpoint).await
    }

    /// Runs the steps in order.
    pub async fn run(&mut self, plan: &'a Plan<'a>) -> Result<()> {
        for step in &plan.steps {
            match step {
                Step::Truncate(tables) => self.truncate(tables).await?,
                Step::Write(write) => self.write(write, &plan.column_sets[write.columns as usize]).await?,
            }
        }
        self.applied = plan.applied;
        Ok(())
    }

    fn writer(&self, table: u32) -> Result<&'a TableWriter> {
        self.writers[table as usize].ok_or_else(|| {
            let name = &self.images.batch().tables()[table as usize].name;
            Error::bug(format!("changes of table {name} are due before it was prepared"))
        })
    }

    async fn truncate(&mut self, tables: &[u32]) -> Result<()> {
        let writers: Vec<&'a TableWriter> = tables.iter().map(|table| self.writer(*table)).collect::<Result<_>>()?;
        let sql = truncate(writers.iter().map(|writer| writer.name()));
        let client = self.client;
        let run = Box::pin(async move { client.batch_execute(&sql).await.map(|()| Answer::Rows(0)) });
        let wrote = writers.first().map_or(Wrote::Nothing, |writer| Wrote::Truncate(writer));
        self.send(run, 0, wrote).await
    }

    async fn write(&mut self, step: &'a Write, columns: &ColumnSet) -> Result<()> {
        let writer = self.writer(step.table)?;
        // One row that keeps its key is in nobody's way: what had to go before is gone, what comes comes later.
        let in_place = step.action == Action::Rewrite && matches!(&step.rows[..], [row] if !row.old.is_present());
        let action = if in_place { Action::Update } else { step.action };
        let parameters = writer.parameters(action, columns);
        let mut rows: &[Row] = &step.rows;
        while !rows.is_empty() {
            let chunk = next_chunk(self.images, writer, &parameters, &mut rows)?;
            let set = !step.one_by_one && writer.has_set_form(action, &parameters, &chunk.encodings);
            let sent = Sent { writer, action, rows: chunk.rows };
            let count = chunk.rows.len();
            if action == Action::Rewrite {
                if !set || count < step.rows.len() {
                    return Err(Error::bug(format!("rows of table {} do not fit into one statement", writer.target)));
                }
                self.write_set(sent, columns, &parameters, chunk).await?;
            } else if action == Action::Insert && chunk.uniform && (count >= COPY_FROM || !set && count > 1) {
                self.copy(sent, chunk.encodings.first().copied().unwrap_or(false)).await?;
            } else if set && count > 1 {
                self.write_set(sent, columns, &parameters, chunk).await?;
            } else if columns.some.is_empty() {
                self.write_rows(sent, columns, &parameters).await?;
            } else {
                self.write_unlike_rows(sent).await?;
            }
        }
        Ok(())
    }

    /// Rows that leave different columns out, each by its own statement.
    async fn write_unlike_rows(&mut self, sent: Sent<'a>) -> Result<()> {
        for row in sent.rows {
            let one = Sent { rows: std::slice::from_ref(row), ..sent };
            let columns = ColumnSet::of(self.images, one.rows);
            let parameters = sent.writer.parameters(sent.action, &columns);
            self.write_rows(one, &columns, &parameters).await?;
        }
        Ok(())
    }

    async fn write_set(&mut self, sent: Sent<'a>, columns: &ColumnSet, parameters: &[Parameter], chunk: Chunk<'a>) -> Result<()> {
        let arrays = SetArgument::all(self.images, sent.writer, sent.rows, parameters, &chunk.encodings);
        let statement = self.statement(sent, columns, Shape::Set(chunk.encodings)).await?;
        let client = self.client;
        let run: BoxFuture<'a, _> = if sent.action == Action::Insert {
            Box::pin(async move { client.execute_raw(&statement, arrays).await.map(Answer::Rows) })
        } else {
            Box::pin(async move {
                let mut answer = pin!(client.query_raw(&statement, arrays).await?);
                let mut hits = Vec::new();
                while let Some(row) = answer.try_next().await? {
                    hits = row.try_get::<_, Option<Vec<i32>>>(0)?.unwrap_or_default();
                }
                Ok(Answer::Hits(hits))
            })
        };
        self.send(run, chunk.bytes, Wrote::Rows(sent)).await
    }

    async fn write_rows(&mut self, sent: Sent<'a>, columns: &ColumnSet, parameters: &[Parameter]) -> Result<()> {
        let statement = self.statement(sent, columns, Shape::Row).await?;
        for row in sent.rows {
            let mut cells = Vec::with_capacity(parameters.len());
            let mut bytes = 0;
            for parameter in parameters {
                let cell = parameter.cell(self.images, *row);
                encoding(sent.writer, *parameter, cell)?;
                bytes += self.images.bytes(cell).len();
                cells.push(OneCell { images: self.images, cell });
            }
            let (client, statement) = (self.client, statement.clone());
            let run = Box::pin(async move { client.execute_raw(&statement, cells).await.map(Answer::Rows) });
            let one = Sent { rows: std::slice::from_ref(row), ..sent };
            self.send(run, bytes, Wrote::Rows(one)).await?;
        }
        Ok(())
    }

    async fn copy(&mut self, sent: Sent<'a>, binary: bool) -> Result<()> {
        let statement = self.statement(sent, &ColumnSet::default(), Shape::Copy { binary }).await?;
        self.drain().await?;
        let copied = copy_rows(self.client, &statement, self.images, sent.rows, binary).await;
        let copied = copied.map_err(|error| write_failed(sent.writer, &error))?;
        self.check(sent, Answer::Rows(copied))
    }

    /// The prepared statement. Preparing waits for an answer, so all that was sent before is awaited first.
    async fn statement(&mut self, sent: Sent<'a>, columns: &ColumnSet, shape: Shape) -> Result<Statement> {
        let writer = sent.writer;
        let key = StatementKey { table: writer.version.id, action: sent.action, columns: columns.clone(), shape };
        if let Some(statement) = self.statements.0.get(&key) {
            return Ok(statement.clone());
        }
        self.drain().await?;
        let sql = match &key.shape {
            Shape::Row => writer.row_statement(key.action, columns),
            Shape::Set(encodings) => writer.set_statement(key.action, columns, encodings),
            Shape::Copy { binary } => writer.copy(*binary),
        };
        let statement = self.client.prepare(&sql).await.map_err(|error| write_failed(writer, &error))?;
        if self.statements.0.len() >= STATEMENTS {
            self.statements.0.clear();
        }
        self.statements.0.insert(key, statement.clone());
        Ok(statement)
    }

    /// Sends at once; waits only when too much is under way.
    async fn send(&mut self, run: BoxFuture<'a, Result<Answer, tokio_postgres::Error>>, bytes: usize, wrote: Wrote<'a>) -> Result<()> {
        let mut answer = maybe_done(run);
        // The first poll puts the statement into the connection's queue.
        let _ = futures::poll!(Pin::new(&mut answer));
        self.pending.push_back(Pending { answer, bytes, wrote });
        self.bytes_ahead += bytes;
        while self.pending.len() > AHEAD || (self.bytes_ahead > STATEMENT_BYTES && self.pending.len() > 1) {
            self.await_oldest().await?;
        }
        Ok(())
    }

    /// Waits for all answers.
    pub async fn drain(&mut self) -> Result<()> {
        while !self.pending.is_empty() {
            self.await_oldest().await?;
        }
        Ok(())
    }

    async fn await_oldest(&mut self) -> Result<()> {
        let Some(mut pending) = self.pending.pop_front() else {
            return Ok(());
        };
        self.bytes_ahead -= pending.bytes;
        let mut answer = Pin::new(&mut pending.answer);
        answer.as_mut().await;
        let answer = answer.take_output().ok_or_else(|| Error::bug("an answer was taken twice"))?;
        match (pending.wrote, answer) {
            (Wrote::Rows(sent), Ok(answer)) => self.check(sent, answer)?,
            (Wrote::Truncate(_), Ok(_)) => {}
            (Wrote::Truncate(writer), Err(error)) => return Err(write_failed(writer, &error)),
            (Wrote::Rows(sent), Err(error)) => return Err(write_failed(sent.writer, &error)),
            (Wrote::Checkpoint, Ok(answer)) => self.moved = matches!(answer, Answer::Rows(1)),
            (Wrote::Nothing, Ok(_)) => {}
            (Wrote::Checkpoint | Wrote::Nothing, Err(error)) => return Err(failed("apply changes")(error)),
        }
        Ok(())
    }

    /// A statement must have written exactly the rows that it was sent.
    fn check(&self, sent: Sent<'a>, answer: Answer) -> Result<()> {
        let expected = sent.rows.len() as u64;
        match (sent.action, answer) {
            (Action::Insert, Answer::Rows(rows)) if rows == expected => {}
            (Action::Insert, _) => {
                return Err(Error::stop(
                    reason::WRITE_REFUSED,
                    format!("a trigger or rule of target table {} has swallowed inserted rows", sent.writer.target),
                ));
            }
            (_, Answer::Rows(1)) if expected == 1 => {}
            (Action::Delete, Answer::Rows(0)) if sent.writer.loses_rows => {}
            (_, Answer::Rows(0)) => return Err(self.row_missing(sent, sent.rows[0])),
            (_, Answer::Rows(_)) => return Err(self.several_rows(sent, sent.rows[0])),
            (_, Answer::Hits(hits)) => self.check_hits(sent, &hits)?,
        }
        Ok(())
    }

    fn check_hits(&self, sent: Sent<'a>, hits: &[i32]) -> Result<()> {
        let mut hit = vec![false; sent.rows.len()];
        for number in hits {
            // Numbers come from WITH ORDINALITY: from 1 to the number of rows.
            let place = usize::try_from(*number - 1).unwrap_or(usize::MAX);
            match hit.get_mut(place) {
                Some(seen @ false) => *seen = true,
                Some(true) => return Err(self.several_rows(sent, sent.rows[place])),
                None => return Err(Error::bug("the target answered with a row that was not sent")),
            }
        }
        match hit.iter().position(|hit| !hit) {
            Some(_) if sent.action == Action::Delete && sent.writer.loses_rows => Ok(()),
            Some(place) => Err(self.row_missing(sent, sent.rows[place])),
            None => Ok(()),
        }
    }

    fn row_missing(&self, sent: Sent<'a>, row: Row) -> Error {
        let doing = if sent.action == Action::Delete { "delete" } else { "update" };
        let which = self.which(sent, row);
        Error::stop(
            reason::ROW_MISSING,
            format!(
                "target table {} has no row {which} to {doing}: something else has written there; set spec.request to a Resync of it",
                sent.writer.target
            ),
        )
    }

    fn several_rows(&self, sent: Sent<'a>, row: Row) -> Error {
        let which = self.which(sent, row);
        Error::stop(reason::ROW_CONFLICT, format!("target table {} has several rows {which}", sent.writer.target))
    }

    fn which(&self, sent: Sent<'a>, row: Row) -> String {
        if sent.writer.key.is_empty() {
            return "like the old row".to_owned();
        }
        format!("with {}", key_text(self.images, sent.writer, row))
    }
}

/// Copies new rows in bounded pieces.
async fn copy_rows(
    client: &Client,
    statement: &Statement,
    images: &Images<'_>,
    rows: &[Row],
    binary: bool,
) -> Result<u64, tokio_postgres::Error> {
    let sink = client.copy_in::<_, Bytes>(statement).await?;
    let mut sink = pin!(sink);
    let mut piece = BytesMut::with_capacity(COPY_PIECE);
    piece.extend_from_slice(if binary { COPY_HEADER } else { b"" });
    for &row in rows {
        copy_row(images, row, binary, &mut piece);
        if piece.len() >= COPY_PIECE {
            sink.send(piece.split().freeze()).await?;
            piece.reserve(COPY_PIECE);
        }
    }
    piece.extend_from_slice(if binary { COPY_TRAILER } else { b"" });
    sink.send(piece.freeze()).await?;
    sink.finish().await
}

/// What a server says of a failed write, without the values of the row: the detail is kept only where it names the key.
fn write_failed(writer: &TableWriter, error: &tokio_postgres::Error) -> Error {
    let what = format!("write target table {}", writer.target);
    let Some(said) = error.as_db_error() else {
        return classify(Server::Target, &what, error);
    };
    let mut server = ServerError::from(said);
    if let Some(error) = does_not_fit(&writer.target, &writer.narrower, &server) {
        return error;
    }
    // Rows of the table's type were sent while somebody has altered the table: the next session reads it again.
    if server.code == "42804" && writer.has_arrays() {
        return Error::retry(reason::SCHEMA_CHANGED, format!("{what}: {}", server.message));
    }
    let names_key = said.constraint().is_some() && said.constraint() == writer.key_index.as_deref() && server.code == "23505";
    if !names_key {
        server.detail = None;
    }
    let mut failure = classify_server(Server::Target, &what, &server);
    if server.code == "23P01" {
        failure.reason = reason::ROW_CONFLICT;
    }
    failure
}
