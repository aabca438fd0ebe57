//! A row to insert, for whichever driver inserts it.
//!
//! Most of what the store does is written against sqlx, which serves both databases. What is a row and nothing else is written down as
//! this: the writer can put many of them into one statement, and SQLite can take them without sqlx's thread
//! ([`Direct`](super::direct::Direct)). Knows no table.

use std::{borrow::Cow, sync::OnceLock};

use sqlx::AnyConnection;

/// Rows of one statement. Keeps its parameters far below any database's limit.
const MAX_ROWS: usize = 64;

/// A table that rows are only ever added to.
pub(crate) struct Table {
    name: &'static str,
    /// A row whose key is there already changes nothing, so that a row may be inserted twice.
    key: &'static str,
    columns: &'static [&'static str],
    insert_one: OnceLock<String>,
}

/// What a column gets. The kinds the schema has.
#[derive(Debug)]
pub(crate) enum Value<'a> {
    /// Words.
    Text(Cow<'a, str>),
    /// A whole number, or NULL.
    Integer(Option<i64>),
}

/// What a row is made of.
pub(crate) trait NewRow: Send + Sync {
    /// Where it goes.
    fn table(&self) -> &'static Table;

    /// One for each of the table's columns, in their order.
    fn values(&self) -> Vec<Value<'_>>;
}

impl Table {
    pub(crate) const fn new(name: &'static str, key: &'static str, columns: &'static [&'static str]) -> Self {
        Self { name, key, columns, insert_one: OnceLock::new() }
    }

    /// The statement for one row: names of ours and numbers, no words of anybody's.
    pub(super) fn insert_one(&self) -> &str {
        self.insert_one.get_or_init(|| self.insert(1))
    }

    fn insert(&self, num_rows: usize) -> String {
        let Self { name, key, columns, .. } = self;
        let row = |at: usize| {
            let marks: Vec<String> =
                (1..=columns.len()).map(|mark| format!("${}", at * columns.len() + mark)).collect();
            format!("({})", marks.join(", "))
        };
        let rows: Vec<String> = (0..num_rows).map(row).collect();
        let columns = columns.join(", ");
        format!("INSERT INTO {name} ({columns}) VALUES {} ON CONFLICT ({key}) DO NOTHING", rows.join(", "))
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(Cow::Borrowed(text))
    }
}

impl From<String> for Value<'_> {
    fn from(text: String) -> Self {
        Self::Text(Cow::Owned(text))
    }
}

impl From<i64> for Value<'_> {
    fn from(number: i64) -> Self {
        Self::Integer(Some(number))
    }
}

impl From<Option<i64>> for Value<'_> {
    fn from(number: Option<i64>) -> Self {
        Self::Integer(number)
    }
}

/// The rows as statements, each of one table and of a bounded number of rows.
pub(super) fn statements<'a, 'b>(rows: &'b [&'a dyn NewRow]) -> impl Iterator<Item = &'b [&'a dyn NewRow]> {
    rows.chunk_by(|one, next| std::ptr::eq(one.table(), next.table())).flat_map(|rows| rows.chunks(MAX_ROWS))
}

/// Inserts rows within whatever transaction the connection is in.
pub(crate) async fn insert(connection: &mut AnyConnection, rows: &[&dyn NewRow]) -> Result<(), sqlx::Error> {
    for rows in statements(rows) {
        let table = rows[0].table();
        let statement = match rows.len() {
            1 => sqlx::query(table.insert_one()),
            num_rows => sqlx::query(sqlx::AssertSqlSafe(table.insert(num_rows))),
        };
        let bind = |statement: sqlx::query::Query<'static, sqlx::Any, sqlx::any::AnyArguments>, value| match value {
            Value::Text(text) => statement.bind(text.into_owned()),
            Value::Integer(number) => statement.bind(number),
        };
        rows.iter().flat_map(|row| row.values()).fold(statement, bind).execute(&mut *connection).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    static ONE: Table = Table::new("one", "id", &["id", "at"]);
    static OTHER: Table = Table::new("other", "id", &["id"]);

    struct In(&'static Table);

    impl NewRow for In {
        fn table(&self) -> &'static Table {
            self.0
        }

        fn values(&self) -> Vec<Value<'_>> {
            Vec::new()
        }
    }

    #[test]
    fn a_statement_numbers_its_parameters_row_by_row() {
        assert_eq!(ONE.insert_one(), "INSERT INTO one (id, at) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING");
        assert_eq!(ONE.insert(2), "INSERT INTO one (id, at) VALUES ($1, $2), ($3, $4) ON CONFLICT (id) DO NOTHING");
    }

    #[test]
    fn a_statement_is_of_one_table_and_bounded() {
        let rows: Vec<In> = [(&ONE, 65), (&OTHER, 1), (&ONE, 2)]
            .into_iter()
            .flat_map(|(table, count)| std::iter::repeat_with(|| In(table)).take(count))
            .collect();
        let rows: Vec<&dyn NewRow> = rows.iter().map(|row| row as &dyn NewRow).collect();
        let found: Vec<(&str, usize)> = statements(&rows).map(|rows| (rows[0].table().name, rows.len())).collect();
        assert_eq!(found, [("one", 64), ("one", 1), ("other", 1), ("one", 2)]);
    }
}
