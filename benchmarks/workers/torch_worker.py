"""PyTorch eager on the benchmark model: products, prefill, decode and self-distillation steps, on request.

Requests are JSON lines on stdin, replies JSON lines on file descriptor 3.
"""
import base64
import json
import math
import os
import resource
import sys
import time

import torch
import torch.nn.functional as F

EPS = 1e-5


def read_safetensors(path):
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, info in header.items():
            begin, end = info["data_offsets"]
            file.seek(8 + length + begin)
            data = torch.frombuffer(bytearray(file.read(end - begin)), dtype=torch.float32)
            tensors[name.removeprefix("transformer.")] = data.view(info["shape"])
        return tensors


def batch(target_ms, body):
    start = time.perf_counter()
    calls = 0
    while True:
        body()
        calls += 1
        elapsed = (time.perf_counter() - start) * 1e3
        if elapsed >= target_ms:
            return {"ms": elapsed / calls, "calls": calls}


def encode(values):
    return base64.b64encode(values.detach().contiguous().view(torch.uint8).numpy().tobytes()).decode()


def best_layout(weight, bias, rows):
    """The faster of the two layouts a product of `rows` rows can use, timed over copies larger than the caches."""
    copies = max(2, min(8, (96 << 20) // (4 * weight.numel())))
    x = torch.randn(rows, weight.shape[0])
    by_input = [weight.clone() for _ in range(copies)]
    by_output = [weight.t().contiguous() for _ in range(copies)]
    times = {}
    for _ in range(3):
        for name, call in (
            ("in-out", lambda i: torch.addmm(bias, x, by_input[i])),
            ("out-in", lambda i: F.linear(x, by_output[i], bias)),
        ):
            start = time.perf_counter()
            for i in range(copies):
                call(i)
            times[name] = min(times.get(name, math.inf), time.perf_counter() - start)
    return min(times, key=times.get)


class Inference:
    """GPT-2 forward with a preallocated KV cache; last-token logits. Weights lie in the faster layout per phase."""

    def __init__(self, folder):
        self.w = read_safetensors(os.path.join(folder, "model.safetensors"))
        self.w["head.weight"] = self.w["wte.weight"].t().contiguous()  # [in, out] like GPT-2's other linear weights
        self.layers = sum(name.endswith("attn.c_attn.weight") for name in self.w)
        context, hidden = self.w["wpe.weight"].shape
        self.heads = hidden // 64
        self.k = torch.zeros(self.layers, 1, self.heads, context, 64)
        self.v = torch.zeros_like(self.k)
        zero = torch.zeros(1)
        self.products = {}
        self.layout = {}
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            probe = self.w[f"h.0.{part}.weight"], self.w[f"h.0.{part}.bias"]
            for phase, rows in (("prefill", 512), ("decode", 1)):
                choice = best_layout(*probe, rows)
                self.layout[f"{phase} {part}"] = choice
                for i in range(self.layers):
                    weight, bias = self.w[f"h.{i}.{part}.weight"], self.w[f"h.{i}.{part}.bias"]
                    self.products[phase, i, part] = self.product(weight, bias, choice)
        self.layout["head"] = choice = best_layout(self.w["head.weight"], zero, 1)
        self.head = self.product(self.w["head.weight"], None, choice)

    @staticmethod
    def product(weight, bias, layout):
        if layout == "out-in":
            transposed = weight.t().contiguous()
            return lambda x: F.linear(x, transposed, bias)
        if bias is None:
            return lambda x: torch.mm(x, weight)
        return lambda x: torch.addmm(bias, x, weight)

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], EPS)

    def __call__(self, ids, start):
        count = ids.shape[0]
        end = start + count
        phase = "decode" if count == 1 else "prefill"
        x = F.embedding(ids, self.w["wte.weight"]) + self.w["wpe.weight"][start:end]
        for i in range(self.layers):
            run = lambda part, value: self.products[phase, i, part](value)
            qkv = run("attn.c_attn", self.norm(x, f"h.{i}.ln_1"))
            q, k, v = qkv.view(1, count, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
            self.k[i, :, :, start:end] = k
            self.v[i, :, :, start:end] = v
            if start == 0:
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                mixed = F.scaled_dot_product_attention(q, self.k[i, :, :, :end], self.v[i, :, :, :end])
            x = x + run("attn.c_proj", mixed.transpose(1, 2).reshape(count, -1))
            up = F.gelu(run("mlp.c_fc", self.norm(x, f"h.{i}.ln_2")), approximate="tanh")
            x = x + run("mlp.c_proj", up)
        return self.head(self.norm(x[-1:], "ln_f"))[0]


class Distillation:
    """One self-distillation step of token routers in every layer and both places of a frozen GPT-2.

    Rows left out of attention are no keys either. Routers learn by what elastiform's op `topk_credit` says: the change
    of the loss when a row enters, from the gradient of the residual and the teacher's sub-layer outputs.
    """

    def __init__(self, folder, capacity, lr):
        self.w = read_safetensors(os.path.join(folder, "model.safetensors"))
        self.layers = sum(name.endswith("attn.c_attn.weight") for name in self.w)
        self.hidden = self.w["wpe.weight"].shape[1]
        self.heads = self.hidden // 64
        self.capacity = capacity
        self.routers = [torch.zeros(self.hidden + 1) for _ in range(2 * self.layers)]
        self.optimizer = torch.optim.AdamW(self.routers, lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], EPS)

    def linear(self, x, name):
        return torch.addmm(self.w[f"{name}.bias"], x, self.w[f"{name}.weight"])

    def attention(self, i, h):
        count = h.shape[0]
        qkv = self.linear(h, f"h.{i}.attn.c_attn")
        q, k, v = qkv.view(1, count, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.linear(mixed.transpose(1, 2).reshape(count, -1), f"h.{i}.attn.c_proj")

    def mlp(self, i, h):
        up = F.gelu(self.linear(h, f"h.{i}.mlp.c_fc"), approximate="tanh")
        return self.linear(up, f"h.{i}.mlp.c_proj")

    def keep(self, count):
        return math.ceil(self.capacity * count - 1e-6)

    def places(self):
        for i in range(self.layers):
            yield i, "ln_1", self.attention
            yield i, "ln_2", self.mlp

    def embed(self, ids):
        return F.embedding(ids, self.w["wte.weight"]) + self.w["wpe.weight"][: ids.shape[0]]

    @torch.no_grad()
    def teacher(self, ids):
        """The residual stream before every sub-layer and after the last."""
        stream = [self.embed(ids)]
        for i, norm, branch in self.places():
            stream.append(stream[-1] + branch(i, self.norm(stream[-1], f"h.{i}.{norm}")))
        return stream

    def student(self, ids):
        """The residual stream after every sub-layer, and every router's input and logits."""
        keep = self.keep(ids.shape[0])
        x = self.embed(ids)
        stream, scores = [], []
        for (i, norm, branch), router in zip(self.places(), self.routers):
            # Nothing before the first output can learn.
            with torch.set_grad_enabled(len(stream) > 0):
                h = self.norm(x, f"h.{i}.{norm}")
                inputs = h.detach()
                z = torch.mv(inputs, router[:-1]) + router[-1]
                if keep < ids.shape[0]:
                    rows = z.topk(keep, sorted=False).indices.sort().values
                    x = x.index_add(0, rows, branch(i, h[rows]))
                else:
                    x = x + branch(i, h)
            if not stream:
                x.requires_grad_()
            stream.append(x)
            scores.append((inputs, z))
        return stream, scores

    def loss(self, ids):
        """The loss and the routers' gradients."""
        head = self.w["wte.weight"]
        with torch.no_grad():
            targets = self.teacher(ids)
            teacher = F.log_softmax(F.linear(self.norm(targets[-1], "ln_f"), head), -1)
            probability = teacher.exp()
            negative_entropy = torch.dot(probability.view(-1), teacher.view(-1))
            del teacher
        stream, scores = self.student(ids)
        student = F.log_softmax(F.linear(self.norm(stream[-1], "ln_f"), head), -1)
        loss = (negative_entropy - torch.dot(probability.view(-1), student.view(-1))) / ids.shape[0]
        del student, probability
        gradients = torch.autograd.grad(loss, stream)
        with torch.no_grad():
            for router, (inputs, z), dy, before, after in zip(self.routers, scores, gradients, targets, targets[1:]):
                dz = self.credit(dy, before, after, z)
                router.grad = torch.cat((torch.mv(inputs.t(), dz), dz.sum()[None]))
        return loss.detach()

    def credit(self, dy, before, after, z):
        count = z.shape[0]
        keep = self.keep(count)
        if keep == count:
            return torch.zeros_like(z)
        change = torch.linalg.vecdot(dy, after - before)
        change = change / change.abs().mean()
        threshold = z.topk(keep + 1).values[-2:].mean()
        slope = torch.sigmoid(z - threshold) * torch.sigmoid(threshold - z)
        return (change - torch.dot(change, slope) / slope.sum()) * slope / count

    def step(self, ids):
        loss = self.loss(ids)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Commands:
    @torch.inference_mode()
    def load(self, dir, threads):
        torch.set_num_threads(threads)
        self.model = Inference(dir)
        return self.facts(f"eager, SDPA, inference mode, layouts {self.model.layout}")

    @staticmethod
    def facts(settings):
        return {
            "version": torch.__version__,
            "settings": settings,
            "mkl": torch.backends.mkl.is_available(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }

    @torch.inference_mode()
    def logits(self, prompt, next):
        prefill = encode(self.model(torch.tensor(prompt), 0))
        for i, token in enumerate(next):
            last = self.model(torch.tensor([token]), len(prompt) + i)
        return {"prefill": prefill, "decode": encode(last)}

    @torch.inference_mode()
    def prefill(self, prompt, batchMs):
        ids = torch.tensor(prompt)
        start = time.perf_counter()
        self.model(ids, 0)
        return {"ms": (time.perf_counter() - start) * 1e3}

    @torch.inference_mode()
    def decode(self, prompt, next, batchMs):
        ids = torch.tensor(next)
        start = time.perf_counter()
        for i in range(len(next)):
            self.model(ids[i : i + 1], len(prompt) + i)
        return {"ms": (time.perf_counter() - start) * 1e3 / len(next)}

    @torch.inference_mode()
    def products(self, threads, shapes, copies):
        """Prepares products x[M,K] w, `copies` weights each so that they come from memory as in a real model."""
        torch.set_num_threads(threads)
        self.cases = []
        for m, k, n in shapes:
            x, out = torch.randn(m, k), torch.empty(m, n)
            by_input = [torch.randn(k, n) for _ in range(copies)]
            by_output = [w.t().contiguous() for w in by_input]
            self.cases.append((x, out, {"in-out": by_input, "out-in": [w.t() for w in by_output]}))
        return self.facts("torch.mm with out=, the faster of both weight layouts")

    @torch.inference_mode()
    def product(self, shape, layout, batchMs):
        x, out, weights = self.cases[shape]

        def body():
            for w in weights[layout]:
                torch.mm(x, w, out=out)

        result = batch(batchMs, body)
        return {"ms": result["ms"] / len(weights[layout]), "calls": result["calls"]}

    def train(self, dir, threads, capacity, lr, **_):
        torch.set_num_threads(threads)
        self.trainer = Distillation(dir, capacity, lr)
        return self.facts("eager, SDPA, frozen backbone, fused AdamW")

    def step(self, ids, batchMs=0):
        ids = torch.tensor(ids)
        start = time.perf_counter()
        loss = self.trainer.step(ids)
        return {"ms": (time.perf_counter() - start) * 1e3, "loss": loss}

    def gradients(self, ids):
        """Sets the routers to a fixed pattern; loss and gradients of all weights, then all biases, without an update."""
        routers = self.trainer.routers
        with torch.no_grad():
            for index, router in enumerate(routers):
                router.copy_(0.02 * torch.sin(torch.arange(router.numel(), dtype=torch.float64) * 0.7 + index))
        loss = self.trainer.loss(torch.tensor(ids))
        grads = torch.cat([router.grad[:-1] for router in routers] + [router.grad[-1:] for router in routers])
        self.trainer.optimizer.zero_grad()
        return {"loss": loss.item(), "gradients": encode(grads)}

    @staticmethod
    def memory():
        if sys.platform != "linux":
            return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        size = lambda name: 1024 * int(fields[name].split()[0])
        return {"peak": size("VmHWM"), "anonymous": size("RssAnon"), "file": size("RssFile")}

    @staticmethod
    def resetPeak():
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            return True
        except OSError:
            return False


commands = Commands()
replies = os.fdopen(3, "w")
for line in sys.stdin:
    request = json.loads(line)
    try:
        reply = {"result": getattr(commands, request["command"])(**request["args"])}
    except Exception as error:  # the coordinator reports it
        reply = {"error": f"{type(error).__name__}: {error}"}
    replies.write(json.dumps(reply) + "\n")
    replies.flush()
