// The table of CPU kernels by op name, and the vector code they share for the instruction set in use.
#include "cpu/kernels.h"

#include <unordered_map>

#include "cpu/isa.h"
#include "cpu/vector.h"

namespace elastiform::cpu {

namespace portable {
extern const VectorOps ops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const VectorOps ops;
}
namespace avx512 {
extern const VectorOps ops;
}
#endif

namespace {

const VectorOps* opsOf([[maybe_unused]] Isa wanted) {
#if defined(__x86_64__)
  if (wanted == Isa::Avx512) return &avx512::ops;
  if (wanted == Isa::Avx2) return &avx2::ops;
#endif
  return &portable::ops;
}

const VectorOps*& activeOps() {
  static const VectorOps* active = opsOf(isa());
  return active;
}

}  // namespace

const VectorOps& vectorOps() { return *activeOps(); }

bool useVectorOps(Isa wanted) {
  if (wanted > isaAvailable()) return false;
  activeOps() = opsOf(wanted);
  return true;
}

Kernel findKernel(const std::string& name) {
  static const auto& table = *new std::unordered_map<std::string, Kernel>{
      {"embedding", embedding},
      {"embedding_grad", embeddingGrad},
      {"zeros", zeros},
      {"add", add},
      {"scale", scale},
      {"activation", activation},
      {"activation_grad", activationGrad},
      {"softcap", softcap},
      {"softcap_grad", softcapGrad},
      {"gated_activation", gatedActivation},
      {"gated_activation_grad", gatedActivationGrad},
      {"gather_rows", gatherRows},
      {"gather_ids", gatherIds},
      {"scatter_add", scatterAdd},
      {"add_rows", addRows},
      {"add_rows_grad", addRowsGrad},
      {"sum_rows", sumRows},
      {"dot", dot},
      {"segment_sum", segmentSum},
      {"segment_broadcast", segmentBroadcast},
      {"latch", latch},
      {"rms_norm", rmsNorm},
      {"rms_norm_grad", rmsNormGrad},
      {"layer_norm", layerNorm},
      {"layer_norm_grad", layerNormGrad},
      {"linear", linear},
      {"linear_gated", linearGated},
      {"linear_add", linearAdd},
      {"linear_dx", linearDx},
      {"linear_add_grad", linearAddGrad},
      {"linear_dw", linearDw},
      {"rope", rope},
      {"attention", attention},
      {"attention_grad", attentionGrad},
      {"cache_append", cacheAppend},
      {"attention_cached", attentionCached},
      {"page_copy", pageCopy},
      {"scale_columns", scaleColumns},
      {"add_scaled", addScaled},
      {"add_scaled_grad", addScaledGrad},
      {"rescale_rows", rescaleRows},
      {"rescale_rows_grad", rescaleRowsGrad},
      {"gaussian_topk", gaussianTopk},
      {"gaussian_topk_grad", gaussianTopkGrad},
      {"route_topk", routeTopk},
      {"route_threshold", routeThreshold},
      {"gate", gate},
      {"gate_grad", gateGrad},
      {"topk_bce", topkBce},
      {"topk_bce_grad", topkBceGrad},
      {"topk_credit", topkCredit},
      {"tile_scores", tileScores},
      {"tile_scores_grad", tileScoresGrad},
      {"expert_rows", expertRows},
      {"expert_gate", expertGate},
      {"expert_gate_grad", expertGateGrad},
      {"expert_credit", expertCredit},
      {"expert_balance", expertBalance},
      {"expert_balance_grad", expertBalanceGrad},
      {"divergence", divergence},
      {"top_logits", topLogits},
      {"topk_divergence", topkDivergence},
      {"cross_entropy", crossEntropy},
      {"hidden_distance", hiddenDistance},
      {"accumulate", accumulate},
      {"adamw", adamw},
      {"sample", sample},
  };
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

KernelOfSteps findKernelOfSteps(const std::string& name) {
  if (name == "linear") return linearTogether;
  if (name == "linear_gated") return linearGatedTogether;
  if (name == "linear_add") return linearAddTogether;
  if (name == "attention") return attentionTogether;
  return name == "attention_cached" ? attentionCachedTogether : nullptr;
}

}  // namespace elastiform::cpu
