//! An answer as a stream of server-sent events.

use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use tokio::time::{Instant, Interval, MissedTickBehavior, Sleep, interval, sleep};

use super::{ChoiceEvent, Output};
use crate::engine::Choices;
use crate::error::ApiError;
use crate::request::StreamSettings;

/// Bytes after which what is there is sent before more is written.
const FULL: usize = 64 << 10;
/// How long at most what follows a token waits for company. A small model draws several tokens meanwhile:
/// they leave in one write and wake their reader once, which costs as much as one token does.
const PAUSE: Duration = Duration::from_millis(4);

/// When the pause that begins at `now` ends: for all streams at once, so that their thread wakes up
/// once for all of them.
fn end_of_pause(now: Instant) -> Instant {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let into = now.duration_since(*START).as_nanos() % PAUSE.as_nanos();
    now + PAUSE - Duration::from_nanos(into as u64)
}

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
    pause: Pin<Box<Sleep>>,
    /// Whether `pause` runs. Nobody wakes the stream meanwhile but the timer.
    pausing: bool,
    /// Bytes of the longest chunk so far: the next one is likely to need as many.
    longest: usize,
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
        let pause = Box::pin(sleep(PAUSE));
        Self {
            output,
            choices,
            settings,
            begun: false,
            done: false,
            keep_alive,
            pause,
            pausing: false,
            longest: 0,
        }
    }

    /// Writes what `event` leads to.
    fn take(&mut self, index: usize, event: ChoiceEvent, out: &mut Vec<u8>) {
        if let ChoiceEvent::Failed(error) = &event {
            self.fail(error, out);
        } else {
            self.output.event(index, event, out);
        }
    }

    /// Tells what went wrong, and that nothing follows.
    fn fail(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(error.to_json().as_bytes());
        out.extend_from_slice(b"\n\n");
        self.choices.end();
        self.finish(out);
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: [DONE]\n\n");
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
        if this.pausing {
            ready!(this.pause.as_mut().poll(cx));
            this.pausing = false;
        }
        let mut out = Vec::new();
        if !std::mem::replace(&mut this.begun, true) {
            this.output.begin(&mut out);
        }
        let mut told = false;
        // Whoever is given a chunk comes again by itself: what happens until then wakes nobody.
        let mut nobody = Context::from_waker(Waker::noop());
        while !this.done && out.len() < FULL {
            let waiting = if out.is_empty() { &mut *cx } else { &mut nobody };
            match this.choices.poll_next(waiting) {
                Poll::Ready(Some((index, event))) => {
                    told = true;
                    out.reserve(this.longest.saturating_sub(out.len()));
                    this.take(index, event, &mut out);
                }
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
            out.extend_from_slice(b": ping\n\n");
        } else {
            this.keep_alive.reset();
            if told && !this.done {
                this.pause.as_mut().reset(end_of_pause(Instant::now()));
                this.pausing = true;
            }
        }
        this.longest = this.longest.max(out.len());
        Poll::Ready(Some(Ok(out.into())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_end_together() {
        // The first one is the beginning of time.
        end_of_pause(Instant::now());
        let now = Instant::now();
        let end = end_of_pause(now);
        assert!(end > now && end <= now + PAUSE);
        let short = (end - now) / 2;
        assert_eq!(end_of_pause(now + short), end);
        assert_eq!(end_of_pause(end), end + PAUSE);
    }
}
