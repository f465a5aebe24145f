//! What happens, for whoever looks: state changes in batches, the last of them kept for those who come back.
//!
//! The counters say how often each way was walked, exactly and whether anybody looks or not; the lines of single
//! changes are kept only while somebody does, and only so many a batch. Nobody waits for a viewer: who reads too slowly
//! skips, and is told how much. Must not know: HTTP, clocks, sockets.

mod batch;
mod viewer;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use crate::metrics::{LiveMetrics, Metrics, SurveyMetrics, Walk};
use crate::tcp::{Identity, Transition, Transitions};
use batch::{Batch, Place};
pub use viewer::Viewer;

/// So many changes of a batch are told one by one; the rest is counted.
pub const LINES: usize = 50;

/// So many batches are kept for those who come back.
pub const KEPT: usize = 100;

/// Who is further behind than so many batches goes on with the newest.
const BEHIND: usize = 20;

/// Tells how often each way was walked so far.
type Walked = Box<dyn Fn() -> Vec<(Walk, u64)> + Send + Sync>;

/// The feed of one process.
pub struct Live {
    /// The counters that say what was walked; `None` where no change is seen.
    walked: Option<Walked>,
    /// Whether it is this process's own connections that walk.
    lives: bool,
    gauges: LiveMetrics,
    /// Tells this process from the one before it.
    epoch: u64,
    /// Whether lines are kept. All that a state change looks at when nobody does.
    watched: AtomicBool,
    lines: Mutex<Vec<(Identity, Transition)>>,
    /// How many more there were.
    more: AtomicU64,
    told: Mutex<Told>,
    /// The number of the last batch: wakes the viewers.
    newest: watch::Sender<u64>,
}

/// What was told, and to how many.
#[derive(Default)]
struct Told {
    viewers: usize,
    /// Up to where.
    place: Place,
    walked: HashMap<Walk, u64>,
    batches: VecDeque<Batch>,
}

impl Live {
    /// A feed of what `metrics` count.
    #[must_use]
    pub fn of(metrics: &Arc<Metrics>) -> Live {
        let counters = Arc::clone(metrics);
        Live::new(Some(Box::new(move || counters.walked())), true, metrics.live.clone(), fastrand::u64(..))
    }

    /// A feed in a process that follows no lives: it tells of others' changes, where the kernel announces them, and otherwise
    /// has viewers and nothing to tell them here.
    #[must_use]
    pub fn of_others(metrics: &Arc<SurveyMetrics>) -> Live {
        let counters = Arc::clone(metrics);
        let walked: Option<Walked> = metrics.announces().then(|| Box::new(move || counters.walked()) as Walked);
        Live::new(walked, false, metrics.live.clone(), fastrand::u64(..))
    }

    fn new(walked: Option<Walked>, lives: bool, gauges: LiveMetrics, epoch: u64) -> Live {
        Live {
            walked,
            lives,
            gauges,
            epoch,
            watched: AtomicBool::new(false),
            lines: Mutex::default(),
            more: AtomicU64::new(0),
            told: Mutex::default(),
            newest: watch::Sender::new(0),
        }
    }

    /// Takes note of what an observation proved, after it was counted.
    pub fn note(&self, id: &Identity, transitions: &Transitions) {
        if !self.watched.load(Ordering::Relaxed) {
            return;
        }
        let mut lines = lock(&self.lines);
        let room = LINES.saturating_sub(lines.len());
        lines.extend(transitions.iter().take(room).map(|t| (*id, *t)));
        drop(lines);
        if transitions.len() > room {
            self.more.fetch_add((transitions.len() - room) as u64, Ordering::Relaxed);
        }
    }

    /// Whether anybody looks, or did a moment ago.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.watched.load(Ordering::Relaxed)
    }

    /// How many look.
    #[must_use]
    pub fn viewers(&self) -> usize {
        lock(&self.told).viewers
    }

    /// One more looks. `after` is the last thing that it was told, by its id, if it was told anything.
    #[must_use]
    pub fn view(self: &Arc<Live>, after: Option<&str>) -> Viewer {
        let mut told = lock(&self.told);
        if !self.is_watched() {
            self.catch_up(&mut told);
            self.watched.store(true, Ordering::Relaxed);
        }
        told.viewers += 1;
        self.gauges.viewers.inc();
        let place = told.place;
        drop(told);
        Viewer::new(Arc::clone(self), place, after)
    }

    /// Tells the viewers what has happened since the last time; `now` is on the monotonic clock, `unix` the same in Unix
    /// time.
    pub fn gather(&self, now: Duration, unix: Duration) {
        let Some(walked) = &self.walked else { return };
        let mut told = lock(&self.told);
        // Lines first: whatever they tell is counted by then, if not in this batch, then in the one before.
        let lines = std::mem::take(&mut *lock(&self.lines));
        let more = self.more.swap(0, Ordering::Relaxed);
        let mut walks = Vec::new();
        let before = told.place.changes;
        for (walk, count) in walked() {
            let last = told.walked.insert(walk, count).unwrap_or(0);
            if count > last {
                walks.push((walk, count - last));
                told.place.changes += count - last;
            }
        }
        if walks.is_empty() && lines.is_empty() && more == 0 {
            return;
        }
        told.place.batch += 1;
        let place = told.place;
        let text = batch::walked(&place.name(self.epoch), unix, unix.saturating_sub(now), &walks, &lines, more);
        if told.batches.len() == KEPT {
            told.batches.pop_front();
        }
        told.batches.push_back(Batch { before, place, text });
        drop(told);
        self.newest.send_replace(place.batch);
    }

    /// Keeps nothing any more, unless somebody looks.
    pub fn rest(&self) {
        let mut told = lock(&self.told);
        if told.viewers == 0 {
            self.watched.store(false, Ordering::Relaxed);
            told.batches = VecDeque::new();
            *lock(&self.lines) = Vec::new();
        }
    }

    /// Begins where the counters are now.
    fn catch_up(&self, told: &mut Told) {
        lock(&self.lines).clear();
        self.more.store(0, Ordering::Relaxed);
        told.batches.clear();
        told.walked = self.walked.as_ref().map(|walked| walked().into_iter().collect()).unwrap_or_default();
        told.place.changes = told.walked.values().sum();
    }

    /// What a viewer is told at the beginning, and when it has caught up: how often each way was walked so far.
    fn hello(&self, told: &Told, restarted: bool) -> Bytes {
        let walked: Vec<(Walk, u64)> = told.walked.iter().map(|(walk, count)| (*walk, *count)).collect();
        batch::hello(&told.place.name(self.epoch), self.walked.is_some(), self.lives, restarted, &walked)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Observer;
    use crate::metrics::log_lost_counter;
    use crate::scope::Scope;
    use crate::tcp::{Evidence, Flow, Lifecycle, Role, State};
    use serde_json::Value;

    /// Somebody's connections, counted and told of as the journal does it.
    struct Lives {
        metrics: Arc<Metrics>,
        live: Arc<Live>,
        now: Duration,
    }

    impl Lives {
        fn new() -> Lives {
            let scope = Scope::new(&[7007], Vec::new());
            let metrics = Arc::new(Metrics::new(&scope, Observer::SockDiag, &log_lost_counter()));
            let counters = Arc::clone(&metrics);
            let walked: Walked = Box::new(move || counters.walked());
            Lives {
                live: Arc::new(Live::new(Some(walked), true, metrics.live.clone(), 0xa1)),
                metrics,
                now: Duration::from_secs(5),
            }
        }

        /// A handshake: two changes.
        fn handshake(&self) {
            let address = "127.0.0.1:7007".parse().unwrap();
            let flow = Flow { local: address, peer: address };
            let id = Identity { cookie: 0x2a, role: Role::Server, port: 7007, flow };
            let t = Lifecycle::accepted(self.now).observe(self.now, State::Established, Evidence::TcpInfo);
            t.iter().for_each(|t| self.metrics.count(Role::Server, t));
            self.live.note(&id, &t);
        }

        fn gather(&mut self) {
            self.now += Duration::from_millis(100);
            self.live.gather(self.now, self.now + Duration::from_secs(1_000_000));
        }
    }

    /// Everything that a viewer can be told now: id, name and data of each event.
    fn told(viewer: &mut Viewer) -> Vec<(String, String, Value)> {
        let event = |text: Bytes| {
            let text = std::str::from_utf8(&text).unwrap();
            let mut lines = text.strip_suffix("\n\n").expect("an empty line ends it").lines();
            let mut field = |name: &str| lines.next().unwrap().strip_prefix(name).unwrap().to_owned();
            let (id, name, data) = (field("id: "), field("event: "), field("data: "));
            assert_eq!(lines.next(), None);
            (id, name, serde_json::from_str(&data).unwrap())
        };
        std::iter::from_fn(|| viewer.next_now()).map(event).collect()
    }

    fn names(events: &[(String, String, Value)]) -> Vec<&str> {
        events.iter().map(|(_, name, _)| name.as_str()).collect()
    }

    #[test]
    fn while_nobody_looks_nothing_is_kept_and_whoever_comes_is_told_the_sum() {
        let mut lives = Lives::new();
        lives.handshake();
        assert!(lock(&lives.live.lines).is_empty() && !lives.live.is_watched());
        let mut viewer = lives.live.view(None);
        let hello = told(&mut viewer);
        assert_eq!((names(&hello), hello[0].0.as_str()), (vec!["hello"], "a1-0-2"));
        let mut walked = hello[0].2["walked"].as_array().unwrap().clone();
        walked.sort_by_key(Value::to_string);
        let expected = serde_json::json!([
            ["server", "LISTEN", "SYN_RECV", "inferred", 1],
            ["server", "SYN_RECV", "ESTABLISHED", "tcp_info", 1]
        ]);
        assert_eq!(Value::from(walked), expected);
        lives.handshake();
        lives.gather();
        let batch = told(&mut viewer);
        assert_eq!((names(&batch), batch[0].0.as_str()), (vec!["walked"], "a1-1-4"));
        let data = &batch[0].2;
        assert_eq!(
            (data["walks"].as_array().unwrap().len(), &data["more"], &data["at"]),
            (2, &0.into(), &1_000_005.1.into())
        );
        let line = &data["lines"][1];
        assert_eq!(
            (&line["conn"], &line["to"], &line["evidence"]),
            (&"2a".into(), &"ESTABLISHED".into(), &"tcp_info".into())
        );
        assert_eq!((&line["at"], line.get("after")), (&1_000_005.0.into(), None), "no time that nobody knows");
        lives.gather();
        assert!(told(&mut viewer).is_empty(), "nothing happened");
        lives.live.rest();
        assert!(lives.live.is_watched(), "somebody looks");
        drop(viewer);
        lives.live.rest();
        assert!(!lives.live.is_watched() && lock(&lives.live.told).batches.is_empty());
    }

    #[test]
    fn beyond_so_many_lines_a_batch_counts_exactly_and_says_how_many_more() {
        let mut lives = Lives::new();
        let mut viewer = lives.live.view(None);
        told(&mut viewer);
        for _ in 0..1000 {
            lives.handshake();
        }
        lives.gather();
        let batch = told(&mut viewer);
        let data = &batch[0].2;
        let counts: u64 = data["walks"].as_array().unwrap().iter().map(|walk| walk[4].as_u64().unwrap()).sum();
        assert_eq!(
            (counts, data["lines"].as_array().unwrap().len(), &data["more"]),
            (2000, LINES, &(2000 - LINES).into())
        );
        assert!(data.to_string().len() < 16 * 1024, "{}", data.to_string().len());
    }

    #[test]
    fn who_is_slow_skips_and_is_told_how_much_and_the_sum_once_more() {
        let mut lives = Lives::new();
        let mut viewer = lives.live.view(None);
        told(&mut viewer);
        for _ in 0..=BEHIND {
            lives.handshake();
            lives.gather();
        }
        let events = told(&mut viewer);
        assert_eq!(names(&events), ["missed", "walked", "hello"]);
        assert_eq!(events[0].2["transitions"], 2 * BEHIND);
        assert_eq!(lives.metrics.live.skipped.get(), 2 * BEHIND as u64);
        let sum: u64 = events[2].2["walked"].as_array().unwrap().iter().map(|walk| walk[4].as_u64().unwrap()).sum();
        assert_eq!(sum, 2 * (BEHIND as u64 + 1));
        for _ in 0..BEHIND {
            lives.handshake();
            lives.gather();
        }
        assert_eq!(names(&told(&mut viewer)), ["walked"; BEHIND], "not slow enough to skip");
    }

    #[test]
    fn who_comes_back_is_told_what_is_kept_and_how_much_is_missing() {
        let mut lives = Lives::new();
        let mut viewer = lives.live.view(None);
        lives.handshake();
        lives.gather();
        let last = told(&mut viewer).pop().unwrap().0;
        drop(viewer);
        for _ in 0..3 {
            lives.handshake();
            lives.gather();
        }
        let mut back = lives.live.view(Some(&last));
        assert_eq!(names(&told(&mut back)), ["walked", "walked", "walked", "hello"]);
        drop(back);
        for _ in 0..KEPT {
            lives.handshake();
            lives.gather();
        }
        let mut back = lives.live.view(Some(&last));
        let events = told(&mut back);
        assert_eq!((events.len(), &events[0].2["transitions"]), (KEPT + 2, &6.into()), "the first three are gone");
        assert_eq!(lives.metrics.live.skipped.get(), 0, "it was away, not slow");
        drop(back);
        // Nobody looked for long: nothing is kept, and the counters know how much there was.
        lives.live.rest();
        lives.handshake();
        let mut back = lives.live.view(Some(&last));
        let events = told(&mut back);
        assert_eq!(names(&events), ["missed", "hello"]);
        assert_eq!(events[0].2["transitions"], 2 * (3 + KEPT + 1));
    }

    #[test]
    fn an_id_of_another_process_or_of_nobody_begins_anew_and_says_so() {
        let mut lives = Lives::new();
        lives.handshake();
        for id in ["a2-1-2", "a1-1-2-3", "a1", "", "-", "a1-x-1", "a1-1-99999999999999999999999", "\u{1f980}"] {
            let events = told(&mut lives.live.view(Some(id)));
            assert_eq!((names(&events), &events[0].2["restarted"]), (vec!["hello"], &true.into()), "{id}");
        }
        // A place that was never reached.
        let events = told(&mut lives.live.view(Some("a1-7-1")));
        assert_eq!((names(&events), &events[0].2["restarted"]), (vec!["hello"], &false.into()));
        lives.gather();
        assert_eq!((lives.live.viewers(), lives.metrics.live.viewers.get()), (0, 0));
    }

    #[tokio::test]
    async fn who_waits_is_woken() {
        let mut lives = Lives::new();
        let mut viewer = lives.live.view(None);
        assert!(viewer.next().await.starts_with(b"id: a1-0-0\nevent: hello\n"));
        let waiting = tokio::spawn(async move { viewer.next().await });
        tokio::task::yield_now().await;
        lives.handshake();
        lives.gather();
        let event = tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("in time").unwrap();
        assert!(event.starts_with(b"id: a1-1-2\nevent: walked\n"));
    }
}
