"""Prints, as JSON, greedy texts of a checkpoint for sources of token ids, and logits of a target: seq2seq_texts.py DIR SOURCES TARGET."""

import json
import sys

import torch
from transformers import AutoModelForSeq2SeqLM

directory, sources, target = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model, report = AutoModelForSeq2SeqLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
)
model.eval()
with torch.no_grad():
    texts = [model.generate(torch.tensor([ids]), num_beams=1, do_sample=False)[0].tolist() for ids in sources]
    logits = model(input_ids=torch.tensor([sources[0]]), decoder_input_ids=torch.tensor([target])).logits[0]
wrong = [sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")]
print(json.dumps({"texts": texts, "logits": logits.flatten().tolist(), "wrong": wrong}))
