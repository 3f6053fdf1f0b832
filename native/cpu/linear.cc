// Linear layers and their gradients on the matrix engine (docs/ops.md).
#include <cstring>
#include <vector>

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

namespace {

// The products of ops, checked and counted.
GemmCall linearCall(const KernelArgs& args) {
  const TensorView &x = args.in[0], &w = args.in[1], &rows = args.in[3], &y = args.out[0];
  const Act act = actAttribute(args, "linear");
  const int64_t M = y.dim(0), N = y.dim(1), K = x.dim(1);
  if (rows) checkRows("linear", rows.i32(), M, x.dim(0));
  GemmCall call{M, N, K, rowsOf(x, rows)};
  setBias(call.plain, args.in[2]);
  call.plain.act = act;
  call.plain.pre = args.out[1].f32();
  call.patch[0] = patchOf(args, "linear", 4, "u", "b", M, N);
  call.b[0] = weightB(w);
  call.out = y.f32();
  call.ldOut = N;
  args.counters->flops += flops(M, N, K);
  return call;
}

GemmCall linearGatedCall(const KernelArgs& args) {
  const TensorView &x = args.in[0], &rows = args.in[5], &y = args.out[0];
  const int64_t M = y.dim(0), N = y.dim(1), K = x.dim(1);
  GemmCall call{M, N, K, rowsOf(x, rows)};
  GatedEpilogue& e = call.gated;
  e.act = actAttribute(args, "linear_gated");
  if (rows) checkRows("linear_gated", rows.i32(), M, x.dim(0));
  call.weights = 2;
  for (int i = 0; i < 2; ++i) {
    call.b[i] = weightB(args.in[1 + i]);
    const TensorView& bias = args.in[3 + i];
    if (!bias) continue;
    e.bias[i] = bias.data;
    e.biasDtype[i] = bias.dtype;
    e.biasStride[i] = bias.strides[0];
  }
  e.g = args.out[1].f32();
  e.u = args.out[2].f32();
  call.patch[0] = patchOf(args, "linear_gated", 6, "gate_u", "gate_b", M, N);
  call.patch[1] = patchOf(args, "linear_gated", 8, "up_u", "up_b", M, N);
  call.out = y.f32();
  call.ldOut = N;
  args.counters->flops += 2 * flops(M, N, K);
  return call;
}

GemmCall linearAddCall(const KernelArgs& args) {
  const TensorView &x = args.in[1], &rows = args.in[4], &gate = args.in[5], &y = args.out[0];
  const int64_t M = x.dim(0), N = y.dim(1), K = x.dim(1);
  if (rows) checkRows("linear_add", rows.i32(), M, y.dim(0));
  GemmCall call{M, N, K, rowsOf(x, {})};
  call.patch[0] = patchOf(args, "linear_add", 6, "u", "b", M, N);
  setBias(call.plain, args.in[3]);
  call.plain.rowScale = gate.f32();
  call.plain.rows = rows.i32();
  call.plain.accumulate = true;
  call.b[0] = weightB(args.in[2]);
  call.out = y.f32();
  call.ldOut = N;
  args.counters->flops += flops(M, N, K);
  args.counters->rows += static_cast<double>(M);
  return call;
}

std::vector<GemmCall> callsOf(const KernelArgs* steps, int count, GemmCall (*of)(const KernelArgs&)) {
  std::vector<GemmCall> calls;
  for (int i = 0; i < count; ++i) calls.push_back(of(steps[i]));
  return calls;
}

}  // namespace

void linearTogether(const KernelArgs* steps, int count) { gemmTogether(callsOf(steps, count, linearCall), steps[0]); }
void linearGatedTogether(const KernelArgs* steps, int count) {
  gemmTogether(callsOf(steps, count, linearGatedCall), steps[0]);
}

// Every step adds to what the one before it has left, most of them in its place.
void linearAddTogether(const KernelArgs* steps, int count) {
  for (int begin = 0, end; begin < count; begin = end) {
    end = begin + 1;
    while (end < count && steps[end].in[0].data == steps[end].out[0].data) ++end;
    copyTo(steps[begin].out[0].f32(), steps[begin].in[0], steps[begin]);
    gemmSum(callsOf(steps + begin, end - begin, linearAddCall), steps[begin]);
  }
}

void linear(const KernelArgs& args) { linearTogether(&args, 1); }
void linearGated(const KernelArgs& args) { linearGatedTogether(&args, 1); }
void linearAdd(const KernelArgs& args) { linearAddTogether(&args, 1); }

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
