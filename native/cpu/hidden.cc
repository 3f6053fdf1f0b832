// Distances between rows of two residual streams, and their gradients.
#include <cmath>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/loss.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

void hiddenDistance(const KernelArgs& args) {
  const TensorView &x = args.in[0], &y = args.in[1], &weight = args.in[2];
  const TensorView &loss = args.out[0], &row = args.out[1], &dx = args.out[2];
  const int64_t R = x.dim(0), D = x.dim(1);
  const bool cosine = intAttribute(args, "hidden_distance", 0, "kind", 0, 1) == 1;
  const VectorOps& vector = vectorOps();
  double* values = args.scratch<double>(R);
  forChunks(R, rowsPerChunk(D), args, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float *a = x.f32() + r * D, *b = y.f32() + r * D;
      float* to = dx ? dx.f32() + r * D : nullptr;
      const double w = weight.f32()[r];
      if (cosine) {
        const double xx = vector.dot(a, a, D), norms = std::sqrt(xx) * std::sqrt(vector.dot(b, b, D));
        const double similarity = norms == 0 ? 0 : vector.dot(a, b, D) / norms;
        values[r] = 1 - similarity;
        const double ofX = norms == 0 ? 0 : w * similarity / xx, ofY = norms == 0 ? 0 : -w / norms;
        for (int64_t i = 0; to && i < D; ++i) to[i] = static_cast<float>(ofX * a[i] + ofY * b[i]);
      } else {
        double sum = 0;
        for (int64_t i = 0; i < D; ++i) {
          const double difference = double{a[i]} - b[i];
          sum += difference * difference;
          if (to) to[i] = static_cast<float>(2 * w / static_cast<double>(D) * difference);
        }
        values[r] = sum / static_cast<double>(D);
      }
      if (row) row.f32()[r] = static_cast<float>(values[r]);
    }
  });
  loss.f32()[0] = weightedSum(weight.f32(), values, R);
}

}  // namespace elastiform::cpu
