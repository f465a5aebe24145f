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

/// Gives up what only the loading needed, unless `reads` does not work without: before Linux 5.19 every bpf(2) takes CAP_BPF
/// where `kernel.unprivileged_bpf_disabled` is set. Returns whether it is given up. A thread's capabilities are its own, and
/// its children's: to be called while the process has one thread.
///
/// # Errors
/// What capset(2) says.
pub fn give_up_tracing(reads: impl FnOnce() -> bool) -> io::Result<bool> {
    let before = capabilities(None)?;
    let mut sets = before;
    sets.effective.remove(FOR_TRACEPOINTS);
    set_capabilities(None, sets)?;
    if !reads() {
        set_capabilities(None, before)?;
        return Ok(false);
    }
    sets.permitted.remove(FOR_TRACEPOINTS);
    sets.inheritable.remove(FOR_TRACEPOINTS);
    set_capabilities(None, sets)?;
    Ok(true)
}
