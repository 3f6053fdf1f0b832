// Losses over the vocabulary, a few rows at a time: the logits of all rows never exist together.
#include "cuda/loss.cuh"

#include "cuda/gemm.cuh"
#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

// Rows come in chunks of two sizes.
//
// Logits, in f32, are one product of the student's and the teacher's rows together. With 512 rows it does 512 flops
// for every byte it reads of a bf16 head, where an H100 can do 295, and V / 256 columns of tiles are several waves.
//
// Gradients of several such chunks stand together, because dh = gradient w has tiles for K / 256 columns only, and for
// few rows most of the device would idle: rows for one wave, a tile of 128 x 256 on every multiprocessor, where memory
// permits. On 132 multiprocessors, in bf16: V = 128256, K = 4096 makes 256 rows of two logits (263 MB) and 1024 of
// gradients (263 MB, 8 x 16 tiles), V = 50257, K = 768 256 rows (103 MB) and 5632 (566 MB, 44 x 3 tiles).
//
// No row's result depends on chunks; dw is a sum over them, so its last bits depend on the number of multiprocessors.
constexpr int64_t kBytes = int64_t{640} << 20, kLogitsBytes = int64_t{256} << 20;
constexpr int64_t kLogitsRows = 512, kTileColumns = 256;

struct ChunkRows {
  int logits, gradients;
};

// For `matrices` of logits [R, V], and gradients of so many bytes a row, 0 where none are wanted.
ChunkRows chunkRows(const Launch& launch, int64_t R, int64_t V, int64_t K, int64_t matrices, int64_t gradientBytes) {
  const int64_t tileBytes = kProductRows * matrices * V * 4, columns = (K + kTileColumns - 1) / kTileColumns;
  int64_t logits = std::clamp<int64_t>(kLogitsBytes / tileBytes, 1, kLogitsRows / matrices / kProductRows);
  int64_t gradients = logits;
  if (gradientBytes > 0) {
    const int64_t room = (kBytes - logits * tileBytes) / (kProductRows * gradientBytes);
    gradients = std::max<int64_t>(std::min(launch.multiprocessors / columns, room), 1);
    logits = std::min(logits, gradients);
  }
  const auto rows = [=](int64_t tiles) {
    return static_cast<int>(std::clamp<int64_t>(tiles * kProductRows, 1, std::max<int64_t>(R, 1)));
  };
  return {rows(logits), rows(gradients)};
}

enum class Divergence { Kl, ReverseKl, Jsd };

// Logarithms of m / p and m / q of the mixture m = beta p + (1 - beta) q, from ratio = log(p / q) without overflow.
struct Mixed {
  float p, q;

  DEVICE Mixed(float ratio, float beta) {
    const float e = fastExp(-fabsf(ratio)), rest = 1.f - beta;
    const float mixed = logf(ratio >= 0.f ? fmaf(rest, e, beta) : fmaf(beta, e, rest));
    p = ratio >= 0.f ? mixed : mixed - ratio;
    q = ratio >= 0.f ? mixed + ratio : mixed;
  }
};

// row = a divergence of q = softmax(student) from p = softmax(teacher); gradient = weight d row / d student. One block a
// row.
template <Divergence kind>
__global__ void __launch_bounds__(kRowThreads, 2) divergenceKernel(Rows rows, Operand w, float beta, StepState state) {
  SHARED_MEMORY(LossShared, s);
  if (state.faulted()) return;
  const int V = w.size(0), count = rows.count(), tid = threadIdx.x, steps = (V + kStep - 1) / kStep;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    const int r = rows.first + i;
    const float* student = rows.logits + int64_t{i} * V;
    const float* teacher = rows.teacher(i, V);
    // With e = e^(t - max t): KL = sum e (t - s) / sum e - (log-sum-exp of t - log-sum-exp of s), which is 0 for equal
    // logits; the reverse is the same with s and t exchanged.
    Softmax ownQ, ownP;
    float ownDifference = 0;
    for (int step = 0; step < steps; ++step) {
      const int c = step * kStep + tid * 4;
      Taken x, t, eQ, eP;
      take(student, c, V, x);
      take(teacher, c, V, t);
      const float factorQ = ownQ.add(x, c, eQ), factorP = ownP.add(t, c, eP);
      if constexpr (kind == Divergence::Jsd) continue;
      const float factor = kind == Divergence::Kl ? factorP : factorQ;
      float added = 0;
      UNROLL
      for (int j = 0; j < kPieces * 4; ++j) {
        const float e = kind == Divergence::Kl ? eP[j / 4][j % 4] : eQ[j / 4][j % 4];
        const float difference = t[j / 4][j % 4] - x[j / 4][j % 4];
        added += e == 0.f ? 0.f : e * (kind == Divergence::Kl ? difference : -difference);
      }
      ownDifference = (factor == 0.f ? 0.f : ownDifference * factor) + added;
    }
    const RowSoftmax q(ownQ, s), p(ownP, s);
    const float scaleQ = static_cast<float>(1. / q.sum), scaleP = static_cast<float>(1. / p.sum);
    const float shift = static_cast<float>(p.logSum() - q.logSum());
    const auto probability = [](float logit, const RowSoftmax& of, float scale) {
      return fastExp(logit - of.top.value) * scale;
    };
    double value = 0, mean = 0;  // mean over q, of what the gradient is relative to
    if constexpr (kind == Divergence::Jsd) {
      float ownMixedP = 0, ownMixedQ = 0;
      for (int step = steps - 1; step >= 0; --step) {
        const int c = step * kStep + tid * 4;
        Taken x, t;
        take(student, c, V, x);
        take(teacher, c, V, t);
        UNROLL
        for (int j = 0; j < kPieces * 4; ++j) {
          const float a = x[j / 4][j % 4], b = t[j / 4][j % 4];
          const Mixed mixed((b - a) - shift, beta);
          const float ofP = probability(b, p, scaleP), ofQ = probability(a, q, scaleQ);
          ownMixedP += ofP == 0.f ? 0.f : ofP * mixed.p;
          ownMixedQ += ofQ == 0.f ? 0.f : ofQ * mixed.q;
        }
      }
      const double mixedP = blockTotal(static_cast<double>(ownMixedP), s.partial);
      mean = blockTotal(static_cast<double>(ownMixedQ), s.partial);
      value = 0. - beta * mixedP - (1.f - beta) * mean;
    } else {
      const RowSoftmax& of = kind == Divergence::Kl ? p : q;
      mean = blockTotal(of.factor == 0.f ? 0. : static_cast<double>(ownDifference) * of.factor, s.partial) / of.sum;
      value = kind == Divergence::Kl ? mean - (p.logSum() - q.logSum()) : mean - (q.logSum() - p.logSum());
    }
    if (tid == 0) {
      stGlobal(rows.value + r, value);
      if (rows.row) stGlobal(rows.row.f32() + r, static_cast<float>(value));
      if (rows.agree) {
        const int index = q.index(student, V);
        stGlobal(rows.agree.f32() + r, index >= 0 && index == p.index(teacher, V) ? 1.f : 0.f);
      }
      if (rows.ce) {
        const int target = rows.target(r);
        stGlobal(rows.ce.f32() + r, target < 0 ? 0.f : static_cast<float>(q.logSum() - ldGlobal(student + target)));
      }
    }
    if (!rows.gradient) continue;
    const float weight = ldGlobal(rows.weight.f32() + r), relativeTo = static_cast<float>(mean);
    // The other way round: what was read last is still in the cache.
    for (int back = steps - 1; back >= 0; --back) {
      const int c = (kind == Divergence::Jsd ? steps - 1 - back : back) * kStep + tid * 4;
      Taken x, t;
      take(student, c, V, x);
      take(teacher, c, V, t);
      UNROLL
      for (int k = 0; k < kPieces; ++k) {
        float g[4];
        UNROLL
        for (int j = 0; j < 4; ++j) {
          const float a = x[k][j], b = t[k][j], ofQ = probability(a, q, scaleQ);
          if constexpr (kind == Divergence::Kl) g[j] = weight * (ofQ - probability(b, p, scaleP));
          if constexpr (kind == Divergence::ReverseKl) g[j] = ofQ == 0.f ? 0.f : weight * (ofQ * ((a - b) - relativeTo));
          if constexpr (kind == Divergence::Jsd) {
            const float relative = Mixed((b - a) - shift, beta).q - relativeTo;
            g[j] = ofQ == 0.f ? 0.f : weight * (beta - 1.f) * (ofQ * relative);
          }
          g[j] *= slopeOf(a, rows.softcap);
        }
        rows.gradient.store(r, c + k * kStride, V, gathered(g));
      }
    }
  }
}

// row = -log softmax(student)[target]; gradient = weight (q - 1 at the target). One block a row.
__global__ void __launch_bounds__(kRowThreads, 2) crossEntropyKernel(Rows rows, Operand w, StepState state) {
  SHARED_MEMORY(LossShared, s);
  if (state.faulted()) return;
  const int V = w.size(0), count = rows.count(), tid = threadIdx.x, steps = (V + kStep - 1) / kStep;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    const int r = rows.first + i, target = rows.target(r);
    const float* logits = rows.logits + int64_t{i} * V;
    Softmax own;
    for (int step = 0; step < steps; ++step) {
      const int c = step * kStep + tid * 4;
      Taken x, e;
      take(logits, c, V, x);
      own.add(x, c, e);
    }
    const RowSoftmax q(own, s);
    if (tid == 0) {
      const double value = target < 0 ? 0. : q.logSum() - ldGlobal(logits + target);
      stGlobal(rows.value + r, value);
      if (rows.row) stGlobal(rows.row.f32() + r, static_cast<float>(value));
      if (rows.agree) stGlobal(rows.agree.f32() + r, target >= 0 && q.index(logits, V) == target ? 1.f : 0.f);
    }
    if (!rows.gradient) continue;
    const float weight = target < 0 ? 0.f : ldGlobal(rows.weight.f32() + r), scale = static_cast<float>(1. / q.sum);
    for (int step = steps - 1; step >= 0; --step) {
      const int c = step * kStep + tid * 4;
      Taken x;
      take(logits, c, V, x);
      UNROLL
      for (int k = 0; k < kPieces; ++k) {
        const int at = c + k * kStride;
        float g[4];
        UNROLL
        for (int j = 0; j < 4; ++j) {
          const float e = fastExp(x[k][j] - q.top.value) * scale;
          g[j] = target < 0 ? 0.f : weight * (at + j == target ? e - 1.f : e) * slopeOf(x[k][j], rows.softcap);
        }
        rows.gradient.store(r, at, V, gathered(g));
      }
    }
  }
}

// Caps the logits of a chunk, of the student and of the teacher where there is one, by whichever softcap is not 0.
__global__ void __launch_bounds__(kRowThreads, 2) capKernel(Rows rows, Operand w, bool teacher, StepState state) {
  if (state.faulted()) return;
  const int V = w.size(0), count = rows.count();
  const auto cap = [&](float* logits, float softcap) {
    if (softcap == 0.f) return;
    forElements(int64_t{count} * V, false, [&]<typename T>(int64_t i) {
      stGlobal(logits + i, softcap * tanhf(ldGlobal(logits + i) / softcap));
    });
  };
  cap(rows.logits, rows.softcap);
  if (teacher) cap(const_cast<float*>(rows.teacher(0, V)), rows.teacherSoftcap);
}

// The student's rows of a chunk and then the teacher's, for one product, and how many these are.
__global__ void __launch_bounds__(kRowThreads, 2)
    joinKernel(Operand student, Operand teacher, int first, int most, Operand joined, int32_t* rows, StepState state) {
  if (state.faulted()) return;
  const int K = student.size(1), count = max(0, min(student.size(0) - first, most));
  const bool vectors = K % 4 == 0 && startsAligned(student, teacher);
  forCells(2 * count, K, vectors, [&]<typename V>(int r, int c) {
    const auto row = [&](int of) { return int64_t{first + of} * K + c; };
    store(joined, int64_t{r} * K + c, r < count ? load<V>(student, row(r)) : load<V>(teacher, row(r - count)));
  });
  if (blockIdx.x == 0 && threadIdx.x == 0) stGlobal(rows, 2 * count);
}

// loss = sum of weight[r] value[r], in an order that the number of rows decides.
__global__ void __launch_bounds__(kRowThreads, 2)
    weightedSumKernel(Operand weight, const double* value, Operand hidden, Operand teacher, Operand w, int products,
                      float* loss, StepState state) {
  SHARED_MEMORY(LossShared, s);
  if (state.faulted()) return;
  const int R = weight.size(0);
  double sum = 0;
  for (int r = threadIdx.x; r < R; r += kRowThreads) sum += ldGlobal(weight.f32() + r) * ldGlobal(value + r);
  sum = blockTotal(sum, s.partial);
  if (threadIdx.x > 0) return;
  stGlobal(loss, static_cast<float>(sum));
  state.count(2. * R * w.size(0) * (1. * products * hidden.size(1) + (teacher ? teacher.size(1) : 0)), 0);
}

}  // namespace

void vocabularyLoss(const Launch& launch, const std::function<void(const Rows&)>& launchRows, const Operand& h,
                    const Operand& teacher, const Operand& w, const Operand& wt, Rows rows, const Operand& loss,
                    const Operand& dh, const Operand& dw) {
  const int64_t R = h.bound[0], V = w.bound[0], K = h.bound[1];
  // The precisions that gemm.cu multiplies in, so that nothing is converted.
  const bool narrowWeight = w.dtype == DType::BF16;
  const bool narrowInput = narrowWeight && (h.dtype == DType::BF16 || dh.dtype == DType::BF16);
  const bool narrowRows = h.dtype == DType::BF16;
  const bool wide = (dh && !narrowInput) || (dw && !narrowRows), narrow = (dh && narrowInput) || (dw && narrowRows);
  const int64_t matrices = teacher ? 2 : 1, pitch = (V + 7) / 8 * 8;
  const ChunkRows chunk = chunkRows(launch, R, V, K, matrices, pitch * ((wide ? 4 : 0) + (narrow ? 2 : 0)));

  rows.logits = launch.scratch<float>(matrices * chunk.logits * V);
  rows.teacherAt = wt ? chunk.logits : 0;
  if (loss) rows.value = launch.scratch<double>(R);
  rows.gradient.pitch = static_cast<int>(pitch);
  if (wide) rows.gradient.wide = launch.scratch<float>(chunk.gradients * pitch);
  if (narrow) rows.gradient.narrow = launch.scratch<bf16>(chunk.gradients * pitch);
  const auto gradient = [&](bool inBf16) {
    Matrix m = inBf16 ? Matrix(rows.gradient.narrow) : Matrix(rows.gradient.wide);
    m.stride = rows.gradient.pitch;
    return m;
  };
  Operand joined;
  int32_t* joinedRows = nullptr;
  const bool together = teacher && !wt;
  if (together) {
    joined.dtype = narrowWeight ? h.dtype : DType::F32;
    const int64_t elements = 2 * chunk.logits * K;
    joined.data = joined.dtype == DType::BF16 ? static_cast<void*>(launch.scratch<bf16>(elements))
                                              : launch.scratch<float>(elements);
    joinedRows = launch.scratch<int32_t>(1);
  }

  // One chunk at least: without rows dw is 0.
  for (int first = 0; first == 0 || first < R; first += chunk.gradients) {
    const int end = std::min<int64_t>(first + chunk.gradients, R);
    rows.gradient.first = first;
    for (rows.first = first; rows.first < end; rows.first += chunk.logits) {
      rows.most = std::min(chunk.logits, end - rows.first);
      Product logits(launch, Extent(h, 0).part(rows.first, rows.most), {w, 0}, {h, 1});
      logits.a = Matrix(h);
      logits.a.first = rows.first;
      if (together) {
        LAUNCH(joinKernel, launch.blocks(2 * rows.most * K, 4 * kRowThreads), kRowThreads, 0, launch.stream, h, teacher,
               rows.first, rows.most, joined, joinedRows, launch.state);
        logits.m = Extent();
        logits.m.size = joinedRows;
        logits.m.bound = 2 * rows.most;
        logits.a = Matrix(joined);
      }
      logits.b[0] = weight(w);
      logits.out = rows.logits;
      logits.countsFlops = !loss;
      multiplyWeight(launch, logits);
      if (wt) {
        Product own(launch, Extent(teacher, 0).part(rows.first, rows.most), {wt, 0}, {teacher, 1});
        own.a = Matrix(teacher);
        own.a.first = rows.first;
        own.b[0] = weight(wt);
        own.out = rows.logits + int64_t{rows.teacherAt} * V;
        own.countsFlops = false;
        multiplyWeight(launch, own);
      }
      if (rows.softcap > 0 || rows.teacherSoftcap > 0) {
        LAUNCH(capKernel, launch.blocks(rows.most * V, 4 * kRowThreads), kRowThreads, 0, launch.stream, rows, w,
               static_cast<bool>(teacher), launch.state);
      }
      launchRows(rows);
    }
    const Extent inChunk = Extent(h, 0).part(first, chunk.gradients);
    if (dh) {  // dh[first + r] = gradient[r] w
      Product p(launch, inChunk, {dh, 1}, {w, 0});
      p.a = gradient(narrowInput);
      p.b[0] = weight(w);
      p.out = dh;
      p.first = first;
      p.countsFlops = false;
      multiplyTransposed(launch, p);
    }
    if (dw) {  // dw (+)= gradient^T h, chunk after chunk in the order of the rows
      Product p(launch, {dw, 0}, {dw, 1}, inChunk);
      p.a = gradient(narrowRows);
      p.b[0] = Matrix(h);
      p.b[0].first = first;
      if (first > 0) p.add = dw;
      p.out = dw;
      p.countsFlops = false;
      multiplyRows(launch, p);
    }
  }
  if (!loss) return;
  LAUNCH(weightedSumKernel, 1, kRowThreads, sizeof(LossShared), launch.stream, rows.weight, rows.value, h, teacher, w,
         1 + (dh ? 1 : 0) + (dw ? 1 : 0), floats(loss), launch.state);
}

void divergence(const Launch& launch) {
  const Operand &hs = launch.in[0], &ht = launch.in[1], &w = launch.in[2], &targets = launch.in[4], &wt = launch.in[5];
  const auto kind = static_cast<Divergence>(launch.intAttribute(0, "kind", 0, 2));
  const float beta = checkedShare("divergence", "beta", launch.attr[1]);
  if (!wt && ht.bound[1] != hs.bound[1]) {
    fail(ErrorCode::InvalidProgram, "[divergence] ht must be as wide as hs, %lld, or have a wt, got %lld",
         static_cast<long long>(hs.bound[1]), static_cast<long long>(ht.bound[1]));
  }
  const Operand* out = launch.out;
  Rows rows;
  rows.softcap = checkedSoftcap("divergence", "softcap", launch.attr[2]);
  rows.teacherSoftcap = checkedSoftcap("divergence", "teacher_softcap", launch.attr[3]);
  rows.weight = launch.in[3];
  rows.targets = targets;
  rows.row = out[1];
  rows.agree = out[3];
  rows.ce = out[4];
  if (rows.ce && !targets) fail(ErrorCode::InvalidProgram, "[divergence] targets must be given where ce is wanted");
  if (targets) checkTargets(launch, 4, w, 0);
  const auto launchRows = [&](const Rows& chunk) {
    const auto with = [&](const auto& kernel) {
      LAUNCH(kernel, launch.blocks(chunk.most, 1), kRowThreads, sizeof(LossShared), launch.stream, chunk, w, beta,
             launch.state);
    };
    if (kind == Divergence::Kl) with(divergenceKernel<Divergence::Kl>);
    if (kind == Divergence::ReverseKl) with(divergenceKernel<Divergence::ReverseKl>);
    if (kind == Divergence::Jsd) with(divergenceKernel<Divergence::Jsd>);
  };
  vocabularyLoss(launch, launchRows, hs, ht, w, wt, rows, out[0], out[2], {});
}

void crossEntropy(const Launch& launch) {
  const Operand &h = launch.in[0], &w = launch.in[1];
  const Operand* out = launch.out;
  Rows rows;
  rows.softcap = checkedSoftcap("cross_entropy", "softcap", launch.attr[0]);
  rows.weight = launch.in[3];
  rows.targets = launch.in[2];
  rows.row = out[1];
  rows.agree = out[4];
  checkTargets(launch, 2, w, 0);
  const auto launchRows = [&](const Rows& chunk) {
    LAUNCH(crossEntropyKernel, launch.blocks(chunk.most, 1), kRowThreads, sizeof(LossShared), launch.stream, chunk, w,
           launch.state);
  };
  vocabularyLoss(launch, launchRows, h, {}, w, {}, rows, out[0], out[2], out[3]);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
