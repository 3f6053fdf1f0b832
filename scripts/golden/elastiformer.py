"""Golden vectors for ElastiFormer token routing: losses and router gradients of a reference written from scratch.

Run: pip install -r scripts/golden/requirements.txt && python scripts/golden/elastiformer.py

The reference is plain PyTorch on the weights of a tiny random Llama and GPT-2. At full capacity it is first compared with
transformers. A router scores the sub-layer's normalised input, z = normed(x) . w + b; the k rows of each sequence with the
largest z enter the sub-layer (query, key and value of all others are dropped); what the sub-layer adds to the residual
stream is multiplied by the gate of its row. The loss is KL(teacher || student) averaged over all tokens, plus
BCE_WEIGHT times the mean over routed places of the top-k binary cross-entropy, whose z sees a detached input.
"""

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

    def attn(self, x, layer, positions):
        """x: the rows of one sequence that take part, already normalised."""
        c, name = self.config, f"model.layers.{layer}.self_attn."
        q = self.linear(x, name + "q_proj").view(len(x), c.num_attention_heads, c.head_dim)
        k = self.linear(x, name + "k_proj").view(len(x), c.num_key_value_heads, c.head_dim)
        v = self.linear(x, name + "v_proj").view(len(x), c.num_key_value_heads, c.head_dim)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        group = c.num_attention_heads // c.num_key_value_heads
        y = causal_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
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

    def attn(self, x, layer, positions):
        name = f"transformer.h.{layer}.attn."
        q, k, v = (t.view(len(x), self.config.n_head, -1) for t in self.linear(x, name + "c_attn").chunk(3, -1))
        return self.linear(causal_attention(q, k, v), name + "c_proj")

    def mlp(self, x, layer):
        name = f"transformer.h.{layer}.mlp."
        return self.linear(F.gelu(self.linear(x, name + "c_fc"), approximate="tanh"), name + "c_proj")

    def logits(self, x):
        return F.linear(self.norm(x, "transformer.ln_f"), self.p["lm_head.weight"])


def causal_attention(q, k, v):
    """q, k, v [T, heads, head_dim] -> [T, heads * head_dim]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(len(q), len(q)).triu(1).bool()
    y = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return y.reshape(len(q), -1)


def gate_value(z, mode):
    if mode == "raw":
        return torch.sigmoid(z)
    score = F.logsigmoid(z)
    return 1 + score - score.detach()


def forward(net, ids, offsets, routers=None, mode=None):
    """Logits [N, V]; with routers also z [N, 1] and the chosen rows of every place, and the mean top-k BCE."""
    positions = torch.cat([torch.arange(len(s)) for s in segments(offsets)])
    x = net.embed(ids, positions)
    scores, chosen, bce = {}, {}, []
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
                gate = gate_value(z[rows], mode)
                label = torch.zeros(len(ids), 1)
                label[rows] = 1
                bce.append(F.binary_cross_entropy_with_logits(F.linear(normed.detach(), weight, bias), label))
                scores[name], chosen[name] = z, rows
            if place == "mlp":
                y = net.mlp(normed[rows], layer)
            else:
                own = [rows[(rows >= s.start) & (rows < s.stop)] for s in segments(offsets)]
                y = torch.cat([net.attn(normed[r], layer, positions[r]) for r in own])
            x = x.index_add(0, rows, gate * y)
    return net.logits(x), scores, chosen, torch.stack(bce).mean() if bce else None


def generate(name, net, model, seed):
    directory = ROOT / name
    width = model.config.hidden_size
    ids, offsets = packed_ids(model.config.vocab_size, LENGTHS, seed)
    with torch.no_grad():
        teacher = forward(net, ids, offsets)[0]
        expected = torch.cat([model(ids[None, s.start : s.stop]).logits[0] for s in segments(offsets)])
    assert (teacher - expected).abs().max() < 2e-5, "the reference differs from transformers"

    generator = torch.Generator().manual_seed(seed + 1)
    places = [f"layers.{layer}.{place}.token" for layer in range(net.layers) for place in ["attn", "mlp"]]
    store_model(directory, model)
    for mode in ["straight-through", "raw"]:
        routers = {}
        for place in places:
            routers[place + ".weight"] = torch.randn(1, width, generator=generator) * width**-0.5
            routers[place + ".bias"] = torch.randn(1, generator=generator) * 0.3
        for router in routers.values():
            router.requires_grad_()
        logits, scores, chosen, bce = forward(net, ids, offsets, routers, mode)
        kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        total = kl + BCE_WEIGHT * bce
        total.backward()
        tensors = {"ids": ids, "offsets": offsets, "teacher.logits": teacher, "student.logits": logits}
        tensors |= {"loss.kl": kl[None], "loss.bce": bce[None], "loss.total": total[None]}
        tensors |= {"router." + n: t for n, t in routers.items()} | {"grad." + n: t.grad for n, t in routers.items()}
        tensors |= {"z." + n: t for n, t in scores.items()} | {"rows." + n: t for n, t in chosen.items()}
        metadata = {"gate": mode, "capacity": str(CAPACITY), "bce_weight": str(BCE_WEIGHT)}
        store_vectors(directory / f"routed-{mode}.safetensors", tensors, metadata)
        print(f"{name} {mode}: kl {kl:.6f} bce {bce:.6f}")


if __name__ == "__main__":
    # The straight-through gradient is small where sigmoid(z) is near 1; weights of this size keep everything of order one.
    llama = LlamaConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        head_dim=6, vocab_size=64, max_position_embeddings=32, initializer_range=0.25, tie_word_embeddings=False)
    gpt2 = GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=16, vocab_size=64, initializer_range=0.25,
                      bos_token_id=0, eos_token_id=0)
    model = build(LlamaForCausalLM, llama, 11)
    generate("elastiformer-llama", Llama(model), model, 13)
    model = build(GPT2LMHeadModel, gpt2, 21)
    generate("elastiformer-gpt2", Gpt2(model), model, 23)
