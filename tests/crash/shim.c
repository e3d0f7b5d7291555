/* LD_PRELOAD shim: counts the calls that change anything below $CRASH_DIR, and spoils number
 * $CRASH_AT by $CRASH_MODE. It reads them at every call, so that a forked child can set them.
 *
 *   die     SIGKILL before the call
 *   torn    half of a write, or the whole of another call, then SIGKILL
 *   eio     the call fails with EIO
 *   enospc  from here on nothing grows: opening for writing, write, fsync and mkdir fail
 * Power loss before the call, with what was not fsynced
 *   lost    cut off
 *   zeroed  replaced by zeros
 *   undone  cut off, and so are the changes of names in folders that were not fsynced since
 *   mixed   the same, but deletions have reached the disk
 *
 * fsync is modelled, not performed. What is deleted or replaced is kept in $CRASH_GRAVE, a folder
 * outside $CRASH_DIR. For programs with one thread.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX 4096
#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

enum kind { OPEN, WRITE, FSYNC, RENAME, MKDIR, UNLINK };
enum change { DURABLE, CREATED, MADE, RENAMED, REMOVED };

static struct { int fd; ino_t inode; off_t durable; } files[MAX];
static struct { enum change what; int folder, from; char name[256], old[256], grave[PATH_MAX]; } names[MAX];
static int num_files, num_names, num_graves, count, full, busy;

int crash_calls(void) { return count; }

static int is(const char *mode) {
    const char *given = getenv("CRASH_MODE");
    return given && !strcmp(given, mode);
}

static int watched(int folder, const char *name, char *path) {
    const char *dir = getenv("CRASH_DIR");
    char link[64];
    ssize_t n = 0;
    if (!dir || busy) return 0;
    if (name[0] != '/') {
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        n = readlink(link, path, PATH_MAX - 2);
        if (n < 0) return 0;
        if (name[0]) path[n++] = '/';
    }
    snprintf(path + n, PATH_MAX - n, "%s", name);
    return !strncmp(path, dir, strlen(dir)) && strchr("/", path[strlen(dir)]);
}

static const char *new_grave(void) {
    static char grave[PATH_MAX];
    snprintf(grave, sizeof grave, "%s/%d", getenv("CRASH_GRAVE"), num_graves++);
    return grave;
}

static void power_loss(void) {
    busy = 1;
    for (int i = 0; i < num_files; i++) {
        struct stat at;
        fstat(files[i].fd, &at);
        if (at.st_size <= files[i].durable) continue;
        if (ftruncate(files[i].fd, files[i].durable)) abort();
        if (is("zeroed") && ftruncate(files[i].fd, at.st_size)) abort();
    }
    for (int i = num_names; i-- && (is("undone") || is("mixed"));) {
        int at = names[i].folder;
        if (names[i].what == CREATED) unlinkat(at, names[i].name, 0);
        if (names[i].what == MADE) renameat(at, names[i].name, AT_FDCWD, new_grave());
        if (names[i].what == RENAMED) renameat(at, names[i].name, names[i].from, names[i].old);
        if (names[i].what == RENAMED || (names[i].what == REMOVED && is("undone")))
            renameat(AT_FDCWD, names[i].grave, at, names[i].name);
    }
}

/* An errno to fail with, or 0; *torn says that SIGKILL follows the call. */
static int strike(enum kind kind, int *torn) {
    const char *at = getenv("CRASH_AT");
    int grows = kind != RENAME && kind != UNLINK;
    *torn = 0;
    if (full && grows) return ENOSPC;
    if (++count != (at ? atoi(at) : 0)) return 0;
    if (is("torn")) return *torn = 1, 0;
    if (is("eio")) return EIO;
    if (is("enospc")) return full = 1, grows ? ENOSPC : 0;
    if (!is("die")) power_loss();
    return raise(SIGKILL);
}

#define STRIKE(kind) \
    int torn, fault = strike(kind, &torn); \
    if (fault) return errno = fault, -1
#define DONE(result) \
    if (torn) raise(SIGKILL); \
    return result

static int parent(const char *path, char *name) {
    char folder[PATH_MAX];
    char *slash = strrchr(strcpy(folder, path), '/');
    snprintf(name, 256, "%s", slash + 1);
    *slash = 0;
    return open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static void note(enum change what, const char *path, const char *old, const char *grave) {
    if (num_names == MAX) abort();
    names[num_names].what = what;
    names[num_names].folder = parent(path, names[num_names].name);
    if (old) names[num_names].from = parent(old, names[num_names].old);
    strcpy(names[num_names++].grave, grave);
}

static void track(int fd, int truncated) {
    struct stat at;
    char link[64];
    fstat(fd, &at);
    for (int i = 0; i < num_files; i++)
        if (files[i].inode == at.st_ino) {
            if (truncated) files[i].durable = 0;
            return;
        }
    if (num_files == MAX) abort();
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    busy = 1;
    files[num_files].fd = open(link, O_RDWR | O_CLOEXEC);
    busy = 0;
    files[num_files].inode = at.st_ino;
    files[num_files++].durable = at.st_size;
}

static int opened(int folder, const char *name, int flags, mode_t permissions) {
    REAL(int, "openat64", int, const char *, int, ...);
    char path[PATH_MAX];
    if (!(flags & (O_WRONLY | O_RDWR)) || !watched(folder, name, path))
        return real(folder, name, flags, permissions);
    STRIKE(OPEN);
    int fresh = access(path, F_OK), fd = real(folder, name, flags, permissions);
    if (fd >= 0) track(fd, flags & O_TRUNC);
    if (fd >= 0 && fresh) note(CREATED, path, NULL, "");
    DONE(fd);
}

#define OPENING(folder) \
    va_list rest; \
    va_start(rest, flags); \
    mode_t permissions = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    return opened(folder, name, flags, permissions)
int open(const char *name, int flags, ...) { OPENING(AT_FDCWD); }
int open64(const char *name, int flags, ...) { OPENING(AT_FDCWD); }
int openat(int folder, const char *name, int flags, ...) { OPENING(folder); }
int openat64(int folder, const char *name, int flags, ...) { OPENING(folder); }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    char path[PATH_MAX];
    if (!watched(fd, "", path)) return real(fd, data, size);
    STRIKE(WRITE);
    ssize_t written = real(fd, data, torn ? size / 2 : size);
    DONE(written);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    char path[PATH_MAX];
    if (!watched(fd, "", path)) return real(fd, data, size, offset);
    STRIKE(WRITE);
    ssize_t written = real(fd, data, torn ? size / 2 : size, offset);
    DONE(written);
}

static void settle(int fd) {
    struct stat at, folder;
    fstat(fd, &at);
    for (int i = 0; i < num_files; i++)
        if (files[i].inode == at.st_ino) files[i].durable = at.st_size;
    for (int i = 0; i < num_names; i++)
        if (!fstat(names[i].folder, &folder) && folder.st_ino == at.st_ino) names[i].what = DURABLE;
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    char path[PATH_MAX];
    if (!watched(fd, "", path)) {
        settle(fd); /* it may be the folder that holds $CRASH_DIR */
        return real(fd);
    }
    STRIKE(FSYNC);
    settle(fd);
    DONE(0);
}
int fdatasync(int fd) { return fsync(fd); }

int rename(const char *old, const char *new) {
    REAL(int, "rename", const char *, const char *);
    char from[PATH_MAX], to[PATH_MAX];
    int inside = watched(AT_FDCWD, old, from) + watched(AT_FDCWD, new, to);
    if (!inside) return real(old, new);
    STRIKE(RENAME);
    const char *grave = new_grave();
    if (link(to, grave)) grave = "";
    int result = real(old, new);
    if (!result) note(RENAMED, to, from, grave);
    DONE(result);
}

static int removed(int folder, const char *name, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char path[PATH_MAX];
    if (!watched(folder, name, path)) return real(folder, name, flags);
    STRIKE(UNLINK);
    const char *grave = new_grave();
    int result;
    if (flags & AT_REMOVEDIR) /* taken to be empty; in the grave it can take its files back */
        result = renameat(folder, name, AT_FDCWD, grave);
    else {
        if (link(path, grave)) grave = "";
        result = real(folder, name, flags);
    }
    if (!result) note(REMOVED, path, NULL, grave);
    DONE(result);
}
int unlink(const char *name) { return removed(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return removed(AT_FDCWD, name, AT_REMOVEDIR); }
int unlinkat(int folder, const char *name, int flags) { return removed(folder, name, flags); }

static int made(int folder, const char *name, mode_t permissions) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    char path[PATH_MAX];
    if (!watched(folder, name, path)) return real(folder, name, permissions);
    STRIKE(MKDIR);
    int result = real(folder, name, permissions);
    if (!result) note(MADE, path, NULL, "");
    DONE(result);
}
int mkdir(const char *name, mode_t permissions) { return made(AT_FDCWD, name, permissions); }
int mkdirat(int folder, const char *name, mode_t permissions) { return made(folder, name, permissions); }
