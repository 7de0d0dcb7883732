//! Emptying tables before a copy, also where foreign keys refer to them.
//!
//! `TRUNCATE` refuses a table that a foreign key of another table refers to, even when no row does, unless that table is
//! truncated by the same statement (manual: TRUNCATE). Tables of one copy that refer to each other are therefore emptied
//! together, by the first of them that begins. Where a table refers that is not copied, `DELETE` is left: in replica role neither the
//! key nor its actions fire, and the rows that refer are right again when the copy is whole.

use super::super::connect::Session;
use super::super::sql::{qualified, quote_ident};
use super::super::target::failed;
use crate::engine::error::{Error, Result, reason};
use crate::engine::roles::ApplyMode;
use crate::engine::table::QualifiedName;

/// A table, those that foreign keys make one with it, and who refers to whom.
#[derive(Debug)]
pub(in super::super) struct Related {
    /// By position in what was asked for: the first table and all that are related to it, over others that are.
    pub members: Vec<usize>,
    /// All foreign keys on the target but self-references.
    references: Vec<(QualifiedName, QualifiedName)>,
}

/// Looks which of `tables` are related to the first one.
///
/// Foreign keys of partitions count for the table that was asked for.
pub(in super::super) async fn related(client: &Session, tables: &[&QualifiedName]) -> Result<Related> {
    let names: Vec<String> = tables.iter().map(|table| qualified(table)).collect();
    let touched = client
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_constraint,
                 (SELECT to_regclass($1)::oid AS oid UNION SELECT relid::oid FROM pg_partition_tree(to_regclass($1))) AS ours
             WHERE contype = 'f' AND (conrelid = ours.oid OR confrelid = ours.oid))",
            &[&names[0]],
        )
        .await
        .map_err(failed("look for foreign keys of the target table"))?;
    if !touched.get::<_, bool>(0) {
        return Ok(Related { members: vec![0], references: Vec::new() });
    }
    let rows = client
        .query(
            "WITH ours AS (
               SELECT number, to_regclass(name)::oid AS root FROM unnest($1::text[]) WITH ORDINALITY AS given(name, number)),
             parts AS (
               SELECT number, root AS oid FROM ours WHERE root IS NOT NULL
               UNION SELECT number, part.relid::oid FROM ours, pg_partition_tree(root::regclass) AS part WHERE root IS NOT NULL)
             SELECT DISTINCT a.number, an.nspname::text, ac.relname::text, b.number, bn.nspname::text, bc.relname::text
             FROM pg_constraint k
             JOIN pg_class ac ON ac.oid = k.conrelid JOIN pg_namespace an ON an.oid = ac.relnamespace
             JOIN pg_class bc ON bc.oid = k.confrelid JOIN pg_namespace bn ON bn.oid = bc.relnamespace
             LEFT JOIN parts a ON a.oid = k.conrelid LEFT JOIN parts b ON b.oid = k.confrelid
             WHERE k.contype = 'f'",
            &[&names],
        )
        .await
        .map_err(failed("read foreign keys of the target tables"))?;
    // A number of ours, or a name.
    let end = |row: &tokio_postgres::Row, at: usize| -> (Option<usize>, QualifiedName) {
        let number = row.get::<_, Option<i64>>(at).and_then(|number| usize::try_from(number - 1).ok());
        let name = QualifiedName::new(row.get::<_, String>(at + 1), row.get::<_, String>(at + 2));
        (number, number.map_or(name, |number| tables[number].clone()))
    };
    let edges: Vec<_> = rows.iter().map(|row| (end(row, 0), end(row, 3))).filter(|((_, from), (_, to))| from != to).collect();
    let mut members = vec![0];
    loop {
        let next = edges.iter().find_map(|((from, _), (to, _))| match (from, to) {
            (Some(from), Some(to)) if members.contains(from) != members.contains(to) => {
                Some(if members.contains(from) { *to } else { *from })
            }
            _ => None,
        });
        match next {
            Some(next) => members.push(next),
            None => break,
        }
    }
    Ok(Related { members, references: edges.into_iter().map(|((_, from), (_, to))| (from, to)).collect() })
}

impl Related {
    /// What `TRUNCATE` must name to empty these tables: they, and what refers to them, directly or not.
    fn closure(&self, tables: &[&QualifiedName]) -> Vec<QualifiedName> {
        let mut closure: Vec<QualifiedName> = tables.iter().map(|table| (*table).clone()).collect();
        let mut at = 0;
        while let Some(table) = closure.get(at).cloned() {
            for (from, to) in &self.references {
                if *to == table && !closure.contains(from) {
                    closure.push(from.clone());
                }
            }
            at += 1;
        }
        closure
    }

    /// Empties the tables that are `full`, which are some of `members`; only the first member where they can't be emptied
    /// together. All of them may be emptied. Returns the others that it has emptied.
    ///
    /// # Errors
    /// `TargetTableReferenced` without replica role, when tables that are not copied refer to the first one.
    pub async fn empty<'a>(
        &self,
        client: &Session,
        members: &[&'a QualifiedName],
        full: &[&'a QualifiedName],
        mode: ApplyMode,
    ) -> Result<Vec<&'a QualifiedName>> {
        let first = members[0];
        let together = self.closure(full);
        if together.is_empty() {
            return Ok(Vec::new());
        }
        if together.iter().all(|table| members.contains(&table)) {
            truncate(client, &together).await?;
            return Ok(full.iter().copied().filter(|table| *table != first).collect());
        }
        if full.contains(&first) {
            let referring = self.closure(&[first]).split_off(1);
            match mode {
                _ if referring.is_empty() => truncate(client, std::slice::from_ref(first)).await?,
                ApplyMode::Replica => {
                    let sql = format!("DELETE FROM {}", qualified(first));
                    client.batch_execute(&sql).await.map_err(failed(&sql))?;
                }
                ApplyMode::Ordered => {
                    let role = client.query_one("SELECT current_user::text", &[]).await.map_err(failed("read the role"))?;
                    return Err(refuse(first, &referring, role.get(0)));
                }
            }
        }
        Ok(Vec::new())
    }
}

/// Never CASCADE: what hangs on a table is the user's.
async fn truncate(client: &Session, tables: &[QualifiedName]) -> Result<()> {
    let names: Vec<String> = tables.iter().map(qualified).collect();
    let sql = super::super::statements::truncate(names.iter().map(String::as_str));
    client.batch_execute(&sql).await.map_err(failed(&sql))
}

fn refuse(table: &QualifiedName, referring: &[QualifiedName], role: &str) -> Error {
    let names: Vec<String> = referring.iter().map(ToString::to_string).collect();
    let all: Vec<String> = std::iter::once(table).chain(referring).map(qualified).collect();
    Error::stop(
        reason::TARGET_TABLE_REFERENCED,
        format!(
            "target table {table} must be emptied for a copy, but foreign keys of {} refer to it, and role {role} may not switch them off: \
             GRANT SET ON PARAMETER session_replication_role TO {} (PostgreSQL 15 and later), or make it superuser, or drop the foreign keys, \
             or empty all of them: TRUNCATE {}",
            names.join(", "),
            quote_ident(role),
            all.join(", ")
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> QualifiedName {
        QualifiedName::new("s", name)
    }

    #[test]
    fn what_refers_goes_along_directly_or_not() {
        let references = [("child", "parent"), ("grandchild", "child"), ("child", "other"), ("a", "b"), ("b", "a")];
        let related = Related { members: vec![], references: references.map(|(from, to)| (name(from), name(to))).to_vec() };
        assert_eq!(related.closure(&[&name("parent")]), [name("parent"), name("child"), name("grandchild")]);
        assert_eq!(related.closure(&[&name("grandchild")]), [name("grandchild")]);
        assert_eq!(related.closure(&[&name("a")]), [name("a"), name("b")]);
        assert!(related.closure(&[]).is_empty());
    }

    #[test]
    fn a_refusal_names_who_refers_and_what_to_run() {
        let error = refuse(&name("parent"), &[name("child")], "plain");
        assert_eq!(error.reason, "TargetTableReferenced");
        assert!(
            error.message.contains("foreign keys of s.child refer to it")
                && error.message.ends_with(r#"TRUNCATE "s"."parent", "s"."child""#)
        );
    }
}
