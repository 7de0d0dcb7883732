//! The tables of the histories.

/// A table as it is on both sides.
pub struct TableSpec {
    pub name: &'static str,
    /// What is streamed: `name type`, the key's with `!` before the name.
    pub columns: &'static [&'static str],
    /// Columns that are there and not streamed, as in `CREATE TABLE`.
    pub others: &'static [&'static str],
    /// Their names.
    pub other_names: &'static [&'static str],
    /// Keys and constraints; `{schema}` is where the table is.
    pub constraints: &'static str,
    /// What follows the columns in `CREATE TABLE`.
    pub suffix: &'static str,
    /// Statements that follow; `{schema}` is where the table is.
    pub then: &'static str,
    /// The same, where changes are applied to only.
    pub on_target: &'static str,
    /// Where changes are applied to, columns have the opposite order.
    pub reversed: bool,
    /// The first columns are the key; with 0 a row may be there twice.
    pub key: usize,
    /// Columns besides the key that hold no NULL.
    pub required: &'static [usize],
    /// Columns of which two rows now and then exchange their values.
    pub swaps: &'static [usize],
    /// Table whose key the last column refers to.
    pub parent: Option<usize>,
    /// The source sends whole old rows although there is a key.
    pub sends_full: bool,
    /// Keys never change.
    pub fixed_key: bool,
}

const TABLE: TableSpec = TableSpec {
    name: "",
    columns: &[],
    others: &[],
    other_names: &[],
    constraints: "PRIMARY KEY (id)",
    suffix: "",
    then: "",
    on_target: "",
    reversed: false,
    key: 1,
    required: &[],
    swaps: &[0],
    parent: None,
    sends_full: false,
    fixed_key: false,
};

/// Keys and values of all kinds; nothing else restricts rows.
pub const KEYS: &[TableSpec] = &[
    TableSpec { name: "int_key", columns: &["!id int4", "a text", "b text"], ..TABLE },
    TableSpec { name: "text key", columns: &["!\"k\" text", "A text"], constraints: "PRIMARY KEY (\"\"\"k\"\"\")", ..TABLE },
    TableSpec { name: "composite", columns: &["!x int4", "!y text", "v numeric"], constraints: "PRIMARY KEY (x, y)", key: 2, ..TABLE },
    TableSpec { name: "all_key", columns: &["!x int4", "!y int4"], constraints: "PRIMARY KEY (y, x)", key: 2, ..TABLE },
    TableSpec { name: "loose_key", columns: &["!n numeric", "v text"], constraints: "PRIMARY KEY (n)", ..TABLE },
    TableSpec { name: "padded_key", columns: &["!c char(12)", "v text"], constraints: "PRIMARY KEY (c)", ..TABLE },
    TableSpec { name: "keyless", columns: &["a int4", "b text", "n numeric", "j json"], constraints: "", key: 0, swaps: &[], ..TABLE },
    TableSpec {
        name: "arrays",
        columns: &["!id int4", "l int4[]", "w text[]", "t text"],
        others: &["dropped int4", "note text DEFAULT 'new'", "g int4 GENERATED ALWAYS AS (id + 1) STORED"],
        other_names: &["note", "g"],
        then: "ALTER TABLE {schema}.arrays DROP dropped",
        reversed: true,
        ..TABLE
    },
    TableSpec { name: "array_key", columns: &["!k int4[]", "v int4[]", "t text"], constraints: "PRIMARY KEY (k)", swaps: &[], ..TABLE },
    TableSpec {
        name: "domain beside",
        columns: &["!id int4", "l int4[]"],
        on_target: "ALTER TABLE {schema}.\"domain beside\" ADD d public.required DEFAULT 1",
        ..TABLE
    },
    TableSpec { name: "full with key", columns: &["!id int4", "v text", "n numeric"], sends_full: true, ..TABLE },
    TableSpec { name: "large", columns: &["!id int4", "v int4", "huge text"], ..TABLE },
    TableSpec { name: "Select", columns: &["!Order int4", "FROM text", "user int4"], constraints: "PRIMARY KEY (\"Order\")", ..TABLE },
    TableSpec { name: "reversed", columns: &["!id int4", "a int4", "b text", "m public.mood"], reversed: true, ..TABLE },
    TableSpec {
        name: "counted",
        columns: &["!id int4", "v text"],
        on_target: "ALTER TABLE {schema}.counted ALTER id ADD GENERATED ALWAYS AS IDENTITY",
        fixed_key: true,
        ..TABLE
    },
];

/// More than the key restricts rows.
pub const GUARDED: &[TableSpec] = &[
    TableSpec {
        name: "other_unique",
        columns: &["!id int4", "u int4", "v text"],
        others: &["note text DEFAULT 'new'"],
        other_names: &["note"],
        constraints: "PRIMARY KEY (id), UNIQUE (u)",
        swaps: &[0, 1],
        ..TABLE
    },
    TableSpec {
        name: "two_uniques",
        columns: &["!id int4", "a int4", "b text", "c int4"],
        constraints: "PRIMARY KEY (id), UNIQUE (a, b), UNIQUE (c)",
        swaps: &[1, 3],
        ..TABLE
    },
    TableSpec {
        name: "partial",
        columns: &["!id int4", "u int4", "open int4"],
        then: "CREATE UNIQUE INDEX ON {schema}.partial (u) WHERE open > 12",
        swaps: &[1, 2],
        ..TABLE
    },
    TableSpec {
        name: "expression",
        columns: &["!id int4", "e text", "n int4", "v text"],
        then: "CREATE UNIQUE INDEX ON {schema}.expression (lower(e), (n % 10)) WHERE v IS NOT NULL",
        swaps: &[1],
        ..TABLE
    },
    TableSpec {
        name: "whole row",
        columns: &["!id int4", "a int4", "b int4"],
        then: "CREATE UNIQUE INDEX ON {schema}.\"whole row\" (public.sum_of(a, b)) WHERE public.is_odd(\"whole row\".*)",
        swaps: &[1],
        ..TABLE
    },
    TableSpec {
        name: "excluded",
        columns: &["!id int4", "first int4", "last int4", "v text"],
        constraints: "PRIMARY KEY (id), EXCLUDE USING gist (int4range(first, last) WITH &&) WHERE (v <> 't5')",
        swaps: &[1, 2],
        ..TABLE
    },
    TableSpec {
        name: "by another index",
        columns: &["!k text", "id int4", "v text"],
        constraints: "PRIMARY KEY (id), UNIQUE (k)",
        required: &[1],
        swaps: &[0, 1],
        ..TABLE
    },
    TableSpec {
        name: "large",
        columns: &["!id int4", "u int4", "huge text"],
        constraints: "PRIMARY KEY (id), UNIQUE (u)",
        then: "CREATE UNIQUE INDEX ON {schema}.large (md5(huge), (u / 5))",
        swaps: &[0, 1],
        ..TABLE
    },
    TableSpec {
        name: "generated",
        columns: &["!id int4", "a int4", "b text"],
        others: &["g int4 GENERATED ALWAYS AS (a * 2) STORED"],
        other_names: &["g"],
        constraints: "PRIMARY KEY (id), UNIQUE (g)",
        swaps: &[1],
        ..TABLE
    },
    TableSpec {
        name: "parts",
        columns: &["!id int4", "u int4", "v text"],
        suffix: "PARTITION BY RANGE (id)",
        then: "CREATE TABLE {schema}.low PARTITION OF {schema}.parts FOR VALUES FROM (MINVALUE) TO (12);
               CREATE TABLE {schema}.high PARTITION OF {schema}.parts FOR VALUES FROM (12) TO (MAXVALUE);
               CREATE UNIQUE INDEX ON {schema}.high (u)",
        swaps: &[0, 1],
        ..TABLE
    },
    TableSpec {
        name: "counted",
        columns: &["!id int4", "u int4"],
        constraints: "PRIMARY KEY (id), UNIQUE (u)",
        on_target: "ALTER TABLE {schema}.counted ALTER id ADD GENERATED ALWAYS AS IDENTITY",
        swaps: &[0, 1],
        fixed_key: true,
        ..TABLE
    },
    TableSpec {
        name: "arrays",
        columns: &["!id int4", "u int4", "l int4[]", "w text[]"],
        others: &["note text DEFAULT 'new'"],
        other_names: &["note"],
        constraints: "PRIMARY KEY (id), UNIQUE (u)",
        swaps: &[0, 1],
        ..TABLE
    },
    TableSpec {
        name: "unique_array",
        columns: &["!id int4", "l int4[]", "w text[]"],
        constraints: "PRIMARY KEY (id), UNIQUE (l)",
        then: "CREATE UNIQUE INDEX ON {schema}.unique_array ((w[1]), id) WHERE cardinality(w) > 1",
        ..TABLE
    },
];

/// Tables that refer to each other.
pub const LINKED: &[TableSpec] = &[
    TableSpec { name: "parent", columns: &["!id int4", "a text"], ..TABLE },
    TableSpec {
        name: "child",
        columns: &["!id int4", "a text", "parent int4"],
        constraints: "PRIMARY KEY (id), FOREIGN KEY (parent) REFERENCES {schema}.parent",
        parent: Some(0),
        ..TABLE
    },
];

/// Made once per database.
pub const BEFORE: &str = "CREATE DOMAIN public.required AS int NOT NULL;
    CREATE TYPE public.mood AS ENUM ('t1', 't2', 't3', 't4');
    CREATE FUNCTION public.sum_of(a int, b int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT a + b';
    CREATE FUNCTION public.is_odd(r record) RETURNS bool LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN length(r::text) % 2 = 1; END'";
