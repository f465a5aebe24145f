//! `/events`: server-sent events (HTML standard, section 9.2) for the live page.
//!
//! State changes ten times a second and a census once a second, each made once for all viewers. Must not know: what the
//! events mean.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::Readiness;
use super::peers::Peer;
use super::routes::Body;
use crate::kernel::clock;
use crate::live::Viewer;
use crate::shutdown::Stop;
use crate::source::{NoAnswer, Source};

/// So many may look at a time: their connections come out of those of the web side, and scrapers need the rest.
const VIEWERS: usize = 16;

const FULL: NoAnswer = NoAnswer::Unavailable("16 viewers already: close one, or try again\n");

/// How often viewers are told of state changes, at most.
const BATCH: Duration = Duration::from_millis(100);

/// How often the sockets are counted for them; less often where the table is so large that counting would take more than
/// one part in `DUTY` of a core, but not less than every `SELDOM`.
const CENSUS: Duration = Duration::from_secs(1);
const DUTY: u32 = 50;
const SELDOM: Duration = Duration::from_secs(5);

/// For so long after the last viewer has left, state changes are kept for it to come back.
const LINGER: Duration = Duration::from_secs(30);

/// What a viewer is told first: when to come back after the connection broke, in milliseconds.
const RETRY: &str = "retry: 1000\n\n";

/// What a viewer is told last, where there is time for it.
const END: &str = "event: end\ndata: {}\n\n";

/// The streams of one web side.
pub(super) struct Events {
    source: Arc<dyn Source>,
    readiness: Readiness,
    stop: Stop,
    seats: Arc<Semaphore>,
    came: Notify,
    /// The last census as an event; empty where that is not of now.
    census: watch::Sender<Bytes>,
}

impl Events {
    pub(super) fn new(source: Arc<dyn Source>, readiness: Readiness, stop: Stop) -> Events {
        let seats = Arc::new(Semaphore::new(VIEWERS));
        Events { source, readiness, stop, seats, came: Notify::new(), census: watch::Sender::default() }
    }

    /// A stream for one more viewer, from where it left: by the browser's header, or by `?after=` where a page begins
    /// again by itself.
    pub(super) fn begin(&self, request: &Request<Incoming>, peer: &Arc<Peer>) -> Result<Body, NoAnswer> {
        let asked = match request.uri().query().filter(|query| !query.is_empty()) {
            Some(query) => Some(query.strip_prefix("after=").ok_or(NoAnswer::Question("known: after=ID\n"))?),
            None => None,
        };
        let seat = Arc::clone(&self.seats).try_acquire_owned().map_err(|_| FULL)?;
        if request.method() == Method::HEAD {
            return Ok(Empty::new().boxed_unsync());
        }
        let after = request.headers().get("last-event-id").map(|id| id.to_str().unwrap_or_default()).or(asked);
        let mut census = self.census.subscribe();
        census.mark_changed();
        let stream = Stream {
            viewer: self.source.live().view(after),
            census,
            peer: Arc::clone(peer),
            stop: self.stop.clone(),
            next: Next::Retry,
            _seat: seat,
        };
        self.came.notify_one();
        let frames = stream::unfold(stream, |mut stream| async {
            let event = stream.event().await?;
            Some((Ok::<_, Infallible>(Frame::data(event)), stream))
        });
        Ok(BodyExt::boxed_unsync(StreamBody::new(frames)))
    }

    /// Makes the events while somebody looks, until the end.
    pub(super) async fn feed(&self) {
        loop {
            tokio::select! {
                () = self.came.notified() => {}
                () = self.stop.begun() => return,
            }
            tokio::select! {
                () = self.feed_changes() => {}
                () = self.feed_census() => {}
                () = self.stop.begun() => return,
            }
            self.source.live().rest();
        }
    }

    /// Returns when nobody has looked for a while.
    async fn feed_changes(&self) {
        let live = self.source.live();
        // Late ticks are not made up for: there are never more than so many a second.
        let mut ticks = interval(BATCH);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seen = Instant::now();
        while seen.elapsed() < LINGER {
            ticks.tick().await;
            if live.viewers() > 0 {
                seen = Instant::now();
            }
            live.gather(clock::monotonic(), clock::unix());
        }
    }

    async fn feed_census(&self) {
        loop {
            let (began, ready) = (Instant::now(), self.readiness.get());
            let event = if self.source.live().viewers() > 0 { self.count().await } else { Bytes::new() };
            let due = began + (began.elapsed() * DUTY).clamp(CENSUS, SELDOM);
            self.census.send_replace(event);
            // A drain may be over soon: it is told of at once.
            while Instant::now() < due && self.readiness.get() == ready {
                sleep_until(due.min(Instant::now() + BATCH)).await;
            }
        }
    }

    /// A census, whether this process takes work, and what was lost so far.
    async fn count(&self) -> Bytes {
        let sockets = self.source.sockets(None).await.ok().and_then(|json| String::from_utf8(json).ok());
        let lost: serde_json::Map<_, _> =
            self.source.lost().into_iter().map(|(what, count)| (what.to_owned(), count.into())).collect();
        Bytes::from(format!(
            "event: sockets\ndata: {{\"at\":{:.3},\"ready\":{},\"lost\":{},\"sockets\":{}}}\n\n",
            clock::unix().as_secs_f64(),
            self.readiness.get(),
            serde_json::Value::Object(lost),
            // Nobody knows, where the table cannot be read.
            sockets.as_deref().unwrap_or("null"),
        ))
    }
}

/// One viewer's stream. Dropped with its connection.
struct Stream {
    viewer: Viewer,
    census: watch::Receiver<Bytes>,
    peer: Arc<Peer>,
    stop: Stop,
    next: Next,
    _seat: OwnedSemaphorePermit,
}

enum Next {
    Retry,
    Event,
    Nothing,
}

impl Stream {
    /// The next event, once the one before is taken; `None` after the last.
    async fn event(&mut self) -> Option<Bytes> {
        // Who takes nothing stops asking for more, and is shown out as anybody who is silent.
        self.peer.stirs();
        match self.next {
            Next::Retry => {
                self.next = Next::Event;
                return Some(Bytes::from_static(RETRY.as_bytes()));
            }
            Next::Event => {}
            Next::Nothing => return None,
        }
        loop {
            tokio::select! {
                biased;
                () = self.stop.begun() => {
                    self.next = Next::Nothing;
                    return Some(Bytes::from_static(END.as_bytes()));
                }
                event = self.viewer.next() => return Some(event),
                changed = self.census.changed() => {
                    changed.ok()?;
                    let event = self.census.borrow_and_update().clone();
                    if !event.is_empty() {
                        return Some(event);
                    }
                }
            }
        }
    }
}
