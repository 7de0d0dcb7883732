//! The reader's thread: reads big, decodes, hands over, and keeps the server informed.
//!
//! A walsender sends each row by itself. A reader that takes every row as it comes makes the server spend more time on
//! waking it than on decoding; so while data flows the thread takes a short nap after a small read and lets more pile up.
//! An idle stream blocks in its read, and a transaction that has ended is handed over before the nap. While a backlog is read, the
//! naps are long: what the server sends then leaves in larger pieces.

use super::buffer::Buffer;
use super::feed::Feed;
use super::input::Input;
use super::opener::{Awaited, Opener};
use super::pause::Until;
use super::streams::{NoRoom, Trouble};
use super::{Shared, guard};
use crate::connectors::postgres::connect::{BlockingTransport, Side};
use crate::connectors::postgres::errors::{self, violation};
use crate::connectors::postgres::lsn::Lsn;
use crate::connectors::postgres::pgoutput::Decoder;
use crate::connectors::postgres::replication::cursor::Cursor;
use crate::connectors::postgres::replication::{CopyBoth, server_error};
use crate::engine::batch::Part;
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::Notice;
use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

/// Longest time in a read or a wait: how soon a confirmation is passed on by a stream on which nothing else happens.
const TICK: Duration = Duration::from_millis(100);
/// Bound for sending a status update.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// Shortest pause between two status updates that were not asked for.
const SHORTEST_FEEDBACK_INTERVAL: Duration = Duration::from_millis(100);
/// Less than this at once is a small read.
const SMALL_READ: usize = 64 * 1024;
/// Data that follows within this time is a flow.
const FLOW: Duration = Duration::from_millis(2);
/// How long data may pile up.
const NAP: Duration = Duration::from_micros(200);
/// How old the last transaction is when the stream counts as behind,
const BEHIND: Duration = Duration::from_secs(1);
/// how much must come between two naps, in bytes,
const FAST: usize = 2 * 1024;
/// how long transactions then wait for more,
const GATHER: Duration = Duration::from_millis(50);
/// and how long data may pile up.
const GATHERING_NAP: Duration = Duration::from_millis(20);
/// What the system may hold for us of a server that is near, in bytes. When it is full, the server's next rows wait on its own side and
/// leave together; with more room each of them takes the whole way by itself.
const NEAR_BUFFER: usize = 256 * 1024;
/// How often an idle stream hands its position over,
const IDLE_INTERVAL: Duration = Duration::from_secs(1);
/// unless it moved that far, in bytes.
const IDLE_DISTANCE: u64 = 16 * 1024 * 1024;
/// How long streaming is off after a defect of the server.
const DEFECT_PAUSE: Duration = Duration::from_secs(300);
/// Begins the codes of errors that should not happen (manual: "PostgreSQL Error Codes", class XX).
const INTERNAL_ERRORS: &str = "XX";
/// What is being done, for messages of errors.
const DOING: &str = "replication stream";

pub(super) struct Reader {
    connection: Connection,
    intake: Intake,
    opener: Opener,
    feedback_interval: Duration,
    /// Streaming is off until this is over.
    awaited: Option<Awaited>,
    /// When the last data came.
    last_data: Option<Instant>,
    /// Bytes since the socket was last empty.
    burst: usize,
}

/// The socket with both directions.
struct Connection {
    transport: BlockingTransport,
    input: Input,
    reported: Lsn,
    reported_at: Instant,
}

/// Why transactions can't be received before they have ended.
enum Fallback {
    NoRoom(NoRoom),
    /// The server says that something is wrong inside of it. PostgreSQL 14 to 17 fail so to decode a transaction that alters a
    /// table after it has rolled back another alteration of the same table, but only while it is open.
    Defect(Error),
}

/// Where received messages go.
struct Intake {
    feed: Feed,
    buffer: Arc<Buffer>,
    shared: Arc<Shared>,
    parts: Vec<Part<Lsn>>,
    /// Transactions are sent before they have ended.
    is_streaming: bool,
    /// Why that can't go on: nothing more is taken from this connection.
    fallback: Option<Fallback>,
    server_end: Lsn,
    reply_requested: bool,
    /// Position that the consumer knows when it has applied all that was handed over.
    handed_over: Lsn,
    idle_at: Option<Instant>,
}

impl Reader {
    /// A reader of a stream that has just begun, without streaming when something is awaited.
    pub(super) fn new(
        copy: CopyBoth,
        feed: Feed,
        buffer: Arc<Buffer>,
        opener: Opener,
        awaited: Option<Awaited>,
        feedback_interval: Duration,
    ) -> Result<Self> {
        let from = feed.assembler.received();
        let (connection, socket) = Connection::new(copy, from, opener.is_near())?;
        let intake = Intake {
            feed,
            buffer,
            shared: Arc::new(Shared::new(from, socket)),
            parts: Vec::new(),
            is_streaming: awaited.is_none(),
            fallback: None,
            server_end: from,
            reply_requested: true, // the first update goes out at once
            handed_over: from,
            idle_at: None,
        };
        Ok(Self { connection, intake, opener, feedback_interval, awaited, last_data: None, burst: 0 })
    }

    /// What the consumer shares with the reader.
    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.intake.shared)
    }

    /// Runs until the consumer is gone or the stream fails.
    pub(super) fn run(mut self) {
        // Even if this thread panics the consumer hears of it.
        let _end = EndOnDrop(Arc::clone(&self.intake.buffer));
        let outcome = self.stream();
        if self.intake.buffer.is_closed() {
            self.connection.say_goodbye(&self.intake.shared);
        } else if let Err(error) = outcome {
            self.intake.fail(error);
        }
    }

    fn stream(&mut self) -> Result<()> {
        // The answer to the command may have brought the first messages with it.
        self.decode()?;
        self.intake.hand_over();
        while !self.intake.buffer.is_closed() {
            self.report()?;
            if let Some(fallback) = self.intake.fallback.take() {
                self.stop_streaming(&fallback)?;
            } else if self.can_stream_again() {
                self.stream_again()?;
            } else if self.intake.wait_for_room() {
                self.intake.hand_over_early();
                self.read()?;
            }
        }
        Ok(())
    }

    fn report(&mut self) -> Result<()> {
        let asked = std::mem::take(&mut self.intake.reply_requested);
        self.connection.report(&self.intake.shared, asked, self.feedback_interval)
    }

    /// Goes on without slices: the server keeps large transactions until they end.
    fn stop_streaming(&mut self, fallback: &Fallback) -> Result<()> {
        let (notice, until) = match fallback {
            Fallback::NoRoom(NoRoom { xid, bytes, cause }) => {
                let message = format!(
                    "the spill is full: {cause}; most of it is transaction {xid} with {} MiB; until that is over, large transactions wait on the source and come whole",
                    bytes >> 20
                );
                (Notice { reason: reason::SPILL_FULL, message }, Until::EndOf(*xid))
            }
            Fallback::Defect(error) => {
                let message = format!(
                    "large transactions wait on the source and come whole for some minutes, since it can't send one before its end: {}",
                    error.message
                );
                (Notice { reason: reason::STREAMING_FAILED, message }, Until::Time(tokio::time::Instant::now() + DEFECT_PAUSE))
            }
        };
        tracing::warn!(reason = notice.reason, "{}", notice.message);
        // Noted first: should the next connection fail, the next session must know of it.
        self.awaited = Some(self.opener.pause(notice, until));
        self.reopen(false)
    }

    fn can_stream_again(&self) -> bool {
        let assembler = &self.intake.feed.assembler;
        !assembler.is_inside() && self.awaited.as_ref().is_some_and(|awaited| awaited.was_before(assembler.received()))
    }

    fn stream_again(&mut self) -> Result<()> {
        tracing::info!("large transactions are received again before they have ended");
        self.reopen(true)?;
        self.awaited = None;
        self.opener.end_pause();
        Ok(())
    }

    /// Begins the stream again behind everything that was received.
    fn reopen(&mut self, streaming: bool) -> Result<()> {
        self.connection.say_goodbye(&self.intake.shared);
        self.intake.hand_over();
        self.intake.reconnect(Decoder::new(self.opener.tables()));
        let from = self.intake.feed.assembler.received();
        let copy = self.opener.reopen(from, streaming)?;
        let (connection, socket) = Connection::new(copy, self.intake.shared.confirmed(), self.opener.is_near())?;
        (self.connection, *guard(&self.intake.shared.socket)) = (connection, socket);
        self.intake.is_streaming = streaming;
        self.decode()
    }

    /// Hands a streamed transaction that has ended over, piece by piece, before anything else is looked at.
    fn replay(&mut self) -> Result<()> {
        while self.intake.feed.is_replaying() && !self.intake.buffer.is_closed() {
            self.report()?;
            if !self.intake.feed.wait_for_answers(TICK) && self.intake.wait_for_room() {
                self.intake.replay()?;
            }
        }
        Ok(())
    }

    fn read(&mut self) -> Result<()> {
        match self.connection.transport.receive(self.connection.input.space()) {
            Ok((0, _)) => Err(lost(&ErrorKind::UnexpectedEof.into())),
            Ok((count, drained)) => {
                self.connection.input.filled(count);
                self.intake.extend_last();
                self.decode()?;
                self.burst += count;
                if drained {
                    self.pile_up();
                }
                Ok(())
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                self.intake.hand_over();
                Ok(())
            }
            Err(error) => Err(lost(&error)),
        }
    }

    fn decode(&mut self) -> Result<()> {
        let now = Instant::now();
        while let Some((tag, body)) = self.connection.input.frame()? {
            self.intake.frame(tag, body, now)?;
            if self.intake.feed.is_replaying() {
                self.replay()?;
            }
            if self.intake.fallback.is_some() || self.intake.buffer.is_closed() {
                break;
            }
        }
        self.intake.show_positions();
        Ok(())
    }

    /// Hands over, and lets data pile up while it flows in small pieces. Transactions that come fast and are old already wait for
    /// more: nobody waits for the single one then, and large parts cost the target less.
    fn pile_up(&mut self) {
        let now = Instant::now();
        let flows = self.last_data.replace(now).is_some_and(|last| now - last < FLOW);
        let burst = std::mem::take(&mut self.burst);
        let assembler = &mut self.intake.feed.assembler;
        let gathers = flows && burst >= FAST && assembler.age() >= BEHIND;
        assembler.set_delay(if gathers { GATHER } else { Duration::ZERO });
        if !gathers || assembler.has_waited(now) {
            self.intake.hand_over();
        }
        if flows && burst < SMALL_READ {
            std::thread::sleep(if gathers { GATHERING_NAP } else { NAP });
        }
    }
}

impl Connection {
    /// A connection on which this position was reported last, and a second handle of its socket.
    fn new(copy: CopyBoth, reported: Lsn, is_near: bool) -> Result<(Self, TcpStream)> {
        let failed = |error| Error::bug(format!("the replication socket: {error}"));
        let transport = copy.transport.into_blocking(TICK, WRITE_LIMIT).map_err(failed)?;
        let socket = transport.socket().map_err(failed)?;
        if is_near {
            socket2::SockRef::from(&socket).set_recv_buffer_size(NEAR_BUFFER).map_err(failed)?;
        }
        let input = Input::new(&copy.received);
        Ok((Self { transport, input, reported, reported_at: Instant::now() }, socket))
    }

    /// Sends a status update when it is due: asked for, news to tell, or the interval is over.
    fn report(&mut self, shared: &Shared, asked: bool, interval: Duration) -> Result<()> {
        let since = self.reported_at.elapsed();
        let news = shared.confirmed() > self.reported && since >= SHORTEST_FEEDBACK_INTERVAL;
        if !(asked || news || since >= interval) {
            return Ok(());
        }
        self.send_status(shared).map_err(|error| lost(&error))
    }

    fn send_status(&mut self, shared: &Shared) -> io::Result<()> {
        let confirmed = shared.confirmed();
        self.transport.send(&status_update(confirmed, SystemTime::now()))?;
        (self.reported, self.reported_at) = (confirmed, Instant::now());
        Ok(())
    }

    /// Tells the server the last position and that we go. It may be gone itself: nobody is left to hear of a failure.
    fn say_goodbye(&mut self, shared: &Shared) {
        const TERMINATE: &[u8] = b"X\0\0\0\x04";
        let _ = self.send_status(shared).and_then(|()| self.transport.send(TERMINATE));
    }
}

impl Intake {
    /// Waits a moment for the consumer when there is no room. Until there is, nothing is read, and the server waits.
    fn wait_for_room(&self) -> bool {
        self.buffer.budget().wait_for_room(self.feed.memory(), TICK)
    }

    /// Goes on with the last part when the consumer has not taken it.
    fn extend_last(&mut self) {
        if let Some(part) = self.buffer.take_back(|part| self.feed.assembler.can_extend(part)) {
            self.feed.assembler.extend(part, Instant::now());
        }
    }

    fn frame(&mut self, tag: u8, body: &[u8], now: Instant) -> Result<()> {
        match tag {
            b'd' => self.copy_data(body, now),
            b'E' => {
                let said = server_error(body);
                let error = errors::classify_server(Side::Source, DOING, &said);
                if !(self.is_streaming && said.code.starts_with(INTERNAL_ERRORS)) {
                    return Err(error);
                }
                self.fallback = Some(Fallback::Defect(error));
                Ok(())
            }
            // CopyDone: the server shuts down.
            b'c' => Err(errors::lost(Side::Source, DOING, "the server has ended the stream")),
            // Notice, parameter status.
            b'N' | b'S' => Ok(()),
            tag => Err(violation(format!("{DOING}: message {:?} is not expected here", char::from(tag)))),
        }
    }

    fn copy_data(&mut self, body: &[u8], now: Instant) -> Result<()> {
        let mut body = Cursor::new(body);
        match body.u8()? {
            // XLogData
            b'w' => {
                let _start = body.u64()?;
                self.server_end = self.server_end.max(Lsn(body.u64()?));
                let _clock = body.u64()?;
                let taken = self.feed.message(body.rest(), now, &mut self.parts);
                self.push_parts();
                match taken {
                    Ok(()) => Ok(()),
                    Err(Trouble::Stream(error)) => Err(error),
                    Err(Trouble::NoRoom(no_room)) => {
                        self.fallback = Some(Fallback::NoRoom(no_room));
                        Ok(())
                    }
                }
            }
            // Primary keepalive
            b'k' => {
                let end = Lsn(body.u64()?);
                let _clock = body.u64()?;
                self.reply_requested |= body.u8()? != 0;
                self.server_end = self.server_end.max(end);
                self.feed.keepalive(end);
                Ok(())
            }
            kind => Err(violation(format!("{DOING}: unknown copy data {:?}", char::from(kind)))),
        }
    }

    /// Replays a piece of a streamed transaction that has ended.
    fn replay(&mut self) -> Result<()> {
        let replayed = self.feed.replay(Instant::now(), &mut self.parts);
        self.push_parts();
        replayed
    }

    /// Hands over pieces of a transaction that has not ended, behind all that has.
    fn hand_over_early(&mut self) {
        while let Some(part) = self.feed.early(Instant::now()) {
            self.hand_over();
            self.push(part);
        }
    }

    /// Goes on with another connection.
    fn reconnect(&mut self, decoder: Decoder) {
        self.feed.reconnect(decoder, &mut self.parts);
        self.push_parts();
    }

    /// Parts that were complete before a message failed are as good as any.
    fn push_parts(&mut self) {
        for part in std::mem::take(&mut self.parts) {
            self.push(part);
        }
    }

    /// Hands over what is whole, and the position of a stream that is idle behind it.
    fn hand_over(&mut self) {
        if let Some(part) = self.feed.assembler.take_whole() {
            self.push(part);
        }
        if let Some(idle) = self.feed.assembler.idle().filter(|idle| self.is_news(*idle)) {
            (self.handed_over, self.idle_at) = (idle, Some(Instant::now()));
            self.buffer.push_idle(idle);
        }
    }

    fn push(&mut self, part: Part<Lsn>) {
        if let Some(boundary) = part.boundaries.last() {
            self.handed_over = self.handed_over.max(boundary.end);
        }
        self.buffer.push(part);
    }

    fn is_news(&self, idle: Lsn) -> bool {
        let rested = self.idle_at.is_none_or(|at| at.elapsed() >= IDLE_INTERVAL);
        idle > self.handed_over && (rested || idle.0 - self.handed_over.0 >= IDLE_DISTANCE)
    }

    fn show_positions(&self) {
        self.shared.received.store(self.feed.assembler.received().0, Ordering::Release);
        self.shared.server_end.store(self.server_end.0, Ordering::Release);
        self.shared.announced.store(self.feed.announced(), Ordering::Release);
    }

    /// Hands over the transactions that ended before the failure, then the failure.
    fn fail(&mut self, error: Error) {
        if let Some(part) = self.feed.assembler.finish() {
            self.push(part);
        }
        self.buffer.end(error);
    }
}

/// Says that the stream has ended when nothing else has.
struct EndOnDrop(Arc<Buffer>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end(Error::bug("the thread that reads the log has died"));
    }
}

fn lost(error: &io::Error) -> Error {
    errors::lost(Side::Source, DOING, &format!("connection lost: {error}"))
}

/// Standby status update (manual: "Streaming Replication Protocol"): written, flushed and applied up to the same position, the
/// durable one, and no wish for an answer.
fn status_update(confirmed: Lsn, now: SystemTime) -> Vec<u8> {
    /// 2000-01-01 in seconds since 1970-01-01.
    const EPOCH: Duration = Duration::from_secs(946_684_800);
    let clock = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().saturating_sub(EPOCH).as_micros() as u64;
    let mut message = vec![b'd', 0, 0, 0, 38, b'r'];
    for number in [confirmed.0, confirmed.0, confirmed.0, clock] {
        message.extend(number.to_be_bytes());
    }
    message.push(0);
    message
}
