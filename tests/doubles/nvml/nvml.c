/* NVML as the tests want it: what the real pynvml calls, answered from the directory NVML_DOUBLE.
 *
 * There is no state here but who called nvmlInit, the handles given out, and the event sets: the
 * directory is read again at every call, so that a test changes the hardware by writing a file
 * (tests/doubles/nvml/__init__.py describes the files). Layouts and codes are those of nvml.h.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    TIMEOUT = 10,
    GPU_IS_LOST = 15,
    OPERATING_SYSTEM = 17,
    OUT_OF_MEMORY = 20,
    ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999,
} Code;

typedef unsigned long long u64;

enum {
    GPUS = 16,
    HANDLES = 256, /* different UUIDs in a process's life */
    FAULTS = 64,
    WATCHED = 16,
    STATE_BYTES = 32768,
    UUID_BYTES = 96,
    HUNG = -1, /* a fault's code: the call never returns */
    ANY = -1,  /* a fault's index: every GPU */
    MEMORY_V2 = 0x02000028,
    TEMPERATURE_V1 = 0x0100000C,
    XID = 0x8,
    EVENTS = 0x1F, /* ECC, PState, Xid and clock events can be asked for; only Xids ever come */
    CUDA = 13000,
};

static const u64 MIB = 1024 * 1024;

typedef struct {
    int index;
    char uuid[UUID_BYTES], name[UUID_BYTES], pci[32];
    long total_mib, base_mib, temp, util, lost, keeps;
    /* -1: not supported, as GPUs that lack it answer. */
    long ecc, remap_pending, remap_failed, retired_pending, mig;
} Gpu;

typedef struct {
    char function[64];
    int code, index;
} Fault;

typedef struct {
    char driver[80];
    Gpu gpus[GPUS]; /* in the order of their indices */
    int gpu_count, fault_count, pids_hidden;
    Fault faults[FAULTS];
} State;

typedef struct {
    char uuid[UUID_BYTES];
    int index; /* when it was given out: a lost GPU's faults are still found */
} Handle;

typedef struct {
    pthread_mutex_t lock;
    int freed, count;
    off_t read_to;
    struct {
        const Handle *handle;
        u64 types;
        off_t from; /* what was appended before the registration does not count */
    } watched[WATCHED];
} EventSet;

typedef struct {
    u64 total, free, used;
} Memory;

typedef struct {
    unsigned version;
    u64 total, reserved, free, used;
} MemoryV2;

typedef struct {
    char legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char id[32];
} Pci;

typedef struct {
    unsigned version;
    int sensor, temperature;
} Temperature;

typedef struct {
    unsigned gpu, memory;
} Utilization;

typedef struct {
    unsigned pid;
    u64 used;
    unsigned gpu_instance, compute_instance;
} Process;

typedef struct {
    const Handle *device;
    u64 type, data;
    unsigned gpu_instance, compute_instance;
} Event;

static atomic_int users;
static pthread_mutex_t handles_lock = PTHREAD_MUTEX_INITIALIZER;
static Handle handles[HANDLES];
static int handle_count;

/* ── the directory ──────────────────────────────────────────────────────────────────────────── */

static int complain(const char *what, const char *line) {
    fprintf(stderr, "NVML double: %s: %s\n", what, line);
    return UNKNOWN;
}

static int path_of(char *path, size_t size, const char *format, ...) {
    const char *directory = getenv("NVML_DOUBLE");
    int used;
    va_list names;
    if (!directory || !*directory) return DRIVER_NOT_LOADED;
    used = snprintf(path, size, "%s/", directory);
    if (used < 0 || (size_t)used >= size) return UNKNOWN;
    va_start(names, format);
    used += vsnprintf(path + used, size - (size_t)used, format, names);
    va_end(names);
    return (size_t)used < size ? SUCCESS : UNKNOWN;
}

/* The file's text from an offset; -1 if it cannot be read. */
static ssize_t read_file(const char *path, char *text, size_t size, off_t from) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got, all = 0;
    if (fd < 0) return -1;
    while ((size_t)all < size - 1 &&
           (got = pread(fd, text + all, size - 1 - (size_t)all, from + all)) != 0) {
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            all = -1;
            break;
        }
        all += got;
    }
    close(fd);
    if (all >= 0) text[all] = '\0';
    return all;
}

static void copy(char *to, size_t size, const char *from) { snprintf(to, size, "%s", from); }

static int read_gpu(Gpu *gpu, char *words) {
    struct {
        const char *key;
        long *value;
    } numbers[] = {
        {"total_mib", &gpu->total_mib},
        {"base_mib", &gpu->base_mib},
        {"temp", &gpu->temp},
        {"util", &gpu->util},
        {"lost", &gpu->lost},
        {"keeps", &gpu->keeps},
        {"ecc", &gpu->ecc},
        {"remap_pending", &gpu->remap_pending},
        {"remap_failed", &gpu->remap_failed},
        {"retired_pending", &gpu->retired_pending},
        {"mig", &gpu->mig},
    };
    char *word, *rest = words;
    word = strtok_r(NULL, " ", &rest);
    if (!word || !isdigit((unsigned char)*word)) return UNKNOWN;
    *gpu = (Gpu){.index = atoi(word), .total_mib = 81920, .base_mib = 500, .temp = 40,
                 .retired_pending = -1};
    snprintf(gpu->uuid, sizeof gpu->uuid, "GPU-%08d-0000-0000-0000-000000000000", gpu->index);
    copy(gpu->name, sizeof gpu->name, "NVIDIA H100");
    snprintf(gpu->pci, sizeof gpu->pci, "00000000:%02X:00.0", (0x17 + gpu->index) & 0xFF);
    while ((word = strtok_r(NULL, " ", &rest))) {
        char *value = strchr(word, '=');
        size_t i, known = sizeof numbers / sizeof *numbers;
        if (!value) return UNKNOWN;
        *value++ = '\0';
        if (!strcmp(word, "uuid")) {
            copy(gpu->uuid, sizeof gpu->uuid, value);
        } else if (!strcmp(word, "pci")) {
            copy(gpu->pci, sizeof gpu->pci, value);
        } else if (!strcmp(word, "name")) {
            copy(gpu->name, sizeof gpu->name, value);
            for (char *c = gpu->name; *c; c++)
                if (*c == '_') *c = ' ';
        } else {
            for (i = 0; i < known && strcmp(word, numbers[i].key); i++) continue;
            if (i == known) return UNKNOWN;
            *numbers[i].value = strtol(value, NULL, 10);
        }
    }
    return SUCCESS;
}

static int by_index(const void *a, const void *b) {
    return ((const Gpu *)a)->index - ((const Gpu *)b)->index;
}

static int read_line(State *state, char *line) {
    char *rest = line, *word = strtok_r(NULL, " ", &rest), *function, *number;
    if (!word || *word == '#') return SUCCESS;
    if (!strcmp(word, "gpu")) {
        return state->gpu_count < GPUS ? read_gpu(&state->gpus[state->gpu_count++], rest) : UNKNOWN;
    }
    function = strtok_r(NULL, " ", &rest);
    if (!function) return UNKNOWN;
    if (!strcmp(word, "driver")) {
        copy(state->driver, sizeof state->driver, function);
    } else if (!strcmp(word, "pids")) {
        state->pids_hidden = !strcmp(function, "hidden");
    } else if (!strcmp(word, "fail") || !strcmp(word, "hang")) {
        Fault *fault = &state->faults[state->fault_count];
        if (state->fault_count++ == FAULTS) return UNKNOWN;
        *fault = (Fault){.code = HUNG, .index = ANY};
        copy(fault->function, sizeof fault->function, function);
        if (*word == 'f') {
            if (!(number = strtok_r(NULL, " ", &rest))) return UNKNOWN;
            fault->code = atoi(number);
        }
        if ((number = strtok_r(NULL, " ", &rest))) fault->index = atoi(number);
    } else {
        return UNKNOWN;
    }
    return SUCCESS;
}

static int read_state(State *state) {
    char path[4096], text[STATE_BYTES], said[256];
    char *line, *rest = text;
    int code = path_of(path, sizeof path, "state");
    ssize_t size;
    if (code) return code;
    size = read_file(path, text, sizeof text, 0);
    if (size < 0) return DRIVER_NOT_LOADED;
    if (size == STATE_BYTES - 1) return complain("too long", path);
    memset(state, 0, sizeof *state);
    copy(state->driver, sizeof state->driver, "580.95.05");
    while ((line = strtok_r(NULL, "\n", &rest))) {
        copy(said, sizeof said, line);
        if (read_line(state, line)) return complain("what does this line say?", said);
    }
    qsort(state->gpus, (size_t)state->gpu_count, sizeof(Gpu), by_index);
    return SUCCESS;
}

static int lives(const char *pid) {
    char path[64], text[1024], *state;
    snprintf(path, sizeof path, "/proc/%.20s/stat", pid);
    if (read_file(path, text, sizeof text, 0) < 0) return 0;
    state = strrchr(text, ')');
    return state && !strchr("ZXx", state[2]);
}

/* MiB held on a GPU beyond its base; the living holders, too, unless `held` is NULL. */
static long held_mib(const Gpu *gpu, Process *held, unsigned size, unsigned *count) {
    char path[4096], text[32];
    const char *name;
    struct dirent *entry;
    DIR *directory;
    long mib, sum = 0;
    if (path_of(path, sizeof path, "hold/%s", gpu->uuid) || !(directory = opendir(path))) return 0;
    while ((entry = readdir(directory))) {
        name = entry->d_name;
        if (strspn(name, "0123456789") != strlen(name)) continue; /* ".", "..", half-written */
        if (path_of(path, sizeof path, "hold/%s/%s", gpu->uuid, name)) continue;
        if (read_file(path, text, sizeof text, 0) <= 0) continue;
        mib = strtol(text, NULL, 10);
        if (lives(name)) {
            sum += mib;
            if (held && *count < size)
                held[*count] = (Process){(unsigned)atoi(name), (u64)mib * MIB, ~0U, ~0U};
            if (count) ++*count;
        } else if (gpu->keeps) {
            sum += mib;
        }
    }
    closedir(directory);
    return sum;
}

/* ── the beginning of every call ────────────────────────────────────────────────────────────── */

static int fault(const State *state, const char *function, int index) {
    for (int i = 0; i < state->fault_count; i++) {
        const Fault *f = &state->faults[i];
        if (strcmp(f->function, function) || (f->index != ANY && f->index != index)) continue;
        if (f->code == HUNG)
            for (;;) pause();
        return f->code;
    }
    return SUCCESS;
}

/* A call about no GPU in particular. */
static int begin(const char *function, State *state) {
    int code;
    if (!users) return UNINITIALIZED;
    if ((code = read_state(state))) return code;
    return fault(state, function, ANY - 1);
}

static int is_handle(const Handle *device) {
    return device >= handles && device < handles + HANDLES && *device->uuid;
}

static const Gpu *listed(const State *state, const char *uuid) {
    for (int i = 0; i < state->gpu_count; i++)
        if (!strcmp(state->gpus[i].uuid, uuid)) return &state->gpus[i];
    return NULL;
}

static int is_lost(const State *state, const Handle *device) {
    const Gpu *gpu = listed(state, device->uuid);
    return !gpu || gpu->lost;
}

/* A call about a GPU. */
static int on_gpu(const char *function, const Handle *device, State *state, const Gpu **gpu) {
    int code;
    if (!users) return UNINITIALIZED;
    if (!is_handle(device)) return INVALID_ARGUMENT;
    if ((code = read_state(state))) return code;
    if ((code = fault(state, function, device->index))) return code;
    if (is_lost(state, device)) return GPU_IS_LOST;
    *gpu = listed(state, device->uuid);
    return SUCCESS;
}

static int handle_of(const Gpu *gpu, const Handle **device) {
    int code = SUCCESS, i;
    pthread_mutex_lock(&handles_lock);
    for (i = 0; i < handle_count && strcmp(handles[i].uuid, gpu->uuid); i++) continue;
    if (i == HANDLES) {
        code = complain("too many different GPUs", gpu->uuid);
    } else {
        if (i == handle_count) {
            copy(handles[i].uuid, sizeof handles[i].uuid, gpu->uuid);
            handle_count++;
        }
        handles[i].index = gpu->index;
        *device = &handles[i];
    }
    pthread_mutex_unlock(&handles_lock);
    return code;
}

static int give(char *to, unsigned size, const char *text) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

/* ── the library ────────────────────────────────────────────────────────────────────────────── */

int nvmlInitWithFlags(unsigned flags) {
    State state;
    int code;
    (void)flags;
    if ((code = read_state(&state)) || (code = fault(&state, "nvmlInit", ANY - 1))) return code;
    users++;
    return SUCCESS;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    State state;
    int code = begin("nvmlShutdown", &state);
    if (code) return code;
    for (int n = users; n > 0;)
        if (atomic_compare_exchange_weak(&users, &n, n - 1)) return SUCCESS;
    return UNINITIALIZED;
}

const char *nvmlErrorString(int code) {
    switch (code) {
        case 0: return "Success";
        case 1: return "Uninitialized";
        case 2: return "Invalid Argument";
        case 3: return "Not Supported";
        case 4: return "Insufficient Permissions";
        case 5: return "Already Initialized";
        case 6: return "Not Found";
        case 7: return "Insufficient Size";
        case 8: return "Insufficient External Power";
        case 9: return "Driver Not Loaded";
        case 10: return "Timeout";
        case 11: return "Interrupt Request Issue";
        case 12: return "NVML Shared Library Not Found";
        case 13: return "Function Not Found";
        case 14: return "Corrupted infoROM";
        case 15: return "GPU is lost";
        case 16: return "GPU requires reset";
        case 17: return "GPU access blocked by the operating system";
        case 18: return "Driver/library version mismatch";
        case 19: return "In use by another client";
        case 20: return "Insufficient Memory";
        case 21: return "No data";
        case 22: return "vGPU ECC is not supported";
        case 23: return "Insufficient resources";
        case 24: return "Frequency not supported";
        case 25: return "API or argument version is not supported";
        case 26: return "Deprecated";
        case 27: return "Not ready";
        case 28: return "GPU not found";
        case 29: return "Invalid state";
        default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    State state;
    int code = begin("nvmlSystemGetDriverVersion", &state);
    return code ? code : give(version, size, state.driver);
}

int nvmlSystemGetNVMLVersion(char *version, unsigned size) {
    State state;
    char text[96];
    int code = begin("nvmlSystemGetNVMLVersion", &state);
    if (code) return code;
    snprintf(text, sizeof text, "13.%s", state.driver);
    return give(version, size, text);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    State state;
    int code = begin("nvmlSystemGetCudaDriverVersion", &state);
    if (!code) *version = CUDA;
    return code;
}

int nvmlSystemGetCudaDriverVersion(int *version) {
    return nvmlSystemGetCudaDriverVersion_v2(version);
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    State state;
    int code = begin("nvmlDeviceGetCount", &state);
    if (!code) *count = (unsigned)state.gpu_count;
    return code;
}

static int found(const char *function, const State *state, const Gpu *gpu, const Handle **device) {
    int code = fault(state, function, gpu->index);
    if (code) return code;
    return gpu->lost ? GPU_IS_LOST : handle_of(gpu, device);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, const Handle **device) {
    State state;
    int code;
    if (!users) return UNINITIALIZED;
    if ((code = read_state(&state))) return code;
    if (index >= (unsigned)state.gpu_count) {
        code = fault(&state, "nvmlDeviceGetHandleByIndex", (int)index);
        return code ? code : INVALID_ARGUMENT;
    }
    return found("nvmlDeviceGetHandleByIndex", &state, &state.gpus[index], device);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, const Handle **device) {
    State state;
    const Gpu *gpu;
    int code;
    if (!users) return UNINITIALIZED;
    if (!uuid) return INVALID_ARGUMENT;
    if ((code = read_state(&state))) return code;
    if (!(gpu = listed(&state, uuid))) {
        code = fault(&state, "nvmlDeviceGetHandleByUUID", ANY - 1);
        return code ? code : NOT_FOUND;
    }
    return found("nvmlDeviceGetHandleByUUID", &state, gpu, device);
}

int nvmlDeviceGetIndex(const Handle *device, unsigned *index) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetIndex", device, &state, &gpu);
    if (!code) *index = (unsigned)(gpu - state.gpus);
    return code;
}

int nvmlDeviceGetUUID(const Handle *device, char *uuid, unsigned size) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetUUID", device, &state, &gpu);
    return code ? code : give(uuid, size, gpu->uuid);
}

int nvmlDeviceGetName(const Handle *device, char *name, unsigned size) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetName", device, &state, &gpu);
    return code ? code : give(name, size, gpu->name);
}

int nvmlDeviceGetPciInfo_v3(const Handle *device, Pci *pci) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetPciInfo", device, &state, &gpu);
    if (code) return code;
    memset(pci, 0, sizeof *pci);
    if (sscanf(gpu->pci, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device) != 3)
        return complain("not a PCI address", gpu->pci);
    pci->device_id = 0x233010DE; /* H100 */
    copy(pci->id, sizeof pci->id, gpu->pci);
    snprintf(pci->legacy, sizeof pci->legacy, "%04X:%02X:%02X.0", pci->domain & 0xFFFF,
             pci->bus & 0xFF, pci->device & 0xFF);
    return SUCCESS;
}

int nvmlDeviceGetMinorNumber(const Handle *device, unsigned *number) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetMinorNumber", device, &state, &gpu);
    if (!code) *number = (unsigned)gpu->index;
    return code;
}

int nvmlDeviceGetMemoryInfo(const Handle *device, Memory *memory) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetMemoryInfo", device, &state, &gpu);
    long used;
    if (code) return code;
    used = gpu->base_mib + held_mib(gpu, NULL, 0, NULL);
    if (used > gpu->total_mib) used = gpu->total_mib;
    memory->total = (u64)gpu->total_mib * MIB;
    memory->used = (u64)used * MIB;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(const Handle *device, MemoryV2 *memory) {
    Memory plain;
    int code;
    if (memory->version != MEMORY_V2) return ARGUMENT_VERSION_MISMATCH;
    if ((code = nvmlDeviceGetMemoryInfo(device, &plain))) return code;
    memory->total = plain.total;
    memory->reserved = 0; /* the base counts as used in both versions */
    memory->free = plain.free;
    memory->used = plain.used;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(const Handle *device, int sensor, unsigned *celsius) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetTemperature", device, &state, &gpu);
    if (code) return code;
    if (sensor != 0) return INVALID_ARGUMENT;
    *celsius = (unsigned)gpu->temp;
    return SUCCESS;
}

int nvmlDeviceGetTemperatureV(const Handle *device, Temperature *temperature) {
    State state;
    const Gpu *gpu;
    unsigned celsius;
    int code = on_gpu("nvmlDeviceGetTemperatureV", device, &state, &gpu);
    if (code) return code;
    if (temperature->version != TEMPERATURE_V1) return ARGUMENT_VERSION_MISMATCH;
    code = nvmlDeviceGetTemperature(device, temperature->sensor, &celsius);
    if (!code) temperature->temperature = (int)celsius;
    return code;
}

int nvmlDeviceGetTotalEccErrors(const Handle *device, int kind, int counter, u64 *errors) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetTotalEccErrors", device, &state, &gpu);
    if (code) return code;
    if (kind < 0 || kind > 1 || counter < 0 || counter > 1) return INVALID_ARGUMENT;
    if (gpu->ecc < 0) return NOT_SUPPORTED;
    *errors = kind == 1 ? (u64)gpu->ecc : 0; /* 1: uncorrected */
    return SUCCESS;
}

int nvmlDeviceGetEccMode(const Handle *device, int *current, int *pending) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetEccMode", device, &state, &gpu);
    if (code) return code;
    if (gpu->ecc < 0) return NOT_SUPPORTED;
    *current = *pending = 1;
    return SUCCESS;
}

int nvmlDeviceGetRemappedRows(const Handle *device, unsigned *corrected, unsigned *uncorrected,
                              unsigned *pending, unsigned *failed) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetRemappedRows", device, &state, &gpu);
    if (code) return code;
    if (gpu->remap_pending < 0 || gpu->remap_failed < 0) return NOT_SUPPORTED;
    *corrected = *uncorrected = 0;
    *pending = (unsigned)gpu->remap_pending;
    *failed = (unsigned)gpu->remap_failed;
    return SUCCESS;
}

int nvmlDeviceGetRetiredPagesPendingStatus(const Handle *device, int *pending) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetRetiredPagesPendingStatus", device, &state, &gpu);
    if (code) return code;
    if (gpu->retired_pending < 0) return NOT_SUPPORTED;
    *pending = (int)gpu->retired_pending;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(const Handle *device, unsigned *current, unsigned *pending) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetMigMode", device, &state, &gpu);
    if (code) return code;
    if (gpu->mig < 0) return NOT_SUPPORTED;
    *current = *pending = (unsigned)gpu->mig;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(const Handle *device, Utilization *rates) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetUtilizationRates", device, &state, &gpu);
    if (!code) *rates = (Utilization){(unsigned)gpu->util, (unsigned)gpu->util};
    return code;
}

int nvmlDeviceGetComputeRunningProcesses_v3(const Handle *device, unsigned *count, Process *held) {
    State state;
    const Gpu *gpu;
    unsigned size = *count;
    int code = on_gpu("nvmlDeviceGetComputeRunningProcesses", device, &state, &gpu);
    if (code) return code;
    *count = 0;
    if (!state.pids_hidden) held_mib(gpu, held, size, count);
    return *count > size ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(const Handle *device, unsigned *count, Process *held) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, held);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(const Handle *device, unsigned *count, Process *held) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetGraphicsRunningProcesses", device, &state, &gpu);
    (void)held;
    if (!code) *count = 0;
    return code;
}

int nvmlDeviceGetGraphicsRunningProcesses_v2(const Handle *device, unsigned *count, Process *held) {
    return nvmlDeviceGetGraphicsRunningProcesses_v3(device, count, held);
}

/* ── events ─────────────────────────────────────────────────────────────────────────────────── */

static off_t events_size(void) {
    char path[4096];
    struct stat file;
    if (path_of(path, sizeof path, "events") || stat(path, &file)) return 0;
    return file.st_size;
}

int nvmlDeviceGetSupportedEventTypes(const Handle *device, u64 *types) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceGetSupportedEventTypes", device, &state, &gpu);
    if (!code) *types = EVENTS;
    return code;
}

int nvmlEventSetCreate(EventSet **set) {
    State state;
    int code = begin("nvmlEventSetCreate", &state);
    if (code) return code;
    if (!(*set = calloc(1, sizeof **set))) return OUT_OF_MEMORY;
    pthread_mutex_init(&(*set)->lock, NULL);
    (*set)->read_to = events_size();
    return SUCCESS;
}

int nvmlDeviceRegisterEvents(const Handle *device, u64 types, EventSet *set) {
    State state;
    const Gpu *gpu;
    int code = on_gpu("nvmlDeviceRegisterEvents", device, &state, &gpu), i;
    if (code) return code;
    if (!set || set->freed) return INVALID_ARGUMENT;
    if (types & ~(u64)EVENTS) return NOT_SUPPORTED;
    pthread_mutex_lock(&set->lock);
    for (i = 0; i < set->count && set->watched[i].handle != device; i++) continue;
    if (i == WATCHED) {
        code = complain("too many GPUs in an event set", gpu->uuid);
    } else if (i < set->count) {
        set->watched[i].types |= types;
    } else {
        set->watched[i].handle = device;
        set->watched[i].types = types;
        set->watched[i].from = events_size();
        set->count++;
    }
    pthread_mutex_unlock(&set->lock);
    return code;
}

/* The next event for a registered GPU: whether there is one. Half-written lines are left. */
static int next_event(EventSet *set, Event *event) {
    char path[4096], text[8192], uuid[UUID_BYTES], *line, *end;
    unsigned long number;
    int found_one = 0;
    if (path_of(path, sizeof path, "events")) return 0;
    pthread_mutex_lock(&set->lock);
    while (!found_one && read_file(path, text, sizeof text, set->read_to) > 0) {
        for (line = text; !found_one && (end = strchr(line, '\n')); line = end + 1) {
            off_t at = set->read_to;
            *end = '\0';
            set->read_to += end + 1 - line;
            if (sscanf(line, "%95s %lu", uuid, &number) != 2) {
                complain("what does this event say?", line);
                continue;
            }
            for (int i = 0; i < set->count; i++) {
                const Handle *handle = set->watched[i].handle;
                if (strcmp(handle->uuid, uuid) || at < set->watched[i].from) continue;
                if (!(set->watched[i].types & XID)) continue;
                *event = (Event){handle, XID, number, ~0U, ~0U};
                found_one = 1;
            }
        }
        if (line == text) break;
    }
    pthread_mutex_unlock(&set->lock);
    return found_one;
}

static int has_lost_gpu(EventSet *set, const State *state) {
    int lost = 0;
    pthread_mutex_lock(&set->lock);
    for (int i = 0; i < set->count; i++) lost |= is_lost(state, set->watched[i].handle);
    pthread_mutex_unlock(&set->lock);
    return lost;
}

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int nvmlEventSetWait_v2(EventSet *set, Event *event, unsigned timeout_ms) {
    long long left, ends = now_ms() + timeout_ms;
    char path[4096], changes[4096];
    State state;
    struct pollfd changed = {.events = POLLIN};
    int code = begin("nvmlEventSetWait", &state);
    if (code) return code;
    if (!set || set->freed) return INVALID_ARGUMENT;
    changed.fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (changed.fd < 0) {
        complain("inotify", strerror(errno));
        return OPERATING_SYSTEM;
    }
    if (!path_of(path, sizeof path, "."))
        inotify_add_watch(changed.fd, path, IN_MODIFY | IN_CREATE | IN_MOVED_TO | IN_DELETE);
    for (;;) {
        code = begin("nvmlEventSetWait", &state);
        if (code) break;
        /* After the state was read: an Xid comes before the loss that it tells of. */
        if (next_event(set, event)) break;
        left = ends - now_ms();
        code = has_lost_gpu(set, &state) ? GPU_IS_LOST : TIMEOUT;
        if (code == GPU_IS_LOST || left <= 0) break;
        poll(&changed, 1, left > 60000 ? 60000 : (int)left);
        while (read(changed.fd, changes, sizeof changes) > 0) continue;
    }
    close(changed.fd);
    return code;
}

int nvmlEventSetFree(EventSet *set) {
    State state;
    int code = begin("nvmlEventSetFree", &state);
    if (code) return code;
    if (!set || set->freed) return INVALID_ARGUMENT;
    set->freed = 1; /* its memory stays: another thread may be waiting on it */
    return SUCCESS;
}
