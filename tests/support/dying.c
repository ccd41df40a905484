/* Preloaded into a test's process: at the so-manyth call below a folder it is killed, or the disk is full from there on.
   Counted are opens for writing, fsyncs, renames and unlinks; `arm` with a negative number dies inside a write instead, after
   so many bytes of a single file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long limit = 0, count = 0, inside = -1, written = 0;
static int full = 0, armed = 0;
static char where[4096];
static char kinds[65536];

void arm(const char *folder, long at, long bytes, int is_full) {
  strncpy(where, folder, sizeof where - 1);
  limit = at; inside = bytes; full = is_full; count = 0; written = 0; armed = 1; kinds[0] = 0;
}
long counted(void) { return count; }
const char *seen(void) { return kinds; }

static void die(void) { kill(getpid(), SIGKILL); }

/* 0: go on; 1: the call is to fail. */
static int step(const char *kind) {
  if (!armed) return 0;
  count++;
  if (strlen(kinds) < sizeof kinds - 16) { strcat(kinds, kind); strcat(kinds, " "); }
  if (limit > 0 && count >= limit) {
    if (!full) die();
    return 1;
  }
  return 0;
}
static int below(const char *path) { return armed && path && strncmp(path, where, strlen(where)) == 0; }
static int of(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return below(path);
}
#define REAL(name) static __typeof__(name) *real = 0; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int opens(const char *path, int flags) { return below(path) && (flags & (O_WRONLY | O_RDWR | O_CREAT)); }

int open(const char *path, int flags, ...) {
  REAL(open);
  va_list list; va_start(list, flags); mode_t mode = (flags & O_CREAT) ? va_arg(list, mode_t) : 0; va_end(list);
  if (opens(path, flags) && step("open")) { errno = ENOSPC; return -1; }
  return real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  REAL(open64);
  va_list list; va_start(list, flags); mode_t mode = (flags & O_CREAT) ? va_arg(list, mode_t) : 0; va_end(list);
  if (opens(path, flags) && step("open")) { errno = ENOSPC; return -1; }
  return real(path, flags, mode);
}
int openat(int dir, const char *path, int flags, ...) {
  REAL(openat);
  va_list list; va_start(list, flags); mode_t mode = (flags & O_CREAT) ? va_arg(list, mode_t) : 0; va_end(list);
  if (opens(path, flags) && step("open")) { errno = ENOSPC; return -1; }
  return real(dir, path, flags, mode);
}
int openat64(int dir, const char *path, int flags, ...) {
  REAL(openat64);
  va_list list; va_start(list, flags); mode_t mode = (flags & O_CREAT) ? va_arg(list, mode_t) : 0; va_end(list);
  if (opens(path, flags) && step("open")) { errno = ENOSPC; return -1; }
  return real(dir, path, flags, mode);
}
FILE *fopen(const char *path, const char *mode) {
  REAL(fopen);
  if (below(path) && strpbrk(mode, "wa+") && step("open")) { errno = ENOSPC; return 0; }
  return real(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
  REAL(fopen64);
  if (below(path) && strpbrk(mode, "wa+") && step("open")) { errno = ENOSPC; return 0; }
  return real(path, mode);
}
int fsync(int fd) {
  REAL(fsync);
  if (of(fd) && step("fsync")) { errno = ENOSPC; return -1; }
  return real(fd);
}
int rename(const char *from, const char *to) {
  REAL(rename);
  if (below(to) && step("rename") && !full) return -1;
  return real(from, to);
}
int unlink(const char *path) {
  REAL(unlink);
  if (below(path)) step("unlink");
  return real(path);
}
int unlinkat(int dir, const char *path, int flags) {
  REAL(unlinkat);
  if (armed) step("unlink");
  return real(dir, path, flags);
}
int rmdir(const char *path) {
  REAL(rmdir);
  if (below(path)) step("rmdir");
  return real(path);
}
int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  if (below(path) && step("mkdir")) { errno = ENOSPC; return -1; }
  return real(path, mode);
}
static int last = -1;
/* Whether a write of so many bytes is the one that is died in: of the file in hand, after `inside` bytes. */
static int fatal(int fd, size_t size) {
  if (inside < 0) return 0;
  if (fd != last) { last = fd; written = 0; }
  written += size;
  return written > inside;
}
ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  if (armed && of(fd)) {
    if (full && limit > 0 && count >= limit) { errno = ENOSPC; return -1; }
    if (fatal(fd, size)) { real(fd, data, size / 2); if (!full) die(); errno = ENOSPC; return -1; }
  }
  return real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
  REAL(writev);
  size_t size = 0;
  for (int i = 0; i < n; i++) size += parts[i].iov_len;
  if (armed && of(fd)) {
    if (full && limit > 0 && count >= limit) { errno = ENOSPC; return -1; }
    if (fatal(fd, size)) { real(fd, parts, 1); if (!full) die(); errno = ENOSPC; return -1; }
  }
  return real(fd, parts, n);
}
