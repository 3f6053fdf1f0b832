"""Prints, as JSON, the logits of a model for token ids: logits.py MODEL 1,2,3."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

directory, ids = sys.argv[1:]
with torch.no_grad():
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    # A checkpoint with a weight too many or too few is an error here.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {info[kind]}"
    logits = model.eval()(torch.tensor([[int(i) for i in ids.split(",")]])).logits[0]
print(json.dumps(logits.flatten().tolist()))
