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

// The parts of a row of `width` that are normalised by themselves, of as many features as there are weights.
int64_t checkedGroups(const char* op, const TensorView& weight, const TensorView& rstd, int64_t width) {
  const int64_t features = weight.dim(0);
  if (features < 1 || width % features != 0) {
    fail(ErrorCode::InvalidProgram, "[%s] weight must be as wide as x, %lld, or a part of it, got %lld", op,
         static_cast<long long>(width), static_cast<long long>(features));
  }
  const int64_t groups = width / features;
  if (rstd && rstd.dim(1) != groups) {
    fail(ErrorCode::InvalidProgram, "[%s] rstd must have %lld columns, one for every group, got %lld", op,
         static_cast<long long>(groups), static_cast<long long>(rstd.dim(1)));
  }
  return groups;
}

// offset + weight.
const float* offsetWeight(const KernelArgs& args, const TensorView& weight, double offset) {
  const float* values = vectorF32(args, weight);
  if (offset == 0) return values;
  float* sums = args.scratch<float>(weight.dim(0));
  for (int64_t i = 0; i < weight.dim(0); ++i) sums[i] = static_cast<float>(offset) + values[i];
  return sums;
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
  const int64_t groups = checkedGroups("rms_norm", args.in[1], args.out[1], width), part = width / groups;
  const int32_t* rows = checkedRows("rms_norm", args.in[2], args.in[0].dim(0));
  const float eps = epsilon(args, "rms_norm");
  const float* weight = offsetWeight(args, args.in[1], finiteAttribute(args, "rms_norm", 1, "offset"));
  float* y = args.out[0].f32();
  float* rstd = args.out[1] ? args.out[1].f32() : nullptr;
  const VectorOps& vector = vectorOps();
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * groups; i < end * groups; ++i) {
      const int64_t r = i / groups, at = i % groups * part;
      const float value = vector.rmsNorm(x + (rows ? rows[r] : r) * width + at, weight, eps, y + r * width + at, part);
      if (rstd) rstd[i] = value;
    }
  });
}

void rmsNormGrad(const KernelArgs& args) {
  const float *dy = args.in[0].f32(), *x = args.in[1].f32(), *rstd = args.in[3].f32();
  const int64_t count = args.out[0].dim(0), width = args.out[0].dim(1);
  const int64_t groups = checkedGroups("rms_norm_grad", args.in[2], args.in[3], width), part = width / groups;
  const int32_t* rows = checkedRows("rms_norm_grad", args.in[4], args.in[1].dim(0));
  const float* weight = offsetWeight(args, args.in[2], finiteAttribute(args, "rms_norm_grad", 0, "offset"));
  float* dx = args.out[0].f32();
  const bool wantWeight = static_cast<bool>(args.out[1]);
  const VectorOps& vector = vectorOps();
  const int64_t block = gradBlock(count), blocks = (count + block - 1) / block;
  float* partial = wantWeight ? args.scratch<float>(std::max<int64_t>(1, blocks * part)) : nullptr;
  const int64_t perChunk = count * width < kParallelElements ? std::max<int64_t>(blocks, 1) : 1;
  forChunks(blocks, perChunk, args, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) {
      float* sum = wantWeight ? partial + b * part : nullptr;
      if (sum) std::memset(sum, 0, part * sizeof(float));
      for (int64_t i = b * block * groups; i < std::min(count, (b + 1) * block) * groups; ++i) {
        const int64_t r = i / groups, at = i % groups * part;
        vector.rmsNormGrad(dy + r * width + at, x + (rows ? rows[r] : r) * width + at, weight, rstd[i],
                           dx + r * width + at, sum, part);
      }
    }
  });
  if (wantWeight) addBlocks(vector, partial, blocks, part, args.out[1].f32(), part);
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
