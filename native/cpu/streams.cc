// Ops of models with several residual streams (AltUp, arXiv 2301.13310), and the sparsity of gates that comes with them.
#include <cmath>
#include <cstring>

#include "cpu/checks.h"
#include "cpu/kernels.h"

namespace elastiform::cpu {

namespace {

double dotOf(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// Which column of [N, C] factors of rows are in.
int64_t columnAttribute(const KernelArgs& args, const char* op, int64_t columns) {
  const int64_t column = intAttribute(args, op, 0, "column", 0, INT32_MAX);
  if (column >= columns) {
    fail(ErrorCode::InvalidProgram, "[%s] attribute column must be below the %lld columns of c, got %lld", op,
         static_cast<long long>(columns), static_cast<long long>(column));
  }
  return column;
}

// Mean and deviation of a row, and what lies above the mean by so many deviations.
struct Cutoff {
  double mean, deviation, value;

  Cutoff(const float* x, int64_t n, double factor) : mean(0), deviation(0) {
    for (int64_t i = 0; i < n; ++i) mean += x[i];
    mean /= static_cast<double>(n);
    for (int64_t i = 0; i < n; ++i) deviation += (x[i] - mean) * (x[i] - mean);
    deviation = std::sqrt(deviation / static_cast<double>(n));
    value = mean + factor * deviation;
  }
};

}  // namespace

void scaleColumns(const KernelArgs& args) {
  const float *x = args.in[0].f32(), *w = vectorF32(args, args.in[1]);
  const int64_t count = args.in[0].dim(0), width = args.in[0].dim(1);
  float* y = args.out[0].f32();
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = 0; i < width; ++i) y[r * width + i] = x[r * width + i] * w[i];
    }
  });
}

void addScaled(const KernelArgs& args) {
  const float *acc = args.in[0].f32(), *x = args.in[1].f32(), *c = args.in[2].f32();
  const int64_t count = args.in[0].dim(0), width = args.in[0].dim(1), columns = args.in[2].dim(1);
  const int64_t column = columnAttribute(args, "add_scaled", columns);
  const float offset = static_cast<float>(finiteAttribute(args, "add_scaled", 1, "offset"));
  float* y = args.out[0].f32();
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float factor = offset + c[r * columns + column];
      for (int64_t i = r * width; i < (r + 1) * width; ++i) y[i] = acc[i] + factor * x[i];
    }
  });
}

void addScaledGrad(const KernelArgs& args) {
  const float *dy = args.in[0].f32(), *x = args.in[1].f32(), *c = args.in[2].f32();
  const int64_t count = args.in[0].dim(0), width = args.in[0].dim(1), columns = args.in[2].dim(1);
  const int64_t column = columnAttribute(args, "add_scaled_grad", columns);
  const float offset = static_cast<float>(finiteAttribute(args, "add_scaled_grad", 1, "offset"));
  float *dx = args.out[0].f32(), *dc = args.out[1].f32();
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    std::memset(dc + begin * columns, 0, (end - begin) * columns * sizeof(float));
    for (int64_t r = begin; r < end; ++r) {
      const float factor = offset + c[r * columns + column];
      dc[r * columns + column] = static_cast<float>(dotOf(dy + r * width, x + r * width, width));
      for (int64_t i = r * width; i < (r + 1) * width; ++i) dx[i] = factor * dy[i];
    }
  });
}

void rescaleRows(const KernelArgs& args) {
  const float *x = args.in[0].f32(), *like = args.in[1].f32();
  const int64_t count = args.in[0].dim(0), width = args.in[0].dim(1);
  const double least = checkedPositive("rescale_rows", "floor", args.attr[0]);
  float* y = args.out[0].f32();
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float *a = x + r * width, *b = like + r * width;
      const double square = std::max(dotOf(a, a, width) / width, least), wanted = dotOf(b, b, width) / width;
      const float factor = static_cast<float>(std::sqrt(wanted / square));
      for (int64_t i = 0; i < width; ++i) y[r * width + i] = a[i] * factor;
    }
  });
}

void rescaleRowsGrad(const KernelArgs& args) {
  const float *dy = args.in[0].f32(), *x = args.in[1].f32(), *like = args.in[2].f32();
  const int64_t count = args.in[0].dim(0), width = args.in[0].dim(1);
  const double least = checkedPositive("rescale_rows_grad", "floor", args.attr[0]);
  float *dx = args.out[0].f32(), *dlike = args.out[1].f32();
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float *d = dy + r * width, *a = x + r * width, *b = like + r * width;
      const double own = dotOf(a, a, width) / width, square = std::max(own, least);
      const double wanted = std::sqrt(dotOf(b, b, width) / width), inner = dotOf(d, a, width) / width;
      const double factor = wanted / std::sqrt(square), pull = own > least ? factor * inner / square : 0;
      const double ofLike = wanted > 0 ? inner / (std::sqrt(square) * wanted) : 0;
      for (int64_t i = 0; i < width; ++i) {
        dx[r * width + i] = static_cast<float>(factor * d[i] - pull * a[i]);
        dlike[r * width + i] = static_cast<float>(ofLike * b[i]);
      }
    }
  });
}

void gaussianTopk(const KernelArgs& args) {
  const float* x = args.in[0].f32();
  const int64_t count = args.in[0].dim(0), width = args.in[0].dim(1);
  const double factor = finiteAttribute(args, "gaussian_topk", 0, "factor");
  float* y = args.out[0].f32();
  if (width == 0) return;
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = x + r * width;
      const float cut = static_cast<float>(Cutoff(row, width, factor).value);
      for (int64_t i = 0; i < width; ++i) y[r * width + i] = row[i] > cut ? row[i] - cut : row[i] == row[i] ? 0 : row[i];
    }
  });
}

void gaussianTopkGrad(const KernelArgs& args) {
  const float *dy = args.in[0].f32(), *x = args.in[1].f32();
  const int64_t count = args.in[0].dim(0), width = args.in[0].dim(1);
  const double factor = finiteAttribute(args, "gaussian_topk_grad", 0, "factor");
  float* dx = args.out[0].f32();
  if (width == 0) return;
  forChunks(count, rowsPerChunk(width), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float *row = x + r * width, *d = dy + r * width;
      const Cutoff cutoff(row, width, factor);
      const float cut = static_cast<float>(cutoff.value);
      double above = 0;  // gradient of the cutoff, negative
      for (int64_t i = 0; i < width; ++i) above += row[i] > cut ? d[i] : 0;
      above /= static_cast<double>(width);
      const double slope = cutoff.deviation > 0 ? factor * above / cutoff.deviation : 0;
      for (int64_t i = 0; i < width; ++i) {
        const double own = row[i] > cut ? d[i] : 0;
        dx[r * width + i] = static_cast<float>(own - above - slope * (row[i] - cutoff.mean));
      }
    }
  });
}

}  // namespace elastiform::cpu
