//! Data folders for servers: `initdb` runs once per major, every server gets a copy.
//!
//! A copy would be the same cluster, and Sluice tells servers apart by their system identifier: so each gets one of its own.

use super::{as_user, folder, run};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes of `global/pg_control` that hold something (src/include/catalog/pg_control.h: PG_CONTROL_MAX_SAFE_SIZE).
const CONTROL_SIZE: usize = 512;
/// Where a log's first page bears the identifier (src/include/access/xlog_internal.h: XLogLongPageHeaderData).
const IDENTIFIER_IN_LOG: u64 = 24;

/// Makes the data folder of a cluster of its own: SCRAM passwords, user `postgres`, password `pw`.
pub(super) fn data_folder(as_nobody: bool, bin: &Path, data: &Path) {
    copy(&template(as_nobody, bin), data);
    let open = |name: &str| File::options().read(true).write(true).open(data.join(name)).expect("a file that initdb makes");
    let (control, log) = (open("global/pg_control"), open("pg_wal/000000010000000000000001"));
    let identifier = (rand::random::<u64>() >> 1).to_ne_bytes();
    let mut bytes = [0; CONTROL_SIZE];
    control.read_exact_at(&mut bytes, 0).expect("the control file");
    // It begins with the identifier and ends with a checksum, in a place that depends on the version.
    let is_checksum = |place: &usize| bytes[*place..*place + 4] == crc32c(&bytes[..*place]).to_ne_bytes();
    let place = (8..CONTROL_SIZE - 4).step_by(4).find(is_checksum).expect("a checksum");
    bytes[..8].copy_from_slice(&identifier);
    let checksum = crc32c(&bytes[..place]).to_ne_bytes();
    bytes[place..place + 4].copy_from_slice(&checksum);
    control.write_all_at(&bytes, 0).expect("another identifier");
    log.write_all_at(&identifier, IDENTIFIER_IN_LOG).expect("another identifier");
}

/// CRC-32C (Castagnoli), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let bit = |crc: u32, _| (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg());
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), bit))
}

/// Copies a folder with owners and times.
pub(super) fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").args(["-a", "--sparse=always"]).arg(from).arg(to));
}

/// The folder to copy from, made when it is not there for this very program.
fn template(as_nobody: bool, bin: &Path) -> PathBuf {
    let program = fs::metadata(bin.join("postgres")).expect("the program");
    let all = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let ready = all.join(format!("initdb-{}-{}-{as_nobody}", program.ino(), program.mtime()));
    fs::create_dir_all(all).expect("a folder");
    // Other processes may make it at this moment. The lock goes with the file.
    let lock = File::create(all.join("initdb.lock")).expect("a lock file");
    lock.lock().expect("a lock");
    if !ready.exists() {
        let folder = folder("initdb", as_nobody);
        let (password, made) = (folder.path().join("pw"), folder.path().join("data"));
        fs::write(&password, "pw\n").expect("password file");
        let mut initdb = as_user(as_nobody, &bin.join("initdb"));
        initdb.current_dir(folder.path()).arg("-D").arg(&made).args(["-U", "postgres", "-A", "scram-sha-256", "--pwfile"]).arg(&password);
        run(initdb.args(["-E", "UTF8", "--no-locale", "--no-sync"]));
        let unfinished = ready.with_extension("unfinished");
        let _ = fs::remove_dir_all(&unfinished);
        copy(&made, &unfinished);
        fs::rename(&unfinished, &ready).expect("another name");
    }
    ready
}
