/* Make one system call on a file below a folder fail: loaded before the C library (LD_PRELOAD), so that Python, SQLite, Arrow,
 * safetensors and torch all call it.
 *
 * faults_arm(folder, kind, at) counts the calls to which a kind of fault applies, and lets number `at` fail (none if it is negative).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum call { OPEN, CREATE, READ, WRITE, FSYNC, TRUNCATE, RENAME, MKDIR, UNLINK, MMAP };
static const char *NAMES[] = {"open", "create", "read", "write", "fsync", "truncate", "rename", "mkdir", "unlink", "mmap"};
enum kind { FULL, EIO_ONCE, TORN, INTERRUPTED, SHORT, KILLED };
#define BIT(call) (1u << (call))
static const unsigned APPLIES[] = {
    [FULL] = BIT(CREATE) | BIT(WRITE) | BIT(FSYNC) | BIT(TRUNCATE) | BIT(RENAME) | BIT(MKDIR), /* ENOSPC, from then on */
    [EIO_ONCE] = ~0u,                                                                           /* EIO; ENOMEM of mmap */
    [TORN] = BIT(WRITE),                                           /* half of the bytes reach the file, and then EIO */
    [INTERRUPTED] = BIT(OPEN) | BIT(CREATE) | BIT(READ) | BIT(WRITE) | BIT(FSYNC) | BIT(TRUNCATE), /* EINTR */
    [SHORT] = BIT(WRITE),                                          /* half of the bytes, and success, as POSIX allows */
    [KILLED] = ~(BIT(OPEN) | BIT(READ) | BIT(MMAP)),               /* SIGKILL, in the middle of a write */
};

static char folder[PATH_MAX], struck[PATH_MAX + 32];
static int is_armed, kind;
static long at, count;

void faults_arm(const char *path, int a_kind, long number)
{
    snprintf(folder, sizeof folder, "%s", path);
    struck[0] = 0;
    kind = a_kind;
    at = number;
    count = 0;
    is_armed = 1;
}

void faults_disarm(void) { is_armed = 0; }
long faults_count(void) { return count; }
const char *faults_struck(void) { return struck; } /* the call that failed, empty if none has */

static int is_below(const char *path)
{
    size_t length = strlen(folder);
    return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static void path_at(int directory, const char *path, char *whole)
{
    char link[64], base[PATH_MAX] = "";
    if (path[0] != '/') {
        if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t size = readlink(link, base, sizeof base - 2);
        if (size > 0) { base[size] = '/'; base[size + 1] = 0; }
    }
    strcpy(whole, base);
    strncat(whole, path, PATH_MAX - 1);
}

static int counted(enum call call, const char *path)
{
    if (!is_below(path) || !(APPLIES[kind] & BIT(call))) return 0;
    long number = __sync_fetch_and_add(&count, 1);
    if (number == at) snprintf(struck, sizeof struck, "%s %s", NAMES[call], strrchr(path, '/') + 1);
    return number == at || (kind == FULL && at >= 0 && number > at);
}

/* Whether a call fails; its errno is set. A process that is to be killed before the call does not return. */
static int fails(enum call call, int directory, const char *path)
{
    char whole[2 * PATH_MAX];
    if (!is_armed) return 0;
    int before = errno;
    path_at(directory, path, whole);
    if (!counted(call, whole)) { errno = before; return 0; }
    if (kind == KILLED) raise(SIGKILL);
    errno = kind == FULL ? ENOSPC : kind == INTERRUPTED ? EINTR : call == MMAP ? ENOMEM : EIO;
    return 1;
}

static int fails_on(enum call call, int fd)
{
    char link[64], path[PATH_MAX + 1];
    if (!is_armed || fd < 0) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX);
    errno = before;
    if (size <= 0) return 0;
    path[size] = 0;
    return path[0] == '/' && fails(call, AT_FDCWD, path);
}

#define REAL(result, name, ...)                                                                                          \
    static result (*real)(__VA_ARGS__);                                                                                  \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static enum call opening(int directory, const char *path, int flags)
{
    struct stat status;
    return (flags & O_CREAT) && fstatat(directory, path, &status, 0) ? CREATE : OPEN;
}

#define OPENS(name)                                                                                                      \
    int name(const char *path, int flags, ...)                                                                           \
    {                                                                                                                    \
        REAL(int, name, const char *, int, ...);                                                                         \
        va_list more;                                                                                                    \
        va_start(more, flags);                                                                                           \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                    \
        return fails(opening(AT_FDCWD, path, flags), AT_FDCWD, path) ? -1 : real(path, flags, mode);                     \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                                                                   \
    int name(int directory, const char *path, int flags, ...)                                                            \
    {                                                                                                                    \
        REAL(int, name, int, const char *, int, ...);                                                                    \
        va_list more;                                                                                                    \
        va_start(more, flags);                                                                                           \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                    \
        return fails(opening(directory, path, flags), directory, path) ? -1 : real(directory, path, flags, mode);        \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

#define OPENS_STREAM(name)                                                                                               \
    FILE *name(const char *path, const char *mode)                                                                       \
    {                                                                                                                    \
        REAL(FILE *, name, const char *, const char *);                                                                  \
        int flags = mode[0] == 'r' ? 0 : O_CREAT;                                                                        \
        return fails(opening(AT_FDCWD, path, flags), AT_FDCWD, path) ? NULL : real(path, mode);                          \
    }
OPENS_STREAM(fopen)
OPENS_STREAM(fopen64)

/* Write half of the bytes where the kind says so. `WRITTEN(size)` is the call with another size. */
#define WRITES(fd, size)                                                                                                 \
    if (fails_on_write(fd)) {                                                                                            \
        int error = errno;                                                                                               \
        ssize_t half = kind == FULL || kind == EIO_ONCE || kind == INTERRUPTED ? 0 : WRITTEN((size) / 2);                \
        if (kind == KILLED) raise(SIGKILL);                                                                              \
        if (kind == SHORT) return half > 0 ? half : WRITTEN(size);                                                       \
        errno = error;                                                                                                   \
        return -1;                                                                                                       \
    }                                                                                                                    \
    return WRITTEN(size)

static int fails_on_write(int fd)
{
    int is_killed = kind == KILLED;
    if (is_killed) kind = TORN; /* not killed yet */
    int result = fails_on(WRITE, fd);
    if (is_killed) kind = KILLED;
    return result;
}

ssize_t write(int fd, const void *bytes, size_t size)
{
    REAL(ssize_t, write, int, const void *, size_t);
#define WRITTEN(size) real(fd, bytes, size)
    WRITES(fd, size);
#undef WRITTEN
}

#define WRITES_AT(name, offset_type)                                                                                     \
    ssize_t name(int fd, const void *bytes, size_t size, offset_type offset)                                             \
    {                                                                                                                    \
        REAL(ssize_t, name, int, const void *, size_t, offset_type);                                                     \
        WRITES(fd, size);                                                                                                \
    }
#define WRITTEN(size) real(fd, bytes, size, offset)
WRITES_AT(pwrite, off_t)
WRITES_AT(pwrite64, off64_t)
#undef WRITTEN

ssize_t writev(int fd, const struct iovec *parts, int size)
{
    REAL(ssize_t, writev, int, const struct iovec *, int);
#define WRITTEN(size) real(fd, parts, size)
    WRITES(fd, size);
#undef WRITTEN
}

#define SENDS(name, offset_type)                                                                                         \
    ssize_t name(int fd, int from, offset_type *offset, size_t size)                                                     \
    {                                                                                                                    \
        REAL(ssize_t, name, int, int, offset_type *, size_t);                                                            \
        WRITES(fd, size);                                                                                                \
    }
#define WRITTEN(size) real(fd, from, offset, size)
SENDS(sendfile, off_t)
SENDS(sendfile64, off64_t)
#undef WRITTEN

ssize_t read(int fd, void *bytes, size_t size)
{
    REAL(ssize_t, read, int, void *, size_t);
    return fails_on(READ, fd) ? -1 : real(fd, bytes, size);
}

#define READS_AT(name, offset_type)                                                                                      \
    ssize_t name(int fd, void *bytes, size_t size, offset_type offset)                                                   \
    {                                                                                                                    \
        REAL(ssize_t, name, int, void *, size_t, offset_type);                                                           \
        return fails_on(READ, fd) ? -1 : real(fd, bytes, size, offset);                                                  \
    }
READS_AT(pread, off_t)
READS_AT(pread64, off64_t)

#define SYNCS(name)                                                                                                      \
    int name(int fd)                                                                                                     \
    {                                                                                                                    \
        REAL(int, name, int);                                                                                            \
        return fails_on(FSYNC, fd) ? -1 : real(fd);                                                                      \
    }
SYNCS(fsync)
SYNCS(fdatasync)

#define TRUNCATES(name, offset_type)                                                                                     \
    int name(int fd, offset_type size)                                                                                   \
    {                                                                                                                    \
        REAL(int, name, int, offset_type);                                                                               \
        return fails_on(TRUNCATE, fd) ? -1 : real(fd, size);                                                             \
    }
TRUNCATES(ftruncate, off_t)
TRUNCATES(ftruncate64, off64_t)

int rename(const char *from, const char *to)
{
    REAL(int, rename, const char *, const char *);
    return fails(RENAME, AT_FDCWD, to) ? -1 : real(from, to);
}

int renameat(int old, const char *from, int new, const char *to)
{
    REAL(int, renameat, int, const char *, int, const char *);
    return fails(RENAME, new, to) ? -1 : real(old, from, new, to);
}

int mkdir(const char *path, mode_t mode)
{
    REAL(int, mkdir, const char *, mode_t);
    struct stat status;
    return stat(path, &status) && fails(MKDIR, AT_FDCWD, path) ? -1 : real(path, mode);
}

int unlink(const char *path)
{
    REAL(int, unlink, const char *);
    return !access(path, F_OK) && fails(UNLINK, AT_FDCWD, path) ? -1 : real(path);
}

int unlinkat(int directory, const char *path, int flags)
{
    REAL(int, unlinkat, int, const char *, int);
    return fails(UNLINK, directory, path) ? -1 : real(directory, path, flags);
}

int rmdir(const char *path)
{
    REAL(int, rmdir, const char *);
    return fails(UNLINK, AT_FDCWD, path) ? -1 : real(path);
}

#define MAPS(name, offset_type)                                                                                          \
    void *name(void *address, size_t size, int protection, int flags, int fd, offset_type offset)                        \
    {                                                                                                                    \
        REAL(void *, name, void *, size_t, int, int, int, offset_type);                                                  \
        return fails_on(MMAP, fd) ? MAP_FAILED : real(address, size, protection, flags, fd, offset);                     \
    }
MAPS(mmap, off_t)
MAPS(mmap64, off64_t)
