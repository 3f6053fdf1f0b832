// Losses over the vocabulary, a few rows at a time: the logits of all rows never exist together.
#include "cuda/collectives.cuh"
#include "cuda/gemm.cuh"
#include "cuda/kernels.h"

namespace elastiform::ELASTIFORM_DEVICE {

namespace {

// Logits kept at a time. The gradient's product has as many rows as a chunk and no other parallelism but the width of
// the hidden states, so chunks are whole tiles.
constexpr int64_t kLogitsBytes = int64_t{256} << 20;

int chunkRows(int64_t R, int64_t V, int64_t matrices) {
  const int64_t most = kLogitsBytes / (matrices * std::max<int64_t>(V, 1) * 4) / kProductRows * kProductRows;
  return static_cast<int>(std::clamp<int64_t>(std::max<int64_t>(most, kProductRows), 1, std::max<int64_t>(R, 1)));
}

constexpr int kThreads = 512;

struct LossShared {
  double partial[kThreads / 32];
  float top[kThreads];
  int index[kThreads];
};

struct Largest {
  float value;
  int index;  // the first that has it; -1 where nothing is larger than NaN
};

// Of x[0..V); elements that are NaN are passed over.
DEVICE Largest largest(const float* x, int V, LossShared& s) {
  const int tid = threadIdx.x;
  Largest best{-INFINITY, INT32_MAX};
  for (int i = tid; i < V; i += kThreads) {
    const float value = ldGlobal(x + i);
    if (value > best.value || (value == best.value && i < best.index)) best = {value, i};
  }
  syncThreads();  // the result before has been read
  s.top[tid] = best.value;
  s.index[tid] = best.index;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    syncThreads();  // the candidates are complete
    if (tid >= width) continue;
    const float value = s.top[tid + width];
    const int index = s.index[tid + width];
    if (value > s.top[tid] || (value == s.top[tid] && index < s.index[tid])) {
      s.top[tid] = value;
      s.index[tid] = index;
    }
  }
  syncThreads();  // the result is complete
  return {s.top[0], s.index[0]};
}

// What both losses share; absent outputs are null.
struct Rows {
  Operand weight, targets;
  float *student, *teacher;  // logits of the chunk, [chunk, V]; the student's become gradients
  double* value;             // of every row
  Operand row, ce, agree;
  int first, most;  // of the chunk
  bool gradient;

  DEVICE int count() const { return max(0, min(weight.size(0) - first, most)); }
  DEVICE int target(int r) const { return targets ? ldGlobal(targets.i32() + r) : -1; }
};

// row = KL(softmax(teacher) || softmax(student)); student = weight (q - p). One block a row.
__global__ void __launch_bounds__(kThreads, 2) distillKernel(Rows rows, Operand w, StepState state) {
  SHARED_MEMORY(LossShared, s);
  if (state.faulted()) return;
  const int V = w.size(0), count = rows.count(), tid = threadIdx.x;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    const int r = rows.first + i, target = rows.target(r);
    float* student = rows.student + int64_t{i} * V;
    const float* teacher = rows.teacher + int64_t{i} * V;
    const float atTarget = target < 0 ? 0.f : ldGlobal(student + target);
    const Largest top = largest(student, V, s), topTeacher = largest(teacher, V, s);
    // With e = e^(t - max t): KL = sum e (t - s) / sum e - (log-sum-exp of t - log-sum-exp of s), which is 0 for equal
    // logits.
    double sumQ = 0, sumP = 0, sumDifference = 0;
    for (int v = tid; v < V; v += kThreads) {
      const float x = ldGlobal(student + v), t = ldGlobal(teacher + v), p = expf(t - topTeacher.value);
      sumQ += expf(x - top.value);
      sumP += p;
      sumDifference += p == 0.f ? 0.f : p * (t - x);
    }
    sumQ = blockTotal(sumQ, s.partial);
    sumP = blockTotal(sumP, s.partial);
    sumDifference = blockTotal(sumDifference, s.partial);
    const double lse = top.value + log(sumQ);
    if (tid == 0) {
      const double value = sumDifference / sumP - (topTeacher.value + log(sumP) - lse);
      stGlobal(rows.value + r, value);
      if (rows.row) stGlobal(rows.row.f32() + r, static_cast<float>(value));
      if (rows.agree) {
        const bool agree = sumQ == sumQ && sumP == sumP && top.index == topTeacher.index;
        stGlobal(rows.agree.f32() + r, agree ? 1.f : 0.f);
      }
      if (rows.ce) stGlobal(rows.ce.f32() + r, target < 0 ? 0.f : static_cast<float>(lse - atTarget));
    }
    if (!rows.gradient) continue;
    const float weight = ldGlobal(rows.weight.f32() + r);
    const float scaleQ = static_cast<float>(1. / sumQ), scaleP = static_cast<float>(1. / sumP);
    for (int v = tid; v < V; v += kThreads) {
      const float q = expf(ldGlobal(student + v) - top.value) * scaleQ;
      const float p = expf(ldGlobal(teacher + v) - topTeacher.value) * scaleP;
      stGlobal(student + v, weight * (q - p));
    }
  }
}

// row = -log softmax(student)[target]; student = weight (q - 1 at the target). One block a row.
__global__ void __launch_bounds__(kThreads, 2) crossEntropyKernel(Rows rows, Operand w, StepState state) {
  SHARED_MEMORY(LossShared, s);
  if (state.faulted()) return;
  const int V = w.size(0), count = rows.count(), tid = threadIdx.x;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    const int r = rows.first + i, target = rows.target(r);
    float* logits = rows.student + int64_t{i} * V;
    const float atTarget = target < 0 ? 0.f : ldGlobal(logits + target);
    const Largest top = largest(logits, V, s);
    double sum = 0;
    for (int v = tid; v < V; v += kThreads) sum += expf(ldGlobal(logits + v) - top.value);
    sum = blockTotal(sum, s.partial);
    if (tid == 0) {
      const double value = target < 0 ? 0. : top.value + log(sum) - atTarget;
      stGlobal(rows.value + r, value);
      if (rows.row) stGlobal(rows.row.f32() + r, static_cast<float>(value));
      if (rows.agree) {
        stGlobal(rows.agree.f32() + r, target >= 0 && sum == sum && top.index == target ? 1.f : 0.f);
      }
    }
    if (!rows.gradient) continue;
    const float weight = ldGlobal(rows.weight.f32() + r), scale = static_cast<float>(1. / sum);
    for (int v = tid; v < V; v += kThreads) {
      const float q = expf(ldGlobal(logits + v) - top.value) * scale;
      stGlobal(logits + v, target < 0 ? 0.f : weight * (v == target ? q - 1.f : q));
    }
  }
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

struct Chunk {
  const Launch& launch;
  Extent rows;
  const Operand& w;

  // out[r] = x[first + r] w^T
  void logits(const Operand& x, float* out) const {
    Product p(launch, rows, {w, 0}, {x, 1});
    p.a = Matrix(x);
    p.a.first = rows.first;
    p.b[0] = weight(w);
    p.out = out;
    p.countsFlops = false;
    multiplyWeight(launch, p);
  }
  // dh[first + r] = gradient[r] w
  void inputGradient(const float* gradient, const Operand& dh) const {
    Product p(launch, rows, {dh, 1}, {w, 0});
    p.a = Matrix(gradient);
    p.b[0] = weight(w);
    p.out = dh;
    p.first = rows.first;
    p.countsFlops = false;
    multiplyTransposed(launch, p);
  }
  // dw (+)= gradient^T h, chunk after chunk in the order of the rows.
  void weightGradient(const float* gradient, const Operand& h, const Operand& dw) const {
    Product p(launch, {dw, 0}, {dw, 1}, rows);
    p.a = Matrix(gradient);
    p.b[0] = Matrix(h);
    p.b[0].first = rows.first;
    if (rows.first > 0) p.add = dw;
    p.out = dw;
    p.countsFlops = false;
    multiplyRows(launch, p);
  }
};

}  // namespace

void distillKl(const Launch& launch) {
  const Operand &hs = launch.in[0], &ht = launch.in[1], &w = launch.in[2], &weight = launch.in[3];
  const Operand &targets = launch.in[4], &loss = launch.out[0], &row = launch.out[1], &dh = launch.out[2];
  const Operand &agree = launch.out[3], &ce = launch.out[4];
  if (ce && !targets) fail(ErrorCode::InvalidProgram, "[distill_kl] targets must be given where ce is wanted");
  if (targets) checkTargets(launch, 4, w, 0);
  const int64_t R = hs.bound[0], V = w.bound[0];
  const int most = chunkRows(R, V, 2);
  Rows rows{weight, targets, launch.scratch<float>(most * V), launch.scratch<float>(most * V),
            launch.scratch<double>(R), row, ce, agree, 0, most, static_cast<bool>(dh)};
  for (int first = 0; first < R; first += most) {
    const Chunk chunk{launch, Extent(hs, 0).part(first, most), w};
    rows.first = first;
    chunk.logits(hs, rows.student);
    chunk.logits(ht, rows.teacher);
    LAUNCH(distillKernel, launch.blocks(chunk.rows.boundCount(), 1), kThreads, sizeof(LossShared), launch.stream, rows,
           w, launch.state);
    if (dh) chunk.inputGradient(rows.student, dh);
  }
  LAUNCH(weightedSumKernel, 1, kThreads, sizeof(LossShared), launch.stream, weight, rows.value, hs, w,
         dh ? 3 : 2, floats(loss), launch.state);
}

void crossEntropy(const Launch& launch) {
  const Operand &h = launch.in[0], &w = launch.in[1], &targets = launch.in[2], &weight = launch.in[3];
  const Operand &loss = launch.out[0], &row = launch.out[1], &dh = launch.out[2], &dw = launch.out[3];
  const Operand& correct = launch.out[4];
  checkTargets(launch, 2, w, 0);
  const int64_t R = h.bound[0], V = w.bound[0];
  const int most = chunkRows(R, V, 1);
  Rows rows{weight, targets, launch.scratch<float>(most * V), nullptr, launch.scratch<double>(R),
            row, {}, correct, 0, most, dh || dw};
  // One chunk at least: without rows dw is 0.
  for (int first = 0; first == 0 || first < R; first += most) {
    const Chunk chunk{launch, Extent(h, 0).part(first, most), w};
    rows.first = first;
    chunk.logits(h, rows.student);
    LAUNCH(crossEntropyKernel, launch.blocks(chunk.rows.boundCount(), 1), kThreads, sizeof(LossShared), launch.stream,
           rows, w, launch.state);
    if (dh) chunk.inputGradient(rows.student, dh);
    if (dw) chunk.weightGradient(rows.student, h, dw);
  }
  LAUNCH(weightedSumKernel, 1, kThreads, sizeof(LossShared), launch.stream, weight, rows.value, h, w,
         1 + (dh ? 1 : 0) + (dw ? 1 : 0), floats(loss), launch.state);
}

}  // namespace elastiform::ELASTIFORM_DEVICE
