//! From the desired document to what engine and connectors take. Pure.

use super::contract::{Desired, EndpointSpec, RequestSpec, SchemaSpec, SnapshotSpec, StreamSpec, TableSpec, WalBudgetSpec};
use super::credentials::Login;
use crate::connectors::postgres::{Endpoint, TlsMode};
use crate::engine::error::{Error, Result, reason};
use crate::engine::flow::{SnapshotConfig, StreamConfig};
use crate::engine::request::{self, Request};
use crate::engine::retention::{Action, Budget};
use crate::engine::roles::{BatchLimits, Owner, SchemaSelection, Selection, TableSelection};
use crate::engine::table::QualifiedName;
use std::time::Duration;

fn invalid(message: impl Into<String>) -> Error {
    Error::stop(reason::INVALID_SPEC, message)
}

/// What the engine shall do.
///
/// # Errors
/// Class `Stop`, reason `InvalidSpec`: the document contradicts itself.
pub fn stream_config(desired: &Desired) -> Result<StreamConfig> {
    Ok(StreamConfig {
        selection: selection(desired.tables.as_deref(), desired.schemas.as_deref())?,
        owner: Owner { namespace: desired.mirror.namespace.clone(), name: desired.mirror.name.clone(), uid: desired.mirror.uid.clone() },
        slot: desired.slot.clone(),
        snapshot: snapshot(&desired.snapshot)?,
        limits: limits(&desired.stream)?,
        follow_schema: !desired.stop_at_schema_changes,
        request: desired.request.as_ref().and_then(request),
        budget: budget(desired.wal_budget.as_ref())?,
    })
}

/// What is asked for, if this worker knows it.
#[must_use]
pub fn request(spec: &RequestSpec) -> Option<Request> {
    Some(Request { id: spec.id.clone(), action: request::Action::parse(&spec.action)?, tables: spec.tables.clone() })
}

fn selection(tables: Option<&[TableSpec]>, schemas: Option<&[SchemaSpec]>) -> Result<Selection> {
    match (tables, schemas) {
        (Some(tables), None) => Ok(Selection::Tables(tables.iter().map(table).collect())),
        (None, Some(schemas)) => Ok(Selection::Schemas(schemas.iter().map(schema).collect())),
        _ => Err(invalid("exactly one of tables and schemas is needed")),
    }
}

fn table(spec: &TableSpec) -> TableSelection {
    TableSelection {
        source: QualifiedName::new(&spec.schema, &spec.name),
        target: QualifiedName::new(&spec.target_schema, &spec.target_name),
        exclude_columns: spec.exclude_columns.clone(),
        accept_narrower_types: spec.accept_narrower_types,
    }
}

fn schema(spec: &SchemaSpec) -> SchemaSelection {
    SchemaSelection {
        source: spec.name.clone(),
        target: spec.target.clone(),
        exclude_tables: spec.exclude_tables.clone(),
        accept_narrower_types: spec.accept_narrower_types,
    }
}

fn snapshot(spec: &SnapshotSpec) -> Result<SnapshotConfig> {
    if spec.rows_per_partition == 0 || spec.tables_in_parallel == 0 || spec.workers_per_table == 0 {
        return Err(invalid("snapshot: rowsPerPartition, tablesInParallel and workersPerTable are at least 1"));
    }
    Ok(SnapshotConfig {
        enabled: spec.enabled,
        truncate: spec.truncate,
        start_position: spec.start_position.clone(),
        rows_per_range: spec.rows_per_partition,
        tables_in_parallel: spec.tables_in_parallel,
        workers_per_table: spec.workers_per_table,
        indexes: spec.indexes,
        foreign_keys: spec.foreign_keys,
    })
}

fn limits(spec: &StreamSpec) -> Result<BatchLimits> {
    if spec.max_batch_rows == 0 || spec.max_batch_bytes == 0 || spec.apply_connections == 0 {
        return Err(invalid("stream: maxBatchRows, maxBatchBytes and applyConnections are at least 1"));
    }
    Ok(BatchLimits { rows: spec.max_batch_rows, bytes: spec.max_batch_bytes, delay: Duration::from_millis(spec.max_delay_milliseconds) })
}

/// How much log the source may keep.
///
/// # Errors
/// Class `Stop`, reason `InvalidSpec`: an unknown action.
pub fn budget(spec: Option<&WalBudgetSpec>) -> Result<Budget> {
    let Some(WalBudgetSpec { warn_bytes, max_bytes, action }) = spec else { return Ok(Budget::default()) };
    let action = match action.as_str() {
        "Warn" => Action::Warn,
        "DropSlot" => Action::DropSlot,
        "DropSlotAndResync" => Action::DropSlotAndResync,
        other => return Err(invalid(format!("walBudget.action {other} is not known to this worker"))),
    };
    Ok(Budget { warn: *warn_bytes, max: *max_bytes, action })
}

/// How a PostgreSQL server is reached.
///
/// # Errors
/// Class `Stop`, reason `InvalidSpec`: an unknown TLS mode, or a Verify mode without a CA.
pub fn postgres_endpoint(spec: &EndpointSpec, login: &Login) -> Result<Endpoint> {
    let tls = tls_mode(&spec.tls_mode)?;
    if matches!(tls, TlsMode::VerifyCA | TlsMode::VerifyFull) && login.ca.is_none() {
        return Err(invalid(format!("tls.mode {} needs tls.caRef", spec.tls_mode)));
    }
    Ok(Endpoint {
        host: spec.host.clone(),
        domain: None,
        port: spec.port,
        database: spec.database.clone(),
        username: login.username.clone(),
        password: login.password.clone(),
        tls,
        ca: login.ca.clone(),
        client_certificate: login.client_certificate.clone(),
        parameters: spec.parameters.clone(),
        connect_timeout: Duration::from_secs(u64::from(spec.connect_timeout_seconds.max(1))),
    })
}

fn tls_mode(text: &str) -> Result<TlsMode> {
    match text {
        "Disable" => Ok(TlsMode::Disable),
        "Prefer" => Ok(TlsMode::Prefer),
        "Require" => Ok(TlsMode::Require),
        "VerifyCA" => Ok(TlsMode::VerifyCA),
        "VerifyFull" => Ok(TlsMode::VerifyFull),
        other => Err(invalid(format!("tls.mode {other} is not known to this worker"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::contract::tests::desired;
    use crate::worker::credentials::tests::credentials;

    #[test]
    fn a_document_becomes_a_stream() {
        let config = stream_config(&desired(1)).unwrap();
        let users = QualifiedName::new("public", "users");
        assert_eq!(
            config.selection,
            Selection::Tables(vec![TableSelection {
                source: users.clone(),
                target: users,
                exclude_columns: Vec::new(),
                accept_narrower_types: false,
            }])
        );
        assert_eq!(config.owner.uid, "5f0c");
        assert_eq!(config.limits.delay, Duration::from_millis(50));
        assert_eq!(config.snapshot.rows_per_range, 250_000);
        assert_eq!(config.request, None);

        let mut schemas = desired(1);
        schemas.tables = None;
        schemas.schemas = Some(vec![SchemaSpec {
            name: "sales".to_owned(),
            target: "dw".to_owned(),
            exclude_tables: vec!["log".to_owned()],
            accept_narrower_types: true,
        }]);
        assert!(
            matches!(stream_config(&schemas).unwrap().selection, Selection::Schemas(schemas) if schemas[0].target == "dw" && schemas[0].accept_narrower_types)
        );
    }

    #[test]
    fn an_action_of_a_newer_operator_stops_nothing() {
        let mut desired = desired(1);
        for (action, known) in [("Resync", Some(request::Action::Resync)), ("Adopt", None)] {
            desired.request = Some(RequestSpec { id: "a".to_owned(), action: action.to_owned(), tables: vec!["public.users".to_owned()] });
            assert_eq!(stream_config(&desired).unwrap().request.map(|request| request.action), known);
        }
    }

    #[test]
    fn contradictions_need_a_human() {
        let budget = WalBudgetSpec { warn_bytes: Some(1), max_bytes: Some(2), action: "DropSlotAndResync".to_owned() };
        let known = super::budget(Some(&budget)).unwrap();
        assert_eq!(known, Budget { warn: Some(1), max: Some(2), action: Action::DropSlotAndResync });
        let changes: [fn(&mut Desired); 7] = [
            |desired| desired.tables = None,
            |desired| desired.schemas = Some(Vec::new()),
            |desired| desired.snapshot.tables_in_parallel = 0,
            |desired| desired.stream.max_batch_bytes = 0,
            |desired| desired.stream.max_batch_rows = 0,
            |desired| desired.stream.apply_connections = 0,
            |desired| desired.wal_budget = Some(WalBudgetSpec { warn_bytes: None, max_bytes: None, action: "Pray".to_owned() }),
        ];
        for change in changes {
            let mut desired = desired(1);
            change(&mut desired);
            assert_eq!(stream_config(&desired).unwrap_err().reason, reason::INVALID_SPEC);
        }
    }

    #[test]
    fn a_login_completes_an_endpoint() {
        let desired = desired(1);
        let login = credentials("pw", "pw").source;
        let endpoint = postgres_endpoint(&desired.source, &login).unwrap();
        assert_eq!((endpoint.host.as_str(), endpoint.username.as_str(), endpoint.tls), ("source", "sluice", TlsMode::Prefer));
        let mut spec = desired.source;
        spec.tls_mode = "VerifyFull".to_owned();
        assert!(postgres_endpoint(&spec, &login).is_err(), "no CA");
        spec.tls_mode = "Maybe".to_owned();
        assert!(postgres_endpoint(&spec, &login).is_err());
    }
}
