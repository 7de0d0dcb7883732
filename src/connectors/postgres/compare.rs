//! Hashes of rows, for the comparison of source and target.
//!
//! Rows are hashed by the server, by functions whose results may never change, as hash partitioning rests on them (manual: "Hash
//! Partitioning"). A value of a type whose equality is not that of bytes is hashed as text. A table is read piece by piece, each in
//! a statement of its own, so that no old snapshot holds back VACUUM.

use super::connect::{Session, Side, connect};
use super::ddl;
use super::endpoint::Endpoint;
use super::errors::classify;
use super::session::UNLIMITED;
use super::source::answer;
use super::sql::{qualified, quote_ident};
use crate::engine::error::{Error, Result, reason};
use crate::engine::table::{Column, MappedTable, QualifiedName};
use crate::engine::verify::{BUCKET_BITS, Compare, Digest, Filter, Key, Seen};
use futures::TryStreamExt as _;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

/// Blocks of one piece: 64 MiB of blocks as usual.
const PIECE: i64 = 8192;
/// Bound for one piece.
const PIECE_LIMIT: Duration = Duration::from_secs(600);
/// Names that are looked for in one statement.
const NAMES: usize = 1000;
/// Built-in types that are hashed as they are: equal by their hash's operator class if and only if their bytes are.
const AS_THEY_ARE: [&str; 12] =
    ["bool", "char", "int2", "int4", "int8", "oid", "uuid", "bytea", "date", "time", "timestamp", "timestamptz"];
/// Sums of hashes are kept below this, so that they fit into a bigint.
const MODULUS: i64 = i64::MAX;

/// One side of a comparison.
pub struct PostgresCompare {
    endpoint: Endpoint,
    side: Side,
    session: tokio::sync::Mutex<Option<Session>>,
}

/// How a table is read on one side.
struct Plan {
    /// What is read, without conditions.
    from: String,
    /// Blocks that it has now; `None`: it can't be read by blocks.
    blocks: Option<i64>,
    /// Hash of the columns that name a row, or of all.
    key_hash: String,
    row_hash: String,
    /// The columns that name a row, as text.
    key_text: String,
    /// The columns that name a row, and their types.
    key: Vec<(String, String)>,
}

impl PostgresCompare {
    /// Not connected yet.
    #[must_use]
    pub fn new(endpoint: Endpoint, side: Side) -> Self {
        Self { endpoint, side, session: tokio::sync::Mutex::default() }
    }

    /// The session of the last statement that succeeded, or a new one.
    async fn take(&self) -> Result<Session> {
        if let Some(session) = self.session.lock().await.take().filter(|session| !session.is_closed()) {
            return Ok(session);
        }
        let session = connect(&self.endpoint, self.side, "sluice verify").await?;
        answer(self.side, "set up the session", session.query(UNLIMITED, &[])).await?;
        // What is hashed is cheap for each row, and compiling it is not.
        answer(self.side, "set up the session", session.batch_execute("SET jit = off")).await?;
        Ok(session)
    }

    async fn give_back(&self, session: Session) {
        *self.session.lock().await = Some(session);
    }

    fn name<'a>(&self, table: &'a MappedTable) -> &'a QualifiedName {
        match self.side {
            Side::Source => table.source(),
            Side::Target => &table.target,
        }
    }

    async fn plan(&self, session: &Session, table: &MappedTable) -> Result<Plan> {
        let name = self.name(table);
        let sql = "SELECT c.relkind = 'p', pg_relation_size(c.oid) / current_setting('block_size')::bigint
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')";
        let found = answer(self.side, "look for the table", session.query_opt(sql, &[&name.schema, &name.name])).await?;
        let found = found.ok_or_else(|| Error::stop(reason::TABLE_MISSING, format!("{name} is gone")))?;
        let (partitioned, blocks): (bool, i64) = (found.get(0), found.get(1));
        let present = match self.side {
            Side::Source => None,
            Side::Target => ddl::describe(session, name).await?,
        };
        // The type of a key column where it has another schema there, as those of extensions may.
        let declared = |column: &Column| {
            let there = present.as_ref().and_then(|present| present.column(&column.name));
            there.map_or_else(|| column.declared.clone(), |there| there.declared.clone())
        };
        let columns = &table.version.columns;
        let key: Vec<&Column> = table.key_columns().into_iter().map(|column| &columns[column]).collect();
        let hashes = |columns: &mut dyn Iterator<Item = &Column>| columns.map(hashed).collect::<Vec<_>>().join(", ");
        let row_hash = format!("hash_record_extended(ROW({}), 0)", hashes(&mut columns.iter()));
        let key_hash = format!("hash_record_extended(ROW({}), 1)", hashes(&mut key.iter().copied()));
        let key_text: Vec<String> = key.iter().map(|column| format!("{}::text", quote_ident(&column.name))).collect();
        Ok(Plan {
            from: format!("{}{}", if partitioned { "" } else { "ONLY " }, qualified(name)),
            blocks: (!partitioned).then_some(blocks),
            key_hash: if key.is_empty() { row_hash.clone() } else { key_hash },
            row_hash,
            key_text: format!("ARRAY[{}]::text[]", key_text.join(", ")),
            key: key.iter().map(|column| (quote_ident(&column.name), declared(column))).collect(),
        })
    }

    /// Runs a statement on each piece of a table. `select` makes it, given where the rows come from.
    async fn read(
        &self,
        session: &Session,
        plan: &Plan,
        select: impl Fn(&str) -> String + Send + Sync,
        mut take: impl FnMut(Row) -> Result<()> + Send,
    ) -> Result<()> {
        let pieces = plan.blocks.map_or(1, |blocks| blocks.div_euclid(PIECE) + 1);
        for piece in 0..pieces {
            let first = piece * PIECE;
            let range = match plan.blocks {
                None => String::new(),
                // Tables grow: the last piece has no end.
                Some(_) if piece + 1 == pieces => format!(" WHERE ctid >= '({first},0)'"),
                Some(_) => format!(" WHERE ctid >= '({first},0)' AND ctid < '({},0)'", first + PIECE),
            };
            let sql = select(&format!("FROM {}{range}", plan.from));
            let parameters: [(&str, Type); 0] = [];
            let rows = async {
                let rows = session.prepared().query_typed_raw(&sql, parameters).await?;
                let mut rows = std::pin::pin!(rows);
                while let Some(row) = rows.try_next().await? {
                    if let Err(error) = take(row) {
                        return Ok(Err(error));
                    }
                }
                Ok(Ok(()))
            };
            match tokio::time::timeout(PIECE_LIMIT, rows).await {
                Ok(read) => read.map_err(|error| classify(self.side, "compare rows", &error))??,
                Err(_) => return Err(super::errors::lost(self.side, "compare rows", &format!("no answer within {PIECE_LIMIT:?}"))),
            }
        }
        Ok(())
    }
}

impl Compare for PostgresCompare {
    async fn digests(&self, table: &MappedTable, filter: &Filter) -> Result<HashMap<u32, Digest>> {
        let session = self.take().await?;
        let plan = self.plan(&session, table).await?;
        let bucket = bucket("k", filter.0.len());
        let condition = condition(filter);
        let select = |from: &str| {
            format!(
                "SELECT b, count(*), mod(sum(h), {MODULUS})::bigint
                 FROM (SELECT {bucket} AS b, h FROM (SELECT {} AS k, {} AS h {from}) hashed{condition}) bucketed GROUP BY b",
                plan.key_hash, plan.row_hash
            )
        };
        let mut digests: HashMap<u32, Digest> = HashMap::new();
        self.read(&session, &plan, select, |row| {
            let (bucket, rows, sum): (i32, i64, i64) = (get(&row, 0)?, get(&row, 1)?, get(&row, 2)?);
            let digest = digests.entry(bucket.unsigned_abs()).or_default();
            digest.rows += rows.unsigned_abs();
            digest.sum = (i128::from(digest.sum) + i128::from(sum)).rem_euclid(i128::from(MODULUS)) as i64;
            Ok(())
        })
        .await?;
        self.give_back(session).await;
        Ok(digests)
    }

    async fn rows(&self, table: &MappedTable, filter: &Filter) -> Result<HashMap<Key, Seen>> {
        let session = self.take().await?;
        let plan = self.plan(&session, table).await?;
        let named = !plan.key.is_empty();
        let condition = condition(filter);
        let select = |from: &str| {
            let (name, version) = if named { (plan.key_text.as_str(), "xmin::text::bigint") } else { ("NULL::text[]", "0::bigint") };
            format!(
                "SELECT name, h, v FROM (SELECT {name} AS name, {} AS k, {} AS h, {version} AS v {from}) hashed{condition}",
                plan.key_hash, plan.row_hash
            )
        };
        let mut rows = HashMap::new();
        self.read(&session, &plan, select, |row| {
            if named {
                let (key, seen) = seen(&row)?;
                rows.insert(key, seen);
            } else {
                let hash: i64 = get(&row, 1)?;
                rows.entry(vec![hash.to_string()]).or_insert(Seen { digest: 0, version: 0 }).digest += 1;
            }
            Ok(())
        })
        .await?;
        self.give_back(session).await;
        Ok(rows)
    }

    async fn look(&self, table: &MappedTable, keys: &[Key]) -> Result<HashMap<Key, Seen>> {
        let session = self.take().await?;
        let plan = self.plan(&session, table).await?;
        let columns: Vec<&str> = plan.key.iter().map(|(column, _)| column.as_str()).collect();
        let mut values = String::new();
        let mut arrays = String::new();
        for (number, (_, declared)) in plan.key.iter().enumerate() {
            let separator = if number == 0 { "" } else { ", " };
            let _ = write!(values, "{separator}k{number}::{declared}");
            let _ = write!(arrays, "{separator}k{number}");
        }
        let unnested: Vec<String> = (1..=plan.key.len()).map(|number| format!("${number}::text[]")).collect();
        let sql = format!(
            "SELECT {}, {}, xmin::text::bigint FROM {} WHERE ({}) IN (SELECT {values} FROM unnest({}) AS names({arrays}))",
            plan.key_text,
            plan.row_hash,
            plan.from,
            columns.join(", "),
            unnested.join(", ")
        );
        // Rows are found by their names, however many the planner thinks there are.
        answer(self.side, "compare rows", session.batch_execute("SET enable_seqscan = off")).await?;
        let mut there = HashMap::new();
        for part in keys.chunks(NAMES) {
            let lists: Vec<Vec<&str>> =
                (0..plan.key.len()).map(|column| part.iter().filter_map(|key| key.get(column)).map(String::as_str).collect()).collect();
            let parameters: Vec<&(dyn super::connect::Parameter + Sync)> = lists.iter().map(|list| list as _).collect();
            for row in answer(self.side, "compare rows", session.query(&sql, &parameters)).await? {
                let (key, seen) = seen(&row)?;
                there.insert(key, seen);
            }
        }
        answer(self.side, "compare rows", session.batch_execute("RESET enable_seqscan")).await?;
        self.give_back(session).await;
        Ok(there)
    }
}

/// A column in a form whose hash differs if its bytes do.
fn hashed(column: &Column) -> String {
    let name = quote_ident(&column.name);
    let is_plain = column.type_name.schema == "pg_catalog" && AS_THEY_ARE.contains(&column.type_name.name.as_str());
    if is_plain { name } else { format!("{name}::text COLLATE \"C\"") }
}

/// The bucket of a key's hash at a level.
fn bucket(hash: &str, level: usize) -> String {
    format!("(({hash} >> {}) & {})::integer", level * BUCKET_BITS as usize, (1 << BUCKET_BITS) - 1)
}

fn condition(filter: &Filter) -> String {
    let mut sql = String::new();
    for (level, buckets) in filter.0.iter().enumerate() {
        let buckets: Vec<String> = buckets.iter().map(ToString::to_string).collect();
        let word = if level == 0 { "WHERE" } else { "AND" };
        let _ = write!(sql, " {word} {} = ANY ('{{{}}}'::integer[])", bucket("k", level), buckets.join(","));
    }
    sql
}

fn get<'a, T: tokio_postgres::types::FromSql<'a>>(row: &'a Row, column: usize) -> Result<T> {
    row.try_get(column).map_err(|error| Error::bug(format!("an answer of a comparison: {error}")))
}

/// Name, hash and version of a row.
fn seen(row: &Row) -> Result<(Key, Seen)> {
    let (key, digest, version): (Key, i64, i64) = (get(row, 0)?, get(row, 1)?, get(row, 2)?);
    Ok((key, Seen { digest, version: version.unsigned_abs() }))
}
