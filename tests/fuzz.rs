//! A short run of the fuzz targets on stable Rust: random and mutated messages, repeatable by `SLUICE_SEED`.
//! `make fuzz` runs the same targets for as long as one likes.

#[path = "../fuzz/common/mod.rs"]
mod common;

use common::messages::{FRAME, announce, damage, envelope, join, streamed, transaction};
use common::targets;
use rand::rngs::SmallRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use sluice::engine::error::{Class, reason};
use std::path::Path;
use std::sync::Mutex;

fn random() -> SmallRng {
    let seed = std::env::var("SLUICE_SEED").map_or(20_261_121, |seed| seed.parse().expect("SLUICE_SEED is a number"));
    println!("SLUICE_SEED={seed}");
    SmallRng::seed_from_u64(seed)
}

/// Held by the test that runs: memory is the process's.
static ALONE: Mutex<()> = Mutex::new(());

/// The most memory that this process has had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the process's status");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("VmHWM");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
}

fn noise(random: &mut SmallRng, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; random.random_range(0..most)];
    random.fill_bytes(&mut bytes);
    bytes
}

#[test]
fn pgoutput() {
    let _alone = ALONE.lock();
    let mut random = random();
    let (mut whole, mut broken, mut bytes) = (0, 0, 0);
    let before = peak();
    let mut at = 1;
    while bytes < 40 << 20 {
        let mut messages = transaction(&mut random, &mut at);
        assert!(targets::pgoutput(&join(&messages)), "messages as a server sends them: {messages:?}");
        let pick = random.random_range(0..messages.len());
        damage(&mut random, &mut messages[pick]);
        let damaged = join(&messages);
        // Damage to a value or a position goes unnoticed.
        if targets::pgoutput(&damaged) {
            whole += 1;
        } else {
            broken += 1;
        }
        let noise = noise(&mut random, 200);
        targets::pgoutput(&noise);
        targets::pgoutput(&join(
            &[[b"BCIUDTROYM"[random.random_range(0..10)]].to_vec(), noise.clone()]
                .concat()
                .chunks(40)
                .map(<[u8]>::to_vec)
                .collect::<Vec<_>>(),
        ));
        bytes += damaged.len() + 2 * noise.len();
    }
    println!("{bytes} bytes: {broken} damaged transactions refused, {whole} taken");
    assert!(broken > 1_000 && whole > 1_000, "both happen: {broken} refused, {whole} taken");
    let growth = peak() - before;
    println!("{} MiB more", growth >> 20);
    assert!(growth < 64 << 20, "memory is bounded");
}

#[test]
fn stream() {
    let _alone = ALONE.lock();
    let mut random = random();
    let before = peak();
    let mut at = 1_000;
    let (mut bytes, mut followed) = (0, 0);
    while bytes < 12 << 20 {
        let mut frames = Vec::new();
        let mut add = |random: &mut SmallRng, messages: Vec<Vec<u8>>, at| {
            for message in messages {
                frames.extend(envelope(random, &message, at));
            }
        };
        add(&mut random, announce(), at);
        for _ in 0..random.random_range(1..30) {
            let messages = if random.random_bool(0.3) { streamed(&mut random, &mut at) } else { transaction(&mut random, &mut at) };
            add(&mut random, messages, at);
        }
        // Whole: the end of the connection is all that is wrong.
        let (error, changes) = targets::stream(&[vec![4], join(&frames)].concat());
        assert_eq!((error.class, error.reason), (Class::Retry, reason::SOURCE_UNREACHABLE), "{error}");
        followed += changes;
        // One frame is damaged; then one byte of all, the lengths of frames included; then noise at every moment.
        let pick = random.random_range(0..frames.len());
        damage(&mut random, &mut frames[pick]);
        targets::stream(&[vec![4], join(&frames)].concat());
        let mut raw: Vec<u8> =
            frames.iter().flat_map(|frame| [&FRAME, (frame.len() as u32 + 4).to_be_bytes().as_slice(), frame].concat()).collect();
        damage(&mut random, &mut raw);
        targets::stream(&[vec![2], raw.clone()].concat());
        for moment in 0..4 {
            let noise = noise(&mut random, 100);
            targets::stream(&[vec![moment], noise.clone()].concat());
            // With a tag and a length that fit.
            let tag = b"RSKZDCEWdkT"[random.random_range(0..11)];
            targets::stream(&[&[moment, tag], (noise.len() as u32 + 4).to_be_bytes().as_slice(), &noise].concat());
        }
        bytes += 3 * raw.len();
    }
    println!("{bytes} bytes, {followed} changes followed");
    assert!(followed > 5_000, "{followed}");
    let growth = peak() - before;
    println!("{} MiB more", growth >> 20);
    assert!(growth < 64 << 20, "memory is bounded");
}

/// `make fuzz` begins with these.
#[test]
fn inputs_to_start_from() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    for target in ["pgoutput", "stream"] {
        std::fs::create_dir_all(folder.join(target)).expect("a folder");
    }
    for seed in 0..50 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut at = 1_000;
        let messages = transaction(&mut random, &mut at);
        let input = join(&messages);
        assert!(targets::pgoutput(&input));
        std::fs::write(folder.join(format!("pgoutput/{seed}")), input).expect("a file");
        let frames: Vec<_> = announce().iter().chain(&messages).flat_map(|message| envelope(&mut random, message, at)).collect();
        let input = [vec![4], join(&frames)].concat();
        assert_eq!(targets::stream(&input).0.reason, reason::SOURCE_UNREACHABLE);
        std::fs::write(folder.join(format!("stream/{seed}")), input).expect("a file");
    }
}
