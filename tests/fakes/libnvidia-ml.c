/* An imitation of NVIDIA's libnvidia-ml.so.1 for tests without a GPU: who uses how much of which GPU, read from a file.
 *
 * FAKE_NVML_PROCESSES names it: lines "PCI_BUS_ID PID BYTES", written at any time; BYTES -1 is "not available". Without
 * it there is no driver (NVML_ERROR_DRIVER_NOT_LOADED). Signatures and codes: nvml.h, as nvidia-ml-py calls them.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_FOUND = 6, INSUFFICIENT_SIZE, DRIVER_NOT_LOADED = 9 };

struct process { unsigned pid; unsigned long long used_bytes; unsigned gpu_instance, compute_instance; };
struct device { char bus[32]; };

static struct device devices[16];
static int initialized, device_count;

static int each(const char *bus, unsigned capacity, struct process *processes, unsigned *count) {
    const char *path = getenv("FAKE_NVML_PROCESSES");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return DRIVER_NOT_LOADED;
    char of[32];
    unsigned pid;
    long long bytes;
    *count = 0;
    while (fscanf(file, "%31s %u %lld", of, &pid, &bytes) == 3) {
        if (strcmp(of, bus)) continue;
        if (*count < capacity) processes[*count] = (struct process){pid, bytes, -1, -1};
        ++*count;
    }
    fclose(file);
    return *count > capacity ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    unsigned count;
    int code = each("", 0, NULL, &count);
    initialized = !flags && code == SUCCESS;
    return flags ? INVALID_ARGUMENT : code;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, struct device **device) {
    if (!initialized) return UNINITIALIZED;
    if (!bus || !device || strlen(bus) >= sizeof devices->bus) return INVALID_ARGUMENT;
    for (int i = 0; i < device_count; i++)
        if (!strcmp(devices[i].bus, bus)) return *device = &devices[i], SUCCESS;
    unsigned count;
    each(bus, 0, NULL, &count);
    if (!count || device_count == 16) return NOT_FOUND;
    *device = &devices[device_count++];
    strcpy((*device)->bus, bus);
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(struct device *device, unsigned *count, struct process *processes) {
    if (!initialized) return UNINITIALIZED;
    if (!device || !count || (*count && !processes)) return INVALID_ARGUMENT;
    return each(device->bus, *count, processes, count);
}

const char *nvmlErrorString(int code) {
    switch (code) {
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    }
    return "Unknown Error";
}
