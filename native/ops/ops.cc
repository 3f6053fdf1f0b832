// The op registry. docs/ops.md says what each op computes; lib/graph/ops has its builder and gradient.
#include "ops/op.h"

#include <unordered_map>

namespace elastiform {

const std::vector<OpDef>& opDefs() {
  static const std::vector<OpDef>& defs = *new std::vector<OpDef>{
      // embedding
      {"embedding", "table:w[V,D] ids:i32[R] -> y:f32[R,D]", {}},
      {"embedding_grad", "dy:f32[R,D] ids:i32[R] -> dtable:f32[V,D]", {}},
      // elementwise and rows
      {"zeros", "-> y:f32[*X]", {}},
      {"add", "a:f32[*X] b:f32[*X] -> y:f32[*X]", {}, 0},
      {"scale", "x:f32[*X] s?:f32[1] -> y:f32[*X]", {"factor"}, 0, "x,y"},
      {"activation", "x:f32[*X] -> y:f32[*X]", {"act"}, -1, "x y"},
      {"activation_grad", "dy:f32[*X] x:f32[*X] -> dx:f32[*X]", {"act"}, 0, "dy,x,dx"},
      {"gated_activation", "g:f32[*X] u:f32[*X] -> y:f32[*X]", {"act"}, -1, "g,u,y"},
      {"gated_activation_grad", "dy:f32[*X] g:f32[*X] u:f32[*X] -> dg:f32[*X] du:f32[*X]", {"act"}, 0, "dy,g,u,dg,du"},
      {"gather_rows", "x:f32[N,D] rows:i32[R] -> y:f32[R,D]", {}, -1, "x,y"},
      {"gather_ids", "x:i32[N] rows:i32[R] -> y:i32[R]", {}},
      {"softcap", "x:f32[*X] -> y:f32[*X]", {"cap"}, 0, "x,y"},
      {"softcap_grad", "dy:f32[*X] x:f32[*X] -> dx:f32[*X]", {"cap"}, 0, "dy,x,dx"},
      {"scatter_add", "acc:f32[N,D] x:f32[R,D] rows:i32[R] -> y:f32[N,D]", {}, 0, "x"},
      {"add_rows", "residual:f32[N,D] x:f32[R|N,D] rows?:i32[R] gate?:f32[R|N] -> y:f32[N,D]", {}, 0, "x"},
      {"add_rows_grad",
       "dy:f32[N,D] x?:f32[R|N,D] rows?:i32[R] gate?:f32[R|N] -> dx:f32[R|N,D] dgate?:f32[R|N]",
       {}, -1, "x,dx"},
      {"sum_rows", "x:f32[N,D] rows?:i32[R] gate?:f32[R|N] -> y:f32[D]", {}, -1, "x"},
      {"dot", "a:f32[*X] b:f32[*X] -> y:f32[1]", {}},
      {"segment_sum", "x:f32[N,D] offsets:i32[O] -> y:f32[S,D]", {"most", "mean"}, -1, "x"},
      {"segment_broadcast", "x:f32[S,D] offsets:i32[O] -> y:f32[N,D]", {"most", "mean"}},
      {"latch", "x:f32[*X] held:f32[*X] -> y:f32[*X]", {}},
      // norm
      {"rms_norm",
       "x:f32[N,D] weight:w[F] rows?:i32[R] -> y:f32[R|N,D] rstd?:f32[R|N,G]",
       {"eps", "offset"}, -1, "y"},
      {"rms_norm_grad",
       "dy:f32[R|N,D] x:f32[N,D] weight:w[F] rstd:f32[R|N,G] rows?:i32[R] -> dx:f32[R|N,D] dweight?:f32[F]",
       {"offset"}, -1, "dy"},
      {"layer_norm",
       "x:f32[N,D] weight:w[D] bias?:w[D] rows?:i32[R] -> y:f32[R|N,D] mean?:f32[R|N] rstd?:f32[R|N]",
       {"eps"}, -1, "y"},
      {"layer_norm_grad",
       "dy:f32[R|N,D] x:f32[N,D] weight:w[D] mean:f32[R|N] rstd:f32[R|N] rows?:i32[R] -> dx:f32[R|N,D] "
       "dweight?:f32[D] dbias?:f32[D]",
       {}, -1, "dy"},
      // linear (cpu/gemm)
      {"linear",
       "x:f32[M,K] w:w[N<,K<] bias?:w[N<] rows?:i32[R] u?:f32[R|M,P] b?:w[N<,P<] -> y:f32[R|M,N] pre?:f32[R|M,N]",
       {"act"}, -1, "x u y,pre"},
      {"linear_gated",
       "x:f32[M,K] wg:w[N<,K<] wu:w[N<,K<] bg?:w[N<] bu?:w[N<] rows?:i32[R] gate_u?:f32[R|M,P] gate_b?:w[N<,P<] "
       "up_u?:f32[R|M,Q] up_b?:w[N<,Q<] -> y:f32[R|M,N] g?:f32[R|M,N] u?:f32[R|M,N]",
       {"act"}, -1, "x gate_u up_u y,g,u"},
      {"linear_add",
       "residual:f32[N,D] x:f32[R|N,K] w:w[D<,K<] bias?:w[D<] rows?:i32[R] gate?:f32[R|N] u?:f32[R|N,P] b?:w[D<,P<] "
       "-> y:f32[N,D]",
       {},
       0, "x u"},
      {"linear_dx", "dy:f32[R,N] w:w[N<,K<] acc?:f32[R,K] -> dx:f32[R,K]", {}, 2, "dy acc,dx"},
      {"linear_add_grad",
       "dy:f32[N,D] x?:f32[R|N,K] w:w[D<,K<] bias?:w[D<] rows?:i32[R] gate?:f32[R|N] -> dx:f32[R|N,K] "
       "dgate?:f32[R|N]",
       {}, -1, "x,dx"},
      {"linear_dw",
       "dy:f32[A,N] x:f32[B,K] dyrows?:i32[R] xrows?:i32[Q] gate?:f32[R|A] -> dw:f32[N,K]",
       {}, -1, "dy x"},
      // positions and attention
      {"rope", "x:f32[R,D] positions:i32[R] inv_freq:w[F] -> y:f32[R,D]", {"head_dim", "sign", "magnitude"}, 0, "x,y"},
      {"attention",
       "q:f32[R,Q] k:f32[N,C] v:f32[N,C] offsets:i32[O] rows?:i32[R] row_offsets?:i32[O] "
       "bias?:f32[H,E] -> y:f32[R,Q] lse?:f32[R,H]",
       {"heads", "kv_heads", "causal", "scale", "window", "softcap"}, -1, "q,k,v,y"},
      {"attention_grad",
       "dy:f32[R,Q] q:f32[R,Q] k:f32[N,C] v:f32[N,C] y:f32[R,Q] lse:f32[R,H] offsets:i32[O] rows?:i32[R] "
       "row_offsets?:i32[O] bias?:f32[H,E] -> dq:f32[R,Q] dk:f32[N,C] dv:f32[N,C]",
       {"heads", "kv_heads", "causal", "scale", "window", "softcap"}, -1, "dy,q,k,v,y,dq,dk,dv"},
      {"cache_append",
       "k:f32[N,C] v:f32[N,C] offsets:i32[O] slots:i32[S] lengths!:i32[Z] pages:i32[Z,B] pool_k!:f32[P,T,C] "
       "pool_v!:f32[P,T,C] ->",
       {}, -1, "k,v"},
      {"attention_cached",
       "q:f32[R,Q] offsets:i32[O] slots:i32[S] lengths:i32[Z] pages:i32[Z,B] pool_k:f32[P,T,C] pool_v:f32[P,T,C] "
       "rows?:i32[R] row_offsets?:i32[O] bias?:f32[H,E] -> y:f32[R,Q]",
       {"heads", "kv_heads", "scale", "window", "softcap"}, -1, "q,y"},
      {"page_copy", "from:i32[M] to:i32[M] pool_k!:f32[P,T,C] pool_v!:f32[P,T,C] ->", {}},
      // residual streams
      {"scale_columns", "x:f32[N,D] w:w[D] -> y:f32[N,D]", {}, 0},
      {"add_scaled", "acc:f32[N,D] x:f32[N,D] c:f32[N,C] -> y:f32[N,D]", {"column", "offset"}, 0},
      {"add_scaled_grad",
       "dy:f32[N,D] x:f32[N,D] c:f32[N,C] -> dx:f32[N,D] dc:f32[N,C]",
       {"column", "offset"}},
      {"rescale_rows", "x:f32[N,D] like:f32[N,D] -> y:f32[N,D]", {"floor"}},
      {"rescale_rows_grad",
       "dy:f32[N,D] x:f32[N,D] like:f32[N,D] -> dx:f32[N,D] dlike:f32[N,D]",
       {"floor"}},
      {"gaussian_topk", "x:f32[N,D] -> y:f32[N,D]", {"factor"}},
      {"gaussian_topk_grad", "dy:f32[N,D] x:f32[N,D] -> dx:f32[N,D]", {"factor"}},
      // routing
      {"route_topk", "z:f32[N,1] offsets:i32[O] capacity:f32[S] -> rows:i32[+R] row_offsets:i32[O]", {}},
      {"route_threshold", "z:f32[N,1] offsets:i32[O] threshold:f32[S] -> rows:i32[+R] row_offsets:i32[O]", {}},
      {"gate", "z:f32[N,1] rows:i32[R] -> g:f32[R]", {"mode"}},
      {"gate_grad", "dg:f32[R] z:f32[N,1] rows:i32[R] -> dz:f32[N,1]", {"mode"}},
      {"topk_bce", "z:f32[N,1] rows:i32[R] -> loss:f32[1]", {}},
      {"topk_bce_grad", "dloss:f32[1] z:f32[N,1] rows:i32[R] -> dz:f32[N,1]", {}},
      {"topk_credit",
       "dy:f32[N,D] before:f32[N,D] after:f32[N,D] z:f32[N,1] offsets:i32[O] row_offsets:i32[O] weight:f32[N] -> "
       "dz:f32[N,1]",
       {}},
      // experts
      {"tile_scores",
       "z:f32[N,E] positions:i32[N] offsets:i32[O] held?:f32[S,H] -> y:f32[N,E] next?:f32[S,H]",
       {"tile"}},
      {"tile_scores_grad",
       "dy:f32[N,E] positions:i32[N] offsets:i32[O] held?:f32[S,H] -> dz:f32[N,E]",
       {"tile"}},
      {"expert_rows",
       "z:f32[N,E] offsets:i32[O] share:f32[S] -> rows:i32[+R] row_offsets:i32[O]",
       {"expert", "rule"}},
      {"expert_gate",
       "z:f32[N,E] offsets:i32[O] share:f32[S] rows:i32[R] -> g:f32[R]",
       {"expert", "rule", "mode"}},
      {"expert_gate_grad",
       "dg:f32[R] z:f32[N,E] offsets:i32[O] share:f32[S] rows:i32[R] -> dz:f32[N,E]",
       {"expert", "rule", "mode"}},
      {"expert_credit",
       "h:f32[N,U] dh:f32[N,U] z:f32[R|N,E] offsets:i32[O] share:f32[S] weight:f32[N] rows?:i32[R] -> dz:f32[R|N,E]",
       {"rule"}},
      {"expert_balance", "z:f32[N,E] offsets:i32[O] share:f32[S] -> loss:f32[1]", {"rule"}},
      {"expert_balance_grad", "dloss:f32[1] z:f32[N,E] offsets:i32[O] share:f32[S] -> dz:f32[N,E]", {"rule"}},
      // losses (chunked over rows: full logits never exist)
      {"divergence",
       "hs:f32[R,K] ht:f32[R,J] w:w[V,K<] weight:f32[R] targets?:i32[R] wt?:w[V,J<] -> loss:f32[1] row?:f32[R] "
       "dh?:f32[R,K] agree?:f32[R] ce?:f32[R]",
       {"kind", "beta", "softcap", "teacher_softcap"}, -1, "hs,ht dh"},
      {"top_logits", "h:f32[R,K] w:w[V,K<] -> ids:i32[R,T] logp:f32[R,T] rest:f32[R]", {"softcap"}, -1, "h"},
      {"topk_divergence",
       "hs:f32[R,K] w:w[V,K<] ids:i32[R,T] logp:f32[R,T] rest:f32[R] weight:f32[R] -> loss:f32[1] row?:f32[R] "
       "dh?:f32[R,K]",
       {"kind", "softcap"}, -1, "hs dh"},
      {"cross_entropy",
       "h:f32[R,K] w:w[V,K<] targets:i32[R] weight:f32[R] -> loss:f32[1] row?:f32[R] dh?:f32[R,K] "
       "dw?:f32[V,K] correct?:f32[R]",
       {"softcap"}, -1, "h dh"},
      // losses between residual streams
      {"hidden_distance",
       "x:f32[R,D] y:f32[R,D] weight:f32[R] -> loss:f32[1] row?:f32[R] dx?:f32[R,D]",
       {"kind"}},
      // optimizer
      {"accumulate", "state!:f32[P] x:f32[*X] ->", {"offset", "stride"}},
      {"adamw", "p!:f32[P] g!:f32[P] m!:f32[P] v!:f32[P] hyper:f32[8] -> grad_norm:f32[1]", {"decay_count"}},
      // sampling
      {"sample", "logits:f32[S,V] params:f32[S,4] -> ids:i32[S] logprob:f32[S]", {}},
  };
  return defs;
}

int findOp(const std::string& name) {
  static const auto& index = *[] {
    auto* map = new std::unordered_map<std::string, int>;
    for (size_t i = 0; i < opDefs().size(); ++i) map->emplace(opDefs()[i].name, static_cast<int>(i));
    return map;
  }();
  const auto found = index.find(name);
  return found == index.end() ? -1 : found->second;
}

}  // namespace elastiform
