// The vector code of the kernels: one table of functions per instruction set, the best one chosen when first used.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace elastiform::cpu {

struct AdamStep {
  float shrink;                       // 1 - lr * weight decay, for the elements that decay
  float clip;                         // gradient factor
  float beta1Rest, beta2, beta2Rest;  // 1 - beta1, beta2, 1 - beta2
  float rate;                         // lr / (1 - beta1^t)
  float rootCorrection;               // sqrt(1 - beta2^t)
  float eps;
};

// One block of query rows of a segment, for some neighbouring kv heads. Row r of a segment is query position r / group,
// head r % group of the kv head's group.
struct AttentionBlock {
  const float* q;  // position 0 of the segment, first head of the first group; rows of qStride
  const float* k;  // row 0 of page 0, the first kv head; rows of kvStride
  const float* v;
  const int32_t* pages;  // key j is row j % pageRows of page pages[j / pageRows]
  int64_t pageRows;
  float* y;    // as q
  float* lse;  // [positions, lseStride], first head of the first group; or null
  int64_t qStride, kvStride, lseStride;
  int64_t headDim, group, kvHeads;
  int64_t firstRow, rows;  // rows <= kQueryRows
  int64_t keys;            // of the segment
  const int32_t* stands;   // causal: position p sees keys [0, shift + stands[p]], ascending; null: [0, shift + p]
  int64_t shift;
  bool causal;
  int64_t window;          // causal: of these keys, only so many, the last ones
  float scale, softcap;    // softcap c > 0: scores s become c tanh(s / c)
  const float* bias = nullptr;  // [kvHeads x group, 2 biasReach + 1]: added to scores by distance; or null
  int64_t biasReach = 0;
  float* scratch;  // attentionScratch(headDim, rows * kvHeads) floats
};

// The gradient of one (segment, kv head).
struct AttentionGradBlock {
  const float *dy, *q, *k, *v, *y, *lse;  // position 0 of the segment, this kv head or first head of its group
  float *dq, *dk, *dv;
  int64_t qStride, kvStride, lseStride;
  int64_t headDim, group, positions, keys;
  const int32_t* stands;  // as in AttentionBlock
  int64_t shift;
  bool causal;
  int64_t window;
  float scale, softcap;
  const float* bias = nullptr;  // [group, 2 biasReach + 1], as in AttentionBlock
  int64_t biasReach = 0;
  float* scratch;  // attentionGradScratch(headDim, positions * group) floats
};

struct VectorOps {
  void (*add)(const float* a, const float* b, float* y, int64_t n);
  void (*multiply)(const float* a, const float* b, float* y, int64_t n);
  void (*scale)(const float* x, float factor, float* y, int64_t n);
  void (*addScaled)(float* y, const float* x, float factor, int64_t n);  // y += factor x, fused
  void (*activation)(int act, const float* x, float* y, int64_t n);
  void (*activationGrad)(int act, const float* dy, const float* x, float* dx, int64_t n);
  // c tanh(x / c), and dy (1 - tanh^2(x / c)).
  void (*softcap)(float c, const float* x, float* y, int64_t n);
  void (*softcapGrad)(float c, const float* dy, const float* x, float* dx, int64_t n);
  void (*gatedActivation)(int act, const float* g, const float* u, float* y, int64_t n);
  void (*gatedActivationGrad)(int act, const float* dy, const float* g, const float* u, float* dg, float* du,
                              int64_t n);
  double (*dot)(const float* a, const float* b, int64_t n);
  // Rows: y = x rstd weight; returns rstd.
  float (*rmsNorm)(const float* x, const float* weight, float eps, float* y, int64_t n);
  void (*layerNorm)(const float* x, const float* weight, const float* bias, float eps, float* y, float* mean,
                    float* rstd, int64_t n);
  // dweight, dbias: partial sums added to, or null.
  void (*rmsNormGrad)(const float* dy, const float* x, const float* weight, float rstd, float* dx, float* dweight,
                      int64_t n);
  void (*layerNormGrad)(const float* dy, const float* x, const float* weight, float mean, float rstd, float* dx,
                        float* dweight, float* dbias, int64_t n);
  // cos and sin of position * frequencies[i] (the product rounded to f32), times magnitude; sin also times sign.
  void (*rotation)(float position, const float* frequencies, float sign, float magnitude, float* cosine, float* sine,
                   int64_t n);
  // One head: (x[i], x[i + n]) turned by (cosine[i], sine[i]), i < n.
  void (*rotate)(const float* x, const float* cosine, const float* sine, float* y, int64_t n);
  void (*adamw)(float* p, float* g, float* m, float* v, const AdamStep& step, int64_t n);
  float (*maximum)(const float* x, int64_t n, bool* hasNaN);  // minus infinity when empty
  double (*expSum)(const float* x, float maximum, float factor, float* y, int64_t n);  // y = exp((x - maximum) factor)
  int64_t (*attentionScratch)(int64_t headDim, int64_t rows);
  void (*attention)(const AttentionBlock&);
  int64_t (*attentionGradScratch)(int64_t headDim, int64_t rows);
  void (*attentionGrad)(const AttentionGradBlock&);
};

constexpr int64_t kQueryRows = 96;   // rows of one block of queries: sixteen register tiles of six
constexpr int64_t kKeyTile = 128;    // keys of one tile; tiles start at multiples of it from the segment's first key

const VectorOps& vectorOps();
// Switches every kernel to another instruction set, so that one process can test them all; false when the machine or
// the build lacks it.
bool useVectorOps(Isa isa);

}  // namespace elastiform::cpu
