//! The facts of the states at the end that closes first, or at both when they close at once.

use super::clock::Clock;
use super::facts::{Facts, Lasts, Limit, Query, UNANSWERED, Way};
use super::sysctls;
use crate::tcp::State;

pub(super) const FIN_WAIT1: Facts = Facts {
    state: State::FinWait1,
    meaning: "We closed first: our FIN is out, not acknowledged.",
    waiting: "Our kernel waits for the peer's kernel to acknowledge the FIN and all data before it. No application has \
              to do anything.",
    ends: &[
        Way { to: State::FinWait2, on: &["the ACK of our FIN"] },
        Way { to: State::Closing, on: &["the peer's FIN, which does not acknowledge ours: both closed at once"] },
        Way { to: State::Close, on: &["RST", "no answer: ETIMEDOUT", "our RST: too many orphans", "ss -K"] },
    ],
    lasts: Lasts {
        words: "One round trip, and the peer may delay its ACK by 40 ms. Unanswered, the FIN is repeated: for 102 s at \
                least once the descriptor is closed, for 924.6 s at least while it is open (shutdown(2)). Behind a \
                closed window the FIN cannot leave: an open descriptor waits for ever, a closed one some five minutes.",
        limits: UNANSWERED,
        differs: "RFC 9293 does not know orphans: Linux has less patience with a connection whose descriptor is closed.",
        sources: &[
            "RFC 9293 sections 3.6 and 3.8.3",
            "kernel: tcp_write_timeout, tcp_orphan_retries, tcp_probe_timer",
            "kernel: Documentation/networking/ip-sysctl.rst",
        ],
    },
    sysctls: &[sysctls::ORPHAN_RETRIES, sysctls::RETRIES2, sysctls::RTO_MAX_MS, sysctls::MAX_ORPHANS],
    piles_up: &[
        "Peers that are gone while their connections are closed here: a drain after the network broke, a NAT or a \
         firewall that forgot.",
        "Peers that do not read: their window is closed, and our FIN stands behind the data.",
    ],
    commands: &[
        Query {
            text: "ss -tanop state fin-wait-1",
            shows: "Send-Q: not acknowledged, FIN included; timer:(on,…,N): repeated; timer:(persist,…): closed window",
        },
        Query { text: "cat /proc/net/sockstat", shows: "orphan: TCP sockets of the host without a descriptor" },
        Query {
            text: "nstat -az TcpExtTCPAbortOnTimeout TcpExtTCPAbortOnMemory",
            shows: "given up for want of an answer; reset because there were too many orphans",
        },
    ],
    queries: &[
        Query { text: r#"echoscope_tcp_sockets{state="fin_wait1"}"#, shows: "normally 0 or a few" },
        Query { text: r#"echoscope_tcp_oldest_seconds{state="fin_wait1"}"#, shows: "over a second: nobody answers" },
    ],
    remedies: &[
        "A few end by themselves. Many: find out where the ACKs are lost (tcpdump at both ends).",
        "A peer that does not read: TCP_USER_TIMEOUT, or wait with a deadline and reset (--close-timeout).",
        "A server with many such peers: tcp_orphan_retries 2 or 3; raise tcp_max_orphans rather than reach it.",
    ],
    alerts: &["EchoscopeDrainAborted"],
};

pub(super) const FIN_WAIT2: Facts = Facts {
    state: State::FinWait2,
    meaning: "Our FIN is acknowledged; the peer may still send, and has not closed.",
    waiting: "We wait for the peer's application to close; at the peer, this connection is in CLOSE_WAIT.",
    ends: &[
        Way { to: State::TimeWait, on: &["the peer's FIN; our kernel acknowledges it"] },
        Way {
            to: State::Close,
            on: &[
                "the descriptor is closed, and tcp_fin_timeout over",
                "the descriptor is closed, and data comes: our RST",
                "RST",
                "ss -K",
            ],
        },
    ],
    lasts: Lasts {
        words: "While the descriptor is open (shutdown(2)), for ever: half-close is legal. Once it is closed, \
                tcp_fin_timeout, 60 s. The kernel then keeps a small socket only, as in TIME_WAIT.",
        limits: &[Limit { when: "the descriptor is closed", clock: Clock::FinTimeout }],
        differs: "RFC 9293 has no timeout here. tcp(7) calls Linux' own a violation, needed against denial of service.",
        sources: &[
            "RFC 9293 section 3.6.1",
            "tcp(7): tcp_fin_timeout, TCP_LINGER2",
            "kernel: tcp_close, tcp_fin_time, tcp_time_wait",
        ],
    },
    sysctls: &[sysctls::FIN_TIMEOUT, sysctls::MAX_ORPHANS, sysctls::MAX_TW_BUCKETS],
    piles_up: &[
        "Peers that do not close when they read our FIN: what is FIN_WAIT2 here is a CLOSE_WAIT leak there.",
        "Applications that call shutdown(2) and then neither read to the end nor close.",
    ],
    commands: &[
        Query {
            text: "ss -tanop state fin-wait-2",
            shows: "timer:(timewait,…): closed here, gone then; users:(…): a descriptor is open here",
        },
        Query { text: "ss -tanop state close-wait", shows: "at the peer: the process that does not close" },
    ],
    queries: &[
        Query { text: r#"echoscope_tcp_sockets{state="fin_wait2"}"#, shows: "grows: peers do not close" },
        Query {
            text: r#"echoscope_tcp_oldest_seconds{state="fin_wait2"}"#,
            shows: "over 60 s: our own descriptor is open",
        },
    ],
    remedies: &[
        "At the peer: close at the end of the stream. See CLOSE_WAIT.",
        "Here: after shutdown(2) read to the end, with a deadline, then close(2) (--close-timeout, --idle-timeout).",
        "A lower tcp_fin_timeout cuts half-closed peers short; it does nothing for TIME_WAIT.",
    ],
    alerts: &["EchoscopeDrainAborted", "EchoscopeCloseWaitLeak"],
};

pub(super) const CLOSING: Facts = Facts {
    state: State::Closing,
    meaning: "Both closed at once: the FINs crossed, ours is not acknowledged.",
    waiting: "Each kernel waits for the other's to acknowledge its FIN. Both ends will go through TIME_WAIT.",
    ends: &[
        Way { to: State::TimeWait, on: &["the ACK of our FIN"] },
        Way { to: State::Close, on: &["RST", "no answer: ETIMEDOUT", "our RST: too many orphans", "ss -K"] },
    ],
    lasts: Lasts {
        words: "One round trip at most. Unanswered, as FIN_WAIT1: 102 s at least once the descriptor is closed, \
                924.6 s at least while it is open.",
        limits: UNANSWERED,
        differs: "RFC 9293 does not know orphans: Linux has less patience with a connection whose descriptor is closed.",
        sources: &["RFC 9293 section 3.6, figure 13", "kernel: tcp_fin, tcp_write_timeout, tcp_orphan_retries"],
    },
    sysctls: &[sysctls::ORPHAN_RETRIES, sysctls::RETRIES2, sysctls::RTO_MAX_MS, sysctls::MAX_ORPHANS],
    piles_up: &[
        "Hardly anything: two FINs must be under way at the same time. Both ends closing by the same idle timeout is \
         the usual reason.",
        "Those that stay: the ACKs are lost in one direction.",
    ],
    commands: &[Query {
        text: "ss -tanop state closing",
        shows: "timer:(on,…,N): the FIN was repeated N times so far",
    }],
    queries: &[
        Query {
            text: r#"sum by (instance, role) (rate(echoscope_tcp_transitions_total{to="closing"}[5m]))"#,
            shows: "how often both close at once",
        },
        Query { text: r#"echoscope_tcp_sockets{state="closing"}"#, shows: "normally 0" },
    ],
    remedies: &[
        "Nothing, while they are few: it is a good end.",
        "Let one end close first: give the two idle timeouts different lengths. TIME_WAIT is then at that end only.",
    ],
    alerts: &[],
};

pub(super) const TIME_WAIT: Facts = Facts {
    state: State::TimeWait,
    meaning: "Both FINs are done; who closed first waits: its last ACK may be lost.",
    waiting: "Our kernel waits for time to pass. If the last ACK was lost, the peer repeats its FIN, and somebody must \
              be there to answer; and old segments must be dead before a new connection gets the same addresses and \
              ports. No process, no descriptor, a small socket only.",
    ends: &[Way {
        to: State::Close,
        on: &[
            "60 s are over",
            "connect(2) takes the port over (tcp_tw_reuse)",
            "a SYN with a newer timestamp or a higher sequence number reopens it",
            "RST, with tcp_rfc1337=0",
            "ss -K",
        ],
    }],
    lasts: Lasts {
        words: "60 s, a constant of the kernel; no sysctl changes it, tcp_fin_timeout neither. The timer is coarse: up \
                to 62 s are seen. A FIN that the peer repeats starts it anew.",
        limits: &[Limit { when: "no FIN is repeated", clock: Clock::TimeWait }],
        differs: "RFC 9293 asks for twice the MSL (section 3.6.1, MUST-13), and takes two minutes for it (section \
                  3.4.2): four minutes. Linux waits one.",
        sources: &[
            "RFC 9293 sections 3.4.2 and 3.6.1",
            "RFC 6191 (newer timestamps), RFC 1337 (RST)",
            "kernel: TCP_TIMEWAIT_LEN, tcp_timewait_state_process, tcp_twsk_unique",
        ],
    },
    sysctls: &[
        sysctls::LOCAL_PORT_RANGE,
        sysctls::LOCAL_RESERVED_PORTS,
        sysctls::TW_REUSE,
        sysctls::TW_REUSE_DELAY,
        sysctls::TIMESTAMPS,
        sysctls::MAX_TW_BUCKETS,
        sysctls::RFC1337,
    ],
    piles_up: &[
        "Short connections that this end closes first: always as many as it closes in a minute. That alone is no \
         fault.",
        "It hurts a client: each holds its local port towards that destination. 28,232 ports, the default, are 470 \
         new connections a second; then connect(2) fails with EADDRNOTAVAIL.",
        "A connection for every request: no keep-alive, a pool that is too small, a retry storm.",
    ],
    commands: &[
        Query { text: "ss -tanH state time-wait | wc -l", shows: "how many" },
        Query {
            text: "ss -tanH state time-wait | awk '{print $4}' | sort | uniq -c | sort -rn | head",
            shows: "towards which address and port",
        },
        Query {
            text: "nstat -az TcpExtTW TcpExtTWRecycled TcpExtTCPTimeWaitOverflow",
            shows: "entered; taken over; skipped, because tcp_max_tw_buckets was reached",
        },
    ],
    queries: &[
        Query { text: r#"echoscope_tcp_sockets{state="time_wait"}"#, shows: "at the end that closes first" },
        Query {
            text: "echoscope_local_ports_used / echoscope_local_ports_limit",
            shows: "near 1: no new connection to that target",
        },
        Query {
            text: "echoscope_local_ports_limit / 60",
            shows: "connections a second that one pair of addresses bears",
        },
    ],
    remedies: &[
        "On a server: nothing. They cost little memory, and no port. A listener wants SO_REUSEADDR to restart.",
        "On a client: open fewer. Keep-alive, pools.",
        "Let the server close first (--close server-first): the client then holds no port.",
        "More addresses at either end, or a wider ip_local_port_range.",
        "tcp_tw_reuse=1 where the connecting end lives, with timestamps at both ends.",
        "Never: tcp_max_tw_buckets lowered; SO_LINGER 0 in an application (data under way is lost). tcp_tw_recycle is \
         gone since Linux 4.12.",
    ],
    alerts: &["EchoscopeLocalPortsWillRunOut", "EchoscopeLocalPortsExhausted"],
};
