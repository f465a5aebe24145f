//! Local ports that connect(2) may choose from (ip(7), `ip_local_port_range`).

use std::io;

use super::sysctl;

/// How many ports connect(2) can choose from for one pair of addresses and one remote port: the size of
/// `ip_local_port_range` less those in `ip_local_reserved_ports`, in this network namespace.
///
/// # Errors
/// When the files cannot be read or understood.
pub fn local_port_limit() -> io::Result<u32> {
    let range = sysctl::read("net/ipv4/ip_local_port_range")?;
    let reserved = sysctl::read("net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    available(&range, &reserved)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("ip_local_port_range reads {range:?}")))
}

fn available(range: &str, reserved: &str) -> Option<u32> {
    let mut bounds = range.split_whitespace().map(str::parse::<u16>);
    let (low, high) = (bounds.next()?.ok()?, bounds.next()?.ok()?);
    if low > high {
        return None;
    }
    let within = |port: &u16| (low..=high).contains(port);
    let mut taken = std::collections::HashSet::new();
    for item in reserved.trim().split(',').filter(|item| !item.is_empty()) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (first, last) = (first.trim().parse::<u16>().ok()?, last.trim().parse::<u16>().ok()?);
        taken.extend((first..=last).filter(within));
    }
    Some(u32::from(high - low) + 1 - u32::try_from(taken.len()).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_ports_are_taken_off_once() {
        assert_eq!(available("32768\t60999\n", "\n"), Some(28232));
        assert_eq!(available("1000 1009", "1001,1003-1004,1004,5000-6000\n"), Some(7));
        assert_eq!(available("1 65535", "0-65535"), Some(0));
        assert_eq!(available("9 8", ""), None);
        assert_eq!(available("", ""), None);
        assert_eq!(available("1 2", "x"), None);
    }

    #[test]
    fn this_machine_has_some() {
        assert!(local_port_limit().unwrap() > 0);
    }
}
