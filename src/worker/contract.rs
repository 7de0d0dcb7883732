//! The HTTP contract between the operator and a worker, version 1.
//!
//! * `GET /v1/status` → [`Status`], `PUT /v1/desired` with a [`Desired`] → 204, or 409 with an older generation;
//!   both signed: `Authorization: Bearer` with a token of [`super::token::sign`].
//! * `/livez`, `/readyz`, `/metrics`: unsigned.
//!
//! Fields are only ever added; unknown ones are ignored. An operator speaks versions N and N−1.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the contract that this build speaks.
pub const VERSION: u32 = 1;
/// Port of a worker's HTTP server.
pub const PORT: u16 = 8080;
/// Limit of a request's or answer's body, in bytes.
pub const BODY_LIMIT: usize = 4 * 1024 * 1024;
/// Folder of the mounted ConfigMap; the document is the key [`DESIRED_FILE`].
pub const CONFIG_FOLDER: &str = "/etc/sluice/config";
/// Key of the ConfigMap and name of the file.
pub const DESIRED_FILE: &str = "desired.json";
/// Folder of the source's mounted Secrets: `credentials/`, `ca/`, `client/`.
pub const SOURCE_FOLDER: &str = "/etc/sluice/source";
/// Folder of the target's mounted Secrets.
pub const TARGET_FOLDER: &str = "/etc/sluice/target";
/// The emptyDir: copy of the last desired document, spill.
pub const STATE_FOLDER: &str = "/var/lib/sluice";
/// A variable of the worker's environment, and its value. From this size on, in bytes, glibc maps a block of memory by itself and gives it
/// back when it is freed (mallopt(3), `M_MMAP_THRESHOLD`). Left alone, glibc raises the threshold up to 32 MiB as blocks are freed, and
/// what is left in its heaps grew with each of 60 backlogs (`benches/results/2026-11-21-memory.md`).
pub const MMAP_THRESHOLD: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "131072");

/// What a worker shall do. Everything in it takes effect without a restart of the pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Desired {
    /// Version of the contract.
    pub contract: u32,
    /// Grows with each change of this document. The worker takes the highest of mounted file, pushed body and its copy.
    pub generation: i64,
    /// Whose worker this is; the audience of signed calls is `mirror.uid`.
    pub mirror: MirrorId,
    /// The source.
    pub source: EndpointSpec,
    /// The target.
    pub target: EndpointSpec,
    /// Replication slot.
    pub slot: String,
    /// Publication.
    pub publication: String,
    /// Tables by name; exactly one of `tables` and `schemas`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<Vec<TableSpec>>,
    /// Whole schemas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schemas: Option<Vec<SchemaSpec>>,
    /// Initial copy.
    pub snapshot: SnapshotSpec,
    /// Batches.
    pub stream: StreamSpec,
    /// Stop when a table is altered on the source, and do not alter that of the target.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stop_at_schema_changes: bool,
    /// How much log the source may keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_budget: Option<WalBudgetSpec>,
    /// Stop the stream, keep the position.
    #[serde(default)]
    pub suspend: bool,
    /// What somebody asks for once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<RequestSpec>,
    /// Public keys (Ed25519, 32 bytes, standard base64) that calls may be signed with: the current and the next.
    pub public_keys: Vec<String>,
}

/// A one-off action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestSpec {
    /// It is done once per id.
    pub id: String,
    /// `Retry`, `Resync`, `ResetSequences`, `Cancel`. One that a worker does not know waits for a newer worker.
    pub action: String,
    /// Tables of the source as `schema.name`, or `name` in schema public; all when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<String>,
}

/// Names a Mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MirrorId {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Uid.
    pub uid: String,
}

/// A database; user name, password and certificates are files below `folder`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSpec {
    /// `PostgreSQL`.
    pub engine: String,
    /// Host.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Database.
    pub database: String,
    /// Disable, Prefer, Require, VerifyCA, VerifyFull.
    pub tls_mode: String,
    /// Folder with `credentials/username`, `credentials/password`, `ca/<caKey>`, `client/tls.crt`, `client/tls.key`.
    pub folder: String,
    /// Key of the CA bundle, when there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_key: Option<String>,
    /// Whether a client certificate is mounted.
    #[serde(default)]
    pub client_certificate: bool,
    /// Session parameters.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, String>,
    /// Seconds to wait for a connection.
    pub connect_timeout_seconds: u32,
}

/// One table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TableSpec {
    /// Schema in the source.
    pub schema: String,
    /// Name in the source.
    pub name: String,
    /// Schema in the target.
    pub target_schema: String,
    /// Name in the target.
    pub target_name: String,
    /// Columns that never leave the source.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_columns: Vec<String>,
    /// Target columns may have narrower type modifiers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_narrower_types: bool,
}

/// One schema.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SchemaSpec {
    /// In the source.
    pub name: String,
    /// In the target.
    pub target: String,
    /// Tables that are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_tables: Vec<String>,
    /// Target columns may have narrower type modifiers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_narrower_types: bool,
}

/// Initial copy, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotSpec {
    /// Copy existing rows.
    pub enabled: bool,
    /// Empty a target table that holds rows before its first copy.
    pub truncate: bool,
    /// Where to start without a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_position: Option<String>,
    /// Rows of one range.
    pub rows_per_partition: u64,
    /// Tables at a time.
    pub tables_in_parallel: usize,
    /// Ranges of one table at a time.
    pub workers_per_table: usize,
    /// Give tables that are made the source's indexes. Not written when it is so, as in documents of older operators.
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    pub indexes: bool,
    /// Give tables that are made the source's foreign keys.
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    pub foreign_keys: bool,
}

fn yes() -> bool {
    true
}

/// Batches, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StreamSpec {
    /// Rows of one batch.
    pub max_batch_rows: usize,
    /// Bytes of one batch.
    pub max_batch_bytes: usize,
    /// How long a batch may wait for more.
    pub max_delay_milliseconds: u64,
    /// Connections to the target that changes are applied on.
    #[serde(default = "apply_connections")]
    pub apply_connections: usize,
    /// Triggers and foreign key actions of target tables may fire on mirrored changes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accept_target_triggers: bool,
}

/// What a document of an older operator leaves out.
fn apply_connections() -> usize {
    2
}

/// How much log the source may keep for the slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WalBudgetSpec {
    /// Bytes from which it is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warn_bytes: Option<u64>,
    /// Bytes from which the action is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// Warn, DropSlot, DropSlotAndResync.
    pub action: String,
}

/// What the worker does, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Connecting, claiming, checking.
    Starting,
    /// Publication, slot and tables are being made.
    SettingUp,
    /// The initial copy runs.
    Copying,
    /// Copied tables follow the stream up to its position.
    CatchingUp,
    /// All tables follow.
    Streaming,
    /// Stopped by `suspend`.
    Suspended,
    /// Between two tries after a failure that may pass.
    Retrying,
    /// Needs a human; looked at again at a slow pace.
    Stopped,
}

/// What a worker reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Version of the contract.
    pub contract: u32,
    /// Version of the worker's program.
    pub version: String,
    /// Generation of the desired document in effect.
    pub generation: i64,
    /// The pod's name.
    pub pod: String,
    /// What it does.
    pub phase: Phase,
    /// Epoch it claimed; 0 before.
    pub epoch: i64,
    /// Slot.
    pub slot: String,
    /// Publication.
    pub publication: String,
    /// Last position received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received: Option<String>,
    /// Last position committed on the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied: Option<String>,
    /// Last position that is on the target's disk and was confirmed to the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirmed: Option<String>,
    /// Bytes of log between the source's end and what is applied; without a session, and what was confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<u64>,
    /// Seconds since the commit time of the last transaction applied while something is waiting; 0 when level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_seconds: Option<u64>,
    /// Median time from the source's commit to the target's, over the transactions and heartbeats of the last one to two
    /// minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p50_milliseconds: Option<u64>,
    /// The time that 99 of 100 have kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_p99_milliseconds: Option<u64>,
    /// Number of tables per state.
    pub tables: BTreeMap<String, u32>,
    /// Tables in state Error, by name, with the reason; at most 20.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub table_errors: BTreeMap<String, String>,
    /// Rows copied so far.
    pub rows_copied: u64,
    /// Rows to copy, by statistics.
    pub rows_to_copy: u64,
    /// Rows streamed since the first checkpoint.
    pub rows_streamed: u64,
    /// All tables have been copied.
    pub snapshot_completed: bool,
    /// Every table follows the stream.
    pub streaming: bool,
    /// `Replica` or `Ordered`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apply_mode: Option<String>,
    /// What is waited for, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
    /// Memory of the log in bytes: changes from being read until they are applied, and transactions that have not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_memory_bytes: Option<u64>,
    /// The most that this may be, but for one batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_memory_limit_bytes: Option<u64>,
    /// Bytes in the spill.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_bytes: Option<u64>,
    /// The most that the spill may hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_limit_bytes: Option<u64>,
    /// What the source keeps for the slot: looked at every ten seconds, also while suspended. Absent when it can't be asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
    /// What is not as it should be though the stream goes on, or will go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<Notice>,
    /// What is recorded on the target of requests, the newest first, at most 11; that of the document in effect is always among
    /// them. Absent before a claim has read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<Vec<RequestReport>>,
    /// What the last comparison has found, or has found so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verification: Option<Verification>,
    /// Last failure, until it has passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

/// A request that was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestReport {
    /// Its id.
    pub id: String,
    /// What was asked for.
    pub action: String,
    /// All tables are copied again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_full_resync: bool,
    /// Running, Succeeded, Failed, Cancelled, Skipped.
    pub state: String,
    /// When it was taken, as RFC 3339.
    pub started_at: String,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<String>,
    /// For people, without secrets.
    pub message: String,
}

/// A comparison of source and target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Verification {
    /// Id of the request.
    pub request: String,
    /// Tables that were compared.
    pub tables: u64,
    /// Tables that are to be compared.
    pub of: u64,
    /// Tables that were left out, since they do not follow the stream; at most 10.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// Rows of the source that were compared.
    pub rows: u64,
    /// Rows that differ.
    pub differences: u64,
    /// Rows of which nothing is known, since they changed each time that they were looked at.
    #[serde(default)]
    pub undecided: u64,
    /// More rows may differ than were looked at.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// The first rows that differ; at most 10.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<DifferentRow>,
    /// When it was over, as RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<String>,
}

/// A row that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DifferentRow {
    /// Table of the source.
    pub table: String,
    /// The columns that name the row, as text; each at most 128 characters.
    pub key: Vec<String>,
    /// Missing, Unexpected, Other.
    pub difference: String,
}

/// A slot as the source sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Retention {
    /// The slot is there.
    pub slot_exists: bool,
    /// Bytes of log that the source keeps for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retained_bytes: Option<u64>,
    /// PostgreSQL's `wal_status`: reserved, extended, unreserved, lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_status: Option<String>,
    /// PostgreSQL's `safe_wal_size`: bytes that may be written before the slot may be lost. Absent without a bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safe_wal_size: Option<i64>,
}

/// Something that people should know though the work goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Notice {
    /// CamelCase constant.
    pub reason: String,
    /// For people, without secrets.
    pub message: String,
}

/// A failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// Retry, Stop, Fenced, Bug.
    pub class: String,
    /// CamelCase constant.
    pub reason: String,
    /// For people, without secrets, at most 1024 bytes.
    pub message: String,
    /// How often in a row.
    pub count: u32,
    /// Seconds until the next try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_in_seconds: Option<u64>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small, complete document.
    pub(crate) fn desired(generation: i64) -> Desired {
        let endpoint = |host: &str, folder: &str| EndpointSpec {
            engine: "PostgreSQL".to_owned(),
            host: host.to_owned(),
            port: 5432,
            database: "shop".to_owned(),
            tls_mode: "Prefer".to_owned(),
            folder: folder.to_owned(),
            ca_key: None,
            client_certificate: false,
            parameters: BTreeMap::new(),
            connect_timeout_seconds: 10,
        };
        Desired {
            contract: VERSION,
            generation,
            mirror: MirrorId { namespace: "shop".to_owned(), name: "users".to_owned(), uid: "5f0c".to_owned() },
            source: endpoint("source", SOURCE_FOLDER),
            target: endpoint("target", TARGET_FOLDER),
            slot: "sluice_users".to_owned(),
            publication: "sluice_users".to_owned(),
            tables: Some(vec![TableSpec {
                schema: "public".to_owned(),
                name: "users".to_owned(),
                target_schema: "public".to_owned(),
                target_name: "users".to_owned(),
                exclude_columns: Vec::new(),
                accept_narrower_types: false,
            }]),
            schemas: None,
            snapshot: SnapshotSpec {
                enabled: true,
                truncate: false,
                start_position: None,
                rows_per_partition: 250_000,
                tables_in_parallel: 4,
                workers_per_table: 4,
                indexes: true,
                foreign_keys: true,
            },
            stream: StreamSpec {
                max_batch_rows: 100_000,
                max_batch_bytes: 16 * 1024 * 1024,
                max_delay_milliseconds: 50,
                apply_connections: 2,
                accept_target_triggers: false,
            },
            stop_at_schema_changes: false,
            wal_budget: None,
            suspend: false,
            request: None,
            public_keys: Vec::new(),
        }
    }
}
