//! Values that flags take, each with an error that says what was expected.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use crate::tcp::State;

/// A duration that can be added to any moment; more is a slip of the finger.
const LONGEST: Duration = Duration::from_hours(3653 * 24);

/// `30s`, `200ms`, `1m30s`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span(Duration);

impl From<Span> for Duration {
    fn from(span: Span) -> Duration {
        span.0
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Span, String> {
        if text == "0" {
            return Ok(Span(Duration::ZERO));
        }
        let span = humantime::parse_duration(text).map_err(|e| format!("{e}; a duration reads 200ms, 30s or 1m30s"))?;
        if span > LONGEST { Err("ten years at most".to_owned()) } else { Ok(Span(span)) }
    }
}

/// `host:port`, the host a name, an IPv4 address or a bracketed IPv6 address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TargetName {
    /// The name or address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl fmt::Display for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for TargetName {
    type Err = String;

    fn from_str(text: &str) -> Result<TargetName, String> {
        let expected = || "expected HOST:PORT, [IPV6]:PORT".to_owned();
        let (host, port) = text.rsplit_once(':').ok_or_else(expected)?;
        let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let host = match bracketed {
            Some(inside) => inside,
            None if host.contains([':', '[', ']']) => return Err(expected()),
            None => host,
        };
        let port = port.parse::<u16>().map_err(|_| expected())?;
        if host.is_empty() || host.contains(char::is_whitespace) {
            return Err(expected());
        }
        if port == 0 {
            return Err("port 0 cannot be connected to".to_owned());
        }
        Ok(TargetName { host: host.to_owned(), port })
    }
}

/// A state in any usual spelling.
#[derive(Clone, Copy, Debug)]
pub(super) struct StateName(pub(super) State);

impl FromStr for StateName {
    type Err = String;

    fn from_str(text: &str) -> Result<StateName, String> {
        let known = || State::ALL.map(State::name).join(", ");
        State::named(text).map(StateName).ok_or_else(|| format!("no such state; there are {}", known()))
    }
}

/// An address to serve the web side on, or `none`.
#[derive(Clone, Copy, Debug)]
pub(super) struct WebAddress(pub(super) Option<SocketAddr>);

impl FromStr for WebAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<WebAddress, String> {
        if text == "none" {
            return Ok(WebAddress(None));
        }
        // As exporters take it: ":9907" is every address.
        let text = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
        text.parse().map(|a| WebAddress(Some(a))).map_err(|_| "expected IP:PORT, :PORT or none".to_owned())
    }
}

/// Opens a second, or `max`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate(pub(super) Option<f64>);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        if text == "max" {
            return Ok(Rate(None));
        }
        match text.parse::<f64>() {
            Ok(rate) if (1e-6..=1e9).contains(&rate) => Ok(Rate(Some(rate))),
            _ => Err("expected a number of opens a second above 0, or max".to_owned()),
        }
    }
}

/// `64`, `64..1024`, `1k`, `1M`; k and M are 1,024 and 1,048,576 bytes.
#[derive(Clone, Debug)]
pub(super) struct Sizes(pub(super) RangeInclusive<usize>);

/// Payload is made and checked as it flows, so that only patience bounds it.
const LARGEST: usize = 1 << 40;

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Sizes, String> {
        let expected = || "expected BYTES or MIN..MAX (as 64, 16k, 1M, 64..1024), at least 1".to_owned();
        let size = |text: &str| {
            let (digits, unit) = match text.as_bytes().last() {
                Some(b'k' | b'K') => (&text[..text.len() - 1], 1 << 10),
                Some(b'm' | b'M') => (&text[..text.len() - 1], 1 << 20),
                _ => (text, 1),
            };
            digits.parse::<usize>().ok().and_then(|n| n.checked_mul(unit)).filter(|n| (1..=LARGEST).contains(n))
        };
        let (low, high) = text.split_once("..").unwrap_or((text, text));
        match (size(low), size(high)) {
            (Some(low), Some(high)) if low <= high => Ok(Sizes(low..=high)),
            _ => Err(expected()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let ok = |text: &str| text.parse::<TargetName>().unwrap().to_string();
        assert_eq!(ok("localhost:7007"), "localhost:7007");
        assert_eq!(ok("[::1]:7"), "[::1]:7");
        for wrong in ["", ":1", "a", "a:", "a:70000", "a:0", "::1:7", "[::1]", "a b:1", "[a:1"] {
            assert!(wrong.parse::<TargetName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes() {
        let ok = |text: &str| text.parse::<Sizes>().unwrap().0;
        assert_eq!(ok("64"), 64..=64);
        assert_eq!(ok("1..2k"), 1..=2048);
        assert_eq!(ok("1M"), 1 << 20..=1 << 20);
        for wrong in ["", "0", "k", "3..2", "..", "1..", "-1", "99999999999999999999", "1G", "é"] {
            assert!(wrong.parse::<Sizes>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn spans() {
        assert_eq!(Duration::from("1m30s".parse::<Span>().unwrap()), Duration::from_secs(90));
        assert_eq!(Duration::from("0".parse::<Span>().unwrap()), Duration::ZERO);
        assert!("10years".parse::<Span>().is_ok());
        for wrong in ["", "5", "-1s", "11years", "18446744073709551615s", "99999999999999999999999s"] {
            assert!(wrong.parse::<Span>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn rates_and_web_addresses() {
        assert!(matches!("max".parse(), Ok(Rate(None))));
        assert!(matches!("0.5".parse(), Ok(Rate(Some(_)))));
        for wrong in ["0", "-1", "NaN", "inf", "x"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
        assert_eq!(":9907".parse::<WebAddress>().unwrap().0.unwrap().to_string(), "[::]:9907");
        assert!("nowhere".parse::<WebAddress>().is_err());
    }
}
