//! Frames of the copy stream, cut out of big reads without copying them.

use crate::connectors::postgres::errors::violation;
use crate::connectors::postgres::replication::cursor::Cursor;
use crate::engine::error::Result;

/// What one read asks for.
pub(super) const READ: usize = 256 * 1024;
/// Bytes of tag and length before each frame.
const HEADER: usize = 5;
/// The server's own limit of a message (manual: field sizes; MaxAllocSize in its sources), with room for headers.
const LONGEST: usize = (1 << 30) + 1024;

/// What was received and is not decoded yet.
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    /// Starts with what was received already.
    pub(super) fn new(received: &[u8]) -> Self {
        let mut bytes = received.to_vec();
        bytes.resize(received.len().max(READ), 0);
        Self { bytes, start: 0, end: received.len() }
    }

    /// Space for the next read. It grows with what arrives of a long frame, never by what the frame says of itself, and
    /// shrinks again behind it.
    pub(super) fn space(&mut self) -> &mut [u8] {
        let left = self.end - self.start;
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, left);
        if left < READ / 2 {
            if self.bytes.len() > READ {
                self.bytes = [&self.bytes[..left], &vec![0; READ - left]].concat();
            }
        } else if self.bytes.len() < left * 2 {
            self.bytes.resize(left * 2, 0);
        }
        &mut self.bytes[self.end..]
    }

    /// That much was read into the space.
    pub(super) fn filled(&mut self, count: usize) {
        self.end += count;
    }

    /// The next whole frame: its tag and body.
    pub(super) fn frame(&mut self) -> Result<Option<(u8, &[u8])>> {
        let available = &self.bytes[self.start..self.end];
        if available.len() < HEADER {
            return Ok(None);
        }
        let tag = available[0];
        let length = Cursor::new(&available[1..]).u32()? as usize;
        if !(4..=LONGEST).contains(&length) {
            return Err(violation(format!("a message of {length} bytes in the stream")));
        }
        if available.len() <= length {
            return Ok(None);
        }
        let body = self.start + HEADER..self.start + 1 + length;
        self.start = body.end;
        Ok(Some((tag, &self.bytes[body])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: usize) -> Vec<u8> {
        let mut frame = vec![b'd'];
        frame.extend((length as u32 + 4).to_be_bytes());
        frame.extend((0..length).map(|at| (at % 251) as u8));
        frame
    }

    #[test]
    fn frames_come_whole_whatever_the_reads() {
        let lengths = [0, 1, 700_000, 3, READ, 5_000, 2 * READ + 1, 7];
        let sent: Vec<u8> = lengths.iter().flat_map(|length| frame(*length)).collect();
        for read in [1_009, READ, usize::MAX] {
            let mut input = Input::new(&sent[..3]);
            let (mut at, mut got) = (3, Vec::new());
            while at < sent.len() {
                let space = input.space();
                assert!(!space.is_empty());
                let count = read.min(space.len()).min(sent.len() - at);
                space[..count].copy_from_slice(&sent[at..at + count]);
                input.filled(count);
                at += count;
                while let Some((tag, body)) = input.frame().unwrap() {
                    assert_eq!(tag, b'd');
                    assert!(body.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
                    got.push(body.len());
                }
            }
            assert_eq!(got, lengths);
            input.space();
            assert_eq!(input.bytes.len(), READ, "it shrinks again");
        }
    }

    #[test]
    fn impossible_lengths_are_violations() {
        for header in [*b"d\0\0\0\x03", *b"d\xFF\xFF\xFF\xFF"] {
            assert!(Input::new(&header).frame().is_err());
        }
    }
}
