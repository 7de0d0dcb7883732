use super::support::{Postgres, free_port};
use super::{Database, on_each_version, on_one_version};
use sluice::connectors::postgres::connect::Side;
use sluice::connectors::postgres::inspect::{Checks, FailedPrerequisite, inspect};
use sluice::engine::error::reason;
use sluice::engine::table::QualifiedName;
use std::sync::atomic::{AtomicUsize, Ordering};

on_each_version!(a_superuser_lacks_nothing, a_poor_role_gets_cures_that_work);
on_one_version!(a_poor_server_is_described);

fn failed(failed: &[FailedPrerequisite]) -> Vec<&'static str> {
    failed.iter().filter(|failed| !failed.warning).map(|failed| failed.name).collect()
}

async fn a_superuser_lacks_nothing(major: u32) {
    let database = Database::new(major, "inspected", "").await;
    let endpoint = database.server.endpoint(&database.name);
    let source = inspect(&endpoint, Side::Source, Checks::default()).await.unwrap();
    assert!(source.server_version.starts_with(&format!("{major}.")) && !source.server_version.contains(' '), "{}", source.server_version);
    assert_eq!(source.version_num / 10_000, i32::try_from(major).unwrap());
    assert_eq!((source.timeline, source.in_recovery, source.read_only), (Some(1), false, false));
    assert_eq!(Some(source.system_identifier), database.text("SELECT system_identifier::text FROM pg_control_system()").await);
    let warnings: Vec<_> = source.failed.iter().map(|failed| (failed.name, failed.warning)).collect();
    assert_eq!(warnings, [(reason::SLOT_WAL_UNLIMITED, true)]);
    let target = inspect(&endpoint, Side::Target, Checks::default()).await.unwrap();
    assert_eq!((target.failed, target.may_set_replica_role), (vec![], true));
}

async fn a_poor_role_gets_cures_that_work(major: u32) {
    let database = Database::new(
        major,
        "poor_role",
        r#"CREATE TABLE readable(id int); GRANT SELECT ON readable TO PUBLIC; CREATE TABLE "Not readable"(id int);
           CREATE ROLE "Poor" LOGIN PASSWORD 'pw'; ALTER ROLE "Poor" SET default_transaction_read_only = on"#,
    )
    .await;
    let endpoint = database.endpoint_as("Poor");
    let tables = ["readable", "Not readable", "missing"].map(|name| QualifiedName::new("public", name));
    let checks = Checks { tables: &tables };
    let source = inspect(&endpoint, Side::Source, checks).await.unwrap();
    assert_eq!(failed(&source.failed), [reason::ROLE_LACKS_REPLICATION, reason::PRIVILEGE_MISSING, reason::PRIVILEGE_MISSING]);
    let target = inspect(&endpoint, Side::Target, Checks::default()).await.unwrap();
    assert_eq!(failed(&target.failed), [reason::TARGET_READ_ONLY, reason::PRIVILEGE_MISSING]);
    assert!(target.read_only && !target.may_set_replica_role);
    for lack in source.failed.iter().filter(|failed| !failed.warning) {
        let cure = lack.cure.as_deref().expect("a cure");
        database.run(cure.trim_end_matches(", and USAGE on their schemas")).await;
    }
    database.run("ALTER ROLE \"Poor\" RESET ALL").await;
    assert_eq!(failed(&inspect(&endpoint, Side::Source, checks).await.unwrap().failed), [""; 0]);
    assert_eq!(inspect(&endpoint, Side::Target, Checks::default()).await.unwrap().failed, []);
    if major >= 15 {
        database.run("GRANT SET ON PARAMETER session_replication_role TO \"Poor\"").await;
        assert!(inspect(&endpoint, Side::Target, Checks::default()).await.unwrap().may_set_replica_role);
    }
    database.run("DROP OWNED BY \"Poor\"; DROP ROLE \"Poor\"").await;
}

async fn a_poor_server_is_described(major: u32) {
    let settings = ["wal_level=replica", "max_replication_slots=1", "max_slot_wal_keep_size=1GB", "max_wal_senders=0"];
    let server = Postgres::start_with(major, &settings);
    let admin = server.connect("postgres").await;
    admin.execute("SELECT pg_create_physical_replication_slot('s')", &[]).await.unwrap();
    let source = inspect(&server.endpoint("postgres"), Side::Source, Checks::default()).await.unwrap();
    let expected = [(reason::WAL_LEVEL_NOT_LOGICAL, false), (reason::NO_FREE_REPLICATION_SLOT, true), (reason::NO_FREE_WAL_SENDER, false)];
    assert_eq!(source.failed.iter().map(|failed| (failed.name, failed.warning)).collect::<Vec<_>>(), expected);
    // The source itself says the same.
    let stream = sluice::connectors::postgres::source::PostgresSource::new(server.endpoint("postgres"), "sluice_s", "p");
    assert!(sluice::engine::roles::Source::take(&stream, &mut super::Unopposed).await.is_err());
}

/// Connections go to one server and the other in turn, as behind a load balancer.
#[tokio::test]
async fn a_balancer_is_detected() {
    let servers = [super::server(15), super::server(17)];
    let ports = [servers[0].port, servers[1].port];
    let port = free_port();
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let balancer = tokio::spawn(async move {
        let turn = AtomicUsize::new(0);
        loop {
            let (mut inbound, _) = listener.accept().await.unwrap();
            let to = ports[turn.fetch_add(1, Ordering::Relaxed) % 2];
            tokio::spawn(async move {
                let mut outbound = tokio::net::TcpStream::connect(("127.0.0.1", to)).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut inbound, &mut outbound).await;
            });
        }
    });
    let mut endpoint = servers[0].endpoint("postgres");
    endpoint.port = port;
    let found = inspect(&endpoint, Side::Target, Checks::default()).await.unwrap();
    assert_eq!(failed(&found.failed), [reason::POOLER_DETECTED]);
    balancer.abort();
}
