/* A wall clock that jumps.  Loaded by LD_PRELOAD.

     cc -shared -fPIC -o wall_clock.so wall_clock.c

   WALL_CLOCK is a file of eight bytes: by how many seconds the wall clock is off, as a native integer; whoever changes it
   makes the clock jump.  The monotonic clock runs on, and the kernel's own clock does too. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *jump_s;

__attribute__((constructor)) static void open_file(void) {
    int file = open(getenv("WALL_CLOCK"), O_RDONLY);
    jump_s = mmap(NULL, sizeof *jump_s, PROT_READ, MAP_SHARED, file, 0);
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) && jump_s) now->tv_sec += *jump_s;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    int failed = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *said) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (said) *said = now.tv_sec;
    return now.tv_sec;
}
