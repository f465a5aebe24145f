//! What the Linux kernel tells about TCP sockets, as safe functions.
//!
//! The only floor that may say `unsafe`. Must not know: roles, metrics, what anybody does with the answers.

pub mod capabilities;
pub mod clock;
mod error;
pub mod filter;
pub mod limits;
pub mod namespace;
mod opens;
pub mod owners;
pub mod ports;
mod procfs;
mod queue;
mod row;
mod sock_diag;
pub mod sockopt;
pub mod sysctl;
pub mod table;
mod tcp_info;
pub mod tracepoints;
mod wire;

pub use error::{LineError, TableError};
pub use opens::opens;
pub use queue::AcceptQueue;
pub use row::{Row, TIME_WAIT, Wanted, timer};
pub use sock_diag::{DestroyEvents, Destroyed};
pub use table::{Observer, Table, WhyNot};
pub use tcp_info::TcpInfo;
pub use tracepoints::Tracepoints;
pub use wire::WireError;
