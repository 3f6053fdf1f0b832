// What losses over the vocabulary share on a device: softmax of long rows, chunks of rows and their gradients.
#pragma once

#include <functional>

#include "cuda/collectives.cuh"
#include "cuda/four.cuh"
#include "cuda/launch.h"

namespace elastiform::ELASTIFORM_DEVICE {

// Of the blocks that have a row each.
constexpr int kRowThreads = 512;

// What a thread takes of a row at once: pieces of four logits, as many pieces apart as there are threads.
constexpr int kPieces = 2, kStride = 4 * kRowThreads, kStep = kPieces * kStride;
using Taken = float[kPieces][4];

// Logits [c, c + 4) of a row; past its end -inf.
DEVICE float4 logitsAt(const float* row, int c, int V) {
  if (c + 4 <= V && alignedFour(row + c)) return ldGlobal<float4>(row + c);
  const auto at = [&](int i) { return i < V ? ldGlobal(row + i) : -INFINITY; };
  return {at(c), at(c + 1), at(c + 2), at(c + 3)};
}

DEVICE void take(const float* row, int c, int V, Taken& x) {
  UNROLL
  for (int i = 0; i < kPieces; ++i) spread(logitsAt(row, c + i * kStride, V), x[i]);
}

// The largest logit, NaN passed over, and the first piece that has it.
struct Top {
  float value = -INFINITY;
  int piece = INT32_MAX;

  // What exponents are relative to: where there is no logit but -inf, e^-inf must not become e^(-inf + inf).
  DEVICE float reference() const { return value == -INFINITY ? 0.f : value; }
};

struct LossShared {
  double partial[kRowThreads / 32];
  Top top[kRowThreads / 32];
};

DEVICE Top warpTop(Top top) {
  UNROLL
  for (int lanes = 16; lanes > 0; lanes >>= 1) {
    const Top other{shflXor(top.value, lanes), shflXor(top.piece, lanes)};
    if (other.value > top.value || (other.value == top.value && other.piece < top.piece)) top = other;
  }
  return top;
}

DEVICE Top blockTop(Top top, LossShared& s) {
  top = warpTop(top);
  syncThreads();  // the previous one has been read
  if (laneId() == 0) s.top[warpId()] = top;
  syncThreads();  // top is complete
  return warpTop(s.top[laneId() % (kRowThreads / 32)]);
}

// The sum of e^(logit - top) of a row, by one pass: it shrinks when a larger logit comes. In floats within a thread,
// over a few hundred logits, and in doubles over the block.
struct Softmax {
  Top top;
  float sum = 0;

  // e = e^(x - top). Returns by what the sum has shrunk.
  DEVICE float add(const Taken& x, int c, Taken& e) {
    const float before = top.value;
    UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const float most = fmaxf(fmaxf(x[i][0], x[i][1]), fmaxf(x[i][2], x[i][3]));
      if (most > top.value) top = {most, c + i * kStride};
    }
    const float reference = top.reference(), factor = fastExp(before - reference);
    float added = 0;
    UNROLL
    for (int i = 0; i < kPieces; ++i) {
      UNROLL
      for (int j = 0; j < 4; ++j) e[i][j] = fastExp(x[i][j] - reference);
      added += (e[i][0] + e[i][1]) + (e[i][2] + e[i][3]);
    }
    sum = fmaf(sum, factor, added);
    return factor;
  }
};

// Of the whole row, in all threads.
struct RowSoftmax {
  Top top;
  double sum;
  float factor;  // by which the sums of this thread shrink

  DEVICE RowSoftmax(const Softmax& own, LossShared& s) : top(blockTop(own.top, s)) {
    factor = fastExp(own.top.value - top.reference());
    sum = blockTotal(static_cast<double>(own.sum) * factor, s.partial);
  }
  DEVICE double logSum() const { return top.value + log(sum); }
  // Of the largest logit, the first of several; -1 where there is none, or a NaN.
  DEVICE int index(const float* row, int V) const {
    if (!(sum > 0)) return -1;
    const float4 x = logitsAt(row, top.piece, V);
    return top.piece + (x.x == top.value ? 0 : x.y == top.value ? 1 : x.z == top.value ? 2 : 3);
  }
};

// Of the logits, [chunk, pitch], in every precision that a product takes; null otherwise.
struct Gradient {
  float* wide = nullptr;
  bf16* narrow = nullptr;
  int pitch = 0;  // rows start where eight elements may be moved at once
  int first = 0;  // row of the chunk

  __host__ __device__ explicit operator bool() const { return wide || narrow; }
  DEVICE void store(int r, int c, int V, const float4& g) const {
    const int64_t at = int64_t{r - first} * pitch + c;
    if (wide) storeFour(wide + at, g, V - c);
    if (narrow) storeFour(narrow + at, g, V - c);
  }
  DEVICE void storeOne(int r, int c, float g) const {
    const int64_t at = int64_t{r - first} * pitch + c;
    if (wide) stGlobal(wide + at, g);
    if (narrow) stGlobal(narrow + at, toBf16(g));
  }
};

// Logits z that are softcap tanh(x / softcap) have this derivative by x; a softcap of 0: they are x.
DEVICE float slopeOf(float z, float softcap) {
  const float t = z / softcap;
  return softcap > 0.f ? fmaf(-t, t, 1.f) : 1.f;
}

// A chunk of rows, and what losses share; absent operands are null.
struct Rows {
  Operand weight, targets;
  float* logits = nullptr;  // of the student's rows of the chunk, then of the teacher's
  int teacherAt = 0;        // row of the logits where the teacher's begin; 0: right behind the student's
  float softcap = 0, teacherSoftcap = 0;
  double* value = nullptr;  // of every row
  Operand row, ce, agree;
  int first = 0, most = 0;  // of the chunk
  Gradient gradient;

  DEVICE int count() const { return max(0, min(weight.size(0) - first, most)); }
  DEVICE const float* teacher(int i, int V) const {
    return logits + (int64_t{teacherAt > 0 ? teacherAt : count()} + i) * V;
  }
  DEVICE int target(int r) const { return targets ? ldGlobal(targets.i32() + r) : -1; }
};

// A loss that `launchRows` computes chunk by chunk, of student rows h and, where there are any, teacher rows, and the
// gradients that are wanted. The teacher's head is `wt`, or w where that is absent. Without `loss` there is none, nor any
// gradient, and `launchRows` alone has results.
void vocabularyLoss(const Launch& launch, const std::function<void(const Rows&)>& launchRows, const Operand& h,
                    const Operand& teacher, const Operand& w, const Operand& wt, Rows rows, const Operand& loss,
                    const Operand& dh, const Operand& dw);

}  // namespace elastiform::ELASTIFORM_DEVICE
