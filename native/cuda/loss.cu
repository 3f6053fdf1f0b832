// Losses over the vocabulary, a few rows at a time: the logits of all rows never exist together.
#include "cuda/collectives.cuh"
#include "cuda/four.cuh"
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

constexpr int kThreads = 512;

// What a thread takes of a row at once: pieces of four logits, as many pieces apart as there are threads.
constexpr int kPieces = 2, kStride = 4 * kThreads, kStep = kPieces * kStride;
using Taken = float[kPieces][4];

// Logits [c, c + 4) of a row; past its end -inf.
DEVICE float4 logitsAt(const float* row, int c, int V) {
  if (c + 4 <= V && alignedFour(row + c)) return ldGlobal<float4>(row + c);
  const auto at = [&](int i) { return i < V ? ldGlobal(row + i) : -INFINITY; };
  return {at(c), at(c + 1), at(c + 2), at(c + 3)};
}

DEVICE void take(const float* row, int c, int V, Taken& x) {
  UNROLL
  for (int i = 0; i < kPieces; ++i) spread(logitsAt(row, c + i * kStride, V), x[i]);
}

// The largest logit, NaN passed over, and the first piece that has it.
struct Top {
  float value = -INFINITY;
  int piece = INT32_MAX;

  // What exponents are relative to: where there is no logit but -inf, e^-inf must not become e^(-inf + inf).
  DEVICE float reference() const { return value == -INFINITY ? 0.f : value; }
};

struct LossShared {
  double partial[kThreads / 32];
  Top top[kThreads / 32];
};

DEVICE Top warpTop(Top top) {
  UNROLL
  for (int lanes = 16; lanes > 0; lanes >>= 1) {
    const Top other{shflXor(top.value, lanes), shflXor(top.piece, lanes)};
    if (other.value > top.value || (other.value == top.value && other.piece < top.piece)) top = other;
  }
  return top;
}

DEVICE Top blockTop(Top top, LossShared& s) {
  top = warpTop(top);
  syncThreads();  // the previous one has been read
  if (laneId() == 0) s.top[warpId()] = top;
  syncThreads();  // top is complete
  return warpTop(s.top[laneId() % (kThreads / 32)]);
}

// The sum of e^(logit - top) of a row, by one pass: it shrinks when a larger logit comes. In floats within a thread,
// over a few hundred logits, and in doubles over the block.
struct Softmax {
  Top top;
  float sum = 0;

  // e = e^(x - top). Returns by what the sum has shrunk.
  DEVICE float add(const Taken& x, int c, Taken& e) {
    const float before = top.value;
    UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const float most = fmaxf(fmaxf(x[i][0], x[i][1]), fmaxf(x[i][2], x[i][3]));
      if (most > top.value) top = {most, c + i * kStride};
    }
    const float reference = top.reference(), factor = fastExp(before - reference);
    float added = 0;
    UNROLL
    for (int i = 0; i < kPieces; ++i) {
      UNROLL
      for (int j = 0; j < 4; ++j) e[i][j] = fastExp(x[i][j] - reference);
      added += (e[i][0] + e[i][1]) + (e[i][2] + e[i][3]);
    }
    sum = fmaf(sum, factor, added);
    return factor;
  }
};

// Of the whole row, in all threads.
struct RowSoftmax {
  Top top;
  double sum;
  float factor;  // by which the sums of this thread shrink

  DEVICE RowSoftmax(const Softmax& own, LossShared& s) : top(blockTop(own.top, s)) {
    factor = fastExp(own.top.value - top.reference());
    sum = blockTotal(static_cast<double>(own.sum) * factor, s.partial);
  }
  DEVICE double logSum() const { return top.value + log(sum); }
  // Of the largest logit, the first of several; -1 where there is none, or a NaN.
  DEVICE int index(const float* row, int V) const {
    if (!(sum > 0)) return -1;
    const float4 x = logitsAt(row, top.piece, V);
    return top.piece + (x.x == top.value ? 0 : x.y == top.value ? 1 : x.z == top.value ? 2 : 3);
  }
};

// Of the logits, [chunk, pitch], in every precision that a product takes; null otherwise.
struct Gradient {
  float* wide = nullptr;
  bf16* narrow = nullptr;
  int pitch = 0;  // rows start where eight elements may be moved at once
  int first = 0;  // row of the chunk

  __host__ __device__ explicit operator bool() const { return wide || narrow; }
  DEVICE void store(int r, int c, int V, const float4& g) const {
    const int64_t at = int64_t{r - first} * pitch + c;
    if (wide) storeFour(wide + at, g, V - c);
    if (narrow) storeFour(narrow + at, g, V - c);
  }
};

// What both losses share; absent outputs are null.
struct Rows {
  Operand weight, targets;
  float* logits = nullptr;  // of the student's rows of the chunk, then of the teacher's
  double* value = nullptr;  // of every row
  Operand row, ce, agree;
  int first = 0, most = 0;  // of the chunk
  Gradient gradient;

  DEVICE int count() const { return max(0, min(weight.size(0) - first, most)); }
  DEVICE int target(int r) const { return targets ? ldGlobal(targets.i32() + r) : -1; }
};

// row = KL(softmax(teacher) || softmax(student)); gradient = weight (q - p). One block a row.
__global__ void __launch_bounds__(kThreads, 2) distillKernel(Rows rows, Operand w, StepState state) {
  SHARED_MEMORY(LossShared, s);
  if (state.faulted()) return;
  const int V = w.size(0), count = rows.count(), tid = threadIdx.x, steps = (V + kStep - 1) / kStep;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    const int r = rows.first + i;
    const float* student = rows.logits + int64_t{i} * V;
    const float* teacher = rows.logits + int64_t{count + i} * V;
    // With e = e^(t - max t): KL = sum e (t - s) / sum e - (log-sum-exp of t - log-sum-exp of s), which is 0 for equal
    // logits.
    Softmax ownQ, ownP;
    float ownDifference = 0;
    for (int step = 0; step < steps; ++step) {
      const int c = step * kStep + tid * 4;
      Taken x, t, e;
      take(student, c, V, x);
      take(teacher, c, V, t);
      ownQ.add(x, c, e);
      const float factor = ownP.add(t, c, e);
      float added = 0;
      UNROLL
      for (int j = 0; j < kPieces * 4; ++j) {
        const float p = e[j / 4][j % 4];
        added += p == 0.f ? 0.f : p * (t[j / 4][j % 4] - x[j / 4][j % 4]);
      }
      ownDifference = (factor == 0.f ? 0.f : ownDifference * factor) + added;
    }
    const RowSoftmax q(ownQ, s), p(ownP, s);
    const double difference =
        blockTotal(p.factor == 0.f ? 0. : static_cast<double>(ownDifference) * p.factor, s.partial);
    if (tid == 0) {
      const double value = difference / p.sum - (p.logSum() - q.logSum());
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
    const float weight = ldGlobal(rows.weight.f32() + r);
    const float scaleQ = static_cast<float>(1. / q.sum), scaleP = static_cast<float>(1. / p.sum);
    // Backwards: what was read last is still in the cache.
    for (int step = steps - 1; step >= 0; --step) {
      const int c = step * kStep + tid * 4;
      Taken x, t;
      take(student, c, V, x);
      take(teacher, c, V, t);
      UNROLL
      for (int k = 0; k < kPieces; ++k) {
        float g[4];
        UNROLL
        for (int j = 0; j < 4; ++j) {
          g[j] = weight * (fastExp(x[k][j] - q.top.value) * scaleQ - fastExp(t[k][j] - p.top.value) * scaleP);
        }
        rows.gradient.store(r, c + k * kStride, V, gathered(g));
      }
    }
  }
}

// row = -log softmax(student)[target]; gradient = weight (q - 1 at the target). One block a row.
__global__ void __launch_bounds__(kThreads, 2) crossEntropyKernel(Rows rows, Operand w, StepState state) {
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
          g[j] = target < 0 ? 0.f : weight * (at + j == target ? e - 1.f : e);
        }
        rows.gradient.store(r, at, V, gathered(g));
      }
    }
  }
}

// The student's rows of a chunk and then the teacher's, for one product, and how many these are.
__global__ void __launch_bounds__(kThreads, 2)
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
__global__ void __launch_bounds__(kThreads, 2)
    weightedSumKernel(Operand weight, const double* value, Operand hidden, Operand w, int products, float* loss,
                      StepState state) {
  SHARED_MEMORY(LossShared, s);
  if (state.faulted()) return;
  const int R = weight.size(0);
  double sum = 0;
  for (int r = threadIdx.x; r < R; r += kThreads) sum += ldGlobal(weight.f32() + r) * ldGlobal(value + r);
  sum = blockTotal(sum, s.partial);
  if (threadIdx.x > 0) return;
  stGlobal(loss, static_cast<float>(sum));
  state.count(2. * R * w.size(0) * hidden.size(1) * products, 0);
}

// A loss by `kernel`, of student rows h and, where there are any, teacher rows, and the gradients that are wanted.
template <typename Kernel>
void vocabularyLoss(const Launch& launch, const Kernel& kernel, const Operand& h, const Operand& teacher,
                    const Operand& w, Rows rows, const Operand& loss, const Operand& dh, const Operand& dw) {
  const int64_t R = h.bound[0], V = w.bound[0], K = h.bound[1];
  // The precisions that gemm.cu multiplies in, so that nothing is converted.
  const bool narrowWeight = w.dtype == DType::BF16;
  const bool narrowInput = narrowWeight && (h.dtype == DType::BF16 || dh.dtype == DType::BF16);
  const bool narrowRows = h.dtype == DType::BF16;
  const bool wide = (dh && !narrowInput) || (dw && !narrowRows), narrow = (dh && narrowInput) || (dw && narrowRows);
  const int64_t matrices = teacher ? 2 : 1, pitch = (V + 7) / 8 * 8;
  const ChunkRows chunk = chunkRows(launch, R, V, K, matrices, pitch * ((wide ? 4 : 0) + (narrow ? 2 : 0)));

  rows.logits = launch.scratch<float>(matrices * chunk.logits * V);
  rows.value = launch.scratch<double>(R);
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
  if (teacher) {
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
      if (teacher) {
        LAUNCH(joinKernel, launch.blocks(2 * rows.most * K, 4 * kThreads), kThreads, 0, launch.stream, h, teacher,
               rows.first, rows.most, joined, joinedRows, launch.state);
        logits.m = Extent();
        logits.m.size = joinedRows;
        logits.m.bound = 2 * rows.most;
        logits.a = Matrix(joined);
      } else {
        logits.a = Matrix(h);
        logits.a.first = rows.first;
      }
      logits.b[0] = weight(w);
      logits.out = rows.logits;
      logits.countsFlops = false;
      multiplyWeight(launch, logits);
      LAUNCH(kernel, launch.blocks(rows.most, 1), kThreads, sizeof(LossShared), launch.stream, rows, w, launch.state);
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
  LAUNCH(weightedSumKernel, 1, kThreads, sizeof(LossShared), launch.stream, rows.weight, rows.value, h, w,
         static_cast<int>(matrices) + (dh ? 1 : 0) + (dw ? 1 : 0), floats(loss), launch.state);
}

}  // namespace

void distillKl(const Launch& launch) {
  const Operand &hs = launch.in[0], &ht = launch.in[1], &w = launch.in[2], &targets = launch.in[4];
  const Operand* out = launch.out;
  Rows rows;
  rows.weight = launch.in[3];
  rows.targets = targets;
  rows.row = out[1];
  rows.agree = out[3];
  rows.ce = out[4];
  if (rows.ce && !targets) fail(ErrorCode::InvalidProgram, "[distill_kl] targets must be given where ce is wanted");
  if (targets) checkTargets(launch, 4, w, 0);
  vocabularyLoss(launch, distillKernel, hs, ht, w, rows, out[0], out[2], {});
}

void crossEntropy(const Launch& launch) {
  const Operand &h = launch.in[0], &w = launch.in[1];
  const Operand* out = launch.out;
  Rows rows;
  rows.weight = launch.in[3];
  rows.targets = launch.in[2];
  rows.row = out[1];
  rows.agree = out[4];
  checkTargets(launch, 2, w, 0);
  vocabularyLoss(launch, crossEntropyKernel, h, {}, w, rows, out[0], out[2], out[3]);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
