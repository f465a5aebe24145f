//! A user and network namespace of our own (user_namespaces(7), network_namespaces(7)): a kernel's TCP stack to
//! experiment with, in which whoever made it may do anything, and which ends with the process.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use socket2::{Domain, Socket, Type};

use super::sysctl;

/// Moves this process into a new network namespace whose loopback interface is up, with a user namespace around it in
/// which it has every capability. Sockets made before stay where they were made.
///
/// # Errors
/// What unshare(2) says: EPERM or ENOSPC where user namespaces are off or not permitted, EINVAL when the process
/// already has a second thread.
pub fn enter_own() -> io::Result<()> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET)?;
    // As oneself, so that files stay what they are. A group may be mapped only by who has given up setgroups(2).
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    bring_loopback_up()
}

/// The same without a user namespace, for who has CAP_SYS_ADMIN already.
///
/// # Errors
/// What unshare(2) says: EPERM without CAP_SYS_ADMIN.
pub fn enter_own_network() -> io::Result<()> {
    unshare(libc::CLONE_NEWNET)?;
    bring_loopback_up()
}

/// Why the kernel refuses user namespaces to everybody, if a sysctl says so: its name and value.
#[must_use]
pub fn switched_off_by() -> Option<(&'static str, String)> {
    const SWITCHES: [(&str, &str); 3] = [
        ("user.max_user_namespaces", "0"),
        ("kernel.unprivileged_userns_clone", "0"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1"),
    ];
    SWITCHES.into_iter().find_map(|(name, off)| {
        let value = sysctl::read(&name.replace('.', "/")).ok()?;
        (value == off).then_some((name, value))
    })
}

#[expect(unsafe_code, reason = "neither std nor socket2 can unshare")]
fn unshare(what: libc::c_int) -> io::Result<()> {
    // SAFETY: takes no pointers. The namespaces of a process with one thread change for all of it; with more, the kernel
    // refuses (CLONE_NEWUSER) or changes this thread's only.
    match unsafe { libc::unshare(what) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A new namespace's `lo` is down (netdevice(7)).
#[expect(unsafe_code, reason = "an interface's flags are set by ioctl only")]
fn bring_loopback_up() -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    // SAFETY: all of it is plain integers and bytes, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = from.cast_signed();
    }
    for (call, flags) in [(libc::SIOCGIFFLAGS, None), (libc::SIOCSIFFLAGS, Some(libc::IFF_UP))] {
        if let Some(up) = flags {
            // SAFETY: SIOCGIFFLAGS has just filled this member of the union; it is an integer.
            unsafe { request.ifr_ifru.ifru_flags |= up as libc::c_short };
        }
        // SAFETY: both calls read and write one ifreq, which lives as long as the call.
        if unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), call, &raw mut request) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
