//! The kind `Mirror`: which tables are kept identical, and how.

use super::common::{LocalRef, Reclaim};
use super::mirror_status::MirrorStatus;
use crate::engine::request::Action;
use k8s_openapi::api::core::v1::Toleration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Name of a table in the target.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TableName {
    /// Schema; the source's when absent.
    #[schemars(length(min = 1, max = 63))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// Table; the source's when absent.
    #[schemars(length(min = 1, max = 63))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}
/// One table of the source and where it goes.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Table {
    /// Schema in the source.
    #[schemars(length(min = 1, max = 63))]
    #[serde(default = "public_schema")]
    pub schema: String,
    /// Table in the source.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Where it goes; default: the same name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<TableName>,
    /// Columns that never leave the source.
    #[schemars(length(max = 1600), inner(length(min = 1, max = 63)), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_columns: Vec<String>,
    /// What to do about columns of an existing target table with a narrower type modifier than the source's; `Refuse` when
    /// absent.
    #[serde(default, skip_serializing_if = "NarrowerTypes::is_default")]
    pub narrower_types: NarrowerTypes,
}

/// What to do about columns of an existing target table with a narrower type modifier than the source's, for example
/// `varchar(20)` for `varchar(50)`.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Default)]
pub enum NarrowerTypes {
    /// The Mirror stops with `TargetTableIncompatible` before anything is copied.
    #[default]
    Refuse,
    /// A value that is too long or too large stops the Mirror with `ValueDoesNotFit`. Digits after the point and fractions
    /// of seconds for which there is no room are rounded, and trailing spaces cut, as PostgreSQL does on any assignment.
    Accept,
}

impl NarrowerTypes {
    /// Not said. No CRD default on purpose: it would stand at each of 5,000 tables.
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

fn public_schema() -> String {
    "public".into()
}

/// All tables of a schema.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Schema {
    /// Schema in the source.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Schema in the target; default: the same name.
    #[schemars(length(min = 1, max = 63))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Tables that are left out.
    #[schemars(length(max = 1000), inner(length(min = 1, max = 63)), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_tables: Vec<String>,
    /// What to do about columns of existing target tables with a narrower type modifier than the source's; `Refuse` when
    /// absent.
    #[serde(default, skip_serializing_if = "NarrowerTypes::is_default")]
    pub narrower_types: NarrowerTypes,
}

/// Initial copy.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.startPosition) || !self.enabled").message("startPosition goes with enabled: false").field_path(".startPosition"))]
pub struct Snapshot {
    /// Copy existing rows before streaming.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// With `enabled: false`: the commit end LSN up to which the target already equals the source (for example of a
    /// restored backup). The slot named by `slotName` must exist and must not be ahead of it.
    #[schemars(length(max = 17), regex(pattern = r"^[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_position: Option<String>,
    /// Rows of one range of a table, by the planner's estimate; 250000 when absent.
    #[schemars(range(min = 1000, max = 1_000_000_000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_per_partition: Option<i64>,
    /// Tables copied at a time; 4 when absent.
    #[schemars(range(min = 1, max = 64))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables_in_parallel: Option<i32>,
    /// What to do with rows found in a target table before its first copy.
    #[serde(default)]
    pub existing_rows: ExistingRows,
    /// Ranges of one table copied at a time; 2 when absent.
    #[schemars(range(min = 1, max = 64))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workers_per_table: Option<i32>,
    /// Give tables that the worker makes the source's indexes, unique and exclusion constraints, after the rows. The primary
    /// key always comes.
    #[serde(default = "yes")]
    pub indexes: bool,
    /// Give tables that the worker makes the source's foreign keys to other tables of this Mirror, when all follow the stream.
    #[serde(default = "yes")]
    pub foreign_keys: bool,
}
fn yes() -> bool {
    true
}
/// What to do with rows found in a target table before its first copy.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Default)]
pub enum ExistingRows {
    /// A target table that holds rows is not touched: the Mirror stops with `TargetTableNotEmpty`.
    #[default]
    Refuse,
    /// The target table is emptied before its first copy.
    Truncate,
}

/// How changes are batched on the way to the target.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Stream {
    /// Rows of one batch at most; 100000 when absent.
    #[schemars(range(min = 1, max = 10_000_000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_batch_rows: Option<i32>,
    /// Bytes of one batch at most; 16777216 when absent.
    #[schemars(range(min = 65536, max = 1_073_741_824))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_batch_bytes: Option<i64>,
    /// How long a batch may wait for more changes, in milliseconds; 5 when absent.
    #[schemars(range(min = 0, max = 600_000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_delay_milliseconds: Option<i32>,
    /// Connections to the target on which changes are applied; 2 when absent. Batches that have no row in common are written
    /// side by side and committed in the order of the source.
    #[schemars(range(min = 1, max = 16))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apply_connections: Option<i32>,
    /// What to do about triggers and foreign key actions of existing target tables that would fire on mirrored changes, for
    /// a role that may not set `session_replication_role`.
    #[serde(default)]
    pub target_triggers: TargetTriggers,
}

/// What to do about triggers and foreign key actions of existing target tables that would fire on mirrored changes.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Default)]
pub enum TargetTriggers {
    /// The Mirror stops with `TargetTableIncompatible` before anything is copied.
    #[default]
    Refuse,
    /// They fire, on copied rows too. Changes are applied one by one in commit order.
    Accept,
}

/// What to do when a table is altered on the source.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Default)]
pub enum SchemaChanges {
    /// The Mirror stops with `SchemaChanged` and the statements that the target needs. It goes on when they have been run.
    #[default]
    Stop,
    /// The target table is altered in the same way, in order with the rows. What can't be followed stops the Mirror with
    /// `SchemaChanged` and the statement that is needed. A change of a type is taken for the plain cast: a `USING` of your own, where
    /// none is needed, is not in the log.
    Follow,
}

impl SchemaChanges {
    /// Not said. No CRD default on purpose: a defaulted field is owned by whoever creates the object.
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How much of its log the source may keep for the slot.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, KubeSchema, Default)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.warnBytes) || has(self.maxBytes)").message("give warnBytes, maxBytes or both"))]
#[x_kube(validation = Rule::new("!has(self.warnBytes) || !has(self.maxBytes) || self.warnBytes <= self.maxBytes").message("warnBytes may not be above maxBytes").field_path(".warnBytes"))]
#[x_kube(validation = Rule::new("self.action == 'Warn' || has(self.maxBytes)").message("an action that drops the slot needs maxBytes").field_path(".action"))]
pub struct WalBudget {
    /// From so many bytes on `Ready` has the reason `WalBudgetWarning`.
    #[schemars(range(min = 16_777_216, max = 1_125_899_906_842_624_i64))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warn_bytes: Option<i64>,
    /// From so many bytes on `Ready` has the reason `WalBudgetExceeded`, and `action` is taken.
    #[schemars(range(min = 16_777_216, max = 1_125_899_906_842_624_i64))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<i64>,
    /// What is done at `maxBytes`.
    #[serde(default)]
    pub action: WalBudgetAction,
}

/// What is done when the source keeps more of its log for the slot than it may.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Default)]
pub enum WalBudgetAction {
    /// It is told, and nothing else.
    #[default]
    Warn,
    /// The slot is dropped, whether the Mirror runs or not, and the Mirror stops with `SlotGivenUp`.
    DropSlot,
    /// The slot is dropped, whether the Mirror runs or not, and as soon as it runs all tables are copied anew. When the first copy
    /// had not ended the Mirror stops with `SlotGivenUp`.
    DropSlotAndResync,
}

/// What happens outside the cluster when the Mirror is deleted.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema, Default)]
#[serde(rename_all = "camelCase")]
pub struct DeletionPolicy {
    /// The replication slot.
    #[serde(default)]
    pub slot: Reclaim,
    /// The publication.
    #[serde(default)]
    pub publication: Reclaim,
}

/// The pod that does the work.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, JsonSchema, Default)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    /// Image; default: the operator's, moved by `updatePolicy`.
    #[schemars(length(min = 1, max = 1024))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// When a running worker moves to a new default image.
    #[serde(default)]
    pub update_policy: UpdatePolicy,
    /// CPU, memory, ephemeral storage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<k8s_openapi::api::core::v1::ResourceRequirements>,
    /// Labels that a node must have.
    #[schemars(extend("maxProperties" = 32))]
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that are tolerated.
    #[schemars(length(max = 32))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// Priority class of the pod.
    #[schemars(length(min = 1, max = 253))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
}
/// When a running worker moves to a new default image.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema, Default)]
pub enum UpdatePolicy {
    /// The next time the worker restarts for another reason, or the Mirror is resumed.
    #[default]
    OnRestart,
    /// Now, one worker per source at a time.
    Immediate,
}

/// A one-off action, done once per id.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.tables) || self.action in ['Resync', 'ResetSequences', 'Verify']").message("tables goes with Resync, ResetSequences and Verify").field_path(".tables"))]
pub struct Request {
    /// Chosen by you, for example a date. Another id is another request; one that was used is not done again.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[A-Za-z0-9]([-A-Za-z0-9._]*[A-Za-z0-9])?$"))]
    pub id: String,
    /// What is to be done.
    pub action: RequestAction,
    /// Tables of the source as `schema.name`, or `name` in schema public; all when absent.
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    #[schemars(length(min = 1, max = 1000), inner(length(min = 1, max = 127)))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<String>,
}

/// What can be asked for.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, JsonSchema)]
pub enum RequestAction {
    /// Try again at once, whatever pause there is after a failure. Slot and position are kept.
    Retry,
    /// Empty the target tables and copy them again. Without tables also the way out when the slot is lost: it is made anew.
    Resync,
    /// Set sequences of the target to the source's present values.
    ResetSequences,
    /// Compare the rows of source and target while both change; what was found is in `status.verification`.
    Verify,
    /// End the request before it.
    Cancel,
}

impl RequestAction {
    /// The word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        let action = match self {
            Self::Retry => Action::Retry,
            Self::Resync => Action::Resync,
            Self::ResetSequences => Action::ResetSequences,
            Self::Verify => Action::Verify,
            Self::Cancel => Action::Cancel,
        };
        action.as_str()
    }
}

/// Keeps tables of a target identical to those of a source.
#[derive(CustomResource, Serialize, Deserialize, Clone, Debug, PartialEq, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[kube(group = "sluice.dev", version = "v1alpha1", kind = "Mirror", namespaced, cel, status = "MirrorStatus",
    plural = "mirrors", shortname = "mir", category = "cdc", doc = "Keeps tables of a target identical to those of a source.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Source", type_ = "string", json_path = ".spec.sourceRef.name"),
    printcolumn(name = "Target", type_ = "string", json_path = ".spec.targetRef.name"),
    printcolumn(name = "Tables", type_ = "string", json_path = ".status.tables.summary"),
    printcolumn(name = "Lag", type_ = "string", json_path = ".status.lag"),
    printcolumn(name = "Position", type_ = "string", json_path = ".status.position.applied", priority = 1),
    printcolumn(name = "Retained", type_ = "string", json_path = ".status.retention.summary", priority = 1),
    printcolumn(name = "Request", type_ = "string", json_path = ".status.request.state", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    selectable = ".spec.sourceRef.name", selectable = ".spec.targetRef.name",
    validation = Rule::new("size(self.metadata.name) <= 63 && !self.metadata.name.contains('.')").message("metadata.name must be a DNS label of at most 63 characters"),
)]
#[x_kube(validation = Rule::new("!has(self.schemas) || self.schemas.all(x, self.schemas.exists_one(y, y.name == x.name))").message("a schema is given twice").field_path(".schemas"))]
#[x_kube(validation = Rule::new("has(self.tables) != has(self.schemas)").message("give exactly one of tables and schemas"))]
#[x_kube(validation = Rule::new("self.sourceRef == oldSelf.sourceRef").message("sourceRef cannot be changed").field_path(".sourceRef"))]
#[x_kube(validation = Rule::new("self.targetRef == oldSelf.targetRef").message("targetRef cannot be changed").field_path(".targetRef"))]
#[x_kube(validation = Rule::new("has(self.slotName) == has(oldSelf.slotName) && (!has(self.slotName) || self.slotName == oldSelf.slotName)").message("slotName cannot be changed"))]
#[x_kube(validation = Rule::new("has(self.publicationName) == has(oldSelf.publicationName) && (!has(self.publicationName) || self.publicationName == oldSelf.publicationName)").message("publicationName cannot be changed"))]
#[x_kube(validation = Rule::new("!has(self.request) || !has(oldSelf.request) || self.request.id != oldSelf.request.id || self.request == oldSelf.request").message("a request cannot be changed: give it another id").field_path(".request"))]
pub struct MirrorSpec {
    /// Source in the same namespace.
    pub source_ref: LocalRef,
    /// Target in the same namespace.
    pub target_ref: LocalRef,
    /// Tables to keep, by their name in the source.
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    #[schemars(length(min = 1, max = 5000))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<Vec<Table>>,
    /// Schemas of which all tables are kept, those to come included.
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    #[schemars(length(min = 1, max = 100))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schemas: Option<Vec<Schema>>,
    /// Initial copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Snapshot>,
    /// How changes are batched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<Stream>,
    /// What to do when a table is altered on the source.
    #[serde(default, skip_serializing_if = "SchemaChanges::is_default")]
    pub schema_changes: SchemaChanges,
    /// Replication slot; made from the uid when absent.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9_]+$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot_name: Option<String>,
    /// Publication; made from the uid when absent.
    #[schemars(length(min = 1, max = 63))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publication_name: Option<String>,
    /// How much of its log the source may keep for the slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_budget: Option<WalBudget>,
    /// What happens outside the cluster on deletion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_policy: Option<DeletionPolicy>,
    /// Stop the stream and keep its position. No CRD default on purpose: a defaulted field is owned by whoever creates the object.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspend: bool,
    /// A one-off action. It is done once per id; taking it out does nothing. No CRD default on purpose, as with `suspend`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<Request>,
    /// Refuse deletion of this Mirror (enforced by a ValidatingAdmissionPolicy).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deletion_protection: bool,
    /// The pod that does the work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<Worker>,
}
