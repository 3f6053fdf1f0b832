// Table look-up and its gradient.
#include <cstring>

#include "cpu/checks.h"
#include "cpu/gemm/gemm.h"
#include "cpu/kernels.h"

namespace elastiform::cpu {

namespace {

float roundTo(DType dtype, float value) {
  if (dtype == DType::BF16) return bf16ToFloat(floatToBf16(value));
  if (dtype == DType::F16) return f16ToFloat(floatToF16(value));
  return value;
}

void copyRow(const TensorView& table, int64_t id, DType rounding, float* y) {
  const int64_t width = table.dim(1), start = id * table.strides[0], step = table.strides[1];
  if (table.dtype == DType::F32 && step == 1) {
    std::memcpy(y, table.f32() + start, width * sizeof(float));
  } else if (table.dtype == DType::BF16) {
    const uint16_t* x = static_cast<const uint16_t*>(table.data) + start;
    for (int64_t d = 0; d < width; ++d) y[d] = bf16ToFloat(x[d * step]);
  } else {
    for (int64_t d = 0; d < width; ++d) y[d] = loadAsFloat(table.data, table.dtype, start + d * step);
  }
  if (rounding != DType::F32) {
    for (int64_t d = 0; d < width; ++d) y[d] = roundTo(rounding, y[d]);
  }
}

}  // namespace

void embedding(const KernelArgs& args) {
  const TensorView& table = args.in[0];
  const int32_t* ids = args.in[1].i32();
  const int64_t rows = args.out[0].dim(0), width = args.out[0].dim(1);
  float* y = args.out[0].f32();
  checkIds("embedding", ids, rows, table.dim(0));
  DType rounding = DType::F32;
  if (table.tensor && dtypeSize(table.tensor->packAs) < dtypeSize(table.dtype)) rounding = table.tensor->packAs;
  const PackedWeight* packed = packedTable(table);
  forChunks(rows, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      if (packed) {
        readPackedRow(*packed, ids[r], width, y + r * width);
      } else {
        copyRow(table, ids[r], rounding, y + r * width);
      }
    }
  });
}

void embeddingGrad(const KernelArgs& args) {
  const float* dy = args.in[0].f32();
  const int32_t* ids = args.in[1].i32();
  const int64_t rows = args.in[0].dim(0), width = args.in[0].dim(1), vocabulary = args.out[0].dim(0);
  float* dtable = args.out[0].f32();
  checkIds("embedding_grad", ids, rows, vocabulary);
  forChunks(vocabulary * width, kParallelElements * 8, args, [&](int64_t begin, int64_t end, int) {
    std::memset(dtable + begin, 0, (end - begin) * sizeof(float));
  });
  // Chunks own columns, so every sum runs over its rows in ascending order.
  const int64_t columns = rows * width < kParallelElements ? width : 64;
  forChunks(width, columns, args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = dy + r * width;
      float* to = dtable + ids[r] * width;
      for (int64_t d = begin; d < end; ++d) to[d] += from[d];
    }
  });
}

}  // namespace elastiform::cpu
