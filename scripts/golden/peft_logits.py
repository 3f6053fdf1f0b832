"""Prints, as JSON, the logits of a base model with an adapter for token ids: peft_logits.py BASE ADAPTER 1,2,3."""

import json
import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, ids = sys.argv[1:]
with warnings.catch_warnings(), torch.no_grad():
    # A matrix of the adapter without a place in the base is an error here.
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter).eval()
    logits = model(torch.tensor([[int(i) for i in ids.split(",")]])).logits[0]
print(json.dumps(logits.flatten().tolist()))
