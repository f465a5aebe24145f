// The echo server that echoscope is measured against: one thread, one epoll, nothing observed.
// Usage: echo_server PORT lt|et BUFFER
//
// Level-triggered it is what most would write; edge-triggered with one large shared buffer it is what copies most per
// system call. A rest that does not fit into the socket is kept for its connection, and nothing more is read meanwhile.
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

struct rest {
    char *bytes;
    size_t len, sent;
};

static struct rest *rests; // by descriptor
static int epoll, edge;
static char *buffer;
static size_t size;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void watch(int fd, int op, uint32_t events) {
    struct epoll_event event = {.events = events | (edge ? EPOLLET : 0), .data.fd = fd};
    if (epoll_ctl(epoll, op, fd, &event) != 0)
        die("epoll_ctl");
}

static void end(int fd) {
    free(rests[fd].bytes);
    rests[fd] = (struct rest){0};
    close(fd);
}

// Returns whether the rest is gone.
static int write_rest(int fd) {
    struct rest *rest = &rests[fd];
    while (rest->sent < rest->len) {
        ssize_t n = write(fd, rest->bytes + rest->sent, rest->len - rest->sent);
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n < 0) {
            end(fd);
            return 0;
        }
        rest->sent += n;
    }
    free(rest->bytes);
    *rest = (struct rest){0};
    if (!edge)
        watch(fd, EPOLL_CTL_MOD, EPOLLIN);
    return 1;
}

static void serve(int fd) {
    if (rests[fd].bytes && !write_rest(fd))
        return;
    do {
        ssize_t n = read(fd, buffer, size);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0)
            return end(fd);
        ssize_t written = write(fd, buffer, n);
        if (written < 0 && errno != EAGAIN)
            return end(fd);
        if (written < 0)
            written = 0;
        if (written < n) {
            struct rest rest = {.bytes = malloc(n - written), .len = n - written};
            memcpy(rest.bytes, buffer + written, rest.len);
            rests[fd] = rest;
            if (!edge)
                watch(fd, EPOLL_CTL_MOD, EPOLLOUT);
            return;
        }
        // A short read has emptied the queue (epoll(7)).
        if ((size_t)n < size)
            return;
    } while (edge);
}

static void accept_all(int listener) {
    int on = 1, fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        watch(fd, EPOLL_CTL_ADD, edge ? EPOLLIN | EPOLLOUT : EPOLLIN);
    }
    if (errno != EAGAIN && errno != ECONNABORTED)
        die("accept");
}

int main(int argc, char **argv) {
    if (argc != 4)
        return fprintf(stderr, "usage: echo_server PORT lt|et BUFFER\n"), 2;
    signal(SIGPIPE, SIG_IGN);
    edge = strcmp(argv[2], "et") == 0;
    size = strtoul(argv[3], NULL, 10);
    buffer = malloc(size);
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    rests = calloc(limit.rlim_max, sizeof *rests);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0)
        die("bind");
    if (listen(listener, 4096) != 0)
        die("listen");
    epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[1024];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int n = epoll_wait(epoll, events, 1024, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener)
                accept_all(listener);
            else
                serve(fd);
        }
    }
}
