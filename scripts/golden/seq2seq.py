"""Golden vectors for encoder-decoder models: tiny random models of every variant, and what transformers makes of sources.

Run: pip install -r scripts/golden/requirements.txt && python scripts/golden/seq2seq.py
"""

import json

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention

from common import ROOT, build, store_model, store_vectors

VOCAB, POSITIONS = 26, 20
SPECIAL = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)
SIZES = dict(
    vocab_size=VOCAB, d_model=24, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=3,
    encoder_ffn_dim=40, decoder_ffn_dim=32, max_position_embeddings=POSITIONS, init_std=0.15, **SPECIAL)
# Distances of T5 that are far enough for all of its kinds: of 8 from 10 on all are one.
T5 = dict(
    vocab_size=VOCAB, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_heads=3, n_positions=POSITIONS,
    relative_attention_num_buckets=8, relative_attention_max_distance=10, initializer_factor=1.0, **SPECIAL)
VARIANTS = {
    "bart": (BartForConditionalGeneration, BartConfig, dict(SIZES, scale_embedding=False, activation_function="relu")),
    "mbart": (MBartForConditionalGeneration, MBartConfig, dict(SIZES, scale_embedding=True)),
    "marian": (MarianMTModel, MarianConfig, dict(
        SIZES, scale_embedding=True, activation_function="swish", share_encoder_decoder_embeddings=True)),
    "t5": (T5ForConditionalGeneration, T5Config, T5),
    "t5-gated": (T5ForConditionalGeneration, T5Config, dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": (MT5ForConditionalGeneration, MT5Config, dict(T5, feed_forward_proj="gated-gelu")),
}
# As T5 1.1 and mT5 have it.
OWN_HEAD = ("t5-gated", "mt5")
SOURCES = [[5, 9, 14, 2], [7, 2], [3, 20, 11, 8, 25, 4, 19, 6, 13, 21, 2]]
TARGETS = [[2, 10, 4], [2, 3, 17, 5, 22, 9, 12, 2, 8], [2]]
# What a generation_config.json may say, and what generate is asked for.
GENERATIONS = [
    dict(max_length=12),
    dict(max_length=12, forced_bos_token_id=6, forced_eos_token_id=2),
    dict(max_length=14, no_repeat_ngram_size=2, min_length=7, bad_words_ids=[[3], [10, 4]]),
    dict(max_length=12, num_beams=3),
    dict(max_length=14, num_beams=4, early_stopping=True, length_penalty=2.0),
    dict(max_length=14, num_beams=2, early_stopping="never", length_penalty=0.5),
    dict(max_length=10, num_beams=3, length_penalty=-1.0),
    dict(max_length=14, num_beams=3, no_repeat_ngram_size=2, min_length=6, forced_bos_token_id=7, forced_eos_token_id=2,
         bad_words_ids=[[3], [10, 4]], renormalize_logits=True),
]


def train(model, steps=500):
    """Until texts end and depend on their sources, and far from certain: of a random model beam search finds what greedy does."""
    generator = torch.Generator().manual_seed(7)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        length = int(torch.randint(2, 9, (1,), generator=generator))
        words = torch.randint(3, VOCAB, (32, length), generator=generator)
        end = torch.full((32, 1), 2)
        noise = torch.randint(3, VOCAB, (32, length), generator=generator)
        kept = torch.rand((32, length), generator=generator) < 0.7
        labels = torch.cat([torch.where(kept, words, noise), end], 1)
        loss = model(input_ids=torch.cat([words, end], 1), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def flags(name):
    """Transformers 5 always writes a tied head for T5."""
    def edit(config):
        if name in OWN_HEAD:
            config["tie_word_embeddings"] = False
    return edit


def head_of(name, model, stored):
    return {**stored, "lm_head.weight": model.lm_head.weight.detach().clone()} if name in OWN_HEAD else stored


def kinds():
    """Of distances from -200 to 200, keys after their query and before, in T5's own sizes."""
    distances = torch.arange(-200, 201)
    return {f"kinds.{both}": T5Attention._relative_position_bucket(distances, bidirectional=both == "both") for both in ("both", "before")}


def rows(values):
    return ",\n".join(json.dumps(value) for value in values)


if __name__ == "__main__":
    for seed, (name, (model_class, config_class, options)) in enumerate(VARIANTS.items()):
        directory = ROOT / "seq2seq" / name
        model = build(model_class, config_class(**options), 500 + seed)
        if name in OWN_HEAD:
            model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(VOCAB, 24))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0.0, 0.3)
        train(model)
        store_model(directory, model, edit=flags(name), tensors=lambda stored, model=model, name=name: head_of(name, model, stored))
        tensors, written = {}, []
        for number, (source, target) in enumerate(zip(SOURCES, TARGETS)):
            ids = torch.tensor([source])
            with torch.no_grad():
                result = model(input_ids=ids, decoder_input_ids=torch.tensor([target]))
            tensors[f"features.{number}"] = result.encoder_last_hidden_state[0]
            tensors[f"logits.{number}"] = result.logits[0]
            for settings in GENERATIONS:
                model.generation_config.forced_eos_token_id = None
                result = model.generate(ids, do_sample=False, return_dict_in_generate=True, output_scores=True, **settings)
                score = float(result.sequences_scores[0]) if "num_beams" in settings else None
                written.append(dict(source=number, settings=settings, ids=result.sequences[0].tolist()[1:], score=score))
        (directory / "cases.json").write_text(
            f'{{"sources": {SOURCES},\n"targets": {TARGETS},\n"special": {json.dumps(SPECIAL)},\n"generations": [\n{rows(written)}\n]}}\n')
        if name == "t5":
            tensors.update(kinds())
        store_vectors(directory / "seq2seq.safetensors", tensors)
        print(name, sorted([len(case["ids"]) for case in written]), sum(2 in case["ids"] for case in written), len(written))
