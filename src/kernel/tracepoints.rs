//! The kernel's own announcements of TCP's changes of state, TIME_WAIT and request sockets included, for one network
//! namespace: a program in the kernel (bpf/lifecycle.bpf.c) tells of each by a ring, and counts sockets by service and
//! state, so that to know how many there are costs the same however many there are.
//!
//! Loading needs CAP_BPF and CAP_PERFMON; reading needs nothing more. Nothing is pinned: program, maps and links end with
//! this process, however it ends.

mod event;

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::{Array, HashMap, MapData, MapError, RingBuf};
use aya::programs::tp_btf::BtfTracePointLink;
use aya::programs::{BtfTracePoint, ProgramError};
use aya::{Btf, Ebpf, EbpfLoader, VerifierLogLevel};
use rustix::net::{AddressFamily, SocketType};
use rustix::thread::MembarrierCommand;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::table::WhyNot;
use super::{capabilities, sockopt};
use crate::tcp::{Role, State};
pub use event::{Event, Kind};

/// The program, compiled: `.ci/bpf` builds it again from its source and compares.
static PROGRAM: &[u8] = aya::include_bytes_aligned!("bpf/lifecycle.bpf.o");

/// What has no full socket: its timers tell.
const TIMERS: [&str; 2] = ["timer_start", "timer_cancel"];

/// How many sets of counts there are, one in use (ERAS, lifecycle.bpf.c).
const ERAS: usize = 8;

/// How many services can be told of (SERVICES, lifecycle.bpf.c).
const SERVICES: usize = 1024;

/// How many events the ring has room for, about.
const RING: usize = 100_000;

/// `struct counts`, lifecycle.bpf.c.
type InKernel = [i64; 16];

/// `struct port`, lifecycle.bpf.c: by role, the place of the service that has this port, from 1 on.
type Places = [u32; 2];

/// Why the kernel's announcements cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// This process may not.
    #[error("not permitted: it takes CAP_BPF and CAP_PERFMON")]
    NotPermitted,
    /// The kernel does not describe its own types.
    #[error("no type information of the running kernel (/sys/kernel/btf/vmlinux): {0}")]
    NoTypes(String),
    /// The kernel does not tell which network namespace a socket is in.
    #[error("no name for the network namespace (SO_NETNS_COOKIE, Linux 5.14): {0}")]
    NoNamespace(String),
    /// Something is refused, or unknown to this kernel.
    #[error("{what}: {why}")]
    Refused {
        /// The operation and the object.
        what: String,
        /// What the kernel said, to the root of it.
        why: String,
    },
}

impl TraceError {
    /// The same in one word.
    #[must_use]
    pub fn reason(&self) -> WhyNot {
        match self {
            TraceError::NotPermitted => WhyNot::NotPermitted,
            TraceError::NoTypes(_) => WhyNot::NoTypes,
            TraceError::NoNamespace(_) => WhyNot::NoNamespace,
            TraceError::Refused { .. } => WhyNot::Refused,
        }
    }

    fn refused(what: impl Into<String>, error: &(dyn Error + 'static)) -> TraceError {
        TraceError::Refused { what: what.into(), why: root_of(error) }
    }
}

/// What the verifier has to say can be pages; the reason is at the root.
fn root_of(error: &(dyn Error + 'static)) -> String {
    let mut root = error;
    while let Some(source) = root.source() {
        root = source;
    }
    root.to_string().lines().next().unwrap_or_default().to_owned()
}

/// The announcements of one network namespace.
pub struct Tracepoints {
    ring: RingBuf<MapData>,
    ports: Array<MapData, Places>,
    current: Array<MapData, u32>,
    rescued: Array<MapData, u64>,
    attached: Attached,
    era: u8,
    orphans: HashMap<MapData, u64, u8>,
    lost: Array<MapData, u64>,
    counts: Arc<Mutex<Array<MapData, InKernel>>>,
    lacks: [Option<TraceError>; 3],
}

impl Tracepoints {
    /// Attaches to the kernel, for the network namespace that this thread is in. Nothing is told before
    /// [`tell_of`](Self::tell_of), unless `everything` in the namespace is asked for.
    ///
    /// # Errors
    /// When it is not permitted, or this kernel cannot do it.
    pub fn attach(everything: bool) -> Result<Tracepoints, TraceError> {
        if !capabilities::may_trace().unwrap_or(true) {
            return Err(TraceError::NotPermitted);
        }
        let types = Btf::from_sys_fs().map_err(|error| TraceError::NoTypes(root_of(&error)))?;
        let namespace = namespace().map_err(|error| TraceError::NoNamespace(root_of(&error)))?;
        let mut programs = EbpfLoader::new()
            .btf(Some(&types))
            .verifier_log_level(VerifierLogLevel::DISABLE)
            .override_global("netns", &namespace, true)
            .override_global("everything", &u8::from(everything), true)
            .load(PROGRAM)
            .map_err(|error| TraceError::refused("load the program for tracepoints", &error))?;
        let mut attaching = Attaching { programs: &mut programs, types: &types, attached: Attached::default() };
        // Timers first: a minisocket that is told of by its timer is then never missed by the socket's own end.
        let timers = TIMERS.iter().try_for_each(|name| attaching.once(name, &format!("on_{name}")));
        attaching.twice("inet_sock_set_state", "on_set_state")?;
        attaching.once("tcp_receive_reset", "on_receive_reset")?;
        // Before Linux 6.10 it does not say why; without it, a RST that answers late data passes for one that came in.
        let resets = attaching.once("tcp_send_reset", "on_send_reset");
        let retransmits = attaching
            .once("tcp_retransmit_skb", "on_retransmit_skb")
            .or_else(|_| attaching.once("tcp_retransmit_skb", "on_retransmit_skb_older"))
            .and_then(|()| attaching.once("tcp_retransmit_synack", "on_retransmit_synack"));
        let attached = attaching.attached;
        let ring = RingBuf::try_from(take(&mut programs, "events")?);
        let ports = Array::try_from(take(&mut programs, "ports")?);
        let current = Array::try_from(take(&mut programs, "era")?);
        let orphans = HashMap::try_from(take(&mut programs, "orphans")?);
        let lost = Array::try_from(take(&mut programs, "lost")?);
        let counts = Array::try_from(take(&mut programs, "counts")?);
        let rescued = Array::try_from(take(&mut programs, "rescued")?);
        let open = |error: &(dyn Error + 'static)| TraceError::refused("open the maps of the program", error);
        Ok(Tracepoints {
            ring: ring.map_err(|e| open(&e))?,
            ports: ports.map_err(|e| open(&e))?,
            current: current.map_err(|e| open(&e))?,
            orphans: orphans.map_err(|e| open(&e))?,
            lost: lost.map_err(|e| open(&e))?,
            counts: Arc::new(Mutex::new(counts.map_err(|e| open(&e))?)),
            rescued: rescued.map_err(|e| open(&e))?,
            attached,
            era: 0,
            lacks: [timers.err(), resets.err(), retransmits.err()],
        })
    }

    /// Whether minisockets and request sockets are told of, and counted: otherwise their ends show in the table only.
    #[must_use]
    pub fn tells_of_timers(&self) -> bool {
        self.lacks[0].is_none()
    }

    /// What this kernel does not tell of, and why.
    pub fn lacks(&self) -> impl Iterator<Item = &TraceError> {
        self.lacks.iter().flatten()
    }

    /// From now on tells of these services' sockets, and counts them from zero, each at its place in the list. What is told
    /// from here on carries the era that this returns.
    ///
    /// # Errors
    /// When there are too many, or the kernel refuses.
    pub fn tell_of(&mut self, services: &[(Role, u16)]) -> Result<u8, TraceError> {
        if services.len() > SERVICES {
            let why = format!("{} of at most {SERVICES}", services.len());
            return Err(TraceError::Refused { what: "services to count".to_owned(), why });
        }
        let era = (self.era + 1) % ERAS as u8;
        let first = usize::from(era) * SERVICES;
        {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            for place in first..first + services.len() {
                let zero = counts.set(place as u32, [0; 16], 0);
                zero.map_err(|error| TraceError::refused("count from zero", &error))?;
            }
        }
        // One byte of it changes, so nobody reads half of a change.
        let begun = self.current.set(0, u32::from(era), 0);
        begun.map_err(|error| TraceError::refused("begin to count anew", &error))?;
        self.era = era;
        for (place, (role, port)) in services.iter().enumerate() {
            let refused = |error: MapError| TraceError::refused(format!("watch {role} port {port}"), &error);
            let mut places = self.ports.get(&u32::from(*port), 0).map_err(refused)?;
            places[*role as usize] = place as u32 + 1;
            self.ports.set(u32::from(*port), places, 0).map_err(refused)?;
        }
        Ok(era)
    }

    /// Waits until every program that had begun has ended, before the table is read: one that has read which counts are in use
    /// would otherwise add to those of before after that. membarrier(2) waits for all that runs under RCU, as programs do: ten
    /// or twenty milliseconds.
    pub fn wait_for_programs(&self) {
        // Otherwise everything is counted anew all the time.
        if self.tells_of_timers()
            && let Err(error) = rustix::thread::membarrier(MembarrierCommand::Global)
        {
            // A sandbox, or CPUs without a tick (nohz_full). What it is for is rare.
            tracing::debug!(%error, "membarrier");
        }
    }

    /// Lets the program know of a minisocket in FIN_WAIT2 that was there before it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn know_orphan(&mut self, cookie: u64) -> Result<(), TraceError> {
        self.orphans.insert(cookie, 1, 0).map_err(|error| TraceError::refused("note an orphan", &error))
    }

    /// Tells the program that a minisocket in FIN_WAIT2 is in TIME_WAIT now: where the new end of its clock falls into the same
    /// bucket of the timer wheel as the old one (`__mod_timer`), nothing is announced. Returns whether it did not know.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn forget_orphan(&mut self, cookie: u64) -> Result<bool, TraceError> {
        match self.orphans.remove(&cookie) {
            Ok(()) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(TraceError::refused("note the end of an orphan", &error)),
        }
    }

    /// The counts of the present era, to be read by somebody else.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts { map: Arc::clone(&self.counts), first: usize::from(self.era) * SERVICES }
    }

    /// Calls `told` with each event that waits, in the order in which they happened on each CPU; with a ring's worth at most,
    /// so that there is an end to it however fast they come. Returns how many there were.
    pub fn drain(&mut self, mut told: impl FnMut(&Event)) -> usize {
        for count in 0..RING {
            let Some(item) = self.ring.next() else { return count };
            if let Some(event) = Event::read(&item) {
                told(&event);
            } else {
                tracing::debug!(length = item.len(), "an event that this program does not know");
            }
        }
        RING
    }

    /// How many events were lost, ever.
    ///
    /// # Errors
    /// What bpf(2) says, or proc(5).
    pub fn losses(&self) -> Result<Losses, TraceError> {
        let failed = |error: &(dyn Error + 'static)| TraceError::refused("read how many events were lost", error);
        let ring = self.lost.get(&0, 0).map_err(|e| failed(&e))?;
        let mut missed = 0;
        for watched in &self.attached.watched {
            missed += watched.misses().map_err(|e| failed(&e))?;
        }
        let rescued = self.rescued.get(&0, 0).map_err(|e| failed(&e))?;
        Ok(Losses { ring, missed: missed.saturating_sub(rescued) })
    }

    /// What tells that events wait; to be asked for within the event loop that waits for it.
    ///
    /// # Errors
    /// When no descriptor is left, or the event loop does not take it.
    #[expect(unsafe_code, reason = "whoever waits for a descriptor vouches that it stays open")]
    pub fn alarm(&self) -> io::Result<Alarm> {
        let ring = self.ring.as_fd().try_clone_to_owned()?;
        // SAFETY: an OwnedFd is open, names one description, and is closed by dropping it only: here when `AsyncFd` is.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        ring.map(Alarm).map_err(io::Error::from)
    }
}

/// Rings when events wait that were not there when it rang last.
pub struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    /// Waits for events; what comes after this returns rings again.
    ///
    /// # Errors
    /// When the event loop is gone.
    pub async fn rings(&self) -> io::Result<()> {
        self.0.readable().await.map(|mut ready| ready.clear_ready())
    }
}

/// Events that were lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// The ring had no room for them; the counts have them.
    pub ring: u64,
    /// They happened in an interrupt while every program for them was at work on that CPU; nothing has them. Other network
    /// namespaces' are among them.
    pub missed: u64,
}

/// How many sockets of each service are in each state, by the kernel's own count of what it announced in one era.
pub struct Counts {
    map: Arc<Mutex<Array<MapData, InKernel>>>,
    first: usize,
}

impl Counts {
    /// What was added to the states of the service at `place` since the era began; less than 0 where more have left than
    /// came.
    ///
    /// # Errors
    /// What bpf(2) says.
    pub fn since_then(&self, place: usize) -> Result<[i64; State::SLOTS], TraceError> {
        let map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = map.get(&((self.first + place) as u32), 0);
        let counts = counts.map_err(|error| TraceError::refused("read the counts", &error))?;
        let mut shown = [0; State::SLOTS];
        shown.copy_from_slice(&counts[..State::SLOTS]);
        Ok(shown)
    }
}

/// What is attached; detached when this is dropped. A link keeps its program, and that its maps: few other descriptors of
/// theirs are held.
#[derive(Default)]
struct Attached {
    links: Vec<BtfTracePointLink>,
    watched: Vec<Watched>,
}

/// A program whose misses are counted: what happened in an interrupt while it ran, and passed it by.
struct Watched {
    /// What the kernel says of it (fdinfo, proc(5)). Kept open, because losses must be known when no descriptor is left, too;
    /// and the descriptor that it is about.
    info: File,
    _program: OwnedFd,
}

impl Watched {
    /// Linux 5.12; 0 before.
    fn misses(&self) -> io::Result<u64> {
        let mut info = [0; 1024];
        let length = self.info.read_at(&mut info, 0)?;
        let info = String::from_utf8_lossy(&info[..length]);
        let misses = info.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
        Ok(misses.and_then(|n| n.trim().parse().ok()).unwrap_or(0))
    }
}

/// Attaches one program after the other.
struct Attaching<'a> {
    programs: &'a mut Ebpf,
    types: &'a Btf,
    attached: Attached,
}

impl Attaching<'_> {
    /// Attaches the two programs of a tracepoint, in this order: the second one does what passed the first one by.
    fn twice(&mut self, tracepoint: &str, name: &str) -> Result<(), TraceError> {
        self.once(tracepoint, name)?;
        // What passes this one by, the first one has done.
        self.attach(tracepoint, &format!("{name}_again")).map(drop)
    }

    /// Attaches a program, and watches its misses.
    fn once(&mut self, tracepoint: &str, name: &str) -> Result<(), TraceError> {
        let program = self.attach(tracepoint, name)?;
        let info = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
        let info = File::open(&info).map_err(|error| TraceError::refused(format!("open {info}"), &error))?;
        self.attached.watched.push(Watched { info, _program: program });
        Ok(())
    }

    /// Loads and attaches a program; returns a descriptor of it.
    fn attach(&mut self, tracepoint: &str, name: &str) -> Result<OwnedFd, TraceError> {
        let refused = |error: &(dyn Error + 'static)| TraceError::refused(format!("tracepoint {tracepoint}"), error);
        let program = self.programs.program_mut(name).ok_or_else(|| TraceError::Refused {
            what: format!("tracepoint {tracepoint}"),
            why: format!("the program has no {name}"),
        })?;
        let program: &mut BtfTracePoint = program.try_into().map_err(|e: ProgramError| refused(&e))?;
        program.load(tracepoint, self.types).map_err(|e| refused(&e))?;
        let link = program.attach().map_err(|e| refused(&e))?;
        self.attached.links.push(program.take_link(link).map_err(|e| refused(&e))?);
        program.fd().map_err(|e| refused(&e))?.as_fd().try_clone_to_owned().map_err(|e| refused(&e))
    }
}

fn take(programs: &mut Ebpf, map: &str) -> Result<aya::maps::Map, TraceError> {
    programs.take_map(map).ok_or_else(|| TraceError::Refused {
        what: format!("map {map}"),
        why: "the program has none of that name".to_owned(),
    })
}

/// The kernel's own name for the network namespace that this thread is in.
fn namespace() -> io::Result<u64> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    sockopt::namespace(socket.as_fd())
}
