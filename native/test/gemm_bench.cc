// Measures the matrix engine against the machine: FMA peak, GFLOP/s by shape, slices, routed FFN, experts, GEMV bandwidth.
//
//   elastiform_gemm_bench [--quick] [--cpu-time] [filter]     filter: only sections whose name contains it
//
// --cpu-time counts the processor time of the process divided by its threads: what a machine shared with other work
// would do alone, less what waiting costs.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/pool.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/kernel.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "test/view.h"

namespace {

using namespace elastiform;
using namespace elastiform::cpu;
using test::viewOf;

// Scratch that is reset between calls.
struct Scratch {
  std::vector<uint8_t> bytes;
  size_t used = 0;
  static void* take(void* self, size_t count) {
    auto& s = *static_cast<Scratch*>(self);
    const size_t at = (s.used + 63) / 64 * 64;
    if (at + count + 64 > s.bytes.size()) {
      std::fprintf(stderr, "scratch too small\n");
      std::abort();
    }
    s.used = at + count;
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(s.bytes.data()) + 63) / 64 * 64 + at);
  }
};

Scratch scratch;
Counters counters;
std::atomic<bool> abortFlag{false};
int64_t produced[4];

KernelArgs arguments() {
  scratch.used = 0;
  return {nullptr, nullptr, nullptr, &counters, &abortFlag, produced, Scratch::take, &scratch};
}

std::unique_ptr<Tensor> makeWeight(DType packAs, int64_t N, int64_t K, std::mt19937& random) {
  auto tensor = std::make_unique<Tensor>();
  auto storage = std::make_shared<Storage>();
  storage->bytes = static_cast<size_t>(N * K) * 4;
  auto* data = new float[static_cast<size_t>(N * K)];
  for (int64_t i = 0; i < N * K; ++i) data[i] = static_cast<float>(random()) * 0x1p-32f - 0.5f;
  storage->data = reinterpret_cast<uint8_t*>(data);
  storage->release = [data] { delete[] data; };
  tensor->storage = storage;
  tensor->rank = 2;
  tensor->shape = {N, K};
  tensor->strides = {K, 1};
  tensor->packAs = packAs;
  return tensor;
}

bool cpuTime = false;

double now() {
  if (cpuTime) return static_cast<double>(std::clock()) / CLOCKS_PER_SEC / threadCount();
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double budgetSeconds = 0.5;

// The best of many short batches: the machine may be shared, and what others take is not ours to report. A batch is
// shorter than a scheduler's slice, so that some are left alone even on a busy machine.
double seconds(const std::function<void()>& body) {
  body();
  double once = now();
  body();
  once = now() - once;
  const int repeats = std::max(1, static_cast<int>(1e-3 / std::max(once, 1e-7)));
  double best = 1e30;
  const double end = now() + std::max(budgetSeconds, 5 * once);
  while (now() < end) {
    const double start = now();
    for (int i = 0; i < repeats; ++i) body();
    best = std::min(best, (now() - start) / repeats);
  }
  return best;
}

double peak(int threads) {
  setThreadCount(threads);
  const KernelTable& table = kernels();
  constexpr int64_t steps = 20'000;
  std::vector<float> sink(static_cast<size_t>(threads));
  const double t = seconds([&] {
    parallelFor(threads, [&](int64_t chunk, int) { sink[static_cast<size_t>(chunk)] = table.fmaPeak(steps); }, nullptr);
  });
  return static_cast<double>(steps * table.fmaWidth * threads) / t * 1e-9;
}

std::vector<float> matrix(int64_t count, std::mt19937& random) {
  std::vector<float> m(static_cast<size_t>(count));
  for (float& x : m) x = static_cast<float>(random()) * 0x1p-32f - 0.5f;
  return m;
}

// Copies of a weight, used in turn so that each comes from memory as in a model.
struct Rotation {
  std::vector<std::unique_ptr<Tensor>> copies;
  size_t turn = 0;
  Rotation(DType packAs, int64_t N, int64_t K, std::mt19937& random) {
    const int64_t bytes = N * K * static_cast<int64_t>(dtypeSize(packAs));
    const int64_t count = std::clamp<int64_t>((int64_t{160} << 20) / bytes, 1, 20);
    for (int64_t i = 0; i < count; ++i) {
      copies.push_back(makeWeight(packAs, N, K, random));
      weightB(viewOf(*copies.back()));
    }
  }
  MatrixB next() {
    turn = (turn + 1) % copies.size();
    return weightB(viewOf(*copies[turn]));
  }
  MatrixB nextTransposed() {
    turn = (turn + 1) % copies.size();
    return weightTransposedB(viewOf(*copies[turn]));
  }
};

}  // namespace

int main(int argc, char** argv) {
  std::string filter;
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--quick")) {
      budgetSeconds = 0.1;
    } else if (!std::strcmp(argv[i], "--cpu-time")) {
      cpuTime = true;
    } else {
      filter = argv[i];
    }
  }
  const auto section = [&](const char* name) { return filter.empty() || std::string(name).find(filter) != std::string::npos; };
  scratch.bytes.resize(size_t{512} << 20);
  std::mt19937 random(1);
  const int most = threadCount();
  std::vector<int> threadCounts{1};
  if (most > 1) threadCounts.push_back(most);
  std::vector<double> peaks;
  for (const int threads : threadCounts) {
    peaks.push_back(peak(threads));
    std::printf("%s, %d thread(s): FMA peak %.1f GFLOP/s\n", isaName(), threads, peaks.back());
  }

  struct Shape {
    int64_t M, K, N;
  };
  const std::vector<Shape> shapes{{1, 768, 3072},   {4, 768, 3072},   {8, 768, 3072},    {16, 768, 3072},  {64, 768, 3072},
                                  {256, 768, 3072}, {512, 768, 3072}, {512, 3072, 768},  {512, 768, 768},  {2048, 768, 3072},
                                  {512, 256, 1024}, {4096, 384, 384}, {4096, 384, 1536}, {4096, 1536, 384},  {512, 288, 768},  {128, 768, 50257}, {512, 768, 1}};
  if (section("shapes")) {
    for (const DType type : {DType::F32, DType::BF16}) {
      std::printf("\nshapes, packed %s: M x K x N: GFLOP/s (%% of peak) [GB/s of weight]\n", dtypeName(type));
      for (const Shape& s : shapes) {
        Rotation weights(type, s.N, s.K, random);
        const auto a = matrix(s.M * s.K, random);
        std::vector<float> out(static_cast<size_t>(s.M * s.N));
        std::printf("%5lld x %4lld x %5lld", static_cast<long long>(s.M), static_cast<long long>(s.K),
                    static_cast<long long>(s.N));
        for (size_t i = 0; i < threadCounts.size(); ++i) {
          setThreadCount(threadCounts[i]);
          const double t = seconds([&] {
            gemm(s.M, s.N, s.K, {a.data(), s.K, 1}, weights.next(), {}, out.data(), s.N, arguments());
          });
          const double rate = 2e-9 * static_cast<double>(s.M * s.N * s.K) / t;
          std::printf("   %dt %6.1f (%3.0f%%) [%5.1f]", threadCounts[i], rate, 100 * rate / peaks[i],
                      1e-9 * static_cast<double>(s.N * s.K * static_cast<int64_t>(dtypeSize(type))) / t);
        }
        std::printf("\n");
        std::fflush(stdout);
      }
    }
  }

  setThreadCount(most);
  if (section("gradients")) {
    std::printf("\ngradients, %d threads: GFLOP/s (%% of peak)\n", most);
    for (const Shape& s : std::vector<Shape>{{64, 3072, 768}, {512, 3072, 768}, {512, 768, 3072}, {64, 50257, 768}, {128, 50257, 768}}) {
      Rotation weights(DType::F32, s.K, s.N, random);  // B is the transpose
      const auto a = matrix(s.M * s.K, random);
      std::vector<float> out(static_cast<size_t>(s.M * s.N));
      const double t = seconds([&] {
        gemm(s.M, s.N, s.K, {a.data(), s.K, 1}, weights.nextTransposed(), {}, out.data(), s.N, arguments());
      });
      const double rate = 2e-9 * static_cast<double>(s.M * s.N * s.K) / t;
      std::printf("dx %lld x %lld x %lld  %.1f (%.0f%%)\n", static_cast<long long>(s.M), static_cast<long long>(s.K),
                  static_cast<long long>(s.N), rate, 100 * rate / peaks.back());
    }
    for (const Shape& s : std::vector<Shape>{{3072, 512, 768}, {768, 512, 3072}, {768, 512, 768}, {50257, 64, 768}}) {
      const auto dy = matrix(s.K * s.M, random), x = matrix(s.K * s.N, random);
      std::vector<float> out(static_cast<size_t>(s.M * s.N));
      const double t = seconds([&] {
        gemm(s.M, s.N, s.K, {dy.data(), 1, s.M}, {x.data(), DType::F32, 1, s.N}, {}, out.data(), s.N, arguments());
      });
      const double rate = 2e-9 * static_cast<double>(s.M * s.N * s.K) / t;
      std::printf("dw %lld x %lld over %lld  %.1f (%.0f%%)\n", static_cast<long long>(s.M), static_cast<long long>(s.N),
                  static_cast<long long>(s.K), rate, 100 * rate / peaks.back());
    }
  }

  if (section("slices")) {
    std::printf("\nprefix slices, %d threads: time / time of the whole, times the inverse share (1 = linear)\n", most);
    Rotation up(DType::F32, 3072, 768, random), down(DType::F32, 768, 3072, random);
    for (const int64_t M : {1, 8, 64, 512}) {
      const auto a = matrix(M * 3072, random);
      std::vector<float> out(static_cast<size_t>(M * 3072));
      double whole[2] = {0, 0};
      for (const int64_t share : {1, 2, 4, 8}) {
        const int64_t m = 3072 / share;
        const double t[2] = {
            seconds([&] { gemm(M, m, 768, {a.data(), 768, 1}, up.next(), {}, out.data(), m, arguments()); }),
            seconds([&] { gemm(M, 768, m, {a.data(), m, 1}, down.next(), {}, out.data(), 768, arguments()); })};
        for (int i = 0; i < 2; ++i) {
          if (share == 1) whole[i] = t[i];
          std::printf("%s M %lld 1/%lld  %.3f    ", i ? "K" : "N", static_cast<long long>(M),
                      static_cast<long long>(share), t[i] / whole[i] * static_cast<double>(share));
        }
        std::printf("\n");
      }
    }
  }

  if (section("ffn")) {
    std::printf("\nrouted FFN, T 512, 768 -> 3072 -> 768, %d threads\n", most);
    Rotation up(DType::F32, 3072, 768, random), down(DType::F32, 768, 3072, random);
    const auto x = matrix(512 * 768, random), bias = matrix(3072, random), gate = matrix(512, random);
    std::vector<float> hidden(512 * 3072), y(512 * 768);
    double dense = 0;
    for (const int64_t k : {512, 256, 128, 64, 32, 8, 1}) {
      std::vector<int32_t> rows;
      for (int64_t i = 0; i < k; ++i) rows.push_back(static_cast<int32_t>(i * 512 / k));
      const double t = seconds([&] {
        Epilogue first, second;
        first.bias = second.bias = bias.data();
        first.act = Act::GeluTanh;
        second.rowScale = gate.data();
        second.rows = rows.data();
        second.accumulate = true;
        gemm(k, 3072, 768, {x.data(), 768, 1, rows.data()}, up.next(), first, hidden.data(), 3072, arguments());
        gemm(k, 768, 3072, {hidden.data(), 3072, 1}, down.next(), second, y.data(), 768, arguments());
      });
      if (k == 512) dense = t;
      const double rate = 4e-9 * static_cast<double>(k * 768 * 3072) / t;
      std::printf("k %3lld  %8.3f ms  %.1f GFLOP/s (%.0f%%)  dense / this %.2f (ideal %.0f)\n", static_cast<long long>(k),
                  t * 1e3, rate, 100 * rate / peaks.back(), dense / t, 512.0 / static_cast<double>(k));
    }
  }

  if (section("experts")) {
    std::printf("\nhalf of E experts of every row, T 512, %d threads: time / (time of the whole * share of the rows)\n", most);
    const int64_t T = 512, D = 768;
    for (const auto [E, units] : {std::pair<int64_t, int64_t>{12, 64}, {8, 384}, {16, 192}}) {
      const int64_t all = E * units;
      Rotation up(DType::F32, all, D, random), down(DType::F32, D, all, random);
      const auto x = matrix(T * D, random);
      std::vector<float> hidden(static_cast<size_t>(T * all)), y(static_cast<size_t>(T * D));
      std::vector<std::vector<int32_t>> rows(static_cast<size_t>(E));
      double share = 0;
      for (auto& own : rows) {
        for (int32_t t = 0; t < T; ++t) {
          if (random() & 1) own.push_back(t);
        }
        share += static_cast<double>(own.size()) / static_cast<double>(T * E);
      }
      // Up: every part of the outputs of rows of x. Down: of the inputs, added to rows of y.
      const auto calls = [&](const MatrixB& weight, bool down) {
        std::vector<GemmCall> calls;
        float* part = hidden.data();
        for (int64_t e = 0; e < E; ++e) {
          const auto& own = rows[static_cast<size_t>(e)];
          const int64_t M = static_cast<int64_t>(own.size());
          GemmCall call{M, down ? D : units, down ? units : D, {x.data(), D, 1, own.data()}};
          call.b[0] = weight;
          (down ? call.b[0].packedK : call.b[0].packedN) += e * units;
          if (down) {
            call.a = {part, units, 1};
            call.plain.accumulate = true;
            call.plain.rows = own.data();
          }
          call.out = down ? y.data() : part;
          call.ldOut = call.N;
          part += M * units;
          calls.push_back(call);
        }
        return calls;
      };
      Epilogue add;
      add.accumulate = true;
      const std::function<void()> runs[] = {
          [&] { gemm(T, all, D, {x.data(), D, 1}, up.next(), {}, hidden.data(), all, arguments()); },
          [&] { gemmTogether(calls(up.next(), false), arguments()); },
          [&] { gemm(T, D, all, {hidden.data(), all, 1}, down.next(), add, y.data(), D, arguments()); },
          [&] { gemmSum(calls(down.next(), true), arguments()); }};
      double best[4] = {1e30, 1e30, 1e30, 1e30};
      for (int turn = 0; turn < 3; ++turn) {
        for (int i = 0; i < 4; ++i) best[i] = std::min(best[i], seconds(runs[i]));
      }
      std::printf("E %2lld of %lld  up %.2f  down %.2f\n", static_cast<long long>(E), static_cast<long long>(units),
                  best[1] / best[0] / share, best[3] / best[2] / share);
    }
  }

  if (section("loss")) {
    const int64_t R = 512, K = 768, V = 50257;
    auto w = makeWeight(DType::F32, V, K, random);
    auto hs = matrix(R * K, random), ht = matrix(R * K, random);
    std::vector<float> weight(R, 1.0f / R), dh(static_cast<size_t>(R * K)), row(R), agree(R), loss(1);
    const auto view = [](float* data, std::vector<int64_t> shape) {
      TensorView v;
      v.data = data;
      v.rank = static_cast<int>(shape.size());
      int64_t stride = 1;
      for (int d = v.rank - 1; d >= 0; --d) {
        v.shape[static_cast<size_t>(d)] = shape[static_cast<size_t>(d)];
        v.strides[static_cast<size_t>(d)] = stride;
        stride *= shape[static_cast<size_t>(d)];
      }
      return v;
    };
    const TensorView in[6] = {view(hs.data(), {R, K}), view(ht.data(), {R, K}), viewOf(*w), view(weight.data(), {R})};
    const double attributes[2] = {0, 0.5};
    for (const bool gradient : {false, true}) {
      const TensorView out[5] = {view(loss.data(), {1}), view(row.data(), {R}),
                                 gradient ? view(dh.data(), {R, K}) : TensorView{}, view(agree.data(), {R}), {}};
      const double t = seconds([&] {
        KernelArgs args = arguments();
        args.in = in;
        args.out = out;
        args.attr = attributes;
        divergence(args);
      });
      const double rate = (gradient ? 6e-9 : 4e-9) * static_cast<double>(R * K * V) / t;
      std::printf("\ndivergence %lld x %lld, V %lld%s: %.1f ms, %.1f GFLOP/s (%.0f%%)\n", static_cast<long long>(R),
                  static_cast<long long>(K), static_cast<long long>(V), gradient ? ", gradient" : "", t * 1e3, rate,
                  100 * rate / peaks.back());
    }
  }
  return 0;
}
