"""Golden vectors for training encoder-decoder models: the loss of targets and its gradients, as torch computes them.

Reads the models that seq2seq.py made. Run: pip install -r scripts/golden/requirements.txt && python scripts/golden/seq2seq_training.py
"""

import json

import torch
from transformers import AutoModelForSeq2SeqLM

from common import ROOT, store_vectors

# Labels of the sources of cases.json; the decoder reads them shifted behind the start token 2.
LABELS = [[10, 4, 2], [3, 17, 5, 22, 9, 12, 8, 2], [2]]

if __name__ == "__main__":
    for name in ("bart", "mbart", "marian", "t5", "t5-gated"):
        directory = ROOT / "seq2seq" / name
        model = AutoModelForSeq2SeqLM.from_pretrained(directory, attn_implementation="eager").float().eval()
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.zero_()
        sources = json.loads((directory / "cases.json").read_text())["sources"]
        tokens = sum(len(labels) for labels in LABELS)
        total = 0
        for source, labels in zip(sources, LABELS):
            result = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[2, *labels[:-1]]]))
            loss = torch.nn.functional.cross_entropy(result.logits[0], torch.tensor(labels), reduction="sum") / tokens
            loss.backward()
            total += loss.detach()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "relative_attention_bias" not in n}
        store_vectors(directory / "training.safetensors", {"loss": total.reshape(1), **gradients})
        print(name, float(total), len(gradients))
