//! What is observed of a `Mirror`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Positions in the source's log.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Position {
    /// Last received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received: Option<String>,
    /// Last durable on the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied: Option<String>,
}
/// What the source keeps of its log for the slot.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retention {
    /// Bytes of log for people, for example `1.2 GiB`; for the column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Bytes of log that the source keeps for the slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retained_bytes: Option<i64>,
    /// PostgreSQL's `wal_status` of the slot: `reserved`, `extended`, `unreserved` (about to be lost) or `lost`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_status: Option<String>,
    /// PostgreSQL's `safe_wal_size`: bytes that may still be written before the slot may be lost; negative when that has
    /// been passed. Absent when `max_slot_wal_keep_size` sets no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safe_wal_bytes: Option<i64>,
}
/// Tables by state.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TableCounts {
    /// `ready/total`, for the column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Number of tables per state.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub by_state: BTreeMap<String, i32>,
}
/// Observed worker.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerStatus {
    /// Pod that holds the claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Address of its HTTP port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Image it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Epoch it claimed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<i64>,
}
/// What has become of a one-off action.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema, Default)]
#[serde(rename_all = "camelCase")]
pub struct RequestStatus {
    /// Its id.
    pub id: String,
    /// What was asked for.
    pub action: String,
    /// `Pending`, `Running`, `Succeeded`, `Failed`, `Cancelled` or `Skipped`.
    pub state: String,
    /// When it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// What was done, or why not.
    #[schemars(length(max = 1024))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}
/// What a comparison of source and target has found.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema, Default)]
#[serde(rename_all = "camelCase")]
pub struct VerificationStatus {
    /// Id of the request.
    pub request: String,
    /// Tables that were compared, of those that are to be.
    pub tables: String,
    /// Rows of the source that were compared.
    pub rows: i64,
    /// Rows that differ.
    pub differences: i64,
    /// Rows of which nothing is known, since they changed each time that they were looked at.
    #[serde(default)]
    pub undecided: i64,
    /// More rows may differ than were looked at.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// Tables that were left out, since they do not follow the stream.
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// The first rows that differ.
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<DifferentRow>,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
}
/// A row that differs.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DifferentRow {
    /// Table of the source.
    pub table: String,
    /// The columns that name the row, as text. Of rows without a name: a hash of the row.
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub key: Vec<String>,
    /// `Missing`: the target does not have it. `Unexpected`: only the target has it. `Other`: columns differ.
    pub difference: String,
}
/// Observed state of a Mirror.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, KubeSchema, Default)]
#[serde(rename_all = "camelCase")]
pub struct MirrorStatus {
    /// Generation of the spec that this status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Standard and domain conditions.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[schemars(length(max = 24))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// One word for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// Slot in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<String>,
    /// What the source keeps of its log for the slot, also while the Mirror is suspended or stopped; absent when the source
    /// can't be asked, or has no such slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
    /// Publication in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publication: Option<String>,
    /// Positions in the source's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
    /// Lag for people, for example `1.2 MiB, 3s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag: Option<String>,
    /// Lag in bytes of log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<i64>,
    /// Lag in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_seconds: Option<i64>,
    /// Median time in milliseconds from the source's commit to the target's, over the last one to two minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p50_milliseconds: Option<i64>,
    /// The time in milliseconds that 99 of 100 transactions have kept, over the last one to two minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p99_milliseconds: Option<i64>,
    /// Tables by state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<TableCounts>,
    /// Rows copied by the initial copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_copied: Option<i64>,
    /// Rows written from the stream since the first copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_streamed: Option<i64>,
    /// How changes are applied: `Replica`, triggers and foreign keys of the target do not fire; or `Ordered`, they do, and changes
    /// are applied in commit order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apply_mode: Option<String>,
    /// The worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerStatus>,
    /// The one-off action of `spec.request`; the last one when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<RequestStatus>,
    /// Those before it, the newest first.
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub request_history: Vec<RequestStatus>,
    /// What the last comparison has found, or has found so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verification: Option<VerificationStatus>,
    /// Last error, without secrets.
    #[schemars(length(max = 1024))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}
