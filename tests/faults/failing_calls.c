/* Makes calls of one kind, on paths in one folder, fail from the n-th on.

   Preloaded (LD_PRELOAD), it sees calls by way of libc, whoever makes them:
   Python, TensorStore. `fail_calls` says which fail; none do before. */

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, WRITE, FSYNC, RENAME, UNLINK, MKDIR, KINDS };

static char folder_of_faults[PATH_MAX];
static int failing_kind = -1, failing_errno;
static long first_failing, last_failing;
static atomic_long calls[KINDS];

/* From now on, calls `first` to `last` of a kind, counted from 1, fail with an
   errno. All kinds are counted anew. */
void fail_calls(const char *folder, int kind, long first, long last, int why) {
  failing_kind = -1;
  snprintf(folder_of_faults, sizeof folder_of_faults, "%s", folder);
  for (int i = 0; i < KINDS; i++) atomic_store(&calls[i], 0);
  first_failing = first, last_failing = last, failing_errno = why;
  failing_kind = kind;
}

long counted_calls(int kind) { return atomic_load(&calls[kind]); }

/* Whether a call fails; errno then says why. */
static int fails(int kind, const char *path) {
  size_t length = strlen(folder_of_faults);
  if (!length || !path || strncmp(path, folder_of_faults, length)) return 0;
  if (path[length] && path[length] != '/') return 0;
  long call = atomic_fetch_add(&calls[kind], 1) + 1;
  if (kind != failing_kind || call < first_failing || call > last_failing)
    return 0;
  errno = failing_errno;
  return 1;
}

/* The path of an open file, or of a name in an open folder. */
static const char *path_of(int fd, const char *name, char *out) {
  char link[64];
  if (name && name[0] == '/') return name;
  if (fd == AT_FDCWD) {
    if (!getcwd(out, PATH_MAX)) return NULL;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    if (length < 0) return NULL;
    out[length] = 0;
  }
  if (name) {
    size_t length = strlen(out);
    snprintf(out + length, PATH_MAX - length, "/%s", name);
  }
  return out;
}

static int fails_at(int kind, int fd, const char *name) {
  char path[PATH_MAX];
  int before = errno;
  int failed = fails(kind, path_of(fd, name, path));
  if (!failed) errno = before;
  return failed;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN_PATH(name)                                          \
  int name(const char *path, int flags, ...) {              \
    va_list rest;                                           \
    va_start(rest, flags);                                  \
    mode_t mode = va_arg(rest, mode_t);                     \
    va_end(rest);                                           \
    if (fails_at(OPEN, AT_FDCWD, path)) return -1;        \
    return REAL(name)(path, flags, mode);                   \
  }
OPEN_PATH(open)
OPEN_PATH(open64)

#define OPEN_AT(name)                                        \
  int name(int folder, const char *path, int flags, ...) {  \
    va_list rest;                                           \
    va_start(rest, flags);                                  \
    mode_t mode = va_arg(rest, mode_t);                     \
    va_end(rest);                                           \
    if (fails_at(OPEN, folder, path)) return -1;          \
    return REAL(name)(folder, path, flags, mode);           \
  }
OPEN_AT(openat)
OPEN_AT(openat64)

#define ON_FILE(kind, result, name, signature, arguments)   \
  result name signature {                                   \
    if (fails_at(kind, fd, NULL)) return -1;                \
    return REAL(name) arguments;                            \
  }
ON_FILE(WRITE, ssize_t, write, (int fd, const void *x, size_t n), (fd, x, n))
ON_FILE(WRITE, ssize_t, pwrite, (int fd, const void *x, size_t n, off_t at),
        (fd, x, n, at))
ON_FILE(WRITE, ssize_t, pwrite64,
        (int fd, const void *x, size_t n, off64_t at), (fd, x, n, at))
ON_FILE(WRITE, ssize_t, writev, (int fd, const struct iovec *x, int n),
        (fd, x, n))
ON_FILE(WRITE, ssize_t, pwritev,
        (int fd, const struct iovec *x, int n, off_t at), (fd, x, n, at))
ON_FILE(WRITE, ssize_t, pwritev64,
        (int fd, const struct iovec *x, int n, off64_t at), (fd, x, n, at))
ON_FILE(FSYNC, int, fsync, (int fd), (fd))
ON_FILE(FSYNC, int, fdatasync, (int fd), (fd))

#define ON_PATH(kind, name, signature, folder, path, arguments) \
  int name signature {                                          \
    if (fails_at(kind, folder, path)) return -1;                \
    return REAL(name) arguments;                                \
  }
ON_PATH(RENAME, rename, (const char *from, const char *to), AT_FDCWD, from,
        (from, to))
ON_PATH(RENAME, renameat,
        (int folder, const char *from, int there, const char *to), folder, from,
        (folder, from, there, to))
ON_PATH(RENAME, renameat2,
        (int folder, const char *from, int there, const char *to, unsigned how),
        folder, from, (folder, from, there, to, how))
ON_PATH(UNLINK, unlink, (const char *path), AT_FDCWD, path, (path))
ON_PATH(UNLINK, unlinkat, (int folder, const char *path, int how), folder,
        path, (folder, path, how))
ON_PATH(UNLINK, rmdir, (const char *path), AT_FDCWD, path, (path))
ON_PATH(MKDIR, mkdir, (const char *path, mode_t mode), AT_FDCWD, path,
        (path, mode))
ON_PATH(MKDIR, mkdirat, (int folder, const char *path, mode_t mode), folder,
        path, (folder, path, mode))
