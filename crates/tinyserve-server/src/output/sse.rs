//! An answer as a stream of server-sent events.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::{ChoiceEvent, Output};
use crate::request::StreamSettings;

/// Bytes after which what is there is sent before more is written.
const FULL: usize = 64 << 10;

/// Turns the events of a request's choices into the text of a stream.
///
/// Whatever `running` is, it lives as long as the stream: a client that goes away drops the
/// stream, and the stream drops it.
pub(crate) struct EventStream<O, R> {
    output: O,
    events: UnboundedReceiver<(usize, ChoiceEvent)>,
    settings: StreamSettings,
    /// Choices that have not ended.
    open: usize,
    begun: bool,
    done: bool,
    keep_alive: Interval,
    running: Option<R>,
}

impl<O: Output, R> EventStream<O, R> {
    /// A stream over `choices` choices; `running` is dropped when it ends.
    pub(crate) fn new(
        output: O,
        events: UnboundedReceiver<(usize, ChoiceEvent)>,
        choices: usize,
        settings: StreamSettings,
        (keep_alive, running): (Duration, R),
    ) -> Self {
        let mut keep_alive = interval(keep_alive);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first tick comes at once.
        keep_alive.reset();
        Self {
            output,
            events,
            settings,
            open: choices,
            begun: false,
            done: false,
            keep_alive,
            running: Some(running),
        }
    }

    /// Writes what `event` leads to.
    fn take(&mut self, index: usize, event: ChoiceEvent, out: &mut String) {
        if let ChoiceEvent::Failed(error) = &event {
            out.push_str("data: ");
            out.push_str(&error.to_json());
            out.push_str("\n\n");
            return self.end(out);
        }
        let ends = matches!(event, ChoiceEvent::End(_));
        self.output.event(index, event, out);
        if ends {
            self.open -= 1;
            if self.open == 0 {
                if self.settings.include_usage {
                    self.output.usage_chunk(out);
                }
                self.end(out);
            }
        }
    }

    fn end(&mut self, out: &mut String) {
        out.push_str("data: [DONE]\n\n");
        self.done = true;
        self.running = None;
    }
}

// Nothing here is pinned in place.
impl<O, R> Unpin for EventStream<O, R> {}

impl<O: Output, R> Stream for EventStream<O, R> {
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
            match this.events.poll_recv(cx) {
                Poll::Ready(Some((index, event))) => this.take(index, event, &mut out),
                Poll::Ready(None) => {
                    let error = crate::error::ApiError::unavailable("the engine stopped");
                    this.take(0, ChoiceEvent::Failed(error), &mut out);
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
