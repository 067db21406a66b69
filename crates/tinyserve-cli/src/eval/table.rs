//! Rows as tables: the same columns in Markdown and CSV.

use serde_json::Value;

/// A column: the field of a row, what its head says, and how its values are written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    pub(crate) field: &'static str,
    pub(crate) title: &'static str,
    pub(crate) style: Style,
}

/// How values are written in Markdown; CSV has them in full.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Style {
    Plain,
    Percent,
    /// So many digits after the point.
    Fixed(usize),
}

/// The columns that say which trial a row is of.
pub(crate) const TRIAL: [Column; 4] = [
    Column { field: "policy", title: "policy", style: Style::Plain },
    Column { field: "token_budget", title: "tokens", style: Style::Plain },
    Column { field: "selection_ratio", title: "ratio", style: Style::Plain },
    Column { field: "top_p_pages", title: "top-p", style: Style::Plain },
];

/// Columns of which some row has a value.
fn filled<'a>(columns: &'a [Column], rows: &[Value]) -> Vec<&'a Column> {
    let has_value = |column: &&Column| rows.iter().any(|row| !row[column.field].is_null());
    columns.iter().filter(has_value).collect()
}

/// The rows as a Markdown table; columns without any value are left out.
pub(crate) fn markdown(columns: &[Column], rows: &[Value]) -> String {
    let columns = filled(columns, rows);
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut text = line(columns.iter().map(|column| column.title.to_owned()).collect());
    let rule = |i: usize| if i == 0 { "---".to_owned() } else { "---:".to_owned() };
    text += &line((0..columns.len()).map(rule).collect());
    for row in rows {
        text +=
            &line(columns.iter().map(|column| cell(&row[column.field], column.style)).collect());
    }
    text
}

fn cell(value: &Value, style: Style) -> String {
    match (value, style) {
        (Value::Null, _) => "—".to_owned(),
        (Value::String(text), _) => text.clone(),
        (Value::Number(number), Style::Percent) => {
            format!("{:.1} %", 100.0 * number.as_f64().unwrap_or(f64::NAN))
        }
        (Value::Number(number), Style::Fixed(digits)) => {
            format!("{:.digits$}", number.as_f64().unwrap_or(f64::NAN))
        }
        (other, _) => other.to_string(),
    }
}

/// The rows as CSV with a header of field names.
pub(crate) fn csv(columns: &[Column], rows: &[Value]) -> String {
    let line = |cells: Vec<String>| cells.join(",") + "\n";
    let mut text = line(columns.iter().map(|column| column.field.to_owned()).collect());
    for row in rows {
        let cell = |column: &Column| match &row[column.field] {
            Value::Null => String::new(),
            Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
            other => other.to_string(),
        };
        text += &line(columns.iter().map(cell).collect());
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_have_the_columns_that_say_something() {
        let rows = [
            json!({"policy": "dense", "token_budget": null, "accuracy": 1.0}),
            json!({"policy": "b\"x", "token_budget": 64, "accuracy": 0.25}),
        ];
        let accuracy = Column { field: "accuracy", title: "right", style: Style::Percent };
        let columns = [&TRIAL[..], &[accuracy]].concat();
        assert_eq!(
            markdown(&columns, &rows),
            "| policy | tokens | right |\n| --- | ---: | ---: |\n| dense | — | 100.0 % |\n\
             | b\"x | 64 | 25.0 % |\n"
        );
        assert_eq!(
            csv(&columns, &rows),
            "policy,token_budget,selection_ratio,top_p_pages,accuracy\n\"dense\",,,,1.0\n\
             \"b\"\"x\",64,,,0.25\n"
        );
    }
}
