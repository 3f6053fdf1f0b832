// CUDA's side of device.h: launches, and thin wrappers of PTX instructions. What only sm_90a has traps on other
// architectures, so that one source compiles for all; the host chooses kernels by compute capability.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/error.h"
#include "device/runtime.h"

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")  // for a loop whose unrolling costs registers that another needs

// The kernel's shared memory as one struct, aligned to 1024 bytes as TMA and wgmma want their tiles. Its size, which PTX
// does not tell otherwise, is a comment there, for scripts/ptxas-gate.mjs.
#define SHARED_MEMORY(Type, name)                                      \
  extern __shared__ __align__(1024) unsigned char name##SharedBytes[]; \
  asm volatile("// SHARED_MEMORY %0" ::"n"(sizeof(Type)));             \
  Type& name = *reinterpret_cast<Type*>(name##SharedBytes)

#define LAUNCH(kernel, grid, block, sharedBytes, stream, ...) \
  LAUNCH_CLUSTERS(kernel, 1, grid, block, sharedBytes, stream __VA_OPT__(, ) __VA_ARGS__)
// In clusters of so many neighbouring blocks (sm_90).
#define LAUNCH_CLUSTERS(kernel, clusterBlocks, grid, block, sharedBytes, stream, ...) \
  ::elastiform::cuda::launch(#kernel, kernel, clusterBlocks, grid, block, sharedBytes, \
                             stream __VA_OPT__(, ) __VA_ARGS__)

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ELASTIFORM_SM90A(...) __VA_ARGS__
#else
#define ELASTIFORM_SM90A(...) __trap()
#endif

namespace elastiform::cuda {

// Error(Internal) with CUDA's words unless `status` is success.
void check(cudaError_t status, const char* what);

// The configuration of a launch, for which the kernel may take as much shared memory; `cluster` is part of it.
template <typename... Params>
cudaLaunchConfig_t configuration(const char* name, void (*kernel)(Params...), unsigned clusterBlocks, dim3 grid,
                                 dim3 block, size_t sharedBytes, cudaLaunchAttribute& cluster) {
  constexpr size_t kWithoutOptIn = 48 << 10;
  if (sharedBytes > kWithoutOptIn) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sharedBytes)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = sharedBytes;
  if (clusterBlocks > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {clusterBlocks, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  return config;
}

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), unsigned clusterBlocks, dim3 grid, dim3 block,
            size_t sharedBytes, Stream stream, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "the kernel takes another number of arguments");
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = configuration(name, kernel, clusterBlocks, grid, block, sharedBytes, cluster);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...), name);
}

// Clusters of a kernel that the device runs at the same time: blocks of one need neighbouring multiprocessors.
template <typename... Params>
int clustersAtOnce(void (*kernel)(Params...), unsigned clusterBlocks, dim3 block, size_t sharedBytes) {
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config =
      configuration("clustersAtOnce", kernel, clusterBlocks, clusterBlocks, block, sharedBytes, cluster);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return clusters;
}

// ---- Bits and arithmetic

DEVICE uint32_t asUint(float value) { return __float_as_uint(value); }
DEVICE float asFloat(uint32_t bits) { return __uint_as_float(bits); }
DEVICE int popCount(uint32_t bits) { return __popc(bits); }
DEVICE int leadingZeros(uint32_t bits) { return __clz(static_cast<int>(bits)); }  // 32 for 0
DEVICE int lowestBit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// Relative error about 2^-22; subnormal inputs and results are flushed to zero.
DEVICE float fastExp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float fastExp(float x) { return fastExp2(x * 1.44269504f); }
DEVICE float fastLog2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float fastLog(float x) { return fastLog2(x) * 0.693147181f; }
DEVICE float fastRsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float fastReciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Relative error about 2^-11.
DEVICE float fastTanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Warps. Every lane of `mask`, a literal, gets here; blocks are one-dimensional where laneId and warpId are used.

DEVICE int laneId() { return static_cast<int>(threadIdx.x & 31); }
// The same in all lanes, and known to be so by the compiler.
DEVICE int warpId() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0); }

template <typename T>
DEVICE T shflIdx(T value, int lane, uint32_t mask = ~0u) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  return __shfl_sync(mask, value, lane);
}
template <typename T>
DEVICE T shflXor(T value, int lanes, uint32_t mask = ~0u) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  return __shfl_xor_sync(mask, value, lanes);
}
template <typename T>
DEVICE T shflUp(T value, int delta, uint32_t mask = ~0u) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  return __shfl_up_sync(mask, value, delta);
}
template <typename T>
DEVICE T shflDown(T value, int delta, uint32_t mask = ~0u) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  return __shfl_down_sync(mask, value, delta);
}

DEVICE uint32_t ballot(bool predicate, uint32_t mask = ~0u) { return __ballot_sync(mask, predicate); }
DEVICE uint32_t matchAny(uint32_t value, uint32_t mask = ~0u) { return __match_any_sync(mask, value); }
DEVICE bool any(bool predicate, uint32_t mask = ~0u) { return __any_sync(mask, predicate) != 0; }
DEVICE bool all(bool predicate, uint32_t mask = ~0u) { return __all_sync(mask, predicate) != 0; }
DEVICE void syncWarp(uint32_t mask = ~0u) { __syncwarp(mask); }

// ---- Blocks

DEVICE void syncThreads() { __syncthreads(); }
// Barriers 1 to 15 for `threads` threads, whole warps of them.
DEVICE void barrierSync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void barrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The place of this block in its cluster, and a barrier for all threads of it. No block exits while others may still
// reach its shared memory.
DEVICE int clusterRank() {
  uint32_t rank = 0;
  ELASTIFORM_SM90A(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return static_cast<int>(rank);
}
DEVICE void clusterSync() {
  ELASTIFORM_SM90A(asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" :: : "memory"));
}
DEVICE void threadFence() { __threadfence(); }
DEVICE void threadFenceBlock() { __threadfence_block(); }

// ---- Memory

// Within the block's shared memory, or as far as 1024 bytes matter.
DEVICE uint32_t sharedAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// One access of 1, 2, 4, 8 or 16 bytes, aligned to as many: of the pointer's type, or of a vector type that is named.
template <typename V>
DEVICE V ldGlobal(const void* p) {
  static_assert(sizeof(V) <= 16 && (sizeof(V) & (sizeof(V) - 1)) == 0, "accesses of 1, 2, 4, 8 or 16 bytes");
  return *static_cast<const V*>(__builtin_assume_aligned(p, sizeof(V)));
}
template <typename V>
DEVICE V ldGlobal(const V* p) {
  return ldGlobal<V>(static_cast<const void*>(p));
}
// For data read once: leaves the L1 cache to others.
template <typename V>
DEVICE V ldStream(const void* p) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "vectors of 4, 8 or 16 bytes");
  union {
    V value;
    uint32_t words[sizeof(V) / 4];
  } u;
  if constexpr (sizeof(V) == 16) {
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3])
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
                 : "=r"(u.words[0]), "=r"(u.words[1])
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
  } else {
    asm volatile("ld.global.L1::no_allocate.b32 %0, [%1];"
                 : "=r"(u.words[0])
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
  }
  return u.value;
}
// Brings the 128 bytes that p lies in to the second-level cache.
DEVICE void prefetchGlobal(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)) : "memory");
}
template <typename V>
DEVICE void stGlobal(void* p, const V& value) {
  static_assert(sizeof(V) <= 16 && (sizeof(V) & (sizeof(V) - 1)) == 0, "accesses of 1, 2, 4, 8 or 16 bytes");
  *static_cast<V*>(__builtin_assume_aligned(p, sizeof(V))) = value;
}
// The same for shared memory, of 4, 8 or 16 bytes.
template <typename V>
DEVICE V ldShared(const void* p) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "vectors of 4, 8 or 16 bytes");
  return ldGlobal<V>(p);
}
template <typename V>
DEVICE void stShared(void* p, const V& value) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "vectors of 4, 8 or 16 bytes");
  stGlobal(p, value);
}

// On integers, in global or shared memory; each returns the value before. There are none on floats: results would
// depend on timing.
template <typename T>
DEVICE T atomicAdd(T* p, T value) {
  static_assert(static_cast<T>(0.5f) == 0, "integers only");
  return ::atomicAdd(p, value);
}
template <typename T>
DEVICE T atomicMax(T* p, T value) {
  static_assert(static_cast<T>(0.5f) == 0, "integers only");
  return ::atomicMax(p, value);
}
template <typename T>
DEVICE T atomicCas(T* p, T compare, T value) {
  return ::atomicCAS(p, compare, value);
}

// ---- Matrices of 8x8 16-bit elements, and tensor cores of a warp

// N = 1, 2 or 4 matrices; lanes 8*m to 8*m+7 pass the addresses of the rows (16 bytes each) of matrix m. Lane l gets
// elements 2*(l%4) and +1 of row l/4; with Trans, of column l/4.
template <int N>
DEVICE void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(sharedAddress(row))
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(sharedAddress(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(sharedAddress(row))
                 : "memory");
  }
}
template <int N>
DEVICE void ldmatrixTrans(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(sharedAddress(row))
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(sharedAddress(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(sharedAddress(row))
                 : "memory");
  }
}
// The reverse, for N = 1, 2 or 4; sm_90.
template <int N>
DEVICE void stmatrix(void* row, const uint32_t (&r)[N]) {
  static_assert(N == 1 || N == 2 || N == 4);
  if constexpr (N == 1) {
    ELASTIFORM_SM90A(asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(sharedAddress(row)),
                                  "r"(r[0]) : "memory"));
  } else if constexpr (N == 2) {
    ELASTIFORM_SM90A(asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(sharedAddress(row)),
                                  "r"(r[0]), "r"(r[1]) : "memory"));
  } else {
    ELASTIFORM_SM90A(
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(sharedAddress(row)),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
  }
}
template <int N>
DEVICE void stmatrixTrans(void* row, const uint32_t (&r)[N]) {
  static_assert(N == 1 || N == 2 || N == 4);
  if constexpr (N == 1) {
    ELASTIFORM_SM90A(asm volatile(
        "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(sharedAddress(row)), "r"(r[0]) : "memory"));
  } else if constexpr (N == 2) {
    ELASTIFORM_SM90A(
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(sharedAddress(row)),
                     "r"(r[0]), "r"(r[1]) : "memory"));
  } else {
    ELASTIFORM_SM90A(
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(sharedAddress(row)),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
  }
}

// d += a b: a is 16x16 (row major), b 16x8 (column major), d 16x8 in f32. In the layout of ldmatrix, a is the quarters
// top left, bottom left, top right, bottom right; b the upper and the lower half of k; lane l holds d[l/4][2*(l%4)],
// its right neighbour, and the same two of row l/4 + 8.
DEVICE void mmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same for f32 operands rounded to tf32 (the low 13 bits are ignored): a is 16x8, b 8x8, an element a register.
// Lane l holds a[l/4][l%4], row + 8, column + 4, both; b[l%4][l/4] and b[l%4 + 4][l/4].
DEVICE void mmaTf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- cp.async: 16, 8 or 4 bytes, both sides aligned to as many; without the predicate zeros are written and `global`
// is not read, but must be a valid pointer.

DEVICE void cpAsync16(void* shared, const void* global, bool predicate = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(sharedAddress(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(predicate ? 16 : 0)
               : "memory");
}
DEVICE void cpAsync8(void* shared, const void* global, bool predicate = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(sharedAddress(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(predicate ? 8 : 0)
               : "memory");
}
DEVICE void cpAsync4(void* shared, const void* global, bool predicate = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(sharedAddress(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(predicate ? 4 : 0)
               : "memory");
}
DEVICE void cpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the N newest groups of this thread are in flight; other threads' data needs a barrier as well.
template <int N>
DEVICE void cpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- mbarriers (in shared memory, aligned to 8). A phase ends when `count` arrivals and all announced bytes are in.

DEVICE void mbarrierInit(Mbarrier& barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(sharedAddress(&barrier)), "r"(count) : "memory");
}
DEVICE void mbarrierInvalidate(Mbarrier& barrier) {
  asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(sharedAddress(&barrier)) : "memory");
}
// After initialising, before the syncThreads that lets others use the barriers.
DEVICE void fenceMbarrierInit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __threadfence_block();
#endif
}
DEVICE void mbarrierArrive(Mbarrier& barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(sharedAddress(&barrier))
               : "memory");
}
// At the barrier that lies at this place in block `rank` of the cluster. It says that what wgmma or this block read is
// free; ordinary writes become visible to other blocks by clusterSync.
DEVICE void mbarrierArriveAt(Mbarrier& barrier, int rank) {
  ELASTIFORM_SM90A(asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(sharedAddress(&barrier)),
      "r"(rank) : "memory"));
}
DEVICE void mbarrierExpectTx(Mbarrier& barrier, uint32_t bytes) {
  ELASTIFORM_SM90A(
      asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(sharedAddress(&barrier)),
                   "r"(bytes) : "memory"));
}
DEVICE void mbarrierArriveExpectTx(Mbarrier& barrier, uint32_t bytes) {
  ELASTIFORM_SM90A(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(sharedAddress(&barrier)),
                                "r"(bytes) : "memory"));
}
// Until the phase of this parity is over; the first phase has parity 0, so a wait for parity 1 passes at first.
DEVICE void mbarrierWait(Mbarrier& barrier, uint32_t parity) {
  uint32_t over;
  do {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(sharedAddress(&barrier)), "r"(parity)
                 : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(sharedAddress(&barrier)), "r"(parity)
                 : "memory");
#endif
  } while (!over);
}
// This thread's cp.async so far arrive once when they have landed; `count` includes that arrival (noinc).
DEVICE void cpAsyncArrive(Mbarrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(sharedAddress(&barrier)) : "memory");
}

// ---- TMA (sm_90): one thread moves a box between a matrix and a tile in shared memory aligned to 1024 bytes

DEVICE void tmaPrefetch(const TensorMap& map) {
  ELASTIFORM_SM90A(asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"));
}
// Counts the box's bytes at the barrier, those outside the matrix (zeros) included.
DEVICE void tmaLoad2d(void* shared, const TensorMap& map, Mbarrier& barrier, int column, int row) {
  ELASTIFORM_SM90A(asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(sharedAddress(shared)),
      "l"(&map), "r"(sharedAddress(&barrier)), "r"(column), "r"(row) : "memory"));
}
// The same for the blocks of the cluster whose bits are set: to this place in the shared memory of each, its bytes
// counted at the barrier there.
DEVICE void tmaLoad2dMulticast(void* shared, const TensorMap& map, Mbarrier& barrier, int column, int row,
                               uint16_t ranks) {
  ELASTIFORM_SM90A(asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(sharedAddress(shared)),
      "l"(&map), "r"(sharedAddress(&barrier)), "r"(column), "r"(row), "h"(ranks) : "memory"));
}
// After fenceProxyAsync by the threads that wrote the tile, and a barrier among them.
DEVICE void tmaStore2d(const TensorMap& map, const void* shared, int column, int row) {
  ELASTIFORM_SM90A(
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                   "r"(sharedAddress(shared)), "r"(column), "r"(row) : "memory"));
}
DEVICE void bulkCommit() { ELASTIFORM_SM90A(asm volatile("cp.async.bulk.commit_group;" :: : "memory")); }
// Until at most the N newest groups of stores still read shared memory.
template <int N>
DEVICE void bulkWaitRead() {
  ELASTIFORM_SM90A(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"));
}
// Until at most the N newest groups of stores are not yet written.
template <int N>
DEVICE void bulkWait() {
  ELASTIFORM_SM90A(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"));
}
// Makes this thread's ordinary and cp.async writes to shared memory visible to TMA and wgmma.
DEVICE void fenceProxyAsync() { ELASTIFORM_SM90A(asm volatile("fence.proxy.async.shared::cta;" :: : "memory")); }

// ---- wgmma (sm_90a): d = a b (+ d) for 64 x N x 16, issued by the four warps of a warpgroup. R = N / 2 registers hold
// this lane's part of d: warp w has rows 16*w to 16*w+15, of which 8 columns j lie in d[4*j .. 4*j+3] as mmaBf16's d.

enum class Major { K, MN };

// Operands are tiles with the 128-byte swizzle. K-major: rows of 64 elements along k, groups of 8 rows 1024 bytes
// apart. MN-major: rows of 64 elements along m or n, one per k, the next 64 elements `leadingBytes` on.
DEVICE uint64_t wgmmaDescriptor(const void* tile, int leadingBytes, int strideBytes) {
  return uint64_t{1} << 62 | uint64_t{static_cast<uint32_t>(strideBytes) >> 4} << 32 |
         uint64_t{static_cast<uint32_t>(leadingBytes) >> 4} << 16 | (sharedAddress(tile) & 0x3ffff) >> 4;
}
DEVICE uint64_t descriptorK(const void* tile) { return wgmmaDescriptor(tile, 16, 1024); }
DEVICE uint64_t descriptorMN(const void* tile, int leadingBytes) { return wgmmaDescriptor(tile, leadingBytes, 1024); }
// `bytes` further along k within the rows of 128 bytes: 32 for the next 16 elements.
DEVICE uint64_t descriptorAdvance(uint64_t descriptor, int bytes) {
  return descriptor + (static_cast<uint32_t>(bytes) >> 4);
}

// Before the first wgmma, and again after registers of d or a were touched.
DEVICE void wgmmaFence() { ELASTIFORM_SM90A(asm volatile("wgmma.fence.sync.aligned;" :: : "memory")); }
DEVICE void wgmmaCommit() { ELASTIFORM_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory")); }
// Until at most the N newest groups are in flight. The accumulators are named so that nothing reads them earlier.
template <int N, int... R>
DEVICE void wgmmaWait(float (&... d)[R]) {
  ELASTIFORM_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"));
  const auto pin = [](auto& values) {
    UNROLL
    for (float& value : values) asm volatile("" : "+f"(value)::"memory");
  };
  (pin(d), ...);
}

#define ELASTIFORM_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ELASTIFORM_D32(i)                                                                                     \
  ELASTIFORM_D4(i), ELASTIFORM_D4(i + 4), ELASTIFORM_D4(i + 8), ELASTIFORM_D4(i + 12), ELASTIFORM_D4(i + 16), \
      ELASTIFORM_D4(i + 20), ELASTIFORM_D4(i + 24), ELASTIFORM_D4(i + 28)
#define ELASTIFORM_R32                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ELASTIFORM_R64                                                                                               \
  ELASTIFORM_R32                                                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ELASTIFORM_R128                                                                                              \
  ELASTIFORM_R64                                                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
  "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "     \
  "%125, %126, %127"
// The numbers of the operands after the accumulators: a, b, whether d is added to, whether b is MN-major.
#define ELASTIFORM_WGMMA_SS(n, registers, a, b, add, trans, ...)                                \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " add ", 0; wgmma.mma_async.sync.aligned.m64n" n \
               "k16.f32.bf16.bf16 {" registers "}, " a ", " b ", p, 1, 1, 0, " trans "; }"      \
               : __VA_ARGS__                                                                    \
               : "l"(descriptorA), "l"(descriptorB), "r"(static_cast<int>(accumulate)), "n"(B == Major::MN ? 1 : 0))
#define ELASTIFORM_WGMMA_RS(n, registers, a, b, add, trans, ...)                                               \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " add ", 0; wgmma.mma_async.sync.aligned.m64n" n                \
               "k16.f32.bf16.bf16 {" registers "}, {" a "}, " b ", p, 1, 1, " trans "; }"                      \
               : __VA_ARGS__                                                                                   \
               : "r"(fragmentA[0]), "r"(fragmentA[1]), "r"(fragmentA[2]), "r"(fragmentA[3]), "l"(descriptorB), \
                 "r"(static_cast<int>(accumulate)), "n"(B == Major::MN ? 1 : 0))

// Both operands in shared memory, a K-major.
template <Major B = Major::K, int R>
DEVICE void wgmmaBf16(float (&d)[R], uint64_t descriptorA, uint64_t descriptorB, bool accumulate) {
  static_assert(R == 32 || R == 64 || R == 128, "N is 64, 128 or 256");
  if constexpr (R == 32) {
    ELASTIFORM_SM90A(ELASTIFORM_WGMMA_SS("64", ELASTIFORM_R32, "%32", "%33", "%34", "%35", ELASTIFORM_D32(0)));
  } else if constexpr (R == 64) {
    ELASTIFORM_SM90A(
        ELASTIFORM_WGMMA_SS("128", ELASTIFORM_R64, "%64", "%65", "%66", "%67", ELASTIFORM_D32(0), ELASTIFORM_D32(32)));
  } else {
    ELASTIFORM_SM90A(ELASTIFORM_WGMMA_SS("256", ELASTIFORM_R128, "%128", "%129", "%130", "%131", ELASTIFORM_D32(0),
                                         ELASTIFORM_D32(32), ELASTIFORM_D32(64), ELASTIFORM_D32(96)));
  }
}
// a in registers: the 16 rows of this warp as in mmaBf16, untouched until the wait.
template <Major B = Major::K, int R>
DEVICE void wgmmaBf16(float (&d)[R], const uint32_t (&fragmentA)[4], uint64_t descriptorB, bool accumulate) {
  static_assert(R == 32 || R == 64 || R == 128, "N is 64, 128 or 256");
  if constexpr (R == 32) {
    ELASTIFORM_SM90A(
        ELASTIFORM_WGMMA_RS("64", ELASTIFORM_R32, "%32, %33, %34, %35", "%36", "%37", "%38", ELASTIFORM_D32(0)));
  } else if constexpr (R == 64) {
    ELASTIFORM_SM90A(ELASTIFORM_WGMMA_RS("128", ELASTIFORM_R64, "%64, %65, %66, %67", "%68", "%69", "%70",
                                         ELASTIFORM_D32(0), ELASTIFORM_D32(32)));
  } else {
    ELASTIFORM_SM90A(ELASTIFORM_WGMMA_RS("256", ELASTIFORM_R128, "%128, %129, %130, %131", "%132", "%133", "%134",
                                         ELASTIFORM_D32(0), ELASTIFORM_D32(32), ELASTIFORM_D32(64),
                                         ELASTIFORM_D32(96)));
  }
}
#undef ELASTIFORM_WGMMA_SS
#undef ELASTIFORM_WGMMA_RS
#undef ELASTIFORM_R128
#undef ELASTIFORM_R64
#undef ELASTIFORM_R32
#undef ELASTIFORM_D32
#undef ELASTIFORM_D4

// Registers per thread from here on, in the whole warpgroup; the sum over warpgroups stays within what the launch gave
// them: 504 for three, each of which begins with 168.
template <int N>
DEVICE void registersDecrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  ELASTIFORM_SM90A(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)));
}
template <int N>
DEVICE void registersIncrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  ELASTIFORM_SM90A(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)));
}

}  // namespace elastiform::cuda
