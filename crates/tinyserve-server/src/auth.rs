//! Who may ask: keys, compared in constant time.

use axum::http::{HeaderMap, Method, header};
use constant_time_eq::constant_time_eq_32;
use sha2::{Digest, Sha256};

use crate::error::ApiError;

/// Paths that need no key: what load balancers and monitors ask for, and the page, which is the
/// same for everybody and asks for a key itself.
const OPEN: &[&str] = &["/", "/health", "/ping", "/metrics", "/version"];

/// The keys of a server; none lets everybody in.
#[derive(Clone, Default)]
pub(crate) struct Keys {
    // Only digests are kept and compared: neither time nor memory tells a key or its length.
    digests: Vec<[u8; 32]>,
}

impl Keys {
    /// The keys that are accepted.
    pub(crate) fn new(keys: &[String]) -> Self {
        Self { digests: keys.iter().map(|key| digest(key.as_bytes())).collect() }
    }

    /// Whether a request may go on.
    ///
    /// # Errors
    /// 401 when a key is needed and there is none, or a wrong one.
    pub(crate) fn check(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<(), ApiError> {
        if self.digests.is_empty() || *method == Method::OPTIONS || OPEN.contains(&path) {
            return Ok(());
        }
        match key(headers) {
            Some(key) if self.holds(key) => Ok(()),
            Some(_) => Err(ApiError::unauthorised("the API key is not one of this server's")),
            None => Err(ApiError::unauthorised(
                "there is no API key, expected a header `Authorization: Bearer KEY` or \
                 `x-api-key: KEY`",
            )),
        }
    }

    fn holds(&self, key: &[u8]) -> bool {
        let found = digest(key);
        // Every digest is compared: which one fits must not show either.
        self.digests.iter().fold(false, |fits, one| constant_time_eq_32(one, &found) | fits)
    }
}

fn key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let value = value.as_bytes();
        let (scheme, key) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    let key = bearer.filter(|key| !key.is_empty());
    key.or_else(|| headers.get("x-api-key").map(|value| value.as_bytes().trim_ascii()))
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(keys: &[&str], path: &str, header: Option<(&'static str, &str)>) -> bool {
        let keys: Vec<String> = keys.iter().map(|&key| key.to_owned()).collect();
        let mut headers = HeaderMap::new();
        headers.extend(header.map(|(name, value)| {
            (axum::http::HeaderName::from_static(name), value.parse().unwrap())
        }));
        Keys::new(&keys).check(&Method::GET, path, &headers).is_ok()
    }

    #[test]
    fn any_of_the_keys_opens_and_nothing_else_does() {
        let keys = ["first", "second"];
        for value in ["Bearer first", "bearer second", "BEARER  first "] {
            assert!(check(&keys, "/v1/models", Some(("authorization", value))), "{value}");
        }
        assert!(check(&keys, "/v1/models", Some(("x-api-key", "second"))));
        for value in ["Bearer", "Bearer ", "Bearer firs", "Bearer firstx", "Basic first", "first"] {
            assert!(!check(&keys, "/v1/models", Some(("authorization", value))), "{value}");
        }
        assert!(!check(&keys, "/v1/models", None));
        assert!(!check(&keys, "/tokenize", None));
    }

    #[test]
    fn monitors_need_no_key_and_without_keys_nobody_does() {
        for path in ["/", "/health", "/metrics", "/version"] {
            assert!(check(&["key"], path, None), "{path}");
        }
        for path in ["/health/", "/metrics/../v1/models", "//health"] {
            assert!(!check(&["key"], path, None), "{path}");
        }
        assert!(check(&[], "/v1/models", None));
    }
}
