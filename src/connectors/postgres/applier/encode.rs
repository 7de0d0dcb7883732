//! From cells in a batch's arena to the bytes of a parameter or of a `COPY`, in one copy.

use super::super::statements::{Encodings, Parameter, Side, TableWriter};
use crate::engine::batch::{Cell, CellKind};
use crate::engine::coalesce::{Images, Row};
use crate::engine::error::{Error, Result, reason};
use bytes::{BufMut as _, BytesMut};
use std::fmt;
use tokio_postgres::types::{Format, IsNull, Kind, ToSql, Type, to_sql_checked};

type EncodeError = Box<dyn std::error::Error + Sync + Send>;

/// Bytes that one statement's parameters may take, but for a single row that is larger.
pub(super) const STATEMENT_BYTES: usize = 64 << 20;
/// Size of the pieces of a `COPY`.
pub(super) const COPY_PIECE: usize = 256 << 10;
/// Signature, flags and header extension of a binary `COPY` (manual: COPY, "Binary Format").
pub(super) const COPY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// End of a binary `COPY`.
pub(super) const COPY_TRAILER: &[u8] = &(-1i16).to_be_bytes();

/// Rows that one statement can take: alike in encoding, bounded in size.
pub(super) struct Chunk<'a> {
    pub rows: &'a [Row],
    pub encodings: Encodings,
    pub bytes: usize,
    /// All values have the same encoding, or there are only NULLs.
    pub uniform: bool,
}

/// Takes the next chunk from the front of `rows`.
pub(super) fn next_chunk<'a>(
    images: &Images<'_>,
    writer: &TableWriter,
    parameters: &[Parameter],
    rows: &mut &'a [Row],
) -> Result<Chunk<'a>> {
    let mut known: Vec<Option<bool>> = vec![None; parameters.len()];
    let (mut bytes, mut count) = (0, 0);
    let overhead = writer.row_overhead(parameters);
    for &row in *rows {
        let alike = |(parameter, known): (&Parameter, &Option<bool>)| match (parameter.side, parameter.cell(images, row).kind, known) {
            (Side::Kept, ..) => true,
            (_, CellKind::Text, Some(binary)) => !binary,
            (_, CellKind::Binary, Some(binary)) => *binary,
            _ => true,
        };
        let size = overhead + parameters.iter().map(|parameter| parameter.size(images, row)).sum::<usize>();
        if count > 0 && (bytes + size > STATEMENT_BYTES || !parameters.iter().zip(&known).all(alike)) {
            break;
        }
        for (parameter, known) in parameters.iter().zip(&mut known) {
            let binary = encoding(writer, *parameter, parameter.cell(images, row))?;
            *known = known.or(binary);
        }
        bytes += size;
        count += 1;
    }
    let (chunk, rest) = rows.split_at(count);
    *rows = rest;
    let mut decided = known.iter().flatten();
    let first = decided.next().copied();
    Ok(Chunk {
        rows: chunk,
        uniform: decided.all(|binary| Some(*binary) == first),
        encodings: known.iter().map(|binary| binary.or(first).unwrap_or(false)).collect(),
        bytes,
    })
}

/// Whether a cell is binary; `None` for NULL.
pub(super) fn encoding(writer: &TableWriter, parameter: Parameter, cell: Cell) -> Result<Option<bool>> {
    match cell.kind {
        _ if parameter.side == Side::Kept => Ok(Some(true)),
        CellKind::Unchanged if parameter.side == Side::NewOrKept => Ok(None),
        CellKind::Null => Ok(None),
        CellKind::Text => Ok(Some(false)),
        CellKind::Binary if writer.takes_binary(parameter.column) => Ok(Some(true)),
        CellKind::Binary => {
            Err(Error::bug(format!("a binary value of a type whose values are OIDs came for table {}", writer.version.name)))
        }
        CellKind::Unchanged => Err(Error::stop(
            reason::PROTOCOL_VIOLATION,
            format!("the source left out a value that is needed for a row of table {}", writer.version.name),
        )),
    }
}

/// One value of one row, in the format in which it came.
pub(super) struct OneCell<'a> {
    pub images: &'a Images<'a>,
    pub cell: Cell,
}

impl fmt::Debug for OneCell<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.cell.kind)
    }
}

impl ToSql for OneCell<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, EncodeError> {
        if self.cell.kind == CellKind::Null {
            return Ok(IsNull::Yes);
        }
        out.extend_from_slice(self.images.bytes(self.cell));
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        match self.cell.kind {
            CellKind::Text => Format::Text,
            CellKind::Binary | CellKind::Null | CellKind::Unchanged => Format::Binary,
        }
    }

    to_sql_checked!();
}

/// One argument of a set statement: a one-dimensional array with an element for each row.
pub(super) struct SetArgument<'a> {
    pub images: &'a Images<'a>,
    pub rows: &'a [Row],
    pub elements: Elements,
}

/// What the elements of an array are.
pub(super) enum Elements {
    /// Values of one column.
    Values(Parameter),
    /// Rows of the table's type: by place, what is in it. All other columns are NULL.
    Rows(Vec<Option<Parameter>>),
}

impl<'a> SetArgument<'a> {
    /// All arguments for these parameters, in the order in which the statement has them.
    pub fn all(
        images: &'a Images<'a>,
        writer: &TableWriter,
        rows: &'a [Row],
        parameters: &[Parameter],
        encodings: &Encodings,
    ) -> Vec<Self> {
        let argument = |elements| Self { images, rows, elements };
        let mut in_row: Vec<Option<Parameter>> = Vec::new();
        let mut arguments = Vec::with_capacity(parameters.len());
        let in_rows: Vec<usize> = writer.in_rows(parameters, encodings).collect();
        for (number, parameter) in parameters.iter().enumerate() {
            if in_rows.contains(&number) {
                let place = writer.place(parameter.column);
                in_row.resize(in_row.len().max(place + 1), None);
                in_row[place] = Some(*parameter);
            } else {
                arguments.push(argument(Elements::Values(*parameter)));
            }
        }
        if !in_rows.is_empty() {
            arguments.push(argument(Elements::Rows(in_row)));
        }
        arguments
    }
}

impl fmt::Debug for SetArgument<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.elements {
            Elements::Values(parameter) => write!(f, "column {} of {} rows", parameter.column, self.rows.len()),
            Elements::Rows(_) => write!(f, "{} rows", self.rows.len()),
        }
    }
}

impl ToSql for SetArgument<'_> {
    /// The array's binary form (PostgreSQL: `array_recv`): dimensions, has-null flag, element type, length, lower bound,
    /// then each element with its length.
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, EncodeError> {
        let Kind::Array(element) = ty.kind() else {
            return Err(format!("{ty} is not an array").into());
        };
        out.put_i32(1);
        out.put_i32(1);
        out.put_u32(element.oid());
        out.put_i32(i32::try_from(self.rows.len())?);
        out.put_i32(1);
        for &row in self.rows {
            match &self.elements {
                Elements::Values(parameter) => {
                    let cell = parameter.cell(self.images, row);
                    if parameter.side == Side::Kept {
                        out.put_i32(1);
                        out.put_u8(u8::from(cell.kind == CellKind::Unchanged));
                    } else {
                        put_field(self.images, cell, out);
                    }
                }
                Elements::Rows(places) => put_row(self.images, row, places, element, out)?,
            }
        }
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

/// A row behind its length (PostgreSQL: `record_recv`): the number of fields, then each with its type.
fn put_row(images: &Images<'_>, row: Row, places: &[Option<Parameter>], ty: &Type, out: &mut BytesMut) -> Result<(), EncodeError> {
    let Kind::Composite(fields) = ty.kind() else {
        return Err(format!("{ty} is not a row type").into());
    };
    let start = out.len();
    out.put_i32(0);
    out.put_i32(i32::try_from(fields.len())?);
    for (place, field) in fields.iter().enumerate() {
        out.put_u32(field.type_().oid());
        match places.get(place).copied().flatten() {
            Some(parameter) => put_field(images, parameter.cell(images, row), out),
            None => out.put_i32(-1),
        }
    }
    let length = i32::try_from(out.len() - start - size_of::<i32>())?;
    out[start..start + size_of::<i32>()].copy_from_slice(&length.to_be_bytes());
    Ok(())
}

/// A value behind its length; NULL, which also stands for a value that is not written, is the length −1.
fn put_field(images: &Images<'_>, cell: Cell, out: &mut BytesMut) {
    if matches!(cell.kind, CellKind::Null | CellKind::Unchanged) {
        out.put_i32(-1);
        return;
    }
    let bytes = images.bytes(cell);
    // A cell's length is a part of a u32-sized arena, and a server takes no field of 2 GiB or more.
    out.put_i32(bytes.len() as i32);
    out.extend_from_slice(bytes);
}

/// A new row as one tuple of a `COPY`.
pub(super) fn copy_row(images: &Images<'_>, row: Row, binary: bool, out: &mut BytesMut) {
    let cells = images.cells(row.new);
    if binary {
        out.put_i16(cells.len() as i16);
        for cell in cells {
            put_field(images, *cell, out);
        }
        return;
    }
    for (number, cell) in cells.iter().enumerate() {
        if number > 0 {
            out.put_u8(b'\t');
        }
        match cell.kind {
            CellKind::Null => out.extend_from_slice(b"\\N"),
            _ => escape(images.bytes(*cell), out),
        }
    }
    out.put_u8(b'\n');
}

/// Escapes what means something in a text `COPY` (manual: COPY, "Text Format").
fn escape(bytes: &[u8], out: &mut BytesMut) {
    let mut rest = bytes;
    while let Some(place) = rest.iter().position(|byte| matches!(byte, b'\\' | b'\n' | b'\r' | b'\t')) {
        out.extend_from_slice(&rest[..place]);
        let letter = match rest[place] {
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            other => other,
        };
        out.extend_from_slice(&[b'\\', letter]);
        rest = &rest[place + 1..];
    }
    out.extend_from_slice(rest);
}

/// Names a row by its key, for people. Values of other columns are never shown.
pub(super) fn key_text(images: &Images<'_>, writer: &TableWriter, row: Row) -> String {
    let values = writer.key.iter().map(|&column| {
        let cell = Parameter { column, side: Side::Key }.cell(images, row);
        value_text(writer.version.columns[column].type_id, cell.kind, images.bytes(cell))
    });
    let pairs: Vec<String> = writer.key_names().zip(values).map(|(name, value)| format!("{name} = {value}")).collect();
    pairs.join(", ")
}

fn value_text(type_id: u32, kind: CellKind, bytes: &[u8]) -> String {
    const LONGEST: usize = 100;
    let text = match (kind, type_id, bytes) {
        (CellKind::Null, ..) => "NULL".to_owned(),
        (CellKind::Binary, 20, &[a, b, c, d, e, f, g, h]) => i64::from_be_bytes([a, b, c, d, e, f, g, h]).to_string(),
        (CellKind::Binary, 23, &[a, b, c, d]) => i32::from_be_bytes([a, b, c, d]).to_string(),
        (CellKind::Binary, 21, &[a, b]) => i16::from_be_bytes([a, b]).to_string(),
        (CellKind::Binary, 25 | 1043 | 19 | 1042, bytes) | (CellKind::Text, _, bytes) => String::from_utf8_lossy(bytes).into_owned(),
        (_, _, bytes) => bytes.iter().take(LONGEST).map(|byte| format!("{byte:02x}")).collect(),
    };
    text.chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_for_copy() {
        let mut out = BytesMut::new();
        escape(b"a\\b\nc\rd\te\\.", &mut out);
        assert_eq!(&out[..], br"a\\b\nc\rd\te\\.");
    }

    #[test]
    fn keys_are_shown_as_people_write_them() {
        assert_eq!(value_text(23, CellKind::Binary, &(-7i32).to_be_bytes()), "-7");
        assert_eq!(value_text(25, CellKind::Text, b"x"), "x");
        assert_eq!(value_text(2950, CellKind::Binary, &[0xab, 1]), "ab01");
    }
}
