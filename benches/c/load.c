// The load: one thread, one epoll. Prints one line of JSON.
// Usage: load pingpong|stream|lives|idle PORT SERVER_PID CONNECTIONS SIZE SECONDS SOURCE
//
// pingpong: each connection sends SIZE bytes and waits for them, again and again.
// stream:   each connection writes and reads as fast as it goes, SIZE bytes a call.
// lives:    connect, echo SIZE bytes, FIN, the other FIN, close; so many at a time.
// idle:     opens, echoes once, and holds until stdin ends.
//
// A tenth of the time passes before anything is counted. SOURCE is the local address: each address has ports of its own,
// so that TIME_WAIT of one round is not in the way of the next.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct connection {
    int fd;
    size_t sent, received;
    uint64_t began;
    int connected, closing;
};

static struct sockaddr_in server, source;
static int epoll, lives, stream_mode;
static size_t size;
static char *out, *in;
static uint64_t messages, bytes, counting_since;

// Log-linear: 64 steps for each power of two, so that a value is right to 1.6 %.
static uint64_t histogram[64 * 64];

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t cpu_of(pid_t pid) {
    clockid_t clock;
    struct timespec t = {0};
    if (clock_getcpuclockid(pid, &clock) == 0)
        clock_gettime(clock, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void note(uint64_t ns) {
    if (!counting_since)
        return;
    messages++;
    int shift = ns < 64 ? 0 : 63 - __builtin_clzll(ns) - 5;
    histogram[shift * 32 + (ns >> shift)]++;
}

static double percentile(double p) {
    uint64_t wanted = messages * p, seen = 0;
    for (size_t i = 0; i < sizeof histogram / sizeof *histogram; i++) {
        seen += histogram[i];
        if (histogram[i] && seen > wanted) {
            size_t shift = i < 64 ? 0 : i / 32 - 1;
            return (double)((i - shift * 32) << shift) / 1e3;
        }
    }
    return 0;
}

static void connect_to(struct connection *c) {
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0)
        die("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(c->fd, (struct sockaddr *)&source, sizeof source) != 0)
        die("bind");
    c->began = now();
    if (connect(c->fd, (struct sockaddr *)&server, sizeof server) != 0 && errno != EINPROGRESS)
        die("connect");
    c->sent = c->received = c->closing = c->connected = 0;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event) != 0)
        die("epoll_ctl");
}

static void send_more(struct connection *c) {
    while (c->sent < size || stream_mode) {
        ssize_t n = write(c->fd, out, stream_mode ? size : size - c->sent);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0)
            die("write");
        c->sent += n;
    }
}

static void step(struct connection *c) {
    if (c->sent == 0 && !lives)
        c->began = now();
    send_more(c);
    for (;;) {
        ssize_t n = read(c->fd, in, size > 65536 ? size : 65536);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0)
            die("read");
        if (n == 0) {
            if (!c->closing)
                fprintf(stderr, "the server closed first\n"), exit(1);
            close(c->fd);
            note(now() - c->began);
            return connect_to(c);
        }
        c->received += n;
        bytes += counting_since ? n : 0;
        if (stream_mode) {
            send_more(c);
            continue;
        }
        if (c->received < size)
            continue;
        if (lives) {
            c->closing = 1;
            shutdown(c->fd, SHUT_WR);
            continue;
        }
        uint64_t t = now();
        note(t - c->began);
        c->sent = c->received = 0;
        c->began = t;
        send_more(c);
    }
}

int main(int argc, char **argv) {
    if (argc != 8)
        return fprintf(stderr, "usage: load MODE PORT SERVER_PID CONNECTIONS SIZE SECONDS SOURCE\n"), 2;
    signal(SIGPIPE, SIG_IGN);
    const char *mode = argv[1];
    pid_t pid = atoi(argv[3]);
    size_t connections = atoi(argv[4]);
    size = strtoul(argv[5], NULL, 10);
    double seconds = atof(argv[6]);
    lives = strcmp(mode, "lives") == 0;
    stream_mode = strcmp(mode, "stream") == 0;
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[2])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    source = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = inet_addr(argv[7])};
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    out = malloc(size);
    memset(out, 7, size);
    in = malloc(size > 65536 ? size : 65536);
    epoll = epoll_create1(0);
    struct connection *all = calloc(connections, sizeof *all);

    if (strcmp(mode, "idle") == 0) {
        for (size_t i = 0; i < connections; i++) {
            connect_to(&all[i]);
            fcntl(all[i].fd, F_SETFL, 0);
            if (write(all[i].fd, out, size) != (ssize_t)size || recv(all[i].fd, in, size, MSG_WAITALL) != (ssize_t)size)
                die("echo");
        }
        printf("ready\n");
        fflush(stdout);
        return read(0, in, 1) < 0;
    }

    for (size_t i = 0; i < connections; i++)
        connect_to(&all[i]);
    uint64_t start = now(), warm = start + seconds * 1e8, end = warm + seconds * 1e9, cpu = 0, t;
    struct epoll_event events[1024];
    while ((t = now()) < end) {
        if (!counting_since && t >= warm) {
            counting_since = t;
            cpu = cpu_of(pid);
        }
        int n = epoll_wait(epoll, events, 1024, 100);
        for (int i = 0; i < n; i++)
            step(events[i].data.ptr);
    }
    cpu = cpu_of(pid) - cpu;
    double took = (t - counting_since) / 1e9;
    printf("{\"seconds\":%.4f,\"messages\":%lu,\"bytes\":%lu,\"server_cpu\":%.6f,\"p50\":%.1f,\"p99\":%.1f,\"p999\":%.1f}\n", took,
           messages, bytes, cpu / 1e9, percentile(0.5), percentile(0.99), percentile(0.999));
    return 0;
}
