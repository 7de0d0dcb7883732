//! The simulated tables as the engine knows them.

use crate::history::{DEFINITIONS, KEYLESS_TABLE, TABLES};
use sluice::engine::table::{Column, Identity, Lineage, MappedTable, QualifiedName, TableVersion};
use std::sync::{Arc, LazyLock};

/// Each table under each of its definitions.
pub static MAPPED: LazyLock<[[MappedTable; DEFINITIONS]; TABLES]> =
    LazyLock::new(|| std::array::from_fn(|table| std::array::from_fn(|definition| mapped(table, definition, None))));
/// As the log describes a table that is mapped under another definition.
pub static DIFFERING: LazyLock<[[Arc<TableVersion>; DEFINITIONS]; TABLES]> = LazyLock::new(|| {
    let version = |table, definition| mapped(table, definition, Some("column `v` has another type".into())).version;
    std::array::from_fn(|table| std::array::from_fn(|definition| version(table, definition)))
});

pub fn number(table: &MappedTable) -> usize {
    table.version.id as usize
}

/// The definition that a table is mapped under.
pub fn definition(table: &MappedTable) -> usize {
    let columns = &table.version.columns;
    let known = MAPPED[number(table)].iter().position(|mapped| mapped.version.columns == *columns);
    known.expect("a definition of the simulation")
}

/// The number of a table of that name.
pub fn by_name(name: &QualifiedName) -> usize {
    MAPPED.iter().position(|[table, ..]| table.source() == name).expect("a table of the simulation")
}

pub fn table(number: usize, definition: usize) -> &'static MappedTable {
    &MAPPED[number][definition]
}

fn mapped(table: usize, definition: usize, differs: Option<String>) -> MappedTable {
    let has_key = table != KEYLESS_TABLE;
    let column = |name: &str, declared: &str| Column {
        name: name.into(),
        type_id: 25,
        type_name: QualifiedName::new("pg_catalog", "text"),
        declared: declared.into(),
        key: has_key && name == "k",
        not_null: has_key && name == "k",
        generated: None,
        collation: None,
        number: 0,
        modifier: -1,
    };
    let name = QualifiedName::new("public", format!("t{table}"));
    let declared = format!("type {definition}");
    let columns = vec![column("k", "text"), column("u", "text"), column("v", &declared), column("t", "text")];
    let identity = if has_key { Identity::Key } else { Identity::Full };
    let version = TableVersion { id: table as u32, name: name.clone(), columns, identity, differs };
    MappedTable {
        version: Arc::new(version),
        target: name,
        generated: Vec::new(),
        excluded: Vec::new(),
        accept_narrower_types: false,
        primary_key: if has_key { vec!["k".into()] } else { Vec::new() },
        primary_key_name: None,
        estimated_rows: 8,
        blocks: 4,
        structure: Arc::default(),
        lineage: Lineage::default(),
    }
}
