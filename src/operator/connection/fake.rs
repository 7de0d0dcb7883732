//! Databases as tests want them.

use crate::connectors::postgres::connect::Side;
use crate::connectors::postgres::endpoint::{Endpoint, Secret, TlsMode};
use crate::engine::error::{Error, Result};
use crate::operator::databases::{CleanedUp, Databases, Inspection, Leftovers, WatchedSlot};
use crate::worker::contract::MirrorId;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What an inspection finds, or whether its failure may pass, and its reason.
pub type Answer = std::result::Result<Inspection, (bool, &'static str)>;

/// Gives the same answer until told another one; without one it never answers.
pub struct FakeDatabases {
    answer: Mutex<Option<Answer>>,
    asked: AtomicUsize,
}

impl FakeDatabases {
    pub fn answering(answer: Answer) -> Arc<Self> {
        Arc::new(Self { answer: Mutex::new(Some(answer)), asked: AtomicUsize::new(0) })
    }

    pub fn silent() -> Arc<Self> {
        Arc::new(Self { answer: Mutex::new(None), asked: AtomicUsize::new(0) })
    }

    pub fn answer(&self, answer: Answer) {
        *self.answer.lock().expect("the answer") = Some(answer);
    }

    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Databases for FakeDatabases {
    fn inspect<'a>(&'a self, _: &'a Endpoint, _: Side) -> BoxFuture<'a, Result<Inspection>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let answer = self.answer.lock().expect("the answer").clone();
        match answer {
            None => std::future::pending().boxed(),
            Some(Ok(found)) => std::future::ready(Ok(found)).boxed(),
            Some(Err((true, reason))) => std::future::ready(Err(Error::retry(reason, "it failed"))).boxed(),
            Some(Err((false, reason))) => std::future::ready(Err(Error::stop(reason, "it failed"))).boxed(),
        }
    }

    fn clean_up<'a>(&'a self, _: &'a Endpoint, _: &'a Leftovers) -> BoxFuture<'a, Result<CleanedUp>> {
        std::future::ready(Ok(CleanedUp::default())).boxed()
    }

    fn keep_budget<'a>(&'a self, _: &'a Endpoint, _: &'a WatchedSlot) -> BoxFuture<'a, Result<bool>> {
        std::future::ready(Ok(false)).boxed()
    }

    fn forget_stream<'a>(&'a self, _: &'a Endpoint, _: &'a str, _: &'a MirrorId) -> BoxFuture<'a, Result<()>> {
        std::future::ready(Ok(())).boxed()
    }
}

pub fn inspection() -> Inspection {
    Inspection { server_version: "17.2".into(), system_identifier: "7001".into(), ..Inspection::default() }
}

pub fn endpoint(password: &str) -> Endpoint {
    Endpoint {
        host: "db".into(),
        domain: None,
        port: 5432,
        database: "shop".into(),
        username: "u".into(),
        password: Secret(password.into()),
        tls: TlsMode::Disable,
        ca: None,
        client_certificate: None,
        parameters: BTreeMap::new(),
        connect_timeout: Duration::from_secs(10),
    }
}
