//! The facts of the states before and while a connection is open.

use super::clock::Clock;
use super::facts::{Facts, Lasts, Limit, Query, Way};
use super::sysctls;
use crate::tcp::State;

pub(super) const CLOSED: Facts = Facts {
    state: State::Close,
    meaning: "No connection: every life begins and ends here.",
    waiting: "Nobody waits. A socket is CLOSED before connect(2) or listen(2), and again after its connection has \
              ended, for as long as its descriptor stays open.",
    ends: &[
        Way { to: State::Listen, on: &["listen(2)"] },
        Way { to: State::SynSent, on: &["connect(2): our SYN goes out"] },
    ],
    lasts: Lasts {
        words: "As long as the process keeps the descriptor. No timer.",
        limits: &[],
        differs: "RFC 9293 calls it fictional: there is no connection, so there is nothing to keep. Linux has the \
                  socket.",
        sources: &["RFC 9293 section 3.3.2"],
    },
    sysctls: &[sysctls::NR_OPEN, sysctls::FILE_MAX],
    piles_up: &[
        "Descriptors that stay open after their connection has ended by a RST, a timeout or ss -K: the kernel's table \
         does not show them, and each counts until accept(2) and connect(2) fail with EMFILE.",
    ],
    commands: &[
        Query { text: "ls -l /proc/PID/fd | grep -c socket:", shows: "the sockets that the process holds, all kinds" },
        Query {
            text: "ss -tanpH | grep -c 'pid=PID,'",
            shows: "its TCP sockets in the kernel's table; those that are CLOSED are not there",
        },
        Query { text: "ss -s", shows: "closed: the TCP sockets of the whole host that are in no table" },
    ],
    queries: &[
        Query {
            text: r#"sum by (instance, role, from) (rate(echoscope_tcp_transitions_total{to="close"}[2m]))"#,
            shows: "how lives end: time_wait and last_ack are the good ends",
        },
        Query {
            text: "sum by (instance, role, reason) (rate(echoscope_connections_closed_total[2m]))",
            shows: "and why they were closed",
        },
        Query { text: "process_open_fds / process_max_fds", shows: "what is left to lose" },
    ],
    remedies: &[
        "Close the descriptor at every end of a connection, also after an error: ECONNRESET, EPIPE, ETIMEDOUT.",
        "Let the language do it: defer, RAII, try-with-resources.",
    ],
    alerts: &["EchoscopeDescriptorsRunOut", "EchoscopeConnectionsReset"],
};

pub(super) const LISTEN: Facts = Facts {
    state: State::Listen,
    meaning: "A server waits for SYNs; this is no connection yet.",
    waiting: "The application waits for clients. Behind the listener the kernel keeps requests whose third segment is \
              missing (SYN_RECV), and open connections that wait for accept(2) (ESTABLISHED): the accept queue.",
    ends: &[
        Way { to: State::SynRecv, on: &["a SYN: a request is made beside the listener, which stays"] },
        Way { to: State::Close, on: &["close(2)", "shutdown(2) for reading"] },
    ],
    lasts: Lasts {
        words: "Until the application closes it. No timer. Whoever is still in its queues is reset then.",
        limits: &[],
        differs: "Figure 5 of RFC 9293 lets a listener send a SYN (LISTEN to SYN_SENT). Linux has no call for it.",
        sources: &["RFC 9293 sections 3.3.2 and 3.10.1", "listen(2)", "kernel: tcp_conn_request, inet_csk_listen_stop"],
    },
    sysctls: &[
        sysctls::SOMAXCONN,
        sysctls::MAX_SYN_BACKLOG,
        sysctls::SYNCOOKIES,
        sysctls::ABORT_ON_OVERFLOW,
        sysctls::MIGRATE_REQ,
    ],
    piles_up: &[
        "Its queue, not the listener: an application that accepts too slowly or not at all (its own limit, a blocked \
         event loop, EMFILE).",
        "A burst that is larger than the backlog.",
        "A full accept queue drops SYNs without a word. Clients repeat theirs after a second: slow connects, then \
         timeouts.",
    ],
    commands: &[
        Query {
            text: "ss -tlnp '( sport = :PORT )'",
            shows: "Recv-Q: how many wait for accept(2); Send-Q: how many may (one more fits)",
        },
        Query {
            text: "nstat -az TcpExtListenOverflows TcpExtListenDrops TcpExtTCPReqQFullDrop",
            shows: "grow when the accept queue, or the queue of requests, was full; all listeners together",
        },
    ],
    queries: &[
        Query {
            text: "echoscope_accept_queue_length / echoscope_accept_queue_limit",
            shows: "how full the accept queue is",
        },
        Query {
            text: "sum by (instance, service, reason) (rate(echoscope_accept_errors_total[2m])) > 0",
            shows: "accept(2) that fails",
        },
    ],
    remedies: &[
        "Accept in a loop of its own and hand the connection over.",
        "For bursts, a larger backlog: both the application's (--accept-backlog) and net.core.somaxconn, then restart.",
        "Leave tcp_abort_on_overflow at 0: with it a burst turns into resets.",
        "To stop without resets: accept what is in the queue first, then close the listener.",
    ],
    alerts: &["EchoscopeAcceptQueueFilling"],
};

pub(super) const SYN_SENT: Facts = Facts {
    state: State::SynSent,
    meaning: "A client's SYN is out; no answer has come.",
    waiting: "Our kernel waits for the peer's SYN+ACK and repeats the SYN. The application waits for connect(2).",
    ends: &[
        Way { to: State::Established, on: &["SYN+ACK; our ACK goes out"] },
        Way { to: State::SynRecv, on: &["a SYN without ACK: both ends connect at once (RFC 9293 figure 7)"] },
        Way {
            to: State::Close,
            on: &[
                "RST: ECONNREFUSED",
                "no answer: ETIMEDOUT",
                "ICMP: EHOSTUNREACH, ENETUNREACH",
                "close(2): the application gives up",
            ],
        },
    ],
    lasts: Lasts {
        words: "One round trip. Unanswered, the SYN is repeated after 1, 2, 3, 4, 5, 7, 11, 19, 35 and 67 s, and given \
                up after 131 s (127 s before Linux 6.5). An application may give up sooner: by its own timeout, \
                TCP_SYNCNT or TCP_USER_TIMEOUT.",
        limits: &[Limit { when: "nobody answers", clock: Clock::Syn }],
        differs: "RFC 9293 asks for three minutes at least (section 3.8.3, MUST-23); Linux gives up before that.",
        sources: &["RFC 9293 sections 3.5 and 3.8.3", "RFC 6298 section 2", "tcp(7)", "kernel: tcp_write_timeout"],
    },
    sysctls: &[sysctls::SYN_RETRIES, sysctls::SYN_LINEAR_TIMEOUTS, sysctls::RTO_MAX_MS, sysctls::LOCAL_PORT_RANGE],
    piles_up: &[
        "SYNs or answers that vanish: a firewall that drops instead of refusing, a host that is gone, a wrong route, a \
         full conntrack table.",
        "A peer whose accept queue is full: it drops SYNs.",
        "A client that tries again without a limit; each try holds a local port and a descriptor.",
    ],
    commands: &[
        Query {
            text: "ss -tanop state syn-sent",
            shows: "who connects where; timer:(on,…,N): repeated N times so far",
        },
        Query {
            text: "nstat -az TcpExtTCPSynRetrans TcpAttemptFails",
            shows: "SYNs and SYN+ACKs repeated; handshakes that failed",
        },
        Query {
            text: "tcpdump -nni any 'tcp port PORT and tcp[tcpflags] & (tcp-syn|tcp-rst) != 0'",
            shows: "at both ends: where the SYN or its answer is lost (IPv4)",
        },
    ],
    queries: &[
        Query {
            text: r#"echoscope_tcp_sockets{role="client", state="syn_sent"}"#,
            shows: "normally 0 or a few: a handshake is short",
        },
        Query {
            text: r#"rate(echoscope_outcomes_total{outcome="connect_timeout"}[2m]) > 0"#,
            shows: "targets that do not answer",
        },
    ],
    remedies: &[
        "Look at both ends with tcpdump: does the SYN arrive, does an answer leave, does it come back?",
        "At the peer: is the accept queue full (nstat -az TcpExtListenOverflows)?",
        "Give connect(2) a timeout of the application's own: two minutes are too long for nearly everybody.",
        "Let firewalls inside your own network reject instead of drop: a client then knows at once.",
    ],
    alerts: &["EchoscopeConnectSlow", "EchoscopeEchoFailing"],
};

pub(super) const SYN_RECV: Facts = Facts {
    state: State::SynRecv,
    meaning: "A SYN came and was answered; the third segment is missing.",
    waiting: "Our kernel waits for the client's ACK and repeats the SYN+ACK. The application knows nothing yet: this is \
              a small request beside the listener, without a descriptor.",
    ends: &[
        Way { to: State::Established, on: &["the ACK: the connection goes to the accept queue"] },
        Way {
            to: State::FinWait1,
            on: &["close(2) or shutdown(2) before the ACK: after a simultaneous open, or with TCP Fast Open"],
        },
        Way { to: State::Close, on: &["RST", "no ACK: the request vanishes without an event", "the listener closes"] },
    ],
    lasts: Lasts {
        words: "One round trip. Unanswered, the SYN+ACK is repeated after 1, 3, 7, 15 and 31 s, and the request dropped \
                after 63 s; sooner when requests fill more than half of the listener's backlog. TCP_DEFER_ACCEPT \
                makes it last until data comes, or its own time is over.",
        limits: &[Limit { when: "nobody answers", clock: Clock::SynAck }],
        differs: "In figure 5 of RFC 9293 a RST leads back to LISTEN. On Linux the listener never left LISTEN; the \
                  request beside it is dropped.",
        sources: &["RFC 9293 sections 3.5 and 3.8.3", "tcp(7)", "kernel: reqsk_timer_handler, tcp_check_req"],
    },
    sysctls: &[
        sysctls::SYNACK_RETRIES,
        sysctls::SYNCOOKIES,
        sysctls::MAX_SYN_BACKLOG,
        sysctls::SOMAXCONN,
        sysctls::ABORT_ON_OVERFLOW,
    ],
    piles_up: &[
        "A SYN flood: requests from addresses that never answer.",
        "An accept queue that filled meanwhile: the ACK is dropped. The client takes itself for ESTABLISHED.",
        "Answers that are lost on the way back: asymmetric routes, a firewall that saw one direction only.",
    ],
    commands: &[
        Query {
            text: "ss -tano state syn-recv '( sport = :PORT )'",
            shows: "timer:(on,…,N): the SYN+ACK was repeated N times so far",
        },
        Query {
            text: r#"ss -tanH state syn-recv | awk '{sub(/:[0-9]+$/, "", $4); print $4}' | sort | uniq -c"#,
            shows: "from where: one network, or thousands of addresses",
        },
        Query {
            text: "nstat -az TcpExtSyncookiesSent TcpExtTCPReqQFullDoCookies TcpExtListenOverflows",
            shows: "the queue of requests was full; the accept queue was",
        },
    ],
    queries: &[
        Query {
            text: r#"echoscope_tcp_sockets{role="server", state="syn_recv"}"#,
            shows: "normally 0 or a few: a handshake is short",
        },
        Query {
            text: "echoscope_accept_queue_length / echoscope_accept_queue_limit",
            shows: "near 1: the accept queue is the reason",
        },
    ],
    remedies: &[
        "Accept queue full: see LISTEN.",
        "A flood: keep tcp_syncookies at 1, raise the backlog, filter upstream.",
        "Otherwise it is the way back to the client: tcpdump there.",
    ],
    alerts: &["EchoscopeAcceptQueueFilling", "EchoscopeConnectSlow"],
};

pub(super) const ESTABLISHED: Facts = Facts {
    state: State::Established,
    meaning: "The connection is open: data flows both ways.",
    waiting: "Nobody has to wait: either end may send, either may close. When all is said, each waits for the other's \
              application.",
    ends: &[
        Way { to: State::FinWait1, on: &["close(2) or shutdown(2): our FIN goes out"] },
        Way { to: State::CloseWait, on: &["the peer's FIN; our kernel acknowledges it"] },
        Way {
            to: State::Close,
            on: &[
                "RST from the peer",
                "our RST: SO_LINGER 0, or close(2) with data unread",
                "no answer to data, or to keepalive probes: ETIMEDOUT",
                "ss -K",
            ],
        },
    ],
    lasts: Lasts {
        words: "For ever: an idle connection has no timer. With SO_KEEPALIVE a peer that is gone is noticed after two \
                hours and nine probes, 2 h 11 min. Data that nobody acknowledges ends it after 924.6 s at least, \
                TCP_USER_TIMEOUT sooner. A peer that answers with a closed window may take any time (section \
                3.8.6.1).",
        limits: &[
            Limit { when: "SO_KEEPALIVE is on and an idle peer is gone", clock: Clock::Keepalive },
            Limit { when: "data is out and nobody answers", clock: Clock::Retransmission },
        ],
        differs: "RFC 9293 gives an open connection a user timeout of five minutes by default (section 3.9.1.1); Linux \
                  has none unless TCP_USER_TIMEOUT is set.",
        sources: &["RFC 9293 sections 3.8.3, 3.8.4 and 3.8.6.1", "RFC 1122 section 4.2.3.6", "tcp(7)"],
    },
    sysctls: &[
        sysctls::KEEPALIVE_TIME,
        sysctls::KEEPALIVE_INTVL,
        sysctls::KEEPALIVE_PROBES,
        sysctls::RETRIES2,
        sysctls::RTO_MAX_MS,
    ],
    piles_up: &[
        "Peers that are gone without FIN or RST (power, network, a NAT that forgot), where nobody sends and keepalive \
         is off.",
        "Idle peers and pools without a limit or an idle timeout.",
        "Connections that nobody has accepted yet: see LISTEN.",
    ],
    commands: &[
        Query {
            text: "ss -tanop state established '( sport = :PORT )'",
            shows: "Recv-Q: not yet read here; Send-Q: not yet acknowledged; timer:(keepalive,…) where it is on",
        },
        Query {
            text: "ss -tani state established '( sport = :PORT )'",
            shows: "lastsnd, lastrcv: milliseconds since; large: idle, or the peer is gone",
        },
        Query {
            text: "ss -tanpH state established '( sport = :PORT )' | grep -vc users:",
            shows: "as root: how many nobody has accepted",
        },
    ],
    queries: &[
        Query { text: r#"echoscope_tcp_sockets{state="established"}"#, shows: "everybody's on these ports" },
        Query {
            text: "echoscope_connections_open",
            shows: "our own; what the kernel has more are others', or not accepted yet",
        },
        Query { text: r#"echoscope_tcp_oldest_seconds{state="established"}"#, shows: "the oldest of our own" },
    ],
    remedies: &[
        "An idle timeout in the application (--idle-timeout): it knows what idle means.",
        "SO_KEEPALIVE with TCP_KEEPIDLE below the shortest idle timeout on the way (NAT, load balancer).",
        "TCP_USER_TIMEOUT where data is sent and an answer is due.",
        "A limit on connections, and on pools.",
    ],
    alerts: &["EchoscopeConnectionsReset", "EchoscopeDescriptorsRunOut"],
};
