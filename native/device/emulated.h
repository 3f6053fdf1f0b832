// The wrappers of ptx.h executed on the CPU: the same names and signatures over the executor. Kernels include
// device/device.h. A trailing Site parameter is the caller's place, for reports; callers leave it out.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>

#include "device/executor.h"
#include "device/runtime.h"

// CUDA's keywords. There is no __shared__: a kernel's shared memory is one struct, see SHARED_MEMORY.
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define DEVICE inline
#define UNROLL
#define ROLLED
#define threadIdx (::elastiform::simt::current->index)
#define blockIdx (::elastiform::simt::current->block->index)
#define blockDim (::elastiform::simt::current->block->dim)
#define gridDim (::elastiform::simt::current->block->grid)

#define SHARED_MEMORY(Type, name) Type& name = *reinterpret_cast<Type*>(::elastiform::simt::sharedMemory(sizeof(Type)))

#define LAUNCH(kernel, grid, block, sharedBytes, stream, ...) \
  LAUNCH_CLUSTERS(kernel, 1, grid, block, sharedBytes, stream __VA_OPT__(, ) __VA_ARGS__)
#define LAUNCH_CLUSTERS(kernel, clusterBlocks, grid, block, sharedBytes, stream, ...) \
  ::elastiform::simt::launch(#kernel, kernel, clusterBlocks, grid, block, sharedBytes, \
                             stream __VA_OPT__(, ) __VA_ARGS__)

namespace elastiform::simt {

using std::max;
using std::min;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

void* sharedMemory(size_t bytes);

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), unsigned clusterBlocks, dim3 grid, dim3 block,
            size_t sharedBytes, Stream stream, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "the kernel takes another number of arguments");
  if (current) report("launches %s from a kernel", name);
  auto bound = std::make_shared<const std::tuple<std::decay_t<Params>...>>(std::forward<Args>(args)...);
  enqueue(stream,
          [=] { runKernel(name, grid, block, clusterBlocks, sharedBytes, [&] { std::apply(kernel, *bound); }); });
}

template <typename... Params>
int clustersAtOnce(void (*)(Params...), unsigned clusterBlocks, dim3, size_t) {
  return deviceProperties(0).multiprocessors / static_cast<int>(clusterBlocks);
}

// ---- Bits and arithmetic

inline uint32_t asUint(float value) { return std::bit_cast<uint32_t>(value); }
inline float asFloat(uint32_t bits) { return std::bit_cast<float>(bits); }
inline int popCount(uint32_t bits) { return std::popcount(bits); }
inline int leadingZeros(uint32_t bits) { return std::countl_zero(bits); }  // 32 for 0
inline int lowestBit(uint32_t bits) { return bits ? std::countr_zero(bits) : -1; }

// The approximations flush subnormal inputs and results to zero, as ptx.h's do.
inline float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.f, value) : value; }
inline float fastExp2(float x) { return flushed(std::exp2(flushed(x))); }
inline float fastExp(float x) { return fastExp2(x * 1.44269504f); }
inline float fastLog2(float x) { return std::log2(flushed(x)); }
inline float fastLog(float x) { return fastLog2(x) * 0.693147181f; }
inline float fastRsqrt(float x) { return 1.f / std::sqrt(flushed(x)); }
inline float fastReciprocal(float x) { return flushed(1.f / flushed(x)); }
inline float fastTanh(float x) { return std::tanh(x); }

// ---- Warps

inline int laneId() { return current->lane; }
inline int warpId() { return current->warp; }

uint32_t shuffle(const char* name, uint32_t mask, uint32_t value, int source, const Site& site);

template <typename T>
T shuffled(const char* name, uint32_t mask, T value, int source, const Site& site) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  return std::bit_cast<T>(shuffle(name, mask, std::bit_cast<uint32_t>(value), source, site));
}
template <typename T>
T shflIdx(T value, int lane, uint32_t mask = ~0u, Site site = Site::current()) {
  return shuffled("shflIdx", mask, value, lane & 31, site);
}
template <typename T>
T shflXor(T value, int lanes, uint32_t mask = ~0u, Site site = Site::current()) {
  return shuffled("shflXor", mask, value, current->lane ^ lanes, site);
}
template <typename T>
T shflUp(T value, int delta, uint32_t mask = ~0u, Site site = Site::current()) {
  const int lane = current->lane;
  return shuffled("shflUp", mask, value, lane >= delta ? lane - delta : lane, site);
}
template <typename T>
T shflDown(T value, int delta, uint32_t mask = ~0u, Site site = Site::current()) {
  const int lane = current->lane;
  return shuffled("shflDown", mask, value, lane + delta < 32 ? lane + delta : lane, site);
}

uint32_t ballot(bool predicate, uint32_t mask = ~0u, Site site = Site::current());
uint32_t matchAny(uint32_t value, uint32_t mask = ~0u, Site site = Site::current());
inline bool any(bool predicate, uint32_t mask = ~0u, Site site = Site::current()) {
  return ballot(predicate, mask, site) != 0;
}
inline bool all(bool predicate, uint32_t mask = ~0u, Site site = Site::current()) {
  return ballot(predicate, mask, site) == mask;
}
inline void syncWarp(uint32_t mask = ~0u, Site site = Site::current()) {
  meet("syncWarp", mask, nullptr, nullptr, site);
}

// ---- Blocks

inline void syncThreads(Site site = Site::current()) { barrierWait(0, 0, site); }
inline void barrierSync(int id, int threads, Site site = Site::current()) { barrierWait(id, threads, site); }
// barrierArrive(id, threads) is the executor's.
inline int clusterRank() { return static_cast<int>(current->block->rank); }
inline void clusterSync(Site site = Site::current()) { clusterWait(site); }
inline void threadFence() {}
inline void threadFenceBlock() {}

// ---- Memory

inline uint32_t sharedAddress(const void* p) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)); }

template <typename V>
constexpr void checkVector() {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "vectors of 4, 8 or 16 bytes");
}
template <typename V>
V loaded(const void* p) {
  V value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <typename V>
V ldGlobal(const void* p) {
  static_assert(sizeof(V) <= 16 && std::has_single_bit(sizeof(V)), "accesses of 1, 2, 4, 8 or 16 bytes");
  checkGlobal(p, sizeof(V), "ldGlobal");
  return loaded<V>(p);
}
template <typename V>
V ldGlobal(const V* p) {
  return ldGlobal<V>(static_cast<const void*>(p));
}
template <typename V>
V ldStream(const void* p) {
  checkVector<V>();
  checkGlobal(p, sizeof(V), "ldStream");
  return loaded<V>(p);
}
inline void prefetchGlobal(const void* p) {
  checkGlobal(p, 1, "prefetchGlobal");
  ++work().prefetches;
}
template <typename V>
void stGlobal(void* p, const V& value) {
  static_assert(sizeof(V) <= 16 && std::has_single_bit(sizeof(V)), "accesses of 1, 2, 4, 8 or 16 bytes");
  checkGlobal(p, sizeof(V), "stGlobal");
  std::memcpy(p, &value, sizeof value);
}
template <typename V>
V ldShared(const void* p, Site site = Site::current()) {
  checkVector<V>();
  noteSharedAccess(p, sizeof(V), site);
  return loaded<V>(p);
}
template <typename V>
void stShared(void* p, const V& value, Site site = Site::current()) {
  checkVector<V>();
  noteSharedAccess(p, sizeof(V), site);
  std::memcpy(p, &value, sizeof value);
}

// Each returns the value before. A compare-and-swap lets other threads run, so that it may be polled.
template <typename T>
T atomicAdd(T* p, T value) {
  static_assert(std::is_integral_v<T>, "float atomics make results depend on timing");
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicMax(T* p, T value) {
  static_assert(std::is_integral_v<T>);
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(p, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <typename T>
T atomicCas(T* p, T compare, T value) {
  static_assert(std::is_integral_v<T>);
  pollPause();
  __atomic_compare_exchange_n(p, &compare, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return compare;
}

// ---- Matrices of 8x8 16-bit elements, and tensor cores of a warp

void moveMatrices(const char* name, bool load, bool transposed, int count, uint32_t* registers, const void* row,
                  const Site& site);

template <int N>
void ldmatrix(uint32_t (&r)[N], const void* row, Site site = Site::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
  moveMatrices("ldmatrix", true, false, N, r, row, site);
}
template <int N>
void ldmatrixTrans(uint32_t (&r)[N], const void* row, Site site = Site::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
  moveMatrices("ldmatrixTrans", true, true, N, r, row, site);
}
template <int N>
void stmatrix(void* row, const uint32_t (&r)[N], Site site = Site::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
  moveMatrices("stmatrix", false, false, N, const_cast<uint32_t*>(r), row, site);
}
template <int N>
void stmatrixTrans(void* row, const uint32_t (&r)[N], Site site = Site::current()) {
  static_assert(N == 1 || N == 2 || N == 4);
  moveMatrices("stmatrixTrans", false, true, N, const_cast<uint32_t*>(r), row, site);
}

void mmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current());
void mmaTf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current());

// ---- cp.async

void cpAsync(void* shared, const void* global, uint32_t bytes, bool predicate);
inline void cpAsync16(void* shared, const void* global, bool predicate = true) {
  cpAsync(shared, global, 16, predicate);
}
inline void cpAsync8(void* shared, const void* global, bool predicate = true) { cpAsync(shared, global, 8, predicate); }
inline void cpAsync4(void* shared, const void* global, bool predicate = true) { cpAsync(shared, global, 4, predicate); }
inline void cpAsyncCommit() { current->copies.commit(); }
void finishCopies(int pending);
template <int N>
void cpAsyncWait() {
  finishCopies(N);
}

// ---- mbarriers

void mbarrierInit(Mbarrier& barrier, int count);
void mbarrierInvalidate(Mbarrier& barrier);
inline void fenceMbarrierInit() {}
void mbarrierArrive(Mbarrier& barrier);
void mbarrierArriveAt(Mbarrier& barrier, int rank);
void mbarrierExpectTx(Mbarrier& barrier, uint32_t bytes);
void mbarrierArriveExpectTx(Mbarrier& barrier, uint32_t bytes);
void mbarrierWait(Mbarrier& barrier, uint32_t parity, Site site = Site::current());
void cpAsyncArrive(Mbarrier& barrier);

// ---- TMA

inline void tmaPrefetch(const TensorMap&) {}
void tmaLoad2d(void* shared, const TensorMap& map, Mbarrier& barrier, int column, int row);
void tmaLoad2dMulticast(void* shared, const TensorMap& map, Mbarrier& barrier, int column, int row, uint16_t ranks);
void tmaStore2d(const TensorMap& map, const void* shared, int column, int row);
inline void bulkCommit() { current->stores.commit(); }
void finishStores(int pending);
template <int N>
void bulkWaitRead() {
  finishStores(N);
}
template <int N>
void bulkWait() {
  finishStores(N);
}
inline void fenceProxyAsync() {}

// ---- wgmma

enum class Major { K, MN };

uint64_t wgmmaDescriptor(const void* tile, int leadingBytes, int strideBytes);
void issueWgmma(int n, Major majorB, float* d, const uint32_t* fragment, uint64_t a, uint64_t b, bool accumulate,
                const Site& site);
void wgmmaFence(Site site = Site::current());
void wgmmaCommit(Site site = Site::current());
void finishWgmma(int pending, const Site& site);

inline uint64_t descriptorK(const void* tile) { return wgmmaDescriptor(tile, 16, 1024); }
inline uint64_t descriptorMN(const void* tile, int leadingBytes) { return wgmmaDescriptor(tile, leadingBytes, 1024); }
inline uint64_t descriptorAdvance(uint64_t descriptor, int bytes) {
  return descriptor + (static_cast<uint32_t>(bytes) >> 4);
}

template <Major B = Major::K, int R>
void wgmmaBf16(float (&d)[R], uint64_t a, uint64_t b, bool accumulate, Site site = Site::current()) {
  static_assert(R == 32 || R == 64 || R == 128, "N is 64, 128 or 256");
  issueWgmma(2 * R, B, d, nullptr, a, b, accumulate, site);
}
template <Major B = Major::K, int R>
void wgmmaBf16(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate, Site site = Site::current()) {
  static_assert(R == 32 || R == 64 || R == 128, "N is 64, 128 or 256");
  issueWgmma(2 * R, B, d, a, 0, b, accumulate, site);
}
// Accumulators are named so that nothing reads them before the wait.
template <int N, int... R>
void wgmmaWait([[maybe_unused]] float (&... d)[R]) {
  finishWgmma(N, Site{});
}

template <int N>
void registersDecrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}
template <int N>
void registersIncrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}

}  // namespace elastiform::simt
