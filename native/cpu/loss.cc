// Losses over the vocabulary, a few rows at a time: the logits of all rows never exist together.
#include "cpu/loss.h"

#include <cstring>

#include "core/pool.h"
#include "cpu/checks.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/kernel.h"
#include "cpu/kernels.h"

namespace elastiform::cpu {

namespace {

void checkTargets(const char* op, const TensorView& targets, int64_t V) {
  for (int64_t r = 0; r < targets.dim(0); ++r) {
    const int32_t target = targets.i32()[r];
    if (target < -1 || target >= V) {
      fail(ErrorCode::InvalidData, "[%s] targets[%lld] must be in [-1, %lld), got %d", op, static_cast<long long>(r),
           static_cast<long long>(V), target);
    }
  }
}

}  // namespace

void divergence(const KernelArgs& args) {
  const TensorView &hs = args.in[0], &ht = args.in[1], &w = args.in[2], &weight = args.in[3], &targets = args.in[4];
  const TensorView& wt = args.in[5];
  const TensorView &loss = args.out[0], &row = args.out[1], &dh = args.out[2], &agree = args.out[3];
  const TensorView& ce = args.out[4];
  const int64_t R = hs.dim(0), K = hs.dim(1), J = ht.dim(1), V = w.dim(0);
  const auto kind = intAttribute(args, "divergence", 0, "kind", 0, 2);
  const float beta = checkedShare("divergence", "beta", args.attr[1]);
  const float softcap = checkedSoftcap("divergence", "softcap", args.attr[2]);
  const float teacherSoftcap = checkedSoftcap("divergence", "teacher_softcap", args.attr[3]);
  if (targets) checkTargets("divergence", targets, V);
  if (ce && !targets) fail(ErrorCode::InvalidProgram, "[divergence] targets must be given where ce is wanted");
  if (!wt && J != K) fail(ErrorCode::InvalidProgram, "[divergence] ht must be as wide as hs, %lld, or have a wt, got %lld", static_cast<long long>(K), static_cast<long long>(J));
  const MatrixB forward = weightB(w), backward = weightTransposedB(w);
  const MatrixB teacherForward = wt ? weightB(wt) : forward;
  const int64_t C = chunkRows(R, V, 2);
  double* values = args.scratch<double>(R);
  float* inputs = wt ? nullptr : args.scratch<float>(2 * C * K);
  float* logits = args.scratch<float>(2 * C * V);
  float* slopes = dh && softcap > 0 ? args.scratch<float>(threadCount() * V) : nullptr;
  LoopScratch loop(args);
  const KernelTable& table = kernels();
  const VectorOps& vector = vectorOps();

  for (int64_t r0 = 0; r0 < R; r0 += C) {
    const int64_t rows = std::min(C, R - r0);
    if (wt) {
      gemm(rows, V, K, {hs.f32() + r0 * K, K, 1}, forward, {}, logits, V, loop.nextPass());
      gemm(rows, V, J, {ht.f32() + r0 * J, J, 1}, teacherForward, {}, logits + rows * V, V, loop.nextPass());
    } else {
      // Rows of the student and then of the teacher in one product: the weight is read once for both.
      const size_t bytes = static_cast<size_t>(rows * K) * sizeof(float);
      std::memcpy(inputs, hs.f32() + r0 * K, bytes);
      std::memcpy(inputs + rows * K, ht.f32() + r0 * K, bytes);
      gemm(2 * rows, V, K, {inputs, K, 1}, forward, {}, logits, V, loop.nextPass());
    }
    parallelFor(rows,
                [&](int64_t i, int worker) {
                  const int64_t r = r0 + i;
                  float *student = logits + i * V, *slope = slopes ? slopes + worker * V : nullptr;
                  capLogits(softcap, student, slope, V);
                  capLogits(teacherSoftcap, logits + (rows + i) * V, nullptr, V);
                  const int32_t target = targets ? targets.i32()[r] : -1;
                  const double atTarget = target < 0 ? 0 : student[target];
                  const LossRow result = table.divergenceRow[kind](student, logits + (rows + i) * V, V, beta,
                                                                   weight.f32()[r], static_cast<bool>(dh));
                  if (slope) vector.multiply(student, slope, student, V);
                  values[r] = result.value;
                  if (row) row.f32()[r] = static_cast<float>(result.value);
                  if (agree) agree.f32()[r] = result.best >= 0 && result.best == result.bestTeacher ? 1.0f : 0.0f;
                  if (ce) ce.f32()[r] = target < 0 ? 0.0f : static_cast<float>(result.lse - atTarget);
                },
                args.abort);
    if (dh) gemm(rows, K, V, {logits, V, 1}, backward, {}, dh.f32() + r0 * K, K, loop.nextPass());
  }
  loss.f32()[0] = weightedSum(weight.f32(), values, R);
  args.counters->flops += productFlops(R, V, K) * (dh ? 2 : 1) + productFlops(R, V, J);
}

void crossEntropy(const KernelArgs& args) {
  const TensorView &h = args.in[0], &w = args.in[1], &targets = args.in[2], &weight = args.in[3];
  const TensorView &loss = args.out[0], &row = args.out[1], &dh = args.out[2], &dw = args.out[3];
  const TensorView& correct = args.out[4];
  const int64_t R = h.dim(0), K = h.dim(1), V = w.dim(0);
  const float softcap = checkedSoftcap("cross_entropy", "softcap", args.attr[0]);
  checkTargets("cross_entropy", targets, V);
  const MatrixB forward = weightB(w), backward = weightTransposedB(w);
  const int64_t C = chunkRows(R, V, 1);
  double* values = args.scratch<double>(R);
  float* logits = args.scratch<float>(C * V);
  LoopScratch loop(args);
  const KernelTable& table = kernels();
  const VectorOps& vector = vectorOps();
  const bool gradient = dh || dw;
  float* slopes = gradient && softcap > 0 ? args.scratch<float>(threadCount() * V) : nullptr;
  if (dw && R == 0) std::memset(dw.data, 0, static_cast<size_t>(V * K) * sizeof(float));

  for (int64_t r0 = 0; r0 < R; r0 += C) {
    const int64_t rows = std::min(C, R - r0);
    gemm(rows, V, K, {h.f32() + r0 * K, K, 1}, forward, {}, logits, V, loop.nextPass());
    parallelFor(rows,
                [&](int64_t i, int worker) {
                  const int64_t r = r0 + i;
                  const int32_t target = targets.i32()[r];
                  float *own = logits + i * V, *slope = slopes ? slopes + worker * V : nullptr;
                  capLogits(softcap, own, slope, V);
                  const LossRow result = table.crossEntropyRow(own, V, target, weight.f32()[r], gradient);
                  if (slope) vector.multiply(own, slope, own, V);
                  values[r] = result.value;
                  if (row) row.f32()[r] = static_cast<float>(result.value);
                  if (correct) correct.f32()[r] = target >= 0 && result.best == target ? 1.0f : 0.0f;
                },
                args.abort);
    if (dh) gemm(rows, K, V, {logits, V, 1}, backward, {}, dh.f32() + r0 * K, K, loop.nextPass());
    if (dw) {
      // dw += logit gradients^T h, chunk after chunk in the order of the rows.
      Epilogue e;
      e.accumulate = r0 > 0;
      gemm(V, K, rows, {logits, 1, V}, {h.f32() + r0 * K, DType::F32, 1, K}, e, dw.f32(), K, loop.nextPass());
    }
  }
  loss.f32()[0] = weightedSum(weight.f32(), values, R);
  args.counters->flops += productFlops(R, V, K) * (1 + (dh ? 1 : 0) + (dw ? 1 : 0));
}

}  // namespace elastiform::cpu
