// Complete small kernels in the styles that the op library uses, run against references in double on either device: a
// softmax by shuffles, a GEMM by cp.async, ldmatrix and mma.sync, and a warp-specialised GEMM by TMA, mbarriers and
// wgmma, both with gathered rows and a scattering epilogue; and a recording with branches.
#include <cmath>
#include <random>

#include "device/array.h"
#include "device/device.h"
#include "test/device_examples.h"

namespace elastiform::ELASTIFORM_DEVICE {
namespace {

// ---- Softmax of rows, one block a row

constexpr int kSoftmaxThreads = 256;
constexpr int kSoftmaxWarps = kSoftmaxThreads / 32;

struct SoftmaxShared {
  float partial[kSoftmaxWarps];
};

// Combines one value of every thread of the block; all threads get the result.
template <bool kMax>
DEVICE float blockReduce(float value, SoftmaxShared& s) {
  const int lane = laneId(), warp = warpId();
  value = kMax ? warpMax(value) : warpSum(value);
  syncThreads();  // the previous reduction has been read
  if (lane == 0) s.partial[warp] = value;
  syncThreads();  // partial is complete
  const float other = lane < kSoftmaxWarps ? s.partial[lane] : (kMax ? -INFINITY : 0.f);
  return kMax ? warpMax(other) : warpSum(other);
}

__global__ void __launch_bounds__(kSoftmaxThreads, 2) softmaxRows(const float* x, float* y, int columns) {
  SHARED_MEMORY(SoftmaxShared, s);
  const float* in = x + size_t{blockIdx.x} * columns;
  float* out = y + size_t{blockIdx.x} * columns;
  float top = -INFINITY;
  for (int i = threadIdx.x; i < columns; i += kSoftmaxThreads) top = fmaxf(top, ldGlobal(in + i));
  top = blockReduce<true>(top, s);
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += kSoftmaxThreads) sum += fastExp(ldGlobal(in + i) - top);
  const float scale = 1.f / blockReduce<false>(sum, s);
  for (int i = threadIdx.x; i < columns; i += kSoftmaxThreads) {
    stGlobal(out + i, fastExp(ldGlobal(in + i) - top) * scale);
  }
}

// ---- y[rows[m], :] += gate[m] * x[rows[m], :] w^T, with bf16 operands and f32 sums

struct RoutedGemm {
  const bf16* x;      // [any, k]
  const bf16* w;      // [n, k]
  const int* rows;    // [m], distinct
  const float* gate;  // [m]
  float* y;           // [any, n]
  int m, n, k;        // k a multiple of 8, so that rows are aligned to 16 bytes
};

// 64x64 tiles, 32 of k a step, two buffers; four warps of 32x32.
constexpr int kTileM = 64, kTileN = 64, kTileK = 32;
constexpr int kChunks = kTileK / 8;  // of 16 bytes in a row of a tile
constexpr int kMmaThreads = 128;

struct MmaShared {
  bf16 a[2][kTileM * kTileK];
  bf16 b[2][kTileN * kTileK];
};

// Rows of 64 bytes: two share the 128 bytes of all banks, so the chunk is permuted by every second row.
DEVICE int tileOffset(int row, int chunk) { return row * kTileK + (chunk ^ (row >> 1 & (kChunks - 1))) * 8; }

__global__ void __launch_bounds__(kMmaThreads, 2) routedGemmMma(RoutedGemm g) {
  SHARED_MEMORY(MmaShared, s);
  const int tid = threadIdx.x, lane = laneId(), warp = warpId();
  const int firstM = blockIdx.y * kTileM, firstN = blockIdx.x * kTileN;
  const int warpM = warp / 2 * 32, warpN = warp % 2 * 32;
  const int steps = (g.k + kTileK - 1) / kTileK;

  const auto load = [&](int step) {
    bf16 *a = s.a[step % 2], *b = s.b[step % 2];
    for (int i = tid; i < kTileM * kChunks; i += kMmaThreads) {
      const int row = i / kChunks, chunk = i % kChunks, column = step * kTileK + chunk * 8;
      const int m = firstM + row;
      const bool inX = m < g.m && column < g.k;
      cpAsync16(&a[tileOffset(row, chunk)], inX ? g.x + size_t(ldGlobal(g.rows + m)) * g.k + column : g.x, inX);
      const int n = firstN + row;
      const bool inW = n < g.n && column < g.k;
      cpAsync16(&b[tileOffset(row, chunk)], inW ? g.w + size_t(n) * g.k + column : g.w, inW);
    }
    cpAsyncCommit();
  };

  float sum[2][4][4] = {};
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      cpAsyncWait<1>();
    } else {
      cpAsyncWait<0>();
    }
    syncThreads();  // this step's tiles are complete
    const bf16 *a = s.a[step % 2], *b = s.b[step % 2];
    UNROLL
    for (int k = 0; k < kTileK / 16; ++k) {
      uint32_t fragmentA[2][4], fragmentB[4][2];
      UNROLL
      for (int i = 0; i < 2; ++i) {
        ldmatrix(fragmentA[i], &a[tileOffset(warpM + i * 16 + lane % 16, k * 2 + lane / 16)]);
      }
      UNROLL
      for (int j = 0; j < 4; ++j) {
        ldmatrix(fragmentB[j], &b[tileOffset(warpN + j * 8 + lane % 8, k * 2 + lane / 8 % 2)]);
      }
      UNROLL
      for (int i = 0; i < 2; ++i) {
        UNROLL
        for (int j = 0; j < 4; ++j) mmaBf16(sum[i][j], fragmentA[i], fragmentB[j]);
      }
    }
    syncThreads();  // this step's tiles may be overwritten
  }

  UNROLL
  for (int i = 0; i < 2; ++i) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const int m = firstM + warpM + i * 16 + lane / 4 + half * 8;
      if (m >= g.m) continue;
      float* y = g.y + size_t(ldGlobal(g.rows + m)) * g.n;
      const float gate = ldGlobal(g.gate + m);
      UNROLL
      for (int j = 0; j < 4; ++j) {
        UNROLL
        for (int e = 0; e < 2; ++e) {
          const int n = firstN + warpN + j * 8 + lane % 4 * 2 + e;
          if (n < g.n) stGlobal(y + n, fmaf(gate, sum[i][j][half * 2 + e], ldGlobal(y + n)));
        }
      }
    }
  }
}

// Warpgroup 0 fills stages (rows of x by cp.async, w by TMA), warpgroups 1 and 2 multiply 64 rows each.
constexpr int kHopperM = 128, kHopperN = 128, kHopperK = 64, kStages = 4;
constexpr int kHopperThreads = 384;
constexpr int kTileBytes = kHopperN * kHopperK * 2;

struct WgmmaShared {
  bf16 a[kStages][kHopperM * kHopperK];
  bf16 b[kStages][kHopperN * kHopperK];
  Mbarrier full[kStages], empty[kStages];
};

DEVICE void produce(const RoutedGemm& g, const TensorMap& w, WgmmaShared& s, int firstM, int firstN, int steps) {
  constexpr int kRowsAtOnce = 128 / 8, kPasses = kHopperM / kRowsAtOnce;
  const int tid = threadIdx.x, chunk = tid % 8;
  const bf16* source[kPasses];
  UNROLL
  for (int i = 0; i < kPasses; ++i) {
    const int m = firstM + tid / 8 + i * kRowsAtOnce;
    source[i] = m < g.m ? g.x + size_t(ldGlobal(g.rows + m)) * g.k + chunk * 8 : nullptr;
  }
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    mbarrierWait(s.empty[stage], (step / kStages & 1) ^ 1);
    if (tid == 0) {
      mbarrierArriveExpectTx(s.full[stage], kTileBytes);
      tmaLoad2d(s.b[stage], w, s.full[stage], step * kHopperK, firstN);
    }
    const bool inK = step * kHopperK + chunk * 8 < g.k;
    unsigned char* tile = reinterpret_cast<unsigned char*>(s.a[stage]);
    UNROLL
    for (int i = 0; i < kPasses; ++i) {
      const bool inX = inK && source[i] != nullptr;
      cpAsync16(tile + swizzle128(tid / 8 + i * kRowsAtOnce, chunk), inX ? source[i] + step * kHopperK : g.x, inX);
    }
    cpAsyncArrive(s.full[stage]);
  }
}

DEVICE void consume(const RoutedGemm& g, WgmmaShared& s, int firstM, int firstN, int steps) {
  const int lane = laneId(), group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4;
  float sum[kHopperN / 2];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    mbarrierWait(s.full[stage], step / kStages & 1);
    fenceProxyAsync();  // rows that cp.async wrote, for wgmma
    const uint64_t a = descriptorK(s.a[stage] + group * 64 * kHopperK), b = descriptorK(s.b[stage]);
    wgmmaFence();
    UNROLL
    for (int k = 0; k < kHopperK / 16; ++k) {
      wgmmaBf16(sum, descriptorAdvance(a, k * 32), descriptorAdvance(b, k * 32), step > 0 || k > 0);
    }
    wgmmaCommit();
    wgmmaWait<1>(sum);  // the previous step is done, its stage free
    if (step > 0 && lane == 0) mbarrierArrive(s.empty[(step - 1) % kStages]);
  }
  wgmmaWait<0>(sum);
  UNROLL
  for (int half = 0; half < 2; ++half) {
    const int m = firstM + group * 64 + warp * 16 + lane / 4 + half * 8;
    if (m >= g.m) continue;
    float* y = g.y + size_t(ldGlobal(g.rows + m)) * g.n;
    const float gate = ldGlobal(g.gate + m);
    UNROLL
    for (int j = 0; j < kHopperN / 8; ++j) {
      UNROLL
      for (int e = 0; e < 2; ++e) {
        const int n = firstN + j * 8 + lane % 4 * 2 + e;
        if (n < g.n) stGlobal(y + n, fmaf(gate, sum[j * 4 + half * 2 + e], ldGlobal(y + n)));
      }
    }
  }
}

__global__ void __launch_bounds__(kHopperThreads, 1)
    routedGemmWgmma(RoutedGemm g, const __grid_constant__ TensorMap w) {
  SHARED_MEMORY(WgmmaShared, s);
  const int firstM = blockIdx.y * kHopperM, firstN = blockIdx.x * kHopperN;
  const int steps = (g.k + kHopperK - 1) / kHopperK;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrierInit(s.full[i], 128 + 1);  // the producers' cp.async, and the thread that announces TMA's bytes
      mbarrierInit(s.empty[i], 8);       // one lane of each consuming warp
    }
    fenceMbarrierInit();
  }
  syncThreads();
  if (threadIdx.x < 128) {
    registersDecrease<40>();
    produce(g, w, s, firstM, firstN, steps);
  } else {
    registersIncrease<232>();
    consume(g, s, firstM, firstN, steps);
  }
}

// ---- Cases

std::mt19937 random32(5);
float uniform() { return std::uniform_real_distribution<float>(-1, 1)(random32); }

// Relative error of the whole output; anything not finite makes it NaN, which fails.
double relativeError(const std::vector<float>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}

std::vector<double> softmaxOf(const std::vector<double>& x, int columns) {
  std::vector<double> y(x.size());
  for (size_t begin = 0; begin < x.size(); begin += columns) {
    const double* in = &x[begin];
    double top = -INFINITY, sum = 0;
    for (int c = 0; c < columns; ++c) top = std::fmax(top, in[c]);
    for (int c = 0; c < columns; ++c) sum += std::exp(in[c] - top);
    for (int c = 0; c < columns; ++c) y[begin + c] = std::exp(in[c] - top) / sum;
  }
  return y;
}

CaseResult softmaxCase(int rows, int columns) {
  std::vector<float> x(size_t(rows) * columns);
  for (float& v : x) v = 6 * uniform();
  const std::vector<double> want = softmaxOf({x.begin(), x.end()}, columns);
  const DeviceArray<float> deviceX(x), deviceY(x.size());
  LAUNCH(softmaxRows, rows, kSoftmaxThreads, sizeof(SoftmaxShared), nullptr, deviceX.data(), deviceY.data(), columns);
  return {"softmax " + std::to_string(rows) + "x" + std::to_string(columns), relativeError(deviceY.download(), want),
          1e-5};
}

CaseResult gemmCase(bool wgmma, int allRows, int m, int n, int k) {
  std::vector<bf16> x(size_t(allRows) * k), w(size_t(n) * k);
  for (bf16& v : x) v = toBf16(uniform());
  for (bf16& v : w) v = toBf16(uniform());
  std::vector<float> y(size_t(allRows) * n), gate(m);
  for (float& v : y) v = uniform();
  for (float& v : gate) v = uniform();
  std::vector<int> rows(m);
  for (int i = 0; i < m; ++i) rows[i] = int(int64_t(i + 1) * (allRows - 1) / m);
  // The last row is among them: reading past it leaves the allocation. Row 0 is not, when some are not: it is NaN, and
  // must not have any effect.
  for (int c = 0; rows[0] > 0 && c < k; ++c) x[c] = toBf16(NAN);
  std::vector<double> want(y.begin(), y.end());
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int c = 0; c < k; ++c) {
        sum += double(toFloat(x[size_t(rows[i]) * k + c])) * toFloat(w[size_t(j) * k + c]);
      }
      want[size_t(rows[i]) * n + j] += gate[i] * sum;
    }
  }
  const DeviceArray<bf16> deviceX(x), deviceW(w);
  const DeviceArray<int> deviceRows(rows);
  const DeviceArray<float> deviceGate(gate), deviceY(y);
  const RoutedGemm g{deviceX.data(), deviceW.data(), deviceRows.data(), deviceGate.data(), deviceY.data(), m, n, k};
  if (wgmma) {
    TensorMapDesc desc;
    desc.base = g.w;
    desc.columns = k;
    desc.rows = n;
    desc.rowBytes = size_t(k) * 2;
    desc.boxColumns = kHopperK;
    desc.boxRows = kHopperN;
    const dim3 grid((n + kHopperN - 1) / kHopperN, (m + kHopperM - 1) / kHopperM);
    LAUNCH(routedGemmWgmma, grid, kHopperThreads, sizeof(WgmmaShared), nullptr, g, encodeTensorMap(desc));
  } else {
    const dim3 grid((n + kTileN - 1) / kTileN, (m + kTileM - 1) / kTileM);
    LAUNCH(routedGemmMma, grid, kMmaThreads, sizeof(MmaShared), nullptr, g);
  }
  return {std::string(wgmma ? "wgmma" : "mma") + " GEMM of " + std::to_string(m) + "x" + std::to_string(n) + "x" +
              std::to_string(k),
          relativeError(deviceY.download(), want), 1e-5};
}

// A recording that parts into as many branches as there are rows, meets again, and parts once more with the same streams
// and event; replayed with other data than it was recorded with.
CaseResult branchesCase(int rows, int columns) {
  std::vector<float> x(size_t(rows) * columns);
  for (float& v : x) v = 6 * uniform();
  std::vector<double> want(x.begin(), x.end());
  for (int i = 0; i < 5; ++i) want = softmaxOf(want, columns);
  const DeviceArray<float> deviceX(std::vector<float>(x.size(), 0.f)), deviceY(x.size()), deviceZ(x.size());
  std::vector<Stream> streams;
  for (int r = 0; r < rows; ++r) streams.push_back(streamCreate());
  const Stream origin = streams[0];
  const Event turn = eventCreate();
  const auto softmax = [&](int stream, const float* from, float* to, int count) {
    LAUNCH(softmaxRows, count, kSoftmaxThreads, sizeof(SoftmaxShared), streams[stream], from, to, columns);
  };
  beginCapture(origin);
  softmax(0, deviceX.data(), deviceY.data(), rows);
  for (int part = 0; part < 2; ++part) {
    eventRecord(turn, origin);
    for (int r = 1; r < rows; ++r) streamWait(streams[r], turn);
    for (int r = 0; r < rows; ++r) softmax(r, deviceY.data() + r * columns, deviceZ.data() + r * columns, 1);
    for (int r = 1; r < rows; ++r) {
      eventRecord(turn, streams[r]);
      streamWait(origin, turn);
    }
    softmax(0, deviceZ.data(), deviceY.data(), rows);
  }
  const Graph graph = endCapture(origin);
  copyAsync(deviceX.data(), x.data(), x.size() * sizeof(float), CopyKind::HostToDevice, origin);
  graphLaunch(graph, origin);
  streamSynchronize(origin);
  graphDestroy(graph);
  eventDestroy(turn);
  for (const Stream stream : streams) streamDestroy(stream);
  return {"a recording of " + std::to_string(rows) + " branches", relativeError(deviceY.download(), want), 1e-5};
}

// A launch that fails is a failed case.
template <typename Case>
void add(std::vector<CaseResult>& results, const char* name, const Case& run) {
  try {
    results.push_back(run());
  } catch (const Error& error) {
    results.push_back({name, 0, 0, error.what()});
  }
}

}  // namespace

std::vector<CaseResult> runExamples() {
  std::vector<CaseResult> results;
  add(results, "softmax", [] { return softmaxCase(5, 1000); });
  add(results, "softmax", [] { return softmaxCase(3, 77); });
  add(results, "branches", [] { return branchesCase(8, 100); });
  add(results, "mma GEMM", [] { return gemmCase(false, 128, 128, 128, 128); });
  add(results, "mma GEMM", [] { return gemmCase(false, 150, 77, 136, 72); });
  if (deviceProperties(0).computeMajor == 9) {
    add(results, "wgmma GEMM", [] { return gemmCase(true, 128, 128, 128, 128); });
    add(results, "wgmma GEMM", [] { return gemmCase(true, 200, 150, 136, 456); });
  }
  return results;
}

}  // namespace elastiform::ELASTIFORM_DEVICE
