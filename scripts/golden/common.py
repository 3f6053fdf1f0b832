"""What both golden generators share: random tiny models of every variant, packed ids, and how vectors are stored."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save

ROOT = Path(__file__).resolve().parents[2] / "test" / "golden"


def build(model_class, config, seed):
    """A random model in float32 whose norms, biases and scores are far from their trivial initial values."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.2)
    return model


def packed_ids(vocab, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (sum(lengths),), generator=generator)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return ids, offsets


def segments(offsets):
    return [range(int(a), int(b)) for a, b in zip(offsets[:-1], offsets[1:])]


def store_model(directory, model, dtype=torch.float32, edit=lambda config: None, tensors=None):
    """Writes config.json, rewritten by `edit`, and model.safetensors, its tensors rewritten by `tensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.config.to_json_string())
    for key in ["_name_or_path", "transformers_version", "id2label", "label2id"]:
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    edit(config)
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    # A tied head is stored once, with the embedding.
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    kept = [(name, value) for name, value in model.state_dict().items() if name not in tied]
    stored = {name: value.detach().to(dtype).clone().contiguous() for name, value in kept}
    write(directory / "model.safetensors", tensors(stored) if tensors else stored, {"format": "pt"})


def store_vectors(path, tensors, metadata=None):
    ready = {}
    for name, value in tensors.items():
        value = value.detach()
        ready[name] = (value.float() if value.is_floating_point() else value.to(torch.int32)).clone().contiguous()
    write(path, ready, {"transformers": transformers.__version__, "torch": torch.__version__, **(metadata or {})})


def write(path, tensors, metadata):
    """A safetensors file that is the same at every run: the library stores metadata in random order."""
    data = save(tensors, metadata=metadata)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    assert len(text) == size
    path.write_bytes(data[:8] + text + data[8 + size :])
