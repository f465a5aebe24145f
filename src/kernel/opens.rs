//! How many connections this network namespace has opened, by the kernel's own count (RFC 4022, `/proc/net/snmp`).

use std::fs;
use std::io;

/// `tcpActiveOpens` and `tcpPassiveOpens`, added: every connection that was ever opened from here or accepted here, those
/// that failed to open included.
///
/// # Errors
/// When the file cannot be read or understood.
pub fn opens() -> io::Result<u64> {
    parse(&fs::read_to_string("/proc/net/snmp")?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/net/snmp names no TCP opens"))
}

fn parse(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next()?.split(' '), lines.next()?.split(' '));
    let counts: Vec<u64> = names
        .zip(values)
        .filter(|(name, _)| matches!(*name, "ActiveOpens" | "PassiveOpens"))
        .filter_map(|(_, value)| value.parse().ok())
        .collect();
    (counts.len() == 2).then(|| counts.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn named_columns_are_added() {
        let text = "Ip: A B\nIp: 1 2\nTcp: RtoMin ActiveOpens PassiveOpens MaxConn\nTcp: 200 12 30 -1\n";
        assert_eq!(parse(text), Some(42));
        for wrong in [
            "",
            "Tcp: ActiveOpens\nTcp: 1\n",
            "Tcp: ActiveOpens PassiveOpens\n",
            "Tcp: ActiveOpens PassiveOpens\nTcp: x 1\n",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_connection_over_loopback_counts_twice() {
        let before = opens().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(opens().unwrap() >= before + 2);
    }
}
