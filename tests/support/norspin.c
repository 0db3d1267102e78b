/* Test-only, Linux-only preload: lets more MLX ring ranks than cores share a machine, and adds latency.
 *
 * The ring receives with a non-blocking busy loop, so a rank that waits eats the core that its peer needs. Here a recv
 * that would block first sleeps in ppoll until data arrives or 200 µs have passed. RING_DELAY_US delays every message
 * that had to be waited for, a stand-in for a slower link.
 *
 * cc -O2 -shared -fPIC -o norspin.so norspin.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>

static ssize_t (*libc_recv)(int, void *, size_t, int);
static long delay_us;

static void sleep_us(long us) {
    struct timespec t = {us / 1000000, (us % 1000000) * 1000};
    nanosleep(&t, NULL);
}

__attribute__((constructor)) static void set_up(void) {
    const char *wanted = getenv("RING_DELAY_US");
    libc_recv = dlsym(RTLD_NEXT, "recv");
    delay_us = wanted ? atol(wanted) : 0;
    prctl(PR_SET_TIMERSLACK, 1000);
}

ssize_t recv(int fd, void *buffer, size_t length, int flags) {
    ssize_t got = libc_recv(fd, buffer, length, flags);
    if (got >= 0 || errno != EAGAIN)
        return got;
    struct pollfd waiting = {fd, POLLIN, 0};
    struct timespec limit = {0, 200000};
    if (ppoll(&waiting, 1, &limit, NULL) <= 0) {
        errno = EAGAIN;
        return -1;
    }
    if (delay_us > 0)
        sleep_us(delay_us);
    return libc_recv(fd, buffer, length, flags);
}
