//! Who holds a socket: `/proc/PID/fd` names its inode (proc(5)). Only what may be looked at is found: processes of the same
//! user, or all of them with CAP_SYS_PTRACE, in the same PID namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;

/// A process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its PID.
    pub pid: u32,
    /// The descriptor.
    pub fd: u32,
    /// `/proc/PID/comm`: the name, 15 bytes at most before what cannot be shown is escaped.
    pub name: String,
    /// The command line, as far as it fits on a line; escaped too.
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

/// Those of `known` who still hold their socket, by the name that they have now. Costs two system calls or so each.
#[must_use]
pub fn still(known: &Owners) -> Owners {
    let holds = |inode: u32, owner: &Owner| {
        let link = fs::read_link(format!("/proc/{}/fd/{}", owner.pid, owner.fd)).ok()?;
        (self::inode(link.to_str()?)? == inode).then_some(())
    };
    let mut found = Owners::new();
    for (inode, owner) in known {
        if holds(*inode, owner).is_some() {
            let name = name(owner.pid);
            // Another program in the same process: execve(2).
            let command = if name == owner.name { owner.command.clone() } else { command(owner.pid) };
            found.insert(*inode, Owner { name, command, ..*owner });
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

/// A process may call itself anything, but not so that a line reads otherwise than it is: what moves the cursor, turns the
/// direction of writing around or takes no room is shown by its number.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut plain = String::new();
    for c in text.trim_end_matches(['\0', '\n']).chars().take(COMMAND) {
        match c {
            // Between two arguments.
            '\0' => plain.push(' '),
            c if c.is_control() || is_format(c) => drop(write!(plain, "{}", c.escape_unicode())),
            c => plain.push(c),
        }
    }
    plain
}

/// Unicode's format characters (category Cf: bidirectional controls, joiners, tags and the like) and its separators of
/// lines and paragraphs. Those of Arabic, Syriac, Kaithi, hieroglyphs and shorthand that are visible or rare are let
/// through.
fn is_format(c: char) -> bool {
    matches!(
        c,
        '\u{ad}'
            | '\u{61c}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}'
    )
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
    }

    #[test]
    fn a_name_shows_what_it_is_made_of() {
        for (name, shown) in [
            ("nginx: worker\n", "nginx: worker"),
            ("a\0b\0", "a b"),
            ("a\u{1b}[31m", r"a\u{1b}[31m"),
            ("a\nb\tc\u{85}d", r"a\u{a}b\u{9}c\u{85}d"),
            ("\u{202e}dab", r"\u{202e}dab"),
            ("a\u{2066}b\u{2069}\u{200f}\u{61c}", r"a\u{2066}b\u{2069}\u{200f}\u{61c}"),
            ("a\u{200b}b\u{feff}\u{2028}\u{e0041}", r"a\u{200b}b\u{feff}\u{2028}\u{e0041}"),
            ("データ", "データ"),
            ("שרת", "שרת"),
            ("e\u{301}", "e\u{301}"),
        ] {
            assert_eq!(printable(name.as_bytes()), shown, "{name:?}");
        }
        assert_eq!(printable(b"cut\xe3\x81"), "cut\u{fffd}", "15 bytes may end within a character");
        assert_eq!(printable(&[b'x'; 999]).len(), COMMAND);
    }

    #[test]
    fn who_has_closed_holds_it_no_more() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = fs::read_link(format!("/proc/self/fd/{}", listener.as_raw_fd())).unwrap();
        let inode = inode(link.to_str().unwrap()).unwrap();
        let mut known = of(&BTreeSet::from([inode]));
        assert_eq!(still(&known), known);
        // Its name is asked for anew.
        known.get_mut(&inode).unwrap().name = "another".into();
        assert_eq!(still(&known)[&inode].name, name(std::process::id()));
        drop(listener);
        assert_eq!(still(&known), Owners::new());
    }
}
