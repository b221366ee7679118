/* An allocator for torch: first fit in one range of addresses whose frames are mapped beforehand, so that CUDA graphs and
 * workspaces lie in memory that a swap takes away and brings back. What does not fit comes from the driver and stays.
 *
 * Pure C, no Python: torch calls it under its own lock, where waiting for the GIL can deadlock. It never touches the
 * memory that it hands out. Signatures: torch.cuda.memory.CUDAPluggableAllocator.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#ifdef WITH_CUDA_H
#include <cuda.h>
#else
typedef unsigned long long CUdeviceptr;
typedef int CUresult;
#endif

typedef CUresult (*allocate_function)(CUdeviceptr *, size_t);
typedef CUresult (*free_function)(CUdeviceptr);

#ifdef WITH_CUDA_H
static const allocate_function checked_allocate = cuMemAlloc;
static const free_function checked_free = cuMemFree;
__attribute__((unused)) static const void *checked[] = {&checked_allocate, &checked_free};
#endif

enum { ALIGNMENT = 512 }; /* torch's own: c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize */

struct gap {
    uint64_t start, size;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t base, size, used, peak, outside, outside_peak;
static struct gap *gaps; /* by rising address, never touching each other */
static size_t gap_count, gap_room;

static uint64_t aligned(uint64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static void *driver(const char *function) {
    static void *library;
    if (!library) library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    return library ? dlsym(library, function) : NULL;
}

static int insert_gap(size_t at, uint64_t start, uint64_t bytes) {
    if (gap_count == gap_room) {
        size_t room = gap_room ? 2 * gap_room : 64;
        struct gap *more = realloc(gaps, room * sizeof *gaps);
        if (!more) return -1;
        gaps = more, gap_room = room;
    }
    memmove(gaps + at + 1, gaps + at, (gap_count - at) * sizeof *gaps);
    gaps[at] = (struct gap){start, bytes};
    gap_count++;
    return 0;
}

static void remove_gap(size_t at) {
    gap_count--;
    memmove(gaps + at, gaps + at + 1, (gap_count - at) * sizeof *gaps);
}

/* Hand out `bytes` from `start`, all of which is mapped. 0, or -1 when something is handed out already. */
int triton_swap_scratch_open(uint64_t start, uint64_t bytes) {
    pthread_mutex_lock(&lock);
    int result = -1;
    if (!used && !outside) {
        base = start, size = bytes, peak = outside_peak = 0, gap_count = 0;
        result = insert_gap(0, start, bytes);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static uint64_t take(uint64_t bytes) {
    for (size_t at = 0; at < gap_count; at++) {
        if (gaps[at].size < bytes) continue;
        uint64_t start = gaps[at].start;
        gaps[at].start += bytes, gaps[at].size -= bytes;
        if (!gaps[at].size) remove_gap(at);
        used += bytes;
        if (used > peak) peak = used;
        return start;
    }
    return 0;
}

static void give_back(uint64_t start, uint64_t bytes) {
    size_t at = 0;
    while (at < gap_count && gaps[at].start < start) at++;
    used -= bytes;
    int joins_left = at && gaps[at - 1].start + gaps[at - 1].size == start;
    int joins_right = at < gap_count && start + bytes == gaps[at].start;
    if (joins_left) {
        gaps[at - 1].size += bytes;
        if (joins_right) gaps[at - 1].size += gaps[at].size, remove_gap(at);
    } else if (joins_right) {
        gaps[at].start = start, gaps[at].size += bytes;
    } else if (insert_gap(at, start, bytes)) {
        used += bytes; /* no memory for the list: these addresses are not handed out again */
    }
}

/* NULL, which torch reports as out of memory, when the driver has nothing left either. */
void *triton_swap_scratch_malloc(ssize_t bytes, int device, void *stream) {
    (void)device, (void)stream;
    uint64_t rounded = aligned(bytes);
    pthread_mutex_lock(&lock);
    uint64_t address = take(rounded);
    pthread_mutex_unlock(&lock);
    if (address) return (void *)address;
    allocate_function allocate = (allocate_function)driver("cuMemAlloc_v2");
    CUdeviceptr private = 0;
    if (!allocate || allocate(&private, bytes)) return NULL;
    pthread_mutex_lock(&lock);
    outside += bytes;
    if (outside > outside_peak) outside_peak = outside;
    pthread_mutex_unlock(&lock);
    return (void *)private;
}

void triton_swap_scratch_free(void *pointer, ssize_t bytes, int device, void *stream) {
    (void)device, (void)stream;
    uint64_t address = (uint64_t)pointer;
    pthread_mutex_lock(&lock);
    int own = address >= base && address < base + size;
    if (own) give_back(address, aligned(bytes));
    else outside -= bytes;
    pthread_mutex_unlock(&lock);
    if (own) return;
    free_function release = (free_function)driver("cuMemFree_v2");
    if (release) release((CUdeviceptr)address);
}

/* Bytes: used now, most ever used, from the driver now, most ever from the driver. */
void triton_swap_scratch_usage(uint64_t usage[4]) {
    pthread_mutex_lock(&lock);
    usage[0] = used, usage[1] = peak, usage[2] = outside, usage[3] = outside_peak;
    pthread_mutex_unlock(&lock);
}
