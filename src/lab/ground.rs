//! Where the lab may play: whoever attaches filters needs CAP_NET_ADMIN over the network namespace that his sockets are
//! in, and anybody has that in a namespace of his own.

use anyhow::bail;

use crate::kernel::{capabilities, filter, namespace};

/// Where the lab plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    /// In a network namespace of its own.
    Own,
    /// Where the process was started: permitted, and beside whatever else is there.
    Here,
}

impl Ground {
    /// Finds a place. Must come before the process has a second thread.
    ///
    /// # Errors
    /// When no place is permitted: with what is missing, and how to get it.
    pub fn find() -> anyhow::Result<Ground> {
        // In a user namespace of one's own no capability counts for eBPF any more.
        if capabilities::may_trace().unwrap_or(false) && namespace::enter_own_network().is_ok() {
            return Ok(Ground::own());
        }
        let refused = match namespace::enter_own() {
            Ok(()) => return Ok(Ground::own()),
            Err(refused) => refused,
        };
        if namespace::enter_own_network().is_ok() {
            return Ok(Ground::own());
        }
        let Err(filters) = filter::permitted() else { return Ok(Ground::Here) };
        let reason = match namespace::switched_off_by() {
            Some((sysctl, value)) => format!("user namespaces are off here ({sysctl} = {value})"),
            None => "a container's seccomp profile or a security module refuses user namespaces".to_owned(),
        };
        bail!(
            "the lab has no place to play: a namespace of its own is refused (unshare: {refused}), {reason}; and where \
             it is, filters on its own sockets are refused too (SO_ATTACH_FILTER: {filters}), for want of \
             CAP_NET_ADMIN. In a container: docker run --user 0 --cap-drop ALL --cap-add NET_ADMIN --cap-add NET_RAW …"
        )
    }

    /// What one scenario teaches the kernel of the way to this host must not slow the next one down: a handshake that took a
    /// second would make every later connection repeat itself seconds apart (tcp_metrics). Where /proc/sys is read-only
    /// it takes longer, and that is all.
    fn own() -> Ground {
        let _ = std::fs::write("/proc/sys/net/ipv4/tcp_no_metrics_save", "1");
        Ground::Own
    }

    /// In words.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Ground::Own => "a network namespace of its own",
            Ground::Here => "this network namespace",
        }
    }
}
