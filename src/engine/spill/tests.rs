use super::*;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use std::collections::BTreeMap;

fn disk(folder: &Path, limit: u64) -> Disk {
    Disk { folder: folder.join("spill"), limit }
}

/// All that is left of a run.
fn rest(spill: &mut Spill, run: u32) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(chunk) = spill.take(run).unwrap() {
        all.extend(chunk.records().map(<[u8]>::to_vec));
    }
    all
}

fn bytes_on_disk(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap());
    entries.map(|entry| if entry.path().is_dir() { bytes_on_disk(&entry.path()) } else { entry.metadata().unwrap().len() }).sum()
}

/// Random appends, reads and frees of several runs against plain lists; figures and files never lie.
#[test]
fn runs_are_what_was_appended() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    for _ in 0..30 {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path(), 1 << 40);
        let memory = *[0, 1 << 20, 4 << 20].get(random.random_range(0..3usize)).unwrap();
        let mut spill = Spill::open(memory, Some(&disk));
        let taken = spill.taken();
        let mut expected: BTreeMap<u32, Vec<Vec<u8>>> = BTreeMap::new();
        for step in 0..random.random_range(1..400u32) {
            let run = random.random_range(0..5);
            match random.random_range(0..100) {
                0..2 => {
                    spill.free(run);
                    expected.remove(&run);
                }
                2..5 => assert_eq!(rest(&mut spill, run), expected.remove(&run).unwrap_or_default()),
                5 => {
                    spill.clear();
                    expected.clear();
                }
                _ => {
                    let length = if random.random_bool(0.05) { random.random_range(0..3 * CHUNK) } else { random.random_range(0..9000) };
                    let record: Vec<u8> = (0..length).map(|at| (at as u32 ^ step) as u8).collect();
                    spill.append(run, &record).unwrap();
                    expected.entry(run).or_default().push(record);
                }
            }
            assert!(taken.memory() <= memory, "{} bytes of memory", taken.memory());
            assert_eq!(taken.disk(), bytes_on_disk(&disk.folder));
        }
        let length = |records: &Vec<Vec<u8>>| records.iter().map(Vec::len).sum::<usize>() as u64;
        assert_eq!(spill.largest().map(|(_, length)| length), expected.values().map(length).max());
        for (run, records) in expected {
            assert_eq!(rest(&mut spill, run), records);
        }
        assert_eq!((taken.memory(), taken.disk(), bytes_on_disk(folder.path())), (0, 0, 0));
    }
}

#[test]
fn segments_go_as_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(folder.path(), 1 << 30);
    let mut spill = Spill::open(0, Some(&disk));
    let record = vec![7; 1 << 20];
    (0..40).for_each(|_| spill.append(1, &record).unwrap());
    let all = spill.taken().disk();
    assert_eq!(fs::read_dir(disk.folder.join(spill.folder.as_ref().unwrap())).unwrap().count(), 3);
    (0..20).for_each(|_| assert_eq!(spill.take(1).unwrap().unwrap().records().count(), 1));
    assert!(spill.taken().disk() <= all - SEGMENT);
    assert_eq!(spill.taken().disk(), bytes_on_disk(folder.path()));
    drop(spill);
    assert_eq!(fs::read_dir(&disk.folder).unwrap().count(), 0, "nothing is left");
}

#[test]
fn the_limit_is_kept_and_a_clear_makes_room() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(folder.path(), 1 << 20);
    let mut spill = Spill::open(1 << 18, Some(&disk));
    for round in 0..3 {
        let record = vec![round; 10_000];
        let full = (0..200).find_map(|at| spill.append(at % 3, &record).err()).expect("it is full");
        assert!(matches!(full, SpillError::Full { limit, .. } if limit == 1 << 20), "{full}");
        assert!(bytes_on_disk(folder.path()) <= 1 << 20);
        spill.clear();
        assert_eq!((spill.taken().memory(), spill.taken().disk(), bytes_on_disk(folder.path())), (0, 0, 0));
    }
    let mut without = Spill::open(1 << 18, None);
    let full = (0..200).find_map(|at| without.append(at, &[0; 10_000]).err()).expect("it is full");
    assert!(matches!(full, SpillError::Full { used: 0, limit: 0 }), "{full}");
}

#[test]
fn what_an_earlier_process_left_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(folder.path(), 1 << 20);
    fs::create_dir_all(disk.folder.join("0")).unwrap();
    fs::write(disk.folder.join("0/7-0"), "old").unwrap();
    fs::write(disk.folder.join("other"), "old").unwrap();
    let mut spill = Spill::open(0, Some(&disk));
    assert_eq!(bytes_on_disk(folder.path()), 0);
    spill.append(7, b"new").unwrap();
    assert_eq!(rest(&mut spill, 7), [b"new"]);
}

/// The disk fills before the limit does: the next segment is a device that is always full.
#[test]
fn a_full_disk_is_told_from_a_broken_file() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(folder.path(), 1 << 30);
    let mut spill = Spill::open(0, Some(&disk));
    let own = spill.folder.clone().unwrap();
    fs::create_dir_all(&own).unwrap();
    std::os::unix::fs::symlink("/dev/full", own.join("1-0")).unwrap();
    let full = spill.append(1, &vec![0; 1 << 20]).unwrap_err();
    assert!(matches!(&full, SpillError::DiskFull { used: 0, .. }), "{full}");
    spill.clear();
    assert_eq!((spill.taken().memory(), spill.taken().disk()), (0, 0));

    // It works on when there is room again.
    spill.append(1, b"a").unwrap();
    assert_eq!(rest(&mut spill, 1), [b"a"]);

    // A file that was cut, one that is gone, and a folder that can't be made.
    spill.append(2, &[1; 100]).unwrap();
    OpenOptions::new().write(true).open(own.join("2-0")).unwrap().set_len(50).unwrap();
    assert!(matches!(spill.take(2).err(), Some(SpillError::Broken { cause, .. }) if cause.kind() == ErrorKind::UnexpectedEof));
    spill.append(3, b"x").unwrap();
    fs::remove_file(own.join("3-0")).unwrap();
    assert!(matches!(spill.take(3).err(), Some(SpillError::Broken { cause, .. }) if cause.kind() == ErrorKind::NotFound));
    spill.clear();
    fs::remove_dir_all(&disk.folder).unwrap();
    fs::write(&disk.folder, "a file").unwrap();
    assert!(matches!(spill.append(4, b"x").err(), Some(SpillError::Broken { .. })));
}
