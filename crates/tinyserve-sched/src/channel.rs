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
    /// Whether the waker sleeps until the sender is gone.
    wakes_at_end: bool,
    /// Whether a thread waits for an item: telling nobody would be a system call all the same.
    blocked: bool,
    /// The sender is gone.
    closed: bool,
}

impl<T> Channel<T> {
    fn new() -> Arc<Self> {
        let state = State {
            items: VecDeque::new(),
            waker: None,
            wakes_at_end: false,
            blocked: false,
            closed: false,
        };
        Arc::new(Self { state: Mutex::new(state), arrived: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing that panics runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State<T>)) {
        let (blocked, waker) = {
            let mut state = self.lock();
            change(&mut state);
            let wakes = state.closed || !state.wakes_at_end;
            (state.blocked, if wakes { state.waker.take() } else { None })
        };
        if blocked {
            self.arrived.notify_one();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The next item; `Ok(None)` when there will be none, `Err` when there is none until `deadline`.
    fn receive(&self, deadline: Option<Instant>) -> Result<Option<T>, ()> {
        let mut state = self.lock();
        loop {
            state.blocked = false;
            if let Some(item) = state.items.pop_front() {
                return Ok(Some(item));
            }
            if state.closed {
                return Ok(None);
            }
            state.blocked = true;
            let Some(deadline) = deadline else {
                state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.blocked = false;
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

/// When `timeout` is over; `None` beyond all times.
fn deadline(timeout: Duration) -> Option<Instant> {
    Instant::now().checked_add(timeout)
}

/// The events of one request, ending with exactly one terminal event.
///
/// Blocking callers iterate; async callers await [`Self::poll_next`] through `poll_fn`. Dropping the
/// stream before the terminal event aborts the request.
pub struct EventStream {
    id: RequestId,
    replica: usize,
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

    /// The replica of the engine that answers it, 0 where there is one alone.
    #[must_use]
    pub fn replica(&self) -> usize {
        self.replica
    }

    pub(crate) fn of_replica(mut self, replica: usize) -> Self {
        self.replica = replica;
        self
    }

    /// Asks the engine to end the request; the stream then ends with [`Event::Aborted`], unless
    /// the request ended otherwise before.
    pub fn abort(&self) {
        (self.abort)();
    }

    /// The next event, waiting at most `timeout`; `None` when there was none in time, or none will
    /// come.
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<Event> {
        let event = self.channel.receive(deadline(timeout)).ok().flatten();
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

    /// Lets an async caller that has use for the whole answer only sleep until it is there: events
    /// before the terminal one wake nobody.
    pub fn wake_at_end(&mut self) {
        self.channel.lock().wakes_at_end = true;
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
///
/// What it is given is heard when [`Self::tell`] is called: once a step, for all of the step's
/// events, so that the threads of callers are woken together and not in the middle of it.
#[derive(Debug)]
pub(crate) struct EventSender {
    channel: Arc<Channel<Event>>,
    untold: Vec<Event>,
    ended: bool,
}

impl EventSender {
    /// Notes what is not the end.
    pub(crate) fn send(&mut self, event: Event) {
        debug_assert!(!event.is_terminal(), "{event:?} ends a stream");
        self.untold.push(event);
    }

    /// Tells what was noted.
    pub(crate) fn tell(&mut self) {
        if !self.untold.is_empty() {
            let Self { channel, untold, .. } = self;
            channel.change(|state| state.items.extend(untold.drain(..)));
        }
    }

    /// Tells the end, and before it what was noted.
    pub(crate) fn finish(mut self, event: Event) {
        debug_assert!(event.is_terminal(), "{event:?} ends no stream");
        self.close(event);
    }

    fn close(&mut self, event: Event) {
        if !std::mem::replace(&mut self.ended, true) {
            let Self { channel, untold, .. } = self;
            channel.change(|state| {
                state.items.extend(untold.drain(..).chain([event]));
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
    let sender = EventSender { channel: Arc::clone(&channel), untold: Vec::new(), ended: false };
    (sender, EventStream { id, replica: 0, channel, abort: Box::new(abort), ended: false })
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
        let deadline = deadline(timeout);
        while let Some(channel) = self.open.last() {
            let Ok(answer) = channel.receive(deadline) else { return Err(self) };
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;
    use crate::Summary;

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Bell(AtomicUsize);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Bell {
        fn rung(&self) -> usize {
            self.0.swap(0, Ordering::Relaxed)
        }
    }

    fn progress(done: usize) -> Event {
        Event::Prefill { done, total: 9 }
    }

    #[test]
    fn what_is_told_together_wakes_once() {
        let (mut sender, mut stream) = events(RequestId(1), || ());
        let bell = Arc::<Bell>::default();
        let waker = Arc::clone(&bell).into();
        let mut context = Context::from_waker(&waker);
        assert!(stream.poll_next(&mut context).is_pending());
        sender.send(progress(1));
        sender.send(progress(2));
        assert_eq!((bell.rung(), stream.try_next()), (0, None));
        sender.tell();
        sender.tell();
        assert_eq!(bell.rung(), 1);
        sender.finish(Event::Aborted(Summary::default()));
        let told: Vec<_> = stream.collect();
        assert_eq!(told, [progress(1), progress(2), Event::Aborted(Summary::default())]);
    }

    #[test]
    fn who_waits_for_the_end_is_woken_by_the_end() {
        let aborts = Arc::<AtomicUsize>::default();
        let on_abort = {
            let aborts = Arc::clone(&aborts);
            move || {
                aborts.fetch_add(1, Ordering::Relaxed);
            }
        };
        let (mut sender, mut stream) = events(RequestId(1), on_abort.clone());
        let bell = Arc::<Bell>::default();
        let waker = Arc::clone(&bell).into();
        let mut context = Context::from_waker(&waker);
        stream.wake_at_end();
        assert!(stream.poll_next(&mut context).is_pending());
        for done in 1..4 {
            sender.send(progress(done));
            sender.tell();
        }
        assert_eq!(bell.rung(), 0);
        sender.finish(Event::Aborted(Summary::default()));
        assert_eq!(bell.rung(), 1);
        for done in 1..4 {
            assert_eq!(stream.poll_next(&mut context), Poll::Ready(Some(progress(done))));
        }
        assert!(stream.by_ref().last().is_some_and(|event| event.is_terminal()));
        drop(stream);
        assert_eq!(aborts.load(Ordering::Relaxed), 0);

        // One that loses interest before the end is still heard.
        let (sender, mut stream) = events(RequestId(2), on_abort);
        stream.wake_at_end();
        drop(stream);
        assert_eq!(aborts.load(Ordering::Relaxed), 1);
        drop(sender);
    }
}
