//! Verification: whether the rows of a target are those of its source, while both change.
//!
//! Neither side is stopped, and no state of the one is ever read that belongs to the same moment as a state of the other. So a
//! difference that is seen says nothing by itself. What counts is this: a row looks the same on the source at two moments, what the
//! source had committed before the first has reached the target, and between the two moments the target's row looks otherwise. The
//! source's row had its one form all the time, and the target has had time to take it.
//!
//! To find the few rows that are worth such a look, both sides hash all rows into buckets by their key, and only buckets that
//! differ are read again, in finer ones, until what is left is little enough to be fetched. Sums of hashes do not depend on any
//! order, so that collations, plans and partitions of the two sides may differ, and a table can be read piece by piece.

use super::error::Result;
use super::table::MappedTable;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::Future;

/// Bits of a key's hash that make the bucket of one level.
pub const BUCKET_BITS: u32 = 15;
/// Levels of buckets that a hash of 64 bits gives.
const LEVELS: usize = 4;
/// Rows that are fetched at a time, at the most, by what their buckets held.
const FETCH: u64 = 50_000;
/// Times that rows which change while they are looked at are looked at.
const LOOKS: u32 = 10;
/// Rows of a table that are looked at: a table that differs in more is reported with at least as many.
const CANDIDATES: usize = 10_000;

/// The columns that name a row, as text. Of a table whose rows have no name: the row's hash.
pub type Key = Vec<String>;

/// All rows of a bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    /// How many.
    pub rows: u64,
    /// Sum of their hashes, by which order does not matter.
    pub sum: i64,
}

/// How a row looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Hash of its columns; of rows without a name, how many of them there are.
    pub digest: i64,
    /// Which version of the row it was, on that side alone; 0 of rows without a name.
    pub version: u64,
}

/// Buckets of each level, from the first, that rows must be in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter(pub Vec<Vec<u32>>);

/// One side of a comparison. Hashes of both sides are equal for equal rows.
pub trait Compare: Send + Sync {
    /// Digests of the buckets at the filter's next level. A bucket without rows is left out.
    fn digests(&self, table: &MappedTable, filter: &Filter) -> impl Future<Output = Result<HashMap<u32, Digest>>> + Send;

    /// The rows of these buckets.
    fn rows(&self, table: &MappedTable, filter: &Filter) -> impl Future<Output = Result<HashMap<Key, Seen>>> + Send;

    /// Those of these rows that are there. Only for tables whose rows have names ([`MappedTable::key_columns`]).
    fn look(&self, table: &MappedTable, keys: &[Key]) -> impl Future<Output = Result<HashMap<Key, Seen>>> + Send;
}

/// The stream between the two sides.
pub trait Passes: Sync {
    /// Waits until what the source has committed before the call has reached the target.
    fn passed(&self) -> impl Future<Output = Result<()>> + Send;
}

/// What can't be compared offers this, of which there is none.
pub enum Incomparable {}

impl Compare for Incomparable {
    async fn digests(&self, _: &MappedTable, _: &Filter) -> Result<HashMap<u32, Digest>> {
        match *self {}
    }

    async fn rows(&self, _: &MappedTable, _: &Filter) -> Result<HashMap<Key, Seen>> {
        match *self {}
    }

    async fn look(&self, _: &MappedTable, _: &[Key]) -> Result<HashMap<Key, Seen>> {
        match *self {}
    }
}

/// How a row differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// The target does not have it.
    Missing,
    /// Only the target has it.
    Unexpected,
    /// Columns differ.
    Other,
}

impl Difference {
    /// The word in status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "Missing",
            Self::Unexpected => "Unexpected",
            Self::Other => "Other",
        }
    }
}

/// What was found in one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Rows of the source that were compared.
    pub rows: u64,
    /// Rows that differ, by key.
    pub differences: BTreeMap<Key, Difference>,
    /// Rows that changed each time that they were looked at: nothing is known of them.
    pub undecided: u64,
    /// More rows may differ than were looked at.
    pub more: bool,
}

/// Compares one table.
///
/// # Errors
/// Those of the two sides and of the stream.
pub async fn verify<S: Compare, T: Compare>(source: &S, target: &T, table: &MappedTable, stream: &impl Passes) -> Result<Found> {
    let mut found = Found::default();
    let mut filter = Filter::default();
    let suspects = loop {
        let (left, right) = futures::future::try_join(source.digests(table, &filter), target.digests(table, &filter)).await?;
        if filter.0.is_empty() {
            found.rows = left.values().map(|digest| digest.rows).sum();
        }
        let suspects = unequal(&left, &right);
        let rows: u64 = suspects.iter().map(|(_, rows)| rows).sum();
        if suspects.is_empty() {
            return Ok(found);
        }
        if rows <= FETCH || filter.0.len() + 1 == LEVELS {
            break suspects;
        }
        filter.0.push(suspects.into_iter().map(|(bucket, _)| bucket).collect());
    };
    for buckets in groups(&suspects) {
        let mut part = filter.clone();
        part.0.push(buckets);
        settle(source, target, table, &part, stream, &mut found).await?;
        if found.differences.len() >= CANDIDATES {
            found.more = true;
            break;
        }
    }
    Ok(found)
}

/// Buckets that differ, in order, with the rows that the fuller side has there.
fn unequal(left: &HashMap<u32, Digest>, right: &HashMap<u32, Digest>) -> Vec<(u32, u64)> {
    let buckets: HashSet<&u32> = left.keys().chain(right.keys()).collect();
    let both = buckets.into_iter().map(|bucket| (*bucket, left.get(bucket), right.get(bucket)));
    let rows = |digest: Option<&Digest>| digest.map_or(0, |digest| digest.rows);
    let unequal = both.filter(|(_, left, right)| left != right).map(|(bucket, left, right)| (bucket, rows(left).max(rows(right))));
    let mut unequal: Vec<(u32, u64)> = unequal.collect();
    unequal.sort_unstable();
    unequal
}

/// Buckets in groups that are fetched at a time.
fn groups(suspects: &[(u32, u64)]) -> Vec<Vec<u32>> {
    let mut groups: Vec<Vec<u32>> = Vec::new();
    let mut room = 0;
    for (bucket, rows) in suspects {
        match groups.last_mut() {
            Some(group) if *rows <= room => {
                group.push(*bucket);
                room -= rows;
            }
            _ => {
                groups.push(vec![*bucket]);
                room = FETCH.saturating_sub(*rows);
            }
        }
    }
    groups
}

/// Looks at the rows of some buckets until it is known of each whether it differs.
async fn settle<S: Compare, T: Compare>(
    source: &S,
    target: &T,
    table: &MappedTable,
    filter: &Filter,
    stream: &impl Passes,
    found: &mut Found,
) -> Result<()> {
    let (left, right) = futures::future::try_join(source.rows(table, filter), target.rows(table, filter)).await?;
    let mut open = candidates(&left, &right);
    drop((left, right));
    if open.len() > CANDIDATES {
        open.truncate(CANDIDATES);
        found.more = true;
    }
    let mut earlier: Option<HashMap<Key, Seen>> = None;
    for _ in 0..LOOKS {
        if open.is_empty() {
            return Ok(());
        }
        let before = again(source, table, filter, &open).await?;
        stream.passed().await?;
        let there = again(target, table, filter, &open).await?;
        let after = again(source, table, filter, &open).await?;
        open.retain(|key| match judge(before.get(key), there.get(key), after.get(key), earlier.as_ref().map(|earlier| earlier.get(key))) {
            Verdict::Equal => false,
            Verdict::Differs(difference) => {
                found.differences.insert(key.clone(), difference);
                false
            }
            Verdict::Open => true,
        });
        earlier = Some(there);
    }
    found.undecided += open.len() as u64;
    Ok(())
}

/// Rows by their names where they have some; else all rows of their buckets.
async fn again<C: Compare>(side: &C, table: &MappedTable, filter: &Filter, keys: &[Key]) -> Result<HashMap<Key, Seen>> {
    if table.key_columns().is_empty() { side.rows(table, filter).await } else { side.look(table, keys).await }
}

/// Rows that do not look alike, in order.
fn candidates(left: &HashMap<Key, Seen>, right: &HashMap<Key, Seen>) -> Vec<Key> {
    let digest = |seen: Option<&Seen>| seen.map(|seen| seen.digest);
    let differs = left.keys().filter(|key| digest(left.get(*key)) != digest(right.get(*key)));
    let mut keys: Vec<Key> = differs.chain(right.keys().filter(|key| !left.contains_key(*key))).cloned().collect();
    keys.sort_unstable();
    keys
}

/// What two looks at the source and one at the target between them say of a row.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Equal,
    Differs(Difference),
    /// It is looked at once more.
    Open,
}

/// A version of a row that is on the source before and after was there all the time. Of a row without a version, or of none, that can't be
/// said: it may have come and gone, and may have been on the target just then. So what the target shows must be the same in the look
/// before (`earlier`, when there was one), since all of that has passed between the two.
fn judge(before: Option<&Seen>, there: Option<&Seen>, after: Option<&Seen>, earlier: Option<Option<&Seen>>) -> Verdict {
    if before != after {
        return Verdict::Open;
    }
    let stood = before.is_some_and(|seen| seen.version != 0) || earlier == Some(there);
    let difference = match (before, there) {
        (None, None) => return Verdict::Equal,
        (Some(source), Some(target)) if source.digest == target.digest => return Verdict::Equal,
        (Some(_), Some(_)) => Difference::Other,
        (Some(_), None) => Difference::Missing,
        (None, Some(_)) => Difference::Unexpected,
    };
    if stood { Verdict::Differs(difference) } else { Verdict::Open }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(digest: i64, version: u64) -> Option<Seen> {
        Some(Seen { digest, version })
    }

    fn judged(before: Option<Seen>, there: Option<Seen>, after: Option<Seen>, earlier: Option<Option<Seen>>) -> Verdict {
        judge(before.as_ref(), there.as_ref(), after.as_ref(), earlier.as_ref().map(Option::as_ref))
    }

    #[test]
    fn a_row_that_stood_still_is_judged_at_once() {
        assert_eq!(judged(seen(1, 7), seen(1, 9), seen(1, 7), None), Verdict::Equal);
        assert_eq!(judged(seen(1, 7), seen(2, 9), seen(1, 7), None), Verdict::Differs(Difference::Other));
        assert_eq!(judged(seen(1, 7), None, seen(1, 7), None), Verdict::Differs(Difference::Missing));
        assert_eq!(judged(None, None, None, None), Verdict::Equal);
    }

    #[test]
    fn a_row_that_changed_meanwhile_is_looked_at_again() {
        assert_eq!(judged(seen(1, 7), seen(2, 9), seen(2, 8), None), Verdict::Open);
        assert_eq!(judged(seen(1, 7), seen(2, 9), seen(1, 8), None), Verdict::Open, "changed and changed back");
        assert_eq!(judged(None, seen(2, 9), seen(2, 8), None), Verdict::Open);
        assert_eq!(judged(seen(1, 7), None, None, None), Verdict::Open);
    }

    #[test]
    fn a_row_that_only_the_target_has_must_be_there_twice() {
        assert_eq!(judged(None, seen(2, 9), None, None), Verdict::Open, "it may have come and gone on the source");
        assert_eq!(judged(None, seen(2, 9), None, Some(seen(2, 8))), Verdict::Open, "another version of it");
        assert_eq!(judged(None, seen(2, 9), None, Some(seen(2, 9))), Verdict::Differs(Difference::Unexpected));
    }

    #[test]
    fn rows_without_names_are_counted_twice() {
        assert_eq!(judged(seen(2, 0), seen(1, 0), seen(2, 0), None), Verdict::Open);
        assert_eq!(judged(seen(2, 0), seen(1, 0), seen(2, 0), Some(seen(1, 0))), Verdict::Differs(Difference::Other));
        assert_eq!(judged(seen(2, 0), None, seen(2, 0), Some(None)), Verdict::Differs(Difference::Missing));
        assert_eq!(judged(seen(2, 0), seen(2, 0), seen(2, 0), None), Verdict::Equal);
    }

    #[test]
    fn buckets_are_fetched_in_groups_of_bounded_size() {
        let suspects: Vec<(u32, u64)> = vec![(1, FETCH - 1), (2, 1), (3, 1), (4, 2 * FETCH), (5, 1)];
        assert_eq!(groups(&suspects), [vec![1, 2], vec![3], vec![4], vec![5]]);
    }
}
