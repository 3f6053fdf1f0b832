// The table of CUDA launchers by op name, and the words of their faults.
#include "cuda/kernels.h"

#include <cstdio>
#include <unordered_map>

namespace elastiform::ELASTIFORM_DEVICE {

Emitter findEmitter(const std::string& op) {
  static const auto& table = *new std::unordered_map<std::string, Emitter>{
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
  const auto found = table.find(op);
  return found == table.end() ? nullptr : found->second;
}

std::string faultMessage(const char* op, const std::string& operand, const FaultRecord& r) {
  const auto text = [&](const char* format, auto... values) {
    char message[256];
    std::snprintf(message, sizeof message, format, op, operand.c_str(), values...);
    return std::string(message);
  };
  switch (r.fault) {
    case Fault::Id:
    case Fault::Target: return text("[%s] %s[%.0f] must be in [%.0f, %.0f), got %.0f", r.index, r.low, r.high, r.got);
    case Fault::Row:
      return text("[%s] %s[%.0f] must be in [%.0f, %.0f) (ascending, unique), got %.0f", r.index, r.low, r.high, r.got);
    case Fault::Offset: return text("[%s] %s[%.0f] must be in [%.0f, %.0f], got %.0f", r.index, r.low, r.high, r.got);
    case Fault::OffsetEnd:
      return text("[%s] %s[%.0f] must be the number of rows %.0f, got %.0f", r.index, r.high, r.got);
    case Fault::Segment:
      return text("[%s] %s[%.0f] must be in its segment, [%.0f, %.0f), got %.0f", r.index, r.low, r.high, r.got);
    case Fault::Length:
      return text("[%s] %s[%.0f] must be in [%.0f, %.0f] for the new rows and the cache, got %.0f", r.index, r.low,
                  r.high, r.got);
    case Fault::NotFinite: return text("[%s] %s[%.0f] must be finite, got %g", r.index, r.got);
    case Fault::Range: return text("[%s] %s[%.0f] must be in [%g, %g], got %g", r.index, r.low, r.high, r.got);
    case Fault::NaN: return text("[%s] %s[%.0f] is NaN", r.index);
    case Fault::NotPositive: return text("[%s] %s[%.0f] must be positive, got %g", r.index, r.got);
    case Fault::Below: return text("[%s] %s[%.0f] must be in [%g, %g), got %g", r.index, r.low, r.high, r.got);
    case Fault::NoMaximum:
      return text("[%s] %s of row %.0f must hold no NaN and have a finite maximum, got %g", r.index, r.got);
    case Fault::Whole: return text("[%s] %s[%.0f] must be a whole number, got %g", r.index, r.got);
    case Fault::Segments:
      return text("[%s] %s: one value per segment wanted: %.0f segments, got %.0f values", r.high, r.got);
    case Fault::Room: return text("[%s] %s selects more rows than the bound %.0f of their dim", r.high);
    case Fault::Rows: return text("[%s] %s must have %.0f rows, got %.0f", r.high, r.got);
    case Fault::Slot: return text("[%s] %s[%.0f] must be no other segment's, got %.0f", r.index, r.got);
    case Fault::Copy: return text("[%s] %s[%.0f] must be copied to once, and not from, got %.0f", r.index, r.got);
    case Fault::Page:
      return text("[%s] %s: that of row %.0f of slot %.0f must be in [0, %.0f), got %.0f", r.low, r.index, r.high, r.got);
    case Fault::NoKeys: return text("[%s] %s: segment %.0f has %.0f queries and no keys", r.index, r.got);
    case Fault::None: break;
  }
  return text("[%s] %s: no fault");
}

}  // namespace elastiform::ELASTIFORM_DEVICE
