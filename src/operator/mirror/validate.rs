//! Whether a Mirror's spec can be carried out: what the schema of the resource can't express. Pure.

use super::problem::Problem;
use crate::engine::error::reason;
use crate::resources::{ExistingRows, MirrorSpec, NarrowerTypes, Schema, Table, TargetTriggers, WalBudget};
use crate::worker::contract::{EndpointSpec, SchemaSpec, SnapshotSpec, StreamSpec, TableSpec, WalBudgetSpec};
use std::collections::BTreeMap;

/// Longest name in PostgreSQL, in bytes (NAMEDATALEN - 1). The schema of the resource counts characters.
const NAME_LIMIT: usize = 63;
/// Tables of one Mirror, as in the schema of the resource.
const TABLE_LIMIT: usize = 5_000;
/// Schemas of one Mirror, as in the schema of the resource.
const SCHEMA_LIMIT: usize = 100;

/// A spec that can be carried out, with all defaults filled in. Only [`validate`] makes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// The source.
    pub source: EndpointSpec,
    /// The target.
    pub target: EndpointSpec,
    /// What is mirrored.
    pub tables: Option<Vec<TableSpec>>,
    /// What is mirrored.
    pub schemas: Option<Vec<SchemaSpec>>,
    /// Initial copy.
    pub snapshot: SnapshotSpec,
    /// Batches.
    pub stream: StreamSpec,
    /// How much log the source may keep.
    pub wal_budget: Option<WalBudgetSpec>,
}

/// Checks the spec against itself and against the databases that it connects.
///
/// # Errors
/// What only a change of the spec helps against.
pub fn validate(spec: &MirrorSpec, source: EndpointSpec, target: EndpointSpec) -> Result<Validated, Problem> {
    let tables = spec.tables.as_ref().map(|tables| tables.iter().map(table).collect::<Vec<_>>());
    let schemas = spec.schemas.as_ref().map(|schemas| schemas.iter().map(schema).collect::<Vec<_>>());
    selection(tables.as_deref(), schemas.as_deref())?;
    if same_database(&source, &target) {
        not_onto_itself(tables.as_deref().unwrap_or_default(), schemas.as_deref().unwrap_or_default())?;
    }
    names(spec)?;
    Ok(Validated { source, target, tables, schemas, snapshot: snapshot(spec)?, stream: stream(spec), wal_budget: wal_budget(spec) })
}

fn invalid(message: impl Into<String>) -> Problem {
    Problem::stop(reason::INVALID_SPEC, message)
}

fn selection(tables: Option<&[TableSpec]>, schemas: Option<&[SchemaSpec]>) -> Result<(), Problem> {
    match (tables, schemas) {
        (Some(tables), None) => {
            count("tables", tables.len(), TABLE_LIMIT)?;
            let named = tables.iter().flat_map(|table| [&table.schema, &table.name, &table.target_schema, &table.target_name]);
            named.chain(tables.iter().flat_map(|table| &table.exclude_columns)).try_for_each(|name| short(name))?;
            unique_tables(tables)
        }
        (None, Some(schemas)) => {
            count("schemas", schemas.len(), SCHEMA_LIMIT)?;
            let named = schemas.iter().flat_map(|schema| [&schema.name, &schema.target]);
            named.chain(schemas.iter().flat_map(|schema| &schema.exclude_tables)).try_for_each(|name| short(name))?;
            unique_schemas(schemas)
        }
        _ => Err(invalid("give exactly one of tables and schemas")),
    }
}

fn count(what: &str, count: usize, limit: usize) -> Result<(), Problem> {
    match count {
        0 => Err(invalid(format!("{what} is empty"))),
        _ if count > limit => Err(invalid(format!("{count} {what} are given, {limit} are the limit"))),
        _ => Ok(()),
    }
}

fn short(name: &str) -> Result<(), Problem> {
    if name.is_empty() || name.len() > NAME_LIMIT {
        return Err(invalid(format!("the name {name:?} has {} bytes; PostgreSQL takes 1 to {NAME_LIMIT}", name.len())));
    }
    Ok(())
}

fn unique_tables(tables: &[TableSpec]) -> Result<(), Problem> {
    let mut sources = BTreeMap::new();
    let mut targets = BTreeMap::new();
    for table in tables {
        if sources.insert((&table.schema, &table.name), ()).is_some() {
            return Err(invalid(format!("table {}.{} is given twice", table.schema, table.name)));
        }
        if let Some(other) = targets.insert((&table.target_schema, &table.target_name), table) {
            let message = format!(
                "{}.{} and {}.{} both go to {}.{}",
                other.schema, other.name, table.schema, table.name, table.target_schema, table.target_name
            );
            return Err(Problem::stop(reason::DUPLICATE_TARGET, message));
        }
    }
    Ok(())
}

/// Two schemas may share a target schema: whether two of their tables meet is known by the catalog only, and the worker looks there.
fn unique_schemas(schemas: &[SchemaSpec]) -> Result<(), Problem> {
    let mut seen = BTreeMap::new();
    match schemas.iter().find(|schema| seen.insert(&schema.name, ()).is_some()) {
        Some(twice) => Err(invalid(format!("schema {} is given twice", twice.name))),
        None => Ok(()),
    }
}

/// Two names may lead to one server; the worker compares what the servers say of themselves.
fn same_database(source: &EndpointSpec, target: &EndpointSpec) -> bool {
    source.host.eq_ignore_ascii_case(&target.host) && source.port == target.port && source.database == target.database
}

fn not_onto_itself(tables: &[TableSpec], schemas: &[SchemaSpec]) -> Result<(), Problem> {
    let same = |what: String| {
        Problem::stop(reason::SAME_TABLE, format!("{what} would be mirrored onto itself: Source and Target are one database"))
    };
    if let Some(table) = tables.iter().find(|table| table.schema == table.target_schema && table.name == table.target_name) {
        return Err(same(format!("table {}.{}", table.schema, table.name)));
    }
    match schemas.iter().find(|schema| schema.name == schema.target) {
        Some(schema) => Err(same(format!("schema {}", schema.name))),
        None => Ok(()),
    }
}

fn names(spec: &MirrorSpec) -> Result<(), Problem> {
    spec.slot_name.iter().chain(&spec.publication_name).try_for_each(|name| short(name))
}

fn table(table: &Table) -> TableSpec {
    let target = table.target.as_ref();
    TableSpec {
        schema: table.schema.clone(),
        name: table.name.clone(),
        target_schema: target.and_then(|target| target.schema.clone()).unwrap_or_else(|| table.schema.clone()),
        target_name: target.and_then(|target| target.name.clone()).unwrap_or_else(|| table.name.clone()),
        exclude_columns: table.exclude_columns.clone(),
        accept_narrower_types: table.narrower_types == NarrowerTypes::Accept,
    }
}

fn schema(schema: &Schema) -> SchemaSpec {
    SchemaSpec {
        name: schema.name.clone(),
        target: schema.target.clone().unwrap_or_else(|| schema.name.clone()),
        exclude_tables: schema.exclude_tables.clone(),
        accept_narrower_types: schema.narrower_types == NarrowerTypes::Accept,
    }
}

/// The number as the worker takes it; the schema of the resource lets no negative one through.
fn number<T: TryFrom<N>, N>(given: Option<N>, default: T) -> T {
    given.and_then(|given| T::try_from(given).ok()).unwrap_or(default)
}

fn snapshot(spec: &MirrorSpec) -> Result<SnapshotSpec, Problem> {
    let given = spec.snapshot.as_ref();
    let enabled = given.is_none_or(|given| given.enabled);
    let start_position = given.and_then(|given| given.start_position.clone());
    match &start_position {
        None if !enabled => {
            let message = "snapshot.enabled is false: give snapshot.startPosition, the position up to which the target equals the source";
            return Err(Problem::stop(reason::START_POSITION_REQUIRED, message));
        }
        Some(_) if enabled => return Err(invalid("snapshot.startPosition goes with snapshot.enabled: false")),
        Some(_) if spec.slot_name.is_none() => {
            return Err(invalid("snapshot.startPosition goes with slotName: the slot must exist already"));
        }
        _ => {}
    }
    Ok(SnapshotSpec {
        enabled,
        truncate: given.is_some_and(|given| given.existing_rows == ExistingRows::Truncate),
        start_position,
        rows_per_partition: number(given.and_then(|given| given.rows_per_partition), 250_000),
        tables_in_parallel: number(given.and_then(|given| given.tables_in_parallel), 4),
        // More cost the target more of its CPU time (benches/results/2026-11-21-workers.md).
        workers_per_table: number(given.and_then(|given| given.workers_per_table), 2),
        indexes: given.is_none_or(|given| given.indexes),
        foreign_keys: given.is_none_or(|given| given.foreign_keys),
    })
}

fn stream(spec: &MirrorSpec) -> StreamSpec {
    let given = spec.stream.as_ref();
    StreamSpec {
        max_batch_rows: number(given.and_then(|given| given.max_batch_rows), 100_000),
        max_batch_bytes: number(given.and_then(|given| given.max_batch_bytes), 16_777_216),
        max_delay_milliseconds: number(given.and_then(|given| given.max_delay_milliseconds), 5),
        apply_connections: number(given.and_then(|given| given.apply_connections), 2),
        accept_target_triggers: given.is_some_and(|given| given.target_triggers == TargetTriggers::Accept),
    }
}

fn wal_budget(spec: &MirrorSpec) -> Option<WalBudgetSpec> {
    let WalBudget { warn_bytes, max_bytes, action } = spec.wal_budget.as_ref()?;
    let bytes = |given: Option<i64>| given.and_then(|given| u64::try_from(given).ok());
    Some(WalBudgetSpec { warn_bytes: bytes(*warn_bytes), max_bytes: bytes(*max_bytes), action: format!("{action:?}") })
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // documents are written in place
pub(super) mod tests {
    use super::*;
    use crate::operator::mirror::peer::{self, Peer};
    use crate::operator::slim::SlimMirror;
    use crate::resources::Mirror;
    use serde_json::{Value, json};

    /// A Mirror with this in its spec.
    pub fn mirror(spec: Value) -> Mirror {
        let mut whole = json!({"sourceRef": {"name": "shop"}, "targetRef": {"name": "dw"}});
        whole.as_object_mut().expect("an object").extend(spec.as_object().expect("an object").clone());
        serde_json::from_value(json!({
            "apiVersion": "sluice.dev/v1alpha1", "kind": "Mirror",
            "metadata": {"name": "orders", "namespace": "shop", "uid": "6f9619ff-8b86-d011-b42d-00c04fc964ff", "generation": 3},
            "spec": whole,
        }))
        .expect("a mirror")
    }

    /// What the cache keeps of it.
    pub fn slimmed(mirror: &Mirror) -> SlimMirror {
        serde_json::from_value(serde_json::to_value(mirror).expect("JSON")).expect("a mirror")
    }

    /// What the cache keeps of a Mirror with this in its spec.
    pub fn slim(spec: Value) -> SlimMirror {
        slimmed(&mirror(spec))
    }

    fn check(spec: Value) -> Result<Validated, Problem> {
        validate(&mirror(spec).spec, Peer::from(&peer::tests::source()).endpoint, Peer::from(&peer::tests::target()).endpoint)
    }

    fn refused(spec: Value) -> (&'static str, String) {
        let problem = check(spec).expect_err("refused");
        assert!(problem.needs_human);
        (problem.reason, problem.message)
    }

    #[test]
    fn defaults_are_filled_in() {
        let valid = check(json!({"tables": [{"name": "users"}, {"schema": "sales", "name": "orders", "target": {"schema": "dw"}}]}))
            .expect("valid");
        let names: Vec<_> = valid
            .tables
            .expect("tables")
            .into_iter()
            .map(|table| format!("{}.{} {}.{}", table.schema, table.name, table.target_schema, table.target_name))
            .collect();
        assert_eq!(names, ["public.users public.users", "sales.orders dw.orders"]);
        assert_eq!(
            valid.snapshot,
            SnapshotSpec {
                enabled: true,
                truncate: false,
                start_position: None,
                rows_per_partition: 250_000,
                tables_in_parallel: 4,
                workers_per_table: 2,
                indexes: true,
                foreign_keys: true,
            }
        );
        assert_eq!(valid.wal_budget, None);
        let limits = json!({"tables": [{"name": "users"}], "walBudget": {"maxBytes": 1 << 30, "action": "DropSlotAndResync"}});
        let budget = check(limits).expect("valid").wal_budget.expect("a budget");
        assert_eq!((budget.warn_bytes, budget.max_bytes), (None, Some(1 << 30)));
        let known = crate::worker::plan::budget(Some(&budget)).expect("a worker knows it");
        assert_eq!(known.action, crate::engine::retention::Action::DropSlotAndResync);
        assert_eq!(
            valid.stream,
            StreamSpec {
                max_batch_rows: 100_000,
                max_batch_bytes: 16_777_216,
                max_delay_milliseconds: 5,
                apply_connections: 2,
                accept_target_triggers: false,
            }
        );
        let schemas = check(json!({"schemas": [{"name": "sales"}]})).expect("valid").schemas.expect("schemas");
        assert_eq!(schemas[0].target, "sales");
        assert!(!schemas[0].accept_narrower_types);
    }

    #[test]
    fn what_is_given_wins() {
        let valid = check(json!({
            "tables": [{"name": "users"}, {"name": "orders", "narrowerTypes": "Accept"}],
            "snapshot": {"existingRows": "Truncate", "rowsPerPartition": 1000, "tablesInParallel": 1, "workersPerTable": 2, "indexes": false, "foreignKeys": false},
            "stream": {"maxBatchRows": 7, "maxBatchBytes": 65536, "maxDelayMilliseconds": 0, "applyConnections": 4, "targetTriggers": "Accept"},
        }))
        .expect("valid");
        assert!(valid.snapshot.truncate && !valid.snapshot.indexes && !valid.snapshot.foreign_keys);
        assert_eq!((valid.snapshot.rows_per_partition, valid.snapshot.tables_in_parallel, valid.snapshot.workers_per_table), (1000, 1, 2));
        assert_eq!(
            valid.stream,
            StreamSpec {
                max_batch_rows: 7,
                max_batch_bytes: 65536,
                max_delay_milliseconds: 0,
                apply_connections: 4,
                accept_target_triggers: true,
            }
        );
        let accepting: Vec<bool> = valid.tables.expect("tables").iter().map(|table| table.accept_narrower_types).collect();
        assert_eq!(accepting, [false, true]);
        let schemas = check(json!({"schemas": [{"name": "sales", "narrowerTypes": "Accept"}]})).expect("valid").schemas.expect("schemas");
        assert!(schemas[0].accept_narrower_types);
    }

    #[test]
    fn a_table_comes_once_and_goes_to_a_table_of_its_own() {
        let twice = refused(json!({"tables": [{"name": "users"}, {"schema": "public", "name": "users", "target": {"name": "other"}}]}));
        assert_eq!(twice, ("InvalidSpec", "table public.users is given twice".to_owned()));
        let met = refused(
            json!({"tables": [{"name": "a", "target": {"name": "c"}}, {"schema": "b", "name": "b", "target": {"schema": "public", "name": "c"}}]}),
        );
        assert_eq!(met, ("DuplicateTarget", "public.a and b.b both go to public.c".to_owned()));
        assert_eq!(refused(json!({"schemas": [{"name": "a"}, {"name": "a", "target": "b"}]})).0, "InvalidSpec");
    }

    #[test]
    fn limits_count_bytes() {
        let many: Vec<_> = (0..5_001).map(|number| json!({"name": format!("t{number}")})).collect();
        assert_eq!(refused(json!({"tables": many})).0, "InvalidSpec");
        assert!(check(json!({"tables": (0..5_000).map(|number| json!({"name": format!("t{number}")})).collect::<Vec<_>>()})).is_ok());
        let (reason, message) = refused(json!({"tables": [{"name": "é".repeat(32)}]}));
        assert!(reason == "InvalidSpec" && message.contains("64 bytes"), "{message}");
        assert_eq!(refused(json!({"tables": [{"name": "a", "excludeColumns": ["x".repeat(64)]}]})).0, "InvalidSpec");
        assert_eq!(refused(json!({"tables": [{"name": "a"}], "publicationName": "é".repeat(40)})).0, "InvalidSpec");
        assert_eq!(refused(json!({"tables": []})).0, "InvalidSpec");
        assert_eq!(refused(json!({})).0, "InvalidSpec");
        assert_eq!(refused(json!({"tables": [{"name": "a"}], "schemas": [{"name": "a"}]})).0, "InvalidSpec");
    }

    #[test]
    fn nothing_is_mirrored_onto_itself() {
        let here = Peer::from(&peer::tests::source()).endpoint;
        let upper = EndpointSpec { host: "SHOP-DB".into(), ..here.clone() };
        let onto = |spec| validate(&mirror(spec).spec, here.clone(), upper.clone());
        assert_eq!(onto(json!({"tables": [{"name": "a"}]})).expect_err("refused").reason, "SameTable");
        assert_eq!(onto(json!({"schemas": [{"name": "a"}]})).expect_err("refused").reason, "SameTable");
        assert!(onto(json!({"tables": [{"name": "a", "target": {"name": "b"}}]})).is_ok(), "one database may be both");
        let elsewhere = EndpointSpec { database: "other".into(), ..here.clone() };
        assert!(validate(&mirror(json!({"tables": [{"name": "a"}]})).spec, here.clone(), elsewhere).is_ok());
    }

    #[test]
    fn without_a_copy_a_position_and_a_slot_are_needed() {
        let tables = json!([{"name": "a"}]);
        assert_eq!(refused(json!({"tables": tables, "snapshot": {"enabled": false}})).0, "StartPositionRequired");
        assert_eq!(refused(json!({"tables": tables, "snapshot": {"enabled": false, "startPosition": "0/1"}})).0, "InvalidSpec");
        let valid = check(json!({"tables": tables, "slotName": "seed", "snapshot": {"enabled": false, "startPosition": "16/B374D848"}}));
        assert_eq!(valid.expect("valid").snapshot.start_position.as_deref(), Some("16/B374D848"));
    }
}
