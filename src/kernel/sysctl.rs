//! Settings of the kernel, as the process sees them in its own network namespace (proc(5), /proc/sys).

use std::fs;
use std::io;

/// The value at `path` under /proc/sys, several numbers separated by one space each; empty where nothing is set.
///
/// # Errors
/// When the file cannot be read: an older kernel does not have it, or a sandbox hides it.
pub fn read(path: &str) -> io::Result<String> {
    let text = fs::read_to_string(format!("/proc/sys/{path}"))?;
    Ok(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_numbers_are_one_line() {
        let range = read("net/ipv4/ip_local_port_range").unwrap();
        let ports: Vec<u16> = range.split(' ').map(|port| port.parse().unwrap()).collect();
        assert_eq!(ports.len(), 2, "{range:?}");
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        assert_eq!(read("net/ipv4/no_such_thing").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
