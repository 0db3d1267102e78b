/* Test-only, Linux-only preload: a wall clock that can be set while a process runs, without setting the machine's.
 *
 * What a program reads as the time of day is the real one plus the seconds that stand in the first eight bytes of
 * $JUMPCLOCK_FILE. Clocks that nobody can set (monotonic, boot time) stay as they are, as on a real machine.
 *
 * cc -O2 -shared -fPIC -o jumpclock.so jumpclock.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int (*libc_clock_gettime)(clockid_t, struct timespec *);
static volatile long long *jump;

__attribute__((constructor)) static void set_up(void) {
    const char *path = getenv("JUMPCLOCK_FILE");
    libc_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *mapped = mmap(NULL, sizeof *jump, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED)
        jump = mapped;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = libc_clock_gettime ? libc_clock_gettime(id, now) : (int)syscall(SYS_clock_gettime, id, now);
    if (!failed && jump && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += *jump;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec t;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &t);
    now->tv_sec = t.tv_sec;
    now->tv_usec = t.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (out)
        *out = t.tv_sec;
    return t.tv_sec;
}
