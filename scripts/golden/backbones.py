"""Golden vectors for backbones: tiny random models of every variant, with logits and hidden states from transformers.

Run: pip install -r scripts/golden/requirements.txt && python scripts/golden/backbones.py
"""

import torch
import torch.nn.functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common import ROOT, build, packed_ids, segments, store_model, store_vectors

LENGTHS = [13, 5]


def llama(**options):
    base = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=72, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False)
    return LlamaForCausalLM, LlamaConfig(**{**base, **options})


def mistral(**options):
    base = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
                head_dim=8, vocab_size=72, max_position_embeddings=64, initializer_range=0.2, sliding_window=None)
    return MistralForCausalLM, MistralConfig(**{**base, **options})


def gpt2(**options):
    base = dict(n_embd=24, n_layer=2, n_head=3, n_positions=16, vocab_size=72, initializer_range=0.2, bos_token_id=0,
                eos_token_id=0)
    return GPT2LMHeadModel, GPT2Config(**{**base, **options})


# Of 13 rows the window hides some; the head dim is not the hidden size over the heads; no embedding is zero as padding is.
SMALL = dict(hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=4, vocab_size=32, max_position_embeddings=64, initializer_range=0.4, pad_token_id=None)


def small(model_class, config_class, **options):
    return model_class, config_class(**{**SMALL, **options})


def older_gemma3(config):
    """How transformers before version 5 wrote the same settings."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["full_attention"].pop("rope_theta")
    config["rope_scaling"] = rope["full_attention"]
    config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    config["sliding_window_pattern"] = config.pop("_sliding_window_pattern", 2)
    del config["layer_types"]


def older_rope(config):
    """How transformers before version 5 wrote the same settings."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope


LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", rope_theta=5000.0, factor=2.0)

# name: (class and config, dtype of the stored weights, edit of the config, gradients of every parameter too)
VARIANTS = {
    "llama-gqa": (llama(), torch.float32, None, True),
    "llama-tied": (llama(tie_word_embeddings=True, num_key_value_heads=4), torch.float32, None, False),
    "llama-biased": (llama(attention_bias=True, mlp_bias=True, head_dim=12, hidden_act="gelu"), torch.float32, None, True),
    # Head dim 16: wavelengths 6 (kept), 20 and 63 (smoothed), 199 and more (divided by 8).
    "llama-rope3": (llama(head_dim=16, rope_parameters=LLAMA3, max_position_embeddings=512), torch.float32, None, False),
    "llama-linear": (llama(rope_parameters=LINEAR), torch.float32, older_rope, False),
    "llama-bf16": (llama(), torch.bfloat16, None, False),
    "mistral": (mistral(), torch.float32, None, False),
    "gpt2": (gpt2(), torch.float32, None, True),
    "gpt2-untied": (gpt2(tie_word_embeddings=False, activation_function="relu", n_inner=40), torch.float32, None, False),
    "gpt2-f16": (gpt2(activation_function="gelu_pytorch_tanh"), torch.float16, None, False),
    "mistral-window": (small(MistralForCausalLM, MistralConfig, sliding_window=4), torch.float32, None, False),
    "qwen2": (small(Qwen2ForCausalLM, Qwen2Config, hidden_size=16, use_sliding_window=True, sliding_window=5,
                    max_window_layers=1), torch.float32, None, True),
    "qwen3": (small(Qwen3ForCausalLM, Qwen3Config), torch.float32, None, True),
    "gemma": (small(GemmaForCausalLM, GemmaConfig, num_key_value_heads=1), torch.float32, None, False),
    # Caps and scores of about the same size.
    "gemma2": (small(Gemma2ForCausalLM, Gemma2Config, sliding_window=4, query_pre_attn_scalar=9,
                     attn_logit_softcapping=3.0, final_logit_softcapping=2.5), torch.float32, None, True),
    "gemma3": (small(Gemma3ForCausalLM, Gemma3TextConfig, num_hidden_layers=3, sliding_window=5, query_pre_attn_scalar=9,
                     sliding_window_pattern=2, rope_parameters={
                         "sliding_attention": dict(rope_type="default", rope_theta=100.0),
                         "full_attention": dict(rope_type="linear", rope_theta=5000.0, factor=2.0),
                     }), torch.float32, None, True),
    "gemma3-older": (small(Gemma3ForCausalLM, Gemma3TextConfig, sliding_window=3, num_key_value_heads=1,
                           sliding_window_pattern=2, rope_parameters={
                               "sliding_attention": dict(rope_type="default", rope_theta=50.0),
                               "full_attention": dict(rope_type="linear", rope_theta=2000.0, factor=4.0),
                           }), torch.float32, older_gemma3, False),
    # Two layers of each type that share keys and values, feed-forwards of unlike widths, some of them sparse.
    "gemma3n": (small(Gemma3nForCausalLM, Gemma3nTextConfig, num_hidden_layers=6, intermediate_size=[16, 12, 20, 16, 8, 24],
                      layer_types=["sliding_attention", "full_attention"] * 3, num_kv_shared_layers=4, sliding_window=4,
                      activation_sparsity_pattern=[0.8, 0.0, 0.6, 0.0, 0.3, 0.0], vocab_size_per_layer_input=32,
                      hidden_size_per_layer_input=3, laurel_rank=5, altup_num_inputs=3, final_logit_softcapping=2.5,
                      rope_parameters={
                          "sliding_attention": dict(rope_type="default", rope_theta=100.0),
                          "full_attention": dict(rope_type="default", rope_theta=5000.0),
                      }), torch.float32, None, True),
    "gemma3n-one": (small(Gemma3nForCausalLM, Gemma3nTextConfig, num_kv_shared_layers=0, altup_correct_scale=False,
                          layer_types=["full_attention"] * 2, vocab_size_per_layer_input=32, altup_num_inputs=2,
                          hidden_size_per_layer_input=2, laurel_rank=2), torch.float32, None, False),
}

def sliced(model, config, widths):
    """The model with a prefix of the units of every layer's feed-forward."""
    slice_config = type(config)(**{**config.to_dict(), "intermediate_size": widths})
    slice_config._attn_implementation = "eager"
    small = type(model)(slice_config).float().eval()
    state = {}
    for name, value in model.state_dict().items():
        if ".mlp." in name:
            units = widths[int(name.split(".layers.")[1].split(".")[0])]
            value = value[:, :units] if "down_proj" in name else value[:units]
        state[name] = value
    small.load_state_dict(state)
    return small


# Units of the layers of slices whose logits are kept, too.
SLICES = {"gemma3n-one": [4, 12]}

if __name__ == "__main__":
    for seed, (name, ((model_class, config), dtype, edit, gradients)) in enumerate(VARIANTS.items()):
        model = build(model_class, config, 100 + seed)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
        before_norm = {}
        norm = model.transformer.ln_f if name.startswith("gpt2") else model.model.norm
        norm.register_forward_pre_hook(lambda module, args: before_norm.update(x=args[0]))
        ids, offsets = packed_ids(config.vocab_size, LENGTHS, 200 + seed)
        logits, hidden, loss = [], [], torch.zeros(1)
        for segment in segments(offsets):
            own = ids[segment.start : segment.stop]
            logits.append(model(own[None]).logits[0])
            hidden.append(before_norm["x"][0])
            loss = loss + F.cross_entropy(logits[-1][:-1], own[1:], reduction="sum")
        loss = loss / (sum(LENGTHS) - len(LENGTHS))
        tensors = {"ids": ids, "offsets": offsets, "logits": torch.cat(logits), "hidden": torch.cat(hidden), "loss": loss}
        if gradients:
            loss.sum().backward()
            tensors |= {f"grad.{n}": p.grad for n, p in model.named_parameters()}
        store_model(ROOT / name, model, dtype, *([edit] if edit else []))
        store_vectors(ROOT / name / "golden.safetensors", tensors)
        if name in SLICES:
            small = sliced(model, config, SLICES[name])
            own = [small(ids[segment.start : segment.stop][None]).logits[0] for segment in segments(offsets)]
            kept = {"ids": ids, "offsets": offsets, "widths": torch.tensor(SLICES[name]), "logits": torch.cat(own)}
            store_vectors(ROOT / name / "slice.safetensors", kept)
        print(f"{name}: loss {loss.item():.4f}")
