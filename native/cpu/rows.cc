// Moving and summing rows: gathers, scatters, gated additions and sums, dot product.
#include <cstring>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

void gatherRows(const KernelArgs& args) {
  const float* x = args.in[0].f32();
  const int32_t* rows = args.in[1].i32();
  const int64_t count = args.out[0].dim(0), width = args.out[0].dim(1);
  float* y = args.out[0].f32();
  checkRows("gather_rows", rows, count, args.in[0].dim(0));
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) std::memcpy(y + r * width, x + rows[r] * width, width * sizeof(float));
  });
}

void gatherIds(const KernelArgs& args) {
  const int32_t* x = args.in[0].i32();
  const int32_t* rows = args.in[1].i32();
  const int64_t count = args.out[0].dim(0);
  int32_t* y = args.out[0].i32();
  checkRows("gather_ids", rows, count, args.in[0].dim(0));
  for (int64_t r = 0; r < count; ++r) y[r] = x[rows[r]];
}

void scatterAdd(const KernelArgs& args) {
  const float* acc = args.in[0].f32();
  const float* x = args.in[1].f32();
  const int32_t* rows = args.in[2].i32();
  const int64_t count = args.in[1].dim(0), total = args.out[0].dim(0), width = args.out[0].dim(1);
  float* y = args.out[0].f32();
  checkRows("scatter_add", rows, count, total);
  const VectorOps& vector = vectorOps();
  if (y != acc) {
    forChunks(total, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
      std::memcpy(y + begin * width, acc + begin * width, (end - begin) * width * sizeof(float));
    });
  }
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      float* to = y + rows[r] * width;
      vector.add(to, x + r * width, to, width);
    }
  });
}

void addRows(const KernelArgs& args) {
  const TensorView &residual = args.in[0], &x = args.in[1], &gate = args.in[3];
  const int32_t* rows = args.in[2] ? args.in[2].i32() : nullptr;
  const int64_t count = x.dim(0), total = args.out[0].dim(0), width = args.out[0].dim(1);
  float* y = args.out[0].f32();
  if (rows) checkRows("add_rows", rows, count, total);
  const VectorOps& vector = vectorOps();
  if (y != residual.f32()) {
    forChunks(total, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
      std::memcpy(y + begin * width, residual.f32() + begin * width, (end - begin) * width * sizeof(float));
    });
  }
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      vector.addScaled(y + (rows ? rows[r] : r) * width, x.f32() + r * width, gate ? gate.f32()[r] : 1.0f, width);
    }
  });
  args.counters->rows += static_cast<double>(count);
}

void addRowsGrad(const KernelArgs& args) {
  const TensorView &dy = args.in[0], &x = args.in[1], &gate = args.in[3], &dgate = args.out[1];
  const int32_t* rows = args.in[2] ? args.in[2].i32() : nullptr;
  const int64_t count = args.out[0].dim(0), width = args.out[0].dim(1);
  if (rows) checkRows("add_rows_grad", rows, count, dy.dim(0));
  if (dgate && !x) fail(ErrorCode::InvalidProgram, "[add_rows_grad] x must be given where dgate is wanted");
  const VectorOps& vector = vectorOps();
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* from = dy.f32() + (rows ? rows[r] : r) * width;
      vector.scale(from, gate ? gate.f32()[r] : 1.0f, args.out[0].f32() + r * width, width);
      if (dgate) dgate.f32()[r] = static_cast<float>(vector.dot(from, x.f32() + r * width, width));
    }
  });
}

void sumRows(const KernelArgs& args) {
  const float* x = args.in[0].f32();
  const int32_t* rows = args.in[1] ? args.in[1].i32() : nullptr;
  const float* gate = args.in[2] ? args.in[2].f32() : nullptr;
  const int64_t total = args.in[0].dim(0), width = args.in[0].dim(1);
  const int64_t count = rows ? args.in[1].dim(0) : total;
  float* y = args.out[0].f32();
  if (rows) checkRows("sum_rows", rows, count, total);
  const VectorOps& vector = vectorOps();
  // Chunks own columns: every sum runs over the rows in ascending order.
  forChunks(width, count * width < kParallelElements ? width : 128, args, [&](int64_t begin, int64_t end, int) {
    std::memset(y + begin, 0, (end - begin) * sizeof(float));
    for (int64_t r = 0; r < count; ++r) {
      vector.addScaled(y + begin, x + (rows ? rows[r] : r) * width + begin, gate ? gate[r] : 1.0f, end - begin);
    }
  });
}

void dot(const KernelArgs& args) {
  const float* a = args.in[0].f32();
  const float* b = args.in[1].f32();
  const int64_t count = args.in[0].elements();
  const VectorOps& vector = vectorOps();
  double sum = 0;
  for (int64_t i = 0; i < count; i += kParallelElements) {
    sum += vector.dot(a + i, b + i, std::min(kParallelElements, count - i));
  }
  args.out[0].f32()[0] = static_cast<float>(sum);
}

}  // namespace elastiform::cpu
