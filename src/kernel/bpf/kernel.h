/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * What lifecycle.bpf.c reads of the kernel's structures: these members only, wherever the running kernel has them
 * (CO-RE: the loader relocates each access by the kernel's own BTF). Names are the kernel's.
 */
#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

/* include/uapi/linux/bpf.h */
enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_RINGBUF = 27,
};
enum { BPF_ANY = 0 };

/* include/net/tcp_states.h */
enum {
	TCP_SYN_SENT = 2,
	TCP_SYN_RECV = 3,
	TCP_FIN_WAIT2 = 5,
	TCP_TIME_WAIT = 6,
	TCP_CLOSE = 7,
	TCP_LISTEN = 10,
	TCP_NEW_SYN_RECV = 12,
};

/* include/linux/socket.h */
enum { AF_INET = 2, AF_INET6 = 10 };

/* include/net/sock.h: numbers of bits in sk_flags */
enum { SOCK_DEAD = 0, SOCK_DONE = 1, SOCK_LINGER = 4 };

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct in6_addr {
	union {
		__u8 u6_addr8[16];
	} in6_u;
};

struct net {
	__u64 net_cookie;
};

typedef struct {
	struct net *net;
} possible_net_t;

typedef struct {
	__s64 counter;
} atomic64_t;

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
	unsigned long skc_flags;
};

typedef struct {
	atomic64_t refcnt;
} file_ref_t;

struct file {
	file_ref_t f_ref;
};

/* Before Linux 6.13 a file counted its references plainly. */
struct file___counted {
	atomic64_t f_count;
};

struct socket {
	struct file *file;
};

struct sock {
	struct sock_common __sk_common;
	int sk_err;
	struct socket *sk_socket;
	__u8 sk_shutdown;
	unsigned long sk_lingertime;
};

struct inet_sock {
	struct sock sk;
	__be16 inet_sport;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 srtt_us;
	__u32 total_retrans;
};

struct sk_buff;

struct timer_list {
	unsigned long expires;
	void (*function)(struct timer_list *);
};

struct inet_timewait_sock {
	struct sock_common __tw_common;
	volatile unsigned char tw_substate;
	struct timer_list tw_timer;
};

struct request_sock {
	struct sock_common __req_common;
	struct timer_list rsk_timer;
};

#pragma clang attribute pop
