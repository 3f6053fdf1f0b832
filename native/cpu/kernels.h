// The CPU kernels by op name. One kernel per op, declared here and defined in the file of its op family.
#pragma once

#include <string>

#include "ops/op.h"

namespace elastiform::cpu {

// The kernel of an op of ops.cc; never null (a test walks the whole registry).
Kernel findKernel(const std::string& name);

// The kernel that runs neighbouring steps of an op as one; null where there is none.
KernelOfSteps findKernelOfSteps(const std::string& name);

// Name of the instruction set chosen at load: "avx512", "avx2" or "portable". ELASTIFORM_ISA forces a lower one.
const char* isaName();

// embedding.cc
void embedding(const KernelArgs&);
void embeddingGrad(const KernelArgs&);
// elementwise.cc
void zeros(const KernelArgs&);
void add(const KernelArgs&);
void scale(const KernelArgs&);
void activation(const KernelArgs&);
void activationGrad(const KernelArgs&);
void softcap(const KernelArgs&);
void softcapGrad(const KernelArgs&);
void gatedActivation(const KernelArgs&);
void gatedActivationGrad(const KernelArgs&);
// rows.cc
void gatherRows(const KernelArgs&);
void gatherIds(const KernelArgs&);
void scatterAdd(const KernelArgs&);
void addRows(const KernelArgs&);
void addRowsGrad(const KernelArgs&);
void sumRows(const KernelArgs&);
void dot(const KernelArgs&);
// norm.cc
void rmsNorm(const KernelArgs&);
void rmsNormGrad(const KernelArgs&);
void layerNorm(const KernelArgs&);
void layerNormGrad(const KernelArgs&);
// linear.cc (on gemm/)
void linear(const KernelArgs&);
void linearGated(const KernelArgs&);
void linearAdd(const KernelArgs&);
void linearTogether(const KernelArgs* steps, int count);
void linearGatedTogether(const KernelArgs* steps, int count);
void linearAddTogether(const KernelArgs* steps, int count);
void linearDx(const KernelArgs&);
void linearAddGrad(const KernelArgs&);
void linearDw(const KernelArgs&);
// rope.cc, attention.cc, cache.cc
void rope(const KernelArgs&);
void attention(const KernelArgs&);
void attentionGrad(const KernelArgs&);
void attentionCached(const KernelArgs&);
void attentionTogether(const KernelArgs* steps, int count);
void attentionCachedTogether(const KernelArgs* steps, int count);
void cacheAppend(const KernelArgs&);
void pageCopy(const KernelArgs&);
// streams.cc
void scaleColumns(const KernelArgs&);
void addScaled(const KernelArgs&);
void addScaledGrad(const KernelArgs&);
void rescaleRows(const KernelArgs&);
void rescaleRowsGrad(const KernelArgs&);
void gaussianTopk(const KernelArgs&);
void gaussianTopkGrad(const KernelArgs&);
// segments.cc
void segmentSum(const KernelArgs&);
void segmentBroadcast(const KernelArgs&);
void latch(const KernelArgs&);
// route.cc
void routeTopk(const KernelArgs&);
void routeThreshold(const KernelArgs&);
void gate(const KernelArgs&);
void gateGrad(const KernelArgs&);
void topkBce(const KernelArgs&);
void topkBceGrad(const KernelArgs&);
void topkCredit(const KernelArgs&);
// expert.cc
void tileScores(const KernelArgs&);
void tileScoresGrad(const KernelArgs&);
void expertRows(const KernelArgs&);
void expertGate(const KernelArgs&);
void expertGateGrad(const KernelArgs&);
void expertCredit(const KernelArgs&);
void expertBalance(const KernelArgs&);
void expertBalanceGrad(const KernelArgs&);
// loss.cc (on gemm/)
void divergence(const KernelArgs&);
void crossEntropy(const KernelArgs&);
// topk_loss.cc
void topLogits(const KernelArgs&);
void topkDivergence(const KernelArgs&);
// hidden.cc
void hiddenDistance(const KernelArgs&);
// optimizer.cc
void accumulate(const KernelArgs&);
void adamw(const KernelArgs&);
// sample.cc
void sample(const KernelArgs&);

}  // namespace elastiform::cpu
