//! Where and how things go wrong.

use crate::dice::Dice;

/// Calls of the roles that can fail, lose their answer, or be the last thing that a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    Identity,
    Take,
    Prove,
    Tables,
    Published,
    LogState,
    LeftTimeline,
    Open,
    Next,
    Snapshot,
    Read,
    Check,
    Finish,
    Prepare,
    DoneRanges,
    Publish,
    CreateLog,
    DropLog,
    Mark,
    Claim,
    Load,
    IntendLog,
    Initialize,
    SetTimeline,
    Register,
    BeginCopy,
    SetState,
    Forget,
    Apply,
    ApplyEarly,
    Advance,
}

impl Point {
    pub const ALL: [Self; 31] = [
        Self::Identity,
        Self::Take,
        Self::Prove,
        Self::Tables,
        Self::Published,
        Self::LogState,
        Self::LeftTimeline,
        Self::Open,
        Self::Next,
        Self::Snapshot,
        Self::Read,
        Self::Check,
        Self::Finish,
        Self::Prepare,
        Self::DoneRanges,
        Self::Publish,
        Self::CreateLog,
        Self::DropLog,
        Self::Mark,
        Self::Claim,
        Self::Load,
        Self::IntendLog,
        Self::Initialize,
        Self::SetTimeline,
        Self::Register,
        Self::BeginCopy,
        Self::SetState,
        Self::Forget,
        Self::Apply,
        Self::ApplyEarly,
        Self::Advance,
    ];

    /// What the call leaves behind, by which its faults are told apart.
    pub fn faults(self) -> &'static [Fault] {
        match self {
            Self::Mark | Self::Claim => &[Fault::Fails, Fault::CrashBefore, Fault::AnswerLost, Fault::CrashAfter],
            Self::Publish
            | Self::CreateLog
            | Self::DropLog
            | Self::Snapshot
            | Self::Load
            | Self::Finish
            | Self::IntendLog
            | Self::Initialize
            | Self::SetTimeline
            | Self::BeginCopy
            | Self::SetState
            | Self::Forget
            | Self::Apply
            | Self::Advance => &[Fault::Fails, Fault::CrashBefore, Fault::CrashCommitting, Fault::AnswerLost, Fault::CrashAfter],
            _ => &[Fault::Fails, Fault::CrashBefore],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An error, and nothing has happened.
    Fails,
    /// The worker is gone before anything has happened.
    CrashBefore,
    /// The worker is gone while its commit is on the way: the commit may still come, at any time.
    CrashCommitting,
    /// It has happened, and the worker gets an error.
    AnswerLost,
    /// It has happened, and the worker is gone before it learns of it.
    CrashAfter,
}

/// At which moment of a call something may go wrong.
#[derive(Clone, Copy)]
pub enum Moment {
    Before,
    Committing,
    After,
}

/// How often things go wrong in one history, and what went wrong.
pub struct Faults {
    per_ten_thousand: u32,
    left: u32,
    pub count: [[u64; 5]; Point::ALL.len()],
}

impl Faults {
    pub fn new(dice: &mut Dice) -> Self {
        let per_ten_thousand = [0, 50, 150, 400][dice.below(4) as usize];
        Self { per_ten_thousand, left: 25, count: [[0; 5]; Point::ALL.len()] }
    }

    /// From now on nothing goes wrong.
    pub fn end(&mut self) {
        self.left = 0;
    }

    /// Something rare and bad happens elsewhere.
    pub fn disaster(&mut self, dice: &mut Dice) -> bool {
        let strikes = self.left > 0 && dice.below(10_000) < self.per_ten_thousand / 10;
        self.left -= u32::from(strikes);
        strikes
    }

    pub fn draw(&mut self, point: Point, moment: Moment, dice: &mut Dice) -> Option<Fault> {
        // What is seldom called fails more often.
        let often = if point == Point::Advance { 8 } else { 1 };
        if self.left == 0 || dice.below(10_000) >= self.per_ten_thousand * often {
            return None;
        }
        self.left -= 1;
        let crash = dice.chance(500);
        let fault = match (moment, crash) {
            (Moment::Before, false) => Fault::Fails,
            (Moment::Before, true) => Fault::CrashBefore,
            (Moment::Committing, _) => Fault::CrashCommitting,
            (Moment::After, false) => Fault::AnswerLost,
            (Moment::After, true) => Fault::CrashAfter,
        };
        self.count[point as usize][fault as usize] += 1;
        Some(fault)
    }
}
