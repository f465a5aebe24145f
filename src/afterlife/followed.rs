//! One connection being followed: what a reading of the table proves of it.
//!
//! Pure: time and rows come in as arguments. Must not know: how the table is read, or how often.

use std::time::Duration;

use super::Departed;
use crate::kernel::{Row, TIME_WAIT};
use crate::tcp::{Cause, Evidence, Known, State, StateSet, Transitions};

/// Where a connection can be whose descriptor is closed.
const AFTER_CLOSE: StateSet =
    StateSet::of(&[State::FinWait1, State::FinWait2, State::Closing, State::LastAck, State::TimeWait]);

/// How often an orphan whose FIN is under way is read: at first, and at last.
const EAGER: Duration = Duration::from_millis(4);
pub(super) const PATIENT: Duration = Duration::from_secs(1);

/// By text every question costs the whole table.
const EAGER_BY_TEXT: Duration = Duration::from_millis(100);

/// One connection being followed.
#[expect(clippy::struct_excessive_bools, reason = "four independent facts")]
pub(super) struct Followed {
    pub(super) departed: Departed,
    /// When to look again, unless it rests: then all resting ones are read together.
    pub(super) next: Duration,
    pub(super) resting: bool,
    /// Asked for by the reading under way, and not found yet.
    pub(super) pending: bool,
    pause: Duration,
    seen: bool,
    missed: bool,
    /// When its minisocket's timer will have run out, by the last reading.
    expires: Duration,
}

/// What a reading came to.
pub(super) struct Noted {
    pub(super) transitions: Transitions,
    /// The kernel has let go of it.
    pub(super) over: bool,
}

impl Followed {
    /// Begins to follow; `evidence` is what the readings will be.
    pub(super) fn new(departed: Departed, evidence: Evidence) -> Followed {
        let pause = if evidence == Evidence::Procfs { EAGER_BY_TEXT } else { EAGER };
        Followed {
            departed,
            next: Duration::ZERO,
            resting: false,
            pending: false,
            pause,
            seen: false,
            missed: false,
            expires: Duration::ZERO,
        }
    }

    /// Whether a reading has said anything of it yet.
    pub(super) fn was_seen(&self) -> bool {
        self.seen
    }

    /// Takes note of what the table shows at `now`, `None` when it does not show it.
    pub(super) fn note(&mut self, now: Duration, row: Option<&Row>, evidence: Evidence) -> Noted {
        let life = &mut self.departed.life;
        let before = life.state();
        // By addresses alone, a state that a closed descriptor cannot be in, or one before TIME_WAIT, means that the
        // addresses are somebody else's now.
        let can_be_ours =
            |row: &&Row| AFTER_CLOSE.contains(row.state) && (before != State::TimeWait || row.state == before);
        let row = row.filter(|row| row.cookie.is_some() || can_be_ours(row));
        // The text may pass over rows that move while it is read: absence is believed twice.
        if row.is_none() && evidence == Evidence::Procfs && !std::mem::replace(&mut self.missed, true) {
            self.next = now + EAGER_BY_TEXT;
            return Noted { transitions: Transitions::none(), over: false };
        }
        self.missed = false;
        let (left, known) = (self.departed.left.take(), self.departed.known);
        let transitions = match (row.map(|row| row.state), left) {
            (Some(State::TimeWait), Some((at, known))) => life.observe_knowing(at, State::TimeWait, evidence, &known),
            (Some(state), _) => life.observe_knowing(now, state, evidence, &known),
            // The descriptor itself said CLOSE, and there is no TIME_WAIT: it ended then. Looked for so late, there may
            // have been one.
            (None, Some((at, known))) if now.saturating_sub(at) < TIME_WAIT => {
                life.observe_knowing(at, State::Close, Evidence::TcpInfo, &known)
            }
            (None, Some(_)) => life.observe_knowing(now, State::Close, evidence, &Known::default()),
            (None, None) => {
                let cause = match before {
                    State::TimeWait if now >= self.expires => Some(Cause::Expired),
                    State::TimeWait => None,
                    _ => self.departed.cause_if_gone,
                };
                life.observe_knowing(now, State::Close, evidence, &Known { cause, ..known })
            }
        };
        if !transitions.is_empty() {
            // What was known concerned the time until now.
            self.departed.known = Known::default();
        }
        self.seen = true;
        match row {
            Some(row) => {
                self.expires = now + row.expires;
                self.resting = row.is_minisocket();
                self.next = now + self.pause;
                self.pause = (self.pause * 2).min(PATIENT);
            }
            None => self.resting = true,
        }
        Noted { transitions, over: row.is_none() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::timer;
    use crate::tcp::{Flow, Identity, Lifecycle, Role};

    const fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// A client's connection, closed at second 10 in `state`.
    fn followed(state: State, evidence: Evidence) -> Followed {
        let (local, peer) = ("127.0.0.1:40000".parse().unwrap(), "127.0.0.1:7007".parse().unwrap());
        let mut life = Lifecycle::client(s(1));
        let _before = life.observe(s(10), state, Evidence::TcpInfo);
        let departed = Departed {
            id: Identity { cookie: 5, role: Role::Client, port: 7007, flow: Flow { local, peer } },
            life,
            left: None,
            known: Known::default(),
            all_acked: 0,
            cause_if_gone: None,
            reason: None,
        };
        Followed::new(departed, evidence)
    }

    fn row(state: State, cookie: Option<u64>, expires: Duration) -> Row {
        let flow = followed(State::FinWait1, Evidence::SockDiag).departed.id.flow;
        Row { timer: timer::TIME_WAIT, expires, ..Row::plain(state, flow, cookie) }
    }

    fn told(noted: &Noted) -> Vec<(State, Option<Cause>)> {
        noted.transitions.iter().map(|t| (t.to, t.cause)).collect()
    }

    #[test]
    fn time_wait_has_expired_when_its_clock_as_last_read_has_run_down() {
        for (gone_at, cause) in [(69, None), (70, Some(Cause::Expired)), (75, Some(Cause::Expired))] {
            let mut f = followed(State::FinWait2, Evidence::SockDiag);
            let noted = f.note(s(10), Some(&row(State::TimeWait, Some(5), s(59))), Evidence::SockDiag);
            assert_eq!((told(&noted), f.resting), (vec![(State::TimeWait, Some(Cause::PeerFin))], true));
            // A repeated FIN was answered, and the clock began anew (RFC 9293 section 3.10.7.8).
            f.note(s(30), Some(&row(State::TimeWait, Some(5), s(40))), Evidence::SockDiag);
            let noted = f.note(s(gone_at), None, Evidence::SockDiag);
            assert_eq!((told(&noted), noted.over), (vec![(State::Close, cause)], true), "gone at {gone_at}");
        }
    }

    #[test]
    fn by_text_absence_is_believed_twice() {
        let mut f = followed(State::LastAck, Evidence::Procfs);
        let noted = f.note(s(11), None, Evidence::Procfs);
        assert_eq!((told(&noted), noted.over, f.was_seen()), (vec![], false, false));
        f.note(s(12), Some(&row(State::LastAck, None, s(0))), Evidence::Procfs);
        assert!(!f.note(s(13), None, Evidence::Procfs).over, "it was there in between");
        let noted = f.note(s(14), None, Evidence::Procfs);
        assert_eq!((told(&noted), noted.over), (vec![(State::Close, None)], true));
        assert!(followed(State::LastAck, Evidence::SockDiag).note(s(11), None, Evidence::SockDiag).over);
    }

    #[test]
    fn by_text_somebody_elses_connection_is_not_ours() {
        for (ours, theirs) in [
            (State::LastAck, State::Established),
            (State::TimeWait, State::SynSent),
            (State::TimeWait, State::FinWait2),
            (State::FinWait2, State::CloseWait),
        ] {
            let mut f = followed(ours, Evidence::Procfs);
            for at in [11, 12] {
                let noted = f.note(s(at), Some(&row(theirs, None, s(0))), Evidence::Procfs);
                assert!(noted.transitions.iter().all(|t| t.to == State::Close), "{ours} {theirs}");
                assert_eq!(noted.over, at == 12, "{ours} {theirs}");
            }
        }
    }

    #[test]
    fn what_moves_is_looked_at_less_and_less_often() {
        let mut f = followed(State::FinWait1, Evidence::SockDiag);
        let (mut now, mut pauses) = (s(10), Vec::new());
        for _ in 0..12 {
            f.note(now, Some(&Row { timer: 1, ..row(State::FinWait1, Some(5), s(0)) }), Evidence::SockDiag);
            pauses.push(f.next.saturating_sub(now).as_millis());
            now = f.next;
        }
        assert_eq!(pauses[..4], [4, 8, 16, 32]);
        assert_eq!(pauses[11], 1000);
    }
}
