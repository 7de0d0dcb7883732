//! What a table's rows should be: the source's history applied row by row, up to a position that moves on.

use crate::history::{History, Kind, RowChange, Rows, in_order, replay};

/// A table of the target, as far as the oracle must know it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub table: usize,
    /// The timeline that its positions are on.
    pub timeline: i64,
    /// The position that its copy is tied to.
    pub copied_at: u64,
    /// The definition that it was copied under.
    pub definition: usize,
}

#[derive(Clone, Default)]
pub struct Oracle {
    held: Held,
    applied: usize,
    rows: Rows,
    /// It has been altered since its copy: nobody sees that before the next change, or the next look at the catalog.
    altered: bool,
    /// Changes were made while it was out of the publication, into which it had come so often.
    gap: Option<u32>,
}

impl Oracle {
    /// The rows of a table at a position: as they were copied, with all published changes since.
    ///
    /// # Errors
    /// A change was taken for what it is not, since the table had another definition or changes before it are missing.
    pub fn at(&mut self, history: &History, held: Held, position: u64) -> Result<Rows, String> {
        let transactions = history.on_timeline(held.timeline);
        let goes_back = || self.applied.checked_sub(1).is_some_and(|last| transactions[last].end > position);
        if self.held != held || goes_back() {
            *self = Self { held, ..Self::default() };
        }
        for transaction in transactions[self.applied..].iter().take_while(|transaction| transaction.end <= position) {
            self.applied += 1;
            let copied = transaction.end <= held.copied_at;
            for change in transaction.changes.iter().filter(|change| change.table == held.table) {
                if copied || self.is_sent(change).map_err(|what| format!("{what}: a change that ends at {}", transaction.end))? {
                    replay(&mut self.rows, &change.kind);
                }
            }
        }
        Ok(in_order(held.table, self.rows))
    }

    fn is_sent(&mut self, change: &RowChange) -> Result<bool, &'static str> {
        if matches!(change.kind, Kind::Alter) {
            self.altered |= change.definition > self.held.definition;
            return Ok(!self.altered);
        }
        if !change.published {
            self.gap.get_or_insert(change.times_published);
        } else if self.altered {
            return Err("it has another definition");
        } else if self.gap.is_some_and(|times| change.times_published > times) {
            return Err("others are missing before it");
        }
        Ok(change.published)
    }

    /// Changes are missing.
    pub fn has_gap(&self) -> bool {
        self.gap.is_some()
    }
}
