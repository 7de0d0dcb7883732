//! What a Mirror waits for before it copies: round trips one after the other, which is what counts on a far server.

mod support;
#[path = "support/worker.rs"]
mod worker;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use support::{Postgres, eventually};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use worker::{Worker, assert_equal};

/// Round trips one after the other before the first row, those of logins included (5 each, several at a time).
const ROUND_TRIPS: u64 = 41;
/// Connections until then.
const LOGINS: u64 = 8;
/// From the worker to a server and back. Long beside what servers and worker need for a step, so that steps that are taken side by
/// side are seen to be. Where the machine is too busy for that, more are counted than there are, never fewer: then it is counted
/// again with a longer one.
const ROUND_TRIP: [Duration; 3] = [Duration::from_millis(60), Duration::from_millis(120), Duration::from_millis(240)];

/// What went over the wire. A round trip comes after another one when its request was sent after the other's answer was received,
/// on whatever connection: this is never less than what waits for each other.
#[derive(Debug, Default)]
struct Seen {
    /// Round trips that the worker has received the end of.
    answered: u64,
    logins: u64,
    /// Round trips and logins until the first row has come.
    copy: Option<(u64, u64)>,
}

/// Bytes on their way, and when they arrive.
type Late = (Instant, Vec<u8>, u64);

/// A server behind a slow link; the port.
async fn far(server: u16, round_trip: Duration, seen: Arc<Mutex<Seen>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        loop {
            let (worker, _) = listener.accept().await.expect("a connection");
            tokio::spawn(link(worker, server, round_trip, Arc::clone(&seen)));
        }
    });
    port
}

async fn link(worker: TcpStream, server: u16, round_trip: Duration, seen: Arc<Mutex<Seen>>) {
    let note = |change: &mut dyn FnMut(&mut Seen) -> u64| change(&mut seen.lock().unwrap_or_else(PoisonError::into_inner));
    // The connection itself is a round trip.
    let connected = note(&mut |seen| {
        seen.logins += 1;
        seen.answered + 1
    });
    tokio::time::sleep(round_trip).await;
    note(&mut |seen| {
        seen.answered = seen.answered.max(connected);
        0
    });
    let server = TcpStream::connect(("127.0.0.1", server)).await.expect("the server");
    worker.set_nodelay(true).expect("an option");
    server.set_nodelay(true).expect("an option");
    let ((mut from_worker, mut to_worker), (mut from_server, mut to_server)) = (worker.into_split(), server.into_split());
    let (requests, mut requested) = mpsc::unbounded_channel::<Late>();
    let (answers, mut answered) = mpsc::unbounded_channel::<Late>();
    let trip = Arc::new(std::sync::atomic::AtomicU64::new(connected));
    let order = std::sync::atomic::Ordering::SeqCst;

    let read_worker = async {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(count @ 1..) = from_worker.read(&mut bytes).await {
            let sent = &bytes[..count];
            let copies = sent.windows(10).any(|words| words == b" TO STDOUT");
            let number = note(&mut |seen| {
                if copies && seen.copy.is_none() {
                    // Its answer begins with the first row.
                    seen.copy = Some((seen.answered + 1, seen.logins));
                }
                seen.answered + 1
            });
            let _ = requests.send((Instant::now() + round_trip / 2, sent.to_vec(), number));
        }
        drop(requests);
    };
    let write_server = async {
        while let Some((when, bytes, number)) = requested.recv().await {
            tokio::time::sleep_until(when.into()).await;
            trip.store(number, order);
            if to_server.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = to_server.shutdown().await;
    };
    let read_server = async {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(count @ 1..) = from_server.read(&mut bytes).await {
            let _ = answers.send((Instant::now() + round_trip / 2, bytes[..count].to_vec(), trip.load(order)));
        }
        drop(answers);
    };
    let write_worker = async {
        while let Some((when, bytes, number)) = answered.recv().await {
            tokio::time::sleep_until(when.into()).await;
            note(&mut |seen| {
                seen.answered = seen.answered.max(number);
                0
            });
            if to_worker.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = to_worker.shutdown().await;
    };
    tokio::join!(read_worker, write_server, read_server, write_worker);
}

/// Copies two tables; round trips and logins until the first row. Too many of them end it there.
async fn copy(server: &Postgres, number: usize, round_trip: Duration) -> (u64, u64) {
    let names = [format!("shop_{number}"), format!("dw_{number}")];
    let (left, right) = (server.create_database(&names[0]).await, server.create_database(&names[1]).await);
    left.batch_execute(
        "CREATE TABLE a (id int PRIMARY KEY, note text); CREATE TABLE b (id int PRIMARY KEY, note text);
         CREATE INDEX ON a (note);
         INSERT INTO a SELECT g, 'first' FROM generate_series(1, 100) g; INSERT INTO b SELECT g, 'first' FROM generate_series(1, 100) g",
    )
    .await
    .expect("the seed");
    let seen = Arc::new(Mutex::new(Seen::default()));
    let ports = [far(server.port, round_trip, Arc::clone(&seen)).await, far(server.port, round_trip, Arc::clone(&seen)).await];
    let worker = Worker::start_with((server, &names[0]), (server, &names[1]), &["a", "b"], |desired| {
        [desired.source.port, desired.target.port] = ports;
        desired.slot = format!("sluice_{number}");
    });
    let look = || seen.lock().unwrap_or_else(PoisonError::into_inner).copy;
    eventually(60, "a copy has begun", || std::future::ready(look().is_some())).await;
    let counted = look().expect("a copy was seen");
    if is_enough(counted) {
        worker.wait_streaming().await;
        assert_equal(&left, &right, &["a", "b"]).await;
    }
    counted
}

fn is_enough((trips, logins): (u64, u64)) -> bool {
    trips <= ROUND_TRIPS && logins <= LOGINS
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_begins_after_few_round_trips() {
    let server = Postgres::start(15);
    let mut counted = Vec::new();
    for (number, round_trip) in ROUND_TRIP.into_iter().enumerate() {
        let seen = copy(&server, number, round_trip).await;
        println!("{} round trips one after the other and {} logins before the first row, at {round_trip:?}", seen.0, seen.1);
        if is_enough(seen) {
            return;
        }
        counted.push(seen);
    }
    panic!("round trips and logins before the first row, each time: {counted:?}; {ROUND_TRIPS} and {LOGINS} are enough");
}
