/* An imitation of NVIDIA's libcuda.so.1 for tests without a GPU: host memory, the driver's rules, the driver's codes.
 *
 * Device memory is a file on tmpfs per allocation, held by one open file description that handles, descriptors sent to
 * other processes and mappings all share. It carries an flock, which the kernel drops with the last of them: what is
 * locked is in use, whoever holds it and however he died. Device addresses are plain addresses of the process, without
 * access until cuMemSetAccess. Where the driver promises nothing the imitation is nasty: new memory is garbage, work on
 * streams runs late and in any order between streams, work that meets unmapped or unregistered memory breaks the
 * context (CUDA_ERROR_ILLEGAL_ADDRESS from then on).
 *
 * Environment:
 *   FAKE_CUDA_STATE     folder shared by all processes of one machine (required; of the tests' own)
 *   FAKE_CUDA_DEVICES   COUNTxSIZE with SIZE in bytes, MiB or GiB; default 1x256MiB
 *   FAKE_CUDA_DELAY_US  each copy and fill on a stream waits 0.5 to 1.5 times this first; default 0
 *   FAKE_CUDA_BUSY_MS   memory that nobody holds any more counts as used so long from when that is noticed; default 0
 *   FAKE_CUDA_CONTEXT   SIZE of device memory that a primary context takes; default 0
 *   FAKE_CUDA_FILL      byte that new device memory is filled with, or "none"; default 203
 *   FAKE_CUDA_FAULTS    file of lines "FUNCTION N ERROR": the N-th call of FUNCTION (as in cuda.h, without _v2; * is
 *                       every call) from when a process first sees this version of the file fails with the number ERROR
 *                       and does nothing else; may be written at any time
 *   FAKE_CUDA_LOG       file that gets one line per call, "PID FUNCTION(ARGUMENTS) = RESULT", and per piece of work as
 *                       it completes on its stream, "PID done FUNCTION(ARGUMENTS)"
 *   CUDA_VISIBLE_DEVICES  as with the driver: numbers or GPU-UUIDs, separated by commas
 *
 * Streams of one context only; no kernels, graphs, pools, managed memory, peer or interprocess calls.
 * With -DWITH_CUDA_H the compiler checks it against NVIDIA's declarations instead of those below.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifdef WITH_CUDA_H
#include <cuda.h>
#else
typedef int CUdevice;
typedef unsigned long long CUdeviceptr, CUmemGenericAllocationHandle, cuuint64_t;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef void (*CUhostFn)(void *);
typedef struct { char bytes[16]; } CUuuid;
typedef enum {
    CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_OUT_OF_MEMORY = 2, CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_DEINITIALIZED = 4, CUDA_ERROR_NO_DEVICE = 100, CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_CONTEXT = 201, CUDA_ERROR_MAP_FAILED = 205, CUDA_ERROR_ECC_UNCORRECTABLE = 214,
    CUDA_ERROR_OPERATING_SYSTEM = 304, CUDA_ERROR_INVALID_HANDLE = 400, CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600, CUDA_ERROR_ILLEGAL_ADDRESS = 700, CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
    CUDA_ERROR_LAUNCH_FAILED = 719, CUDA_ERROR_NOT_PERMITTED = 800, CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_SYSTEM_NOT_READY = 802, CUDA_ERROR_UNKNOWN = 999,
} CUresult;
typedef enum {
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16, CU_DEVICE_ATTRIBUTE_INTEGRATED = 18,
    CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY = 19, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID = 33,
    CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID = 34, CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT = 40,
    CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = 41, CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID = 50,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED = 99, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
    CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID = 134,
} CUdevice_attribute;
typedef enum { CU_MEM_HANDLE_TYPE_NONE = 0, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1 } CUmemAllocationHandleType;
typedef enum {
    CU_MEM_ACCESS_FLAGS_PROT_NONE = 0, CU_MEM_ACCESS_FLAGS_PROT_READ = 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3,
} CUmemAccess_flags;
typedef enum { CU_MEM_LOCATION_TYPE_DEVICE = 1 } CUmemLocationType;
typedef enum { CU_MEM_ALLOCATION_TYPE_PINNED = 1 } CUmemAllocationType;
typedef enum { CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED = 1 }
    CUmemAllocationGranularity_flags;
typedef struct { CUmemLocationType type; int id; } CUmemLocation;
typedef struct {
    CUmemAllocationType type;
    CUmemAllocationHandleType requestedHandleTypes;
    CUmemLocation location;
    void *win32HandleMetaData;
    struct {
        unsigned char compressionType, gpuDirectRDMACapable;
        unsigned short usage;
        unsigned char reserved[4];
    } allocFlags;
} CUmemAllocationProp;
typedef struct { CUmemLocation location; CUmemAccess_flags flags; } CUmemAccessDesc;
typedef enum { CU_GET_PROC_ADDRESS_SUCCESS = 0, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND = 1 } CUdriverProcAddressQueryResult;
enum { CU_STREAM_NON_BLOCKING = 1, CU_EVENT_DISABLE_TIMING = 2, CU_MEMHOSTREGISTER_READ_ONLY = 8 };
#endif

enum { DRIVER_VERSION = 13000, MAX_DEVICES = 16, POPULATE_READ = 22, POPULATE_WRITE = 23 };
#define GRANULARITY ((size_t)2 << 20)

struct allocation { int fd, device, handles, mappings; size_t size; unsigned exportable; };
struct reservation { uintptr_t start; size_t size; bool plain; };  /* plain: of cuMemAlloc */
struct mapping { uintptr_t start; size_t size; struct allocation *of; CUmemAccess_flags access[MAX_DEVICES]; };
struct registration { uintptr_t start; size_t size; bool allocated; };
struct CUctx_st { int device, retained; CUresult broken; struct CUstream_st *null; struct allocation *overhead; };
struct CUevent_st { unsigned flags; unsigned long recorded, done; struct timespec at; bool destroyed; struct CUevent_st *next; };
enum kind { COPY, FILL, RECORD, WAIT, HOST_FUNCTION };
struct work {
    enum kind kind;
    const char *name;
    uintptr_t to, from;
    bool to_host, from_host, needs_registration;
    size_t size, unit;
    unsigned value;
    struct CUevent_st *event;
    unsigned long mark, number;
    CUhostFn function;
    void *data;
    struct work *next;
};
struct CUstream_st {
    CUcontext context;
    unsigned flags;
    int priority;
    bool started, destroyed;
    struct work *first, *last;
    struct CUstream_st *next;
};
struct call { const char *name; char arguments[400]; bool locked; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  /* all below but what `memory` guards */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_rwlock_t memory = PTHREAD_RWLOCK_INITIALIZER;  /* written: tables of mappings and registrations change */
static pid_t owner;  /* who called cuInit; a forked child is another */
static int devices, visible[MAX_DEVICES], visible_count;
static size_t device_size, context_size;
static struct CUctx_st contexts[MAX_DEVICES];
static _Thread_local CUcontext stack[16];
static _Thread_local int depth;
static struct allocation **allocations;
static size_t allocation_count;
static struct reservation *reservations;
static size_t reservation_count;
static struct mapping **mappings;  /* by address */
static size_t mapping_count;
static struct registration *registrations;
static size_t registration_count;
static struct CUstream_st *streams;
static struct CUevent_st *events;
static unsigned long work_number;

/* ---- errors, log, faults ---- */

static const struct { CUresult code; const char *name, *text; } errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_DEINITIALIZED, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_MAP_FAILED, "CUDA_ERROR_MAP_FAILED", "mapping of buffer object failed"},
    {CUDA_ERROR_ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {CUDA_ERROR_OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_SYSTEM_NOT_READY, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static const char *error_name(CUresult code) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return errors[i].name;
    return NULL;
}

static void record(const char *format, ...) {
    const char *path = getenv("FAKE_CUDA_LOG");
    if (!path) return;
    char line[600];
    int length = snprintf(line, sizeof line, "%d ", getpid());
    va_list arguments;
    va_start(arguments, format);
    length += vsnprintf(line + length, sizeof line - length - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 2) length = sizeof line - 2;
    line[length++] = '\n';
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, line, length) != length) {  /* one write: lines of several processes stay whole */
        perror("FAKE_CUDA_LOG");
        abort();
    }
    close(fd);
}

/* The error that FAKE_CUDA_FAULTS plans for this call, or CUDA_SUCCESS. */
static CUresult planned_fault(const char *name) {
    static struct { char name[64], which[16]; int code; long calls; } plan[32];
    static int planned;
    static struct stat seen;
    const char *path = getenv("FAKE_CUDA_FAULTS");
    struct stat now;
    if (!path || stat(path, &now)) return CUDA_SUCCESS;
    if (now.st_ino != seen.st_ino || now.st_size != seen.st_size || now.st_mtim.tv_sec != seen.st_mtim.tv_sec ||
        now.st_mtim.tv_nsec != seen.st_mtim.tv_nsec) {
        seen = now;
        planned = 0;
        FILE *file = fopen(path, "re");
        while (file && planned < 32 &&
               fscanf(file, "%63s %15s %d", plan[planned].name, plan[planned].which, &plan[planned].code) == 3)
            plan[planned++].calls = 0;
        if (file) fclose(file);
    }
    CUresult code = CUDA_SUCCESS;
    for (int i = 0; i < planned; i++) {
        if (strcmp(plan[i].name, name)) continue;
        plan[i].calls++;
        if (!strcmp(plan[i].which, "*") || atol(plan[i].which) == plan[i].calls) code = plan[i].code;
    }
    return code;
}

enum need { NOTHING, DRIVER, CONTEXT };

static CUresult enter(struct call *call, enum need need) {
    size_t length = strlen(call->name);  /* named as in cuda.h and cuda.bindings */
    static _Thread_local char name[64];
    snprintf(name, sizeof name, "%s", call->name);
    if (length > 3 && name[length - 3] == '_' && name[length - 2] == 'v') name[length - 3] = 0;
    call->name = name;
    if (owner && owner != getpid()) return CUDA_ERROR_NOT_INITIALIZED;  /* the lock may be held by nobody here */
    pthread_mutex_lock(&lock);
    call->locked = true;
    CUresult fault = planned_fault(call->name);
    if (fault != CUDA_SUCCESS) return fault;
    if (need >= DRIVER && !owner) return CUDA_ERROR_NOT_INITIALIZED;
    if (need < CONTEXT) return CUDA_SUCCESS;
    if (!depth || !stack[depth - 1]) return CUDA_ERROR_INVALID_CONTEXT;
    if (!stack[depth - 1]->retained) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    return stack[depth - 1]->broken;
}

static CUresult leave(struct call *call, CUresult code) {
    const char *name = error_name(code);
    record("%s(%s) = %s", call->name, call->arguments, name ? name : "?");
    if (call->locked) pthread_mutex_unlock(&lock);
    return code;
}

static void note(struct call *call, const char *format, ...) {
    size_t length = strlen(call->arguments);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(call->arguments + length, sizeof call->arguments - length, format, arguments);
    va_end(arguments);
}

#define CALL(need, ...)                                                            \
    struct call call = {.name = __func__};                                         \
    snprintf(call.arguments, sizeof call.arguments, __VA_ARGS__);                  \
    CUresult entered = enter(&call, need);                                         \
    if (entered != CUDA_SUCCESS) return leave(&call, entered)
#define END(code) return leave(&call, code)
#define REQUIRE(condition, code) do { if (!(condition)) END(code); } while (0)

static CUcontext current(void) { return stack[depth - 1]; }

static void *grown(void *array, size_t count, size_t size) {
    if (count & (count - 1)) return array;  /* grows at powers of two */
    array = realloc(array, (count ? 2 * count : 1) * size);
    if (!array) abort();
    return array;
}

/* ---- what all processes hold ---- */

static int state_path(char *path, size_t size, const char *name) {
    return snprintf(path, size, "%s/%s", getenv("FAKE_CUDA_STATE"), name);
}

/* Opens and locks the file of charges: bytes per device, at least what is in use. -1 with errno. */
static int lock_state(void) {
    char path[500];
    state_path(path, sizeof path, "charges");
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0) flock(fd, LOCK_EX);
    return fd;
}

/* Whether memory that nobody holds is to count still. The first look marks the file, which sets its ctime. */
static bool busy(int fd) {
    const char *setting = getenv("FAKE_CUDA_BUSY_MS");
    long busy_ms = setting ? atol(setting) : 0;
    struct stat status;
    struct timespec now;
    if (!busy_ms || fstat(fd, &status)) return false;
    if (!(status.st_mode & S_IXUSR)) return !fchmod(fd, status.st_mode | S_IXUSR);
    clock_gettime(CLOCK_REALTIME, &now);
    return (now.tv_sec - status.st_ctim.tv_sec) * 1000 + (now.tv_nsec - status.st_ctim.tv_nsec) / 1000000 < busy_ms;
}

/* Bytes of a device that anybody holds or that are busy; other files that nobody holds are removed. The state is locked. */
static size_t in_use(int state, int device) {
    char prefix[16];
    size_t used = 0, length = snprintf(prefix, sizeof prefix, "%d-", device);
    DIR *folder = opendir(getenv("FAKE_CUDA_STATE"));
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        if (strncmp(entry->d_name, prefix, length)) continue;
        int fd = openat(dirfd(folder), entry->d_name, O_RDWR | O_CLOEXEC);
        struct stat status;
        if (fd < 0) continue;
        if (!flock(fd, LOCK_EX | LOCK_NB) && !busy(fd)) unlinkat(dirfd(folder), entry->d_name, 0);
        else if (!fstat(fd, &status)) used += status.st_size;
        close(fd);
    }
    if (folder) closedir(folder);
    uint64_t charge = used;
    if (pwrite(state, &charge, sizeof charge, device * sizeof charge) != sizeof charge) abort();
    return used;
}

static CUresult create(int device, size_t size, unsigned exportable, struct allocation **made) {
    int state = lock_state();
    if (state < 0) return CUDA_ERROR_OPERATING_SYSTEM;
    uint64_t charge = 0;
    if (pread(state, &charge, sizeof charge, device * sizeof charge) < 0) abort();
    if (charge + size > device_size && (charge = in_use(state, device)) + size > device_size) {
        close(state);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    char path[500], name[64];
    state_path(path, sizeof path, "new");
    unlink(path);  /* of a process that was killed right here */
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    struct stat status;
    const char *fill = getenv("FAKE_CUDA_FILL");
    bool sparse = fill && !strcmp(fill, "none");
    if (fd < 0 || flock(fd, LOCK_EX) || fstat(fd, &status) ||
        (sparse ? ftruncate(fd, size) : posix_fallocate(fd, 0, size))) {
        if (fd >= 0) unlink(path), close(fd);
        close(state);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    char named[500];
    snprintf(name, sizeof name, "%d-%lu%s", device, (unsigned long)status.st_ino, exportable ? "" : "-private");
    state_path(named, sizeof named, name);
    if (rename(path, named)) abort();
    charge += size;
    if (pwrite(state, &charge, sizeof charge, device * sizeof charge) != sizeof charge) abort();
    close(state);

    if (!sparse) {
        void *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (bytes == MAP_FAILED) return close(fd), CUDA_ERROR_OUT_OF_MEMORY;
        memset(bytes, fill ? atoi(fill) : 203, size);
        munmap(bytes, size);
    }
    *made = calloc(1, sizeof **made);
    **made = (struct allocation){.fd = fd, .device = device, .size = size, .exportable = exportable};
    return CUDA_SUCCESS;
}

/* Forget an allocation that has neither handles nor mappings; the memory goes with its last holder anywhere. */
static void drop(struct allocation *allocation) {
    if (allocation->handles || allocation->mappings) return;
    close(allocation->fd);
    for (size_t i = 0; i < allocation_count; i++)
        if (allocations[i] == allocation) allocations[i] = NULL;
    free(allocation);
}

/* ---- tables ---- */

static unsigned long long handle_of(struct allocation *allocation) {
    allocations = grown(allocations, allocation_count, sizeof *allocations);
    allocations[allocation_count++] = allocation;
    return 0xfa0000 + allocation_count;  /* never used twice */
}

static struct allocation *allocation_of(unsigned long long handle) {
    size_t index = handle - 0xfa0001;
    struct allocation *found = index < allocation_count ? allocations[index] : NULL;
    return found && found->handles ? found : NULL;
}

/* Index of the first mapping that ends after `address`. */
static size_t mapping_after(uintptr_t address) {
    size_t low = 0, high = mapping_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (mappings[middle]->start + mappings[middle]->size > address) high = middle;
        else low = middle + 1;
    }
    return low;
}

/* How many mappings make up the range from mappings[*first] on, each of them whole if `whole`; 0 if it has a hole. */
static size_t mappings_in(uintptr_t start, size_t size, bool whole, size_t *first) {
    size_t index = *first = mapping_after(start), end = start + size;
    if (size == 0 || end < start) return 0;
    if (whole && (index == mapping_count || mappings[index]->start != start)) return 0;
    for (uintptr_t at = start; at < end; at = mappings[index]->start + mappings[index]->size, index++) {
        if (index == mapping_count || mappings[index]->start > at) return 0;
        if (whole && mappings[index]->start + mappings[index]->size > end) return 0;
    }
    return index - *first;
}

static bool accessible(uintptr_t start, size_t size, int device, CUmemAccess_flags access) {
    size_t first, count = mappings_in(start, size, false, &first);
    for (size_t i = first; i < first + count; i++)
        if ((mappings[i]->access[device] & access) != access) return false;
    return count > 0;
}

/* 1: inside one registration, 0: outside all, -1: across the border of one. */
static int registered(uintptr_t start, size_t size) {
    for (size_t i = 0; i < registration_count; i++) {
        struct registration *one = &registrations[i];
        if (start >= one->start && start + size <= one->start + one->size) return 1;
        if (start < one->start + one->size && one->start < start + size) return -1;
    }
    return 0;
}

/* Behind reserved addresses there is nothing; true if the kernel agreed. */
static bool vacate(uintptr_t start, size_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap((void *)start, size, PROT_NONE, flags, -1, 0) != MAP_FAILED;
}

static uintptr_t reserve(size_t size, size_t alignment, bool plain) {
    uint8_t *found = mmap(NULL, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return 0;
    uintptr_t start = ((uintptr_t)found + alignment - 1) / alignment * alignment;
    size_t before = start - (uintptr_t)found;
    if (before) munmap(found, before);
    if (alignment - before) munmap((void *)(start + size), alignment - before);
    reservations = grown(reservations, reservation_count, sizeof *reservations);
    reservations[reservation_count++] = (struct reservation){start, size, plain};
    return start;
}

static struct reservation *reservation_around(uintptr_t start, size_t size) {
    for (size_t i = 0; i < reservation_count; i++) {
        struct reservation *one = &reservations[i];
        if (start >= one->start && start < one->start + one->size && size <= one->start + one->size - start) return one;
    }
    return NULL;
}

static bool map(struct allocation *allocation, uintptr_t start, size_t size) {
    if (mmap((void *)start, size, PROT_NONE, MAP_SHARED | MAP_FIXED, allocation->fd, 0) == MAP_FAILED) return false;
    struct mapping *mapping = calloc(1, sizeof *mapping);
    *mapping = (struct mapping){.start = start, .size = size, .of = allocation};
    pthread_rwlock_wrlock(&memory);
    mappings = grown(mappings, mapping_count, sizeof *mappings);
    size_t index = mapping_after(start);
    memmove(mappings + index + 1, mappings + index, (mapping_count++ - index) * sizeof *mappings);
    mappings[index] = mapping;
    pthread_rwlock_unlock(&memory);
    allocation->mappings++;
    return true;
}

static bool unmap(size_t first, size_t count) {
    bool done = true;
    pthread_rwlock_wrlock(&memory);  /* waits for work that is on these bytes now */
    for (size_t i = first; i < first + count; i++) {
        done &= vacate(mappings[i]->start, mappings[i]->size);
        mappings[i]->of->mappings--;
        drop(mappings[i]->of);
        free(mappings[i]);
    }
    mapping_count -= count;
    memmove(mappings + first, mappings + first + count, (mapping_count - first) * sizeof *mappings);
    pthread_rwlock_unlock(&memory);
    return done;
}

static bool set_access(struct mapping *mapping, int device, CUmemAccess_flags access) {
    mapping->access[device] = access;
    CUmemAccess_flags any = 0;
    for (int i = 0; i < MAX_DEVICES; i++) any |= mapping->access[i];
    int protection = any == 0 ? PROT_NONE : any == 1 ? PROT_READ : PROT_READ | PROT_WRITE;
    return !mprotect((void *)mapping->start, mapping->size, protection);
}

/* ---- streams ---- */

static bool has_work_before(struct CUstream_st *stream, unsigned long number) {
    return stream && stream->first && stream->first->number < number;
}

/* Work on the null stream and on blocking streams waits for one another; a wait waits for its event. */
static bool may_run(struct CUstream_st *stream, struct work *work) {
    if (work->kind == WAIT && work->event->done < work->mark) return false;
    if (stream->flags & CU_STREAM_NON_BLOCKING) return true;
    if (stream != stream->context->null) return !has_work_before(stream->context->null, work->number);
    for (struct CUstream_st *other = streams; other; other = other->next)
        if (other != stream && other->context == stream->context && !(other->flags & CU_STREAM_NON_BLOCKING) &&
            has_work_before(other, work->number))
            return false;
    return true;
}

static bool reachable(struct work *work, uintptr_t start, bool host, bool write, int device) {
    if (host) return !work->needs_registration || registered(start, work->size) == 1;
    CUmemAccess_flags access = write ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ;
    return accessible(start, work->size, device, access);
}

static CUresult run(struct work *work, int device) {
    if (work->kind == HOST_FUNCTION) work->function(work->data);
    if (work->kind > FILL) return CUDA_SUCCESS;
    pthread_rwlock_rdlock(&memory);
    CUresult code = CUDA_ERROR_ILLEGAL_ADDRESS;
    if (reachable(work, work->to, work->to_host, true, device) &&
        (work->kind == FILL || reachable(work, work->from, work->from_host, false, device))) {
        code = CUDA_SUCCESS;
        if (work->kind == COPY) memmove((void *)work->to, (void *)work->from, work->size);
        else if (work->unit == 1) memset((void *)work->to, (int)work->value, work->size);
        else for (size_t i = 0; i < work->size / 4; i++) ((uint32_t *)work->to)[i] = work->value;
    }
    pthread_rwlock_unlock(&memory);
    return code;
}

static void remove_stream(struct CUstream_st *stream) {
    struct CUstream_st **link = &streams;
    while (*link != stream) link = &(*link)->next;
    *link = stream->next;
    free(stream);
}

static void *work_off(void *argument) {
    struct CUstream_st *stream = argument;
    unsigned seed = (unsigned)(uintptr_t)stream ^ (unsigned)getpid() ^ (unsigned)time(NULL);
    const char *setting = getenv("FAKE_CUDA_DELAY_US");
    unsigned delay = setting ? (unsigned)atoi(setting) : 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        struct work *work = stream->first;
        if (!work && stream->destroyed) break;
        if (!work || !may_run(stream, work)) {
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        CUresult code = stream->context->broken;
        pthread_mutex_unlock(&lock);
        if (delay && work->kind <= FILL) usleep(delay / 2 + (unsigned)rand_r(&seed) % (delay + 1));
        if (code == CUDA_SUCCESS) code = run(work, stream->context->device);
        pthread_mutex_lock(&lock);
        if (work->kind == RECORD) {
            work->event->done = work->mark;
            clock_gettime(CLOCK_MONOTONIC, &work->event->at);
        }
        if (code != CUDA_SUCCESS) stream->context->broken = code;
        record("done %s(dst=0x%lx src=0x%lx bytes=%zu stream=%p event=%p)%s", work->name, (unsigned long)work->to,
               (unsigned long)work->from, work->size, (void *)stream, (void *)work->event, code ? " = failed" : "");
        stream->first = work->next;
        free(work);
        pthread_cond_broadcast(&changed);
    }
    remove_stream(stream);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static struct CUstream_st *new_stream(CUcontext context, unsigned flags, int priority) {
    struct CUstream_st *stream = calloc(1, sizeof *stream);
    *stream = (struct CUstream_st){.context = context, .flags = flags, .priority = priority, .next = streams};
    return streams = stream;
}

/* The stream that a handle names: 0 and CU_STREAM_LEGACY are the null stream; NULL if the handle is none. */
static struct CUstream_st *stream_of(CUstream handle) {
    if ((uintptr_t)handle <= 1) return current()->null;
    for (struct CUstream_st *one = streams; one; one = one->next)
        if (one == handle && !one->destroyed) return one;
    return NULL;
}

/* Queue a copy of `prototype`; the caller keeps no reference. Returns the number of the work. */
static unsigned long queue(struct CUstream_st *stream, struct work prototype) {
    struct work *work = malloc(sizeof *work);
    *work = prototype;
    work->number = ++work_number;
    if (stream->first) stream->last->next = work;
    else stream->first = work;
    stream->last = work;
    if (!stream->started) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work_off, stream)) abort();
        pthread_detach(thread);
        stream->started = true;
    }
    pthread_cond_broadcast(&changed);
    return work->number;
}

static void wait_for(struct CUstream_st *stream, unsigned long number) {
    while (has_work_before(stream, number + 1)) pthread_cond_wait(&changed, &lock);
}

static void wait_for_all(CUcontext context) {
    for (struct CUstream_st *one = streams; one;) {
        if (one->context == context && one->first) {
            pthread_cond_wait(&changed, &lock);
            one = streams;  /* it may be gone */
        } else {
            one = one->next;
        }
    }
}

static struct CUevent_st *event_of(CUevent handle) {
    for (struct CUevent_st *one = events; one; one = one->next)
        if (one == handle && !one->destroyed) return one;
    return NULL;
}

/* ---- the driver and its devices ---- */

static size_t parse_size(const char *text) {
    char *end;
    size_t size = strtoull(text, &end, 10);
    if (!strcmp(end, "MiB")) size <<= 20;
    else if (!strcmp(end, "GiB")) size <<= 30;
    else if (*end) return 0;
    return size;
}

static void uuid_of(int device, char uuid[17]) {
    memcpy(uuid, "fake-cuda-gpu-00", 17);
    uuid[14] += device / 10;
    uuid[15] += device % 10;
}

static void find_visible(void) {
    char *list = getenv("CUDA_VISIBLE_DEVICES");
    visible_count = 0;
    for (int i = 0; i < devices && !list; i++) visible[visible_count++] = i;
    if (!list) return;
    list = strdup(list);
    for (char *rest = list, *one; (one = strsep(&rest, ",")) && visible_count < devices;) {
        int chosen = -1;
        for (int i = 0; i < devices; i++) {
            char number[12], uuid[17], text[48] = "GPU-";
            snprintf(number, sizeof number, "%d", i);
            uuid_of(i, uuid);
            for (int b = 0, at = 4; b < 16; b++) {
                at += snprintf(text + at, sizeof text - at, "%s%02x", b == 4 || b == 6 || b == 8 || b == 10 ? "-" : "",
                               (unsigned char)uuid[b]);
            }
            if (!strcmp(one, number) || !strcmp(one, text)) chosen = i;
        }
        if (chosen < 0) break;  /* the driver, too, stops at the first that it does not know */
        visible[visible_count++] = chosen;
    }
    free(list);
}

CUresult cuInit(unsigned flags) {
    CALL(NOTHING, "flags=%u", flags);
    REQUIRE(flags == 0, CUDA_ERROR_INVALID_VALUE);
    if (owner) END(CUDA_SUCCESS);
    const char *setting = getenv("FAKE_CUDA_DEVICES"), *folder = getenv("FAKE_CUDA_STATE");
    const char *context = getenv("FAKE_CUDA_CONTEXT");
    char size[32] = "256MiB";
    devices = 1;
    if ((setting && sscanf(setting, "%dx%31s", &devices, size) != 2) || devices > MAX_DEVICES ||
        (device_size = parse_size(size)) == 0 || !folder || access(folder, W_OK)) {
        fprintf(stderr, "libcuda imitation: FAKE_CUDA_STATE must be a folder and FAKE_CUDA_DEVICES like 2x512MiB\n");
        END(CUDA_ERROR_SYSTEM_NOT_READY);
    }
    context_size = context ? parse_size(context) : 0;
    find_visible();
    REQUIRE(visible_count > 0, CUDA_ERROR_NO_DEVICE);
    owner = getpid();
    END(CUDA_SUCCESS);
}

CUresult cuDriverGetVersion(int *version) {
    CALL(NOTHING, " ");
    REQUIRE(version, CUDA_ERROR_INVALID_VALUE);
    *version = DRIVER_VERSION;
    END(CUDA_SUCCESS);
}

CUresult cuGetErrorName(CUresult error, const char **text) {
    if (!text || !(*text = error_name(error))) return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    for (size_t i = 0; text && i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == error) {
            *text = errors[i].text;
            return CUDA_SUCCESS;
        }
    if (text) *text = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

/* Functions of which a later version has other arguments. */
static const struct { const char *name; int since; const char *symbol; } versions[] = {
    {"cuCtxGetDevice", 13000, "cuCtxGetDevice_v2"}, {"cuCtxGetDevice", 0, "cuCtxGetDevice"},
    {"cuCtxSynchronize", 13000, "cuCtxSynchronize_v2"}, {"cuCtxSynchronize", 0, "cuCtxSynchronize"},
    {"cuLaunchHostFunc", 13020, ""},
};

CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
    (void)flags;
    if (!name || !function) return CUDA_ERROR_INVALID_VALUE;
    Dl_info self;
    char symbol[128];
    dladdr((void *)cuInit, &self);
    void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    snprintf(symbol, sizeof symbol, "%s_v2", name);
    *function = NULL;
    for (size_t i = 0; i < sizeof versions / sizeof *versions; i++)
        if (!strcmp(versions[i].name, name) && version >= versions[i].since) {
            snprintf(symbol, sizeof symbol, "%s", versions[i].symbol);
            *function = dlsym(library, symbol);
            goto searched;
        }
    if (!(*function = dlsym(library, symbol))) *function = dlsym(library, name);
searched:
    dlclose(library);
    if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

static bool is_device(int device) { return device >= 0 && device < visible_count; }

CUresult cuDeviceGetCount(int *count) {
    CALL(DRIVER, " ");
    REQUIRE(count, CUDA_ERROR_INVALID_VALUE);
    *count = visible_count;
    END(CUDA_SUCCESS);
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    CALL(DRIVER, "ordinal=%d", ordinal);
    REQUIRE(device, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(ordinal), CUDA_ERROR_INVALID_DEVICE);
    *device = ordinal;
    END(CUDA_SUCCESS);
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    CALL(DRIVER, "device=%d", device);
    REQUIRE(name && length > 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    snprintf(name, length, "Imitation GPU");
    END(CUDA_SUCCESS);
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    CALL(DRIVER, "device=%d", device);
    REQUIRE(bytes, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    *bytes = device_size;
    END(CUDA_SUCCESS);
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    CALL(DRIVER, "device=%d", device);
    REQUIRE(uuid, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    char text[17];
    uuid_of(visible[device], text);
    memcpy(uuid->bytes, text, 16);
    END(CUDA_SUCCESS);
}

CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device) {
    CALL(DRIVER, "device=%d", device);
    REQUIRE(text && length >= 13, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    snprintf(text, length, "0000:%02X:00.0", visible[device] + 1);
    END(CUDA_SUCCESS);
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    CALL(DRIVER, "attribute=%d device=%d", attribute, device);
    REQUIRE(value, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *value = 2; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *value = visible[device] + 1; break;
    case CU_DEVICE_ATTRIBUTE_INTEGRATED:
    case CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID:
    case CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID:
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    case CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: *value = 1; break;
    default: END(CUDA_ERROR_INVALID_VALUE);
    }
    END(CUDA_SUCCESS);
}

/* ---- contexts ---- */

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    CALL(DRIVER, "device=%d", device);
    REQUIRE(context, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    struct CUctx_st *one = &contexts[device];
    if (!one->retained) {
        one->device = visible[device];
        one->broken = CUDA_SUCCESS;
        size_t size = (context_size + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
        CUresult code = size ? create(one->device, size, 0, &one->overhead) : CUDA_SUCCESS;
        REQUIRE(code == CUDA_SUCCESS, code);
        if (!one->null) one->null = new_stream(one, 0, 0);
    }
    one->retained++;
    *context = one;
    END(CUDA_SUCCESS);
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    CALL(DRIVER, "device=%d", device);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    struct CUctx_st *one = &contexts[device];
    REQUIRE(one->retained > 0, CUDA_ERROR_INVALID_CONTEXT);
    if (--one->retained == 0 && one->overhead) {
        drop(one->overhead);
        one->overhead = NULL;
    }
    END(CUDA_SUCCESS);
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    CALL(DRIVER, "device=%d", device);
    REQUIRE(flags && active, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    *flags = 0;
    *active = contexts[device].retained > 0;
    END(CUDA_SUCCESS);
}

CUresult cuCtxSetCurrent(CUcontext context) {
    CALL(DRIVER, "context=%p", (void *)context);
    REQUIRE(!context || context->retained, CUDA_ERROR_CONTEXT_IS_DESTROYED);
    if (!depth) depth = 1;
    stack[depth - 1] = context;
    if (!context) depth--;
    END(CUDA_SUCCESS);
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    CALL(DRIVER, " ");
    REQUIRE(context, CUDA_ERROR_INVALID_VALUE);
    *context = depth ? current() : NULL;
    END(CUDA_SUCCESS);
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    CALL(DRIVER, "context=%p", (void *)context);
    REQUIRE(context && depth < 16, CUDA_ERROR_INVALID_CONTEXT);
    stack[depth++] = context;
    END(CUDA_SUCCESS);
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    CALL(DRIVER, " ");
    REQUIRE(depth, CUDA_ERROR_INVALID_CONTEXT);
    if (context) *context = current();
    depth--;
    END(CUDA_SUCCESS);
}

static CUdevice ordinal_of(CUcontext context) { return (CUdevice)(context - contexts); }

CUresult cuCtxGetDevice(CUdevice *device) {
    CALL(CONTEXT, " ");
    REQUIRE(device, CUDA_ERROR_INVALID_VALUE);
    *device = ordinal_of(current());
    END(CUDA_SUCCESS);
}

CUresult cuCtxGetDevice_v2(CUdevice *device, CUcontext context) {
    CALL(context ? DRIVER : CONTEXT, "context=%p", (void *)context);
    REQUIRE(device, CUDA_ERROR_INVALID_VALUE);
    *device = ordinal_of(context ? context : current());
    END(CUDA_SUCCESS);
}

CUresult cuCtxSynchronize(void) {
    CALL(CONTEXT, " ");
    wait_for_all(current());
    END(current()->broken);
}

CUresult cuCtxSynchronize_v2(CUcontext context) {
    CALL(context ? DRIVER : CONTEXT, "context=%p", (void *)context);
    wait_for_all(context ? context : current());
    END((context ? context : current())->broken);
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    CALL(CONTEXT, " ");
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    END(CUDA_SUCCESS);
}

/* ---- device memory ---- */

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    CALL(CONTEXT, " ");
    REQUIRE(free_bytes && total, CUDA_ERROR_INVALID_VALUE);
    int state = lock_state();
    REQUIRE(state >= 0, CUDA_ERROR_OPERATING_SYSTEM);
    *free_bytes = device_size - in_use(state, current()->device);
    *total = device_size;
    close(state);
    note(&call, "free=%zu total=%zu", *free_bytes, *total);
    END(CUDA_SUCCESS);
}

static CUresult check_properties(const CUmemAllocationProp *prop) {
    if (!prop || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED || prop->win32HandleMetaData) return CUDA_ERROR_INVALID_VALUE;
    if (prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
    if (!is_device(prop->location.id)) return CUDA_ERROR_INVALID_DEVICE;
    if (prop->requestedHandleTypes & ~CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
    if (prop->allocFlags.compressionType || prop->allocFlags.usage) return CUDA_ERROR_NOT_SUPPORTED;
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop,
                                       CUmemAllocationGranularity_flags option) {
    CALL(CONTEXT, "option=%d", option);
    REQUIRE(granularity && (option == 0 || option == 1), CUDA_ERROR_INVALID_VALUE);
    CUresult code = check_properties(prop);
    REQUIRE(code == CUDA_SUCCESS, code);
    *granularity = GRANULARITY;
    END(CUDA_SUCCESS);
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
                     unsigned long long flags) {
    CALL(CONTEXT, "size=%zu device=%d types=%d", size, prop ? prop->location.id : -1,
         prop ? (int)prop->requestedHandleTypes : -1);
    REQUIRE(handle && size && size % GRANULARITY == 0 && flags == 0, CUDA_ERROR_INVALID_VALUE);
    CUresult code = check_properties(prop);
    REQUIRE(code == CUDA_SUCCESS, code);
    struct allocation *made;
    code = create(visible[prop->location.id], size, prop->requestedHandleTypes, &made);
    REQUIRE(code == CUDA_SUCCESS, code);
    made->handles = 1;
    *handle = handle_of(made);
    note(&call, " handle=0x%llx", *handle);
    END(CUDA_SUCCESS);
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    CALL(CONTEXT, "handle=0x%llx", handle);
    struct allocation *one = allocation_of(handle);
    REQUIRE(one, CUDA_ERROR_INVALID_VALUE);
    one->handles--;
    drop(one);
    END(CUDA_SUCCESS);
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *address) {
    CALL(CONTEXT, "address=%p", address);
    REQUIRE(handle, CUDA_ERROR_INVALID_VALUE);
    size_t first;
    REQUIRE(mappings_in((uintptr_t)address, 1, false, &first), CUDA_ERROR_INVALID_VALUE);
    struct allocation *one = mappings[first]->of;
    for (size_t i = 0; i < allocation_count; i++)
        if (allocations[i] == one) {
            one->handles++;
            *handle = 0xfa0001 + i;
            END(CUDA_SUCCESS);
        }
    END(CUDA_ERROR_INVALID_VALUE);  /* of cuMemAlloc */
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *prop, CUmemGenericAllocationHandle handle) {
    CALL(CONTEXT, "handle=0x%llx", handle);
    struct allocation *one = allocation_of(handle);
    REQUIRE(prop && one, CUDA_ERROR_INVALID_VALUE);
    memset(prop, 0, sizeof *prop);
    prop->type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop->requestedHandleTypes = one->exportable;
    prop->location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    for (int i = 0; i < visible_count; i++)
        if (visible[i] == one->device) prop->location.id = i;
    END(CUDA_SUCCESS);
}

CUresult cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
    CALL(CONTEXT, "handle=0x%llx type=%d", handle, type);
    struct allocation *one = allocation_of(handle);
    REQUIRE(shareable && one && flags == 0 && type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(one->exportable & type, CUDA_ERROR_INVALID_VALUE);
    int fd = fcntl(one->fd, F_DUPFD_CLOEXEC, 0);
    REQUIRE(fd >= 0, CUDA_ERROR_OPERATING_SYSTEM);
    *(int *)shareable = fd;
    note(&call, " fd=%d", fd);
    END(CUDA_SUCCESS);
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *shareable,
                                        CUmemAllocationHandleType type) {
    int given = (int)(intptr_t)shareable, device;
    CALL(CONTEXT, "fd=%d type=%d", given, type);
    struct stat status, known;
    REQUIRE(handle && type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR && !fstat(given, &status), CUDA_ERROR_INVALID_VALUE);
    for (device = 0; device < devices; device++) {
        char path[500], name[64];
        snprintf(name, sizeof name, "%d-%lu", device, (unsigned long)status.st_ino);
        state_path(path, sizeof path, name);
        if (!stat(path, &known) && known.st_dev == status.st_dev && known.st_ino == status.st_ino) break;
    }
    REQUIRE(device < devices, CUDA_ERROR_INVALID_VALUE);
    bool seen = false;
    for (int i = 0; i < visible_count; i++) seen |= visible[i] == device;
    REQUIRE(seen, CUDA_ERROR_INVALID_DEVICE);
    int fd = fcntl(given, F_DUPFD_CLOEXEC, 0);
    REQUIRE(fd >= 0, CUDA_ERROR_OPERATING_SYSTEM);
    struct allocation *one = calloc(1, sizeof *one);
    *one = (struct allocation){.fd = fd, .device = device, .handles = 1, .size = status.st_size,
                               .exportable = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR};
    *handle = handle_of(one);
    note(&call, " handle=0x%llx", *handle);
    END(CUDA_SUCCESS);
}

CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
    CALL(CONTEXT, "size=%zu alignment=%zu", size, alignment);
    (void)hint;  /* only a hint */
    REQUIRE(address && size && size % GRANULARITY == 0 && flags == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE((alignment & (alignment - 1)) == 0, CUDA_ERROR_INVALID_VALUE);
    uintptr_t start = reserve(size, alignment > GRANULARITY ? alignment : GRANULARITY, false);
    REQUIRE(start, CUDA_ERROR_OUT_OF_MEMORY);
    *address = start;
    note(&call, " address=0x%llx", *address);
    END(CUDA_SUCCESS);
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    CALL(CONTEXT, "address=0x%llx size=%zu", address, size);
    struct reservation *one = reservation_around(address, size);
    REQUIRE(one && !one->plain && one->start == address && one->size == size, CUDA_ERROR_INVALID_VALUE);
    size_t index = mapping_after(address);
    REQUIRE(index == mapping_count || mappings[index]->start >= address + size, CUDA_ERROR_INVALID_VALUE);
    munmap((void *)one->start, size);
    *one = reservations[--reservation_count];
    END(CUDA_SUCCESS);
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
    CALL(CONTEXT, "address=0x%llx size=%zu offset=%zu handle=0x%llx", address, size, offset, handle);
    struct allocation *one = allocation_of(handle);
    REQUIRE(one && size && size <= one->size && offset == 0 && flags == 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(size % GRANULARITY == 0 && address % GRANULARITY == 0, CUDA_ERROR_INVALID_VALUE);
    struct reservation *around = reservation_around(address, size);
    REQUIRE(around && !around->plain, CUDA_ERROR_INVALID_VALUE);
    size_t index = mapping_after(address);
    REQUIRE(index == mapping_count || mappings[index]->start >= address + size, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(map(one, address, size), CUDA_ERROR_MAP_FAILED);
    END(CUDA_SUCCESS);
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
    CALL(CONTEXT, "address=0x%llx size=%zu", address, size);
    struct reservation *around = reservation_around(address, size);
    size_t first, count = mappings_in(address, size, true, &first);
    REQUIRE(count && around && !around->plain, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(unmap(first, count), CUDA_ERROR_OPERATING_SYSTEM);
    END(CUDA_SUCCESS);
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *wanted, size_t wanted_count) {
    CALL(CONTEXT, "address=0x%llx size=%zu count=%zu", address, size, wanted_count);
    REQUIRE(wanted && wanted_count, CUDA_ERROR_INVALID_VALUE);
    for (size_t i = 0; i < wanted_count; i++) {
        REQUIRE(wanted[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE, CUDA_ERROR_NOT_SUPPORTED);
        REQUIRE(is_device(wanted[i].location.id), CUDA_ERROR_INVALID_DEVICE);
        REQUIRE(wanted[i].flags == CU_MEM_ACCESS_FLAGS_PROT_NONE || wanted[i].flags == CU_MEM_ACCESS_FLAGS_PROT_READ ||
                wanted[i].flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE, CUDA_ERROR_INVALID_VALUE);
    }
    struct reservation *around = reservation_around(address, size);
    size_t first, count = mappings_in(address, size, true, &first);
    REQUIRE(count && around && !around->plain, CUDA_ERROR_INVALID_VALUE);
    bool done = true;
    pthread_rwlock_wrlock(&memory);
    for (size_t i = first; i < first + count; i++)
        for (size_t j = 0; j < wanted_count; j++)
            done &= set_access(mappings[i], visible[wanted[j].location.id], wanted[j].flags);
    pthread_rwlock_unlock(&memory);
    REQUIRE(done, CUDA_ERROR_OPERATING_SYSTEM);
    END(CUDA_SUCCESS);
}

CUresult cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location, CUdeviceptr address) {
    CALL(CONTEXT, "address=0x%llx", address);
    size_t first;
    REQUIRE(flags && location && location->type == CU_MEM_LOCATION_TYPE_DEVICE, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(location->id), CUDA_ERROR_INVALID_DEVICE);
    REQUIRE(mappings_in(address, 1, false, &first), CUDA_ERROR_INVALID_VALUE);
    *flags = mappings[first]->access[visible[location->id]];
    END(CUDA_SUCCESS);
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    CALL(CONTEXT, "size=%zu", size);
    REQUIRE(address && size, CUDA_ERROR_INVALID_VALUE);
    size = (size + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
    struct allocation *made;
    CUresult code = create(current()->device, size, 0, &made);
    REQUIRE(code == CUDA_SUCCESS, code);
    uintptr_t start = reserve(size, GRANULARITY, true);
    size_t first;
    if (!start || !map(made, start, size)) {
        drop(made);
        END(CUDA_ERROR_OUT_OF_MEMORY);
    }
    mappings_in(start, size, true, &first);
    set_access(mappings[first], current()->device, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    *address = start;
    note(&call, " address=0x%llx", *address);
    END(CUDA_SUCCESS);
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    CALL(CONTEXT, "address=0x%llx", address);
    if (!address) END(CUDA_SUCCESS);
    struct reservation *one = reservation_around(address, 1);
    REQUIRE(one && one->plain && one->start == address, CUDA_ERROR_INVALID_VALUE);
    wait_for_all(current());
    one = reservation_around(address, 1);  /* the table may have moved */
    REQUIRE(one, CUDA_ERROR_INVALID_VALUE);
    size_t first, count = mappings_in(address, one->size, true, &first);
    unmap(first, count);
    munmap((void *)one->start, one->size);
    *one = reservations[--reservation_count];
    END(CUDA_SUCCESS);
}

/* ---- host memory ---- */

static void add_registration(uintptr_t start, size_t size, bool allocated) {
    pthread_rwlock_wrlock(&memory);
    registrations = grown(registrations, registration_count, sizeof *registrations);
    registrations[registration_count++] = (struct registration){start, size, allocated};
    pthread_rwlock_unlock(&memory);
}

/* The size of the registration that starts at `start`, which is removed; 0 if there is none. */
static size_t remove_registration(uintptr_t start, bool allocated) {
    size_t size = 0;
    pthread_rwlock_wrlock(&memory);
    for (size_t i = 0; i < registration_count; i++)
        if (registrations[i].start == start && registrations[i].allocated == allocated) {
            size = registrations[i].size;
            registrations[i] = registrations[--registration_count];
            break;
        }
    pthread_rwlock_unlock(&memory);
    return size;
}

CUresult cuMemHostRegister_v2(void *address, size_t size, unsigned flags) {
    CALL(CONTEXT, "address=%p size=%zu flags=%u", address, size, flags);
    REQUIRE(address && size && flags <= 15, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(registered((uintptr_t)address, size) == 0, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    uintptr_t page = sysconf(_SC_PAGESIZE), start = (uintptr_t)address / page * page;
    size_t length = ((uintptr_t)address + size + page - 1) / page * page - start;
    unsigned char *resident = malloc(length / page);
    bool mapped = !mincore((void *)start, length, resident);
    free(resident);
    REQUIRE(mapped, CUDA_ERROR_INVALID_VALUE);
    /* Pinned pages exist; a kernel without the advice makes them at the first touch. */
    int advice = flags & CU_MEMHOSTREGISTER_READ_ONLY ? POPULATE_READ : POPULATE_WRITE;
    if (madvise((void *)start, length, advice) && errno != EINVAL) END(CUDA_ERROR_OUT_OF_MEMORY);
    add_registration((uintptr_t)address, size, false);
    END(CUDA_SUCCESS);
}

CUresult cuMemHostUnregister(void *address) {
    CALL(CONTEXT, "address=%p", address);
    REQUIRE(address, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(remove_registration((uintptr_t)address, false), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    END(CUDA_SUCCESS);
}

CUresult cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    CALL(CONTEXT, "size=%zu flags=%u", size, flags);
    REQUIRE(address && size && flags <= 7, CUDA_ERROR_INVALID_VALUE);
    void *made = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    REQUIRE(made != MAP_FAILED, CUDA_ERROR_OUT_OF_MEMORY);
    add_registration((uintptr_t)made, size, true);
    *address = made;
    note(&call, " address=%p", made);
    END(CUDA_SUCCESS);
}

CUresult cuMemFreeHost(void *address) {
    CALL(CONTEXT, "address=%p", address);
    wait_for_all(current());
    size_t size = remove_registration((uintptr_t)address, true);
    REQUIRE(size, CUDA_ERROR_INVALID_VALUE);
    munmap(address, size);
    END(CUDA_SUCCESS);
}

/* ---- work on streams ---- */

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    CALL(CONTEXT, "flags=%u priority=%d", flags, priority);
    REQUIRE(stream && flags <= CU_STREAM_NON_BLOCKING, CUDA_ERROR_INVALID_VALUE);
    *stream = new_stream(current(), flags, priority);
    note(&call, " stream=%p", (void *)*stream);
    END(CUDA_SUCCESS);
}

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    CALL(CONTEXT, "flags=%u", flags);
    REQUIRE(stream && flags <= CU_STREAM_NON_BLOCKING, CUDA_ERROR_INVALID_VALUE);
    *stream = new_stream(current(), flags, 0);
    note(&call, " stream=%p", (void *)*stream);
    END(CUDA_SUCCESS);
}

CUresult cuStreamGetPriority(CUstream handle, int *priority) {
    CALL(CONTEXT, "stream=%p", (void *)handle);
    struct CUstream_st *stream = stream_of(handle);
    REQUIRE(stream && priority, CUDA_ERROR_INVALID_HANDLE);
    *priority = stream->priority;
    END(CUDA_SUCCESS);
}

CUresult cuStreamDestroy_v2(CUstream handle) {
    CALL(CONTEXT, "stream=%p", (void *)handle);
    struct CUstream_st *stream = stream_of(handle);
    REQUIRE(stream && stream != stream->context->null, CUDA_ERROR_INVALID_HANDLE);
    stream->destroyed = true;  /* what is queued is still done; then its thread removes it */
    if (!stream->started) remove_stream(stream);
    pthread_cond_broadcast(&changed);
    END(CUDA_SUCCESS);
}

CUresult cuStreamQuery(CUstream handle) {
    CALL(CONTEXT, "stream=%p", (void *)handle);
    struct CUstream_st *stream = stream_of(handle);
    REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
    END(stream->first ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

CUresult cuStreamSynchronize(CUstream handle) {
    CALL(CONTEXT, "stream=%p", (void *)handle);
    struct CUstream_st *stream = stream_of(handle);
    REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
    CUcontext context = stream->context;
    unsigned long last = stream->first ? stream->last->number : 0;
    wait_for(stream, last);
    END(context->broken);
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags) {
    CALL(CONTEXT, "stream=%p event=%p", (void *)handle, (void *)event_handle);
    struct CUstream_st *stream = stream_of(handle);
    struct CUevent_st *event = event_of(event_handle);
    REQUIRE(stream && event, CUDA_ERROR_INVALID_HANDLE);
    REQUIRE(flags <= 1, CUDA_ERROR_INVALID_VALUE);
    queue(stream, (struct work){.kind = WAIT, .name = "cuStreamWaitEvent", .event = event, .mark = event->recorded});
    END(CUDA_SUCCESS);
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void *data) {
    CALL(CONTEXT, "stream=%p", (void *)handle);
    struct CUstream_st *stream = stream_of(handle);
    REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
    REQUIRE(function, CUDA_ERROR_INVALID_VALUE);
    queue(stream, (struct work){.kind = HOST_FUNCTION, .name = "cuLaunchHostFunc", .function = function, .data = data});
    END(CUDA_SUCCESS);
}

CUresult cuEventCreate(CUevent *event, unsigned flags) {
    CALL(CONTEXT, "flags=%u", flags);
    REQUIRE(event && flags <= 7, CUDA_ERROR_INVALID_VALUE);
    struct CUevent_st *made = calloc(1, sizeof *made);
    *made = (struct CUevent_st){.flags = flags, .next = events};
    *event = events = made;
    note(&call, " event=%p", (void *)made);
    END(CUDA_SUCCESS);
}

CUresult cuEventDestroy_v2(CUevent handle) {
    CALL(CONTEXT, "event=%p", (void *)handle);
    struct CUevent_st *event = event_of(handle);
    REQUIRE(event, CUDA_ERROR_INVALID_HANDLE);
    event->destroyed = true;  /* not freed: work that is queued may name it */
    END(CUDA_SUCCESS);
}

CUresult cuEventRecord(CUevent event_handle, CUstream handle) {
    CALL(CONTEXT, "event=%p stream=%p", (void *)event_handle, (void *)handle);
    struct CUevent_st *event = event_of(event_handle);
    struct CUstream_st *stream = stream_of(handle);
    REQUIRE(stream && event, CUDA_ERROR_INVALID_HANDLE);
    queue(stream, (struct work){.kind = RECORD, .name = "cuEventRecord", .event = event, .mark = ++event->recorded});
    END(CUDA_SUCCESS);
}

CUresult cuEventQuery(CUevent handle) {
    CALL(CONTEXT, "event=%p", (void *)handle);
    struct CUevent_st *event = event_of(handle);
    REQUIRE(event, CUDA_ERROR_INVALID_HANDLE);
    END(event->done < event->recorded ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

CUresult cuEventSynchronize(CUevent handle) {
    CALL(CONTEXT, "event=%p", (void *)handle);
    struct CUevent_st *event = event_of(handle);
    REQUIRE(event, CUDA_ERROR_INVALID_HANDLE);
    unsigned long mark = event->recorded;
    while (event->done < mark) pthread_cond_wait(&changed, &lock);
    END(current()->broken);
}

CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent start_handle, CUevent end_handle) {
    CALL(CONTEXT, "start=%p end=%p", (void *)start_handle, (void *)end_handle);
    struct CUevent_st *start = event_of(start_handle), *end = event_of(end_handle);
    REQUIRE(milliseconds && start && end && start->recorded && end->recorded, CUDA_ERROR_INVALID_HANDLE);
    REQUIRE(!((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING), CUDA_ERROR_INVALID_HANDLE);
    REQUIRE(start->done == start->recorded && end->done == end->recorded, CUDA_ERROR_NOT_READY);
    *milliseconds = (float)((double)(end->at.tv_sec - start->at.tv_sec) * 1e3 +
                            (double)(end->at.tv_nsec - start->at.tv_nsec) / 1e6);
    END(CUDA_SUCCESS);
}

/* Check and queue a copy or fill; waits for it if it must be complete on return. */
static CUresult submit(CUstream handle, struct work work, bool wait) {
    struct CUstream_st *stream = stream_of(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (work.size == 0) return CUDA_SUCCESS;
    int device = stream->context->device;
    if (!work.to_host && !accessible(work.to, work.size, device, CU_MEM_ACCESS_FLAGS_PROT_READWRITE))
        return CUDA_ERROR_INVALID_VALUE;
    if (work.kind == COPY && !work.from_host && !accessible(work.from, work.size, device, CU_MEM_ACCESS_FLAGS_PROT_READ))
        return CUDA_ERROR_INVALID_VALUE;
    if (work.to_host || work.from_host) {
        int where = registered(work.to_host ? work.to : work.from, work.size);
        if (where < 0) return CUDA_ERROR_INVALID_VALUE;
        work.needs_registration = where;
        wait |= !where;  /* pageable memory is staged: the caller's bytes are his again on return */
    }
    CUcontext context = stream->context;
    unsigned long number = queue(stream, work);
    if (wait) wait_for(stream, number);
    return wait ? context->broken : CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    CALL(CONTEXT, "dst=0x%llx src=%p bytes=%zu stream=%p", to, from, size, (void *)stream);
    REQUIRE(from, CUDA_ERROR_INVALID_VALUE);
    END(submit(stream, (struct work){.kind = COPY, .name = "cuMemcpyHtoDAsync", .to = to, .from = (uintptr_t)from,
                                     .from_host = true, .size = size}, false));
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    CALL(CONTEXT, "dst=%p src=0x%llx bytes=%zu stream=%p", to, from, size, (void *)stream);
    REQUIRE(to, CUDA_ERROR_INVALID_VALUE);
    END(submit(stream, (struct work){.kind = COPY, .name = "cuMemcpyDtoHAsync", .to = (uintptr_t)to, .from = from,
                                     .to_host = true, .size = size}, false));
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    CALL(CONTEXT, "dst=0x%llx src=0x%llx bytes=%zu stream=%p", to, from, size, (void *)stream);
    END(submit(stream, (struct work){.kind = COPY, .name = "cuMemcpyDtoDAsync", .to = to, .from = from, .size = size},
               false));
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size) {
    CALL(CONTEXT, "dst=0x%llx src=%p bytes=%zu", to, from, size);
    REQUIRE(from, CUDA_ERROR_INVALID_VALUE);
    END(submit(NULL, (struct work){.kind = COPY, .name = "cuMemcpyHtoD", .to = to, .from = (uintptr_t)from,
                                   .from_host = true, .size = size}, true));
}

CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size) {
    CALL(CONTEXT, "dst=%p src=0x%llx bytes=%zu", to, from, size);
    REQUIRE(to, CUDA_ERROR_INVALID_VALUE);
    END(submit(NULL, (struct work){.kind = COPY, .name = "cuMemcpyDtoH", .to = (uintptr_t)to, .from = from,
                                   .to_host = true, .size = size}, true));
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size) {
    CALL(CONTEXT, "dst=0x%llx src=0x%llx bytes=%zu", to, from, size);
    /* Returns before it is done, as the driver's. */
    END(submit(NULL, (struct work){.kind = COPY, .name = "cuMemcpyDtoD", .to = to, .from = from, .size = size}, false));
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    CALL(CONTEXT, "dst=0x%llx value=%u bytes=%zu stream=%p", to, value, count, (void *)stream);
    END(submit(stream, (struct work){.kind = FILL, .name = "cuMemsetD8Async", .to = to, .value = value, .unit = 1,
                                     .size = count}, false));
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    CALL(CONTEXT, "dst=0x%llx value=%u words=%zu stream=%p", to, value, count, (void *)stream);
    REQUIRE(to % 4 == 0, CUDA_ERROR_INVALID_VALUE);
    END(submit(stream, (struct work){.kind = FILL, .name = "cuMemsetD32Async", .to = to, .value = value, .unit = 4,
                                     .size = 4 * count}, false));
}

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
    CALL(CONTEXT, "dst=0x%llx value=%u bytes=%zu", to, value, count);
    END(submit(NULL, (struct work){.kind = FILL, .name = "cuMemsetD8", .to = to, .value = value, .unit = 1,
                                   .size = count}, false));
}
