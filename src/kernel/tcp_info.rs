//! `struct tcp_info` (include/uapi/linux/tcp.h): what the kernel tells of one connection.
//!
//! Read by offset rather than through a C struct: the kernel returns as much as it knows, older ones less.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use crate::tcp::State;

/// Bytes read at most; Linux 6.18 fills 280, of which the fields below end at 156.
const SIZE: usize = 192;

/// The fields of `struct tcp_info` that echoscope uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// The state of the descriptor. TIME_WAIT is never shown here: the descriptor reads CLOSE, and a minisocket lives
    /// on.
    pub state: State,
    /// How long ago the last ACK came.
    pub last_ack: Duration,
    /// Smoothed round-trip time; zero before the first sample.
    pub rtt: Duration,
    /// Segments retransmitted over the whole life.
    pub retransmits: u32,
    /// Bytes that the peer acknowledged, our SYN (when we opened) and our FIN included (RFC 4898).
    pub bytes_acked: u64,
    /// Bytes that arrived in order, the peer's FIN included.
    pub bytes_received: u64,
    /// Segments that arrived, of any kind; `None` before Linux 4.2.
    pub segments_in: Option<u32>,
    /// Segments that arrived with payload; `None` before Linux 4.6.
    pub data_segments_in: Option<u32>,
}

impl TcpInfo {
    /// Reads TCP_INFO of `socket` (tcp(7)); about 0.4 µs, no privilege.
    ///
    /// # Errors
    /// What getsockopt(2) says, or `InvalidData` for a state this program does not know.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<TcpInfo> {
        let mut bytes = [0u8; SIZE];
        let mut len = SIZE as libc::socklen_t;
        #[allow(unsafe_code)]
        // SAFETY: the pointer and length describe `bytes`, which outlives the call; the kernel writes `len` bytes at
        // most and says in `len` how many. The descriptor is borrowed, so it stays open.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                bytes.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let bytes = bytes.get(..len as usize).unwrap_or(&bytes);
        TcpInfo::parse(bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "TCP_INFO too short or unknown"))
    }

    /// The fields in `bytes`; `None` when they end before `tcpi_total_retrans` (Linux 2.6.13) or name no known state.
    pub(super) fn parse(bytes: &[u8]) -> Option<TcpInfo> {
        let u32_at = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        Some(TcpInfo {
            state: State::from_kernel(*bytes.first()?)?,
            last_ack: Duration::from_millis(u32_at(56)?.into()),
            rtt: Duration::from_micros(u32_at(68)?.into()),
            retransmits: u32_at(100)?,
            bytes_acked: u64_at(120).unwrap_or(0),
            bytes_received: u64_at(128).unwrap_or(0),
            segments_in: u32_at(140),
            data_segments_in: u32_at(152),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn a_real_connection_is_established_by_one_segment() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let info = TcpInfo::of(client.as_fd()).unwrap();
        assert_eq!((info.state, info.segments_in, info.bytes_acked), (State::Established, Some(1), 1));
        assert_eq!(TcpInfo::of(listener.as_fd()).unwrap().state, State::Listen);
    }

    #[test]
    fn truncated_at_every_length() {
        let mut bytes = [0u8; SIZE];
        bytes[0] = State::FinWait2 as u8;
        bytes[140..144].copy_from_slice(&7u32.to_ne_bytes());
        for len in 0..SIZE {
            let parsed = TcpInfo::parse(&bytes[..len]);
            assert_eq!(parsed.is_some(), len >= 104, "{len}");
            if let Some(info) = parsed {
                assert_eq!(info.segments_in, (len >= 144).then_some(7), "{len}");
            }
        }
        bytes[0] = 99;
        assert_eq!(TcpInfo::parse(&bytes), None);
    }
}
