//! What this process may do beyond others (capabilities(7)), and how it gives that up.

use std::io;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// What loading and attaching the program for tracepoints needs (bpf(2), Linux 5.8).
const FOR_TRACEPOINTS: CapabilitySet = CapabilitySet::BPF.union(CapabilitySet::PERFMON);

/// Whether this thread may load and attach a program for tracepoints.
///
/// # Errors
/// What capget(2) says.
pub fn may_trace() -> io::Result<bool> {
    let effective = capabilities(None)?.effective;
    Ok(effective.contains(FOR_TRACEPOINTS) || effective.contains(CapabilitySet::SYS_ADMIN))
}

/// Gives up what only the loading needed. A thread's capabilities are its own, and its children's: to be called while the
/// process has one thread.
///
/// # Errors
/// What capset(2) says.
pub fn give_up_tracing() -> io::Result<()> {
    let mut sets = capabilities(None)?;
    sets.effective.remove(FOR_TRACEPOINTS);
    sets.permitted.remove(FOR_TRACEPOINTS);
    sets.inheritable.remove(FOR_TRACEPOINTS);
    set_capabilities(None, sets).map_err(Into::into)
}
