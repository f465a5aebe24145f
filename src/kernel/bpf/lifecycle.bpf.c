/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * Tells user space of each change of state of the TCP sockets of one network namespace, and counts them by service and
 * state, TIME_WAIT and request sockets included.
 *
 * Tracepoints only, by BTF (tp_btf): no function is patched. What is not ours costs a few loads: the namespace is
 * compared first. Nothing here is ever asked to wait; an event that the ring has no room for is counted, and the counts
 * of sockets, which are kept here, stay right.
 *
 * Rebuilt from source and compared by .ci/bpf.
 */
#include "kernel.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define STATES 16
#define PORTS 65536
/* Sets of counts, of which one is in use, and services in each. */
#define ERAS 8
#define SERVICES 1024

/* What an event is about; Kind in tracepoints/event.rs. */
enum kind {
	CHANGED = 1,	/* a full socket: inet_sock_set_state */
	ARMED = 2,	/* a minisocket's clock starts: TIME_WAIT, or FIN_WAIT2 without a descriptor */
	DISARMED = 3,	/* that clock has run down, or was stopped */
	REQUESTED = 4,	/* a SYN was answered: a request socket's clock starts */
	UNREQUESTED = 5,	/* that clock has run down, or was stopped */
	RESET_SENT = 6,	/* why: enum sk_rst_reason */
	RETRANSMITTED = 7,	/* a full socket sent a segment again */
	SYNACK_RETRANSMITTED = 8,	/* a request did */
};

enum flag {
	DONE = 1,	/* the peer's FIN is in */
	ORPHAN = 2,	/* no descriptor */
	LINGER0 = 4,	/* close(2) shall reset */
	RESET = 8,	/* a RST came in just before */
	CLOSING = 16,	/* within close(2), not shutdown(2) */
	EXPIRED = 32,	/* the clock has run down */
	IPV6 = 64,	/* addresses are of 16 bytes */
};

struct event {
	__u64 cookie;
	__u64 at;	/* CLOCK_MONOTONIC, nanoseconds */
	__u8 local[16];
	__u8 peer[16];
	__u16 local_port;
	__u16 peer_port;
	__u32 interface;
	__u16 error;
	__u8 kind;
	__u8 from;
	__u8 to;
	__u8 flags;
	__u8 era;	/* which counts it is in */
	__u8 reason;	/* enum sk_rst_reason */
	/* At the end of a full socket: smoothed round-trip time, microseconds, and segments sent again. */
	__u32 rtt;
	__u32 retransmits;
};

struct counts {
	__s64 sockets[STATES];
};

/* Set by the loader. */
const volatile __u64 netns = 0;
/* Not only the services: whatever is in the namespace. */
const volatile __u8 everything = 0;

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 * 1024 * 1024);
} events SEC(".maps");

enum role { SERVER = 0, CLIENT = 1 };

/* By role, the service that has this port: its place among the services, from 1 on; 0 for a port that is nobody's. */
struct port {
	__u32 place[2];
};

/* Not a hash: everything that happens in the namespace is looked up here, and an index costs a tenth. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PORTS);
	__type(key, __u32);
	__type(value, struct port);
} ports SEC(".maps");

/* Which set of counts is in use: user space begins a new one, at zero, when it has lost track. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} era SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ERAS * SERVICES);
	__type(key, __u32);
	__type(value, struct counts);
} counts SEC(".maps");

/* Minisockets in FIN_WAIT2, by cookie: when their clock is stopped they may already say TIME_WAIT. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, __u8);
} orphans SEC(".maps");

/* How many events the ring had no room for, and minisockets `orphans`. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

/* The socket that the last RST on this CPU was for: its change of state follows at once (tcp_reset). */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} reset SEC(".maps");

static __always_inline __u16 swapped(__be16 port)
{
	return __builtin_bswap16(port);
}

static __always_inline __u32 service(enum role role, __u16 number)
{
	__u32 key = number;
	struct port *port = bpf_map_lookup_elem(&ports, &key);

	return port ? port->place[role] : 0;
}

struct mine {
	struct counts *counts;
	__u32 era;
};

/*
 * A local port that is served decides, but of a connection to itself, which was opened here and nobody listens: as in
 * Scope::service_of. Returns 0 for what nobody asked for.
 */
static __always_inline int find(struct mine *mine, __u16 local, __u16 peer, int itself)
{
	__u32 found = itself ? service(CLIENT, peer) : 0, zero = 0, index, *now;

	mine->counts = 0;
	mine->era = 0;
	if (!found)
		found = service(SERVER, local);
	if (!found)
		found = service(CLIENT, peer);
	if (!found)
		return everything;
	now = bpf_map_lookup_elem(&era, &zero);
	if (!now)
		return 0;
	/* Read once: user space may begin a new one at any time. */
	mine->era = *(volatile __u32 *)now;
	index = mine->era * SERVICES + found - 1;
	mine->counts = bpf_map_lookup_elem(&counts, &index);
	return 1;
}

static __always_inline void add(struct mine *mine, __u8 state, __s64 n)
{
	if (mine->counts)
		__sync_fetch_and_add(&mine->counts->sockets[state & (STATES - 1)], n);
}

static __always_inline void lose(void)
{
	__u32 zero = 0;
	__u64 *n = bpf_map_lookup_elem(&lost, &zero);

	if (n)
		__sync_fetch_and_add(n, 1);
}

static __always_inline struct event *event(enum kind kind, struct mine *mine, __u64 cookie)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		lose();
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->kind = kind;
	e->cookie = cookie;
	e->era = mine->era;
	e->at = bpf_ktime_get_ns();
	return e;
}

/* Whether a socket whose two ports are alike is connected to itself: two SYNs crossed. */
static __always_inline int is_itself(struct sock_common *skc)
{
	__u64 ours[2] = {}, theirs[2] = {};

	if (skc->skc_family != AF_INET6)
		return skc->skc_rcv_saddr == skc->skc_daddr;
	bpf_core_read(ours, sizeof(ours), &skc->skc_v6_rcv_saddr);
	bpf_core_read(theirs, sizeof(theirs), &skc->skc_v6_daddr);
	return ours[0] == theirs[0] && ours[1] == theirs[1];
}

/* The service of a full socket. */
static __always_inline int find_full(struct mine *mine, struct tcp_sock *tp)
{
	struct inet_sock *inet = &tp->inet_conn.icsk_inet;
	struct sock_common *skc = &inet->sk.__sk_common;
	__u16 local = swapped(inet->inet_sport), peer = swapped(skc->skc_dport);

	return find(mine, local, peer, local == peer && is_itself(skc));
}

/* Addresses of a full socket. */
static __always_inline void name(struct event *e, struct tcp_sock *tp)
{
	struct inet_sock *inet = &tp->inet_conn.icsk_inet;
	struct sock_common *skc = &inet->sk.__sk_common;

	/* Not skc_num: that reads 0 at the end (inet_put_port). */
	e->local_port = swapped(inet->inet_sport);
	e->peer_port = swapped(skc->skc_dport);
	e->interface = skc->skc_bound_dev_if;
	if (skc->skc_family == AF_INET6) {
		e->flags |= IPV6;
		bpf_core_read(e->local, sizeof(e->local), &skc->skc_v6_rcv_saddr);
		bpf_core_read(e->peer, sizeof(e->peer), &skc->skc_v6_daddr);
	} else {
		*(__be32 *)e->local = skc->skc_rcv_saddr;
		*(__be32 *)e->peer = skc->skc_daddr;
	}
}

/* Whether close(2) has begun: the file is being let go of (__fput), so nobody refers to it. */
static __always_inline int closing(struct sock *sk)
{
	struct socket *socket = sk->sk_socket;
	struct file *file;

	if (!socket)
		return 1;
	file = socket->file;
	if (!file)
		return 1;
	/* file_ref_t counts from FILE_REF_ONEREF, 0; what is below means that none is left. */
	if (bpf_core_field_exists(file->f_ref))
		return file->f_ref.refcnt.counter < 0;
	return BPF_CORE_READ((struct file___counted *)file, f_count.counter) == 0;
}

/*
 * The kernel runs a program on one event at a time on each CPU: what happens in an interrupt while it runs passes it by
 * (bpf_prog->active). So there are two for changes of state, one after the other. The first leaves a mark that it was there:
 * the address of its arguments, which is another at each level of interruption, and the same for both. Without a mark the
 * second does the work, and counts that it did: misses of the first that the second has not made good are losses. What is
 * not ours leaves its mark too, for the kernel counts a miss whoever it was. Timers need no second program: the kernel tells
 * of them with interrupts off (timer_base.lock).
 */
#define LEVELS 8

struct mark {
	__u64 at;
	/* Who it is about, and what: one that was left behind is not taken for a later one's at the same address. */
	__u64 who;
	__u64 what;
};

/* A stack, as interrupts are: whatever lies above a mark was left by somebody who has come to his end. */
struct marks {
	__u32 depth;
	struct mark on[LEVELS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct marks);
} marks SEC(".maps");

/* How often the second program stepped in. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} rescued SEC(".maps");

static __always_inline void mark(__u64 *ctx)
{
	__u32 zero = 0, depth;
	volatile struct marks *m = bpf_map_lookup_elem(&marks, &zero);

	if (!m)
		return;
	depth = m->depth;
	/* A mark stays behind when the second program was interrupted at its very end: once in a long while, so that it is
	   time to forget such marks. */
	if (depth >= LEVELS)
		depth = 0;
	m->on[depth].at = (__u64)ctx;
	m->on[depth].who = ctx[0];
	m->on[depth].what = ctx[1] << 32 | ctx[2];
	m->depth = depth + 1;
}

static __always_inline int marked(__u64 *ctx)
{
	__u32 zero = 0, depth;
	volatile struct marks *m = bpf_map_lookup_elem(&marks, &zero);
	__u64 *n;

	if (!m)
		return 1;
	depth = m->depth;
#pragma unroll
	for (__u32 i = LEVELS; i > 0; i--) {
		volatile struct mark *on = &m->on[i - 1];

		if (i <= depth && on->at == (__u64)ctx && on->who == ctx[0] && on->what == (ctx[1] << 32 | ctx[2])) {
			m->depth = i - 1;
			return 1;
		}
	}
	n = bpf_map_lookup_elem(&rescued, &zero);
	if (n)
		__sync_fetch_and_add(n, 1);
	return 0;
}

static __always_inline int changed(__u64 *ctx)
{
	struct sock *sk = (void *)ctx[0];
	int from = ctx[1], to = ctx[2];
	struct tcp_sock *tp;
	struct mine mine;
	struct event *e;
	__u64 cookie, *last, was_reset = 0;
	__u32 zero = 0;

	/* Other protocols report their states here too. */
	tp = bpf_skc_to_tcp_sock(sk);
	/* close(2) after shutdown(2) says the same state again. */
	if (!tp || from == to)
		return 0;
	if (!find_full(&mine, tp))
		return 0;
	/* A listener that has a child stays one. */
	if (from != TCP_CLOSE && !(from == TCP_LISTEN && to == TCP_SYN_RECV))
		add(&mine, from, -1);
	if (to != TCP_CLOSE)
		add(&mine, to, 1);
	/*
	 * Before Linux 6.15 a child says SYN_RECV while it is still a copy of its listener (inet_csk_clone_lock), and gets its
	 * peer and its request's cookie after that: its next step is its first that can be told.
	 */
	if (from == TCP_LISTEN && to == TCP_SYN_RECV && !sk->__sk_common.skc_dport)
		return 0;
	/* Makes it if nobody has asked for it yet: minisockets inherit it. */
	cookie = sk->__sk_common.skc_cookie.counter;
	if (!cookie)
		cookie = bpf_get_socket_cookie(sk);
	last = bpf_map_lookup_elem(&reset, &zero);
	if (last && *last == (__u64)sk) {
		*last = 0;
		was_reset = 1;
	}
	e = event(CHANGED, &mine, cookie);
	if (!e)
		return 0;
	name(e, tp);
	/* A socket that has been connected before keeps its old port here until it has another one. */
	if (to == TCP_SYN_SENT)
		e->local_port = sk->__sk_common.skc_num;
	e->from = from;
	e->to = to;
	e->error = sk->sk_err;
	if (sk->__sk_common.skc_flags & 1 << SOCK_DONE)
		e->flags |= DONE;
	if (sk->__sk_common.skc_flags & 1 << SOCK_DEAD)
		e->flags |= ORPHAN;
	if (sk->__sk_common.skc_flags & 1 << SOCK_LINGER && !sk->sk_lingertime)
		e->flags |= LINGER0;
	if (was_reset)
		e->flags |= RESET;
	if (closing(sk))
		e->flags |= CLOSING;
	if (to == TCP_CLOSE) {
		/* As tcp_get_info() has it: the kernel keeps eight times the time. */
		e->rtt = tp->srtt_us >> 3;
		e->retransmits = tp->total_retrans;
	}
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __always_inline int is_foreign(struct sock *sk)
{
	return sk->__sk_common.skc_net.net->net_cookie != netns;
}

SEC("tp_btf/inet_sock_set_state")
int on_set_state(__u64 *ctx)
{
	mark(ctx);
	return is_foreign((void *)ctx[0]) ? 0 : changed(ctx);
}

SEC("tp_btf/inet_sock_set_state")
int on_set_state_again(__u64 *ctx)
{
	if (marked(ctx) || is_foreign((void *)ctx[0]))
		return 0;
	return changed(ctx);
}

SEC("tp_btf/tcp_receive_reset")
int on_receive_reset(__u64 *ctx)
{
	__u32 zero = 0;
	__u64 *last = bpf_map_lookup_elem(&reset, &zero);

	if (last)
		*last = ctx[0];
	return 0;
}

/* A RST went out for a socket that is not at its end: says why it ended. */
SEC("tp_btf/tcp_send_reset")
int on_send_reset(__u64 *ctx)
{
	struct sock *sk = (void *)ctx[0];
	struct tcp_sock *tp;
	struct mine mine;
	struct event *e;

	/*
	 * A minisocket, or a request, sends them too, or nobody: then there is no socket. Newer kernels insist on a check. Some
	 * older ones take the argument for one that is always there, and leave out ours; the helper has one of its own.
	 */
	if (!sk)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp || is_foreign(&tp->inet_conn.icsk_inet.sk))
		return 0;
	if (!find_full(&mine, tp))
		return 0;
	e = event(RESET_SENT, &mine, bpf_get_socket_cookie(sk));
	if (!e)
		return 0;
	name(e, tp);
	e->reason = ctx[2];
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/*
 * The beginning of a socket that is not a full one. Its timer led to it, so that no load from it is known to be safe before
 * it is done: one checked load of all that is needed costs a fraction of one for each member.
 */
#define HEAD 160

struct head {
	__u8 bytes[HEAD] __attribute__((aligned(8)));
};

static __always_inline int behead(struct head *head, const void *socket)
{
	return bpf_probe_read_kernel(head->bytes, sizeof(head->bytes), socket);
}

/* A member of it. */
#define PART(head, container, member) \
	(*(typeof(((struct container *)0)->member) *)((head)->bytes + bpf_core_field_offset(struct container, member)))

static __always_inline int is_itself_mini(struct head *head)
{
	__u64 *ours = (__u64 *)&PART(head, sock_common, skc_v6_rcv_saddr);
	__u64 *theirs = (__u64 *)&PART(head, sock_common, skc_v6_daddr);

	if (PART(head, sock_common, skc_family) != AF_INET6)
		return PART(head, sock_common, skc_rcv_saddr) == PART(head, sock_common, skc_daddr);
	return ours[0] == theirs[0] && ours[1] == theirs[1];
}

static __always_inline int is_foreign_mini(struct head *head)
{
	struct net *net = PART(head, sock_common, skc_net).net;

	return BPF_CORE_READ(net, net_cookie) != netns;
}

static __always_inline void name_mini(struct event *e, struct head *head)
{
	e->local_port = PART(head, sock_common, skc_num);
	e->peer_port = swapped(PART(head, sock_common, skc_dport));
	e->interface = PART(head, sock_common, skc_bound_dev_if);
	if (PART(head, sock_common, skc_family) == AF_INET6) {
		e->flags |= IPV6;
		__builtin_memcpy(e->local, &PART(head, sock_common, skc_v6_rcv_saddr), sizeof(e->local));
		__builtin_memcpy(e->peer, &PART(head, sock_common, skc_v6_daddr), sizeof(e->peer));
	} else {
		*(__be32 *)e->local = PART(head, sock_common, skc_rcv_saddr);
		*(__be32 *)e->peer = PART(head, sock_common, skc_daddr);
	}
}

static __always_inline int retransmitted(struct sock *sk)
{
	struct tcp_sock *tp;
	struct mine mine;
	struct event *e;

	if (is_foreign(sk))
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp || !find_full(&mine, tp))
		return 0;
	e = event(RETRANSMITTED, &mine, bpf_get_socket_cookie(sk));
	if (!e)
		return 0;
	name(e, tp);
	e->from = e->to = sk->__sk_common.skc_state;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* Before Linux 6.16 it is told of only when the segment went out. */
SEC("tp_btf/tcp_retransmit_skb")
int on_retransmit_skb(__u64 *ctx)
{
	return (int)ctx[2] ? 0 : retransmitted((void *)ctx[0]);
}

SEC("tp_btf/tcp_retransmit_skb")
int on_retransmit_skb_older(__u64 *ctx)
{
	return retransmitted((void *)ctx[0]);
}

SEC("tp_btf/tcp_retransmit_synack")
int on_retransmit_synack(__u64 *ctx)
{
	struct sock_common *skc = &((struct request_sock *)ctx[1])->__req_common;
	struct mine mine;
	struct event *e;
	struct head head;

	if (skc->skc_net.net->net_cookie != netns)
		return 0;
	if (!find(&mine, skc->skc_num, swapped(skc->skc_dport), 0))
		return 0;
	if (behead(&head, skc))
		return 0;
	e = event(SYNACK_RETRANSMITTED, &mine, skc->skc_cookie.counter);
	if (!e)
		return 0;
	name_mini(e, &head);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/*
 * What has no full socket has a timer of its own, and the kernel tells of every timer: which of them are ours is known by
 * their function. Its address is found out without a right to read addresses: the kernel prints a function's name for us
 * (%ps), once for each function until both are found.
 */
static __u64 timewait_timer = 0, request_timer = 0;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u8);
} strangers SEC(".maps");

static const char symbol[] = "%ps";

/* A compiler that splits or clones functions adds a suffix, after a dot. */
static __always_inline int is(const char *text, const char *name, int length)
{
	for (int i = 0; i < length; i++)
		if (text[i] != name[i])
			return 0;
	return text[length] == 0 || text[length] == '.';
}

static __attribute__((noinline)) int learn(__u64 function)
{
	char text[32] = {};
	__u8 one = 1;

	if (bpf_map_lookup_elem(&strangers, &function))
		return 0;
	bpf_snprintf(text, sizeof(text), symbol, &function, sizeof(function));
	if (is(text, "tw_timer_handler", 16))
		timewait_timer = function;
	else if (is(text, "reqsk_timer_handler", 19))
		request_timer = function;
	else
		bpf_map_update_elem(&strangers, &function, &one, BPF_ANY);
	return 0;
}

static __always_inline int on_minisocket(struct timer_list *timer, int armed)
{
	struct inet_timewait_sock *tw = (void *)timer - bpf_core_field_offset(struct inet_timewait_sock, tw_timer);
	struct head head;
	struct mine mine;
	struct event *e;
	__u64 cookie;
	__u16 local, peer;
	__u8 state, one = 1;

	if (behead(&head, tw) || is_foreign_mini(&head))
		return 0;
	local = PART(&head, sock_common, skc_num);
	peer = swapped(PART(&head, sock_common, skc_dport));
	if (!find(&mine, local, peer, local == peer && is_itself_mini(&head)))
		return 0;
	cookie = PART(&head, sock_common, skc_cookie).counter;
	state = PART(&head, inet_timewait_sock, tw_substate);
	if (armed) {
		/* What is not noted will be counted in the wrong state: user space counts anew. */
		if (state == TCP_FIN_WAIT2 && bpf_map_update_elem(&orphans, &cookie, &one, BPF_ANY))
			lose();
	} else {
		state = bpf_map_delete_elem(&orphans, &cookie) ? TCP_TIME_WAIT : TCP_FIN_WAIT2;
	}
	add(&mine, state, armed ? 1 : -1);
	e = event(armed ? ARMED : DISARMED, &mine, cookie);
	if (!e)
		return 0;
	name_mini(e, &head);
	e->from = e->to = state;
	if (!armed && (__s64)(bpf_jiffies64() - timer->expires) >= 0)
		e->flags |= EXPIRED;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __always_inline int on_request(struct timer_list *timer, int armed)
{
	struct request_sock *req = (void *)timer - bpf_core_field_offset(struct request_sock, rsk_timer);
	struct head head;
	struct mine mine;
	struct event *e;

	if (behead(&head, req) || is_foreign_mini(&head))
		return 0;
	if (!find(&mine, PART(&head, sock_common, skc_num), swapped(PART(&head, sock_common, skc_dport)), 0))
		return 0;
	add(&mine, TCP_SYN_RECV, armed ? 1 : -1);
	e = event(armed ? REQUESTED : UNREQUESTED, &mine, PART(&head, sock_common, skc_cookie).counter);
	if (!e)
		return 0;
	name_mini(e, &head);
	e->from = e->to = TCP_NEW_SYN_RECV;
	if (!armed && (__s64)(bpf_jiffies64() - timer->expires) >= 0)
		e->flags |= EXPIRED;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __always_inline int on_timer(struct timer_list *timer, int armed)
{
	__u64 function = (__u64)timer->function;

	if (!timewait_timer || !request_timer)
		learn(function);
	if (function == timewait_timer)
		return on_minisocket(timer, armed);
	if (function == request_timer)
		return on_request(timer, armed);
	return 0;
}

SEC("tp_btf/timer_start")
int on_timer_start(__u64 *ctx)
{
	return on_timer((void *)ctx[0], 1);
}

SEC("tp_btf/timer_cancel")
int on_timer_cancel(__u64 *ctx)
{
	return on_timer((void *)ctx[0], 0);
}

char _license[] SEC("license") = "Dual MIT/GPL";
