"""PyTorch on a GPU: ceilings, cuBLASLt, eager and compiled layers, Triton, flash attention, distillation; on request.

Requests are JSON lines on stdin, replies JSON lines on file descriptor 3. Without a GPU all runs on the CPU, which only
shows that it runs.
"""
import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F

try:
    import triton_ffn
except Exception as problem:  # no Triton here
    triton_ffn = None
    triton_problem = f"{type(problem).__name__}: {problem}"

TURN_MS = 20
EPS = 1e-5
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


# ---- timing


def synchronize():
    if GPU:
        torch.cuda.synchronize()


def device_times(body, calls):
    """Milliseconds of `calls` calls between events on the device, after one that does not count if there are more."""
    if calls > 1:
        body()
        synchronize()
    if not GPU:
        return wall_times(body, calls)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, end in events:
        start.record()
        body()
        end.record()
    synchronize()
    return [start.elapsed_time(end) for start, end in events]


def wall_times(body, calls):
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        body()
        synchronize()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def graphed(body):
    """The body recorded as a CUDA graph: no launch costs, as our own programs have none."""
    if not GPU:
        return body
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


class Case:
    """One contestant: `samples(calls)` in milliseconds."""

    def __init__(self, samples, facts=None, calls=None):
        self.samples, self.facts = samples, facts or {}
        if not calls:
            samples(1)
            (ms,) = samples(1)
            calls = max(1 if ms > 100 else 3, min(50, round(TURN_MS / max(ms, 0.01))))
        self.calls = calls


def timed(body, divide=1, before=None):
    def samples(calls):
        if before:
            before()
        return [ms / divide for ms in device_times(body, calls)]

    return Case(samples)


def slope(few, many, body):
    """Time of one op: recordings of `many` and of `few`, the difference."""
    short, long = graphed(lambda: [body(i) for i in range(few)]), graphed(lambda: [body(i) for i in range(many)])

    def samples(calls):
        result = []
        short()
        for _ in range(calls):
            a, b = device_times(short, 1)[0], device_times(long, 1)[0]
            result.append((b - a) / (many - few))
        return result

    return Case(samples)


def normal(*shape, deviation=0.018):
    return (torch.randn(shape, device=DEVICE, dtype=torch.float32) * deviation).bfloat16()


# ---- feed-forward layers


class FeedForward:
    def __init__(self, shape):
        self.shape = shape
        rows, hidden, ffn = shape["rows"], shape["hidden"], shape["ffn"]
        self.keep = math.ceil(shape["capacity"] * rows - 1e-6)
        self.start = normal(rows, hidden, deviation=1)
        self.x = self.start.clone()
        self.layers = []
        for _ in range(shape["layers"]):
            layer = {
                "norm": torch.ones(hidden, device=DEVICE, dtype=torch.bfloat16),
                "up": normal(ffn, hidden),
                "down": normal(hidden, ffn),
                "router": normal(1, hidden),
            }
            if shape["gated"]:
                layer["gate"] = normal(ffn, hidden)
            else:
                layer["norm_bias"] = normal(hidden)
                layer["up_bias"], layer["down_bias"] = normal(ffn), normal(hidden)
            self.layers.append(layer)
        self.buffers = {}

    def reset(self):
        self.x.copy_(self.start)

    def buffer(self, *shape):
        if shape not in self.buffers:
            self.buffers[shape] = [torch.empty(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
        return self.buffers[shape]

    def norm(self, x, layer):
        width = x.shape[-1:]
        if "norm_bias" in layer:
            return F.layer_norm(x, width, layer["norm"], layer["norm_bias"], EPS)
        return F.rms_norm(x, width, layer["norm"], EPS)

    def ffn(self, h, layer):
        if "gate" in layer:
            return F.linear(F.silu(F.linear(h, layer["gate"])) * F.linear(h, layer["up"]), layer["down"])
        up = F.gelu(F.linear(h, layer["up"], layer["up_bias"]), approximate="tanh")
        return F.linear(up, layer["down"], layer["down_bias"])

    def rows_of(self, h, layer):
        z = F.linear(h, layer["router"])[:, 0]
        return z.topk(self.keep, sorted=False).indices.sort().values

    def dense(self, x):
        for layer in self.layers:
            x = x + self.ffn(self.norm(x, layer), layer)
        return x

    def routed(self, x):
        for layer in self.layers:
            h = self.norm(x, layer)
            rows = self.rows_of(h, layer)
            x = x.index_add(0, rows, self.ffn(h.index_select(0, rows), layer))
        return x

    def dense_lt(self):
        """The dense layer as products of cuBLASLt with everything fused that it can fuse, and one activation pass."""
        x = self.x
        for layer in self.layers:
            h = self.norm(x, layer)
            if "gate" in layer:
                gate, up = self.buffer(h.shape[0], layer["up"].shape[0])
                torch.mm(h, layer["gate"].t(), out=gate)
                torch.mm(h, layer["up"].t(), out=up)
                middle = triton_ffn.silu_mul(gate, up, gate) if triton_ffn and GPU else F.silu(gate).mul_(up)
                x.addmm_(middle, layer["down"].t())
            else:
                middle = torch._addmm_activation(layer["up_bias"], h, layer["up"].t(), use_gelu=True)
                x.add_(torch.addmm(layer["down_bias"], middle, layer["down"].t()))

    def routed_triton(self):
        hidden = self.buffer(self.keep, self.shape["ffn"])[0]
        for layer in self.layers:
            h = self.norm(self.x, layer)
            triton_ffn.routed_ffn(self.x, h, self.rows_of(h, layer), layer, hidden)

    def check_triton(self):
        layer = self.layers[0]
        h = self.norm(self.start, layer)
        rows = self.rows_of(h, layer)
        want = self.start.index_add(0, rows, self.ffn(h.index_select(0, rows), layer))
        have = triton_ffn.routed_ffn(self.start.clone(), h, rows, layer, self.buffer(self.keep, self.shape["ffn"])[0])
        error = ((have - want).float().norm() / (want - self.start).float().norm()).item()
        if not error < 0.02:
            raise RuntimeError(f"the Triton layer computes something else: off by {error}")


# ---- self-distillation of a Llama


class Distillation:
    """One step of routers in every layer and both places of a frozen Llama in bf16; routers in f32, as adapters are.

    Rows left out of attention are no keys either. Routers learn by what elastiform's op `topk_credit` says: the change
    of the loss when a row enters, from the gradient of the residual and the teacher's sub-layer outputs.
    """

    def __init__(self, shape):
        config = shape["config"]
        self.layers, self.hidden = config["num_hidden_layers"], config["hidden_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = self.hidden // self.heads
        self.sequences, self.length = shape["segments"], shape["rows"] // shape["segments"]
        self.keep = math.ceil(shape["capacity"] * self.length - 1e-6)
        ffn, kv = config["intermediate_size"], self.kv_heads * self.head_dim
        self.embedding = normal(config["vocab_size"], self.hidden)
        self.ones = torch.ones(self.hidden, device=DEVICE, dtype=torch.bfloat16)
        self.weights = [
            {
                "q": normal(self.hidden, self.hidden), "k": normal(kv, self.hidden), "v": normal(kv, self.hidden),
                "o": normal(self.hidden, self.hidden), "gate": normal(ffn, self.hidden),
                "up": normal(ffn, self.hidden), "down": normal(self.hidden, ffn),
            }
            for _ in range(self.layers)
        ]
        self.routers = [torch.nn.Linear(self.hidden, 1, device=DEVICE) for _ in range(2 * self.layers)]
        parameters = [p for router in self.routers for p in router.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=shape["lr"], weight_decay=0.0, fused=True)
        angles = torch.outer(
            torch.arange(self.length, dtype=torch.float32),
            config["rope_theta"] ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim),
        )
        angles = torch.cat((angles, angles), -1)
        self.cos, self.sin = angles.cos().bfloat16().to(DEVICE), angles.sin().bfloat16().to(DEVICE)
        self.starts = torch.arange(self.sequences, device=DEVICE)[:, None] * self.length
        self.ids = torch.randint(config["vocab_size"], (self.sequences, self.length), device=DEVICE)

    def norm(self, x):
        return F.rms_norm(x, (self.hidden,), self.ones, EPS)

    def turn(self, x, rows):
        """Rotary positions of x [S, T, H, D]."""
        cos, sin = (self.cos[None], self.sin[None]) if rows is None else (self.cos[rows], self.sin[rows])
        half = self.head_dim // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos[:, : x.shape[1], None] + turned * sin[:, : x.shape[1], None]

    def attention(self, w, h, rows=None):
        split = lambda y, heads: y.view(*y.shape[:2], heads, self.head_dim)
        q = self.turn(split(F.linear(h, w["q"]), self.heads), rows).transpose(1, 2)
        k = self.turn(split(F.linear(h, w["k"]), self.kv_heads), rows).transpose(1, 2)
        v = split(F.linear(h, w["v"]), self.kv_heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return F.linear(mixed.transpose(1, 2).reshape(h.shape), w["o"])

    def mlp(self, w, h, _=None):
        return F.linear(F.silu(F.linear(h, w["gate"])) * F.linear(h, w["up"]), w["down"])

    def places(self):
        for w in self.weights:
            yield w, self.attention
            yield w, self.mlp

    @torch.no_grad()
    def teacher(self):
        """The residual stream before every sub-layer and after the last."""
        stream = [F.embedding(self.ids, self.embedding)]
        for w, branch in self.places():
            stream.append(stream[-1] + branch(w, self.norm(stream[-1])))
        return stream

    def student(self):
        """The residual stream after every sub-layer, and every router's scores."""
        x = F.embedding(self.ids, self.embedding)
        stream, scores = [], []
        for (w, branch), router in zip(self.places(), self.routers):
            # Nothing before the first output can learn but its own router.
            h = self.norm(x)
            z = router(h.detach().float())[..., 0]
            with torch.set_grad_enabled(len(stream) > 0):
                rows = z.topk(self.keep, sorted=False).indices.sort(-1).values
                flat = (rows + self.starts).view(-1)
                entered = h.view(-1, self.hidden).index_select(0, flat).view(*rows.shape, self.hidden)
                y = branch(w, entered, rows).view(-1, self.hidden)
                x = x.view(-1, self.hidden).index_add(0, flat, y).view(x.shape)
            if not stream:
                x.requires_grad_()
            stream.append(x)
            scores.append(z)
        return stream, scores

    def step(self):
        with torch.no_grad():
            targets = self.teacher()
            teacher = F.log_softmax(F.linear(self.norm(targets[-1]), self.embedding).float(), -1)
        stream, scores = self.student()
        student = F.log_softmax(F.linear(self.norm(stream[-1]), self.embedding).float(), -1)
        loss = F.kl_div(student, teacher, log_target=True, reduction="sum") / (self.sequences * self.length)
        del student, teacher
        gradients = torch.autograd.grad(loss, stream)
        with torch.no_grad():
            credits = [
                self.credit(dy.float(), before, after, z.detach())
                for dy, before, after, z in zip(gradients, targets, targets[1:], scores)
            ]
        torch.autograd.backward(scores, credits)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def credit(self, dy, before, after, z):
        change = (dy * (after - before)).sum(-1)
        change = change / change.abs().mean(-1, keepdim=True)
        threshold = z.topk(self.keep + 1).values[..., -2:].mean(-1, keepdim=True)
        slope = torch.sigmoid(z - threshold) * torch.sigmoid(threshold - z)
        average = (change * slope).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)
        return (change - average) * slope / (self.sequences * self.length)


# ---- groups: `add(key, make)` for each contestant


def ceilings(shape, add):
    count = shape["copyBytes"] // 2
    source = torch.randint(-30000, 30000, (count,), dtype=torch.int16, device=DEVICE)
    target = torch.empty_like(source)
    add("copy", lambda: timed(lambda: target.copy_(source)))
    size = shape["size"]
    a, b = normal(size, size, deviation=1), normal(size, size, deviation=1)
    out = torch.empty_like(a)
    add("product", lambda: timed(lambda: torch.mm(a, b, out=out)))


def gemm(shape, add):
    for name, (k, n) in shape["products"].items():
        x = normal(shape["rows"], k, deviation=1)
        out = torch.empty(shape["rows"], n, device=DEVICE, dtype=torch.bfloat16)
        w = [normal(n, k).t() for _ in range(shape["many"])]
        for library in ("cublaslt", "cublas"):
            if GPU:
                torch.backends.cuda.preferred_blas_library(library)
            body = lambda i, x=x, w=w, out=out: torch.mm(x, w[i], out=out)
            add(f"{library} {name}", lambda: slope(shape["few"], shape["many"], body))
    if GPU:
        torch.backends.cuda.preferred_blas_library("cublaslt")


def ffn(shape, add, compiled=False):
    model = FeedForward(shape)
    layers = shape["layers"]
    if compiled:
        for name in ("dense", "routed"):
            def make(body=getattr(model, name)):
                call = torch.compile(body, **({"mode": "reduce-overhead"} if GPU else {"backend": "eager"}))
                return timed(lambda: call(model.x), layers)

            add(f"compiled {name}", make)
        return
    add("eager dense", lambda: timed(lambda: model.dense(model.x), layers))
    add("eager routed", lambda: timed(lambda: model.routed(model.x), layers))
    add("cublaslt dense", lambda: timed(graphed(model.dense_lt), layers, model.reset))

    def triton_case():
        if not triton_ffn:
            raise RuntimeError(triton_problem)
        if not GPU:
            raise RuntimeError("Triton needs a GPU")
        model.check_triton()
        return timed(graphed(model.routed_triton), layers, model.reset)

    add("triton routed", triton_case)


def topk(shape, add):
    keep = math.ceil(shape["capacity"] * shape["rows"] - 1e-6)
    scores = [torch.randn(shape["rows"], device=DEVICE) for _ in range(shape["many"])]
    body = lambda i: scores[i].topk(keep, sorted=False).indices.sort().values
    add("topk and sort", lambda: slope(shape["few"], shape["many"], body))


def attention(shape, add):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows, width = shape["rows"], shape["headDim"]
    for count in shape["segments"]:
        length = rows // count
        make = lambda heads: normal(count, length, heads, width, deviation=1).transpose(1, 2)
        q, k, v = make(shape["heads"]), make(shape["kvHeads"]), make(shape["kvHeads"])

        def body(i, q=q, k=k, v=v):
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if GPU else [SDPBackend.MATH]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        add(f"flash {count}x{length}", lambda: slope(shape["few"], shape["many"], body))


def loss(shape, add):
    def make():
        rows, hidden, vocab = shape["rows"], shape["hidden"], shape["vocab"]
        student, teacher = normal(rows, hidden, deviation=1), normal(rows, hidden, deviation=1)
        head = normal(vocab, hidden)
        student.requires_grad_()

        def body():
            with torch.no_grad():
                want = F.log_softmax(F.linear(teacher, head).float(), -1)
            have = F.log_softmax(F.linear(student, head).float(), -1)
            (gradient,) = torch.autograd.grad(F.kl_div(have, want, log_target=True, reduction="sum") / rows, student)
            return gradient

        case = timed(body)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            body()
            case.facts["extraBytes"] = torch.cuda.max_memory_allocated() - before
        return case

    add("eager", make)


def step(shape, add):
    def make():
        synchronize()
        before = torch.cuda.memory_allocated() if GPU else 0
        model = Distillation(shape)
        facts = {}
        model.step()
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        facts["loss"] = model.step()
        if GPU:
            facts["peakBytes"] = torch.cuda.max_memory_allocated() - before
        return Case(lambda calls: wall_times(model.step, calls), facts)

    add("eager", make)


GROUPS = {
    "ceilings": ceilings, "gemm": gemm, "ffn large": ffn, "ffn small": ffn, "topk": topk, "attention": attention,
    "loss": loss, "step": step,
}
COMPILED = {"ffn large": ffn, "ffn small": ffn}


class Commands:
    def __init__(self):
        self.cases = {}

    def setup(self, compiled):
        torch.manual_seed(1)
        self.compiled = compiled
        facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": None, "device": "CPU"}
        if triton_ffn:
            facts["triton"] = triton_ffn.triton.__version__
        if GPU:
            properties = torch.cuda.get_device_properties(0)
            torch.backends.cuda.preferred_blas_library("cublaslt")
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            facts["device"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        return facts

    def group(self, name, shape):
        found = {}
        learns = name in ("loss", "step")

        def add(key, make):
            try:
                self.cases[key] = case = make()
                case.learns = learns
                found[key] = {"calls": case.calls, "facts": case.facts, "unit": "ms"}
            except Exception as error:
                found[key] = {"missing": f"{type(error).__name__}: {error}"[:500]}

        with torch.set_grad_enabled(learns):
            if self.compiled:
                if name in COMPILED:
                    ffn(shape, add, compiled=True)
            elif name in GROUPS:
                GROUPS[name](shape, add)
        return found

    def turn(self, key, calls=None):
        case = self.cases[key]
        with torch.set_grad_enabled(case.learns):
            return {"samples": case.samples(calls or case.calls), "facts": case.facts}

    def free(self):
        self.cases = {}
        if GPU:
            torch.cuda.empty_cache()
        return True


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
