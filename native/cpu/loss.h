// What losses over the vocabulary share on the CPU: chunks of rows, scratch of a loop, sums and counts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/vector.h"
#include "ops/op.h"

namespace elastiform::cpu {

// Logits kept at a time. More rows to a chunk make more of every read (and, for the gradient, every packing) of the
// weight; rows are chunked by shape alone, so results do not depend on the machine.
constexpr int64_t kLogitsBytes = int64_t{32} << 20;

inline int64_t chunkRows(int64_t R, int64_t V, int64_t matrices) {
  const int64_t most = std::clamp<int64_t>(kLogitsBytes / (matrices * V * 4), 1, std::max<int64_t>(R, 1));
  const int64_t chunks = (R + most - 1) / most;
  return chunks ? (R + chunks - 1) / chunks : 1;
}

// Scratch for a loop whose passes allocate alike: the blocks of one pass serve the next.
class LoopScratch {
 public:
  explicit LoopScratch(const KernelArgs& args) : parent_(args), args_(args) {
    args_.scratchArena = this;
    args_.scratchAlloc = [](void* self, size_t bytes) { return static_cast<LoopScratch*>(self)->take(bytes); };
  }
  LoopScratch(const LoopScratch&) = delete;

  const KernelArgs& nextPass() {
    used_ = 0;
    return args_;
  }

 private:
  void* take(size_t bytes) {
    if (used_ == blocks_.size()) blocks_.emplace_back(nullptr, 0);
    auto& [data, size] = blocks_[used_++];
    if (size < bytes) {
      data = parent_.scratch<uint8_t>(static_cast<int64_t>(bytes));
      size = bytes;
    }
    return data;
  }

  const KernelArgs& parent_;
  KernelArgs args_;
  std::vector<std::pair<void*, size_t>> blocks_;
  size_t used_ = 0;
};

// Logits become softcap tanh(logits / softcap), and slopes the derivative of that; with a softcap of 0 nothing happens.
inline void capLogits(float softcap, float* logits, float* slopes, int64_t V) {
  if (softcap == 0) return;
  const VectorOps& vector = vectorOps();
  if (slopes) {
    std::fill(slopes, slopes + V, 1.0f);
    vector.softcapGrad(softcap, slopes, logits, slopes, V);
  }
  vector.softcap(softcap, logits, logits, V);
}

// sum of weight[r] * row[r] in the order of the rows.
inline float weightedSum(const float* weight, const double* row, int64_t R) {
  double total = 0;
  for (int64_t r = 0; r < R; ++r) total += weight[r] * row[r];
  return static_cast<float>(total);
}

inline double productFlops(int64_t R, int64_t V, int64_t K) {
  return 2.0 * static_cast<double>(R) * static_cast<double>(V) * static_cast<double>(K);
}

}  // namespace elastiform::cpu
