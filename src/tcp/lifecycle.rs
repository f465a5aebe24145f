//! One connection's life: observations in, transitions out.
//!
//! What was not seen is filled in only where nothing else was possible, and says so.

use std::sync::OnceLock;
use std::time::Duration;

use arrayvec::ArrayVec;

use super::arrows::{self, LONGEST, Path};
use super::{Cause, Evidence, Role, State, StateSet, Trigger};

/// How sure a transition is of the way between its two states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// One arrow of the state machine.
    Arrow,
    /// Both states are certain, the way between them is not: there are several, and nobody saw which.
    Gap,
    /// No arrows lead there. The kernel is right; our picture was incomplete.
    Unexpected,
}

impl Step {
    /// Every kind, surest first.
    pub const ALL: [Step; 3] = [Step::Arrow, Step::Gap, Step::Unexpected];

    /// What is said of the way, in logs and JSON: nothing where it is one arrow.
    #[must_use]
    pub const fn via(self) -> Option<&'static str> {
        match self {
            Step::Arrow => None,
            Step::Gap => Some("unknown"),
            Step::Unexpected => Some("unexpected"),
        }
    }
}

/// One step of a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The state that was left.
    pub from: State,
    /// The state that was entered.
    pub to: State,
    /// When, on the monotonic clock. For a step that nobody timed: when the next one was seen.
    pub at: Duration,
    /// How long `from` lasted; `None` when its beginning or its end was not seen.
    pub after: Option<Duration>,
    /// Who saw it.
    pub evidence: Evidence,
    /// What made it happen, when known.
    pub cause: Option<Cause>,
    /// Whether the way is known.
    pub step: Step,
    /// How many segments the kernel announced that it sent again while `from` lasted. Only announcements tell
    /// (eBPF): 0 where nobody listens to them, too.
    pub retransmits: u32,
}

/// What is certain about the time between two observations, beyond the two states.
///
/// Our own system calls prove some steps, the kernel's segment counters exclude others. With
/// nothing known, [`Lifecycle::observe`] fills in only what the state machine itself forces.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    /// States that were certainly not passed through.
    pub never: StateSet,
    /// States that certainly were.
    pub through: StateSet,
    /// How many segments arrived in between (`tcpi_segs_in`): a path that needs more is impossible.
    pub segments: Option<u32>,
    /// The system call of ours that took an arrow in between, and when it began.
    pub call: Option<(Cause, Duration)>,
    /// What caused the last step.
    pub cause: Option<Cause>,
    /// How many segments were sent again before it.
    pub retransmits: u32,
}

/// Where one connection is in its life.
#[derive(Clone, Copy, Debug)]
pub struct Lifecycle {
    role: Role,
    state: State,
    since: Duration,
    timed: bool,
    over: bool,
}

impl Lifecycle {
    /// A client's connection: CLOSED, before connect(2). To be CLOSED is not to stay somewhere: it has no duration.
    #[must_use]
    pub fn client(at: Duration) -> Lifecycle {
        Lifecycle { role: Role::Client, state: State::Close, since: at, timed: false, over: false }
    }

    /// A server's connection: it was born of a listener, at a time that nobody saw.
    #[must_use]
    pub fn accepted(at: Duration) -> Lifecycle {
        Lifecycle { role: Role::Server, state: State::Listen, since: at, timed: false, over: false }
    }

    /// A connection that was there before it was looked at: in `state`, entered at `since` if that is known.
    #[must_use]
    pub fn found(role: Role, state: State, since: Option<Duration>, at: Duration) -> Lifecycle {
        Lifecycle { role, state: state.shown(), since: since.unwrap_or(at), timed: since.is_some(), over: false }
    }

    /// A listening socket's own life: CLOSED, before listen(2).
    #[must_use]
    pub fn listener(at: Duration) -> Lifecycle {
        Lifecycle { role: Role::Server, state: State::Close, since: at, timed: false, over: false }
    }

    /// The state last observed.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Since when, at the latest.
    #[must_use]
    pub fn since(&self) -> Duration {
        self.since
    }

    /// Which end this is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Whether the kernel has let go of it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Takes note that `state` was seen at `at`; returns the transitions that this proves, in order.
    ///
    /// A repeat proves nothing. The last transition carries `evidence`; those before it are inferred. Time never
    /// runs backwards: an observation older than the last one counts as of the last one.
    pub fn observe(&mut self, at: Duration, state: State, evidence: Evidence) -> Transitions {
        self.observe_knowing(at, state, evidence, &Known::default())
    }

    /// [`observe`](Self::observe), with what else is certain about the time since the last observation.
    pub fn observe_knowing(&mut self, at: Duration, state: State, evidence: Evidence, known: &Known) -> Transitions {
        let mut out = Transitions::none();
        let to = state.shown();
        let at = at.max(self.since);
        if to == self.state {
            return out;
        }
        // What we believed may contradict what the kernel shows. Believe the kernel: first doubt the count of
        // segments, which can be ahead of the states, then everything that we added.
        let way = Certain::only_way(self.state, to, self.role)
            .or_else(|| Certain::between(self.state, to, self.role, known))
            .or_else(|| Certain::between(self.state, to, self.role, &Known { segments: None, ..*known }))
            .or_else(|| Certain::between(self.state, to, self.role, &Known::default()));
        match way {
            Some(way) if !self.over => {
                for (i, pair) in way.states().windows(2).enumerate() {
                    let last = i + 2 == way.len;
                    let step = if way.gap_after[i] { Step::Gap } else { Step::Arrow };
                    self.step_to(&mut out, pair[1], step, last.then_some(evidence), at, known);
                }
            }
            _ => self.step_to(&mut out, to, Step::Unexpected, Some(evidence), at, known),
        }
        out
    }

    /// Takes one step; `seen` is the evidence for it, `None` when it is inferred.
    fn step_to(
        &mut self,
        out: &mut Transitions,
        to: State,
        step: Step,
        seen: Option<Evidence>,
        at: Duration,
        known: &Known,
    ) {
        let arrow = if step == Step::Arrow { arrows::direct(self.state, to) } else { None };
        let ours = arrow.is_some_and(|a| a.trigger == Trigger::Call);
        // A step that only our own call can make happened when we made it, whoever saw the result.
        let (at, timed) = match known.call {
            Some((_, when)) if ours => (when.clamp(self.since, at), true),
            _ => (at, seen.is_some_and(|evidence| evidence != Evidence::Inferred)),
        };
        let cause = match (seen, known.cause, known.call) {
            (Some(_), Some(cause), _) => Some(cause),
            (_, _, Some((cause, _))) if ours => Some(cause),
            _ => arrow.and_then(super::Arrow::cause),
        };
        out.push(Transition {
            from: self.state,
            to,
            at,
            after: (self.timed && timed && step == Step::Arrow).then(|| at.saturating_sub(self.since)),
            evidence: seen.unwrap_or(Evidence::Inferred),
            cause,
            step,
            retransmits: if seen.is_some() { known.retransmits } else { 0 },
        });
        self.state = to;
        self.since = at;
        self.timed = timed;
        self.over = to == State::Close;
    }
}

/// The states that lie on every possible path, in order, and whether the way between two of them is open to doubt.
#[derive(Clone, Copy)]
struct Certain {
    states: [State; LONGEST],
    len: usize,
    gap_after: [bool; LONGEST],
}

impl Certain {
    /// The path, where there is only one whatever else is known: nothing could add to it, and what contradicts it is
    /// doubted. Searched once for each pair of states; most steps of most lives are such.
    fn only_way(from: State, to: State, role: Role) -> Option<Certain> {
        static WAYS: OnceLock<Vec<Option<Certain>>> = OnceLock::new();
        let index = |role: Role, from: State, to: State| {
            (role as usize * State::SLOTS + from as usize) * State::SLOTS + to as usize
        };
        let ways = WAYS.get_or_init(|| {
            let mut ways = vec![None; Role::ALL.len() * State::SLOTS * State::SLOTS];
            for (role, from, to) in all_pairs() {
                let mut count = 0;
                arrows::each_path(from, to, role, &Known::default(), |path| {
                    count += 1;
                    ways[index(role, from, to)] = (count == 1).then(|| Certain::of(path));
                });
            }
            ways
        });
        ways[index(role, from, to)]
    }

    fn between(from: State, to: State, role: Role, known: &Known) -> Option<Certain> {
        let mut certain: Option<Certain> = None;
        arrows::each_path(from, to, role, known, |path| match &mut certain {
            None => certain = Some(Certain::of(path)),
            Some(so_far) => so_far.narrow(path),
        });
        certain
    }

    fn of(path: &Path) -> Certain {
        let mut states = [State::Close; LONGEST];
        let len = path.states().len();
        states[..len].copy_from_slice(path.states());
        Certain { states, len, gap_after: [false; LONGEST] }
    }

    fn states(&self) -> &[State] {
        &self.states[..self.len]
    }

    /// Keeps only what `path` also holds. Both ends are on every path; the ends may be the same state (CLOSE), so
    /// they are kept by position.
    fn narrow(&mut self, path: &Path) {
        let other = path.states();
        let inner = &other[1..other.len() - 1];
        let mut kept = 1;
        let mut position = 0;
        for i in 1..self.len {
            let state = self.states[i];
            let last = i + 1 == self.len;
            let place =
                if last { Some(other.len() - 1) } else { inner.iter().position(|s| *s == state).map(|p| p + 1) };
            match place {
                Some(place) => {
                    self.gap_after[kept - 1] |= place != position + 1;
                    position = place;
                    self.states[kept] = state;
                    self.gap_after[kept] = self.gap_after[i];
                    kept += 1;
                }
                None => self.gap_after[kept - 1] = true,
            }
        }
        self.len = kept;
    }
}

fn all_pairs() -> impl Iterator<Item = (Role, State, State)> {
    Role::ALL.into_iter().flat_map(|role| {
        State::ALL.into_iter().flat_map(move |from| State::ALL.into_iter().map(move |to| (role, from, to)))
    })
}

/// What one observation proved: at most one whole life's worth of steps, in order, without an allocation.
#[derive(Clone, Debug)]
pub struct Transitions(ArrayVec<Transition, LONGEST>);

impl Transitions {
    /// Nothing.
    #[must_use]
    pub fn none() -> Transitions {
        Transitions(ArrayVec::new())
    }

    fn push(&mut self, transition: Transition) {
        // No path is longer than that.
        let _ = self.0.try_push(transition);
    }

    /// The transitions, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Transition> {
        self.0.iter()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing was proved.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::ARROWS;
    use super::*;
    use State::{Close, CloseWait, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent, TimeWait};
    use proptest::prelude::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn at(role: Role, state: State) -> Lifecycle {
        Lifecycle { role, state, since: ms(0), timed: true, over: false }
    }

    fn steps(t: &Transitions) -> Vec<(State, State, Evidence, Step)> {
        t.iter().map(|t| (t.from, t.to, t.evidence, t.step)).collect()
    }

    #[test]
    fn client_walk_seen_step_by_step() {
        let mut life = Lifecycle::client(ms(0));
        let walk = [SynSent, Established, FinWait1, FinWait2, TimeWait, Close];
        for (i, state) in walk.into_iter().enumerate() {
            let known = Known { segments: Some(1), ..Known::default() };
            let t = life.observe_knowing(ms(10 * (i as u64 + 1)), state, Evidence::TcpInfo, &known);
            assert_eq!(t.len(), 1);
            let t = t.iter().next().unwrap();
            assert_eq!((t.to, t.after, t.step), (state, (i > 0).then_some(ms(10)), Step::Arrow));
        }
        assert!(life.is_over());
    }

    #[test]
    fn established_time_wait_infers_fin_wait1_and_leaves_the_rest_open() {
        let t = at(Role::Client, Established).observe(ms(9), TimeWait, Evidence::SockDiag);
        assert_eq!(
            steps(&t),
            [
                (Established, FinWait1, Evidence::Inferred, Step::Arrow),
                (FinWait1, TimeWait, Evidence::SockDiag, Step::Gap)
            ]
        );
    }

    #[test]
    fn one_segment_rules_closing_out() {
        let known = Known { segments: Some(1), ..Known::default() };
        let t = at(Role::Client, FinWait1).observe_knowing(ms(9), TimeWait, Evidence::SockDiag, &known);
        assert_eq!(
            steps(&t),
            [
                (FinWait1, FinWait2, Evidence::Inferred, Step::Arrow),
                (FinWait2, TimeWait, Evidence::SockDiag, Step::Arrow)
            ]
        );
    }

    #[test]
    fn one_segment_rules_a_simultaneous_open_out() {
        let known = Known { segments: Some(1), call: Some((Cause::Connect, ms(2))), ..Known::default() };
        let t = Lifecycle::client(ms(0)).observe_knowing(ms(9), Established, Evidence::TcpInfo, &known);
        let t: Vec<_> = t.iter().copied().collect();
        assert_eq!((t[0].to, t[0].at, t[0].cause, t[0].after), (SynSent, ms(2), Some(Cause::Connect), None));
        assert_eq!((t[1].to, t[1].at, t[1].cause, t[1].after), (Established, ms(9), Some(Cause::SynAck), Some(ms(7))));
    }

    #[test]
    fn accepted_infers_syn_recv_without_a_duration() {
        let t = Lifecycle::accepted(ms(5)).observe(ms(5), Established, Evidence::TcpInfo);
        let t: Vec<_> = t.iter().copied().collect();
        assert_eq!((t[0].from, t[0].to, t[0].evidence, t[0].after), (Listen, SynRecv, Evidence::Inferred, None));
        assert_eq!((t[1].to, t[1].evidence, t[1].after), (Established, Evidence::TcpInfo, None));
    }

    #[test]
    fn our_own_shutdown_proves_last_ack() {
        let known = Known {
            through: StateSet::of(&[LastAck]),
            call: Some((Cause::Shutdown, ms(7))),
            cause: Some(Cause::Ack),
            ..Known::default()
        };
        let t = at(Role::Server, CloseWait).observe_knowing(ms(8), Close, Evidence::TcpInfo, &known);
        let t: Vec<_> = t.iter().copied().collect();
        assert_eq!((t[0].to, t[0].evidence, t[0].at), (LastAck, Evidence::Inferred, ms(7)));
        assert_eq!((t[1].to, t[1].after, t[1].cause), (Close, Some(ms(1)), Some(Cause::Ack)));
    }

    #[test]
    fn a_stay_is_told_only_where_both_its_ends_were_seen() {
        let stays = |t: Transitions| t.iter().map(|t| t.after).collect::<Vec<_>>();
        // FIN_WAIT1 ended at some time before the reading, and so did whatever came between.
        let t = at(Role::Client, FinWait1).observe(ms(9), TimeWait, Evidence::SockDiag);
        assert_eq!(stays(t), [None]);
        let known = Known { segments: Some(1), ..Known::default() };
        let t = at(Role::Client, FinWait1).observe_knowing(ms(9), TimeWait, Evidence::SockDiag, &known);
        assert_eq!(stays(t), [None, None]);
        // An accept(2) that comes after the FIN: ESTABLISHED is certain, its times are not.
        let mut life = Lifecycle::accepted(ms(5));
        life.observe(ms(5), Established, Evidence::Inferred);
        assert_eq!(stays(life.observe(ms(6), CloseWait, Evidence::TcpInfo)), [None]);
        assert_eq!(stays(life.observe(ms(8), LastAck, Evidence::TcpInfo)), [Some(ms(2))]);
    }

    #[test]
    fn a_repeat_proves_nothing_and_a_second_end_is_not_told() {
        let mut life = at(Role::Client, TimeWait);
        assert!(life.observe(ms(1), TimeWait, Evidence::SockDiag).is_empty());
        assert_eq!(life.observe(ms(2), Close, Evidence::SockDiag).len(), 1);
        assert!(life.observe(ms(3), Close, Evidence::SockDiag).is_empty());
    }

    #[test]
    fn what_no_arrow_explains_is_accepted_and_flagged() {
        let t = at(Role::Client, FinWait2).observe(ms(1), Established, Evidence::TcpInfo);
        assert_eq!(steps(&t), [(FinWait2, Established, Evidence::TcpInfo, Step::Unexpected)]);
    }

    #[test]
    fn a_belief_that_the_kernel_contradicts_is_dropped() {
        let known = Known { segments: Some(0), ..Known::default() };
        let t = at(Role::Client, FinWait1).observe_knowing(ms(1), FinWait2, Evidence::TcpInfo, &known);
        assert_eq!(steps(&t), [(FinWait1, FinWait2, Evidence::TcpInfo, Step::Arrow)]);
    }

    #[test]
    fn a_client_that_is_still_closed_has_not_ended() {
        assert!(Lifecycle::client(ms(0)).observe(ms(1), Close, Evidence::TcpInfo).is_empty());
    }

    /// All simple paths by the definition, for comparison: no pruning, no sharing with the code under test.
    fn paths(from: State, to: State, role: Role) -> Vec<Vec<State>> {
        let mut done = Vec::new();
        let mut open = vec![vec![from]];
        while let Some(path) = open.pop() {
            for arrow in ARROWS.iter().filter(|a| a.from == *path.last().unwrap()) {
                let mut longer = path.clone();
                longer.push(arrow.to);
                if arrow.to == to {
                    done.push(longer);
                    continue;
                }
                let closed_to = if role == Role::Client { Listen } else { SynSent };
                if arrow.to != Close && arrow.to != closed_to && !path.contains(&arrow.to) {
                    open.push(longer);
                }
            }
        }
        done
    }

    #[test]
    fn all_pairs_hold_exactly_what_every_path_holds() {
        for role in Role::ALL {
            for from in State::ALL {
                for to in State::ALL.into_iter().chain([State::NewSynRecv]) {
                    let got = at(role, from).observe(ms(1), to, Evidence::SockDiag);
                    let all = paths(from, to.shown(), role);
                    if from == to.shown() {
                        assert!(got.is_empty());
                        continue;
                    }
                    let got = steps(&got);
                    if all.is_empty() {
                        assert_eq!(got, [(from, to.shown(), Evidence::SockDiag, Step::Unexpected)]);
                        continue;
                    }
                    let inner: Vec<State> = all[0][1..all[0].len() - 1]
                        .iter()
                        .copied()
                        .filter(|s| all.iter().all(|p| p[1..p.len() - 1].contains(s)))
                        .collect();
                    let told: Vec<State> = got[..got.len() - 1].iter().map(|t| t.1).collect();
                    assert_eq!(told, inner, "{role} {from}→{to}");
                    for (a, b, evidence, step) in &got {
                        assert_eq!(*evidence == Evidence::SockDiag, *b == to.shown(), "{role} {from}→{to}");
                        let direct = all.iter().all(|p| p.windows(2).any(|w| w == [*a, *b]));
                        assert_eq!(*step == Step::Arrow, direct, "{role} {from}→{to}: {a}→{b}");
                    }
                }
            }
        }
    }

    /// A legal life: a random walk along the arrows from the start to the end.
    fn legal_walk(role: Role) -> impl Strategy<Value = Vec<State>> {
        let start = if role == Role::Client { Close } else { Listen };
        proptest::collection::vec(any::<prop::sample::Index>(), LONGEST).prop_map(move |choices| {
            let mut walk = vec![start];
            for choice in choices {
                let here = *walk.last().unwrap();
                if here == Close && walk.len() > 1 {
                    break;
                }
                let next: Vec<State> = ARROWS
                    .iter()
                    .filter(|a| a.from == here && !(role == Role::Client && a.to == Listen))
                    .map(|a| a.to)
                    .collect();
                walk.push(next[choice.index(next.len())]);
            }
            walk
        })
    }

    fn role() -> impl Strategy<Value = Role> {
        prop_oneof![Just(Role::Client), Just(Role::Server)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn a_thinned_legal_walk_is_completed_to_a_legal_walk(
            (role, walk) in role().prop_flat_map(|r| (Just(r), legal_walk(r))),
            kept in any::<u16>(),
            times in proptest::collection::vec(0u64..1_000_000, LONGEST + 1),
        ) {
            let mut life = Lifecycle { role, state: walk[0], since: ms(500), timed: true, over: false };
            let mut told = vec![walk[0]];
            let mut clock = ms(500);
            for (i, state) in walk.iter().enumerate().skip(1) {
                if kept & (1 << i) == 0 {
                    continue;
                }
                let out = life.observe(ms(times[i]), *state, Evidence::TcpInfo);
                if life.state() == walk[0] {
                    prop_assert_eq!(*state, Close, "a life of which only both ends were seen is not told");
                    continue;
                }
                prop_assert!(!out.is_empty());
                for (n, t) in out.iter().enumerate() {
                    let last = n + 1 == out.len();
                    prop_assert_eq!(t.from, *told.last().unwrap(), "the chain is unbroken");
                    prop_assert_eq!(t.evidence == Evidence::TcpInfo, last, "only what was seen is marked seen");
                    prop_assert_eq!(t.to == *state, last);
                    prop_assert!(t.step != Step::Unexpected, "a legal walk is never unexpected");
                    if t.step == Step::Arrow {
                        prop_assert!(arrows::direct(t.from, t.to).is_some(), "an arrow is one");
                    }
                    prop_assert!(walk.contains(&t.to), "{} was never walked", t.to);
                    prop_assert!(t.at >= clock, "time runs forwards");
                    if let Some(after) = t.after {
                        prop_assert_eq!(after, t.at.saturating_sub(clock));
                    }
                    clock = t.at;
                    told.push(t.to);
                }
                prop_assert_eq!(life.state(), *state);
            }
        }

        #[test]
        fn true_knowledge_never_leads_to_a_false_step(
            (role, walk) in role().prop_flat_map(|r| (Just(r), legal_walk(r))),
            kept in any::<u16>(),
            told_through in any::<u16>(),
            told_never in any::<u16>(),
        ) {
            let mut life = Lifecycle { role, state: walk[0], since: ms(0), timed: true, over: false };
            let mut from = 0;
            for i in 1..walk.len() {
                if kept & (1 << i) == 0 {
                    continue;
                }
                let between = StateSet::of(&walk[from + 1..i]);
                let known = Known {
                    through: StateSet(told_through).and(between),
                    never: StateSet(told_never & !between.0),
                    ..Known::default()
                };
                for t in life.observe_knowing(ms(i as u64), walk[i], Evidence::SockDiag, &known).iter() {
                    prop_assert!(walk[from..=i].contains(&t.to), "{} is not between", t.to);
                    prop_assert!(t.step != Step::Unexpected);
                    if t.step == Step::Arrow {
                        prop_assert!(walk.windows(2).any(|w| w == [t.from, t.to]), "{}→{} not walked", t.from, t.to);
                    }
                }
                from = i;
            }
        }

        #[test]
        fn any_observations_at_all_never_panic_and_never_run_backwards(
            role in role(),
            seen in proptest::collection::vec((0u64..1000, 1u8..=12, 0u32..4, any::<u16>(), any::<u16>()), 0..12),
        ) {
            let mut life = if role == Role::Client { Lifecycle::client(ms(0)) } else { Lifecycle::accepted(ms(0)) };
            let mut clock = ms(0);
            for (when, state, segments, never, through) in seen {
                let known = Known {
                    segments: Some(segments),
                    never: StateSet(never),
                    through: StateSet(through),
                    call: Some((Cause::Shutdown, ms(when))),
                    ..Known::default()
                };
                let before = life.state();
                let state = State::from_kernel(state).unwrap();
                let out = life.observe_knowing(ms(when), state, Evidence::SockDiag, &known);
                prop_assert_eq!(out.is_empty(), state.shown() == before);
                for t in out.iter() {
                    prop_assert!(t.at >= clock);
                    clock = t.at;
                }
                if !out.is_empty() {
                    prop_assert_eq!(life.state(), state.shown());
                }
            }
        }
    }
}
