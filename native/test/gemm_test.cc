// Property tests of the matrix engine and of the ops on it, on every instruction set the machine has.
//
// Products are compared bit for bit with the one chain per element that gemm.h promises, computed naively: that
// covers blocking, threads, gathers, prefixes and packed element types at once. Activations and losses are compared
// with double precision.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numbers>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/pool.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/kernel.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"
#include "runtime/signature.h"
#include "test/view.h"

namespace {

using namespace elastiform;
using namespace elastiform::cpu;

int failures = 0;
Isa current = Isa::Portable;

#define CHECK(condition, ...)                                        \
  do {                                                               \
    if (!(condition) && ++failures <= 20) {                          \
      std::printf("%s:%d [%s] ", __FILE__, __LINE__, isaName(current)); \
      std::printf(__VA_ARGS__);                                      \
      std::printf("\n");                                             \
    }                                                                \
  } while (false)

struct Scratch {
  std::vector<std::unique_ptr<uint8_t[]>> blocks;
  static void* take(void* self, size_t bytes) {
    auto& blocks = static_cast<Scratch*>(self)->blocks;
    blocks.push_back(std::make_unique<uint8_t[]>(bytes + 64));
    std::memset(blocks.back().get(), 0xff, bytes + 64);  // NaN, so that reads of what nobody wrote show
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(blocks.back().get()) + 63) / 64 * 64);
  }
};

std::mt19937 engine(7);
int64_t pick(int64_t low, int64_t high) { return low + static_cast<int64_t>(engine() % (high - low + 1)); }
bool coin() { return engine() & 1; }
float uniform() { return static_cast<float>(engine()) * 0x1p-31f - 1.0f; }

std::vector<float> random(int64_t count) {
  std::vector<float> v(static_cast<size_t>(count));
  for (float& x : v) x = uniform();
  return v;
}

// `count` ascending unique indices below `limit`.
std::vector<int32_t> randomRows(int64_t count, int64_t limit) {
  std::vector<int32_t> all(static_cast<size_t>(limit));
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), engine);
  all.resize(static_cast<size_t>(count));
  std::sort(all.begin(), all.end());
  return all;
}

template <typename T>
TensorView view(std::vector<T>& data, std::initializer_list<int64_t> shape) {
  TensorView v;
  v.data = data.empty() ? const_cast<char*>("") : static_cast<void*>(data.data());
  v.dtype = std::is_same_v<T, int32_t> ? DType::I32 : DType::F32;
  v.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), v.shape.begin());
  int64_t stride = 1;
  for (int d = v.rank - 1; d >= 0; --d) {
    v.strides[static_cast<size_t>(d)] = stride;
    stride *= v.shape[static_cast<size_t>(d)];
  }
  return v;
}

// A weight of random layout, element type and mutability, and the values arithmetic sees.
struct Weight {
  Tensor tensor;
  int64_t N, K;
  std::vector<float> values;  // [N, K]

  Weight(int64_t N, int64_t K, int rank = 2) : N(N), K(K) {
    const int64_t layout = rank == 2 ? pick(0, 2) : 0;  // rows, columns, a slice of wider rows
    const DType dtype = static_cast<DType>(pick(0, 2));
    const int64_t pad = layout == 2 ? pick(1, 5) : 0;
    tensor.rank = rank;
    tensor.shape = {N, K};
    tensor.strides = layout == 1 ? std::array<int64_t, kMaxRank>{1, N} : std::array<int64_t, kMaxRank>{K + pad, 1};
    if (rank == 1) tensor.strides = {1};
    tensor.dtype = dtype;
    tensor.packAs = coin() ? dtype : static_cast<DType>(pick(0, 2));
    const int64_t count = N * (K + pad);
    auto storage = std::make_shared<Storage>();
    storage->bytes = static_cast<size_t>(count) * dtypeSize(dtype);
    storage->data = new uint8_t[storage->bytes + 1];
    storage->release = [data = storage->data] { delete[] data; };
    storage->writable = dtype == DType::F32 && coin();
    values.resize(static_cast<size_t>(N * K));
    for (int64_t i = 0; i < count; ++i) {
      const float x = uniform() * (coin() ? 1.0f : 1e-5f);
      if (dtype == DType::F32) {
        reinterpret_cast<float*>(storage->data)[i] = x;
      } else {
        reinterpret_cast<uint16_t*>(storage->data)[i] = dtype == DType::BF16 ? floatToBf16(x) : floatToF16(x);
      }
    }
    tensor.storage = storage;
    const bool rounded = !storage->writable && rank == 2;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < K; ++k) {
        float x = loadAsFloat(storage->data, dtype, n * tensor.strides[0] + k * (rank == 2 ? tensor.strides[1] : 1));
        if (rounded && tensor.packAs == DType::BF16) x = bf16ToFloat(floatToBf16(x));
        if (rounded && tensor.packAs == DType::F16) x = f16ToFloat(floatToF16(x));
        values[static_cast<size_t>(n * K + k)] = x;
      }
    }
  }

  TensorView view() { return test::viewOf(tensor); }
  float at(int64_t n, int64_t k) const { return values[static_cast<size_t>(n * K + k)]; }
};

// Whether the kernels of this instruction set fuse multiplication and addition (simd.h).
bool fused() {
#if defined(__FMA__) || defined(__ARM_NEON)
  return true;
#else
  return current != Isa::Portable;
#endif
}
float chain(float c, float a, float b) { return fused() ? std::fmaf(a, b, c) : c + a * b; }

bool sameBits(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::memcmp(&a, &b, 4) == 0 || (a == 0 && b == 0);
}
bool sameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](float x, float y) { return sameBits(x, y); });
}

double activation(int act, double x) {
  const double c = std::sqrt(2 / std::numbers::pi);
  switch (act) {
    case 1: return 0.5 * x * (1 + std::tanh(c * (x + 0.044715 * x * x * x)));
    case 2: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case 3: return x / (1 + std::exp(-x));
    case 4: return std::max(x, 0.0);
    default: return x;
  }
}
bool near(float got, double want) { return std::abs(got - want) <= 2e-6 * (1 + std::abs(want)); }

// Runs an op once for each thread count; outputs must have the same bits. `reset` restores what the op overwrites.
// Operands left out at the end are absent.
Counters runOp(const char* op, std::vector<TensorView> in, const std::vector<TensorView>& out,
               const std::vector<double>& attr, const std::function<void()>& reset = [] {}) {
  const Kernel kernel = findKernel(op);
  in.resize(signatureOf(findOp(op)).inputs.size());
  Counters first;
  std::vector<std::vector<float>> bits;
  for (const int threads : {1, 2, 5}) {
    setThreadCount(threads);
    reset();
    Counters counters;
    Scratch scratch;
    std::atomic<bool> abort{false};
    int64_t produced[4] = {};
    kernel({in.data(), out.data(), attr.data(), &counters, &abort, produced, Scratch::take, &scratch});
    std::vector<std::vector<float>> now;
    for (const TensorView& o : out) {
      if (o) now.emplace_back(o.f32(), o.f32() + o.elements());
    }
    if (threads == 1) {
      bits = now;
      first = counters;
    } else {
      for (size_t i = 0; i < now.size(); ++i) CHECK(sameBits(now[i], bits[i]), "%s: output depends on threads", op);
    }
  }
  return first;
}

void throws(const char* what, ErrorCode code, const std::function<void()>& body) {
  try {
    body();
    CHECK(false, "%s: no error", what);
  } catch (const Error& e) {
    CHECK(e.code == code, "%s: wrong code: %s", what, e.what());
  }
}

void multiply(const GemmCall& call) {
  Counters counters;
  Scratch scratch;
  const KernelArgs args{nullptr, nullptr, nullptr, &counters, nullptr, nullptr, Scratch::take, &scratch};
  if (call.b[0].transposed) return gemm(call.M, call.N, call.K, call.a, call.b[0], call.plain, call.out, call.ldOut, args);
  gemmTogether({call}, args);
}

int64_t extent() { return coin() ? pick(1, 40) : coin() ? pick(1, 4) : pick(1, 900); }

// gemm() with every option against the naive chain.
void testProducts() {
  for (int round = 0; round < 150; ++round) {
    int64_t M = extent(), N = extent(), K = round % 17 == 0 ? 0 : extent();
    if (round % 9 == 0) M = pick(200, 1300);
    while (M * N * K > 1'000'000) (coin() ? M : coin() ? N : K) /= 2;
    M = std::max<int64_t>(M, 1), N = std::max<int64_t>(N, 1);
    // The weight is at least as large as the product: prefixes.
    Weight w(N + (coin() ? pick(0, 70) : 0), K + (coin() ? pick(0, 70) : 0) + (K == 0));
    const bool transposed = coin();
    if (transposed) std::swap(N, K);
    if (N == 0) continue;
    const MatrixB b = transposed ? weightTransposedB(w.view()) : weightB(w.view());
    const auto weightAt = [&](int64_t n, int64_t k) { return transposed ? w.at(k, n) : w.at(n, k); };

    // A: rows (gathered or not), or columns of a matrix (gathered and scaled or not).
    const bool byColumns = coin(), gathered = coin(), scaled = byColumns && !transposed && coin();
    const int64_t outer = byColumns ? K + pick(0, 5) : M + pick(0, 5), width = (byColumns ? M : K) + pick(0, 3);
    auto data = random(outer * width);
    if (round % 10 == 3 && !data.empty()) {
      data[0] = std::numeric_limits<float>::infinity();
      data[data.size() / 2] = std::numeric_limits<float>::quiet_NaN();
    }
    const auto index = randomRows(byColumns ? K : M, outer);
    const auto scale = random(K + 1);
    MatrixA a{data.data(), byColumns ? 1 : width, byColumns ? width : 1};
    if (gathered) (byColumns ? a.cols : a.rows) = index.data();
    if (scaled) a.colScale = scale.data();
    const auto aAt = [&](int64_t m, int64_t k) {
      const int64_t i = byColumns ? k : m, j = byColumns ? m : k;
      const float x = data[static_cast<size_t>((gathered ? index[static_cast<size_t>(i)] : i) * width + j)];
      return scaled ? x * scale[static_cast<size_t>(k)] : x;
    };

    const int64_t ld = N + pick(0, 9), outRows = M + pick(0, 4);
    const auto scatter = randomRows(M, outRows);
    const auto before = random(outRows * ld), rowScale = random(M);
    std::vector<float> pre(static_cast<size_t>(M * ld), -7.0f);
    Weight bias(1, N, 1);
    bias.tensor.shape = {N};
    Epilogue e;
    if (coin()) e.bias = bias.tensor.data(), e.biasDtype = bias.tensor.dtype;
    if (coin()) e.rowScale = rowScale.data();
    if (coin()) e.rows = scatter.data();
    if (coin()) e.pre = pre.data();
    e.accumulate = coin();
    e.act = round % 3 ? Act::None : static_cast<Act>(pick(0, 4));

    std::vector<float> first;
    for (const int threads : {1, 2, 5}) {
      setThreadCount(threads);
      std::vector<float> out = before;
      Scratch scratch;
      Counters counters;
      gemm(M, N, K, a, b, e, out.data(), ld, {nullptr, nullptr, nullptr, &counters, nullptr, nullptr, Scratch::take, &scratch});
      if (threads == 1) {
        first = out;
      } else {
        CHECK(sameBits(out, first), "product depends on threads");
      }
    }
    std::vector<float> want = before;
    bool good = true, goodPre = true;
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        float c = 0;
        for (int64_t k = 0; k < K; ++k) c = chain(c, aAt(m, k), weightAt(n, k));
        if (e.bias) c += bias.values[static_cast<size_t>(n)];
        if (e.pre) goodPre &= sameBits(pre[static_cast<size_t>(m * ld + n)], c);
        const size_t at = static_cast<size_t>((e.rows ? scatter[static_cast<size_t>(m)] : m) * ld + n);
        if (e.act == Act::None) {
          if (e.rowScale) c *= rowScale[static_cast<size_t>(m)];
          if (e.accumulate) c += want[at];
          want[at] = c;
          continue;
        }
        double y = activation(static_cast<int>(e.act), c);
        if (e.rowScale) y *= rowScale[static_cast<size_t>(m)];
        if (e.accumulate) y += want[at];
        if (std::isfinite(c)) {
          good &= std::abs(first[at] - y) <= 1e-5 * (1 + std::abs(c));
        } else {
          good &= !std::isnan(c) || std::isnan(first[at]);
        }
        want[at] = first[at];
      }
    }
    CHECK(good, "activation %d wrong", static_cast<int>(e.act));
    CHECK(goodPre, "pre wrong: %lld x %lld x %lld", static_cast<long long>(M), static_cast<long long>(N), static_cast<long long>(K));
    CHECK(sameBits(first, want), "product wrong: M %lld N %lld K %lld%s%s%s%s packed %d storage %s", static_cast<long long>(M),
          static_cast<long long>(N), static_cast<long long>(K), byColumns ? " by columns" : "", gathered ? " gathered" : "",
          transposed ? " transposed" : "", e.accumulate ? " accumulate" : "", b.packed != nullptr, dtypeName(w.tensor.dtype));
  }
}

// What is added to rows of C against the naive chain: few steps of k, and more than are taken at once; whole panels and a
// part of one.
void testAdding() {
  struct Shape {
    int64_t M, K;
  };
  for (const Shape& s : {Shape{18, 64}, {40, 1}, {300, 128}, {300, 130}, {256, 1100}}) {
    const int64_t N = 2 * kernels().columns + 6, outRows = s.M + 3;
    Weight w(N, s.K);
    if (w.tensor.storage->writable) w.tensor.packAs = w.tensor.dtype;  // its values have not been rounded
    w.tensor.storage->writable = false;
    const auto x = random(s.M * s.K), bias = random(N), scale = random(s.M), before = random(outRows * N);
    const auto scatter = randomRows(s.M, outRows);
    for (int options = 0; options < 8; ++options) {
      Epilogue e;
      e.accumulate = true;
      if (options & 1) e.bias = bias.data();
      if (options & 2) e.rowScale = scale.data();
      if (options & 4) e.rows = scatter.data();
      std::vector<float> out = before, want = before;
      for (int64_t m = 0; m < s.M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
          float c = 0;
          for (int64_t k = 0; k < s.K; ++k) c = chain(c, x[static_cast<size_t>(m * s.K + k)], w.at(n, k));
          if (e.bias) c += bias[static_cast<size_t>(n)];
          if (e.rowScale) c *= scale[static_cast<size_t>(m)];
          want[static_cast<size_t>((e.rows ? scatter[static_cast<size_t>(m)] : m) * N + n)] += c;
        }
      }
      setThreadCount(2);
      multiply({.M = s.M, .N = N, .K = s.K, .a = {x.data(), s.K, 1}, .b = {weightB(w.view())}, .plain = e, .out = out.data(), .ldOut = N});
      CHECK(sameBits(out, want), "%lld rows over %lld steps of k, options %d", static_cast<long long>(s.M),
            static_cast<long long>(s.K), options);
    }
  }
}

// A row alone, among few and among many: the same bits. Large enough for every path: strips, widening, blocks of K.
void testRowIndependence() {
  for (const DType type : {DType::F32, DType::BF16, DType::F16}) {
    const int64_t K = 1000, N = 300, rows = 600;
    auto x = random(rows * K);
    Weight w(N, K);
    w.tensor.packAs = type;
    w.tensor.storage->writable = false;
    const MatrixB b = weightB(w.view());
    std::vector<float> all(static_cast<size_t>(rows * N));
    Counters counters;
    const auto run = [&](int64_t first, int64_t M, float* out) {
      Scratch scratch;
      gemm(M, N, K, {x.data() + first * K, K, 1}, b, {}, out, N,
           {nullptr, nullptr, nullptr, &counters, nullptr, nullptr, Scratch::take, &scratch});
    };
    setThreadCount(2);
    run(0, rows, all.data());
    for (const int64_t M : {1, 2, 3, 5, 6, 7, 13, 14, 15, 16, 17, 29, 64, 100, 257}) {
      const int64_t first = pick(0, rows - M);
      std::vector<float> part(static_cast<size_t>(M * N));
      run(first, M, part.data());
      CHECK(sameBits(part, {all.begin() + first * N, all.begin() + (first + M) * N}), "row depends on its neighbours, M %lld",
            static_cast<long long>(M));
    }
  }
}

// Reductions that are cut into depths: blocks of C wait for the next while others are computed.
void testDeep() {
  const std::array<int64_t, 3> sizes[] = {{1, 70, 8193}, {3, 40, 9000}, {31, 100, 16500}, {5, 33, 16384}};
  for (const auto& [M, N, K] : sizes) {
    Weight writable(N, K), packed(K, N);
    if (packed.tensor.storage->writable) packed.tensor.packAs = DType::F32;  // its values were not rounded for packing
    writable.tensor.storage->writable = true, packed.tensor.storage->writable = false;
    constexpr int64_t rank = 5;
    auto x = random(M * K), u = random(M * rank), low = random(N * rank);
    for (Weight* w : {&writable, &packed}) {
      if (w == &writable && w->tensor.packAs != w->tensor.dtype) continue;  // its values were rounded for packing
      const bool transposed = w == &packed;
      const MatrixB b = transposed ? weightTransposedB(w->view()) : weightB(w->view());
      std::vector<float> want(static_cast<size_t>(M * N), 0.0f);
      for (int64_t i = 0; i < M * N; ++i) {
        float& c = want[static_cast<size_t>(i)];
        for (int64_t k = 0; k < K; ++k) {
          c = chain(c, x[static_cast<size_t>(i / N * K + k)], transposed ? w->at(k, i % N) : w->at(i % N, k));
        }
        for (int64_t k = 0; k < rank && !transposed; ++k) {
          c = chain(c, u[static_cast<size_t>(i / N * rank + k)], low[static_cast<size_t>(i % N * rank + k)]);
        }
      }
      for (const int threads : {1, 2, 5}) {
        setThreadCount(threads);
        std::vector<float> out(static_cast<size_t>(M * N));
        const Patch patch = transposed ? Patch{} : Patch{u.data(), rank, {low.data(), DType::F32, rank, 1}};
        multiply({M, N, K, {x.data(), K, 1}, 1, {b}, {patch}, {}, {}, out.data(), N});
        CHECK(sameBits(out, want), "deep product wrong: %lld x %lld x %lld, transposed %d", static_cast<long long>(M),
              static_cast<long long>(N), static_cast<long long>(K), transposed);
      }
    }
  }
}

// Look-ups in a table give the same bits before and after it is packed for products.
void testTables() {
  for (int round = 0; round < 60; ++round) {
    const int64_t rows = pick(1, 100), width = pick(1, 70), count = pick(1, 20);
    Weight w(rows, width);
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (int32_t& id : ids) id = static_cast<int32_t>(pick(0, rows - 1));
    std::vector<float> before(static_cast<size_t>(count * width)), after = before;
    runOp("embedding", {w.view(), view(ids, {count})}, {view(before, {count, width})}, {});
    weightB(w.view());
    runOp("embedding", {w.view(), view(ids, {count})}, {view(after, {count, width})}, {});
    CHECK(sameBits(before, after), "look-ups depend on packing: %s packed as %s", dtypeName(w.tensor.dtype),
          dtypeName(w.tensor.packAs));
  }
}

float rowChain(const std::vector<float>& x, int64_t row, const Weight& w, int64_t n, int64_t K, float c = 0) {
  for (int64_t k = 0; k < K; ++k) c = chain(c, x[static_cast<size_t>(row * K + k)], w.at(n, k));
  return c;
}

void testLinear() {
  for (int round = 0; round < 60; ++round) {
    const int64_t rowsIn = pick(1, 60), K = pick(1, 500), N = pick(1, 120);
    const bool selected = coin(), biased = coin();
    const int64_t M = selected ? pick(0, rowsIn) : rowsIn;
    Weight w(N + pick(0, 20), K + pick(0, 20)), w2(N + pick(0, 20), K + pick(0, 20)), bias(1, N + 3, 1), bias2(1, N, 1);
    bias.tensor.shape = {N + 3}, bias2.tensor.shape = {N};
    auto x = random(rowsIn * K);
    auto rows = randomRows(M, rowsIn);
    const auto rowOf = [&](int64_t r) { return selected ? rows[static_cast<size_t>(r)] : r; };
    const int act = static_cast<int>(pick(0, 4));
    std::vector<float> y(static_cast<size_t>(M * N)), g = y, u = y;
    const TensorView rowsView = selected ? view(rows, {M}) : TensorView{};
    const TensorView biasView = biased ? bias.view() : TensorView{}, bias2View = biased ? bias2.view() : TensorView{};
    const bool patched[2] = {coin(), coin()};
    const int64_t ranks[2] = {pick(1, 20), pick(1, 70)};
    Weight patches[2] = {{N + pick(0, 9), ranks[0] + pick(0, 9)}, {N, ranks[1]}};
    for (Weight& b : patches) {  // trained ones, both at once too
      if (round % 2 && b.tensor.packAs == b.tensor.dtype) b.tensor.storage->writable = true;
    }
    std::vector<float> low[2] = {random(M * ranks[0]), random(M * ranks[1])};
    const auto uView = [&](int i) { return patched[i] ? view(low[i], {M, ranks[i]}) : TensorView{}; };
    const auto bView = [&](int i) { return patched[i] ? patches[i].view() : TensorView{}; };
    const auto patchedChain = [&](int i, int64_t row, int64_t n, float c) {
      return patched[i] ? rowChain(low[i], row, patches[i], n, ranks[i], c) : c;
    };
    const auto width = [&](int i) { return K + (patched[i] ? ranks[i] : 0); };

    Counters counters = runOp("linear", {view(x, {rowsIn, K}), w.view(), biasView, rowsView, uView(0), bView(0)},
                              {view(y, {M, N}), view(g, {M, N})}, {double(act)});
    CHECK(counters.flops == 2.0 * static_cast<double>(M * N * width(0)), "linear counts its work wrong");
    for (int64_t i = 0; i < M * N; ++i) {
      float c = patchedChain(0, i / N, i % N, rowChain(x, rowOf(i / N), w, i % N, K));
      if (biased) c += bias.values[static_cast<size_t>(i % N)];
      CHECK(sameBits(g[static_cast<size_t>(i)], c), "linear pre");
      CHECK(near(y[static_cast<size_t>(i)], activation(act, c)), "linear y");
    }

    counters = runOp("linear_gated",
                     {view(x, {rowsIn, K}), w.view(), w2.view(), biasView, bias2View, rowsView, uView(0), bView(0),
                      uView(1), bView(1)},
                     {view(y, {M, N}), view(g, {M, N}), view(u, {M, N})}, {double(act)});
    CHECK(counters.flops == 2.0 * static_cast<double>(M * N * (width(0) + width(1))), "linear_gated counts its work wrong");
    for (int64_t i = 0; i < M * N; ++i) {
      float c = patchedChain(0, i / N, i % N, rowChain(x, rowOf(i / N), w, i % N, K));
      float d = patchedChain(1, i / N, i % N, rowChain(x, rowOf(i / N), w2, i % N, K));
      if (biased) c += bias.values[static_cast<size_t>(i % N)], d += bias2.values[static_cast<size_t>(i % N)];
      CHECK(sameBits(g[static_cast<size_t>(i)], c) && sameBits(u[static_cast<size_t>(i)], d), "linear_gated g, u");
      CHECK(near(y[static_cast<size_t>(i)], activation(act, c) * d), "linear_gated y");
    }

    // linear_add: x is compact.
    auto compact = random(M * K), residual = random(rowsIn * N), gate = random(M);
    const bool gated = coin(), inPlace = coin();
    auto sum = residual;
    counters = runOp("linear_add",
                     {view(inPlace ? sum : residual, {rowsIn, N}), view(compact, {M, K}), w.view(), biasView, rowsView,
                      gated ? view(gate, {M}) : TensorView{}, uView(1), bView(1)},
                     {view(sum, {rowsIn, N})}, {}, [&] { sum = residual; });
    CHECK(counters.rows == static_cast<double>(M), "linear_add counts its rows wrong");
    auto want = residual;
    for (int64_t i = 0; i < M * N; ++i) {
      float c = patchedChain(1, i / N, i % N, rowChain(compact, i / N, w, i % N, K));
      if (biased) c += bias.values[static_cast<size_t>(i % N)];
      if (gated) c *= gate[static_cast<size_t>(i / N)];
      want[static_cast<size_t>(rowOf(i / N) * N + i % N)] += c;
    }
    CHECK(sameBits(sum, want), "linear_add");

    // linear_dx
    auto dy = random(M * N), acc = random(M * K);
    const bool adds = coin();
    auto dx = acc;
    runOp("linear_dx", {view(dy, {M, N}), w.view(), adds ? view(inPlace ? dx : acc, {M, K}) : TensorView{}},
          {view(dx, {M, K})}, {}, [&] { dx = acc; });
    for (int64_t i = 0; i < M * K; ++i) {
      float c = 0;
      for (int64_t n = 0; n < N; ++n) c = chain(c, dy[static_cast<size_t>(i / K * N + n)], w.at(n, i % K));
      if (adds) c += acc[static_cast<size_t>(i)];
      CHECK(sameBits(dx[static_cast<size_t>(i)], c), "linear_dx");
    }

    // linear_add_grad
    auto dySum = random(rowsIn * N);
    std::vector<float> dgate(static_cast<size_t>(M));
    const bool wantsGate = coin();
    runOp("linear_add_grad",
          {view(dySum, {rowsIn, N}), wantsGate ? view(compact, {M, K}) : TensorView{}, w.view(), biasView, rowsView,
           gated ? view(gate, {M}) : TensorView{}},
          {view(dx, {M, K}), wantsGate ? view(dgate, {M}) : TensorView{}}, {});
    for (int64_t r = 0; r < M; ++r) {
      double byGate = 0;
      for (int64_t k = 0; k < K; ++k) {
        float t = 0;
        for (int64_t n = 0; n < N; ++n) t = chain(t, dySum[static_cast<size_t>(rowOf(r) * N + n)], w.at(n, k));
        byGate += static_cast<double>(t) * compact[static_cast<size_t>(r * K + k)];
        if (gated) t *= gate[static_cast<size_t>(r)];
        CHECK(sameBits(dx[static_cast<size_t>(r * K + k)], t), "linear_add_grad dx");
      }
      for (int64_t n = 0; biased && n < N; ++n) {
        byGate += static_cast<double>(dySum[static_cast<size_t>(rowOf(r) * N + n)]) * bias.values[static_cast<size_t>(n)];
      }
      if (wantsGate) {
        CHECK(std::abs(dgate[static_cast<size_t>(r)] - byGate) <= 1e-5 * (10 + std::abs(byGate)), "linear_add_grad dgate");
      }
    }

    // linear_dw: both sides gathered, or dense.
    const int64_t total = pick(std::max<int64_t>(M, 1), 80);
    auto wide = random(total * N), inputs = random(total * K);
    auto left = randomRows(M, total), right = randomRows(M, total);
    const int64_t reduced = selected ? M : total;
    auto factors = random(reduced);
    std::vector<float> dw(static_cast<size_t>(N * K));
    runOp("linear_dw",
          {view(wide, {total, N}), view(inputs, {total, K}), selected ? view(left, {M}) : TensorView{},
           selected ? view(right, {M}) : TensorView{}, gated ? view(factors, {reduced}) : TensorView{}},
          {view(dw, {N, K})}, {});
    for (int64_t i = 0; i < N * K; ++i) {
      float c = 0;
      for (int64_t r = 0; r < reduced; ++r) {
        const int64_t l = selected ? left[static_cast<size_t>(r)] : r, q = selected ? right[static_cast<size_t>(r)] : r;
        float d = wide[static_cast<size_t>(l * N + i / K)];
        if (gated) d *= factors[static_cast<size_t>(r)];
        c = chain(c, d, inputs[static_cast<size_t>(q * K + i % K)]);
      }
      CHECK(sameBits(dw[static_cast<size_t>(i)], c), "linear_dw");
    }
  }
  std::vector<float> x(8), y(8), w(4);
  std::vector<int32_t> rows{1, 1};
  throws("rows", ErrorCode::InvalidData, [&] {
    runOp("linear", {view(x, {4, 2}), view(w, {2, 2}), {}, view(rows, {2})}, {view(y, {2, 2}), {}}, {0});
  });
  rows = {0, 4};
  throws("rows", ErrorCode::InvalidData, [&] {
    runOp("linear", {view(x, {4, 2}), view(w, {2, 2}), {}, view(rows, {2})}, {view(y, {2, 2}), {}}, {0});
  });
  throws("act", ErrorCode::InvalidProgram,
         [&] { runOp("linear", {view(x, {4, 2}), view(w, {2, 2}), {}, {}}, {view(y, {4, 2}), {}}, {5}); });
  throws("u without b", ErrorCode::InvalidProgram, [&] {
    runOp("linear", {view(x, {4, 2}), view(w, {2, 2}), {}, {}, view(x, {4, 2})}, {view(y, {4, 2}), {}}, {0});
  });
  throws("up_b without up_u", ErrorCode::InvalidProgram, [&] {
    runOp("linear_gated",
          {view(x, {4, 2}), view(w, {2, 2}), view(w, {2, 2}), {}, {}, {}, {}, {}, {}, view(w, {2, 2})},
          {view(y, {4, 2}), {}, {}}, {0});
  });
}

struct Softmax {
  std::vector<double> p, logits;
  double lse;
  int64_t best;
};
Softmax softmax(const std::vector<float>& h, int64_t r, const Weight& w, int64_t V, int64_t K) {
  Softmax s;
  for (int64_t v = 0; v < V; ++v) {
    double z = 0;
    for (int64_t k = 0; k < K; ++k) z += static_cast<double>(h[static_cast<size_t>(r * K + k)]) * w.at(v, k);
    s.logits.push_back(z);
  }
  s.best = std::max_element(s.logits.begin(), s.logits.end()) - s.logits.begin();
  double total = 0;
  for (const double z : s.logits) total += std::exp(z - s.logits[static_cast<size_t>(s.best)]);
  s.lse = s.logits[static_cast<size_t>(s.best)] + std::log(total);
  for (const double z : s.logits) s.p.push_back(std::exp(z - s.lse));
  return s;
}

void testLosses() {
  for (int round = 0; round < 25; ++round) {
    const int64_t R = pick(0, 30), K = pick(1, 60), V = pick(1, 300);
    Weight w(V, K + pick(0, 9));
    auto hs = random(R * K), ht = hs, weight = random(R);
    for (float& x : ht) x += (round % 4 ? 0.3f : 0.0f) * uniform();
    std::vector<int32_t> targets;
    for (int64_t r = 0; r < R; ++r) targets.push_back(static_cast<int32_t>(pick(-1, V - 1)));
    std::vector<float> loss(1), row(static_cast<size_t>(R)), dh(static_cast<size_t>(R * K)), agree = row, ce = row, correct = row;
    std::vector<float> dw(static_cast<size_t>(V * K));
    const bool gradient = coin();
    Counters counters = runOp("divergence",
                              {view(hs, {R, K}), view(ht, {R, K}), w.view(), view(weight, {R}), view(targets, {R}), {}},
                              {view(loss, {1}), view(row, {R}), gradient ? view(dh, {R, K}) : TensorView{},
                               view(agree, {R}), view(ce, {R})},
                              {0, 0.5, 0, 0});
    CHECK(counters.flops == 2.0 * static_cast<double>(R * V * K) * (gradient ? 3 : 2), "divergence counts its work wrong");
    double total = 0;
    for (int64_t r = 0; r < R; ++r) {
      const size_t i = static_cast<size_t>(r);
      const Softmax s = softmax(hs, r, w, V, K), t = softmax(ht, r, w, V, K);
      double kl = 0;
      for (int64_t v = 0; v < V; ++v) {
        const size_t j = static_cast<size_t>(v);
        kl += t.p[j] * ((t.logits[j] - t.lse) - (s.logits[j] - s.lse));
      }
      total += weight[i] * kl;
      CHECK(std::abs(row[i] - kl) <= 1e-6 * (1 + kl), "KL %g, want %g", double(row[i]), kl);
      if (round % 4 == 0) CHECK(row[i] == 0, "KL of equal rows %g", double(row[i]));
      CHECK(agree[i] == (s.best == t.best ? 1.0f : 0.0f), "agree");
      const double entropy = targets[i] < 0 ? 0 : s.lse - s.logits[static_cast<size_t>(targets[i])];
      CHECK(std::abs(ce[i] - entropy) <= 1e-5 * (1 + entropy), "ce");
      for (int64_t k = 0; gradient && k < K; ++k) {
        double d = 0;
        for (int64_t v = 0; v < V; ++v) d += weight[i] * (s.p[static_cast<size_t>(v)] - t.p[static_cast<size_t>(v)]) * w.at(v, k);
        CHECK(std::abs(dh[static_cast<size_t>(r * K + k)] - d) <= 2e-6, "divergence dh");
      }
    }
    CHECK(std::abs(loss[0] - total) <= 1e-5 * (1 + std::abs(total)), "divergence loss");

    const bool wantsDw = coin();
    counters = runOp("cross_entropy", {view(hs, {R, K}), w.view(), view(targets, {R}), view(weight, {R})},
                     {view(loss, {1}), view(row, {R}), gradient ? view(dh, {R, K}) : TensorView{},
                      wantsDw ? view(dw, {V, K}) : TensorView{}, view(correct, {R})}, {0});
    CHECK(counters.flops == 2.0 * static_cast<double>(R * V * K) * (1 + gradient + wantsDw), "cross_entropy counts its work wrong");
    total = 0;
    std::vector<double> wantDw(static_cast<size_t>(V * K));
    for (int64_t r = 0; r < R; ++r) {
      const size_t i = static_cast<size_t>(r);
      const Softmax s = softmax(hs, r, w, V, K);
      const double entropy = targets[i] < 0 ? 0 : s.lse - s.logits[static_cast<size_t>(targets[i])];
      total += weight[i] * entropy;
      CHECK(std::abs(row[i] - entropy) <= 1e-5 * (1 + entropy), "cross_entropy row");
      CHECK(correct[i] == (targets[i] == s.best ? 1.0f : 0.0f), "correct");
      for (int64_t k = 0; k < K; ++k) {
        double d = 0;
        for (int64_t v = 0; v < V && targets[i] >= 0; ++v) {
          const double dz = weight[i] * (s.p[static_cast<size_t>(v)] - (v == targets[i]));
          d += dz * w.at(v, k);
          wantDw[static_cast<size_t>(v * K + k)] += dz * hs[static_cast<size_t>(r * K + k)];
        }
        if (gradient) CHECK(std::abs(dh[static_cast<size_t>(r * K + k)] - d) <= 2e-6, "cross_entropy dh");
      }
    }
    CHECK(std::abs(loss[0] - total) <= 1e-5 * (1 + std::abs(total)), "cross_entropy loss");
    for (size_t i = 0; wantsDw && i < dw.size(); ++i) CHECK(std::abs(dw[i] - wantDw[i]) <= 1e-5, "cross_entropy dw");
  }

  // Several chunks of rows, the vocabulary being large, and logits that are not finite.
  const int64_t R = 9, K = 2, V = 2'000'003;
  std::vector<float> hs = random(R * K), ht = random(R * K), weight(R, 1.0f), loss(1), row(R), dh(R * K), dw(static_cast<size_t>(V * K));
  std::vector<int32_t> targets(R, 5);
  auto values = random(V * K);
  runOp("divergence", {view(hs, {R, K}), view(ht, {R, K}), view(values, {V, K}), view(weight, {R}), {}, {}},
        {view(loss, {1}), view(row, {R}), view(dh, {R, K}), {}, {}}, {0, 0.5, 0, 0});
  double total = 0;
  for (const float x : row) total += x;
  CHECK(std::abs(loss[0] - total) <= 1e-5 && loss[0] > 0, "chunked divergence");
  runOp("cross_entropy", {view(hs, {R, K}), view(values, {V, K}), view(targets, {R}), view(weight, {R})},
        {view(loss, {1}), view(row, {R}), view(dh, {R, K}), view(dw, {V, K}), {}}, {0});
  double columns[2] = {0, 0}, size = 0;
  for (size_t i = 0; i < dw.size(); ++i) columns[i % 2] += dw[i], size += std::abs(dw[i]);
  CHECK(std::abs(columns[0]) + std::abs(columns[1]) < 1e-4 && size > 1, "gradients of logits must sum to 0");
  hs[0] = std::numeric_limits<float>::quiet_NaN();
  runOp("divergence", {view(hs, {R, K}), view(ht, {R, K}), view(values, {V, K}), view(weight, {R}), {}, {}},
        {view(loss, {1}), view(row, {R}), view(dh, {R, K}), {}, {}}, {0, 0.5, 0, 0});
  CHECK(std::isnan(row[0]) && std::isnan(loss[0]) && !std::isnan(row[1]) && std::isnan(dh[0]), "NaN in one row");
  targets[3] = static_cast<int32_t>(V);
  throws("targets", ErrorCode::InvalidData, [&] {
    runOp("cross_entropy", {view(ht, {R, K}), view(values, {V, K}), view(targets, {R}), view(weight, {R})},
          {view(loss, {1}), {}, {}, {}, {}}, {0});
  });
}

// Parts of a weight, and of a patch's b, have the bits of their values, and read the packed copy of the whole unless their
// rows begin within a panel.
void testParts() {
  for (int round = 0; round < 120; ++round) {
    const int axis = static_cast<int>(pick(0, 1));
    const int64_t count = pick(1, 4), size = axis == 0 && coin() ? pick(1, 3) * kernels().columns : pick(1, 70);
    const int64_t other = pick(1, 100), M = coin() ? pick(1, 5) : pick(1, 300);
    const auto frozen = [](Weight& w) {
      if (w.tensor.storage->writable) w.tensor.packAs = DType::F32;  // its values were not rounded for packing
      w.tensor.storage->writable = false;
    };
    const auto partOf = [&](Weight& w, int along, int64_t index) {
      auto part = std::make_unique<Tensor>();
      part->storage = w.tensor.storage;
      part->dtype = w.tensor.dtype, part->packAs = w.tensor.packAs;
      part->rank = 2, part->shape = w.tensor.shape, part->strides = w.tensor.strides;
      part->shape[static_cast<size_t>(along)] /= count;
      part->byteOffset = static_cast<size_t>(index * part->shape[static_cast<size_t>(along)] *
                                             part->strides[static_cast<size_t>(along)]) * dtypeSize(part->dtype);
      part->whole = {std::shared_ptr<Tensor>(), &w.tensor};
      part->partAxis = along, part->partIndex = index;
      return part;
    };
    Weight w(axis == 0 ? count * size : other, axis == 1 ? count * size : other), low(count * size, pick(1, 6));
    frozen(w), frozen(low);
    const bool transposed = coin(), patched = axis == 0 && !transposed && coin();
    const int64_t before = packedBytesTotal();
    std::vector<std::unique_ptr<Tensor>> parts;
    for (int64_t index = 0; index < count; ++index) {
      Tensor& part = *parts.emplace_back(partOf(w, axis, index));
      const TensorView v = test::viewOf(part);
      const MatrixB b = transposed ? weightTransposedB(v) : weightB(v);
      const int64_t N = v.dim(transposed ? 1 : 0), K = v.dim(transposed ? 0 : 1), P = patched ? low.K : 0;
      const auto x = random(M * K), u = random(M * low.K);
      Patch patch;
      if (patched) patch = {u.data(), P, weightB(test::viewOf(*parts.emplace_back(partOf(low, 0, index))))};
      std::vector<float> out(static_cast<size_t>(M * N)), want(out.size(), 0.0f);
      const int64_t firstRow = axis == 0 ? index * size : 0, firstColumn = axis == 1 ? index * size : 0;
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
          float& c = want[static_cast<size_t>(m * N + n)];
          for (int64_t k = 0; k < K; ++k) {
            c = chain(c, x[static_cast<size_t>(m * K + k)],
                      w.at(firstRow + (transposed ? k : n), firstColumn + (transposed ? n : k)));
          }
          for (int64_t k = 0; k < P; ++k) c = chain(c, u[static_cast<size_t>(m * P + k)], low.at(firstRow + n, k));
        }
      }
      setThreadCount(static_cast<int>(pick(1, 3)));
      multiply({M, N, K, {x.data(), K, 1}, 1, {b}, {patch}, {}, {}, out.data(), N});
      CHECK(sameBits(out, want), "part %lld of %lld along axis %d wrong: %lld x %lld x %lld, transposed %d, patched %d",
            static_cast<long long>(index), static_cast<long long>(count), axis, static_cast<long long>(M),
            static_cast<long long>(N), static_cast<long long>(K), transposed, patched);
      const bool shares = axis == 1 || size % kernels().columns == 0;
      CHECK((b.packed == weightB(w.view()).packed) == shares, "part of %lld along axis %d", static_cast<long long>(size), axis);
    }
    if (!patched && axis == 1) {
      CHECK(packedBytesTotal() - before == packedBytes(*weightB(w.view()).packed), "parts share one packed copy");
    }
  }
}

// Several products at once, with rows of their own or shared, narrow and wide, and sums of several: each has the bits that
// it has alone.
void testSeveral() {
  const bool few = kernels().rows < 10;  // portable kernels are slow
  for (int round = 0; round < (few ? 30 : 60); ++round) {
    const bool sums = round % 3 == 0;
    const int64_t count = pick(1, 7), D = pick(1, 4) == 1 ? pick(300, 500) : pick(1, 200), rowCount = pick(1, 400);
    const auto shared = random(rowCount * 200);
    const int64_t sharedK = coin() ? pick(1, 200) : 128;
    std::vector<std::unique_ptr<Weight>> weights;
    std::vector<std::vector<float>> values, before, wanted;
    std::vector<std::vector<int32_t>> indices;
    std::vector<GemmCall> calls;
    const auto floats = [&](int64_t n) -> const float* { return values.emplace_back(random(n)).data(); };
    const auto indexed = [&](int64_t n, int64_t limit) -> const int32_t* {
      return indices.emplace_back(randomRows(n, limit)).data();
    };
    const auto matrix = [&](int64_t N, int64_t K) {
      Weight& w = *weights.emplace_back(std::make_unique<Weight>(N + (coin() ? pick(0, 40) : 0), K + pick(0, 3)));
      if (round % 4 != 0) w.tensor.storage->writable = false;
      return weightB(w.view());
    };
    for (int64_t i = 0; i < count; ++i) {
      GemmCall call{};
      const bool own = sums || coin();
      call.K = own ? (pick(0, 9) == 0 ? 0 : pick(1, 200)) : sharedK;
      call.N = sums ? D : coin() ? pick(1, 100) : pick(300, 600);
      call.M = !own ? rowCount : pick(0, 9) == 0 ? 0 : pick(1, rowCount);
      if (!own) {
        call.a = {shared.data(), 200, 1};
      } else {
        call.a = {floats(rowCount * (call.K + 1)), call.K + 1, 1};
        if (coin()) call.a.rows = indexed(call.M, rowCount);
      }
      call.weights = !sums && pick(0, 3) == 0 ? 2 : 1;
      for (int j = 0; j < call.weights; ++j) {
        call.b[j] = matrix(call.N, call.K);
        if (pick(0, 2) > 0) continue;
        const int64_t P = pick(1, 20);
        call.patch[j] = {floats(std::max<int64_t>(call.M, 1) * P), P, {floats(call.N * P), DType::F32, P, 1}};
      }
      call.ldOut = call.N + (sums ? 0 : pick(0, 3));
      if (call.weights == 2) {
        call.gated.act = Act::Silu;
        if (coin()) call.gated.bias[1] = floats(call.N);
      } else {
        call.plain.act = sums || coin() ? Act::None : Act::GeluTanh;
        if (coin()) call.plain.bias = floats(call.N);
        if (coin()) call.plain.rowScale = floats(std::max<int64_t>(call.M, 1));
        call.plain.accumulate = sums || coin();
        if (sums || coin()) call.plain.rows = indexed(call.M, rowCount);
      }
      if (!sums || i == 0) before.push_back(random(rowCount * call.ldOut));
      calls.push_back(call);
    }
    // With gated products what they keep of each factor, in the place of the other outputs.
    std::vector<std::vector<float>> kept(calls.size() * 2), keptAlone(calls.size() * 2);
    const auto outputs = [&](std::vector<std::vector<float>>& out, std::vector<std::vector<float>>& keep) {
      for (size_t i = 0; i < calls.size(); ++i) {
        calls[i].out = out[sums ? 0 : i].data();
        if (calls[i].weights == 1) continue;
        for (size_t j : {0, 1}) keep[2 * i + j].assign(static_cast<size_t>(rowCount * calls[i].ldOut), 0.0f);
        calls[i].gated.g = keep[2 * i].data();
        calls[i].gated.u = keep[2 * i + 1].data();
      }
    };
    wanted = before;
    setThreadCount(1);
    outputs(wanted, keptAlone);
    for (const GemmCall& call : calls) multiply(call);
    for (const int threads : {1, 2, 5}) {
      setThreadCount(threads);
      std::vector<std::vector<float>> got = before;
      outputs(got, kept);
      Counters counters;
      Scratch scratch;
      const KernelArgs args{nullptr, nullptr, nullptr, &counters, nullptr, nullptr, Scratch::take, &scratch};
      (sums ? gemmSum : gemmTogether)(calls, args);
      for (size_t i = 0; i < got.size(); ++i) {
        CHECK(sameBits(got[i], wanted[i]), "round %d, product %zu of %zu: %s with %d threads", round, i, calls.size(),
              sums ? "a sum" : "together", threads);
      }
      for (size_t i = 0; i < kept.size(); ++i) CHECK(sameBits(kept[i], keptAlone[i]), "round %d: factor %zu", round, i);
    }
  }
}

void testAccounting() {
  const int64_t before = packedBytesTotal();
  {
    Weight w(100, 50);
    w.tensor.storage->writable = false;
    const MatrixB b = weightB(w.view()), again = weightB(w.view());
    CHECK(b.packed && b.packed == again.packed, "a weight is packed once");
    CHECK(packedBytesTotal() - before == packedBytes(*b.packed), "packed bytes are counted");
  }
  CHECK(packedBytesTotal() == before, "packed bytes are given back");
}

}  // namespace

int testGemm() {
  const int threads = threadCount();
  for (const Isa isa : {Isa::Portable, Isa::Avx2, Isa::Avx512}) {
    if (!useKernels(isa) || !useVectorOps(isa)) continue;
    current = isa;
    testProducts();
    testAdding();
    testRowIndependence();
    testDeep();
    testTables();
    testLinear();
    testLosses();
    testParts();
    testSeveral();
    testAccounting();
  }
  useKernels(isa());
  useVectorOps(isa());
  setThreadCount(threads);
  std::printf("gemm: %d failures\n", failures);
  return failures;
}
