//! Connections: accepted, bounded in number, header size and time, and closed in order.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::stream::{Patient, Stream};
use crate::{ServerConfig, ServerError};

/// Bytes of a request's line and headers together that are waited for: what comes in one piece with
/// the last of them may be as much again.
const MOST_HEADER_BYTES: usize = 64 << 10;
/// Headers of a request.
const MOST_HEADERS: usize = 100;
/// How long to wait after an error of accept that is no client's fault, such as too many open
/// files.
const PAUSE: Duration = Duration::from_millis(50);

/// A bound socket.
pub(crate) enum Listener {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(tokio::net::UnixListener, PathBuf),
}

impl Listener {
    /// Binds what `config` asks for.
    pub(crate) async fn bind(config: &ServerConfig) -> Result<Self, ServerError> {
        #[cfg(unix)]
        if let Some(path) = &config.uds {
            return unix(path);
        }
        let bound = TcpListener::bind((config.host.as_str(), config.port)).await;
        bound.map(Self::Tcp).map_err(|error| ServerError::Bind {
            address: format!("{}:{}", config.host, config.port),
            reason: error.to_string(),
        })
    }

    /// The address in words that a client can use.
    pub(crate) fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => listener.local_addr().map_or_else(
                |_| "http://?".to_owned(),
                |address: SocketAddr| format!("http://{address}"),
            ),
            #[cfg(unix)]
            Self::Unix(_, path) => format!("unix:{}", path.display()),
        }
    }

    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // A token is sent when it is there, not when a packet is full.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            #[cfg(unix)]
            Self::Unix(listener, _) => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

#[cfg(unix)]
impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Nobody can be told any more.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A Unix socket; one that a server left behind is replaced, one that a server listens on is not.
#[cfg(unix)]
fn unix(path: &Path) -> Result<Listener, ServerError> {
    use std::os::unix::fs::FileTypeExt;
    let refused =
        |reason: String| ServerError::Bind { address: path.display().to_string(), reason };
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return Err(refused("there is a file that is no socket".to_owned()));
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(refused("another server listens on it".to_owned()));
        }
        std::fs::remove_file(path).map_err(|error| refused(error.to_string()))?;
    }
    let listener = tokio::net::UnixListener::bind(path).map_err(|error| refused(error.to_string()));
    Ok(Listener::Unix(listener?, path.to_owned()))
}

/// Answers connections with `router` until `closing` turns true, and then until those that are
/// open have been answered.
pub(crate) async fn serve(
    listener: Listener,
    router: Router,
    config: &ServerConfig,
    mut closing: watch::Receiver<bool>,
) {
    let most = config.max_connections.min(Semaphore::MAX_PERMITS);
    let places = Arc::new(Semaphore::new(most));
    let patience = Duration::from_secs_f64(config.write_timeout);
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs_f64(config.header_timeout))
        .max_headers(MOST_HEADERS)
        .max_buf_size(MOST_HEADER_BYTES);
    while !*closing.borrow_and_update() {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            _ = closing.changed() => continue,
        };
        // The semaphore is never closed.
        let Ok(place) = place else { break };
        let stream = tokio::select! {
            stream = listener.accept() => stream,
            _ = closing.changed() => continue,
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                if !is_the_clients(&error) {
                    tokio::time::sleep(PAUSE).await;
                }
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        let connection =
            builder.serve_connection(TokioIo::new(Patient::new(stream, patience)), service);
        let mut closing = closing.clone();
        tokio::spawn(async move {
            let mut connection = pin!(connection);
            loop {
                tokio::select! {
                    // An error here is a client that went away or spoke no HTTP; it was told.
                    _ = connection.as_mut() => break,
                    changed = closing.changed() => {
                        connection.as_mut().graceful_shutdown();
                        if changed.is_err() {
                            let _ = connection.as_mut().await;
                            break;
                        }
                    }
                }
            }
            drop(place);
        });
    }
    drop(listener);
    // All places are free again when every connection has ended.
    let all = u32::try_from(most).unwrap_or(u32::MAX);
    let _ = places.acquire_many(all).await;
}

/// Whether an accepted connection broke before it was there.
fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
