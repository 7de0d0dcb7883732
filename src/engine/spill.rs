//! Records that are kept apart until it is known what becomes of them: in memory up to a bound, beyond that in files.
//!
//! Records are gathered in *runs*. A run is appended to, then read once from its front, or freed at any time. Until then what is in it
//! can be looked at in order (`spill/ahead.rs`). When the memory is full, the largest run moves to disk as a whole; its files are segments that are only appended to and that go one by one as they
//! are read. Nothing outlives the process or is worth keeping: the folder is emptied when it is opened.

mod ahead;

use ahead::Ahead;
use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Bytes of memory that are taken at once; a longer record takes a chunk of its own length.
const CHUNK: usize = 64 * 1024;
/// A segment that has become so long gets no more.
const SEGMENT: u64 = 16 * 1024 * 1024;
/// Bytes of the length before each record, and before each chunk in a file.
const HEADER: usize = 4;

/// What a log may take of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of memory, for what is not applied yet and for what is kept apart.
    pub memory: usize,
    /// Files for what is kept apart and does not fit into memory.
    pub disk: Option<Disk>,
}

impl Room {
    /// Memory only.
    #[must_use]
    pub fn in_memory(bytes: usize) -> Self {
        Self { memory: bytes, disk: None }
    }
}

/// Where files may lie, and how much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// A folder that belongs to the spill alone.
    pub folder: PathBuf,
    /// Bytes of all files.
    pub limit: u64,
}

/// Why a record can't be kept.
#[derive(Debug, thiserror::Error)]
pub enum SpillError {
    /// The limit is reached.
    #[error("it holds {used} bytes and may hold {limit}")]
    Full {
        /// Bytes in files.
        used: u64,
        /// Bytes that may be.
        limit: u64,
    },
    /// The file system has no room left.
    #[error("the disk is full before the limit is reached, with {used} bytes in it")]
    DiskFull {
        /// Bytes in files.
        used: u64,
        /// What the file system says.
        #[source]
        cause: io::Error,
    },
    /// A file can't be written or read.
    #[error("{path}: {cause}")]
    Broken {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// What is taken now; may be looked at from other threads.
#[derive(Debug, Default)]
pub struct Taken {
    memory: AtomicUsize,
    disk: AtomicU64,
}

impl Taken {
    /// Bytes of memory.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.memory.load(Ordering::Relaxed)
    }

    /// Bytes in files.
    #[must_use]
    pub fn disk(&self) -> u64 {
        self.disk.load(Ordering::Relaxed)
    }
}

/// Runs by number.
pub struct Spill {
    memory_limit: usize,
    disk_limit: u64,
    /// Of this spill alone; made with the first file.
    folder: Option<PathBuf>,
    runs: HashMap<u32, Run>,
    taken: Arc<Taken>,
}

#[derive(Default)]
struct Run {
    /// Older than all chunks.
    segments: VecDeque<Segment>,
    chunks: VecDeque<Vec<u8>>,
    /// Capacity of the chunks.
    memory: usize,
    /// Number of the next segment.
    next: u64,
    /// Bytes of records.
    length: u64,
    /// Records.
    records: u64,
    /// The first segment, when it is being read.
    reading: Option<File>,
    /// Up to where it was looked at.
    ahead: Ahead,
    /// Bytes at the front of the first chunk that are in it no more.
    gone: usize,
}

struct Segment {
    path: PathBuf,
    /// Bytes that are in it.
    length: u64,
    /// Bytes of it that were read.
    read: u64,
}

impl Spill {
    /// Nothing is kept. What an earlier spill has left in the folder is removed.
    #[must_use]
    pub fn open(memory_limit: usize, disk: Option<&Disk>) -> Self {
        /// Two spills of a process overlap when one log ends while the next begins.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = disk.map(|disk| {
            // What can't be removed takes room that the file system will miss, and then says so.
            let _ = fs::remove_dir_all(&disk.folder);
            disk.folder.join(number.to_string())
        });
        let disk_limit = disk.map_or(0, |disk| disk.limit);
        Self { memory_limit, disk_limit, folder, runs: HashMap::new(), taken: Arc::default() }
    }

    /// What is taken, kept up to date.
    #[must_use]
    pub fn taken(&self) -> Arc<Taken> {
        Arc::clone(&self.taken)
    }

    /// The most that may lie in files, in bytes.
    #[must_use]
    pub fn disk_limit(&self) -> u64 {
        self.disk_limit
    }

    /// Adds a record to a run; the first makes it.
    ///
    /// # Errors
    /// There is no room for it. The spill is of no use then until it is cleared.
    pub fn append(&mut self, run: u32, record: &[u8]) -> Result<(), SpillError> {
        let run = self.runs.entry(run).or_default();
        let taken = run.append(record);
        if self.taken.memory.fetch_add(taken, Ordering::Relaxed) + taken > self.memory_limit {
            self.move_largest()?;
        }
        Ok(())
    }

    /// The records at the front of a run, which are in it no more; `None` when none are left. Nothing may be appended to a run
    /// that is being read.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn take(&mut self, run: u32) -> Result<Option<Chunk>, SpillError> {
        let Some(found) = self.runs.get_mut(&run) else { return Ok(None) };
        let mut chunk = found.read_segments(&self.taken)?;
        if chunk.is_none() {
            chunk = found.pop_chunk(&self.taken);
        }
        match &mut chunk {
            Some(chunk) => drop(chunk.drain(..std::mem::take(&mut found.gone))),
            None => drop(self.runs.remove(&run)),
        }
        Ok(chunk.map(Chunk))
    }

    /// Frees a run, whatever is left of it.
    pub fn free(&mut self, run: u32) {
        if let Some(run) = self.runs.remove(&run) {
            self.taken.memory.fetch_sub(run.memory, Ordering::Relaxed);
            for segment in &run.segments {
                segment.remove(&self.taken);
            }
        }
    }

    /// Frees everything.
    pub fn clear(&mut self) {
        let runs: Vec<u32> = self.runs.keys().copied().collect();
        for run in runs {
            self.free(run);
        }
    }

    /// The run with the most bytes of records, and how many.
    #[must_use]
    pub fn largest(&self) -> Option<(u32, u64)> {
        self.runs().max_by_key(|(_, length)| *length)
    }

    /// All runs with their bytes of records.
    pub fn runs(&self) -> impl Iterator<Item = (u32, u64)> {
        self.runs.iter().map(|(number, run)| (*number, run.length))
    }

    /// Moves the run that takes the most memory to disk.
    fn move_largest(&mut self) -> Result<(), SpillError> {
        let Some((number, run)) = self.runs.iter_mut().max_by_key(|(_, run)| run.memory) else { return Ok(()) };
        let used = self.taken.disk();
        let adds: u64 = run.chunks.iter().map(|chunk| (HEADER + chunk.len()) as u64).sum();
        let full = SpillError::Full { used, limit: self.disk_limit };
        let Some(folder) = self.folder.as_deref().filter(|_| used + adds <= self.disk_limit) else { return Err(full) };
        run.write(folder, *number, adds).map_err(|(path, cause)| match cause.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => SpillError::DiskFull { used, cause },
            _ => SpillError::Broken { path, cause },
        })?;
        self.taken.disk.fetch_add(adds, Ordering::Relaxed);
        self.taken.memory.fetch_sub(std::mem::take(&mut run.memory), Ordering::Relaxed);
        run.chunks.clear();
        Ok(())
    }
}

impl Drop for Spill {
    fn drop(&mut self) {
        self.clear();
        if let Some(folder) = &self.folder {
            // Not there when nothing was written.
            let _ = fs::remove_dir(folder);
        }
    }
}

impl Run {
    /// Adds a record in memory; says how much memory that took.
    fn append(&mut self, record: &[u8]) -> usize {
        let needed = HEADER + record.len();
        let fits = self.chunks.back().is_some_and(|chunk| chunk.capacity() - chunk.len() >= needed);
        let before = self.memory;
        if !fits {
            let chunk = Vec::with_capacity(needed.max(CHUNK));
            self.memory += chunk.capacity();
            self.chunks.push_back(chunk);
        }
        if let Some(chunk) = self.chunks.back_mut() {
            chunk.extend((record.len() as u32).to_be_bytes());
            chunk.extend_from_slice(record);
        }
        self.length += record.len() as u64;
        self.records += 1;
        self.memory - before
    }

    /// Appends all chunks, `adds` bytes with their lengths, to the last segment or to a new one.
    fn write(&mut self, folder: &Path, number: u32, adds: u64) -> Result<(), (PathBuf, io::Error)> {
        let in_memory = self.ahead.is_in_memory(&self.segments);
        if self.segments.back().is_none_or(|last| last.length >= SEGMENT) {
            fs::create_dir_all(folder).map_err(|cause| (folder.to_owned(), cause))?;
            let path = folder.join(format!("{number}-{}", self.next));
            self.next += 1;
            self.segments.push_back(Segment { path, length: 0, read: 0 });
        }
        let last = self.segments.len().saturating_sub(1);
        let Some(segment) = self.segments.back_mut() else { return Ok(()) };
        append(&segment.path, &self.chunks).map_err(|cause| (segment.path.clone(), cause))?;
        if in_memory {
            self.ahead.moved(&self.chunks, last, segment.length);
        }
        segment.length += adds;
        Ok(())
    }

    /// The first chunk in memory.
    fn pop_chunk(&mut self, taken: &Taken) -> Option<Vec<u8>> {
        let chunk = self.chunks.pop_front()?;
        self.memory -= chunk.capacity();
        taken.memory.fetch_sub(chunk.capacity(), Ordering::Relaxed);
        Some(chunk)
    }

    /// The next chunk of the segments; one that is read to its end is removed.
    fn read_segments(&mut self, taken: &Taken) -> Result<Option<Vec<u8>>, SpillError> {
        while let Some(segment) = self.segments.front_mut() {
            if segment.read < segment.length {
                let chunk = segment.read_chunk(&mut self.reading, segment.read)?;
                segment.read += (HEADER + chunk.len()) as u64;
                return Ok(Some(chunk));
            }
            self.reading = None;
            segment.remove(taken);
            self.segments.pop_front();
        }
        Ok(None)
    }
}

impl Segment {
    /// The chunk at a place of the file, which is opened when it is not.
    fn read_chunk(&self, file: &mut Option<File>, at: u64) -> Result<Vec<u8>, SpillError> {
        read_chunk(&self.path, file, at, self.length - at).map_err(|cause| SpillError::Broken { path: self.path.clone(), cause })
    }

    fn remove(&self, taken: &Taken) {
        // What stays behind is removed with the folder.
        let _ = fs::remove_file(&self.path);
        taken.disk.fetch_sub(self.length, Ordering::Relaxed);
    }
}

fn append(path: &Path, chunks: &VecDeque<Vec<u8>>) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    let mut file = BufWriter::with_capacity(CHUNK, file);
    for chunk in chunks {
        file.write_all(&(chunk.len() as u32).to_be_bytes())?;
        file.write_all(chunk)?;
    }
    file.flush()
}

fn read_chunk(path: &Path, reading: &mut Option<File>, at: u64, left: u64) -> io::Result<Vec<u8>> {
    let mut file = match reading.take() {
        Some(file) => file,
        None => {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(at))?;
            file
        }
    };
    let mut length = [0; HEADER];
    file.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length);
    if u64::from(length) > left {
        return Err(io::Error::new(ErrorKind::InvalidData, "it is not as it was written"));
    }
    let mut chunk = vec![0; length as usize];
    file.read_exact(&mut chunk)?;
    *reading = Some(file);
    Ok(chunk)
}

/// Some records of a run, in order.
pub struct Chunk(Vec<u8>);

impl Chunk {
    /// The records.
    pub fn records(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.0.as_slice();
        std::iter::from_fn(move || {
            let (length, behind) = rest.split_first_chunk::<HEADER>()?;
            let (record, behind) = behind.split_at_checked(u32::from_be_bytes(*length) as usize)?;
            rest = behind;
            Some(record)
        })
    }
}

#[cfg(test)]
mod tests;
