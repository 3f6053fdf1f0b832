"""Triton kernels of the peers: a fused activation, and a routed feed-forward layer that gathers and scatters itself."""
import torch
import triton
import triton.language as tl


@triton.jit
def silu_mul_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(tl.bfloat16), mask=inside)


def silu_mul(gate, up, out):
    count = gate.numel()
    silu_mul_kernel[(triton.cdiv(count, 4096),)](gate, up, out, count, BLOCK=4096, num_warps=8)
    return out


@triton.jit
def tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tiles of a few rows of tiles one after the other, so that both operands stay in the L2 cache."""
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    inside = pid % (GROUP * columns)
    return first + inside % height, inside // height


TILES = ((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (128, 256, 64, 8, 3))
CONFIGS = [
    triton.Config({"BM": bm, "BN": bn, "BK": bk, "GROUP": 8}, num_warps=warps, num_stages=stages)
    for bm, bn, bk, warps, stages in TILES
]


@triton.autotune(CONFIGS[:3], key=["M", "N", "K"])
@triton.jit
def gather_gated_kernel(
    x, rows, gate, up, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):
    """out[m] = silu(x[rows[m]] gate^T) * (x[rows[m]] up^T)"""
    tile_m, tile_n = tile_of(M, N, BM, BN, GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    source = tl.load(rows + m, mask=m < M, other=0).to(tl.int64)
    a_at = x + source[:, None] * K + k[None, :]
    weight_at = (n % N).to(tl.int64)[None, :] * K + k[:, None]
    g = tl.zeros((BM, BN), dtype=tl.float32)
    u = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, K, BK):
        a = tl.load(a_at)
        g = tl.dot(a, tl.load(gate + weight_at), g)
        u = tl.dot(a, tl.load(up + weight_at), u)
        a_at += BK
        weight_at += BK
    value = (g * tl.sigmoid(g) * u).to(tl.bfloat16)
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], value, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.autotune(CONFIGS, key=["M", "N", "K"])
@triton.jit
def gather_linear_kernel(
    x, rows, w, bias, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):
    """out[m] = gelu_tanh(x[rows[m]] w^T + bias)"""
    tile_m, tile_n = tile_of(M, N, BM, BN, GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    source = tl.load(rows + m, mask=m < M, other=0).to(tl.int64)
    a_at = x + source[:, None] * K + k[None, :]
    weight_at = w + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    sum = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, K, BK):
        sum = tl.dot(tl.load(a_at), tl.load(weight_at), sum)
        a_at += BK
        weight_at += BK
    sum += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    # 1 + tanh(z) = 2 sigmoid(2 z)
    value = sum * tl.sigmoid(1.5957691216057308 * (sum + 0.044715 * sum * sum * sum))
    at = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, value.to(tl.bfloat16), mask=(m < M)[:, None] & (n < N)[None, :])


# Tuning runs a kernel many times; what it adds to is put back.
@triton.autotune(CONFIGS, key=["M", "N", "K"], restore_value=["residual"])
@triton.jit
def scatter_linear_kernel(
    x, rows, w, bias, residual, M, N, K, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):
    """residual[rows[m]] += x[m] w^T + bias; every row occurs once, so that no atomics are needed."""
    tile_m, tile_n = tile_of(M, N, BM, BN, GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_at = x + (m % M).to(tl.int64)[:, None] * K + k[None, :]
    weight_at = w + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    sum = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, K, BK):
        sum = tl.dot(tl.load(a_at), tl.load(weight_at), sum)
        a_at += BK
        weight_at += BK
    if BIAS:
        sum += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    target = tl.load(rows + m, mask=m < M, other=0).to(tl.int64)
    at = residual + target[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(at, (tl.load(at, mask=inside, other=0).to(tl.float32) + sum).to(tl.bfloat16), mask=inside)


def routed_ffn(residual, normed, rows, layer, hidden):
    """residual[rows] += ffn(normed[rows]), in place; `hidden` is a buffer [rows, ffn]. K must be a multiple of 64."""
    count, (width, features) = rows.shape[0], layer["up"].shape
    grid = lambda columns: lambda meta: (triton.cdiv(count, meta["BM"]) * triton.cdiv(columns, meta["BN"]),)
    if "gate" in layer:
        gather_gated_kernel[grid(width)](normed, rows, layer["gate"], layer["up"], hidden, count, width, features)
    else:
        gather_linear_kernel[grid(width)](normed, rows, layer["up"], layer["up_bias"], hidden, count, width, features)
    bias = layer.get("down_bias")
    scatter_linear_kernel[grid(features)](
        hidden, rows, layer["down"], bias if bias is not None else layer["down"], residual, count, features, width,
        BIAS=bias is not None,
    )
    return residual
