/* A disk that fails: preloaded, it stands between one process and the C library's file calls.
 *
 * The rules are a table in a file that this process and the test have mapped both (the layout is
 * in tests/doubles/fs/__init__.py): a test switches them while the process runs, and reads how
 * often each was met. Without a rule a call costs one look into that memory. Only the process that
 * was started with it has it: what it starts inherits neither LD_PRELOAD nor the table.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <dlfcn.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { RULES = 32, PATH_BYTES = 192, SLICE_NS = 5000000 };
enum { OPEN = 1, READ = 2, WRITE = 4, SYNC = 8, LINK = 16, RENAME = 32, CONNECT = 64 };
                                              /* of `calls` */
enum { SHORTENED = 1, FLIPPED = 2 };                                    /* of `how` */

typedef struct {
    atomic_uint is_on; /* 0: off; else a number that no other rule had; written last */
    uint32_t calls;
    int32_t error; /* errno; 0: none */
    uint32_t how;
    uint32_t every; /* n: of what fits, each n-th */
    uint32_t most;  /* no more than so often; 0: no limit */
    uint32_t percent;
    uint32_t seed;
    uint64_t delay_ns;
    atomic_ullong seen, fired; /* calls that fit; those that it was done to */
    char path[PATH_BYTES];     /* a pattern of fnmatch(3) */
} Rule;

typedef struct {
    atomic_uint count; /* of rules, on or not: 0 costs nothing */
    uint32_t unused;
    Rule rules[RULES];
} Table;

_Static_assert(sizeof(Table) == 8 + RULES * 248, "tests/doubles/fs/__init__.py has it so");

static Table *table;

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) {
        fprintf(stderr, "faults: there is no %s\n", name);
        abort();
    }
    return found;
}

/* The C library's own, looked up once; two threads at once find the same. */
#define REAL(name)                                                                                 \
    static _Atomic(__typeof__(&name)) own;                                                         \
    __typeof__(&name) next = atomic_load_explicit(&own, memory_order_relaxed);                     \
    if (!next)                                                                                     \
        atomic_store_explicit(&own, next = (__typeof__(&name))real(#name), memory_order_relaxed)

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("HIVE_FS_FAULTS");
    if (path) {
        int fd = ((int (*)(const char *, int, ...))real("open"))(path, O_RDWR | O_CLOEXEC);
        void *at = fd < 0 ? MAP_FAILED
                          : mmap(NULL, sizeof(Table), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (at == MAP_FAILED) {
            perror("faults: the table cannot be mapped");
            abort();
        }
        close(fd);
        table = at;
    }
    unsetenv("HIVE_FS_FAULTS");
    unsetenv("LD_PRELOAD");
}

/* A number from 0 to 99 for the n-th call that fits: the same ones at every run (splitmix64). */
static unsigned chance(uint32_t seed, uint64_t n) {
    uint64_t z = ((uint64_t)seed << 32) + (n + 1) * 0x9E3779B97F4A7C15ULL;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return (unsigned)((z ^ (z >> 31)) % 100);
}

/* A slow disk; it is fast again as soon as the rule is off. */
static void wait_for(Rule *rule, unsigned which) {
    struct timespec now, slice = {0, SLICE_NS};
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t end = (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec + rule->delay_ns;
    while (atomic_load(&rule->is_on) == which &&
           (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec < end) {
        nanosleep(&slice, NULL);
        clock_gettime(CLOCK_MONOTONIC, &now);
    }
}

static int takes(Rule *rule, uint32_t call, const char *one, const char *other) {
    if (!(rule->calls & call))
        return 0;
    if (fnmatch(rule->path, one, 0) && (!other || fnmatch(rule->path, other, 0)))
        return 0;
    uint64_t n = atomic_fetch_add(&rule->seen, 1);
    if ((n + 1) % rule->every || chance(rule->seed, n) >= rule->percent)
        return 0;
    if (atomic_fetch_add(&rule->fired, 1) < rule->most || !rule->most)
        return 1;
    atomic_fetch_sub(&rule->fired, 1);
    return 0;
}

/* What is to happen to a call on these paths: 0, or -1 with errno; `how` says what else. */
static int meet_paths(uint32_t call, const char *one, const char *other, uint32_t *how) {
    unsigned count = atomic_load(&table->count);
    for (unsigned at = 0; at < count && at < RULES; at++) {
        Rule *rule = &table->rules[at];
        unsigned which = atomic_load(&rule->is_on);
        if (!which || !takes(rule, call, one, other))
            continue;
        *how |= rule->how;
        int error = rule->error;
        if (rule->delay_ns)
            wait_for(rule, which);
        if (error) {
            errno = error;
            return -1;
        }
    }
    return 0;
}

static int has_rules(void) {
    return table && atomic_load_explicit(&table->count, memory_order_relaxed);
}

/* The whole path, of what is not there yet, too. */
static const char *whole(int dirfd, const char *path, char *room) {
    char link[64], base[PATH_MAX];
    if (!path || path[0] == '/')
        return path ? path : "";
    snprintf(link, sizeof link, dirfd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dirfd);
    ssize_t size = readlink(link, base, sizeof base - 1);
    if (size < 0)
        return path;
    base[size] = '\0';
    return snprintf(room, PATH_MAX, "%s/%s", base, path) < PATH_MAX ? room : path;
}

static int meet_names(uint32_t call, int dir, const char *path, int to_dir, const char *to) {
    if (!has_rules())
        return 0;
    int before = errno;
    uint32_t how = 0;
    char room[PATH_MAX], more[PATH_MAX];
    const char *one = whole(dir, path, room), *other = to ? whole(to_dir, to, more) : NULL;
    errno = before;
    return meet_paths(call, one, other, &how);
}

static int meet_fd(uint32_t call, int fd, uint32_t *how) {
    if (!has_rules())
        return 0;
    int before = errno;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0)
        return 0;
    path[size] = '\0';
    return meet_paths(call, path, NULL, how);
}

/* ── the calls ─────────────────────────────────────────────────────────────────────────────── */

/* What open was given beside the flags, where they ask for it. */
#define MODE(flags)                                                                                \
    mode_t mode = 0;                                                                               \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                           \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode = va_arg(more, mode_t);                                                               \
        va_end(more);                                                                              \
    }

int open(const char *path, int flags, ...) {
    REAL(open);
    MODE(flags)
    return meet_names(OPEN, AT_FDCWD, path, 0, NULL) ? -1 : next(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(open64);
    MODE(flags)
    return meet_names(OPEN, AT_FDCWD, path, 0, NULL) ? -1 : next(path, flags, mode);
}
int openat(int dir, const char *path, int flags, ...) {
    REAL(openat);
    MODE(flags)
    return meet_names(OPEN, dir, path, 0, NULL) ? -1 : next(dir, path, flags, mode);
}
int openat64(int dir, const char *path, int flags, ...) {
    REAL(openat64);
    MODE(flags)
    return meet_names(OPEN, dir, path, 0, NULL) ? -1 : next(dir, path, flags, mode);
}

static ssize_t flipped(ssize_t size, void *bytes, uint32_t how) {
    if (size > 0 && how & FLIPPED)
        ((unsigned char *)bytes)[size / 2] ^= 1;
    return size;
}

ssize_t read(int fd, void *bytes, size_t size) {
    REAL(read);
    uint32_t how = 0;
    return meet_fd(READ, fd, &how) ? -1 : flipped(next(fd, bytes, size), bytes, how);
}
ssize_t pread(int fd, void *bytes, size_t size, off_t at) {
    REAL(pread);
    uint32_t how = 0;
    return meet_fd(READ, fd, &how) ? -1 : flipped(next(fd, bytes, size, at), bytes, how);
}
ssize_t pread64(int fd, void *bytes, size_t size, off64_t at) {
    REAL(pread64);
    uint32_t how = 0;
    return meet_fd(READ, fd, &how) ? -1 : flipped(next(fd, bytes, size, at), bytes, how);
}

static size_t shortened(size_t size, uint32_t how) {
    return how & SHORTENED && size > 1 ? size / 2 : size;
}

ssize_t write(int fd, const void *bytes, size_t size) {
    REAL(write);
    uint32_t how = 0;
    return meet_fd(WRITE, fd, &how) ? -1 : next(fd, bytes, shortened(size, how));
}
ssize_t pwrite(int fd, const void *bytes, size_t size, off_t at) {
    REAL(pwrite);
    uint32_t how = 0;
    return meet_fd(WRITE, fd, &how) ? -1 : next(fd, bytes, shortened(size, how), at);
}
ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t at) {
    REAL(pwrite64);
    uint32_t how = 0;
    return meet_fd(WRITE, fd, &how) ? -1 : next(fd, bytes, shortened(size, how), at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    uint32_t how = 0;
    return meet_fd(WRITE, fd, &how) ? -1 : next(fd, parts, (int)shortened((size_t)count, how));
}

int fsync(int fd) {
    REAL(fsync);
    uint32_t how = 0;
    return meet_fd(SYNC, fd, &how) ? -1 : next(fd);
}
int fdatasync(int fd) {
    REAL(fdatasync);
    uint32_t how = 0;
    return meet_fd(SYNC, fd, &how) ? -1 : next(fd);
}

int link(const char *path, const char *to) {
    REAL(link);
    return meet_names(LINK, AT_FDCWD, path, AT_FDCWD, to) ? -1 : next(path, to);
}
int linkat(int dir, const char *path, int to_dir, const char *to, int flags) {
    REAL(linkat);
    return meet_names(LINK, dir, path, to_dir, to) ? -1 : next(dir, path, to_dir, to, flags);
}
int rename(const char *path, const char *to) {
    REAL(rename);
    return meet_names(RENAME, AT_FDCWD, path, AT_FDCWD, to) ? -1 : next(path, to);
}
int renameat(int dir, const char *path, int to_dir, const char *to) {
    REAL(renameat);
    return meet_names(RENAME, dir, path, to_dir, to) ? -1 : next(dir, path, to_dir, to);
}
int renameat2(int dir, const char *path, int to_dir, const char *to, unsigned flags) {
    REAL(renameat2);
    return meet_names(RENAME, dir, path, to_dir, to) ? -1 : next(dir, path, to_dir, to, flags);
}

int connect(int fd, const struct sockaddr *to, socklen_t size) {
    REAL(connect);
    const struct sockaddr_un *local = (const struct sockaddr_un *)to;
    int is_local = to->sa_family == AF_UNIX && size > sizeof(sa_family_t) && local->sun_path[0];
    return is_local && meet_names(CONNECT, AT_FDCWD, local->sun_path, 0, NULL)
               ? -1
               : next(fd, to, size);
}
