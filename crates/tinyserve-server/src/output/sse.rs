//! An answer as a stream of server-sent events.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::{ChoiceEvent, Output};
use crate::engine::Choices;
use crate::error::ApiError;
use crate::request::StreamSettings;

/// Bytes after which what is there is sent before more is written.
const FULL: usize = 64 << 10;

/// Turns the events of a request's choices into the text of a stream.
///
/// A client that goes away drops the stream, and the stream drops the choices, which ends them.
pub(crate) struct EventStream<O> {
    output: O,
    choices: Choices,
    settings: StreamSettings,
    begun: bool,
    done: bool,
    keep_alive: Interval,
}

impl<O: Output> EventStream<O> {
    /// A stream that gets a comment after `keep_alive` without an event.
    pub(crate) fn new(
        output: O,
        choices: Choices,
        settings: StreamSettings,
        keep_alive: Duration,
    ) -> Self {
        let mut keep_alive = interval(keep_alive);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first tick comes at once.
        keep_alive.reset();
        Self { output, choices, settings, begun: false, done: false, keep_alive }
    }

    /// Writes what `event` leads to.
    fn take(&mut self, index: usize, event: ChoiceEvent, out: &mut String) {
        if let ChoiceEvent::Failed(error) = &event {
            self.fail(error, out);
        } else {
            self.output.event(index, event, out);
        }
    }

    /// Tells what went wrong, and that nothing follows.
    fn fail(&mut self, error: &ApiError, out: &mut String) {
        out.push_str("data: ");
        out.push_str(&error.to_json());
        out.push_str("\n\n");
        self.choices.end();
        self.finish(out);
    }

    fn finish(&mut self, out: &mut String) {
        out.push_str("data: [DONE]\n\n");
        self.done = true;
    }
}

// Nothing here is pinned in place.
impl<O> Unpin for EventStream<O> {}

impl<O: Output> Stream for EventStream<O> {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.done {
            return Poll::Ready(None);
        }
        let mut out = String::new();
        if !std::mem::replace(&mut this.begun, true) {
            this.output.begin(&mut out);
        }
        while !this.done && out.len() < FULL {
            match this.choices.poll_next(cx) {
                Poll::Ready(Some((index, event))) => this.take(index, event, &mut out),
                Poll::Ready(None) => {
                    if this.settings.include_usage {
                        this.output.usage_chunk(&mut out);
                    }
                    this.finish(&mut out);
                }
                Poll::Pending => break,
            }
        }
        if out.is_empty() {
            if this.keep_alive.poll_tick(cx).is_pending() {
                return Poll::Pending;
            }
            out.push_str(": ping\n\n");
        } else {
            this.keep_alive.reset();
        }
        Poll::Ready(Some(Ok(out.into())))
    }
}
