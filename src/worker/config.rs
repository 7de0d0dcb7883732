//! The desired document: read, judged, kept.
//!
//! It reaches a worker as a mounted file and as a pushed body; the worker keeps a copy. The highest generation wins, so
//! that a pause that was pushed survives a crash while the kubelet has not refreshed the mounted file yet.

use super::contract::{BODY_LIMIT, DESIRED_FILE, Desired, VERSION};
use serde::Deserialize;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Why a document is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It can't be read.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// It is larger than [`BODY_LIMIT`].
    #[error("the desired document is larger than {BODY_LIMIT} bytes")]
    TooLarge,
    /// It was written for another version of the contract.
    #[error("the desired document is of contract {0}; this worker speaks {VERSION}")]
    UnknownContract(u32),
    /// It is no such document.
    #[error("the desired document can't be read: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// Reads a document. The version is looked at first: the rest of another version may look like anything.
///
/// # Errors
/// [`ConfigError`]; nothing but the document itself is in its text.
pub fn parse(bytes: &[u8]) -> Result<Desired, ConfigError> {
    #[derive(Deserialize)]
    struct Version {
        contract: u32,
    }
    if bytes.len() > BODY_LIMIT {
        return Err(ConfigError::TooLarge);
    }
    let Version { contract } = serde_json::from_slice(bytes)?;
    if contract != VERSION {
        return Err(ConfigError::UnknownContract(contract));
    }
    Ok(serde_json::from_slice(bytes)?)
}

/// What is done with a document that is offered while another may be in effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is newer: it takes effect.
    Take,
    /// It is what is in effect.
    Same,
    /// It has a lower generation than what is in effect.
    Older,
    /// It has the same generation and other content: two writers are at work.
    Conflict,
    /// It belongs to another Mirror.
    OtherMirror,
}

/// Compares an offered document with the one in effect.
#[must_use]
pub fn judge(current: Option<&Desired>, offered: &Desired) -> Verdict {
    let Some(current) = current else {
        return Verdict::Take;
    };
    if current.mirror.uid != offered.mirror.uid {
        Verdict::OtherMirror
    } else if offered.generation > current.generation {
        Verdict::Take
    } else if offered.generation < current.generation {
        Verdict::Older
    } else if offered == current {
        Verdict::Same
    } else {
        Verdict::Conflict
    }
}

/// Whether a session that runs for `old` must begin again for `new`. Generation, keys and `suspend` are no part of a
/// session; everything else is, but for requests, for which [`super::run`] knows better.
#[must_use]
pub fn session_differs(old: &Desired, new: &Desired) -> bool {
    let session = |desired: &Desired| Desired { generation: 0, suspend: false, request: None, public_keys: Vec::new(), ..desired.clone() };
    session(old) != session(new)
}

/// The mounted file, looked at again and again.
#[derive(Debug)]
pub struct Mounted {
    path: PathBuf,
    seen: Option<Stamp>,
}

/// What tells that the kubelet has swapped the folder behind the file's symbolic link, or somebody has written the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    seconds: i64,
    nanoseconds: i64,
    size: u64,
}

impl Mounted {
    /// The document in a mounted folder.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { path: folder.join(DESIRED_FILE), seen: None }
    }

    /// The document, when it is another than at the last look. A file that could not be read is read again at the next.
    pub fn look(&mut self) -> Option<Result<Desired, ConfigError>> {
        let io_error = |error| ConfigError::Io { path: self.path.display().to_string(), error };
        let stamp = match fs::metadata(&self.path) {
            Ok(of) => Stamp { device: of.dev(), inode: of.ino(), seconds: of.mtime(), nanoseconds: of.mtime_nsec(), size: of.size() },
            Err(error) => {
                self.seen = None;
                return Some(Err(io_error(error)));
            }
        };
        if self.seen == Some(stamp) {
            return None;
        }
        let document = match read_bounded(&self.path) {
            Ok(bytes) => {
                self.seen = Some(stamp);
                parse(&bytes)
            }
            Err(error) => Err(io_error(error)),
        };
        Some(document)
    }
}

/// The worker's own copy, in a folder that outlives its process.
#[derive(Debug)]
pub struct Copy {
    path: PathBuf,
}

impl Copy {
    /// The copy in the state folder.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { path: folder.join(DESIRED_FILE) }
    }

    /// The document that was stored last; `None` when there is none.
    ///
    /// # Errors
    /// It can't be read.
    pub fn load(&self) -> Result<Option<Desired>, ConfigError> {
        match read_bounded(&self.path) {
            Ok(bytes) => parse(&bytes).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error(error)),
        }
    }

    /// Replaces the copy; a crash leaves the old one or the new one.
    ///
    /// # Errors
    /// The folder can't be written to.
    pub fn store(&self, desired: &Desired) -> Result<(), ConfigError> {
        let bytes = serde_json::to_vec(desired)?;
        let beside = self.path.with_extension("new");
        let write = || {
            let mut file = File::create(&beside)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&beside, &self.path)
        };
        write().map_err(|error| self.error(error))
    }

    fn error(&self, error: io::Error) -> ConfigError {
        ConfigError::Io { path: self.path.display().to_string(), error }
    }
}

/// At most one byte more than the limit, which [`parse`] then refuses.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(BODY_LIMIT as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::contract::tests::desired;

    #[test]
    fn the_highest_generation_wins() {
        let current = desired(5);
        assert_eq!(judge(None, &desired(1)), Verdict::Take);
        assert_eq!(judge(Some(&current), &desired(6)), Verdict::Take);
        assert_eq!(judge(Some(&current), &desired(5)), Verdict::Same);
        assert_eq!(judge(Some(&current), &desired(4)), Verdict::Older);
        let mut other = desired(5);
        other.suspend = true;
        assert_eq!(judge(Some(&current), &other), Verdict::Conflict);
        other.generation = 9;
        other.mirror.uid = "another".to_owned();
        assert_eq!(judge(Some(&current), &other), Verdict::OtherMirror);
    }

    #[test]
    fn keys_and_suspend_restart_no_session() {
        let old = desired(1);
        let mut new = desired(2);
        new.suspend = true;
        new.public_keys.push("key".to_owned());
        assert!(!session_differs(&old, &new));
        new.stream.max_batch_rows += 1;
        assert!(session_differs(&old, &new));
    }

    #[test]
    fn the_version_is_looked_at_first() {
        assert!(matches!(parse(br#"{"contract":7,"wholly":"different"}"#), Err(ConfigError::UnknownContract(7))));
        assert!(matches!(parse(br#"{"contract":1}"#), Err(ConfigError::Malformed(_))));
        assert!(matches!(parse(b"{"), Err(ConfigError::Malformed(_))));
        assert!(matches!(parse(&vec![b' '; BODY_LIMIT + 1]), Err(ConfigError::TooLarge)));
        let mut document = serde_json::to_value(desired(3)).unwrap();
        document["ofALaterOperator"] = true.into();
        assert_eq!(parse(document.to_string().as_bytes()).unwrap(), desired(3));
    }

    #[test]
    fn the_mounted_file_is_read_when_the_kubelet_swaps_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut mounted = Mounted::new(folder.path());
        assert!(matches!(mounted.look(), Some(Err(ConfigError::Io { .. }))));
        for generation in [1, 2] {
            let data = folder.path().join(format!("..data_{generation}"));
            fs::create_dir(&data).unwrap();
            fs::write(data.join(DESIRED_FILE), serde_json::to_vec(&desired(generation)).unwrap()).unwrap();
        }
        std::os::unix::fs::symlink("..data_1", folder.path().join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/desired.json", folder.path().join(DESIRED_FILE)).unwrap();
        assert_eq!(mounted.look().unwrap().unwrap(), desired(1));
        assert!(mounted.look().is_none());
        std::os::unix::fs::symlink("..data_2", folder.path().join("..data_tmp")).unwrap();
        fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).unwrap();
        assert_eq!(mounted.look().unwrap().unwrap(), desired(2));
        assert!(mounted.look().is_none());
        fs::write(folder.path().join("..data_2").join(DESIRED_FILE), "{").unwrap();
        assert!(mounted.look().unwrap().is_err());
        assert!(mounted.look().is_none(), "a broken file is not read each second");
    }

    #[test]
    fn the_copy_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let copy = Copy::new(folder.path());
        assert!(copy.load().unwrap().is_none());
        copy.store(&desired(1)).unwrap();
        copy.store(&desired(2)).unwrap();
        assert_eq!(copy.load().unwrap(), Some(desired(2)));
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [DESIRED_FILE]);
        fs::write(folder.path().join(DESIRED_FILE), "{").unwrap();
        assert!(copy.load().is_err());
        assert!(Copy::new(&folder.path().join("missing")).store(&desired(1)).is_err());
    }
}
