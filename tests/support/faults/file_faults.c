/* Stands before the C library (LD_PRELOAD): counts what a process does to files below one folder, and lets the n-th of
   these fail. `faults_arm` begins to count; every name below is a call that is counted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NOTHING, FULL, BROKEN, KILLED, KILLED_BEHIND };

static char folder[4096];
static int at, kind, count, armed;

void faults_arm(const char *path, int n, int what) {
    snprintf(folder, sizeof folder, "%s", path);
    at = n, kind = what, count = 0, armed = 1;
}

int faults_count(void) {
    armed = 0;
    return count;
}

static int is_below(const char *path) { return path && !strncmp(path, folder, strlen(folder)); }

static int is_open_below(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

/* Whether the call fails here; a full disk stays full, and who is killed does not come back. */
static int fails(void) {
    int n = ++count;
    if (n == at && kind == KILLED) kill(getpid(), SIGKILL);
    if ((n == at && kind == BROKEN) || (n >= at && kind == FULL)) {
        errno = kind == FULL ? ENOSPC : EIO;
        return 1;
    }
    return 0;
}

static void done(void) {
    if (count == at && kind == KILLED_BEHIND) kill(getpid(), SIGKILL);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) {
    if (!armed || !is_open_below(file)) return REAL(write)(file, data, size);
    if (count + 1 == at && size > 1 && (kind == FULL || kind == KILLED)) { /* the half of it is there */
        ssize_t half = REAL(write)(file, data, size / 2);
        if (kind == KILLED) fails();
        count++;
        return half;
    }
    if (fails()) return -1;
    ssize_t written = REAL(write)(file, data, size);
    done();
    return written;
}

int fsync(int file) {
    if (!armed || !is_open_below(file)) return REAL(fsync)(file);
    return fails() ? -1 : REAL(fsync)(file);
}

int rename(const char *from, const char *to) {
    if (!armed || !is_below(to)) return REAL(rename)(from, to);
    if (fails()) return -1;
    int result = REAL(rename)(from, to);
    done();
    return result;
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    if (!armed || !is_below(to)) return REAL(renameat2)(from_folder, from, to_folder, to, flags);
    if (fails()) return -1;
    int result = REAL(renameat2)(from_folder, from, to_folder, to, flags);
    done();
    return result;
}

int mkdir(const char *path, mode_t mode) {
    if (!armed || !is_below(path)) return REAL(mkdir)(path, mode);
    if (fails()) return -1;
    int result = REAL(mkdir)(path, mode);
    done();
    return result;
}

static int opened(int (*real)(const char *, int, ...), const char *path, int flags, mode_t mode) {
    if (!armed || !(flags & O_CREAT) || !is_below(path)) return real(path, flags, mode);
    if (fails()) return -1;
    int file = real(path, flags, mode);
    done();
    return file;
}

#define OPEN(name)                                          \
    int name(const char *path, int flags, ...) {            \
        va_list rest;                                       \
        va_start(rest, flags);                              \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                       \
        return opened(REAL(name), path, flags, mode);       \
    }

OPEN(open)
OPEN(open64)
