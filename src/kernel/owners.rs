//! Who holds a socket: `/proc/PID/fd` names its inode (proc(5)). Only what may be looked at is found: processes of the same
//! user, or all of them with CAP_SYS_PTRACE, in the same PID namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// A process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its PID.
    pub pid: u32,
    /// The descriptor.
    pub fd: u32,
    /// `/proc/PID/comm`: the name, 15 bytes at most.
    pub name: String,
    /// The command line, as far as it fits on a line.
    pub command: String,
}

/// Who holds which socket, by inode.
pub type Owners = BTreeMap<u32, Owner>;

/// How much of a command line is worth keeping.
const COMMAND: usize = 120;

/// Finds who holds the sockets with these inodes. Of several processes that hold one, the one with the lowest PID. Costs
/// a readlink(2) for each descriptor that may be looked at.
#[must_use]
pub fn of(inodes: &BTreeSet<u32>) -> Owners {
    let mut found = BTreeMap::new();
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    let mut pids: Vec<u32> = processes.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    for pid in pids {
        // Gone meanwhile, or somebody else's: there is nothing to see.
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let held = fs::read_link(descriptor.path()).ok();
            let Some(inode) = held.as_ref().and_then(|link| inode(link.to_str()?)) else { continue };
            if !inodes.contains(&inode) || found.contains_key(&inode) {
                continue;
            }
            let fd = descriptor.file_name().to_str().and_then(|name| name.parse().ok()).unwrap_or(0);
            found.insert(inode, Owner { pid, fd, name: name(pid), command: command(pid) });
        }
    }
    found
}

/// `socket:[21412]`
fn inode(link: &str) -> Option<u32> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn name(pid: u32) -> String {
    printable(&fs::read(format!("/proc/{pid}/comm")).unwrap_or_default())
}

fn command(pid: u32) -> String {
    printable(&fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default())
}

/// A process may call itself anything: no control character leaves here.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let plain = text.trim_end_matches(['\0', '\n']).chars().map(|c| if c.is_control() { ' ' } else { c });
    plain.take(COMMAND).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    #[test]
    fn our_own_listener_is_ours() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = fs::read_link(format!("/proc/self/fd/{}", listener.as_raw_fd())).unwrap();
        let inode = inode(link.to_str().unwrap()).unwrap();
        let owner = of(&BTreeSet::from([inode])).remove(&inode).unwrap();
        assert_eq!((owner.pid, owner.fd), (std::process::id(), listener.as_raw_fd() as u32));
        assert!(owner.command.contains("echoscope"), "{owner:?}");
    }

    #[test]
    fn what_is_no_socket_has_no_inode() {
        assert_eq!(inode("socket:[7]"), Some(7));
        for link in ["pipe:[7]", "socket:[x]", "socket:7", "/dev/null", ""] {
            assert_eq!(inode(link), None, "{link}");
        }
        assert_eq!(printable(b"a\0b\x1b[31m\n"), "a b [31m");
    }
}
