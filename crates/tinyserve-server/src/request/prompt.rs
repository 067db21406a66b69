//! The prompt of a completion: a text, texts, token ids, or lists of token ids.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};

use super::body::Body;
use crate::error::ApiError;

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// Text that is still to be tokenised.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
}

const FIELD: &str = "prompt";

/// The prompts of `body`, at most `most`; at least one.
pub(super) fn read(body: &Body<'_>, most: usize) -> Result<Vec<Prompt>, ApiError> {
    let expected = "a text, a list of texts, a list of token ids or a list of such lists";
    let wrong = || body.error(FIELD, expected);
    let json = body.get(FIELD).ok_or_else(wrong)?.get();
    // What the first element is decides what all of them must be.
    let inner = json.trim_start_matches('[').trim_start();
    let brackets =
        json.bytes().filter(|byte| !byte.is_ascii_whitespace()).take_while(|&b| b == b'[');
    let prompts: Vec<Prompt> = match (brackets.count(), inner.as_bytes().first()) {
        (0, Some(b'"')) => vec![Prompt::Text(parse(json).ok_or_else(wrong)?)],
        (1, Some(b'"')) => {
            let texts: List<String> = parse_list(json, most).ok_or_else(wrong)?;
            texts.within(body, most)?.into_iter().map(Prompt::Text).collect()
        }
        (1, Some(b'0'..=b'9')) => vec![Prompt::Tokens(parse(json).ok_or_else(wrong)?)],
        (2, _) => {
            let lists: List<Vec<u32>> = parse_list(json, most).ok_or_else(wrong)?;
            lists.within(body, most)?.into_iter().map(Prompt::Tokens).collect()
        }
        _ => return Err(wrong()),
    };
    let empty = |prompt: &Prompt| match prompt {
        // A text may still get a token in front.
        Prompt::Text(_) => false,
        Prompt::Tokens(tokens) => tokens.is_empty(),
    };
    if prompts.is_empty() || prompts.iter().any(empty) {
        return Err(ApiError::field(FIELD, "prompt is empty, expected at least one token"));
    }
    Ok(prompts)
}

fn parse<'de, T: Deserialize<'de>>(json: &'de str) -> Option<T> {
    serde_json::from_str(json).ok()
}

/// A list that is not read further than one element beyond its limit.
struct List<T> {
    items: Vec<T>,
}

impl<T> List<T> {
    fn within(self, body: &Body<'_>, most: usize) -> Result<Vec<T>, ApiError> {
        if self.items.len() > most {
            let expected = format!("at most {most} prompts in one request");
            return Err(body.error(FIELD, &expected));
        }
        Ok(self.items)
    }
}

fn parse_list<'de, T: Deserialize<'de>>(json: &'de str, most: usize) -> Option<List<T>> {
    struct Bounded<T>(usize, PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Bounded<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
            let mut items = Vec::new();
            while let Some(item) = sequence.next_element()? {
                items.push(item);
                if items.len() > self.0 {
                    while sequence.next_element::<serde::de::IgnoredAny>()?.is_some() {}
                    break;
                }
            }
            Ok(items)
        }
    }

    let mut reader = serde_json::Deserializer::from_str(json);
    let items = reader.deserialize_seq(Bounded(most, PhantomData)).ok()?;
    reader.end().ok()?;
    Some(List { items })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(json: &str) -> Result<Vec<Prompt>, String> {
        let body = format!(r#"{{"prompt": {json}}}"#);
        let body = Body::parse(body.as_bytes(), &["prompt"]).map_err(|e| e.message().to_owned())?;
        read(&body, 3).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn all_four_forms_are_read() {
        let text = |text: &str| Prompt::Text(text.to_owned());
        assert_eq!(prompts(r#""a""#), Ok(vec![text("a")]));
        assert_eq!(prompts(r#" [ "a", "b\n" ]"#), Ok(vec![text("a"), text("b\n")]));
        assert_eq!(prompts("[1, 2]"), Ok(vec![Prompt::Tokens(vec![1, 2])]));
        assert_eq!(
            prompts("[ [1], [2, 3]]"),
            Ok(vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])])
        );
        assert_eq!(prompts(r#""""#), Ok(vec![text("")]));
    }

    #[test]
    fn everything_else_is_refused() {
        for json in [
            "null",
            "3",
            "true",
            "{}",
            "[1, \"a\"]",
            "[\"a\", 1]",
            "[-1]",
            "[1.5]",
            "[[[1]]]",
            "[[1], 2]",
            "[4294967296]",
            "[{}]",
            "[null]",
        ] {
            let message = prompts(json).unwrap_err();
            assert!(message.contains("a list of token ids"), "{json}: {message}");
        }
        for json in ["[]", "[[]]", "[[1], []]"] {
            let message = prompts(json).unwrap_err();
            assert!(message.contains("prompt is"), "{json}: {message}");
        }
        for json in ["[\"a\",\"a\",\"a\",\"a\",5]", "[[1],[1],[1],[1]]"] {
            assert!(prompts(json).unwrap_err().contains("at most 3 prompts"));
        }
    }
}
