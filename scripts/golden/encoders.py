"""Golden vectors for encoders: tiny random models of every variant and head, with tokenizers, and what transformers makes of texts.

Run: pip install -r scripts/golden/requirements.txt && python scripts/golden/encoders.py
"""

import functools
import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from common import ROOT, build, store_model, store_vectors

LINES = [
    "The cat saw the dog by the lake.",
    "A dog that barks is seldom seen without its owner!",
    "Café crème, naïve Zoë: 42 unaffected words?",
    "The owner of the cat was walking, walked and walks.",
]
# A second text makes a pair. Some are longer than the 24 positions that the models have.
CASES = [
    ["The cat walks."],
    ["Unseen: a DOG's café, 2024 €"],
    ["the owner's cat", "barks by the lake"],
    ["saw", " ".join(LINES)],
    [" ".join(LINES), "walked"],
    [" ".join(LINES[:2]), " ".join(LINES[2:])],
    [" ".join(LINES)],
    ["[MASK] <mask> walks  \n by"],
]
POSITIONS = 24


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False))
    cls, sep = ((token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=[cls, sep])
    tokenizer.decoder = decoders.WordPiece()
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return tokenizer, names


def byte_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator([*LINES, *sum(CASES, [])], trainers.BpeTrainer(
        vocab_size=110, special_tokens=special, show_progress=False))
    bos, eos = (("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>")))
    tokenizer.post_processor = processors.RobertaProcessing(eos, bos, trim_offsets=True, add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", cls_token="<s>", sep_token="</s>",
                 mask_token="<mask>")
    return tokenizer, names


def unigram():
    """As XLM-R's: pieces of sentences, template with pairs."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(LINES, trainers.UnigramTrainer(
        vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False))
    bos, eos = (("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>")))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[bos, eos])
    tokenizer.decoder = decoders.Metaspace()
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", cls_token="<s>", sep_token="</s>",
                 mask_token="<mask>")
    return tokenizer, names


@functools.cache
def tokenizer_of(make):
    """Trained once: training breaks ties at random, so what the directories have already is kept."""
    tokenizer, names = make()
    known = ROOT / "encoders" / next(name for name, variant in VARIANTS.items() if variant[3] is make) / "tokenizer.json"
    if known.exists():
        tokenizer = Tokenizer.from_file(str(known))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


SMALL = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, initializer_range=0.3)
ROBERTA = dict(SMALL, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, layer_norm_eps=1e-5,
               max_position_embeddings=POSITIONS + 2)
DISTIL = dict(dim=24, hidden_dim=40, n_layers=2, n_heads=3, initializer_range=0.3, max_position_embeddings=POSITIONS)
BERT = dict(SMALL, max_position_embeddings=POSITIONS)
NAMES = dict(id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2})


def as_tensorflow(tensors):
    """The names of norms in files that were made from TensorFlow's."""
    return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for name, value in tensors.items()}


# name: (class, config class, options, tokenizer, edit of stored tensors)
VARIANTS = {
    "bert": (BertModel, BertConfig, BERT, wordpiece, None),
    "bert-mlm": (BertForMaskedLM, BertConfig, BERT, wordpiece, as_tensorflow),
    "bert-mlm-untied": (BertForMaskedLM, BertConfig, dict(BERT, tie_word_embeddings=False, hidden_act="gelu_new"), wordpiece,
                        None),
    "bert-classes": (BertForSequenceClassification, BertConfig, dict(BERT, **NAMES), wordpiece, None),
    "roberta-mlm": (RobertaForMaskedLM, RobertaConfig, dict(ROBERTA, hidden_act="relu"), byte_bpe, None),
    "roberta-classes": (RobertaForSequenceClassification, RobertaConfig,
                        dict(ROBERTA, **NAMES, problem_type="multi_label_classification"), byte_bpe, None),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, ROBERTA, unigram, None),
    "distilbert-mlm": (DistilBertForMaskedLM, DistilBertConfig, DISTIL, wordpiece, None),
    "distilbert-score": (DistilBertForSequenceClassification, DistilBertConfig,
                         dict(DISTIL, num_labels=1, problem_type="regression"), wordpiece, None),
    "minilm": (BertModel, BertConfig, BERT, wordpiece, None),
}


# Heads whose training loss has golden gradients: those of classes, of a score, and of tokens with a tied embedding.
WITH_GRADIENTS = ["bert-classes", "roberta-classes", "distilbert-score", "bert-mlm"]


def targets_of(name, number, ids, width):
    """What case `number` is trained towards: a class, a score, or a token for every token."""
    if name == "distilbert-score":
        return torch.tensor([[number / 2 - 1.0]])
    return (ids[0] * 7 + 3) % width if name == "bert-mlm" else torch.tensor([number % width])


def loss_of(name, logits, targets):
    """Cross-entropy or squared error, summed over cases or tokens, and how many there are."""
    if name == "distilbert-score":
        return ((logits - targets) ** 2).sum(), len(targets)
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction="sum"), len(targets)


def gradients(name, model, cases, types_used):
    """The mean loss over all cases, and its gradient by every parameter."""
    model.zero_grad()
    total, count = 0.0, 0
    for number, case in enumerate(cases):
        ids = torch.tensor([case["ids"]])
        logits = model(input_ids=ids, **(dict(token_type_ids=torch.tensor([case["types"]])) if types_used else {})).logits
        loss, rows = loss_of(name, logits, targets_of(name, number, ids, logits.shape[-1]))
        total, count = total + loss, count + rows
    loss = total / count
    loss.backward()
    grads = {f"grad.{key}": value.grad for key, value in model.named_parameters() if value.grad is not None}
    return dict(loss=loss.detach().reshape(1), **grads)


def sentence_transformers(directory):
    """Mean pooling and normalisation, in the layout of sentence-transformers."""
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    write_json(directory / "modules.json", [
        dict(idx=int(name), name=name, path=path, type=f"sentence_transformers.models.{kind}") for name, path, kind in modules])
    (directory / "1_Pooling").mkdir(exist_ok=True)
    write_json(directory / "1_Pooling" / "config.json", dict(
        word_embedding_dimension=24, pooling_mode_cls_token=False, pooling_mode_mean_tokens=True,
        pooling_mode_max_tokens=False, pooling_mode_mean_sqrt_len_tokens=False))
    write_json(directory / "sentence_bert_config.json", dict(max_seq_length=16, do_lower_case=False))


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def keep_names(names):
    def edit(config):
        if "id2label" in names:
            config["id2label"] = {str(k): v for k, v in names["id2label"].items()}
        if names.get("num_labels") == 1:
            config["id2label"] = {"0": "LABEL_0"}
    return edit


if __name__ == "__main__":
    for seed, (name, (model_class, config_class, options, make, edit_tensors)) in enumerate(VARIANTS.items()):
        directory = ROOT / "encoders" / name
        tokenizer = tokenizer_of(make)
        config = config_class(vocab_size=len(tokenizer), **options)
        model = build(model_class, config, 300 + seed)
        store_model(directory, model, edit=keep_names(options), tensors=edit_tensors)
        tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
        longest = 16 if name == "minilm" else POSITIONS
        types_used = config.to_dict().get("type_vocab_size", 1) > 1
        cases, tensors = [], {}
        for number, texts in enumerate(CASES):
            encoded = tokenizer(*texts, truncation="longest_first", max_length=longest, return_token_type_ids=True)
            whole = tokenizer(*texts)
            ids, types = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["token_type_ids"]])
            cases.append(dict(texts=texts, ids=encoded["input_ids"], types=encoded["token_type_ids"],
                              truncated=len(whole["input_ids"]) - len(encoded["input_ids"])))
            with torch.no_grad():
                result = model(input_ids=ids, output_hidden_states=True, **(dict(token_type_ids=types) if types_used else {}))
            tensors[f"hidden.{number}"] = result.hidden_states[-1][0]
            if "logits" in result:
                tensors[f"logits.{number}"] = result.logits[0]
            if name == "minilm":
                sentence_transformers(directory)
                mean = result.hidden_states[-1][0].mean(0)
                tensors[f"embedding.{number}"] = torch.nn.functional.normalize(mean, dim=0)
        rows = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
        (directory / "cases.json").write_text(f"[\n{rows}\n]\n")
        store_vectors(directory / "encoder.safetensors", tensors)
        if name in WITH_GRADIENTS:
            store_vectors(directory / "gradients.safetensors", gradients(name, model, cases, types_used))
        print(name, len(tokenizer), [len(case["ids"]) for case in cases])
