//! The facts of the states at the end that closes second.

use super::clock::Clock;
use super::facts::{Facts, Lasts, Limit, Query, UNANSWERED, Way};
use super::sysctls;
use crate::tcp::State;

pub(super) const CLOSE_WAIT: Facts = Facts {
    state: State::CloseWait,
    meaning: "The peer has closed; our application has not.",
    waiting: "All wait for our application. The peer's FIN is in and acknowledged; the process has yet to read the end \
              of the stream, send what it still has to say, and close.",
    ends: &[
        Way { to: State::LastAck, on: &["close(2) or shutdown(2): our FIN goes out"] },
        Way {
            to: State::Close,
            on: &[
                "RST from the peer: EPIPE",
                "our RST: SO_LINGER 0, or close(2) with data unread",
                "no answer to data, or to keepalive probes: ETIMEDOUT",
                "ss -K",
            ],
        },
    ],
    lasts: Lasts {
        words: "For ever: no timer, no sysctl. Only the application ends it. Keepalive, where SO_KEEPALIVE is set, ends \
                it only when the peer is gone or has forgotten it; a peer in FIN_WAIT2 answers.",
        limits: &[
            Limit { when: "SO_KEEPALIVE is on and the peer is gone", clock: Clock::Keepalive },
            Limit { when: "data is out and nobody answers", clock: Clock::Retransmission },
        ],
        differs: "It does not differ: RFC 9293 has no limit either, so that the peer can get a long answer.",
        sources: &["RFC 9293 sections 3.3.2 and 3.6.1", "kernel: tcp_fin, tcp_keepalive_timer"],
    },
    sysctls: &[
        sysctls::KEEPALIVE_TIME,
        sysctls::KEEPALIVE_INTVL,
        sysctls::KEEPALIVE_PROBES,
        sysctls::RETRIES2,
        sysctls::NR_OPEN,
    ],
    piles_up: &[
        "An error path that returns without closing.",
        "A read that returned 0, taken for nothing yet.",
        "A handler that waits for a lock, a database or a queue; a pool that keeps dead connections.",
        "Each holds a descriptor and buffers; when descriptors are gone, accept(2) and connect(2) fail.",
    ],
    commands: &[
        Query {
            text: "ss -tanp state close-wait",
            shows: "who; Recv-Q 0: end of stream read, not closed; 1: only the FIN is unread; more: data too",
        },
        Query { text: "ls /proc/PID/fd | wc -l; grep 'open files' /proc/PID/limits", shows: "what is left" },
    ],
    queries: &[
        Query {
            text: r#"deriv(echoscope_tcp_sockets{state="close_wait"}[3m]) * 60"#,
            shows: "how many more a minute; steadily above 0: a leak",
        },
        Query {
            text: r#"echoscope_tcp_oldest_seconds{state="close_wait"}"#,
            shows: "how long the oldest of our own has waited",
        },
        Query {
            text: r#"min_over_time(echoscope_tcp_sockets{state="close_wait"}[15m]) > 0"#,
            shows: "where no age is known: a floor that never empties",
        },
    ],
    remedies: &[
        "Now: note process and peers, dump its stacks, restart it: its end closes them all.",
        "For good: close at the end of the stream on every path (defer, RAII, try-with-resources).",
        "A timeout on all that a handler waits for, and an idle timeout on the connection (--idle-timeout).",
        "Keepalive is no cure: it ends the connection and leaves the descriptor open.",
    ],
    alerts: &["EchoscopeCloseWaitLeak", "EchoscopeCloseWaitStuck", "EchoscopeDescriptorsRunOut"],
};

pub(super) const LAST_ACK: Facts = Facts {
    state: State::LastAck,
    meaning: "The peer closed first, then we: our FIN is out, not acknowledged.",
    waiting: "Our kernel waits for one last ACK, of our FIN. The peer goes to TIME_WAIT when it gets that FIN, to \
              answer it again should its ACK be lost.",
    ends: &[Way {
        to: State::Close,
        on: &["the ACK of our FIN", "RST", "no answer: ETIMEDOUT", "our RST: too many orphans", "ss -K"],
    }],
    lasts: Lasts {
        words: "One round trip. Unanswered, as FIN_WAIT1: 102 s at least once the descriptor is closed, 924.6 s at \
                least while it is open. Each FIN that is repeated starts the peer's TIME_WAIT anew.",
        limits: UNANSWERED,
        differs: "RFC 9293 does not know orphans: Linux has less patience with a connection whose descriptor is closed.",
        sources: &["RFC 9293 section 3.6, figure 12", "kernel: tcp_write_timeout, tcp_orphan_retries"],
    },
    sysctls: &[sysctls::ORPHAN_RETRIES, sysctls::RETRIES2, sysctls::RTO_MAX_MS, sysctls::MAX_ORPHANS],
    piles_up: &[
        "Peers that are gone since they sent their FIN.",
        "Peers that closed and do not read what we still send: the window is closed, our FIN stands behind the data.",
        "A firewall that forgets a connection at the first FIN, and drops what follows.",
    ],
    commands: &[
        Query {
            text: "ss -tanop state last-ack",
            shows: "Send-Q: not acknowledged, FIN included; timer:(on,…,N): repeated; timer:(persist,…): closed window",
        },
        Query {
            text: "nstat -az TcpExtTCPAbortOnTimeout TcpExtTCPAbortOnMemory",
            shows: "given up for want of an answer; reset because there were too many orphans",
        },
    ],
    queries: &[
        Query { text: r#"echoscope_tcp_sockets{state="last_ack"}"#, shows: "normally 0 or a few" },
        Query { text: r#"echoscope_tcp_oldest_seconds{state="last_ack"}"#, shows: "over a second: nobody answers" },
    ],
    remedies: &[
        "A few end by themselves. Many: find out where FIN or ACK is lost (tcpdump at both ends).",
        "A firewall on the way: let it keep a closed connection for a minute or two.",
        "A server with many such peers: tcp_orphan_retries 2 or 3; raise tcp_max_orphans rather than reach it.",
    ],
    alerts: &[],
};
