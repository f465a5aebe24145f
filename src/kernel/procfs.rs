//! The socket table as text, /proc/net/tcp and tcp6 (proc(5)): for sandboxes that refuse netlink.
//!
//! The kernel prints every socket of the namespace each time, and no cookie: a socket is known by its addresses only.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::error::{LineError, TableError};
use super::row::{Row, Wanted};
use crate::tcp::{Flow, State};

const FILES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];

/// proc(5) counts timers in USER_HZ, which is 100 for every program on every Linux.
const TICK: Duration = Duration::from_millis(10);

/// Opens the files once, so that a refusal shows now.
pub(super) fn probe() -> Result<(), TableError> {
    File::open(FILES[0]).map(drop).map_err(|source| TableError::Io { what: "open /proc/net/tcp", source })
}

/// Calls `row` with every socket that is wanted, one line in memory at a time.
pub(super) fn each(wanted: &Wanted, row: &mut impl FnMut(&Row)) -> Result<(), TableError> {
    for (i, file) in FILES.iter().enumerate() {
        match File::open(file) {
            Ok(open) => each_line(BufReader::with_capacity(32 * 1024, open), wanted, row)?,
            // A kernel without IPv6 has no tcp6.
            Err(e) if i > 0 && e.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(TableError::Io { what: "open /proc/net/tcp", source }),
        }
    }
    Ok(())
}

fn each_line(mut lines: impl BufRead, wanted: &Wanted, row: &mut impl FnMut(&Row)) -> Result<(), TableError> {
    let mut line = Vec::with_capacity(256);
    let mut header = true;
    loop {
        line.clear();
        let len = lines
            .read_until(b'\n', &mut line)
            .map_err(|source| TableError::Io { what: "read /proc/net/tcp", source })?;
        if len == 0 {
            return Ok(());
        }
        if std::mem::take(&mut header) {
            continue;
        }
        let found = parse(&line)?;
        if wanted.states.contains(found.state) && wanted.wants(&found.flow) {
            row(&found);
        }
    }
}

fn parse(line: &[u8]) -> Result<Row, LineError> {
    let wrong = |field| LineError { field, line: String::from_utf8_lossy(line).trim().chars().take(200).collect() };
    let text = std::str::from_utf8(line).map_err(|_| wrong("text"))?;
    let mut fields = text.split_ascii_whitespace().skip(1);
    let mut next = |field| fields.next().ok_or_else(|| wrong(field));
    let local = address(next("local address")?).ok_or_else(|| wrong("local address"))?;
    let peer = address(next("remote address")?).ok_or_else(|| wrong("remote address"))?;
    let state =
        u8::from_str_radix(next("state")?, 16).ok().and_then(State::from_kernel).ok_or_else(|| wrong("state"))?;
    let (send_queue, receive_queue) = hex_pair(next("queues")?).ok_or_else(|| wrong("queues"))?;
    let (timer, expires) = hex_pair(next("timer")?).ok_or_else(|| wrong("timer"))?;
    let retransmits = u32::from_str_radix(next("retransmits")?, 16).map_err(|_| wrong("retransmits"))?;
    // uid and timeout before it. A 64-bit number that netlink too tells the lower half of only.
    let inode = fields.nth(2).and_then(|text| text.parse::<u64>().ok()).ok_or_else(|| wrong("inode"))? as u32;
    Ok(Row {
        state: state.shown(),
        flow: Flow { local, peer },
        cookie: None,
        timer: u8::try_from(timer).map_err(|_| wrong("timer"))?,
        retransmits: u8::try_from(retransmits).unwrap_or(u8::MAX),
        expires: TICK.saturating_mul(expires),
        receive_queue,
        // For a listener the kernel prints its accept queue's length here, and its limit nowhere.
        send_queue: (state != State::Listen).then_some(send_queue),
        inode,
        last_ack: None,
    })
}

fn hex_pair(text: &str) -> Option<(u32, u32)> {
    let (a, b) = text.split_once(':')?;
    Some((u32::from_str_radix(a, 16).ok()?, u32::from_str_radix(b, 16).ok()?))
}

/// Addresses are printed as the memory's 32-bit words, in the machine's byte order; ports as numbers.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut octets = [0; 16];
            for (i, quarter) in octets.chunks_exact_mut(4).enumerate() {
                quarter.copy_from_slice(&word(8 * i)?);
            }
            IpAddr::V6(Ipv6Addr::from(octets))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::StateSet;
    use proptest::prelude::*;

    const RECORDED: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode                                                     \n\
   0: 0100007F:1B5F 00000000:0000 0A 00000000:00000002 00:00000000 00000000     0        0 21412 1 0000000000000000 100 0 0 10 0                     \n\
   1: 0100007F:1B5F 0100007F:D4A2 08 00000000:00000001 00:00000000 00000000     0        0 21413 1 0000000000000000 20 4 30 10 -1                    \n\
   2: 0100007F:D4A4 0100007F:1B5F 06 00000000:00000000 03:0000176B 00000000     0        0 0 3 0000000000000000                                      \n\
   3: 0000000000000000FFFF00000100007F:1B5F 0000000000000000FFFF00000100007F:D4A6 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 20 4 30 10 -1\n";

    fn rows(text: &[u8], wanted: &Wanted) -> Result<Vec<Row>, TableError> {
        let mut rows = Vec::new();
        each_line(text, wanted, &mut |row| rows.push(*row))?;
        Ok(rows)
    }

    fn all() -> Wanted {
        Wanted::new(StateSet::of(&State::ALL), &[7007], &[7007])
    }

    #[test]
    fn recorded_lines() {
        let rows = rows(RECORDED.as_bytes(), &all()).unwrap();
        let listener = &rows[0];
        assert_eq!((listener.state, listener.receive_queue, listener.send_queue), (State::Listen, 2, None));
        assert_eq!(listener.flow.local.to_string(), "127.0.0.1:7007");
        assert_eq!((rows[1].state, rows[1].flow.peer.port()), (State::CloseWait, 0xD4A2));
        assert_eq!(
            (rows[2].state, rows[2].timer, rows[2].expires),
            (State::TimeWait, 3, Duration::from_millis(59_950))
        );
        assert_eq!(rows[3].flow.canonical().local.to_string(), "127.0.0.1:7007");
    }

    #[test]
    fn states_and_ports_filter() {
        let leaks = Wanted::new(StateSet::of(&[State::CloseWait]), &[7007], &[]);
        assert_eq!(rows(RECORDED.as_bytes(), &leaks).unwrap().len(), 1);
        let other = Wanted::new(StateSet::of(&State::ALL), &[80], &[]);
        assert_eq!(rows(RECORDED.as_bytes(), &other).unwrap(), []);
    }

    #[test]
    fn truncated_at_every_length_is_rows_or_a_typed_error() {
        for len in 0..RECORDED.len() {
            if let Err(e) = rows(&RECORDED.as_bytes()[..len], &all()) {
                assert!(matches!(e, TableError::Line(_)), "{e}");
            }
        }
    }

    #[test]
    fn the_live_table_reads() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut seen = 0;
        let wanted = Wanted::new(StateSet::of(&[State::Listen]), &[port], &[]);
        each(&wanted, &mut |row| seen += u32::from(row.flow.local == listener.local_addr().unwrap())).unwrap();
        assert_eq!(seen, 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_rows_or_a_typed_error(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut text = b"header\n".to_vec();
            text.extend(bytes);
            let _ = rows(&text, &all());
        }

        #[test]
        fn any_change_to_a_recorded_line_is_rows_or_a_typed_error(at in 0..RECORDED.len(), byte in any::<u8>()) {
            let mut text = RECORDED.as_bytes().to_vec();
            text[at] = byte;
            let _ = rows(&text, &all());
        }
    }
}
