//! Which columns the log speaks of: it names them, and a name may mean another column than before. Pure.
//!
//! Every column of a table has a number that is never given again, and the log describes columns in the order of their numbers. A version
//! in the log lies between the one that the target holds and the one in the catalog, so it has all columns that both have; it may
//! have ones that have been dropped or have come since, and ones that have come and gone between. What is left open by that is told by
//! names. Where two readings are possible, none is taken.

use crate::engine::table::Column;
use std::collections::HashSet;

/// What is known of a column by its number.
#[derive(Clone, Copy, Debug, Default)]
pub struct Candidate<'a> {
    /// In the version that the target holds.
    pub known: Option<&'a str>,
    /// In the catalog.
    pub now: Option<&'a str>,
    /// Its type there.
    pub type_id: u32,
    /// The log never has it: it is computed, or excluded.
    pub absent: bool,
}

/// How a description can be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Reading {
    /// The number of each column.
    One(Vec<i32>),
    /// In no way that goes with what is known.
    None,
    /// In several ways.
    Several,
}

impl Candidate<'_> {
    /// Both versions have it, and so has every one between them.
    fn is_lasting(&self) -> bool {
        self.known.is_some() && self.now.is_some()
    }
}

/// In how many ways columns from one on can be read with numbers from one on; 2 stands for several. Ways that differ only in columns
/// that are gone are one: what such a column held makes no difference in the end.
#[derive(Clone, Copy, Default)]
struct Ways {
    /// The first of the columns is there to this day.
    lives: u8,
    /// It is gone.
    gone: u8,
}

impl Ways {
    fn all(self) -> u8 {
        (self.lives + self.gone).min(2)
    }
}

/// Built-in types none of which is turned into another without writing all rows anew, which is noticed (PostgreSQL: `pg_type.dat`): bool,
/// bytea, int8, int2, int4, text, json, float4, float8, date, numeric, uuid, jsonb.
const APART: [u32; 13] = [16, 17, 20, 21, 23, 25, 114, 700, 701, 1082, 1700, 2950, 3802];

fn is_other(one: u32, other: u32) -> bool {
    one != other && APART.contains(&one) && APART.contains(&other)
}

/// Reads a description. `candidates`: by number, from 1.
pub fn align(described: &[Column], candidates: &[Candidate<'_>]) -> Reading {
    let (columns, numbers) = (described.len(), candidates.len());
    let names: HashSet<&str> = candidates.iter().flat_map(|candidate| [candidate.known, candidate.now]).flatten().collect();
    let may_take = |number: usize, column: usize| {
        let candidate = &candidates[number];
        let name = described[column].name.as_str();
        let has_name = [candidate.known, candidate.now].contains(&Some(name));
        // A name that is not known was given and taken away between the two versions.
        let may_have_had_name =
            !names.contains(name) && (candidate.now.is_none() || !is_other(candidate.type_id, described[column].type_id));
        !candidate.absent && (candidate.is_lasting() || has_name || may_have_had_name)
    };
    let mut ways = vec![vec![Ways::default(); columns + 1]; numbers + 1];
    ways[numbers][columns].gone = 1;
    for number in (0..numbers).rev() {
        for column in (0..=columns).rev() {
            let taken = if column < columns && may_take(number, column) { ways[number + 1][column + 1].all() } else { 0 };
            let passed = if candidates[number].is_lasting() { Ways::default() } else { ways[number + 1][column] };
            ways[number][column] = match candidates[number].now {
                Some(_) => Ways { lives: (taken + passed.lives).min(2), ..passed },
                // Whatever a later number that is gone could make of it, this one can.
                None if taken > 0 => Ways { gone: taken, ..passed },
                None => passed,
            };
        }
    }
    match ways[0][0].all() {
        0 => Reading::None,
        1 => {
            let (mut column, mut read) = (0, Vec::with_capacity(columns));
            for number in 0..numbers {
                if column < columns && may_take(number, column) && ways[number + 1][column + 1].all() > 0 {
                    read.push(number as i32 + 1);
                    column += 1;
                }
            }
            Reading::One(read)
        }
        _ => Reading::Several,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::table::QualifiedName;

    /// Names by number; `-` for a column that is not there.
    fn read(known: &[&'static str], described: &[&str], now: &[&'static str]) -> Reading {
        let name = |names: &[&'static str], number: usize| names.get(number).copied().filter(|name| *name != "-");
        let candidates: Vec<_> = (0..known.len().max(now.len()))
            .map(|number| Candidate { known: name(known, number), now: name(now, number), type_id: 23, absent: false })
            .collect();
        let column = |name: &&str| Column {
            name: (*name).into(),
            number: 0,
            type_id: 23,
            modifier: -1,
            type_name: QualifiedName::new("pg_catalog", "int4"),
            declared: "integer".into(),
            key: false,
            not_null: false,
            generated: None,
            collation: None,
        };
        align(&described.iter().map(column).collect::<Vec<_>>(), &candidates)
    }

    fn one(numbers: &[i32]) -> Reading {
        Reading::One(numbers.to_vec())
    }

    #[test]
    fn what_came_went_or_was_renamed_is_told_by_number() {
        assert_eq!(read(&["id", "a"], &["id", "a", "b"], &["id", "a", "b"]), one(&[1, 2, 3]));
        assert_eq!(read(&["id", "a", "b"], &["id", "b"], &["id", "-", "b"]), one(&[1, 3]));
        assert_eq!(read(&["id", "a", "b"], &["id", "b", "a"], &["id", "b", "a"]), one(&[1, 2, 3]), "names were swapped");
        assert_eq!(read(&["id", "a"], &["id", "b"], &["id", "-", "b"]), one(&[1, 3]), "another column");
        assert_eq!(read(&["id", "a"], &["id", "b"], &["id", "b"]), one(&[1, 2]), "another name");
    }

    #[test]
    fn versions_between_are_read_while_the_catalog_is_ahead() {
        let (known, now) = (["id", "a"], ["id", "a", "b", "c"]);
        assert_eq!(read(&known, &["id", "a"], &now), one(&[1, 2]));
        assert_eq!(read(&known, &["id", "a", "b"], &now), one(&[1, 2, 3]));
        // Renamed twice; dropped since; come and gone between.
        assert_eq!(read(&["id", "a"], &["id", "b"], &["id", "c"]), one(&[1, 2]));
        assert_eq!(read(&["id", "a", "b"], &["id", "a", "b", "c"], &["id", "-", "b", "c"]), one(&[1, 2, 3, 4]));
        assert_eq!(read(&["id"], &["id", "x"], &["id", "-"]), one(&[1, 2]));
        // Added under another name; renamed and then dropped.
        assert_eq!(read(&["id"], &["id", "x"], &["id", "y"]), one(&[1, 2]));
        assert_eq!(read(&["id", "a"], &["id", "x"], &["id", "-"]), one(&[1, 2]));
        assert_eq!(read(&["id"], &["id", "x", "a"], &["id", "-", "-", "a"]), one(&[1, 2, 4]));
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_not_read() {
        assert_eq!(read(&["id", "a"], &["id", "a"], &["id", "-", "a"]), Reading::Several, "dropped and added again");
        assert_eq!(read(&["id", "a"], &["id"], &["id", "a"]), Reading::None);
        assert_eq!(read(&["id", "a"], &["id", "a", "z"], &["id", "a"]), Reading::None);
        assert!(is_other(23, 25) && !is_other(25, 1043), "a text may have been a varchar");
        // Renamed and dropped, or added under another name.
        assert_eq!(read(&["id", "a"], &["id", "x"], &["id", "-", "b"]), Reading::Several);
    }
}
