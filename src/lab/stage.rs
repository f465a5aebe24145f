//! Where a scenario plays: a port of its own, both ends of its connections, faults on their sockets, and a look at the
//! kernel's table. What the ends do is observed and told as of any other connection.

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use socket2::Socket;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use crate::afterlife::{Afterlife, Departed};
use crate::conn::Conn;
use crate::kernel::filter::{self, Segment};
use crate::kernel::{Row, Table, Wanted, clock, timer};
use crate::ledger::{Life, Reason};
use crate::listener::{ListenConfig, ListenerLife, listen};
use crate::log::STEPS;
use crate::tcp::{Flow, Identity, Known, Lifecycle, Role, State, StateSet};

/// How long anything may take that loopback does at once, timers of a second or two included.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How often the kernel is asked meanwhile.
const POLL: Duration = Duration::from_millis(5);

/// How many rows of the table are worth a line each.
const ROWS: usize = 6;

/// A scenario's stage.
pub struct Stage {
    pub(super) name: &'static str,
    pub(super) address: SocketAddr,
    pub(super) afterlife: Afterlife,
    pub(super) table: Arc<Mutex<Table>>,
    pub(super) hold: Duration,
    pub(super) facts: Mutex<Vec<(&'static str, bool)>>,
}

/// A listener that narrates its own life.
pub(super) struct Listening<'a> {
    stage: &'a Stage,
    listener: Option<TcpListener>,
    life: Option<ListenerLife>,
}

impl Stage {
    /// How long anything may take on this stage. The kernel doubles the pause before each repeat: after a hold, the next
    /// one may come as much later again, and the one after it twice as much.
    fn patience(&self) -> Duration {
        PATIENCE + self.hold * 2
    }

    /// Tells what happens.
    pub(super) fn tell(&self, step: &str) {
        tracing::info!(target: STEPS, scenario = self.name, "{step}");
    }

    /// Notes whether something is as it was said to be.
    pub(super) fn confirm(&self, fact: &'static str, holds: bool) {
        self.tell(&format!("{}: {fact}", if holds { "so it is" } else { "NOT SO" }));
        lock(&self.facts).push((fact, holds));
    }

    /// Listens on the stage's port; `backlog` connections may wait for accept(2).
    pub(super) fn listen(&self, backlog: u32) -> anyhow::Result<Listening<'_>> {
        let at = clock::monotonic();
        let listener = listen(&ListenConfig { address: self.address, backlog, share_port: false })
            .with_context(|| format!("listen on {}", self.address))?;
        let life = ListenerLife::open(&listener, self.address, at, self.afterlife.journal());
        Ok(Listening { stage: self, listener: Some(TcpListener::from_std(listener)?), life })
    }

    /// Opens a connection to the stage's port.
    pub(super) async fn connect(&self) -> anyhow::Result<Conn> {
        self.connect_by(PATIENCE, |_| Ok(())).await.with_context(|| format!("connect to {}", self.address))
    }

    /// Opens a connection by a socket that `prepare` has tuned, and gives up after `patience`.
    pub(super) async fn connect_by(
        &self,
        patience: Duration,
        prepare: impl FnOnce(&Socket) -> std::io::Result<()>,
    ) -> std::io::Result<Conn> {
        self.connect_to(self.address, patience, prepare).await
    }

    /// The same, to another address on the stage's port.
    pub(super) async fn connect_to(
        &self,
        address: SocketAddr,
        patience: Duration,
        prepare: impl FnOnce(&Socket) -> std::io::Result<()>,
    ) -> std::io::Result<Conn> {
        Conn::connect_prepared(address, patience, self.afterlife.clone(), prepare).await
    }

    /// A listener, and both ends of one connection to it.
    pub(super) async fn connected(&self) -> anyhow::Result<(Listening<'_>, Conn, Conn)> {
        let listener = self.listen(16)?;
        let client = self.connect().await?;
        let server = listener.accept().await?;
        Ok((listener, client, server))
    }

    /// Lets the network lose these segments on their way to the socket, which is `whose`.
    pub(super) fn lose(&self, socket: BorrowedFd<'_>, segment: Segment, whose: &str) -> anyhow::Result<()> {
        self.tell(&format!("the network loses every {segment} on its way to {whose}"));
        filter::lose(socket, segment).with_context(|| format!("attach a filter that loses {segment:?}"))
    }

    /// Loses nothing any more.
    pub(super) fn heal(&self, socket: BorrowedFd<'_>) -> anyhow::Result<()> {
        self.tell("the network is well again");
        filter::remove(socket).context("take the filter off")
    }

    /// Waits until `conn` is in `state`.
    pub(super) async fn reach(&self, conn: &mut Conn, state: State) -> anyhow::Result<()> {
        let what = format!("a connection to enter {state}");
        let reached = self.until(&what, || (conn.observe() == state).then_some(())).await;
        reached.with_context(|| format!("a connection stays in {}", conn.observe()))
    }

    /// Waits until an end of this role is known to have entered `state`, however it was seen.
    pub(super) async fn told(&self, role: Role, state: State) -> anyhow::Result<()> {
        let port = self.address.port();
        let entered = |life: &Life| life.port == port && life.role == role && life.steps().any(|s| s.to == state);
        let ledger = self.afterlife.journal().ledger();
        self.until(&format!("a {role}'s life to enter {state}"), || {
            ledger.recent(usize::MAX).iter().any(entered).then_some(())
        })
        .await
    }

    /// Waits for `found`.
    pub(super) async fn until<T>(&self, what: &str, mut found: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
        let began = Instant::now();
        loop {
            if let Some(found) = found() {
                return Ok(found);
            }
            if began.elapsed() > self.patience() {
                bail!("waited {:?} for {what}", self.patience());
            }
            sleep(POLL).await;
        }
    }

    /// Sends bytes.
    pub(super) async fn send(&self, conn: &mut Conn, mut bytes: &[u8]) -> anyhow::Result<()> {
        while !bytes.is_empty() {
            timeout(self.patience(), conn.writable()).await.context("the socket takes nothing")??;
            match conn.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context("send"),
            }
        }
        Ok(())
    }

    /// Receives until `wanted` bytes are here, or the peer's FIN; returns how many it were.
    pub(super) async fn receive(&self, conn: &mut Conn, wanted: usize) -> anyhow::Result<usize> {
        let mut buffer = vec![0; 64 * 1024];
        let mut received = 0;
        while received < wanted {
            timeout(self.patience(), conn.readable()).await.context("nothing arrives")??;
            match conn.try_read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => received += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context("receive"),
            }
        }
        Ok(received)
    }

    /// Reads to the peer's FIN.
    pub(super) async fn hear_end(&self, conn: &mut Conn) -> anyhow::Result<()> {
        self.receive(conn, usize::MAX).await.map(drop)
    }

    /// Both ends close, one after the other: four segments.
    pub(super) async fn part(&self, first: &mut Conn, second: &mut Conn) -> anyhow::Result<()> {
        first.shutdown();
        self.hear_end(second).await?;
        second.shutdown();
        self.hear_end(first).await
    }

    /// Closes the descriptor; the kernel keeps what is left.
    pub(super) fn close(&self, mut conn: Conn) {
        self.tell(&format!("{}: close(2)", conn.role()));
        conn.because(Reason::Graceful);
    }

    /// Ends the connection with a RST.
    pub(super) fn abort(&self, mut conn: Conn) {
        self.tell(&format!("{}: SO_LINGER 0 and close(2): RST", conn.role()));
        conn.abort(Reason::Aborted);
    }

    /// The rows of the kernel's table that are this stage's, of one end.
    pub(super) fn rows(&self, role: Role) -> anyhow::Result<Vec<Row>> {
        let port = [self.address.port()];
        let (local, remote): (&[u16], &[u16]) = match role {
            Role::Server => (&port, &[]),
            Role::Client => (&[], &port),
        };
        let mut rows = Vec::new();
        let all = StateSet::of(&State::ALL);
        lock(&self.table).each(&Wanted::new(all, local, remote), |row| rows.push(*row)).context("read the table")?;
        Ok(rows)
    }

    /// How many sockets of one end are in a state.
    pub(super) fn count(&self, role: Role, state: State) -> anyhow::Result<usize> {
        Ok(self.rows(role)?.iter().filter(|row| row.state.shown() == state).count())
    }

    /// Waits until one end of the stage has a socket in `state`, and returns its row.
    pub(super) async fn in_table(&self, role: Role, state: State) -> anyhow::Result<Row> {
        let mut failed = None;
        let what = format!("a {role}'s socket in {state}");
        let found = self.until(&what, || match self.rows(role) {
            Ok(rows) => rows.into_iter().find(|row| row.state.shown() == state),
            Err(error) => {
                failed = Some(error);
                None
            }
        });
        let found = found.await;
        failed.map_or(found, Err)
    }

    /// Follows a server's socket that has no descriptor yet: its life is told by what the table shows of it.
    pub(super) fn follow(&self, row: &Row) -> anyhow::Result<()> {
        if self.afterlife.hears_the_kernel() {
            return Ok(());
        }
        let cookie = row.cookie.context("the table names no sockets here (procfs)")?;
        let now = clock::monotonic();
        let id = Identity { cookie, role: Role::Server, port: self.address.port(), flow: row.flow };
        let mut life = Lifecycle::accepted(now);
        let journal = self.afterlife.journal();
        journal.open(&id, life.state(), now);
        let evidence = lock(&self.table).observer().evidence();
        journal.record(&id, &life.observe(now, row.state.shown(), evidence));
        let departed = Departed {
            id,
            life,
            left: None,
            known: Known::default(),
            all_acked: u64::MAX,
            cause_if_gone: None,
            reason: None,
        };
        self.afterlife.follow(departed);
        Ok(())
    }

    /// Shows what the kernel's table says now, as ss prints it and as the metrics have it, and stays so for `--hold`.
    pub(super) async fn show(&self) -> anyhow::Result<()> {
        for role in Role::ALL {
            let rows: Vec<Row> = self.rows(role)?.into_iter().filter(|row| of_role(row, role, self.address)).collect();
            for row in rows.iter().take(ROWS) {
                self.tell(&format!("ss:  {}", as_ss(row)));
            }
            if rows.len() > ROWS {
                self.tell(&format!("ss:  … and {} more", rows.len() - ROWS));
            }
            for state in State::ALL {
                let count = rows.iter().filter(|row| row.state.shown() == state).count();
                if count > 0 {
                    let (role, port, state) = (role.label(), self.address.port(), state.label());
                    let labels = format!("port=\"{port}\",role=\"{role}\",state=\"{state}\"");
                    self.tell(&format!("metric:  echoscope_tcp_sockets{{{labels}}} {count}"));
                }
            }
        }
        if !self.hold.is_zero() {
            self.tell(&format!("held for {:?}: look at it", self.hold));
            sleep(self.hold).await;
        }
        Ok(())
    }
}

impl Listening<'_> {
    /// Accepts one connection.
    pub(super) async fn accept(&self) -> anyhow::Result<Conn> {
        let (stream, peer) = self.accept_silently().await?;
        let address = self.stage.address;
        Ok(Conn::accepted(stream, peer, Some(address), address.port(), self.stage.afterlife.clone())?)
    }

    /// Accepts one connection that is narrated already, by what the table shows of it.
    pub(super) async fn accept_silently(&self) -> anyhow::Result<(TcpStream, SocketAddr)> {
        Ok(timeout(self.stage.patience(), self.inner().accept()).await.context("nobody connects")??)
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.inner().as_fd()
    }

    fn inner(&self) -> &TcpListener {
        self.listener.as_ref().expect("the listener is taken in drop only")
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        drop(self.listener.take().map(TcpListener::into_std).map(|std| std.map(drop::<StdListener>)));
        if let Some(life) = self.life.take() {
            life.close(self.stage.afterlife.journal());
        }
    }
}

/// The address of stage number `index`.
pub(super) fn address(index: usize) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 7101 + u16::try_from(index).unwrap_or(u16::MAX)))
}

/// A connection to itself has both ports alike: it is shown once, as the client's that it is.
fn of_role(row: &Row, role: Role, address: SocketAddr) -> bool {
    let Flow { local, peer } = row.flow;
    role == Role::Client || !(local == address && peer == address)
}

/// A row as `ss -tano` prints it: state, Recv-Q, Send-Q, local, peer, timer.
fn as_ss(row: &Row) -> String {
    let state = match row.state.shown() {
        State::Established => "ESTAB".to_owned(),
        State::FinWait1 => "FIN-WAIT-1".to_owned(),
        State::FinWait2 => "FIN-WAIT-2".to_owned(),
        State::Close => "UNCONN".to_owned(),
        other => other.name().replace('_', "-"),
    };
    let peer = if row.state == State::Listen { "0.0.0.0:*".to_owned() } else { row.flow.peer.to_string() };
    let send_queue = row.send_queue.unwrap_or(0);
    let mut text = format!("{state:<10} {:>6} {send_queue:>6} {:>21} {peer:>21}", row.receive_queue, row.flow.local);
    let name = match row.timer {
        timer::RETRANSMIT => "on",
        timer::KEEPALIVE => "keepalive",
        timer::TIME_WAIT => "timewait",
        timer::PERSIST => "persist",
        _ => return text,
    };
    let _ = write!(text, " timer:({name},{:.1}s,{})", row.expires.as_secs_f64(), row.retransmits);
    text
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
