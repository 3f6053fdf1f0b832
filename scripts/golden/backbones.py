"""Golden vectors for backbones: tiny random models of every variant, with logits and hidden states from transformers.

Run: pip install -r scripts/golden/requirements.txt && python scripts/golden/backbones.py
"""

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

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
}

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
        print(f"{name}: loss {loss.item():.4f}")
