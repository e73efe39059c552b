/* LD_PRELOAD library that makes a disk full: writes below a folder fail with ENOSPC from a chosen point on.

   full_disk_begin, or the variables FULL_FOLDER, FULL_CALL and FULL_BYTES of a new process, choose folder and point.

   Counted calls: write, writev, pwrite, sendfile, copy_file_range, fsync, fdatasync, fallocate, ftruncate to a larger
   size, mkdir, rename, link, and open with O_CREAT. A write that does not fit is short, as on a real disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t folder_length;
static long fail_call, max_bytes = -1;
static atomic_long calls, bytes;

/* Make the disk full below `name`: from call `call` on (0: none), or after `limit` bytes (-1: any number). */
void full_disk_begin(const char *name, long call, long limit) {
    if (realpath(name, folder) == NULL) abort();
    folder_length = strlen(folder);
    fail_call = call;
    max_bytes = limit;
}

/* Return the number of calls (0) or bytes (1) so far. */
long full_disk_count(int what) { return what ? (long)bytes : (long)calls; }

/* A process that this one starts gets the same disk, with a count of its own. */
__attribute__((constructor)) static void inherit(void) {
    const char *name = getenv("FULL_FOLDER"), *call = getenv("FULL_CALL"), *limit = getenv("FULL_BYTES");
    if (name != NULL && call != NULL && limit != NULL) full_disk_begin(name, atol(call), atol(limit));
}

static int below(const char *path) {
    return folder_length && strncmp(path, folder, folder_length) == 0 && (path[folder_length] == '/' || !path[folder_length]);
}

static int watched_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!folder_length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int watched_path(int at, const char *path) {
    char full[PATH_MAX + PATH_MAX + 2];
    if (!folder_length || path == NULL) return 0;
    if (path[0] == '/') return below(path);
    if (at != AT_FDCWD) return watched_fd(at);
    if (getcwd(full, PATH_MAX) == NULL) return 0;
    strcat(full, "/");
    strncat(full, path, PATH_MAX);
    return below(full);
}

/* Count a call that writes `n` bytes; return how many fit, or -1 if the disk is full. */
static ssize_t admit(size_t n) {
    long call = ++calls;
    if (fail_call && call >= fail_call) return -1;
    long before = atomic_fetch_add(&bytes, (long)n);
    if (max_bytes < 0 || before + (long)n <= max_bytes) return (ssize_t)n;
    return before < max_bytes ? max_bytes - before : -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FULL return (errno = ENOSPC, -1)

ssize_t write(int fd, const void *data, size_t n) {
    ssize_t fits = n && watched_fd(fd) ? admit(n) : (ssize_t)n;
    if (fits < 0) FULL;
    return syscall(SYS_write, fd, data, (size_t)fits);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    ssize_t fits = n && watched_fd(fd) ? admit(n) : (ssize_t)n;
    if (fits < 0) FULL;
    return syscall(SYS_pwrite64, fd, data, (size_t)fits, at);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return pwrite64(fd, data, n, at); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (!watched_fd(fd)) return syscall(SYS_writev, fd, parts, count);
    for (int i = 0; i < count; i++) /* a short write is allowed: the first part that is not empty */
        if (parts[i].iov_len) return write(fd, parts[i].iov_base, parts[i].iov_len);
    return 0;
}

ssize_t sendfile64(int out, int in, off64_t *at, size_t n) {
    ssize_t fits = watched_fd(out) ? admit(n) : (ssize_t)n;
    if (fits < 0) FULL;
    return syscall(SYS_sendfile, out, in, at, (size_t)fits);
}

ssize_t sendfile(int out, int in, off_t *at, size_t n) { return sendfile64(out, in, at, n); }

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t n, unsigned flags) {
    ssize_t fits = watched_fd(out) ? admit(n) : (ssize_t)n;
    if (fits < 0) FULL;
    return syscall(SYS_copy_file_range, in, in_at, out, out_at, (size_t)fits, flags);
}

#define GUARDED(type, name, parameters, arguments, condition) \
    type name parameters {                                    \
        if ((condition) && admit(0) < 0) FULL;                \
        return REAL(name) arguments;                          \
    }

static int grows(int fd, off64_t size) {
    struct stat status;
    return watched_fd(fd) && fstat(fd, &status) == 0 && status.st_size < size;
}

GUARDED(int, fsync, (int fd), (fd), watched_fd(fd))
GUARDED(int, fdatasync, (int fd), (fd), watched_fd(fd))
GUARDED(int, ftruncate, (int fd, off_t size), (fd, size), grows(fd, size))
GUARDED(int, ftruncate64, (int fd, off64_t size), (fd, size), grows(fd, size))
GUARDED(int, fallocate, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n), watched_fd(fd))
GUARDED(int, fallocate64, (int fd, int mode, off64_t at, off64_t n), (fd, mode, at, n), watched_fd(fd))
GUARDED(int, mkdir, (const char *path, mode_t mode), (path, mode), watched_path(AT_FDCWD, path))
GUARDED(int, rename, (const char *from, const char *to), (from, to), watched_path(AT_FDCWD, to))
GUARDED(int, link, (const char *from, const char *to), (from, to), watched_path(AT_FDCWD, to))

int posix_fallocate64(int fd, off64_t at, off64_t n) {
    if (watched_fd(fd) && admit(0) < 0) return ENOSPC;
    return REAL(posix_fallocate64)(fd, at, n);
}

int posix_fallocate(int fd, off_t at, off_t n) { return posix_fallocate64(fd, at, n); }

#define OPEN(name, parameters, at, flags)                                               \
    int name parameters {                                                               \
        mode_t mode = 0;                                                                \
        if (flags & (O_CREAT | O_TMPFILE)) {                                            \
            va_list rest;                                                               \
            va_start(rest, flags);                                                      \
            mode = va_arg(rest, mode_t);                                                \
            va_end(rest);                                                               \
        }                                                                               \
        if ((flags & O_CREAT) && watched_path(at, path) && access(path, F_OK) != 0 && admit(0) < 0) FULL; \
        return syscall(SYS_openat, at, path, flags, mode);                              \
    }

OPEN(open, (const char *path, int flags, ...), AT_FDCWD, flags)
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD, flags)
OPEN(openat, (int at, const char *path, int flags, ...), at, flags)
OPEN(openat64, (int at, const char *path, int flags, ...), at, flags)
