// Linear layers and their gradients on the matrix engine (docs/ops.md).
#include <cstring>

#include "core/pool.h"
#include "cpu/checks.h"
#include "cpu/gemm/gemm.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

namespace {

Act actAttribute(const KernelArgs& args, const char* op) {
  return static_cast<Act>(intAttribute(args, op, 0, "act", 0, 4));
}

MatrixA rowsOf(const TensorView& x, const TensorView& rows) {
  return {x.f32(), x.dim(1), 1, rows ? rows.i32() : nullptr};
}

void setBias(Epilogue& e, const TensorView& bias) {
  if (!bias) return;
  e.bias = bias.data;
  e.biasDtype = bias.dtype;
  e.biasStride = bias.strides[0];
}

double flops(int64_t M, int64_t N, int64_t K) {
  return 2.0 * static_cast<double>(M) * static_cast<double>(N) * static_cast<double>(K);
}

// The columns of u, and their FLOPs; operands `at` and at + 1, by name.
Patch patchOf(const KernelArgs& args, const char* op, int at, const char* uName, const char* bName, int64_t M, int64_t N) {
  const TensorView &u = args.in[at], &b = args.in[at + 1];
  checkTogether(op, uName, static_cast<bool>(u), bName, static_cast<bool>(b));
  if (!u) return {};
  const int64_t P = u.dim(1);
  args.counters->flops += flops(M, N, P);
  return {u.f32(), P, weightB(b)};
}

void copyTo(float* to, const TensorView& from, const KernelArgs& args) {
  if (to == from.data) return;
  forChunks(from.elements(), kParallelElements, args, [&](int64_t begin, int64_t end, int) {
    std::memcpy(to + begin, from.f32() + begin, static_cast<size_t>(end - begin) * sizeof(float));
  });
}

}  // namespace

void linear(const KernelArgs& args) {
  const TensorView &x = args.in[0], &w = args.in[1], &rows = args.in[3], &y = args.out[0];
  const Act act = actAttribute(args, "linear");
  const int64_t M = y.dim(0), N = y.dim(1), K = x.dim(1);
  if (rows) checkRows("linear", rows.i32(), M, x.dim(0));
  Epilogue e;
  setBias(e, args.in[2]);
  e.act = act;
  e.pre = args.out[1].f32();
  const Patch patch = patchOf(args, "linear", 4, "u", "b", M, N);
  gemm(M, N, K, rowsOf(x, rows), weightB(w), e, y.f32(), N, args, patch);
  args.counters->flops += flops(M, N, K);
}

void linearGated(const KernelArgs& args) {
  const TensorView &x = args.in[0], &rows = args.in[5], &y = args.out[0];
  const int64_t M = y.dim(0), N = y.dim(1), K = x.dim(1);
  GatedEpilogue e;
  e.act = actAttribute(args, "linear_gated");
  if (rows) checkRows("linear_gated", rows.i32(), M, x.dim(0));
  for (int i = 0; i < 2; ++i) {
    const TensorView& bias = args.in[3 + i];
    if (!bias) continue;
    e.bias[i] = bias.data;
    e.biasDtype[i] = bias.dtype;
    e.biasStride[i] = bias.strides[0];
  }
  e.g = args.out[1].f32();
  e.u = args.out[2].f32();
  const Patch gatePatch = patchOf(args, "linear_gated", 6, "gate_u", "gate_b", M, N);
  const Patch upPatch = patchOf(args, "linear_gated", 8, "up_u", "up_b", M, N);
  gemmGated(M, N, K, rowsOf(x, rows), weightB(args.in[1]), weightB(args.in[2]), e, y.f32(), N, args, gatePatch, upPatch);
  args.counters->flops += 2 * flops(M, N, K);
}

void linearAdd(const KernelArgs& args) {
  const TensorView &residual = args.in[0], &x = args.in[1], &rows = args.in[4], &gate = args.in[5], &y = args.out[0];
  const int64_t M = x.dim(0), N = y.dim(1), K = x.dim(1);
  if (rows) checkRows("linear_add", rows.i32(), M, y.dim(0));
  const Patch patch = patchOf(args, "linear_add", 6, "u", "b", M, N);
  copyTo(y.f32(), residual, args);
  Epilogue e;
  setBias(e, args.in[3]);
  e.rowScale = gate.f32();
  e.rows = rows.i32();
  e.accumulate = true;
  gemm(M, N, K, rowsOf(x, {}), weightB(args.in[2]), e, y.f32(), N, args, patch);
  args.counters->flops += flops(M, N, K);
  args.counters->rows += static_cast<double>(M);
}

void linearDx(const KernelArgs& args) {
  const TensorView &dy = args.in[0], &acc = args.in[2], &dx = args.out[0];
  const int64_t M = dy.dim(0), N = dx.dim(1), K = dy.dim(1);
  Epilogue e;
  if (acc) {
    copyTo(dx.f32(), acc, args);
    e.accumulate = true;
  }
  gemm(M, N, K, rowsOf(dy, {}), weightTransposedB(args.in[1]), e, dx.f32(), N, args);
  args.counters->flops += flops(M, N, K);
}

void linearAddGrad(const KernelArgs& args) {
  const TensorView &dy = args.in[0], &x = args.in[1], &bias = args.in[3], &rows = args.in[4], &gate = args.in[5];
  const TensorView &dx = args.out[0], &dgate = args.out[1];
  const int64_t M = dx.dim(0), N = dx.dim(1), K = dy.dim(1);
  if (rows) checkRows("linear_add_grad", rows.i32(), M, dy.dim(0));
  if (dgate && !x) fail(ErrorCode::InvalidProgram, "[linear_add_grad] x must be given where dgate is wanted");
  Epilogue e;
  // The gradient of the gate needs the product before it is scaled: then the scaling comes in a second pass.
  if (!dgate) e.rowScale = gate.f32();
  gemm(M, N, K, rowsOf(dy, rows), weightTransposedB(args.in[2]), e, dx.f32(), N, args);
  args.counters->flops += flops(M, N, K);
  if (!dgate) return;

  const VectorOps& ops = vectorOps();
  const float* biasValues = nullptr;
  if (bias) {
    TensorView used = bias;
    used.shape[0] = K;
    biasValues = vectorF32(args, used);
  }
  forChunks(M, rowsPerChunk(N), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      float* t = dx.f32() + r * N;
      double value = ops.dot(x.f32() + r * N, t, N);
      if (bias) value += ops.dot(dy.f32() + (rows ? rows.i32()[r] : r) * K, biasValues, K);
      dgate.f32()[r] = static_cast<float>(value);
      if (gate) ops.scale(t, gate.f32()[r], t, N);
    }
  });
}

void linearDw(const KernelArgs& args) {
  const TensorView &dy = args.in[0], &x = args.in[1], &dyRows = args.in[2], &xRows = args.in[3], &gate = args.in[4];
  const TensorView& dw = args.out[0];
  const int64_t N = dw.dim(0), K = dw.dim(1);
  const int64_t reduced = dyRows ? dyRows.dim(0) : dy.dim(0), xReduced = xRows ? xRows.dim(0) : x.dim(0);
  if (reduced != xReduced) {
    fail(ErrorCode::InvalidProgram, "[linear_dw] %s must have %lld rows, got %lld", xRows ? "xrows" : "x",
         static_cast<long long>(reduced), static_cast<long long>(xReduced));
  }
  if (dyRows) checkRows("linear_dw", dyRows.i32(), reduced, dy.dim(0));
  if (xRows) checkRows("linear_dw", xRows.i32(), reduced, x.dim(0));
  const MatrixA a{dy.f32(), 1, N, nullptr, dyRows.i32(), gate.f32()};
  const MatrixB b{x.data, DType::F32, 1, K, nullptr, xRows.i32()};
  gemm(N, K, reduced, a, b, {}, dw.f32(), K, args);
  args.counters->flops += flops(reduced, N, K);
}

}  // namespace elastiform::cpu
