//! The targets: each takes any bytes, and panics when a promise is broken.
//!
//! Both go through what the library shows to everybody: the decoder, and the log with a server behind it that says anything.

use super::messages::{FRAME, announce, split, tables};
use sluice::connectors::postgres::endpoint::Secret;
use sluice::connectors::postgres::log::{LogConfig, PostgresLog, StreamingPause};
use sluice::connectors::postgres::pgoutput::{Decoder, Message};
use sluice::connectors::postgres::{Endpoint, Lsn, TlsMode};
use sluice::engine::batch::Batch;
use sluice::engine::error::{Class, Error, reason};
use sluice::engine::roles::{BatchLimits, ChangeLog as _};
use sluice::engine::spill::Room;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

/// Memory that one byte of a message may cost: a NULL takes one byte, and a cell of a batch.
const COST: usize = 16;
/// Memory that a message may cost besides.
const BASE: usize = 1024;
/// A target that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Messages of pgoutput, each with two bytes of length before it, to a decoder that knows the tables. True when all of them
/// were taken.
pub fn pgoutput(input: &[u8]) -> bool {
    let mut decoder = Decoder::new(&tables());
    let mut batch = Batch::default();
    for relation in announce() {
        decoder.decode(&relation, &mut batch).expect("the tables as they are");
    }
    split(input).all(|message| decode(&mut decoder, message, &mut batch))
}

fn decode(decoder: &mut Decoder, message: &[u8], batch: &mut Batch) -> bool {
    let (before, size) = (batch.changes().len(), batch.size());
    let outcome = decoder.decode(message, batch);
    let added = &batch.changes()[before..];
    assert!(added.is_empty() || Decoder::adds_changes(message), "changes of a message that has none: {message:?}");
    assert!(batch.size() - size <= COST * message.len() + BASE, "{} bytes for {}", batch.size() - size, message.len());
    let mut bytes = 0;
    for change in added {
        let columns = batch.table(change).columns.len();
        for image in [change.old, change.new] {
            let cells = batch.cells(image);
            assert!(!image.is_present() || cells.len() == columns, "{} cells for {columns} columns", cells.len());
            bytes += cells.iter().map(|cell| batch.bytes(*cell).len()).sum::<usize>();
        }
    }
    assert!(bytes <= message.len(), "{bytes} bytes of values in {}", message.len());
    match outcome {
        Ok(decoded) => {
            assert!(added.is_empty() || decoded == Message::Changes);
            true
        }
        Err(error) => {
            assert_eq!((error.class, error.reason), (Class::Stop, reason::PROTOCOL_VIOLATION), "{error}");
            false
        }
    }
}

/// What a server sends, from the moment that the first byte names: its login, its answers to commands, the stream, or the stream
/// in whole frames. Returns what ended the log, and how many changes it had handed over.
pub fn stream(input: &[u8]) -> (Error, usize) {
    let (moment, bytes) = input.split_first().map_or((Moment::Login, input), |(first, rest)| (Moment::of(*first), rest));
    let bytes = if moment == Moment::Frames { frames(bytes) } else { bytes.to_vec() };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port on loopback");
    let port = listener.local_addr().expect("an address").port();
    let allowed = COST * bytes.len() + BASE;
    let server = std::thread::spawn(move || {
        // The client may have gone before everything is said.
        let _ = serve(listener, moment, &bytes);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let outcome = runtime.block_on(async { tokio::time::timeout(LIMIT, follow(port, allowed)).await.expect("no end in time") });
    server.join().expect("the server ends");
    let (error, _) = &outcome;
    assert!(error.class != Class::Fenced, "{error}");
    // An error that a server has sent itself may be of any kind.
    let sent = error.message.contains("SQLSTATE");
    let known = matches!(error.reason, reason::PROTOCOL_VIOLATION | reason::SOURCE_UNREACHABLE | reason::AUTHENTICATION_FAILED);
    // After an internal error of the server the log connects again.
    let unreachable = error.reason == reason::HOST_UNREACHABLE && moment != Moment::Commands;
    assert!(sent || (error.class != Class::Bug && (known || unreachable)), "{:?} {error}", error.class);
    outcome
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    Login,
    Commands,
    Stream,
    Frames,
}

impl Moment {
    fn of(byte: u8) -> Self {
        match byte % 8 {
            0 => Self::Login,
            1 => Self::Commands,
            2 | 3 => Self::Stream,
            _ => Self::Frames,
        }
    }
}

/// Each piece of the input as one frame of the stream.
fn frames(input: &[u8]) -> Vec<u8> {
    let frame = |message: &[u8]| [FRAME.as_slice(), &(message.len() as u32 + 4).to_be_bytes(), message].concat();
    split(input).flat_map(frame).collect()
}

/// A server that keeps to the protocol up to its moment, then says what it was given and ends.
fn serve(listener: TcpListener, moment: Moment, bytes: &[u8]) -> std::io::Result<()> {
    let (mut socket, _) = listener.accept()?;
    socket.set_read_timeout(Some(LIMIT))?;
    drop(listener);
    read_message(&mut socket, false)?;
    if moment != Moment::Login {
        socket.write_all(b"R\0\0\0\x08\0\0\0\0S\0\0\0\x18server_version\x0015.6\0K\0\0\0\x0c\0\0\0\x01\0\0\0\x02Z\0\0\0\x05I")?;
        read_message(&mut socket, true)?;
    }
    if matches!(moment, Moment::Stream | Moment::Frames) {
        // One row: wal_sender_timeout.
        socket.write_all(b"D\0\0\0\x0f\0\x01\0\0\0\x0560000C\0\0\0\x0dSELECT 1\0Z\0\0\0\x05I")?;
        read_message(&mut socket, true)?;
        // System identifier, timeline, position, database.
        socket.write_all(b"D\0\0\0\x1c\0\x04\0\0\0\x017\0\0\0\x011\0\0\0\x030/1\0\0\0\x01dC\0\0\0\x14IDENTIFY_SYSTEM\0Z\0\0\0\x05I")?;
        read_message(&mut socket, true)?;
        socket.write_all(b"W\0\0\0\x07\0\0\0")?;
    }
    socket.write_all(bytes)?;
    socket.shutdown(Shutdown::Write)?;
    // Closing with unread data would take back what was sent.
    std::io::copy(&mut socket, &mut std::io::sink()).map(drop)
}

/// One message of the client; the first one has no tag.
fn read_message(socket: &mut TcpStream, tagged: bool) -> std::io::Result<()> {
    let mut head = vec![0; 4 + usize::from(tagged)];
    socket.read_exact(&mut head)?;
    let length: [u8; 4] = head[usize::from(tagged)..].try_into().expect("four bytes");
    let mut rest = vec![0; u32::from_be_bytes(length) as usize - 4];
    socket.read_exact(&mut rest)
}

async fn follow(port: u16, allowed: usize) -> (Error, usize) {
    let limits = BatchLimits { rows: 100, bytes: 1 << 16, delay: Duration::from_millis(5) };
    let config = LogConfig {
        endpoint: endpoint(port),
        slot: "s".into(),
        publication: "p".into(),
        tables: tables(),
        binary: false,
        limits,
        room: Room::in_memory(1 << 20),
        pause: StreamingPause::default(),
    };
    let mut log = match PostgresLog::open(config, Lsn(1)).await {
        Ok(log) => log,
        Err(error) => return (error, 0),
    };
    let (mut changes, mut size, mut received, mut open) = (0, 0, Lsn(0), false);
    loop {
        let part = match log.next().await {
            Ok(part) => part,
            Err(error) => return (error, changes),
        };
        changes += part.batch.changes().len();
        size += part.batch.size();
        assert!(size <= allowed, "{size} bytes of changes from {allowed} allowed");
        assert!(part.batch.changes().len() <= limits.rows + 100, "a part is no larger than its limit and one message");
        assert_eq!(part.continues, open, "a part continues what the last one left open");
        assert!(part.received >= received, "positions only grow");
        assert!(part.open || part.boundaries.last().map_or(0, |end| end.changes) == part.batch.changes().len(), "changes without an end");
        (received, open) = (part.received, part.open);
    }
}

fn endpoint(port: u16) -> Endpoint {
    Endpoint {
        host: "127.0.0.1".into(),
        domain: None,
        port,
        database: "d".into(),
        username: "u".into(),
        password: Secret("p".into()),
        tls: TlsMode::Disable,
        ca: None,
        client_certificate: None,
        parameters: std::collections::BTreeMap::new(),
        connect_timeout: Duration::from_secs(10),
    }
}
