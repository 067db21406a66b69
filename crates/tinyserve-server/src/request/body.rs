//! A JSON body, field by field: what is known is kept, what is unknown costs nothing.

use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::ApiError;

/// Longest value that an error message repeats.
const SHOWN: usize = 60;
/// Names of unknown fields that are remembered for the log.
const REMEMBERED: usize = 8;

/// The fields of a JSON object that are known by name, still as text.
#[derive(Debug)]
pub(crate) struct Body<'a> {
    fields: Vec<(&'static str, &'a RawValue)>,
    unknown: Vec<String>,
    /// What stands before a field's name in errors.
    prefix: &'static str,
}

impl<'a> Body<'a> {
    /// Reads `json`, which must be an object.
    pub(crate) fn parse(json: &'a [u8], known: &[&'static str]) -> Result<Self, ApiError> {
        // Checked once: afterwards every piece is known to be text.
        let text = std::str::from_utf8(json)
            .map_err(|error| ApiError::json(format!("the body is not UTF-8: {error}")))?;
        let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
        let mut reader = serde_json::Deserializer::from_str(text);
        let body = reader.deserialize_any(Known { known, prefix: "" });
        body.and_then(|body| reader.end().map(|()| body)).map_err(|error| {
            if error.is_data() {
                ApiError::invalid(format!("the body is no JSON object: {error}"))
            } else {
                ApiError::json(format!("the body is not JSON: {error}"))
            }
        })
    }

    /// An object inside this one; its fields are all known, or an error.
    pub(crate) fn object(
        &self,
        name: &'static str,
        known: &[&'static str],
        prefix: &'static str,
    ) -> Result<Option<Self>, ApiError> {
        let Some(raw) = self.get(name) else { return Ok(None) };
        let mut reader = serde_json::Deserializer::from_str(raw.get());
        match reader.deserialize_any(Known { known, prefix }) {
            Ok(body) => Ok(Some(body)),
            Err(_) => Err(self.error(name, "an object")),
        }
    }

    /// The field's text; `null` is as good as absent.
    pub(crate) fn get(&self, name: &str) -> Option<&'a RawValue> {
        let found = self.fields.iter().rev().find(|(known, _)| *known == name);
        found.map(|(_, raw)| *raw).filter(|raw| raw.get() != "null")
    }

    /// Whether the field is there and not `null`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Fields that nobody here knows; some of them.
    pub(crate) fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// The field's value, if it is there; `expected` says in words what it may be.
    pub(crate) fn value<T: DeserializeOwned>(
        &self,
        name: &'static str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.get(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|_| self.error(name, expected))
    }

    /// As [`Self::value`], if `holds` for it.
    pub(crate) fn checked<T: DeserializeOwned>(
        &self,
        name: &'static str,
        expected: &str,
        holds: impl FnOnce(&T) -> bool,
    ) -> Result<Option<T>, ApiError> {
        match self.value(name, expected)? {
            Some(value) if holds(&value) => Ok(Some(value)),
            Some(_) => Err(self.error(name, expected)),
            None => Ok(None),
        }
    }

    /// True or false; `default` when the field is absent.
    pub(crate) fn flag(&self, name: &'static str, default: bool) -> Result<bool, ApiError> {
        Ok(self.value(name, "true or false")?.unwrap_or(default))
    }

    /// A finite number from `least` to `most`.
    pub(crate) fn number(
        &self,
        name: &'static str,
        least: f64,
        most: f64,
    ) -> Result<Option<f32>, ApiError> {
        let expected = match most {
            f64::INFINITY => format!("a number, {least} or more"),
            _ => format!("a number from {least} to {most}"),
        };
        let number = self.checked(name, &expected, |x: &f64| {
            x.is_finite() && (*x as f32).is_finite() && (least..=most).contains(x)
        })?;
        Ok(number.map(|number| number as f32))
    }

    /// A whole number from `least` to `most`.
    pub(crate) fn size(
        &self,
        name: &'static str,
        least: usize,
        most: usize,
    ) -> Result<Option<usize>, ApiError> {
        let expected = match most {
            usize::MAX => format!("a whole number, {least} or more"),
            _ => format!("a whole number from {least} to {most}"),
        };
        self.checked(name, &expected, |size| (least..=most).contains(size))
    }

    /// The error for this field.
    pub(crate) fn error(&self, name: &str, expected: &str) -> ApiError {
        let found = self.get(name).map_or_else(|| "missing".to_owned(), |raw| shown(raw.get()));
        let name = format!("{}{name}", self.prefix);
        let message = format!("{name} is {found}, expected {expected}");
        ApiError::field(name, message)
    }

    /// The error for a field that would change the answer in a way that is not implemented.
    pub(crate) fn unsupported(&self, name: &str, instead: &str) -> ApiError {
        let name = format!("{}{name}", self.prefix);
        let message = format!("{name} is not supported{instead}");
        ApiError::field(name, message)
    }
}

/// A value as an error message shows it: on one line and not too long.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String =
        text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

struct Known<'k> {
    known: &'k [&'static str],
    prefix: &'static str,
}

impl<'de> Visitor<'de> for Known<'_> {
    type Value = Body<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body<'de>, A::Error> {
        let mut body = Body { fields: Vec::new(), unknown: Vec::new(), prefix: self.prefix };
        while let Some(name) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            match self.known.iter().find(|known| **known == name) {
                Some(known) => {
                    let raw = map.next_value::<&'de RawValue>()?;
                    match body.fields.iter_mut().find(|(name, _)| name == known) {
                        // As Python's reader does: the last one counts.
                        Some((_, earlier)) => *earlier = raw,
                        None => body.fields.push((known, raw)),
                    }
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                    if body.unknown.len() < REMEMBERED {
                        body.unknown.push(shown(&name));
                    }
                }
            }
        }
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[&str] = &["a", "b", "c"];

    fn message(json: &str, read: impl FnOnce(&Body<'_>) -> Result<(), ApiError>) -> String {
        let error = Body::parse(json.as_bytes(), KNOWN).and_then(|body| read(&body)).unwrap_err();
        format!("{}: {}", error.param().unwrap_or("-"), error.message())
    }

    #[test]
    fn fields_are_read_and_null_is_absent() {
        let body = Body::parse(br#" {"a": 3, "b": null, "x": [1, {}], "a": 4} "#, KNOWN).unwrap();
        assert_eq!(body.size("a", 0, 9).unwrap(), Some(4));
        assert!(!body.has("b") && !body.has("c"));
        assert_eq!(body.unknown(), ["x"]);
        assert!(body.flag("c", true).unwrap());
    }

    #[test]
    fn errors_name_the_field_and_what_was_found() {
        let size = |body: &Body<'_>| body.size("a", 1, 5).map(drop);
        assert_eq!(
            message(r#"{"a": "hot"}"#, size),
            r#"a: a is "hot", expected a whole number from 1 to 5"#
        );
        assert!(message(r#"{"a": 6}"#, size).starts_with("a: a is 6,"));
        assert!(message(r#"{"a": -1}"#, size).starts_with("a: a is -1,"));
        let number = |body: &Body<'_>| body.number("b", 0.0, f64::INFINITY).map(drop);
        for bad in ["1e300", "-1", "\"1\"", "[]", "{}", "true"] {
            let found = message(&format!(r#"{{"b": {bad}}}"#), number);
            assert_eq!(found, format!("b: b is {bad}, expected a number, 0 or more"));
        }
        assert!(message("[]", size).contains("no JSON object"));
        assert!(message("{", size).contains("not JSON"));
        assert!(message("{} x", size).contains("not JSON"));
        let deep = "[".repeat(100_000);
        assert!(message(&format!(r#"{{"a": {deep}"#), size).contains("not JSON"));
    }

    #[test]
    fn long_values_are_shown_shortened() {
        let long = format!("{{\"a\": \"{}\"}}", "é\\n".repeat(500));
        let found = message(&long, |body| body.size("a", 0, 1).map(drop));
        assert!(found.chars().count() < 140, "{found}");
    }
}
