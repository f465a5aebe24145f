//! Socket options that name, probe or end one connection.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
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

/// TCP_LINGER2: how long the kernel keeps FIN_WAIT2 for this socket once its descriptor is closed, in place of
/// `net.ipv4.tcp_fin_timeout` (tcp(7)); whole seconds.
///
/// # Errors
/// What setsockopt(2) says.
pub fn keep_orphan_for(socket: BorrowedFd<'_>, seconds: u16) -> io::Result<()> {
    set(socket, libc::IPPROTO_TCP, libc::TCP_LINGER2, seconds.into())
}

/// IP_LOCAL_PORT_RANGE: which local ports connect(2) may choose from for this socket, within
/// `net.ipv4.ip_local_port_range` (ip(7), Linux 6.3).
///
/// # Errors
/// What setsockopt(2) says: ENOPROTOOPT from older kernels.
pub fn choose_local_ports(socket: BorrowedFd<'_>, first: u16, last: u16) -> io::Result<()> {
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51; // include/uapi/linux/in.h
    let range = u32::from(last) << 16 | u32::from(first);
    set(socket, libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, range.cast_signed())
}

/// SO_NETNS_COOKIE: the kernel's own name for the network namespace that the socket is in (Linux 5.14).
///
/// # Errors
/// What getsockopt(2) says: ENOPROTOOPT from older kernels.
#[expect(unsafe_code, reason = "an option that neither socket2 nor rustix knows")]
pub fn namespace(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    let (fd, value) = (socket.as_raw_fd(), (&raw mut cookie).cast());
    // SAFETY: the kernel writes at most `size` bytes at `value`; both live as long as the call.
    match unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, value, &raw mut size) } {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}

#[expect(unsafe_code, reason = "options that socket2 does not know")]
fn set(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `size` bytes at `value`, which lives as long as the call.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
