//! The scenarios, one file each.

mod accept_queue_overflow;
mod close_wait_leak;
mod drain;
mod fin_wait1_stuck;
mod fin_wait2_orphan;
mod half_close;
mod handshake_and_four_way_close;
mod keepalive_death;
mod last_ack_lost;
mod port_exhaustion;
mod refused;
mod reset_by_linger;
mod reset_by_unread_data;
mod retransmission_timeout;
mod simultaneous_close;
mod simultaneous_open;
mod slow_reader;
mod syn_recv_stuck;
mod syn_sent_stuck;
mod time_wait_assassination;
mod time_wait_flood;
mod time_wait_reuse;

use super::Scenario;

/// All of them, in the order of a life: opening, closing, failing.
pub const ALL: &[&dyn Scenario] = &[
    &handshake_and_four_way_close::HandshakeAndFourWayClose,
    &syn_sent_stuck::SynSentStuck,
    &syn_recv_stuck::SynRecvStuck,
    &fin_wait1_stuck::FinWait1Stuck,
    &half_close::HalfClose,
    &fin_wait2_orphan::FinWait2Orphan,
    &close_wait_leak::CloseWaitLeak,
    &last_ack_lost::LastAckLost,
    &simultaneous_open::SimultaneousOpen,
    &simultaneous_close::SimultaneousClose,
    &time_wait_flood::TimeWaitFlood,
    &port_exhaustion::PortExhaustion,
    &time_wait_reuse::TimeWaitReuse,
    &time_wait_assassination::TimeWaitAssassination,
    &reset_by_linger::ResetByLinger,
    &reset_by_unread_data::ResetByUnreadData,
    &refused::Refused,
    &accept_queue_overflow::AcceptQueueOverflow,
    &retransmission_timeout::RetransmissionTimeout,
    &keepalive_death::KeepaliveDeath,
    &slow_reader::SlowReader,
    &drain::Drain,
];
