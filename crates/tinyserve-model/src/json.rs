//! Fields of a JSON object, read with errors that name the file and the field.

use serde_json::{Map, Value};

use crate::ModelError;

/// Longest value that an error message repeats.
const SHOWN: usize = 80;

/// A JSON object and where it is from.
#[derive(Debug, Clone)]
pub(crate) struct Fields {
    file: String,
    /// The object's own name and a dot, inside another object.
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Parses `json`, the content of `file`.
    pub(crate) fn parse(file: &str, json: &[u8]) -> Result<Self, ModelError> {
        let wrong = |found: String| ModelError::File {
            file: file.to_owned(),
            found,
            expected: "a JSON object".to_owned(),
        };
        let value: Value = serde_json::from_slice(json)
            .map_err(|error| wrong(format!("text that is not JSON ({error})")))?;
        match value {
            Value::Object(map) => Ok(Self { file: file.to_owned(), prefix: String::new(), map }),
            other => Err(wrong(shown(&other))),
        }
    }

    /// The field's value; `null` is as good as absent.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Every field that is not `null`.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.map.iter().map(|(name, value)| (name.as_str(), value)).filter(|(_, v)| !v.is_null())
    }

    /// The error for this field.
    pub(crate) fn error(&self, name: &str, expected: impl Into<String>) -> ModelError {
        ModelError::Field {
            file: self.file.clone(),
            field: format!("{}{name}", self.prefix),
            found: self.get(name).map_or_else(|| "missing".to_owned(), shown),
            expected: expected.into(),
        }
    }

    /// An object inside this one.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Self>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                file: self.file.clone(),
                prefix: format!("{}{name}.", self.prefix),
                map: map.clone(),
            })),
            Some(_) => Err(self.error(name, "an object")),
        }
    }

    /// A whole number from 1 to `most`, if the field is there.
    pub(crate) fn optional_size(
        &self,
        name: &str,
        most: usize,
    ) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        match size.filter(|size| (1..=most).contains(size)) {
            Some(size) => Ok(Some(size)),
            None => Err(self.error(name, format!("a whole number from 1 to {most}"))),
        }
    }

    /// A whole number from 1 to `most`.
    pub(crate) fn size(&self, name: &str, most: usize) -> Result<usize, ModelError> {
        let size = self.optional_size(name, most)?;
        size.ok_or_else(|| self.error(name, format!("a whole number from 1 to {most}")))
    }

    /// A number that `allowed` accepts, if the field is there.
    pub(crate) fn number(
        &self,
        name: &str,
        expected: &str,
        allowed: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64().filter(|&number| number.is_finite() && allowed(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.error(name, expected)),
        }
    }

    /// True or false, `default` when the field is absent.
    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.error(name, "true or false")),
        }
    }

    /// A text, if the field is there.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.error(name, "a text")),
        }
    }

    /// Token ids, one or a list; `None` when the field is absent.
    pub(crate) fn tokens(&self, name: &str) -> Result<Option<Vec<u32>>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let one = std::slice::from_ref(value);
        let ids = value.as_array().map_or(one, Vec::as_slice);
        let ids = ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
        let ids: Option<Vec<_>> = ids.collect();
        ids.map(Some).ok_or_else(|| self.error(name, "a token id or a list of token ids"))
    }
}

/// A value as an error message shows it: on one line and not too long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
