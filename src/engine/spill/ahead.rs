//! A look at what a run holds, in order, which leaves it there: once it is known what becomes of the run, it can be read from its
//! start, or from where the look has come to.

use super::{Chunk, HEADER, Run, Segment, Spill, SpillError, Taken};
use std::collections::VecDeque;
use std::fs::File;

/// Up to where a run was looked at.
#[derive(Default)]
pub(super) struct Ahead {
    /// Index among the segments, and the place in that file.
    segment: usize,
    place: u64,
    /// That file.
    file: Option<File>,
    /// Behind all segments: index among the chunks in memory, and the place in that chunk.
    chunk: usize,
    within: usize,
}

impl Ahead {
    /// Whether it has come to the chunks in memory.
    pub(super) fn is_in_memory(&self, segments: &VecDeque<Segment>) -> bool {
        segments.get(self.segment).is_none_or(|segment| self.segment + 1 == segments.len() && self.place == segment.length)
    }

    /// All chunks in memory, to which it has come, move to the end of the last segment, which is `length` bytes long before that.
    pub(super) fn moved(&mut self, chunks: &VecDeque<Vec<u8>>, last: usize, length: u64) {
        let before: u64 = chunks.iter().take(self.chunk).map(|chunk| (HEADER + chunk.len()) as u64).sum();
        // The file is read by a place of its own.
        *self = Self { segment: last, place: length + before, file: None, chunk: 0, within: self.within };
    }

    /// The next chunk in files, and how much of its front was looked at already.
    fn in_files(&mut self, segments: &VecDeque<Segment>) -> Result<Option<Vec<u8>>, SpillError> {
        while let Some(segment) = segments.get(self.segment) {
            if self.place < segment.length {
                let mut chunk = segment.read_chunk(&mut self.file, self.place)?;
                self.place += (HEADER + chunk.len()) as u64;
                chunk.drain(..std::mem::take(&mut self.within));
                if !chunk.is_empty() {
                    return Ok(Some(chunk));
                }
            } else if self.segment + 1 < segments.len() {
                (self.segment, self.place, self.file) = (self.segment + 1, 0, None);
            } else {
                break;
            }
        }
        Ok(None)
    }

    fn in_memory(&mut self, chunks: &VecDeque<Vec<u8>>) -> Option<Vec<u8>> {
        while let Some(chunk) = chunks.get(self.chunk) {
            let fresh = chunk[self.within..].to_vec();
            if self.chunk + 1 < chunks.len() {
                (self.chunk, self.within) = (self.chunk + 1, 0);
            } else {
                self.within = chunk.len();
                return (!fresh.is_empty()).then_some(fresh);
            }
            if !fresh.is_empty() {
                return Some(fresh);
            }
        }
        None
    }
}

impl Spill {
    /// The next records of a run that were not looked at; they stay in it. `None` when nothing more is there now.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn look_ahead(&mut self, run: u32) -> Result<Option<Chunk>, SpillError> {
        let Some(run) = self.runs.get_mut(&run) else { return Ok(None) };
        let mut chunk = run.ahead.in_files(&run.segments)?;
        if chunk.is_none() {
            chunk = run.ahead.in_memory(&run.chunks);
        }
        Ok(chunk.map(Chunk))
    }

    /// Takes out all that was looked at, before anything was read: [`Self::take`] goes on behind it.
    pub fn pass(&mut self, run: u32) {
        if let Some(run) = self.runs.get_mut(&run) {
            run.pass(&self.taken);
        }
    }

    /// Records of a run.
    #[must_use]
    pub fn records(&self, run: u32) -> u64 {
        self.runs.get(&run).map_or(0, |run| run.records)
    }
}

impl Run {
    fn pass(&mut self, taken: &Taken) {
        let Ahead { segment, place, chunk, within, .. } = std::mem::take(&mut self.ahead);
        for segment in self.segments.drain(..segment) {
            segment.remove(taken);
        }
        if let Some(segment) = self.segments.front_mut() {
            segment.read = place;
        }
        for _ in 0..chunk {
            self.pop_chunk(taken);
        }
        self.gone = within;
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CHUNK, Disk};
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};

    /// All that is there and was not looked at.
    fn look(spill: &mut Spill, run: u32) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(chunk) = spill.look_ahead(run).unwrap() {
            all.extend(chunk.records().map(<[u8]>::to_vec));
        }
        all
    }

    /// Random appends and looks, with runs that move to disk in between: each record is seen once, and what is taken begins at the
    /// start or behind all that was seen.
    #[test]
    fn what_was_looked_at_stays_until_it_is_passed() {
        let seed: u64 = rand::random();
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        for _ in 0..60 {
            let folder = tempfile::tempdir().unwrap();
            let disk = Disk { folder: folder.path().join("spill"), limit: 1 << 40 };
            let memory = *[0, 1 << 20, 4 << 20].get(random.random_range(0..3usize)).unwrap();
            let mut spill = Spill::open(memory, Some(&disk));
            let (mut appended, mut seen) = ([Vec::new(), Vec::new()], [0, 0]);
            for step in 0..random.random_range(1..800u32) {
                let run = random.random_range(0..2usize);
                if random.random_bool(0.1) {
                    for _ in 0..random.random_range(1..4) {
                        let Some(chunk) = spill.look_ahead(run as u32).unwrap() else { break };
                        for record in chunk.records() {
                            assert_eq!(appended[run][seen[run]], record);
                            seen[run] += 1;
                        }
                    }
                } else {
                    let length = if random.random_bool(0.05) { random.random_range(0..3 * CHUNK) } else { random.random_range(0..30_000) };
                    let record: Vec<u8> = (0..length).map(|at| (at as u32 ^ step) as u8).collect();
                    spill.append(run as u32, &record).unwrap();
                    appended[run].push(record);
                }
            }
            for (run, appended) in appended.iter().enumerate() {
                let number = run as u32;
                assert_eq!(spill.records(number), appended.len() as u64);
                if random.random_bool(0.3) {
                    assert_eq!(look(&mut spill, number), appended[seen[run]..]);
                    seen[run] = appended.len();
                }
                let passes = random.random_bool(0.7);
                if passes {
                    spill.pass(number);
                }
                let mut rest = Vec::new();
                while let Some(chunk) = spill.take(number).unwrap() {
                    rest.extend(chunk.records().map(<[u8]>::to_vec));
                }
                assert_eq!(rest, appended[if passes { seen[run] } else { 0 }..]);
            }
            assert_eq!((spill.taken().memory(), spill.taken().disk()), (0, 0));
        }
    }
}
