//! Channels from an engine to its callers, who may block, poll or await.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::{Event, Failure, FailureKind, RequestId};

/// Items in order, from one sender to one receiver.
#[derive(Debug)]
struct Channel<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
}

#[derive(Debug)]
struct State<T> {
    items: VecDeque<T>,
    waker: Option<Waker>,
    /// The sender is gone.
    closed: bool,
}

impl<T> Channel<T> {
    fn new() -> Arc<Self> {
        let state = State { items: VecDeque::new(), waker: None, closed: false };
        Arc::new(Self { state: Mutex::new(state), arrived: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing that panics runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State<T>)) {
        let waker = {
            let mut state = self.lock();
            change(&mut state);
            state.waker.take()
        };
        self.arrived.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The next item; `Ok(None)` when there will be none, `Err` when there is none until `deadline`.
    fn receive(&self, deadline: Option<Instant>) -> Result<Option<T>, ()> {
        let mut state = self.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                return Ok(Some(item));
            }
            if state.closed {
                return Ok(None);
            }
            let Some(deadline) = deadline else {
                state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(());
            }
            let waited = self.arrived.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn poll(&self, context: &Context<'_>) -> Poll<Option<T>> {
        let mut state = self.lock();
        match state.items.pop_front() {
            Some(item) => Poll::Ready(Some(item)),
            None if state.closed => Poll::Ready(None),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// The events of one request, ending with exactly one terminal event.
///
/// Blocking callers iterate; async callers await [`Self::poll_next`] through `poll_fn`. Dropping the
/// stream before the terminal event aborts the request.
pub struct EventStream {
    id: RequestId,
    channel: Arc<Channel<Event>>,
    abort: Box<dyn Fn() + Send + Sync>,
    ended: bool,
}

impl std::fmt::Debug for EventStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventStream").field("id", &self.id).finish_non_exhaustive()
    }
}

impl EventStream {
    /// The request's number.
    #[must_use]
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Asks the engine to end the request; the stream then ends with [`Event::Aborted`], unless
    /// the request ended otherwise before.
    pub fn abort(&self) {
        (self.abort)();
    }

    /// The next event, waiting at most `timeout`; `None` when there was none in time, or none will
    /// come.
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<Event> {
        let event = self.channel.receive(Some(Instant::now() + timeout)).ok().flatten();
        self.note(event)
    }

    /// The next event, if one is there.
    pub fn try_next(&mut self) -> Option<Event> {
        self.next_timeout(Duration::ZERO)
    }

    /// The next event for async callers; `Ready(None)` after the terminal one.
    ///
    /// Any executor will do: the engine wakes the context's waker.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.channel.poll(context).map(|event| self.note(event))
    }

    fn note(&mut self, event: Option<Event>) -> Option<Event> {
        self.ended |= event.as_ref().is_some_and(Event::is_terminal);
        event
    }
}

impl Iterator for EventStream {
    type Item = Event;

    /// Waits for the next event; `None` after the terminal one.
    fn next(&mut self) -> Option<Event> {
        let event = self.channel.receive(None).ok().flatten();
        self.note(event)
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        if !self.ended {
            self.abort();
        }
    }
}

/// The engine's end of an [`EventStream`].
#[derive(Debug)]
pub(crate) struct EventSender(Option<Arc<Channel<Event>>>);

impl EventSender {
    /// Tells what is not the end.
    pub(crate) fn send(&self, event: Event) {
        debug_assert!(!event.is_terminal(), "{event:?} ends a stream");
        if let Some(channel) = &self.0 {
            channel.change(|state| state.items.push_back(event));
        }
    }

    /// Tells the end.
    pub(crate) fn finish(mut self, event: Event) {
        debug_assert!(event.is_terminal(), "{event:?} ends no stream");
        self.close(event);
    }

    fn close(&mut self, event: Event) {
        if let Some(channel) = self.0.take() {
            channel.change(|state| {
                state.items.push_back(event);
                state.closed = true;
            });
        }
    }
}

impl Drop for EventSender {
    /// Whoever waits is told, whatever became of the engine.
    fn drop(&mut self) {
        self.close(Event::Failed(Failure {
            kind: FailureKind::EngineStopped,
            sentence: "the engine stopped before the request ended".to_owned(),
        }));
    }
}

/// Both ends of a request's events; `abort` is called when its caller loses interest.
pub(crate) fn events(
    id: RequestId,
    abort: impl Fn() + Send + Sync + 'static,
) -> (EventSender, EventStream) {
    let channel = Channel::new();
    let sender = EventSender(Some(Arc::clone(&channel)));
    (sender, EventStream { id, channel, abort: Box::new(abort), ended: false })
}

/// An answer of an engine that is still to come: [`Self::wait`] for it or await it.
///
/// `None` means that the engine has stopped.
#[derive(Debug)]
pub struct Reply<T> {
    /// Answers that are still to come.
    open: Vec<Arc<Channel<T>>>,
    answers: Vec<T>,
    /// Makes one answer of those of several threads.
    merge: fn(Vec<T>) -> T,
}

impl<T> Reply<T> {
    /// One answer of several; threads that have stopped give none.
    pub(crate) fn merged(replies: impl Iterator<Item = Self>, merge: fn(Vec<T>) -> T) -> Self {
        let open = replies.flat_map(|reply| reply.open).collect();
        Self { open, answers: Vec::new(), merge }
    }

    /// Waits for the answer.
    #[must_use]
    pub fn wait(mut self) -> Option<T> {
        for channel in std::mem::take(&mut self.open) {
            self.answers.extend(channel.receive(None).ok().flatten());
        }
        self.answer()
    }

    /// Waits for the answer for at most `timeout`; the error is this reply, to be waited for again.
    ///
    /// # Errors
    /// When there is no answer in time.
    pub fn wait_timeout(mut self, timeout: Duration) -> Result<Option<T>, Self> {
        let deadline = Instant::now() + timeout;
        while let Some(channel) = self.open.last() {
            let Ok(answer) = channel.receive(Some(deadline)) else { return Err(self) };
            self.answers.extend(answer);
            self.open.pop();
        }
        Ok(self.answer())
    }

    fn answer(&mut self) -> Option<T> {
        let answers = std::mem::take(&mut self.answers);
        (!answers.is_empty()).then(|| (self.merge)(answers))
    }
}

// Nothing in it is pinned.
impl<T> Unpin for Reply<T> {}

impl<T> Future for Reply<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let Self { open, answers, .. } = &mut *self;
        open.retain(|channel| match channel.poll(context) {
            Poll::Ready(answer) => {
                answers.extend(answer);
                false
            }
            Poll::Pending => true,
        });
        if self.open.is_empty() { Poll::Ready(self.answer()) } else { Poll::Pending }
    }
}

/// The engine's end of a [`Reply`].
#[derive(Debug)]
pub(crate) struct Responder<T>(Arc<Channel<T>>);

impl<T> Responder<T> {
    pub(crate) fn send(self, answer: T) {
        self.0.change(|state| state.items.push_back(answer));
    }
}

impl<T> Drop for Responder<T> {
    fn drop(&mut self) {
        self.0.change(|state| state.closed = true);
    }
}

/// Both ends of an answer.
pub(crate) fn reply<T>() -> (Responder<T>, Reply<T>) {
    let channel = Channel::new();
    let one = |mut answers: Vec<T>| answers.swap_remove(0);
    (
        Responder(Arc::clone(&channel)),
        Reply { open: vec![channel], answers: Vec::new(), merge: one },
    )
}
