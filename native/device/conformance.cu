// Every wrapper of device.h on random operands against plain host code: what the emulation passes, a GPU must pass too.
// Order of sums and last bits differ between the two, so that only floating results have tolerances.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "device/array.h"
#include "device/conformance.h"
#include "device/device.h"

namespace elastiform::ELASTIFORM_DEVICE {
namespace {

std::mt19937 random32(11);

uint32_t randomBits() { return static_cast<uint32_t>(random32()); }
float uniform() { return std::uniform_real_distribution<float>(-1, 1)(random32); }

std::vector<uint32_t> randomWords(size_t count) {
  std::vector<uint32_t> words(count);
  for (uint32_t& word : words) word = randomBits();
  return words;
}
std::vector<bf16> randomBf16(size_t count) {
  std::vector<bf16> values(count);
  for (bf16& value : values) value = toBf16(uniform());
  return values;
}

class Cases {
 public:
  // The error is the number of elements that differ.
  template <typename T>
  void exact(const std::string& name, const std::vector<T>& got, const std::vector<T>& want) {
    double differ = got.size() == want.size() ? 0 : 1;
    for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
      differ += std::memcmp(&got[i], &want[i], sizeof(T)) != 0;
    }
    results.push_back({name, differ, 0});
  }
  // The error is the largest difference over the largest magnitude; NaN for what is not finite.
  void close(const std::string& name, const std::vector<float>& got, const std::vector<double>& want,
             double tolerance) {
    double error = got.size() == want.size() ? 0 : NAN, scale = 0;
    for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
      const double difference = std::fabs(got[i] - want[i]);
      error = difference > error || std::isnan(difference) ? difference : error;
      scale = std::max(scale, std::fabs(want[i]));
    }
    results.push_back({name, error / scale, tolerance});
  }
  // A launch that fails is a failed case, and the others go on.
  template <typename Body>
  void run(const char* name, const Body& body) {
    try {
      body();
    } catch (const Error& error) {
      results.push_back({name, 0, 0, error.what()});
    }
  }

  std::vector<CaseResult> results;
};

// ---- Where shared memory lies

struct alignas(1024) AlignedShared {
  unsigned char tile[1024];
};

// TMA, wgmma and what swizzles for them believe that the struct begins at a multiple of 1024.
__global__ void __launch_bounds__(32) sharedStart(uint32_t* out) {
  SHARED_MEMORY(AlignedShared, s);
  if (threadIdx.x == 0) out[blockIdx.x] = sharedAddress(&s) % 1024;
}

void testSharedStart(Cases& cases) {
  const DeviceArray<uint32_t> out(4);
  LAUNCH(sharedStart, 4, 32, sizeof(AlignedShared), nullptr, out.data());
  cases.exact("start of shared memory", out.download(), std::vector<uint32_t>(4, 0));
}

// ---- Indices

__global__ void __launch_bounds__(128) indices(uint32_t* out) {
  const uint32_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * 128 + thread] = threadIdx.x | threadIdx.y << 8 | threadIdx.z << 16 | block << 24;
}

void testIndices(Cases& cases) {
  const DeviceArray<uint32_t> out(8 * 128);
  LAUNCH(indices, dim3(2, 2, 2), dim3(8, 4, 4), 0, nullptr, out.data());
  std::vector<uint32_t> want;
  for (uint32_t block = 0; block < 8; ++block) {
    for (uint32_t i = 0; i < 128; ++i) want.push_back(i % 8 | i / 8 % 4 << 8 | i / 32 << 16 | block << 24);
  }
  cases.exact("grids and blocks of three dimensions", out.download(), want);
}

// ---- Conversions and arithmetic

__global__ void __launch_bounds__(32) conversions(const uint32_t* in, int count, uint32_t* toBf, uint32_t* toHalf,
                                                  uint32_t* fromBf, uint32_t* fromHalf, uint32_t* packed) {
  for (int i = threadIdx.x; i < count; i += 32) {
    const float value = asFloat(in[i]);
    toBf[i] = toBf16(value).bits;
    toHalf[i] = toF16(value).bits;
    fromBf[i] = asUint(toFloat(bf16{static_cast<uint16_t>(in[i])}));
    fromHalf[i] = asUint(toFloat(f16{static_cast<uint16_t>(in[i])}));
    packed[i] = packBf16(value, asFloat(in[(i + 1) % count]));
  }
}

void testConversions(Cases& cases) {
  std::vector<uint32_t> in = randomWords(2000);
  for (uint32_t special : {0x00000000u, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7f800001u, 0x00000001u,
                           0x3f808000u, 0x3f818000u, 0x7f7fffffu, 0x477fe000u, 0x477fefffu, 0x477ff000u, 0x33000000u,
                           0x33000001u, 0x387fffffu, 0x00008000u, 0x00018000u}) {
    in.push_back(special);
  }
  // Bits 16 to 30 near the range of f16, which random words seldom are.
  for (int i = 0; i < 2000; ++i) in.push_back((randomBits() & 0x807fffffu) | (96 + randomBits() % 50) << 23);
  const int count = static_cast<int>(in.size());
  const DeviceArray<uint32_t> device(in), toBf(count), toHalf(count), fromBf(count), fromHalf(count), packed(count);
  LAUNCH(conversions, 1, 32, 0, nullptr, device.data(), count, toBf.data(), toHalf.data(), fromBf.data(),
         fromHalf.data(), packed.data());
  const auto isNan = [](uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; };
  const auto bf = [&](uint32_t bits) -> uint32_t {
    float value;
    std::memcpy(&value, &bits, 4);
    return isNan(bits) ? 0x7fff : floatToBf16(value);
  };
  std::vector<uint32_t> wantBf, wantHalf, wantFromBf, wantFromHalf, wantPacked, gotFromHalf = fromHalf.download();
  for (int i = 0; i < count; ++i) {
    float value;
    std::memcpy(&value, &in[i], 4);
    wantBf.push_back(bf(in[i]));
    wantHalf.push_back(isNan(in[i]) ? 0x7fff : floatToF16(value));
    wantFromBf.push_back(in[i] << 16);
    const float half = f16ToFloat(static_cast<uint16_t>(in[i]));
    uint32_t bits;
    std::memcpy(&bits, &half, 4);
    // Which NaN a NaN of f16 becomes is not specified.
    wantFromHalf.push_back(isNan(bits) && isNan(gotFromHalf[i]) ? gotFromHalf[i] : bits);
    wantPacked.push_back(bf(in[i]) | bf(in[(i + 1) % count]) << 16);
  }
  cases.exact("toBf16", toBf.download(), wantBf);
  cases.exact("toF16", toHalf.download(), wantHalf);
  cases.exact("toFloat of bf16", fromBf.download(), wantFromBf);
  cases.exact("toFloat of f16", gotFromHalf, wantFromHalf);
  cases.exact("packBf16", packed.download(), wantPacked);
}

constexpr int kFunctions = 7;

__global__ void __launch_bounds__(32) functions(const float* in, int count, float* out, int* bits) {
  for (int i = threadIdx.x; i < count; i += 32) {
    const float x = in[i];
    out[i] = fastExp(x);
    out[count + i] = fastExp2(x);
    out[2 * count + i] = fastLog(fabsf(x));
    out[3 * count + i] = fastLog2(fabsf(x));
    out[4 * count + i] = fastRsqrt(fabsf(x));
    out[5 * count + i] = fastReciprocal(x);
    out[6 * count + i] = fastTanh(x);
    bits[3 * i] = popCount(asUint(x));
    bits[3 * i + 1] = leadingZeros(asUint(x));
    bits[3 * i + 2] = lowestBit(asUint(x));
  }
}

void testFunctions(Cases& cases) {
  std::vector<float> in;
  for (int i = 0; i < 1000; ++i) in.push_back(uniform() * 20);
  for (int i = 0; i < 200; ++i) in.push_back(uniform() * 0.01f);
  const int count = static_cast<int>(in.size());
  const DeviceArray<float> device(in), out(size_t(kFunctions) * count);
  const DeviceArray<int> bits(3 * size_t(count));
  LAUNCH(functions, 1, 32, 0, nullptr, device.data(), count, out.data(), bits.data());
  const std::vector<float> got = out.download();
  const struct {
    const char* name;
    double (*reference)(double);
    double tolerance;
    bool relative;  // to each value; logarithms are near zero where their absolute error is not
  } table[kFunctions] = {{"fastExp", [](double x) { return std::exp(x); }, 4e-6, true},
                         {"fastExp2", [](double x) { return std::exp2(x); }, 1e-6, true},
                         {"fastLog", [](double x) { return std::log(std::fabs(x)); }, 1e-6, false},
                         {"fastLog2", [](double x) { return std::log2(std::fabs(x)); }, 1e-6, false},
                         {"fastRsqrt", [](double x) { return 1 / std::sqrt(std::fabs(x)); }, 1e-6, true},
                         {"fastReciprocal", [](double x) { return 1 / x; }, 1e-6, true},
                         {"fastTanh", [](double x) { return std::tanh(x); }, 1e-3, true}};
  for (int f = 0; f < kFunctions; ++f) {
    std::vector<float> ratio;
    std::vector<double> want;
    for (int i = 0; i < count; ++i) {
      const double reference = table[f].reference(in[i]), value = got[size_t(f) * count + i];
      ratio.push_back(static_cast<float>(table[f].relative ? value / reference : value));
      want.push_back(table[f].relative ? 1 : reference);
    }
    cases.close(table[f].name, ratio, want, table[f].tolerance);
  }
  std::vector<int> want;
  for (float value : in) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    int ones = 0, high = -1, low = -1;
    for (int b = 0; b < 32; ++b) {
      if (!(word >> b & 1)) continue;
      ++ones;
      high = b;
      if (low < 0) low = b;
    }
    want.insert(want.end(), {ones, 31 - high, low});
  }
  cases.exact("popCount, leadingZeros, lowestBit", bits.download(), want);
}

// ---- Warps

constexpr int kWarpResults = 13;

__global__ void __launch_bounds__(32) warpOperations(const uint32_t* in, uint32_t* out) {
  const int lane = laneId();
  const uint32_t value = in[lane];
  uint32_t* to = out + lane * kWarpResults;
  to[0] = shflIdx(value, static_cast<int>(in[32 + lane] % 32));
  to[1] = shflXor(value, 5);
  to[2] = shflUp(value, 3);
  to[3] = shflDown(value, 7);
  to[4] = asUint(shflXor(asFloat(value), 16));
  to[5] = lane < 16 ? shflXor(value, 4, 0x0000ffffu) : shflXor(value, 8, 0xffff0000u);
  to[6] = ballot(value & 1);
  to[7] = lane < 8 ? ballot(value & 2, 0x000000ffu) : ballot(value & 2, 0xffffff00u);
  to[8] = any(value == in[9]) | any(false) << 1;
  to[9] = all(value != in[9] + 1 || true) | all(value & 1) << 1;
  to[10] = matchAny(value & 3);
  to[11] = static_cast<uint32_t>(warpSum(static_cast<int>(value & 0xffff)));
  to[12] = asUint(warpMax(static_cast<float>(value >> 8)));
  syncWarp();
}

void testWarps(Cases& cases) {
  std::vector<uint32_t> in = randomWords(64);
  const DeviceArray<uint32_t> device(in), out(32 * kWarpResults);
  LAUNCH(warpOperations, 1, 32, 0, nullptr, device.data(), out.data());
  uint32_t odd = 0, second = 0, sum = 0;
  float top = 0;
  for (int lane = 0; lane < 32; ++lane) {
    odd |= (in[lane] & 1) << lane;
    second |= (in[lane] >> 1 & 1) << lane;
    sum += in[lane] & 0xffff;
    top = std::max(top, static_cast<float>(in[lane] >> 8));
  }
  uint32_t topBits;
  std::memcpy(&topBits, &top, 4);
  std::vector<uint32_t> want;
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t equal = 0;
    for (int other = 0; other < 32; ++other) equal |= uint32_t((in[other] & 3) == (in[lane] & 3)) << other;
    want.insert(want.end(),
                {in[in[32 + lane] % 32], in[lane ^ 5], in[lane >= 3 ? lane - 3 : lane],
                 in[lane + 7 < 32 ? lane + 7 : lane], in[lane ^ 16], in[lane ^ (lane < 16 ? 4 : 8)], odd,
                 second & (lane < 8 ? 0xffu : 0xffffff00u), 1u, 1u | uint32_t(odd == ~0u) << 1, equal, sum, topBits});
  }
  cases.exact("shuffles, votes, matchAny, warpSum, warpMax", out.download(), want);
}

// ---- Blocks: warps pass values on through shared memory, by the block's barrier and by named ones

struct BarrierShared {
  uint32_t values[128];
};

__global__ void __launch_bounds__(128) barriers(const uint32_t* in, uint32_t* out) {
  SHARED_MEMORY(BarrierShared, s);
  const int tid = threadIdx.x;
  s.values[tid] = in[tid];
  syncThreads();
  const uint32_t mirrored = s.values[127 - tid];
  syncThreads();
  // Warps 0 and 1 fill, 2 and 3 read: full is barrier 1, empty barrier 2.
  uint32_t sum = 0;
  for (int round = 0; round < 5; ++round) {
    if (tid < 64) {
      if (round > 0) barrierSync(2, 128);
      s.values[tid] = in[tid] + round;
      barrierArrive(1, 128);
    } else {
      barrierSync(1, 128);
      sum += s.values[127 - tid] * (round + 1);
      if (round < 4) barrierArrive(2, 128);
    }
  }
  out[tid] = mirrored;
  out[128 + tid] = sum;
}

void testBarriers(Cases& cases) {
  const std::vector<uint32_t> in = randomWords(128);
  const DeviceArray<uint32_t> device(in), out(256);
  LAUNCH(barriers, 1, 128, sizeof(BarrierShared), nullptr, device.data(), out.data());
  std::vector<uint32_t> want(256);
  for (uint32_t tid = 0; tid < 128; ++tid) {
    want[tid] = in[127 - tid];
    for (uint32_t round = 0; tid >= 64 && round < 5; ++round) want[128 + tid] += (in[127 - tid] + round) * (round + 1);
  }
  cases.exact("syncThreads, barrierSync, barrierArrive", out.download(), want);
}

// ---- Memory

struct VectorShared {
  uint4 quads[32];
  uint2 pairs[32];
  uint32_t words[32];
};

__global__ void __launch_bounds__(32) vectors(const uint32_t* in, uint32_t* out) {
  SHARED_MEMORY(VectorShared, s);
  const int lane = laneId();
  stShared(&s.quads[31 - lane], ldGlobal<uint4>(in + lane * 4));
  stShared(&s.pairs[31 - lane], ldGlobal<uint2>(in + lane * 2));
  stShared(&s.words[31 - lane], ldGlobal<uint32_t>(in + lane));
  syncWarp();
  stGlobal(out + lane * 4, ldShared<uint4>(&s.quads[lane]));
  stGlobal(out + 128 + lane * 2, ldShared<uint2>(&s.pairs[lane]));
  stGlobal(out + 192 + lane, ldShared<uint32_t>(&s.words[lane]));
  prefetchGlobal(in + lane * 4);
  stGlobal(out + 224 + lane * 4, ldStream<uint4>(in + lane * 4));
  stGlobal(out + 352 + lane * 2, ldStream<uint2>(in + lane * 2));
  stGlobal(out + 416 + lane, ldStream<uint32_t>(in + lane));
}

void testVectors(Cases& cases) {
  const std::vector<uint32_t> in = randomWords(128);
  const DeviceArray<uint32_t> device(in), out(448);
  LAUNCH(vectors, 1, 32, sizeof(VectorShared), nullptr, device.data(), out.data());
  std::vector<uint32_t> want;
  for (int width : {4, 2, 1}) {
    for (int i = 0; i < 32 * width; ++i) want.push_back(in[(31 - i / width) * width + i % width]);
  }
  for (int width : {4, 2, 1}) want.insert(want.end(), in.begin(), in.begin() + 32 * width);
  cases.exact("vectors of 4, 8 and 16 bytes", out.download(), want);
}

struct AtomicShared {
  int sum;
  unsigned top;
};

__global__ void __launch_bounds__(256)
    atomics(const uint32_t* in, int* sums, unsigned* tops, unsigned long long* chain) {
  SHARED_MEMORY(AtomicShared, s);
  const int tid = threadIdx.x;
  if (tid == 0) s = {0, 0};
  syncThreads();
  atomicAdd(&s.sum, static_cast<int>(in[tid] & 0xff));
  atomicMax(&s.top, in[tid]);
  syncThreads();
  if (tid == 0) {
    atomicAdd(sums, s.sum);
    atomicMax(tops, s.top);
  }
  // A maximum of 64 bits by compare-and-swap.
  const unsigned long long mine = static_cast<unsigned long long>(in[tid]) << 20 | static_cast<unsigned>(tid);
  unsigned long long seen = 0;
  while (seen < mine) {
    const unsigned long long before = atomicCas(chain, seen, mine);
    if (before == seen) break;
    seen = before;
  }
  threadFence();
  threadFenceBlock();
}

void testAtomics(Cases& cases) {
  const std::vector<uint32_t> in = randomWords(256);
  const DeviceArray<uint32_t> device(in);
  const DeviceArray<int> sums(std::vector<int>{5});
  const DeviceArray<unsigned> tops(std::vector<unsigned>{7});
  const DeviceArray<unsigned long long> chain(std::vector<unsigned long long>{0});
  LAUNCH(atomics, 3, 256, sizeof(AtomicShared), nullptr, device.data(), sums.data(), tops.data(), chain.data());
  int sum = 0;
  unsigned long long last = 0;
  for (uint32_t i = 0; i < 256; ++i) {
    sum += in[i] & 0xff;
    last = std::max(last, static_cast<unsigned long long>(in[i]) << 20 | i);
  }
  cases.exact("atomicAdd", sums.download(), {5 + 3 * sum});
  cases.exact("atomicMax", tops.download(), {*std::max_element(in.begin(), in.end())});
  cases.exact("atomicCas", chain.download(), {last});
}

// ---- Matrices of 8x8

constexpr int kMatrixPitch = 24;  // in elements: rows of 16 bytes, 48 bytes apart

struct MatrixShared {
  alignas(16) uint16_t elements[32 * kMatrixPitch];
};

template <int N, bool kTrans>
__global__ void __launch_bounds__(32) loadMatrices(const uint16_t* in, uint32_t* out) {
  SHARED_MEMORY(MatrixShared, s);
  const int lane = laneId();
  for (int i = lane; i < 32 * kMatrixPitch; i += 32) s.elements[i] = in[i];
  syncWarp();
  uint32_t r[N];
  if (kTrans) {
    ldmatrixTrans(r, &s.elements[lane * kMatrixPitch]);
  } else {
    ldmatrix(r, &s.elements[lane * kMatrixPitch]);
  }
  UNROLL
  for (int m = 0; m < N; ++m) out[m * 32 + lane] = r[m];
}

template <int N, bool kTrans>
__global__ void __launch_bounds__(32) storeMatrices(const uint32_t* in, uint16_t* out) {
  SHARED_MEMORY(MatrixShared, s);
  const int lane = laneId();
  for (int i = lane; i < 32 * kMatrixPitch; i += 32) s.elements[i] = 0;
  syncWarp();
  uint32_t r[N];
  UNROLL
  for (int m = 0; m < N; ++m) r[m] = in[m * 32 + lane];
  if (kTrans) {
    stmatrixTrans(&s.elements[lane * kMatrixPitch], r);
  } else {
    stmatrix(&s.elements[lane * kMatrixPitch], r);
  }
  syncWarp();
  for (int i = lane; i < 32 * kMatrixPitch; i += 32) out[i] = s.elements[i];
}

// Where element `e` (0 or 1) of lane `lane` lies in matrix m.
int matrixElement(int m, int lane, int e, bool trans) {
  const int major = lane / 4, minor = lane % 4 * 2 + e;
  return (m * 8 + (trans ? minor : major)) * kMatrixPitch + (trans ? major : minor);
}

template <int N, bool kTrans>
void testMatrices(Cases& cases, bool hopper) {
  const std::string suffix = " x" + std::to_string(N) + (kTrans ? " transposed" : "");
  std::vector<uint16_t> elements(32 * kMatrixPitch);
  for (uint16_t& e : elements) e = static_cast<uint16_t>(randomBits());
  const DeviceArray<uint16_t> in(elements), stored(elements.size());
  const DeviceArray<uint32_t> out(N * 32);
  LAUNCH((loadMatrices<N, kTrans>), 1, 32, sizeof(MatrixShared), nullptr, in.data(), out.data());
  std::vector<uint32_t> want(N * 32);
  for (int m = 0; m < N; ++m) {
    for (int lane = 0; lane < 32; ++lane) {
      want[m * 32 + lane] =
          elements[matrixElement(m, lane, 0, kTrans)] | uint32_t{elements[matrixElement(m, lane, 1, kTrans)]} << 16;
    }
  }
  cases.exact("ldmatrix" + suffix, out.download(), want);
  if (!hopper) return;
  const std::vector<uint32_t> registers = randomWords(N * 32);
  const DeviceArray<uint32_t> source(registers);
  LAUNCH((storeMatrices<N, kTrans>), 1, 32, sizeof(MatrixShared), nullptr, source.data(), stored.data());
  std::vector<uint16_t> wantStored(elements.size());
  for (int m = 0; m < N; ++m) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 2; ++e) {
        wantStored[matrixElement(m, lane, e, kTrans)] = static_cast<uint16_t>(registers[m * 32 + lane] >> 16 * e);
      }
    }
  }
  cases.exact("stmatrix" + suffix, stored.download(), wantStored);
}

// ---- mma.sync

template <bool kTf32>
__global__ void __launch_bounds__(32) multiplyTile(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = laneId();
  uint32_t fragmentA[4], fragmentB[2];
  float sum[4];
  UNROLL
  for (int i = 0; i < 4; ++i) {
    fragmentA[i] = a[lane * 4 + i];
    sum[i] = d[lane * 4 + i];
  }
  UNROLL
  for (int i = 0; i < 2; ++i) fragmentB[i] = b[lane * 2 + i];
  if (kTf32) {
    mmaTf32(sum, fragmentA, fragmentB);
  } else {
    mmaBf16(sum, fragmentA, fragmentB);
  }
  UNROLL
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

// The operands as matrices, spread over lanes by the tables of the PTX ISA (fragments of mma.m16n8k16 and m16n8k8).
template <bool kTf32>
void testMma(Cases& cases) {
  constexpr int K = kTf32 ? 8 : 16;
  float a[16][K], b[K][8], d[16][8];
  for (auto& row : a) {
    for (float& v : row) v = kTf32 ? uniform() : toFloat(toBf16(uniform()));
  }
  for (auto& row : b) {
    for (float& v : row) v = kTf32 ? uniform() : toFloat(toBf16(uniform()));
  }
  for (auto& row : d) {
    for (float& v : row) v = uniform();
  }
  const auto bitsOf = [](float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits;
  };
  std::vector<uint32_t> fragmentA(128), fragmentB(64);
  std::vector<float> sums(128);
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i % 2 ? 8 : 0);
      fragmentA[lane * 4 + i] = kTf32 ? bitsOf(a[row][t + (i / 2 ? 4 : 0)])
                                      : packBf16(a[row][t * 2 + (i / 2 ? 8 : 0)], a[row][t * 2 + 1 + (i / 2 ? 8 : 0)]);
      sums[lane * 4 + i] = d[group + (i / 2 ? 8 : 0)][t * 2 + i % 2];
    }
    for (int i = 0; i < 2; ++i) {
      fragmentB[lane * 2 + i] =
          kTf32 ? bitsOf(b[t + i * 4][group]) : packBf16(b[t * 2 + i * 8][group], b[t * 2 + 1 + i * 8][group]);
    }
  }
  const DeviceArray<uint32_t> deviceA(fragmentA), deviceB(fragmentB);
  const DeviceArray<float> deviceD(sums);
  LAUNCH((multiplyTile<kTf32>), 1, 32, 0, nullptr, deviceA.data(), deviceB.data(), deviceD.data());
  const auto rounded = [&](float v) {
    const uint32_t bits = bitsOf(v) & (kTf32 ? 0xffffe000u : ~0u);
    float value;
    std::memcpy(&value, &bits, 4);
    return static_cast<double>(value);
  };
  std::vector<double> want(128);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i / 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      want[lane * 4 + i] = d[row][column];
      for (int k = 0; k < K; ++k) want[lane * 4 + i] += rounded(a[row][k]) * rounded(b[k][column]);
    }
  }
  cases.close(kTf32 ? "mmaTf32" : "mmaBf16", deviceD.download(), want, 1e-6);
}

// ---- cp.async

struct CopyShared {
  alignas(16) uint32_t words[3][128];
};

__global__ void __launch_bounds__(32) asyncCopies(const uint32_t* in, uint32_t* out) {
  SHARED_MEMORY(CopyShared, s);
  const int lane = laneId();
  const bool wanted = lane % 3 != 0;
  cpAsync16(&s.words[0][lane * 4], in + lane * 4, wanted);
  cpAsyncCommit();
  cpAsync8(&s.words[1][lane * 2], in + 128 + lane * 2, wanted);
  cpAsync4(&s.words[2][lane], in + 192 + lane, wanted);
  cpAsyncCommit();
  cpAsyncWait<1>();
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = s.words[0][lane * 4 + i];
  cpAsyncWait<0>();
  for (int i = 0; i < 2; ++i) out[128 + lane * 2 + i] = s.words[1][lane * 2 + i];
  out[192 + lane] = s.words[2][lane];
}

void testAsyncCopies(Cases& cases) {
  const std::vector<uint32_t> in = randomWords(224);
  const DeviceArray<uint32_t> device(in), out(224);
  LAUNCH(asyncCopies, 1, 32, sizeof(CopyShared), nullptr, device.data(), out.data());
  std::vector<uint32_t> want = in;
  for (int lane = 0; lane < 32; lane += 3) {
    for (int i = 0; i < 4; ++i) want[lane * 4 + i] = 0;
    for (int i = 0; i < 2; ++i) want[128 + lane * 2 + i] = 0;
    want[192 + lane] = 0;
  }
  cases.exact("cpAsync16, cpAsync8, cpAsync4", out.download(), want);
}

// ---- mbarriers: four warps pass a value round, one phase a step; then cp.async arrives

struct MbarrierShared {
  Mbarrier turn, landed;
  uint32_t values[128];
  alignas(16) uint32_t copied[128];
};

__global__ void __launch_bounds__(128) mbarriers(const uint32_t* in, uint32_t* out) {
  SHARED_MEMORY(MbarrierShared, s);
  const int tid = threadIdx.x;
  if (tid == 0) {
    mbarrierInit(s.turn, 128);
    mbarrierInit(s.landed, 32);
    fenceMbarrierInit();
  }
  syncThreads();
  uint32_t value = in[tid];
  for (int round = 0; round < 6; ++round) {
    s.values[tid] = value;
    mbarrierArrive(s.turn);
    mbarrierWait(s.turn, round * 2 & 1);
    value = value * 3 + s.values[(tid + 33) % 128];
    mbarrierArrive(s.turn);
    mbarrierWait(s.turn, (round * 2 + 1) & 1);
  }
  out[tid] = value;
  if (tid < 32) {
    cpAsync16(&s.copied[tid * 4], in + tid * 4);
    cpAsyncArrive(s.landed);
  }
  mbarrierWait(s.landed, 0);
  out[128 + tid] = s.copied[127 - tid];
  syncThreads();
  if (tid == 0) {
    mbarrierInvalidate(s.turn);
    mbarrierInvalidate(s.landed);
    mbarrierInit(s.turn, 1);
    mbarrierArrive(s.turn);
    mbarrierWait(s.turn, 0);
  }
}

void testMbarriers(Cases& cases) {
  const std::vector<uint32_t> in = randomWords(128);
  const DeviceArray<uint32_t> device(in), out(256);
  LAUNCH(mbarriers, 1, 128, sizeof(MbarrierShared), nullptr, device.data(), out.data());
  std::vector<uint32_t> values = in;
  for (int round = 0; round < 6; ++round) {
    const std::vector<uint32_t> before = values;
    for (int tid = 0; tid < 128; ++tid) values[tid] = before[tid] * 3 + before[(tid + 33) % 128];
  }
  for (int tid = 0; tid < 128; ++tid) values.push_back(in[127 - tid]);
  cases.exact("mbarriers and cpAsyncArrive", out.download(), values);
}

// ---- TMA

struct TileShared {
  alignas(1024) unsigned char tile[32 * 128];
  Mbarrier landed;
};

// Loads a box of 32 rows of 128 bytes, writes it out as it lies in shared memory, and stores it at other coordinates.
__global__ void __launch_bounds__(128)
    moveBox(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int column, int row,
            int toColumn, int toRow, unsigned char* out) {
  SHARED_MEMORY(TileShared, s);
  const int tid = threadIdx.x;
  if (tid == 0) {
    tmaPrefetch(from);
    mbarrierInit(s.landed, 1);
    fenceMbarrierInit();
    mbarrierExpectTx(s.landed, 1024);
    mbarrierArriveExpectTx(s.landed, sizeof s.tile - 1024);
    tmaLoad2d(s.tile, from, s.landed, column, row);
  }
  syncThreads();
  mbarrierWait(s.landed, 0);
  for (int i = tid; i < int(sizeof s.tile); i += 128) out[i] = s.tile[i];
  fenceProxyAsync();
  syncThreads();
  if (tid == 0) {
    tmaStore2d(to, s.tile, toColumn, toRow);
    bulkCommit();
    bulkWaitRead<0>();
    bulkWait<0>();
  }
}

void testTma(Cases& cases, DType dtype, Swizzle swizzle, int column, int row) {
  const int element = static_cast<int>(dtypeSize(dtype)), boxColumns = 128 / element, boxRows = 32;
  const int columns = 100, rows = 70, pitch = 416;  // bytes
  std::vector<unsigned char> in(size_t(rows) * pitch), empty(in.size(), 0x5a);
  for (unsigned char& byte : in) byte = static_cast<unsigned char>(randomBits());
  const DeviceArray<unsigned char> device(in), stored(empty), out(boxRows * 128);
  TensorMapDesc desc;
  desc.base = device.data();
  desc.dtype = dtype;
  desc.columns = columns;
  desc.rows = rows;
  desc.rowBytes = pitch;
  desc.boxColumns = boxColumns;
  desc.boxRows = boxRows;
  desc.swizzle = swizzle;
  TensorMapDesc toDesc = desc;
  toDesc.base = stored.data();
  const int toColumn = column - 3, toRow = row + 5;
  LAUNCH(moveBox, 1, 128, sizeof(TileShared), nullptr, encodeTensorMap(desc), encodeTensorMap(toDesc), column, row,
         toColumn, toRow, out.data());
  std::vector<unsigned char> wantTile(boxRows * 128), wantStored = empty;
  for (int r = 0; r < boxRows; ++r) {
    for (int c = 0; c < boxColumns; ++c) {
      for (int b = 0; b < element; ++b) {
        const bool inside = row + r >= 0 && row + r < rows && column + c >= 0 && column + c < columns;
        const unsigned char byte = inside ? in[size_t(row + r) * pitch + (column + c) * element + b] : 0;
        int at = r * 128 + c * element + b;
        if (swizzle == Swizzle::Bytes128) at ^= (r & 7) << 4;
        wantTile[at] = byte;
        if (toRow + r >= 0 && toRow + r < rows && toColumn + c >= 0 && toColumn + c < columns) {
          wantStored[size_t(toRow + r) * pitch + (toColumn + c) * element + b] = byte;
        }
      }
    }
  }
  const std::string suffix = std::string(" of ") + dtypeName(dtype) +
                             (swizzle == Swizzle::None ? "" : " with swizzle") + " at " + std::to_string(column) + "," +
                             std::to_string(row);
  cases.exact("tmaLoad2d" + suffix, out.download(), wantTile);
  cases.exact("tmaStore2d" + suffix, stored.download(), wantStored);
}

// ---- Clusters: two blocks load half a tile each for both, and load again when both have read all of it

constexpr int kClusterRounds = 3, kHalfRows = 16;

struct ClusterShared {
  alignas(1024) unsigned char tile[2][kHalfRows * 128];
  Mbarrier landed, read;
};

__global__ void __launch_bounds__(128)
    shareTiles(const __grid_constant__ TensorMap from, unsigned char* tiles, uint32_t* ranks) {
  SHARED_MEMORY(ClusterShared, s);
  const int tid = threadIdx.x, rank = clusterRank();
  if (tid == 0) {
    ranks[blockIdx.x] = rank;
    mbarrierInit(s.landed, 1);
    mbarrierInit(s.read, 2);
    fenceMbarrierInit();
  }
  clusterSync();
  for (int round = 0; round < kClusterRounds; ++round) {
    if (tid == 0) {
      mbarrierWait(s.read, (round & 1) ^ 1);
      mbarrierArriveExpectTx(s.landed, sizeof s.tile);
      const int row = ((blockIdx.x / 2 * kClusterRounds + round) * 2 + rank) * kHalfRows;
      tmaLoad2dMulticast(s.tile[rank], from, s.landed, 0, row, 3);
    }
    mbarrierWait(s.landed, round & 1);
    unsigned char* to = tiles + (blockIdx.x * kClusterRounds + round) * sizeof s.tile;
    for (int i = tid; i < int(sizeof s.tile); i += 128) to[i] = s.tile[i / sizeof s.tile[0]][i % sizeof s.tile[0]];
    syncThreads();  // the tile has been read
    if (tid < 2) mbarrierArriveAt(s.read, tid);
  }
  clusterSync();  // the other block arrives at this one's barrier no more
}

void testClusters(Cases& cases) {
  constexpr int kBlocks = 4, kRows = kBlocks * kClusterRounds * kHalfRows, kTileBytes = 2 * kHalfRows * 128;
  std::vector<unsigned char> in(kRows * 128), want;
  for (unsigned char& byte : in) byte = static_cast<unsigned char>(randomBits());
  const DeviceArray<unsigned char> device(in), out(kBlocks * kClusterRounds * kTileBytes);
  const DeviceArray<uint32_t> ranks(kBlocks);
  TensorMapDesc desc;
  desc.base = device.data();
  desc.columns = 64;
  desc.rows = kRows;
  desc.rowBytes = 128;
  desc.boxColumns = 64;
  desc.boxRows = kHalfRows;
  LAUNCH_CLUSTERS(shareTiles, 2, kBlocks, 128, sizeof(ClusterShared), nullptr, encodeTensorMap(desc), out.data(),
                  ranks.data());
  for (int block = 0; block < kBlocks; ++block) {
    const int first = block / 2 * kClusterRounds * kTileBytes;
    for (int i = 0; i < kClusterRounds * kTileBytes; ++i) want.push_back(in[first + (i ^ (i >> 7 & 7) << 4)]);
  }
  cases.exact("clusterRank", ranks.download(), {0, 1, 0, 1});
  cases.exact("tmaLoad2dMulticast", out.download(), want);
  cases.exact<uint32_t>("clustersAtOnce", {clustersAtOnce(shareTiles, 2, 128, sizeof(ClusterShared)) > 0}, {1});
}

// ---- wgmma: d = a b^T with a [64, 64] and b [n, 64], or b [64, n] when it is MN-major

template <int N>
struct WgmmaOperands {
  alignas(1024) bf16 a[64 * 64];
  alignas(1024) bf16 b[N * 64];
};

enum class Form { Shared, SharedMN, Registers, RegistersMN };

template <int N, Form kForm>
__global__ void __launch_bounds__(128, 1) multiplyWarpgroup(const bf16* a, const bf16* b, float* d) {
  SHARED_MEMORY(WgmmaOperands<N>, s);
  constexpr bool kMN = kForm == Form::SharedMN || kForm == Form::RegistersMN;
  constexpr bool kRegisters = kForm == Form::Registers || kForm == Form::RegistersMN;
  constexpr Major kMajor = kMN ? Major::MN : Major::K;
  const int tid = threadIdx.x, lane = laneId(), warp = warpId();
  unsigned char *tileA = reinterpret_cast<unsigned char*>(s.a), *tileB = reinterpret_cast<unsigned char*>(s.b);
  for (int i = tid; i < 64 * 8; i += 128) {
    stShared(tileA + swizzle128(i / 8, i % 8), ldGlobal<uint4>(a + i * 8));
  }
  for (int i = tid; i < N * 8; i += 128) {
    // K-major: row i/8 of b. MN-major: 64 columns of b after another, each a tile of 64 rows along k.
    const int row = i / 8 % 64, block = i / 8 / 64;
    const bf16* from = kMN ? b + row * N + block * 64 + i % 8 * 8 : b + i * 8;
    const int to = kMN ? block * 8192 + swizzle128(row, i % 8) : swizzle128(i / 8, i % 8);
    stShared(tileB + to, ldGlobal<uint4>(from));
  }
  fenceProxyAsync();
  syncThreads();
  uint32_t fragment[4][4];
  UNROLL
  for (int k = 0; k < 4; ++k) ldmatrix(fragment[k], tileA + swizzle128(warp * 16 + lane % 16, k * 2 + lane / 16));
  float sum[N / 2];
  UNROLL
  for (int i = 0; i < N / 2; ++i) sum[i] = 1000.f;  // the first product replaces it
  wgmmaFence();
  UNROLL
  for (int k = 0; k < 4; ++k) {
    const uint64_t descriptorA = descriptorAdvance(descriptorK(s.a), k * 32);
    // 16 more of k: 32 bytes within the rows of a K-major tile, 16 rows of an MN-major one.
    const uint64_t descriptorB =
        kMN ? descriptorMN(tileB + k * 16 * 128, 8192) : descriptorAdvance(descriptorK(s.b), k * 32);
    if constexpr (kRegisters) {
      wgmmaBf16<kMajor>(sum, fragment[k], descriptorB, k > 0);
    } else {
      wgmmaBf16<kMajor>(sum, descriptorA, descriptorB, k > 0);
    }
    wgmmaCommit();
  }
  wgmmaWait<0>(sum);
  UNROLL
  for (int i = 0; i < N / 2; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    d[row * N + column] = sum[i];
  }
}

template <int N, Form kForm>
void testWgmma(Cases& cases) {
  constexpr bool kMN = kForm == Form::SharedMN || kForm == Form::RegistersMN;
  constexpr bool kRegisters = kForm == Form::Registers || kForm == Form::RegistersMN;
  const std::vector<bf16> a = randomBf16(64 * 64), b = randomBf16(N * 64);
  const DeviceArray<bf16> deviceA(a), deviceB(b);
  const DeviceArray<float> deviceD(64 * N);
  LAUNCH((multiplyWarpgroup<N, kForm>), 1, 128, sizeof(WgmmaOperands<N>), nullptr, deviceA.data(), deviceB.data(),
         deviceD.data());
  std::vector<double> want(64 * N);
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < 64; ++k) {
        want[m * N + n] += double(toFloat(a[m * 64 + k])) * toFloat(b[kMN ? k * N + n : n * 64 + k]);
      }
    }
  }
  cases.close("wgmma n" + std::to_string(N) + (kRegisters ? ", a in registers" : "") + (kMN ? ", b MN-major" : ""),
              deviceD.download(), want, 1e-5);
}

template <Form kForm>
void testWgmmaSizes(Cases& cases) {
  cases.run("wgmma", [&] { testWgmma<64, kForm>(cases); });
  cases.run("wgmma", [&] { testWgmma<128, kForm>(cases); });
  cases.run("wgmma", [&] { testWgmma<256, kForm>(cases); });
}

}  // namespace

std::vector<CaseResult> runConformance() {
  const bool hopper = deviceProperties(0).computeMajor == 9;
  Cases cases;
  cases.run("start of shared memory", [&] { testSharedStart(cases); });
  cases.run("indices", [&] { testIndices(cases); });
  cases.run("conversions", [&] { testConversions(cases); });
  cases.run("functions", [&] { testFunctions(cases); });
  cases.run("warps", [&] { testWarps(cases); });
  cases.run("barriers", [&] { testBarriers(cases); });
  cases.run("vectors", [&] { testVectors(cases); });
  cases.run("atomics", [&] { testAtomics(cases); });
  cases.run("matrices", [&] {
    testMatrices<1, false>(cases, hopper);
    testMatrices<2, false>(cases, hopper);
    testMatrices<4, false>(cases, hopper);
    testMatrices<1, true>(cases, hopper);
    testMatrices<2, true>(cases, hopper);
    testMatrices<4, true>(cases, hopper);
  });
  cases.run("mmaBf16", [&] { testMma<false>(cases); });
  cases.run("mmaTf32", [&] { testMma<true>(cases); });
  cases.run("cp.async", [&] { testAsyncCopies(cases); });
  cases.run("mbarriers", [&] { testMbarriers(cases); });
  if (hopper) {
    cases.run("TMA", [&] { testTma(cases, DType::BF16, Swizzle::Bytes128, 16, 8); });
    cases.run("TMA", [&] { testTma(cases, DType::BF16, Swizzle::Bytes128, 64, 50); });
    cases.run("TMA", [&] { testTma(cases, DType::BF16, Swizzle::Bytes128, -9, -4); });
    cases.run("TMA", [&] { testTma(cases, DType::F32, Swizzle::None, 81, 60); });
    cases.run("clusters", [&] { testClusters(cases); });
    testWgmmaSizes<Form::Shared>(cases);
    testWgmmaSizes<Form::SharedMN>(cases);
    testWgmmaSizes<Form::Registers>(cases);
    testWgmmaSizes<Form::RegistersMN>(cases);
  }
  return cases.results;
}

}  // namespace elastiform::ELASTIFORM_DEVICE
