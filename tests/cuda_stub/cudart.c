/* CUDA's runtime on host memory, with kernels that do nothing.

   ONNX Runtime's CUDA provider loads on it, places nodes, and walks through runs and recordings.  Every launch, copy,
   allocation and recording is a line of the file CUDA_STUB_LOG: what, a tab, and which.  Calls that CUDA refuses while
   a graph is recorded fail as there, from any thread, and spoil the recording.  Answers and times mean nothing. */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "driver_types.h"

#define API cudaError_t
#define MOST_KERNELS 60000
#define SKIP_IF_RECORDING(call) \
    if (spoils(call)) return cudaErrorStreamCaptureUnsupported

static volatile int recording, spoilt;
static pthread_t recorder;

/* The log. */

void stub_log(const char *what, const char *detail) {
    static FILE *file;
    static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
    const char *path = getenv("CUDA_STUB_LOG");
    if (!path) return;
    pthread_mutex_lock(&opening);
    if (!file && (file = fopen(path, "a"))) setvbuf(file, NULL, _IOLBF, 0);
    pthread_mutex_unlock(&opening);
    if (file) fprintf(file, "%s\t%s\n", what, detail);
}

void stub_mark(const char *section) { stub_log("mark", section); }

static void log_size(const char *what, size_t bytes) {
    char text[32];
    snprintf(text, sizeof text, "%zu", bytes);
    stub_log(what, text);
}

static void log_copy(enum cudaMemcpyKind kind, size_t bytes) {
    static const char *kinds[] = {"HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice", "Default"};
    char text[48];
    stub_log("copy", kinds[kind]);
    snprintf(text, sizeof text, "%s %zu", kinds[kind], bytes);
    stub_log("copied", text);
}

static int spoils(const char *call) {
    if (!recording) return 0;
    spoilt = 1;
    stub_log("spoilt by", call);
    return 1;
}

/* Kernels: registered by name, launched by address. */

static struct kernel { const void *function; const char *name; } kernels[MOST_KERNELS];
static int kernel_count, kernels_sorted;

static int by_address(const void *a, const void *b) {
    const void *x = ((const struct kernel *)a)->function, *y = ((const struct kernel *)b)->function;
    return x < y ? -1 : x > y;
}

static API launch(const void *function) {
    static pthread_mutex_t sorting = PTHREAD_MUTEX_INITIALIZER;
    struct kernel key = {function, NULL};
    pthread_mutex_lock(&sorting);
    if (!kernels_sorted) qsort(kernels, kernel_count, sizeof key, by_address);
    kernels_sorted = 1;
    pthread_mutex_unlock(&sorting);
    struct kernel *found = bsearch(&key, kernels, kernel_count, sizeof key, by_address);
    stub_log("kernel", found ? found->name : "?");
    return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) { return malloc(8); }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void) {}
void __cudaRegisterFunction(void **handle, const char *function, char *device, const char *name) {
    if (kernel_count == MOST_KERNELS) return;
    kernels[kernel_count++] = (struct kernel){function, name};
    kernels_sorted = 0;
}
unsigned __cudaPushCallConfiguration(void) { return 0; }
API __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    memset(grid, 0, sizeof *grid);
    memset(block, 0, sizeof *block);
    *shared = 0;
    *stream = NULL;
    return cudaSuccess;
}
API __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return cudaSuccess; }
API __cudaLaunchKernel(void *kernel) { return launch(kernel); }
API cudaLaunchKernel(const void *function) { return launch(function); }
API cudaLaunchKernelExC(const void *config, const void *function) { return launch(function); }
API cudaLaunchCooperativeKernel(const void *function) { return launch(function); }
API cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    stub_log("host function", "");
    function(data);
    return cudaSuccess;
}

/* Memory, of two devices that are alike. */

enum { DEVICES = 2 };
static __thread int current;

static void log_device(void) {
    if (current) stub_log("cudaMalloc on device", "1");
}

static void *zeros(size_t bytes) {
    size_t whole = (bytes + 511) / 256 * 256;
    return memset(aligned_alloc(256, whole), 0, whole);
}

API cudaMalloc(void **to, size_t bytes) {
    SKIP_IF_RECORDING("cudaMalloc");
    log_size("cudaMalloc", bytes);
    log_device();
    *to = zeros(bytes);
    return cudaSuccess;
}
API cudaMallocFromPoolAsync(void **to, size_t bytes) { return cudaMalloc(to, bytes); }
API cudaMallocHost(void **to, size_t bytes) {
    SKIP_IF_RECORDING("cudaMallocHost");
    log_size("cudaMallocHost", bytes);
    *to = zeros(bytes);
    return cudaSuccess;
}
API cudaHostAlloc(void **to, size_t bytes, unsigned flags) { return cudaMallocHost(to, bytes); }
API cudaFree(void *at) {
    SKIP_IF_RECORDING("cudaFree");
    stub_log("cudaFree", "");
    free(at);
    return cudaSuccess;
}
API cudaFreeAsync(void *at) { free(at); return cudaSuccess; }
API cudaFreeHost(void *at) {
    SKIP_IF_RECORDING("cudaFreeHost");
    free(at);
    return cudaSuccess;
}
API cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    SKIP_IF_RECORDING("cudaMemcpy");
    log_copy(kind, bytes);
    memcpy(to, from, bytes);
    return cudaSuccess;
}
API cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    log_copy(kind, bytes);
    memmove(to, from, bytes);
    return cudaSuccess;
}
API cudaMemcpy2DAsync(
    void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, enum cudaMemcpyKind kind
) {
    log_copy(kind, width * height);
    for (size_t row = 0; row < height; row++) memcpy((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
    return cudaSuccess;
}
API cudaMemcpyFromSymbol(void *to, const void *symbol, size_t bytes) { memset(to, 0, bytes); return cudaSuccess; }
API cudaMemset(void *at, int value, size_t bytes) {
    SKIP_IF_RECORDING("cudaMemset");
    stub_log("memset", "");
    memset(at, value, bytes);
    return cudaSuccess;
}
API cudaMemsetAsync(void *at, int value, size_t bytes) {
    stub_log("memset", "");
    memset(at, value, bytes);
    return cudaSuccess;
}
API cudaMemGetInfo(size_t *left, size_t *total) { *left = 70ul << 30; *total = 80ul << 30; return cudaSuccess; }
API cudaPointerGetAttributes(struct cudaPointerAttributes *is, const void *at) {
    memset(is, 0, sizeof *is);
    is->type = cudaMemoryTypeDevice;
    is->device = current;
    return cudaSuccess;
}
API cudaMemPoolCreate(void **pool) { *pool = malloc(8); return cudaSuccess; }
API cudaMemPoolDestroy(void *pool) { return cudaSuccess; }
API cudaMemPoolGetAttribute(void) { return cudaSuccess; }
API cudaMemPoolSetAttribute(void) { return cudaSuccess; }
API cudaMemPoolTrimTo(void) { return cudaSuccess; }

/* The device: as an H100 describes itself, where the provider asks. */

API cudaGetDeviceCount(int *count) { *count = DEVICES; return cudaSuccess; }
API cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
API cudaSetDevice(int device) {
    if (device < 0 || device >= DEVICES) return cudaErrorInvalidDevice;
    current = device;
    return cudaSuccess;
}
API cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
API cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
API cudaGetDeviceProperties(struct cudaDeviceProp *is, int device) {
    memset(is, 0, sizeof *is);
    strcpy(is->name, "CUDA stub: computes nothing");
    is->major = 9;
    is->warpSize = 32;
    is->totalGlobalMem = 80ul << 30;
    is->sharedMemPerBlock = 49152;
    is->sharedMemPerBlockOptin = 232448;
    is->sharedMemPerMultiprocessor = 233472;
    is->regsPerBlock = is->regsPerMultiprocessor = 65536;
    is->maxThreadsPerBlock = 1024;
    is->maxThreadsPerMultiProcessor = 2048;
    is->multiProcessorCount = 132;
    is->maxThreadsDim[0] = is->maxThreadsDim[1] = 1024;
    is->maxThreadsDim[2] = 64;
    is->maxGridSize[0] = 2147483647;
    is->maxGridSize[1] = is->maxGridSize[2] = 65535;
    is->l2CacheSize = 50 << 20;
    is->totalConstMem = 65536;
    is->concurrentKernels = 1;
    return cudaSuccess;
}
API cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrMultiProcessorCount: *value = 132; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        default: *value = 0;
    }
    return cudaSuccess;
}
API cudaFuncGetAttributes(struct cudaFuncAttributes *is, const void *function) {
    memset(is, 0, sizeof *is);
    is->maxThreadsPerBlock = 1024;
    is->numRegs = 32;
    return cudaSuccess;
}
API cudaFuncSetAttribute(void) { return cudaSuccess; }
API cudaKernelSetAttributeForDevice(void) { return cudaSuccess; }
API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 2; return cudaSuccess; }
API cudaDeviceSynchronize(void) { SKIP_IF_RECORDING("cudaDeviceSynchronize"); return cudaSuccess; }

/* Streams, recordings, events. */

API cudaStreamCreate(void **stream) { *stream = malloc(8); return cudaSuccess; }
API cudaStreamCreateWithFlags(void **stream, unsigned flags) { return cudaStreamCreate(stream); }
API cudaStreamDestroy(void *stream) { return cudaSuccess; }
API cudaStreamWaitEvent(void *stream) { return cudaSuccess; }
API cudaStreamSynchronize(void *stream) {
    if (pthread_equal(pthread_self(), recorder)) SKIP_IF_RECORDING("cudaStreamSynchronize");
    return cudaSuccess;
}
API cudaStreamIsCapturing(void *stream, int *status) { *status = recording; return cudaSuccess; }
API cudaStreamBeginCapture(void *stream, int mode) {
    recorder = pthread_self();
    spoilt = 0;
    recording = 1;
    stub_log("recording", "begins");
    return cudaSuccess;
}
API cudaStreamEndCapture(void *stream, void **graph) {
    stub_log("recording", spoilt ? "spoilt" : "ends");
    recording = 0;
    *graph = spoilt ? NULL : malloc(8);
    return spoilt ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}
API cudaGraphInstantiate(void **executable, void *graph) { *executable = malloc(8); return cudaSuccess; }
API cudaGraphLaunch(void *executable, void *stream) { stub_log("graph launch", ""); return cudaSuccess; }
API cudaGraphDestroy(void *graph) { return cudaSuccess; }
API cudaGraphExecDestroy(void *executable) { return cudaSuccess; }
API cudaEventCreate(void **event) { *event = malloc(8); return cudaSuccess; }
API cudaEventCreateWithFlags(void **event, unsigned flags) { return cudaEventCreate(event); }
API cudaEventDestroy(void *event) { return cudaSuccess; }
API cudaEventElapsedTime(float *milliseconds) { *milliseconds = 1; return cudaSuccess; }
API cudaEventRecord(void *event) { return cudaSuccess; }
API cudaEventRecordWithFlags(void *event) { return cudaSuccess; }
API cudaEventSynchronize(void *event) { return cudaSuccess; }

/* Errors, and what the provider does without where it fails. */

API cudaGetLastError(void) { return cudaSuccess; }
API cudaPeekAtLastError(void) { return cudaSuccess; }
const char *cudaGetErrorString(API error) { return error == cudaErrorStreamCaptureUnsupported ? "while recording" : "stub"; }
const char *cudaGetErrorName(API error) { return "stubError"; }
API cudaGetDriverEntryPointByVersion(const char *name, void **function) { *function = NULL; return cudaErrorInvalidValue; }
API cudaLibraryLoadData(void) { return cudaErrorInvalidValue; }
API cudaLibraryUnload(void) { return cudaSuccess; }
API cudaLibraryGetKernel(void) { return cudaErrorInvalidValue; }
