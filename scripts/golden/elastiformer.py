"""Golden vectors for ElastiFormer token routing: losses and router gradients of a reference written from scratch.

Run: pip install -r scripts/golden/requirements.txt && python scripts/golden/elastiformer.py

The reference is plain PyTorch on the weights of a tiny random Llama and GPT-2. At full capacity it is first compared with
transformers. A router scores the sub-layer's normalised input, z = normed(x) . w + b; the k rows of each sequence with the
largest z enter the sub-layer; in attention the others are no queries, and keys only where keys are "all". A raw gate
multiplies what the sub-layer adds to the residual stream by sigmoid(z). The loss is KL(teacher || student) averaged over
all tokens, plus BCE_WEIGHT times the mean over routed places of the top-k binary cross-entropy, whose z sees a detached
input.

A straight-through gate has the value 1; the gradient that its router gets from the KL is that of a soft top-k: see
credit.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common import ROOT, build, packed_ids, segments, store_model, store_vectors

CAPACITY = 0.5
BCE_WEIGHT = 0.1
LENGTHS = [11, 6]


class Llama:
    def __init__(self, model):
        self.config, self.p = model.config, dict(model.state_dict())
        self.layers = self.config.num_hidden_layers

    def norm(self, x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self.p[name + ".weight"]

    def linear(self, x, name):
        return F.linear(x, self.p[name + ".weight"], self.p.get(name + ".bias"))

    def embed(self, ids, positions):
        return self.p["model.embed_tokens.weight"][ids]

    def rotate(self, x, positions):
        half = self.config.head_dim // 2
        frequency = self.config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
        angle = positions[:, None, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def normed(self, x, layer, place):
        return self.norm(x, f"model.layers.{layer}." + {"attn": "input_layernorm", "mlp": "post_attention_layernorm"}[place])

    def attn(self, x, layer, positions, queries):
        """x: the rows of one sequence that are keys, already normalised; queries: those of them that are queries."""
        c, name = self.config, f"model.layers.{layer}.self_attn."
        q = self.linear(x[queries], name + "q_proj").view(len(queries), c.num_attention_heads, c.head_dim)
        k = self.linear(x, name + "k_proj").view(len(x), c.num_key_value_heads, c.head_dim)
        v = self.linear(x, name + "v_proj").view(len(x), c.num_key_value_heads, c.head_dim)
        q, k = self.rotate(q, positions[queries]), self.rotate(k, positions)
        group = c.num_attention_heads // c.num_key_value_heads
        y = causal_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), queries)
        return self.linear(y, name + "o_proj")

    def mlp(self, x, layer):
        name = f"model.layers.{layer}.mlp."
        return self.linear(F.silu(self.linear(x, name + "gate_proj")) * self.linear(x, name + "up_proj"), name + "down_proj")

    def logits(self, x):
        return F.linear(self.norm(x, "model.norm"), self.p["lm_head.weight"])


class Gpt2:
    def __init__(self, model):
        self.config, self.p = model.config, dict(model.state_dict())
        self.layers = self.config.n_layer

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.p[name + ".weight"], self.p[name + ".bias"], self.config.layer_norm_epsilon)

    def linear(self, x, name):
        return x @ self.p[name + ".weight"] + self.p[name + ".bias"]

    def embed(self, ids, positions):
        return self.p["transformer.wte.weight"][ids] + self.p["transformer.wpe.weight"][positions]

    def normed(self, x, layer, place):
        return self.norm(x, f"transformer.h.{layer}." + {"attn": "ln_1", "mlp": "ln_2"}[place])

    def attn(self, x, layer, positions, queries):
        name = f"transformer.h.{layer}.attn."
        q, k, v = (t.view(len(x), self.config.n_head, -1) for t in self.linear(x, name + "c_attn").chunk(3, -1))
        return self.linear(causal_attention(q[queries], k, v, queries), name + "c_proj")

    def mlp(self, x, layer):
        name = f"transformer.h.{layer}.mlp."
        return self.linear(F.gelu(self.linear(x, name + "c_fc"), approximate="tanh"), name + "c_proj")

    def logits(self, x):
        return F.linear(self.norm(x, "transformer.ln_f"), self.p["lm_head.weight"])


def causal_attention(q, k, v, queries):
    """q [R, heads, head_dim] of the rows `queries` [R] among k, v [T, heads, head_dim] -> [R, heads * head_dim]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.arange(len(k)) > queries[:, None]
    y = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return y.reshape(len(q), -1)


def credit(z, rows, dy, before, after, offsets):
    """What a straight-through router differentiates: per sequence, sum over rows of e sigmoid(z - tau).

    e is the first-order change of the loss when the row enters, by the teacher's output (after - before) for it, over its
    mean magnitude. tau lies between the k-th and the next score and moves so that the sum of sigmoids stays.
    """
    total = 0
    for s in segments(offsets):
        own = slice(s.start, s.stop)
        e = (dy[own] * (after - before)[own]).sum(-1)
        e = e / e.abs().mean()
        score = z[own, 0]
        k = int(((rows >= s.start) & (rows < s.stop)).sum())
        order = score.detach().sort(descending=True).values
        tau = (order[k - 1] + order[k]) / 2
        soft = torch.sigmoid(score - tau)
        slope = (soft * (1 - soft)).detach()
        tau = tau + (soft.sum() - soft.sum().detach()) / slope.sum()
        total = total + (e.detach() * torch.sigmoid(score - tau)).sum()
    return total / len(z)


def forward(net, ids, offsets, routers=None, mode=None, keys=None):
    """Logits [N, V]; the residual stream before the first and after every place; with routers also z [N, 1], the same with
    a detached input and the chosen rows of every place, and the mean top-k BCE."""
    positions = torch.cat([torch.arange(len(s)) for s in segments(offsets)])
    x = net.embed(ids, positions).requires_grad_(mode == "straight-through")
    scores, detached, chosen, bce, stream = {}, {}, {}, [], [x]
    for layer in range(net.layers):
        for place in ["attn", "mlp"]:
            normed = net.normed(x, layer, place)
            name = f"layers.{layer}.{place}.token"
            if routers is None:
                rows, gate = torch.arange(len(ids)), torch.ones(len(ids), 1)
            else:
                weight, bias = routers[name + ".weight"], routers[name + ".bias"]
                z = F.linear(normed, weight, bias)
                rows = []
                for segment in segments(offsets):
                    own = z[segment.start : segment.stop, 0]
                    k = math.ceil(CAPACITY * len(segment) - 1e-6)
                    order = own.sort(descending=True, stable=True)
                    assert order.values[k - 1] - order.values[k] > 1e-3, "another seed: the choice hangs on rounding"
                    rows += sorted((order.indices[:k] + segment.start).tolist())
                rows = torch.tensor(rows)
                gate = torch.sigmoid(z[rows]) if mode == "raw" else torch.ones(len(rows), 1)
                label = torch.zeros(len(ids), 1)
                label[rows] = 1
                scores[name], chosen[name] = z, rows
                detached[name] = F.linear(normed.detach(), weight, bias)
                bce.append(F.binary_cross_entropy_with_logits(detached[name], label))
            if place == "mlp":
                y = net.mlp(normed[rows], layer)
            else:
                own = [rows[(rows >= s.start) & (rows < s.stop)] for s in segments(offsets)]
                if keys == "selected":
                    y = torch.cat([net.attn(normed[r], layer, positions[r], torch.arange(len(r))) for r in own])
                else:
                    y = torch.cat([net.attn(normed[s.start : s.stop], layer, positions[s.start : s.stop], r - s.start)
                                   for s, r in zip(segments(offsets), own)])
            x = x.index_add(0, rows, gate * y)
            stream.append(x)
    return net.logits(x), stream, scores, detached, chosen, torch.stack(bce).mean() if bce else None


def generate(name, net, model, seed):
    directory = ROOT / name
    width = model.config.hidden_size
    ids, offsets = packed_ids(model.config.vocab_size, LENGTHS, seed)
    with torch.no_grad():
        teacher, teacher_stream, *_ = forward(net, ids, offsets)
        expected = torch.cat([model(ids[None, s.start : s.stop]).logits[0] for s in segments(offsets)])
    assert (teacher - expected).abs().max() < 2e-5, "the reference differs from transformers"

    generator = torch.Generator().manual_seed(seed + 1)
    places = [f"layers.{layer}.{place}.token" for layer in range(net.layers) for place in ["attn", "mlp"]]
    store_model(directory, model)
    for mode, keys in itertools.product(["straight-through", "raw"], ["all", "selected"]):
        routers = {}
        for place in places:
            routers[place + ".weight"] = torch.randn(1, width, generator=generator) * width**-0.5
            routers[place + ".bias"] = torch.randn(1, generator=generator) * 0.3
        for router in routers.values():
            router.requires_grad_()
        logits, stream, scores, detached, chosen, bce = forward(net, ids, offsets, routers, mode, keys)
        kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        total = kl + BCE_WEIGHT * bce
        if mode == "raw":
            total.backward()
        else:
            dys = torch.autograd.grad(kl, stream[1:], retain_graph=True)
            credits = [
                credit(detached[place], chosen[place], dy, before, after, offsets)
                for place, dy, before, after in zip(places, dys, teacher_stream, teacher_stream[1:])
            ]
            (sum(credits) + BCE_WEIGHT * bce).backward()
        tensors = {"ids": ids, "offsets": offsets, "teacher.logits": teacher, "student.logits": logits}
        tensors |= {"loss.kl": kl[None], "loss.bce": bce[None], "loss.total": total[None]}
        tensors |= {"router." + n: t for n, t in routers.items()} | {"grad." + n: t.grad for n, t in routers.items()}
        tensors |= {"z." + n: t for n, t in scores.items()} | {"rows." + n: t for n, t in chosen.items()}
        metadata = {"gate": mode, "keys": keys, "capacity": str(CAPACITY), "bce_weight": str(BCE_WEIGHT)}
        store_vectors(directory / f"routed-{mode}-{keys}.safetensors", tensors, metadata)
        print(f"{name} {mode} {keys}: kl {kl:.6f} bce {bce:.6f}")


if __name__ == "__main__":
    # Weights of this size keep everything of order one.
    llama = LlamaConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        head_dim=6, vocab_size=64, max_position_embeddings=32, initializer_range=0.25, tie_word_embeddings=False)
    gpt2 = GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=16, vocab_size=64, initializer_range=0.25,
                      bos_token_id=0, eos_token_id=0)
    model = build(LlamaForCausalLM, llama, 11)
    generate("elastiformer-llama", Llama(model), model, 13)
    model = build(GPT2LMHeadModel, gpt2, 21)
    generate("elastiformer-gpt2", Gpt2(model), model, 23)
