//! Messages that frame transactions which are sent before they have ended (protocol version 2 and later, `streaming`).
//!
//! A *slice* is what lies between Stream Start and Stream Stop: messages of one transaction, each with the id of its
//! subtransaction behind its tag. Slices of several transactions alternate, and whole transactions may lie between them.

use super::{finish, timestamp};
use crate::connectors::postgres::lsn::Lsn;
use crate::connectors::postgres::replication::cursor::Cursor;
use crate::engine::error::Result;
use std::time::SystemTime;

/// One of the framing messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// A slice begins.
    Start {
        /// The transaction.
        xid: u32,
        /// It is the transaction's first.
        is_first: bool,
    },
    /// The slice ends.
    Stop,
    /// The transaction has committed.
    Commit(Ended),
    /// The transaction has been rolled back, or a subtransaction of it has.
    Abort {
        /// The transaction.
        xid: u32,
        /// The subtransaction; equal to `xid` when all is rolled back.
        subxid: u32,
    },
}

/// A streamed transaction that has committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The transaction.
    pub xid: u32,
    /// Start of its commit record.
    pub commit_start: Lsn,
    /// End of its commit record.
    pub end: Lsn,
    /// When it committed.
    pub committed_at: SystemTime,
}

impl Framing {
    /// Reads a message; `None` when it is no framing one.
    pub fn read(message: &[u8]) -> Result<Option<Self>> {
        let mut body = Cursor::new(message);
        let framing = match body.u8()? {
            b'S' => Self::Start { xid: body.u32()?, is_first: body.u8()? == 1 },
            b'E' => Self::Stop,
            b'c' => {
                let xid = body.u32()?;
                let _flags = body.u8()?;
                let (commit_start, end) = (Lsn(body.u64()?), Lsn(body.u64()?));
                Self::Commit(Ended { xid, commit_start, end, committed_at: timestamp(body.i64()?) })
            }
            b'A' => {
                let (xid, subxid) = (body.u32()?, body.u32()?);
                // With `streaming 'parallel'` its position and time follow; nobody needs them here.
                return Ok(Some(Self::Abort { xid, subxid }));
            }
            _ => return Ok(None),
        };
        finish(&body)?;
        Ok(Some(framing))
    }
}

/// The subtransaction of a message inside a slice.
pub fn subxid(message: &[u8]) -> Result<u32> {
    let mut body = Cursor::new(message);
    let _tag = body.u8()?;
    body.u32()
}

/// Whether a message inside a slice matters when the transaction is replayed. An origin names no subtransaction, and neither
/// origins nor types are looked at.
#[must_use]
pub fn matters(message: &[u8]) -> bool {
    !matches!(message.first(), Some(b'O' | b'Y'))
}

#[cfg(test)]
pub(in crate::connectors::postgres) mod tests {
    use super::*;

    /// A message as it stands in a slice.
    pub fn inside(subxid: u32, message: &[u8]) -> Vec<u8> {
        [&message[..1], &subxid.to_be_bytes(), &message[1..]].concat()
    }

    pub fn start(xid: u32, is_first: bool) -> Vec<u8> {
        [b"S".as_slice(), &xid.to_be_bytes(), &[u8::from(is_first)]].concat()
    }

    pub fn stop() -> Vec<u8> {
        b"E".to_vec()
    }

    /// The commit record starts 5 before its end.
    pub fn commit(xid: u32, end: u64) -> Vec<u8> {
        [b"c".as_slice(), &xid.to_be_bytes(), &[0], &(end - 5).to_be_bytes(), &end.to_be_bytes(), &[0; 8]].concat()
    }

    pub fn abort(xid: u32, subxid: u32) -> Vec<u8> {
        [b"A".as_slice(), &xid.to_be_bytes(), &subxid.to_be_bytes()].concat()
    }

    #[test]
    fn framing_is_read() {
        let read = |message: &[u8]| Framing::read(message).unwrap();
        assert_eq!(read(&start(7, true)), Some(Framing::Start { xid: 7, is_first: true }));
        assert_eq!(read(&start(7, false)), Some(Framing::Start { xid: 7, is_first: false }));
        assert_eq!(read(&stop()), Some(Framing::Stop));
        let committed_at = timestamp(0);
        let ended = Ended { xid: 7, commit_start: Lsn(0x1B), end: Lsn(0x20), committed_at };
        assert_eq!(read(&commit(7, 0x20)), Some(Framing::Commit(ended)));
        assert_eq!(read(&abort(7, 8)), Some(Framing::Abort { xid: 7, subxid: 8 }));
        assert_eq!(read(&[abort(7, 8), vec![0; 16]].concat()), Some(Framing::Abort { xid: 7, subxid: 8 }));
        assert_eq!(read(b"I"), None);
        for cut in [start(7, true), commit(7, 0x20), abort(7, 8)] {
            (0..9.min(cut.len())).for_each(|length| assert!(Framing::read(&cut[..length]).is_err(), "{:?}", &cut[..length]));
        }
        assert!(Framing::read(b"E\0").is_err());
        assert_eq!(subxid(&inside(9, b"Ixyz")).unwrap(), 9);
        assert!(subxid(b"I\0\0").is_err());
    }
}
