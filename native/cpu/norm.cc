// RMS and layer normalisation of (gathered) rows, and their gradients.
#include <cstring>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

namespace {

const int32_t* checkedRows(const char* op, const TensorView& rows, int64_t total) {
  if (!rows) return nullptr;
  checkRows(op, rows.i32(), rows.dim(0), total);
  return rows.i32();
}

float epsilon(const KernelArgs& args, const char* op) {
  const double eps = finiteAttribute(args, op, 0, "eps");
  if (eps < 0) fail(ErrorCode::InvalidProgram, "[%s] attribute eps must not be negative, got %g", op, eps);
  return static_cast<float>(eps);
}

// Rows per block of a gradient: partial sums over rows are made per block and added in block order. At most 64 blocks.
int64_t gradBlock(int64_t rows) { return std::max<int64_t>(32, (rows + 63) / 64); }

void addBlocks(const VectorOps& vector, const float* partial, int64_t blocks, int64_t stride, float* out,
               int64_t width) {
  std::memset(out, 0, width * sizeof(float));
  for (int64_t b = 0; b < blocks; ++b) vector.add(out, partial + b * stride, out, width);
}

}  // namespace

void rmsNorm(const KernelArgs& args) {
  const float* x = args.in[0].f32();
  const int64_t count = args.out[0].dim(0), width = args.out[0].dim(1);
  const int32_t* rows = checkedRows("rms_norm", args.in[2], args.in[0].dim(0));
  const float eps = epsilon(args, "rms_norm");
  const float* weight = vectorF32(args, args.in[1]);
  float* y = args.out[0].f32();
  float* rstd = args.out[1] ? args.out[1].f32() : nullptr;
  const VectorOps& vector = vectorOps();
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float value = vector.rmsNorm(x + (rows ? rows[r] : r) * width, weight, eps, y + r * width, width);
      if (rstd) rstd[r] = value;
    }
  });
}

void rmsNormGrad(const KernelArgs& args) {
  const float *dy = args.in[0].f32(), *x = args.in[1].f32(), *rstd = args.in[3].f32();
  const int64_t count = args.out[0].dim(0), width = args.out[0].dim(1);
  const int32_t* rows = checkedRows("rms_norm_grad", args.in[4], args.in[1].dim(0));
  const float* weight = vectorF32(args, args.in[2]);
  float* dx = args.out[0].f32();
  const bool wantWeight = static_cast<bool>(args.out[1]);
  const VectorOps& vector = vectorOps();
  const int64_t block = gradBlock(count), blocks = (count + block - 1) / block;
  float* partial = wantWeight ? args.scratch<float>(std::max<int64_t>(1, blocks * width)) : nullptr;
  const int64_t perChunk = count * width < kParallelElements ? std::max<int64_t>(blocks, 1) : 1;
  forChunks(blocks, perChunk, args, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) {
      float* sum = wantWeight ? partial + b * width : nullptr;
      if (sum) std::memset(sum, 0, width * sizeof(float));
      for (int64_t r = b * block; r < std::min(count, (b + 1) * block); ++r) {
        vector.rmsNormGrad(dy + r * width, x + (rows ? rows[r] : r) * width, weight, rstd[r], dx + r * width, sum,
                           width);
      }
    }
  });
  if (wantWeight) addBlocks(vector, partial, blocks, width, args.out[1].f32(), width);
}

void layerNorm(const KernelArgs& args) {
  const float* x = args.in[0].f32();
  const int64_t count = args.out[0].dim(0), width = args.out[0].dim(1);
  const int32_t* rows = checkedRows("layer_norm", args.in[3], args.in[0].dim(0));
  const float eps = epsilon(args, "layer_norm");
  const float* weight = vectorF32(args, args.in[1]);
  const float* bias = vectorF32(args, args.in[2]);
  float* y = args.out[0].f32();
  float* means = args.out[1] ? args.out[1].f32() : nullptr;
  float* rstds = args.out[2] ? args.out[2].f32() : nullptr;
  const VectorOps& vector = vectorOps();
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      float mean, rstd;
      vector.layerNorm(x + (rows ? rows[r] : r) * width, weight, bias, eps, y + r * width, &mean, &rstd, width);
      if (means) means[r] = mean;
      if (rstds) rstds[r] = rstd;
    }
  });
}

void layerNormGrad(const KernelArgs& args) {
  const float *dy = args.in[0].f32(), *x = args.in[1].f32(), *mean = args.in[3].f32(), *rstd = args.in[4].f32();
  const int64_t count = args.out[0].dim(0), width = args.out[0].dim(1);
  const int32_t* rows = checkedRows("layer_norm_grad", args.in[5], args.in[1].dim(0));
  const float* weight = vectorF32(args, args.in[2]);
  float* dx = args.out[0].f32();
  const bool wantWeight = static_cast<bool>(args.out[1]), wantBias = static_cast<bool>(args.out[2]);
  const VectorOps& vector = vectorOps();
  const int64_t block = gradBlock(count), blocks = (count + block - 1) / block;
  float* partial = wantWeight || wantBias ? args.scratch<float>(std::max<int64_t>(1, blocks * 2 * width)) : nullptr;
  const int64_t perChunk = count * width < kParallelElements ? std::max<int64_t>(blocks, 1) : 1;
  forChunks(blocks, perChunk, args, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) {
      float* weightSum = wantWeight ? partial + b * 2 * width : nullptr;
      float* biasSum = wantBias ? partial + (b * 2 + 1) * width : nullptr;
      if (weightSum) std::memset(weightSum, 0, width * sizeof(float));
      if (biasSum) std::memset(biasSum, 0, width * sizeof(float));
      for (int64_t r = b * block; r < std::min(count, (b + 1) * block); ++r) {
        vector.layerNormGrad(dy + r * width, x + (rows ? rows[r] : r) * width, weight, mean[r], rstd[r],
                             dx + r * width, weightSum, biasSum, width);
      }
    }
  });
  if (wantWeight) addBlocks(vector, partial, blocks, 2 * width, args.out[1].f32(), width);
  if (wantBias) addBlocks(vector, partial + width, blocks, 2 * width, args.out[2].f32(), width);
}

}  // namespace elastiform::cpu
