//! Why the socket table could not be read.

use std::io;

use super::wire::WireError;

/// Why the table could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel answered with an error.
    #[error("sock_diag answered: {0}")]
    Answer(io::Error),
    /// The reply did not fit; what it said is unknown.
    #[error("sock_diag reply was cut short")]
    Overrun,
    /// The reply could not be understood.
    #[error("sock_diag reply: {0}")]
    Wire(#[from] WireError),
    /// A line could not be understood.
    #[error("/proc/net/tcp: {0}")]
    Line(#[from] LineError),
}

impl TableError {
    pub(super) fn answer(errno: i32) -> TableError {
        TableError::Answer(io::Error::from_raw_os_error(errno.saturating_neg()))
    }
}

/// A line that does not read as proc(5) says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unreadable {field} in line {line:?}")]
pub struct LineError {
    pub(super) field: &'static str,
    pub(super) line: String,
}
