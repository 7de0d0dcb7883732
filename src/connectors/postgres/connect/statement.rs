//! Statements that take one round trip.
//!
//! The driver asks the server for the types of a statement's parameters before it runs it, which takes a round trip more. Here
//! each parameter says its type.
//!
//! A statement is sent when its future is polled first. Statements on one session that are polled together (`join`, [`in_order`])
//! are sent together: they take one round trip, and run in the order in which they are polled first. One that fails does not
//! keep those behind it from running, unless they are in a transaction that was known to be open before they were sent.

use super::Session;
use futures::future::{MaybeDone, maybe_done};
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, Row};

/// A value with the type that it has on the server.
pub trait Typed {
    /// The type.
    const TYPE: Type;
}

/// A type of which there are arrays.
pub trait Element {
    /// The type of the array.
    const ARRAY: Type;
}

/// A parameter of a statement.
pub trait Parameter: ToSql {
    /// Its type.
    fn sql_type(&self) -> Type;
}

macro_rules! types {
    ($($rust:ty: $scalar:ident, $array:ident;)*) => {$(
        impl Typed for $rust {
            const TYPE: Type = Type::$scalar;
        }
        impl Element for $rust {
            const ARRAY: Type = Type::$array;
        }
    )*};
}

types! {
    bool: BOOL, BOOL_ARRAY;
    i32: INT4, INT4_ARRAY;
    i64: INT8, INT8_ARRAY;
    u32: OID, OID_ARRAY;
    str: TEXT, TEXT_ARRAY;
    String: TEXT, TEXT_ARRAY;
}

impl<T: Typed + ?Sized> Typed for &T {
    const TYPE: Type = T::TYPE;
}

impl<T: Element + ?Sized> Element for &T {
    const ARRAY: Type = T::ARRAY;
}

impl<T: Typed> Typed for Option<T> {
    const TYPE: Type = T::TYPE;
}

impl<T: Element> Typed for [T] {
    const TYPE: Type = T::ARRAY;
}

impl<T: Element> Typed for Vec<T> {
    const TYPE: Type = T::ARRAY;
}

impl<T: Typed + ToSql> Parameter for T {
    fn sql_type(&self) -> Type {
        T::TYPE
    }
}

/// The parameters of one statement.
pub type Parameters<'a> = &'a [&'a (dyn Parameter + Sync)];

fn typed<'a>(parameters: Parameters<'a>) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
    parameters.iter().map(|parameter| (*parameter as &(dyn ToSql + Sync), parameter.sql_type())).collect()
}

/// Waits for statements that are sent together; their outcomes in this order. `join_all` does not promise to poll many futures
/// in their order.
pub async fn in_order<F: Future>(statements: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut statements: Vec<Pin<Box<MaybeDone<F>>>> = statements.map(|statement| Box::pin(maybe_done(statement))).collect();
    poll_fn(|context| {
        let waiting = statements.iter_mut().filter_map(|statement| statement.as_mut().poll(context).is_pending().then_some(())).count();
        if waiting == 0 { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    statements.iter_mut().filter_map(|statement| statement.as_mut().take_output()).collect()
}

impl Session {
    /// The driver's own way, for statements that were prepared before.
    #[must_use]
    pub fn prepared(&self) -> &Client {
        &self.client
    }

    /// Runs a statement; its rows.
    pub async fn query(&self, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Row>, Error> {
        self.client.query_typed(sql, &typed(parameters)).await
    }

    /// Runs a statement that gives one row.
    pub async fn query_one(&self, sql: &str, parameters: Parameters<'_>) -> Result<Row, Error> {
        self.client.query_typed_one(sql, &typed(parameters)).await
    }

    /// Runs a statement that gives one row or none.
    pub async fn query_opt(&self, sql: &str, parameters: Parameters<'_>) -> Result<Option<Row>, Error> {
        self.client.query_typed_opt(sql, &typed(parameters)).await
    }

    /// Runs a statement; the number of rows that it has written.
    pub async fn execute(&self, sql: &str, parameters: Parameters<'_>) -> Result<u64, Error> {
        self.client.execute_typed(sql, &typed(parameters)).await
    }
}
