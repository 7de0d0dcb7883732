//! The comparison that was asked for: one table after the other, beside the stream.

use super::{RequestRecord, RequestState};
use crate::engine::error::{Error, Result};
use crate::engine::progress::Progress;
use crate::engine::roles::{Source, Target};
use crate::engine::table::{MappedTable, QualifiedName, TableState};
use crate::engine::verify::{Difference, Found, Key, Passes, verify};
use std::time::{Duration, SystemTime};

/// Rows that differ and are shown by name.
const EXAMPLES: usize = 10;
/// How often it is looked whether a position has been reached.
const LOOK: Duration = Duration::from_millis(100);

/// What a comparison has found so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// Id of the request.
    pub request: String,
    /// Tables that were compared.
    pub tables: usize,
    /// Tables that are to be compared.
    pub of: usize,
    /// Tables that were left out, since they do not follow the stream.
    pub left_out: Vec<QualifiedName>,
    /// Rows of the source that were compared.
    pub rows: u64,
    /// Rows that differ.
    pub differences: u64,
    /// Rows that never stood still.
    pub undecided: u64,
    /// More rows may differ than were looked at.
    pub more: bool,
    /// The first rows that differ.
    pub examples: Vec<(QualifiedName, Key, Difference)>,
    /// When it was over.
    pub finished_at: Option<SystemTime>,
}

impl Verification {
    fn add(&mut self, table: &QualifiedName, found: Found) {
        self.tables += 1;
        self.rows += found.rows;
        self.differences += found.differences.len() as u64;
        self.undecided += found.undecided;
        self.more |= found.more;
        let room = EXAMPLES.saturating_sub(self.examples.len());
        self.examples.extend(found.differences.into_iter().take(room).map(|(key, difference)| (table.clone(), key, difference)));
    }

    /// For people.
    fn told(&self) -> String {
        let mut told = format!("{} rows of {} tables were compared: ", self.rows, self.tables);
        told += &match (self.differences, self.more) {
            (0, _) => "none differs".to_owned(),
            (count, false) => format!("{count} differ"),
            (count, true) => format!("at least {count} differ"),
        };
        if let Some((table, key, difference)) = self.examples.first() {
            told += &format!(", the first is {table} ({}): {}", key.join(", "), difference.as_str());
        }
        if self.undecided > 0 {
            told += &format!("; of {} that changed all the time nothing is known", self.undecided);
        }
        if !self.left_out.is_empty() {
            let names: Vec<String> = self.left_out.iter().map(ToString::to_string).collect();
            told += &format!("; left out, as they do not follow the stream: {}", names.join(", "));
        }
        told
    }
}

/// Compares the tables that a request names.
///
/// # Errors
/// Those of both sides; class `Stop` when they can't be compared.
pub(super) async fn compare<S, T>(
    source: &S,
    target: &T,
    record: &RequestRecord,
    tables: &[MappedTable],
    progress: &Progress,
) -> Result<(RequestState, String)>
where
    S: Source,
    T: Target<Position = S::Position>,
{
    let (Some(left), Some(right)) = (source.compare(), target.compare()) else {
        return Ok((RequestState::Failed, "source and target can't be compared".to_owned()));
    };
    let its: Vec<&MappedTable> = tables.iter().filter(|table| record.is_about(table.source())).collect();
    let mut verification = Verification { request: record.id.clone(), of: its.len(), ..Verification::default() };
    for table in its {
        progress.set_verification(verification.clone());
        if progress.table_states().get(table.source()) != Some(&TableState::Ready) {
            verification.left_out.push(table.source().clone());
            continue;
        }
        let found = verify(&left, &right, table, &Stream { source, progress }).await;
        verification.add(table.source(), found.map_err(|error| error.context(table.source()))?);
    }
    verification.finished_at = Some(SystemTime::now());
    progress.set_verification(verification.clone());
    Ok((RequestState::Succeeded, verification.told()))
}

/// The stream of the session.
struct Stream<'a, S> {
    source: &'a S,
    progress: &'a Progress,
}

impl<S: Source> Passes for Stream<'_, S> {
    async fn passed(&self) -> Result<()> {
        let head = self.source.head().await?;
        // An idle source's log would never move past it by itself.
        self.source.mark().await?;
        loop {
            let applied = self.progress.view().applied.map(|applied| applied.parse::<S::Position>());
            let applied = applied.transpose().map_err(|_| Error::bug("a position of the stream can't be read"))?;
            if applied.is_some_and(|applied| applied >= head) {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn what_is_told_says_how_sure_it_is() {
        let mut verification = Verification { request: "v".into(), of: 2, ..Verification::default() };
        verification.add(&QualifiedName::new("public", "a"), Found { rows: 10, ..Found::default() });
        assert_eq!(verification.told(), "10 rows of 1 tables were compared: none differs");
        let differences: BTreeMap<Key, Difference> = (0..20).map(|n| (vec![format!("{n:02}")], Difference::Missing)).collect();
        verification.add(&QualifiedName::new("public", "b"), Found { rows: 5, differences, undecided: 3, more: true });
        verification.left_out.push(QualifiedName::new("public", "c"));
        let told = "15 rows of 2 tables were compared: at least 20 differ, the first is public.b (00): Missing; \
                    of 3 that changed all the time nothing is known; left out, as they do not follow the stream: public.c";
        assert_eq!(verification.told(), told);
        assert_eq!(verification.examples.len(), EXAMPLES);
    }
}
