//! The program as its users meet it: the real binary, real sockets, real signals.

mod bad_input;
mod census;
mod compose;
mod confined;
mod dashboards;
mod drain;
mod ebpf;
mod explain;
mod fallback;
mod floors;
mod kernel_events;
mod lab;
mod lab_events;
mod losses;
mod modes;
mod page;
mod pair;
mod support;
mod trace;
mod watch;
mod web;
