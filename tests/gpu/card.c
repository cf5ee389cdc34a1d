/* A CUDA runtime, driver and cuBLAS with one GPU that takes every order and computes nothing.

   Loaded before the real ones, it lets torch allocate, trace, compile and launch for a card that is not there. Memory is
   address space that nobody backs until it is written; copies of up to 64 kB really happen, larger ones do not. Kernels of
   Triton and products are counted. The card is named by FAKE_CARD: "NAME;MAJOR.MINOR;MULTIPROCESSORS;BYTES;SHARED BYTES OF A BLOCK".
*/
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static struct { char name[64]; int major, minor, processors, shared; size_t memory; } card;
static size_t taken;
static const size_t SMALL = 1 << 16;
int card_kernels, card_products;

__attribute__((constructor)) static void read_card(void) {
    const char *text = getenv("FAKE_CARD");
    if (text) sscanf(text, "%63[^;];%d.%d;%d;%zu;%d", card.name, &card.major, &card.minor, &card.processors, &card.memory, &card.shared);
}

static int attribute(int which) {       /* the runtime and the driver number them alike */
    switch (which) {
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return card.shared;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return card.shared + 1024;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrMultiProcessorCount: return card.processors;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return card.minor ? 1536 : 2048;
        case cudaDevAttrComputeCapabilityMajor: return card.major;
        case cudaDevAttrComputeCapabilityMinor: return card.minor;
        case cudaDevAttrClockRate: return 1700000;
        case cudaDevAttrMemoryClockRate: return 2600000;
        case cudaDevAttrGlobalMemoryBusWidth: return 5120;
        case cudaDevAttrL2CacheSize: return 50 << 20;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
        default: return 0;
    }
}

/* ---- what exists */
cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, 0; }
cudaError_t cudaGetDevice(int *n) { return *n = 0, 0; }
cudaError_t cudaDriverGetVersion(int *n) { return *n = CUDART_VERSION, 0; }
cudaError_t cudaRuntimeGetVersion(int *n) { return *n = CUDART_VERSION, 0; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int n) { return *value = attribute(which), 0; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int n) { return strncpy(id, "0000:00:00.0", size), 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -5, 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int n) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, card.name);
    p->major = card.major, p->minor = card.minor, p->totalGlobalMem = card.memory;
    p->multiProcessorCount = card.processors, p->warpSize = 32, p->l2CacheSize = 50 << 20;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = card.shared, p->sharedMemPerMultiprocessor = card.shared + 1024;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int block, size_t shared) { return *n = 1, 0; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t shared, unsigned flags) { return *n = 1, 0; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    int version = 10 * card.major + card.minor;
    a->maxThreadsPerBlock = 1024, a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = version == 89 ? 86 : version;    /* torch brings no kernels for 8.9 */
    return 0;
}

/* ---- memory */
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { return *left = card.memory - taken, *all = card.memory, 0; }
cudaError_t cudaMalloc(void **p, size_t size) {
    if (taken + size > card.memory) return cudaErrorMemoryAllocation;
    *p = mmap(0, size + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) return cudaErrorMemoryAllocation;
    *(size_t *)*p = size;
    *p = (char *)*p + 4096;
    taken += size;
    return 0;
}
cudaError_t cudaFree(void *p) {
    if (!p) return 0;
    void *start = (char *)p - 4096;
    taken -= *(size_t *)start;
    return munmap(start, *(size_t *)start + 4096), 0;
}
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) { return *p = calloc(1, size), 0; }
cudaError_t cudaFreeHost(void *p) { return free(p), 0; }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t s) {
    if (size <= SMALL) memcpy(to, from, size);
    return 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { return cudaMemcpyAsync(to, from, size, kind, 0); }
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s) {
    if (size <= SMALL) memset(p, value, size);
    return 0;
}
cudaError_t cudaMemset(void *p, int value, size_t size) { return cudaMemsetAsync(p, value, size, 0); }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeUnregistered;
    return 0;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int n) { return *pool = 0, 0; }

/* ---- order of work: everything has happened */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return *s = malloc(8), 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return *e = malloc(8), 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { return *ms = 1, 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) { return *status = 0, 0; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *n) { return *status = 0, 0; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { return *priority = 0, 0; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return 0; }

/* ---- the driver, as Triton uses it */
CUresult cuDeviceGet(CUdevice *d, int n) { return *d = 0, 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice d) { return *value = attribute(which), 0; }
CUresult cuDriverGetVersion(int *n) { return *n = CUDA_VERSION, 0; }
CUresult cuCtxGetCurrent(CUcontext *c) { return *c = (CUcontext)1, 0; }
CUresult cuCtxGetDevice(CUdevice *d) { return *d = 0, 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return *c = (CUcontext)1, 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { return *m = malloc(8), 0; }
CUresult cuModuleLoad(CUmodule *m, const char *path) { return *m = malloc(8), 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { return *f = malloc(8), 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "no error: this card is made up", 0; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f) {
    return *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) {
    return which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > card.shared ? CUDA_ERROR_INVALID_VALUE : 0;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr p) { return *(CUdeviceptr *)value = p, 0; }
CUresult cuLaunchKernel(CUfunction f, unsigned a, unsigned b, unsigned c, unsigned x, unsigned y, unsigned z, unsigned shared, CUstream s, void **p, void **q) { return card_kernels++, 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **p, void **q) { return card_kernels++, 0; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status) { return *status = 0, 0; }

int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
    void *ours = dlsym(RTLD_DEFAULT, name);
    *f = ours ? ours : (void *)nothing;
    if (found) *found = cudaDriverEntryPointSuccess;
    return 0;
}

/* ---- cuBLAS: handles that hold nothing, and products */
int cublasCreate_v2(void **handle) { return *handle = malloc(8), 0; }
int cublasLtCreate(void **handle) { return *handle = malloc(8), 0; }
int cublasLtMatmulDescCreate(void **desc, int compute, int scale) { return *desc = malloc(8), 0; }
int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) { return *layout = malloc(8), 0; }
int cublasLtMatmulPreferenceCreate(void **preference) { return *preference = malloc(8), 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0, 0; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *op, void *a, void *b, void *c, void *d, void *preference, int most, void *found, int *count) { return *count = 1, 0; }

#define PRODUCT(name) int name() { return card_products++, 0; }
PRODUCT(cublasSgemm_v2) PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasLtMatmul) PRODUCT(cublasSgemv_v2) PRODUCT(cublasSgemmEx)

#define NOTHING(name) __asm__(".globl " #name "\n.set " #name ", nothing");
NOTHING(cudaLaunchKernel) NOTHING(cudaLaunchKernelExC) NOTHING(__cudaLaunchKernel)
NOTHING(cudaSetDevice) NOTHING(cudaGetLastError) NOTHING(cudaPeekAtLastError) NOTHING(cudaDeviceSynchronize)
NOTHING(cudaStreamQuery) NOTHING(cudaStreamSynchronize) NOTHING(cudaStreamWaitEvent) NOTHING(cudaStreamDestroy)
NOTHING(cudaEventRecord) NOTHING(cudaEventRecordWithFlags) NOTHING(cudaEventQuery) NOTHING(cudaEventSynchronize)
NOTHING(cudaEventDestroy) NOTHING(cudaFuncSetAttribute) NOTHING(cudaHostRegister) NOTHING(cudaHostUnregister)
NOTHING(cudaMemPoolSetAttribute) NOTHING(cudaMemPoolSetAccess) NOTHING(cudaMemPoolTrimTo) NOTHING(cudaLaunchHostFunc)
NOTHING(cudaKernelSetAttributeForDevice) NOTHING(cudaMemPoolGetAttribute) NOTHING(cudaDeviceEnablePeerAccess)
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuModuleUnload) NOTHING(cuFuncSetCacheConfig)
NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuLinkCreate_v2) NOTHING(cuLinkAddData_v2) NOTHING(cuLinkComplete) NOTHING(cuModuleLoadDataEx)
NOTHING(cuLaunchCooperativeKernel) NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor) NOTHING(cuCtxSetLimit)
NOTHING(cuCtxGetLimit)
NOTHING(cublasDestroy_v2) NOTHING(cublasLtDestroy) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2)
NOTHING(cublasSetMathMode) NOTHING(cublasSetPointerMode_v2) NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy) NOTHING(cublasLtMatmulPreferenceSetAttribute)
