"""Golden vectors for LoRA: adapters that PEFT writes for golden backbones, and the logits with them.

Run: pip install -r scripts/golden/requirements.txt && python scripts/golden/peft_adapters.py
"""

import shutil

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from common import ROOT, packed_ids, segments, store_vectors

VARIANTS = {
    # Every projection, scaled by alpha / r, one module with a rank and an alpha of its own.
    "peft-llama": dict(
        base="llama-gqa",
        r=3,
        lora_alpha=6,
        rank_pattern={"mlp.up_proj": 5},
        alpha_pattern={"mlp.up_proj": 2},
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    # One layer's fused module and its outputs; alpha / sqrt(r).
    "peft-gpt2": dict(
        base="gpt2", r=4, lora_alpha=2, use_rslora=True, fan_in_fan_out=True,
        target_modules=["c_attn", "attn.c_proj", "mlp.c_fc"], layers_to_transform=[0],
    ),
}


def main():
    for name, options in VARIANTS.items():
        options = dict(options)
        base = options.pop("base")
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_pretrained(ROOT / base, dtype=torch.float32, attn_implementation="eager")
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0.0, 0.1)
        directory = ROOT / name
        shutil.rmtree(directory, ignore_errors=True)
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(directory)
        (directory / "README.md").unlink(missing_ok=True)
        ids, offsets = packed_ids(model.config.vocab_size, [9, 5], 3)
        with torch.no_grad():
            logits = torch.cat([model(ids[list(rows)][None]).logits[0] for rows in segments(offsets)])
        store_vectors(directory / "logits.safetensors", {"ids": ids, "offsets": offsets, "logits": logits}, {"base": base})


main()
