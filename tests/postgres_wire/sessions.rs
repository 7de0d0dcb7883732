//! SQL and replication sessions: settings, failures by class, cancel, end.

use crate::support::{Postgres, eventually, free_port};
use sluice::connectors::postgres::connect::{Side, connect};
use sluice::connectors::postgres::endpoint::Secret;
use sluice::connectors::postgres::errors::classify;
use sluice::connectors::postgres::replication::connect_replication;
use sluice::connectors::postgres::{Endpoint, TlsMode};
use sluice::engine::error::{Class, Error, reason};
use sluice::engine::roles::SourceIdentity;
use std::time::Duration;

/// Settings that must not depend on server, database or role.
const FIXED: [(&str, &str); 11] = [
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("TimeZone", "UTC"),
    ("client_encoding", "UTF8"),
    ("search_path", "pg_catalog"),
    ("row_security", "off"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
];

pub async fn sessions_and_slots(major: u32) {
    let server = Postgres::start_with(major, &["max_replication_slots=2"]);
    let admin = server.connect("postgres").await;
    admin
        .batch_execute(
            "CREATE ROLE odd LOGIN SUPERUSER PASSWORD 'it''s \\ odd';
             ALTER ROLE odd SET datestyle = 'German';
             ALTER ROLE odd SET intervalstyle = 'iso_8601';
             ALTER ROLE odd SET bytea_output = 'escape';
             ALTER ROLE odd SET timezone = 'Asia/Kathmandu';
             ALTER ROLE odd SET statement_timeout = '1s';
             ALTER ROLE odd SET search_path = 'public';
             CREATE ROLE plain LOGIN PASSWORD 'pw'",
        )
        .await
        .unwrap();
    settings(&server).await;
    failures(&server).await;
    cancel_and_end(&server, &admin).await;
    crate::slots::slots(&server).await;
}

fn odd(server: &Postgres) -> Endpoint {
    let mut endpoint = server.endpoint("postgres");
    endpoint.username = "odd".into();
    endpoint.password = Secret(r"it's \ odd".into());
    endpoint.parameters.insert("sluice.note".into(), r"a b\c 'd'".into());
    endpoint
}

async fn settings(server: &Postgres) {
    let session = connect(&odd(server), Side::Source, "sluice test").await.unwrap();
    let mut replication = connect_replication(&odd(server), "sluice test").await.unwrap();
    assert_eq!(replication.major(), server.major);
    let expected = FIXED.into_iter().chain([("sluice.note", r"a b\c 'd'"), ("application_name", "sluice test")]);
    for (name, value) in expected {
        let found: String = session.query_one(&format!("SHOW {name}"), &[]).await.unwrap().get(0);
        assert_eq!(found, value, "{name}");
        let found = replication.simple_query(&format!("SHOW {name}")).await.unwrap();
        assert_eq!(found, [[Some(value.to_owned())]], "{name} of the walsender");
    }
    let identity = replication.identify_system().await.unwrap();
    let control: String = session.query_one("SELECT system_identifier::text FROM pg_control_system()", &[]).await.unwrap().get(0);
    assert_eq!((identity.system_identifier.as_str(), identity.timeline), (control.as_str(), 1));
    let same = SourceIdentity { system_identifier: control, database: "postgres".into(), timeline: 1 };
    replication.expect_system(&same).await.unwrap();
    let other = SourceIdentity { system_identifier: "1".into(), ..same.clone() };
    assert_eq!(replication.expect_system(&other).await.unwrap_err().reason, reason::SYSTEM_IDENTIFIER_CHANGED);
    let before = SourceIdentity { timeline: 2, ..same };
    let taken_over = replication.expect_system(&before).await.unwrap_err();
    assert_eq!((taken_over.class, taken_over.reason), (Class::Retry, reason::SOURCE_UNREACHABLE));
    // A failed command leaves the session as it was.
    assert!(replication.simple_query("SELECT 1/0").await.is_err());
    assert_eq!(replication.simple_query("SELECT NULL::text, 'x'").await.unwrap(), [[None, Some("x".to_owned())]]);
}

async fn failures(server: &Postgres) {
    let changed = |change: &dyn Fn(&mut Endpoint)| {
        let mut endpoint = server.endpoint("postgres");
        endpoint.connect_timeout = Duration::from_secs(5);
        change(&mut endpoint);
        endpoint
    };
    let cases = [
        (changed(&|e| e.password = Secret("secret-word".into())), Class::Stop, reason::AUTHENTICATION_FAILED),
        (changed(&|e| e.username = "nobody-here".into()), Class::Stop, reason::AUTHENTICATION_FAILED),
        (changed(&|e| e.database = "missing".into()), Class::Stop, reason::DATABASE_MISSING),
        (changed(&|e| e.port = free_port()), Class::Retry, reason::HOST_UNREACHABLE),
        (changed(&|e| e.host = "unknown.invalid".into()), Class::Retry, reason::HOST_UNREACHABLE),
        (changed(&|e| e.tls = TlsMode::Require), Class::Stop, reason::TLS_FAILED),
        (changed(&|e| e.tls = TlsMode::VerifyFull), Class::Stop, reason::TLS_FAILED),
        (changed(&|e| drop(e.parameters.insert("no_such_setting".into(), "1".into()))), Class::Stop, reason::INTERNAL_ERROR),
        (changed(&|e| drop(e.parameters.insert("timezone".into(), "CET".into()))), Class::Stop, reason::INVALID_SPEC),
    ];
    for (endpoint, class, reason) in cases {
        let sql = connect(&endpoint, Side::Source, "").await.err().expect("a failure");
        let replication = connect_replication(&endpoint, "").await.err().expect("a failure");
        for error in [sql, replication] {
            assert_eq!((error.class, error.reason), (class, reason), "{error} for {endpoint:?}");
            assert!(!error.to_string().contains("secret-word"), "{error}");
            // What comes from the network or the server says where; what is wrong with the endpoint itself need not.
            let said = error.message.contains(&format!("{}:{}", endpoint.host, endpoint.port));
            assert!(said || reason == reason::INVALID_SPEC || endpoint.tls == TlsMode::VerifyFull, "{error}");
        }
    }
    // A login that is not allowed to replicate.
    let plain = changed(&|e| e.username = "plain".into());
    let error = connect_replication(&plain, "").await.err().expect("a failure");
    assert_eq!((error.class, error.reason), (Class::Stop, reason::ROLE_LACKS_REPLICATION), "{error}");
    silent_server().await;
    statement_failures(&connect(&plain, Side::Target, "").await.unwrap()).await;
}

/// A peer that accepts and says nothing costs the connect timeout, not more.
async fn silent_server() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = Endpoint {
        host: "127.0.0.1".into(),
        domain: None,
        port: listener.local_addr().unwrap().port(),
        database: "d".into(),
        username: "u".into(),
        password: Secret("p".into()),
        tls: TlsMode::Disable,
        ca: None,
        client_certificate: None,
        parameters: Default::default(),
        connect_timeout: Duration::from_millis(200),
    };
    let error: Error = connect(&endpoint, Side::Target, "").await.err().expect("a failure");
    assert_eq!((error.class, error.reason), (Class::Retry, reason::HOST_UNREACHABLE), "{error}");
    let error = connect_replication(&endpoint, "").await.err().expect("a failure");
    assert_eq!((error.class, error.reason), (Class::Retry, reason::HOST_UNREACHABLE), "{error}");
}

async fn statement_failures(session: &tokio_postgres::Client) {
    session.batch_execute("CREATE TEMP TABLE t (id int PRIMARY KEY CHECK (id < 10))").await.unwrap();
    for (sql, class, reason) in [
        ("INSERT INTO pg_temp.t VALUES (1), (1)", Class::Stop, reason::ROW_CONFLICT),
        ("INSERT INTO pg_temp.t VALUES (11)", Class::Stop, reason::WRITE_REFUSED),
        ("SELECT * FROM pg_authid", Class::Stop, reason::PRIVILEGE_MISSING),
        ("SELECT * FROM public.missing", Class::Stop, reason::TARGET_TABLE_INCOMPATIBLE),
        ("SELEC", Class::Bug, reason::INTERNAL_ERROR),
        ("BEGIN READ ONLY; CREATE TABLE public.x ()", Class::Retry, reason::TARGET_READ_ONLY),
    ] {
        let error = session.batch_execute(sql).await.unwrap_err();
        let error = classify(Side::Target, "a statement", &error);
        assert_eq!((error.class, error.reason), (class, reason), "{error}");
        assert!(error.message.starts_with("a statement: "), "{error}");
    }
}

async fn cancel_and_end(server: &Postgres, admin: &tokio_postgres::Client) {
    let session = connect(&server.endpoint("postgres"), Side::Target, "victim").await.unwrap();
    let count = || async {
        admin
            .query_one("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'victim' AND state <> 'x'", &[])
            .await
            .unwrap()
            .get::<_, i64>(0)
    };
    let sleeping =
        || async { admin.query_one("SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'", &[]).await.unwrap().get(0) };
    let cancel = async {
        eventually(10, "the statement runs", sleeping).await;
        session.cancel().await.unwrap();
    };
    let (statement, ()) = tokio::join!(session.batch_execute("SELECT pg_sleep(60)"), cancel);
    let error = classify(Side::Target, "sleep", &statement.unwrap_err());
    assert_eq!((error.class, error.reason), (Class::Retry, reason::WRITE_REFUSED), "{error}");
    assert_eq!(count().await, 1);
    drop(session);
    eventually(10, "the backend ends with its session", || async { count().await == 0 }).await;

    // A backend that is ended takes the session with it.
    let session = connect(&server.endpoint("postgres"), Side::Source, "victim").await.unwrap();
    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'victim'", &[]).await.unwrap();
    let mut failure = None;
    eventually(10, "a statement fails", || {
        let statement = session.batch_execute("SELECT 1");
        async { statement.await.is_err() }
    })
    .await;
    if let Err(error) = session.batch_execute("SELECT 1").await {
        failure = Some(classify(Side::Source, "a statement", &error));
    }
    let failure = failure.expect("the session is gone");
    assert_eq!((failure.class, failure.reason), (Class::Retry, reason::SOURCE_UNREACHABLE), "{failure}");
}
