// The CUDA side of every op: the function that launches its kernels, by op name.
#pragma once

#include <string>

#include "cuda/launch.h"

namespace elastiform::ELASTIFORM_DEVICE {

// Never null for an op of ops.cc (a test walks the whole registry).
Emitter findEmitter(const std::string& op);

// The message of the error for a fault of `op`; `operand` is the name of its input.
std::string faultMessage(const char* op, const std::string& operand, const FaultRecord& record);

// embedding.cu
void embedding(const Launch&);
void embeddingGrad(const Launch&);
// elementwise.cu
void zeros(const Launch&);
void add(const Launch&);
void scale(const Launch&);
void activation(const Launch&);
void activationGrad(const Launch&);
void softcap(const Launch&);
void softcapGrad(const Launch&);
void gatedActivation(const Launch&);
void gatedActivationGrad(const Launch&);
// rows.cu
void gatherRows(const Launch&);
void gatherIds(const Launch&);
void scatterAdd(const Launch&);
void addRows(const Launch&);
void addRowsGrad(const Launch&);
void sumRows(const Launch&);
void dot(const Launch&);
// norm.cu
void rmsNorm(const Launch&);
void rmsNormGrad(const Launch&);
void layerNorm(const Launch&);
void layerNormGrad(const Launch&);
// linear.cu
void linear(const Launch&);
void linearGated(const Launch&);
void linearAdd(const Launch&);
void linearDx(const Launch&);
void linearAddGrad(const Launch&);
void linearDw(const Launch&);
// rope.cu
void rope(const Launch&);
// attention.cu
void attention(const Launch&);
void attentionGrad(const Launch&);
void attentionCached(const Launch&);
// cache.cu
void cacheAppend(const Launch&);
void pageCopy(const Launch&);
// streams.cu
void scaleColumns(const Launch&);
void addScaled(const Launch&);
void addScaledGrad(const Launch&);
void rescaleRows(const Launch&);
void rescaleRowsGrad(const Launch&);
void gaussianTopk(const Launch&);
void gaussianTopkGrad(const Launch&);
// segments.cu
void segmentSum(const Launch&);
void segmentBroadcast(const Launch&);
void latch(const Launch&);
// route.cu
void routeTopk(const Launch&);
void routeThreshold(const Launch&);
void gate(const Launch&);
void gateGrad(const Launch&);
void topkBce(const Launch&);
void topkBceGrad(const Launch&);
void topkCredit(const Launch&);
void expertRows(const Launch&);
// expert.cu
void tileScores(const Launch&);
void tileScoresGrad(const Launch&);
void expertGate(const Launch&);
void expertGateGrad(const Launch&);
void expertCredit(const Launch&);
void expertBalance(const Launch&);
void expertBalanceGrad(const Launch&);
// loss.cu
void divergence(const Launch&);
void crossEntropy(const Launch&);
// topk_loss.cu
void topLogits(const Launch&);
void topkDivergence(const Launch&);
// hidden.cu
void hiddenDistance(const Launch&);
// optimizer.cu
void accumulate(const Launch&);
void adamw(const Launch&);
// sample.cu
void sample(const Launch&);

}  // namespace elastiform::ELASTIFORM_DEVICE
