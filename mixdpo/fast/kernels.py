"""logprob.py's two routes in Triton, for CUDA: the same numbers with fewer passes through memory.

    forward_kernel    l = W h (+ A_k (B_k h)), tile by tile. For each row it stores only the largest logit, the sum of
                      exponentials and the target's logit: the logits (N,V) never exist
    backward_kernel   computes each tile again, and its gradient d l_k[v] = grad_k (1[v=y] - p_k[v]). The sum over the
                      experts goes to `d`, from which matrix products give the gradients of rows and weight. Each
                      tile's part of the low-rank factors' gradients is stored. Their sum has a fixed order
    rows_kernel       replaces stored logits by their gradient, in place: one read, one write

K low-rank experts share one vocabulary product. The programs split the rows and the vocabulary, so few rows fill a GPU
too; the parts of each logsumexp are combined outside the kernel. Sums are float32 for every dtype of the inputs, and
float32 products are exact (no tf32). No size must be a multiple of another. Left out: the two products after
backward_kernel, which the matrix library computes at the rate of the hardware; and full heads, which share no product.
With TRITON_INTERPRET=1 all of this runs on the CPU.

Glossary: N rows, V vocabulary, C width, K experts, R rank; KP, RP: K, R padded for the hardware; BN, BV, BC: size of a
tile; I row blocks, J vocabulary tiles, S vocabulary parts.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

CHUNK = 64 * 2**20                  # bytes for d, d_u and d_A of backward_kernel at any time
SPLITS = 264                        # programs that fill an H100: two for each of its 132 multiprocessors


@triton.jit
def tile_product(rows, weight, n, v, N, V, C: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr):
    """rows[n] @ weight[v].T, float32 (BN,BV)."""
    product = tl.zeros((BN, BV), tl.float32)
    for c in range(0, C, BC):
        at = c + tl.arange(0, BC)
        x = tl.load(rows + n[:, None] * C + at, mask=(n < N)[:, None] & (at < C), other=0.0)
        w = tl.load(weight + v[:, None].to(tl.int64) * C + at, mask=(v < V)[:, None] & (at < C), other=0.0)
        product = tl.dot(x, tl.trans(w), product, input_precision="ieee")
    return product


@triton.jit
def expert_logits(product, u, A, k, n, v, N, V, R: tl.constexpr, RP: tl.constexpr):
    """Expert k's logits (BN,BV) of the tile: the product, plus A_k u_k if R > 0; -inf beyond V."""
    logits = product
    if R > 0:
        r = tl.arange(0, RP)
        low = tl.load(u + (k * N + n)[:, None] * R + r, mask=(n < N)[:, None] & (r < R), other=0.0)
        a = tl.load(A + (k * V + v)[:, None].to(tl.int64) * R + r, mask=(v < V)[:, None] & (r < R), other=0.0)
        logits = tl.dot(low, tl.trans(a), logits, input_precision="ieee")
    return tl.where(v < V, logits, -float("inf"))


@triton.jit
def forward_kernel(rows, weight, u, A, targets, top, total, chosen, peak, N, V, span, C: tl.constexpr, K: tl.constexpr,
                   KP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
                   BC: tl.constexpr, SKIP: tl.constexpr):
    """Program (i, s): BN rows and `span` tokens of the vocabulary -> top, total, chosen (S,K,N) of that part: largest
    logit, sum of exp(logit - top), target's logit. SKIP: also peak (I,J), the maximum over the tile's rows and experts
    of (largest logit of the tile - largest logit so far)."""
    n, part = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    target = tl.load(targets + n, mask=n < N, other=-1)
    experts = tl.arange(0, KP)
    best = tl.full((KP, BN), -float("inf"), tl.float32)
    mass, hit = tl.zeros((KP, BN), tl.float32), tl.zeros((KP, BN), tl.float32)
    for first in range(part * span, tl.minimum(part * span + span, V), BV):
        v = first + tl.arange(0, BV)
        product = tile_product(rows, weight, n, v, N, V, C, BN, BV, BC)
        near = tl.full((BN,), -float("inf"), tl.float32)
        for k in range(K):
            logits = expert_logits(product, u, A, k, n, v, N, V, R, RP)
            mine = (experts == k)[:, None]
            before = tl.max(tl.where(mine, best, -float("inf")), 0)         # (BN,) this expert's largest so far
            now = tl.maximum(before, tl.max(logits, 1))
            grown = tl.sum(tl.exp(logits - now[:, None]), 1)
            mass = tl.where(mine, mass * tl.exp(before - now) + grown, mass)
            best = tl.where(mine, now[None, :], best)
            hit = tl.where(mine, hit + tl.sum(tl.where(v == target[:, None], logits, 0.0), 1), hit)
            near = tl.maximum(near, tl.max(logits, 1) - now)
        if SKIP:
            tl.store(peak + tl.program_id(0) * tl.cdiv(V, BV) + first // BV, tl.max(tl.where(n < N, near, -1e30), 0))
    place = (part * K + experts)[:, None] * N + n
    inside = (experts < K)[:, None] & (n < N)
    tl.store(top + place, best, mask=inside)
    tl.store(total + place, mass, mask=inside)
    tl.store(chosen + place, hit, mask=inside)


@triton.jit
def backward_kernel(rows, weight, u, A, targets, top, total, grad, d, d_u, d_A, wanted, N, V, begin, width,
                    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
                    BV: tl.constexpr, BC: tl.constexpr, SKIP: tl.constexpr):
    """Program (i, j): BN rows and BV of the tokens begin .. begin + width - 1. Writes to d (N,width) the gradients of
    the logits, summed over the experts, and the tile's part of the factors' gradients to d_u[j] and d_A[i], float32:
    d_u (J,K,N,R) and d_A (I,K,width,R), whose sums over the first axis are the gradients. SKIP: a tile with
    wanted (I,J) = 0 is skipped; the caller has filled d, d_u and d_A with zeros."""
    needed = True
    if SKIP:
        needed = tl.load(wanted + tl.program_id(0) * tl.cdiv(V, BV) + begin // BV + tl.program_id(1)) != 0
    if needed:
        backward_tile(rows, weight, u, A, targets, top, total, grad, d, d_u, d_A, N, V, begin, width, C, K, R, RP, BN,
                      BV, BC)


@triton.jit
def backward_tile(rows, weight, u, A, targets, top, total, grad, d, d_u, d_A, N, V, begin, width, C: tl.constexpr,
                  K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
                  BC: tl.constexpr):
    """One tile of backward_kernel."""
    n, at = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BV + tl.arange(0, BV)
    v = begin + at                                      # width is a multiple of BV, except for the last chunk
    target = tl.load(targets + n, mask=n < N, other=-1)
    product = tile_product(rows, weight, n, v, N, V, C, BN, BV, BC)
    d_product = tl.zeros((BN, BV), tl.float32)
    for k in range(K):
        logits = expert_logits(product, u, A, k, n, v, N, V, R, RP)
        of_row = k * N + n
        largest = tl.load(top + of_row, mask=n < N, other=0.0)
        mass = tl.load(total + of_row, mask=n < N, other=1.0)
        g = tl.load(grad + of_row, mask=n < N, other=0.0)
        p = tl.exp(logits - largest[:, None]) / mass[:, None]
        d_k = g[:, None] * (tl.where(v == target[:, None], 1.0, 0.0) - p)
        d_product += d_k
        if R > 0:
            r = tl.arange(0, RP)
            low_at, a_at = of_row[:, None] * R + r, (k * V + v)[:, None].to(tl.int64) * R + r
            low_in, a_in = (n < N)[:, None] & (r < R), (v < V)[:, None] & (r < R)
            low, a = tl.load(u + low_at, mask=low_in, other=0.0), tl.load(A + a_at, mask=a_in, other=0.0)
            d_k = d_k.to(low.dtype)
            first_u, first_A = tl.program_id(1).to(tl.int64) * K * N * R, tl.program_id(0).to(tl.int64) * K * width * R
            tl.store(d_u + first_u + low_at, tl.dot(d_k, a, input_precision="ieee"), mask=low_in)
            tl.store(d_A + first_A + (k * width + at)[:, None] * R + r,
                     tl.dot(tl.trans(d_k), low, input_precision="ieee"), mask=(at < width)[:, None] & (r < R))
    tl.store(d + n[:, None].to(tl.int64) * width + at, d_product.to(d.dtype.element_ty),
             mask=(n < N)[:, None] & (at < width))


@triton.jit
def rows_kernel(logits, targets, grad, top, total, chosen, V, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Program n: one row of logits (V,). Forward: writes its top, total and chosen. Backward: replaces the row by its
    gradient."""
    n = tl.program_id(0)
    row, target = logits + n.to(tl.int64) * V, tl.load(targets + n)
    if BACKWARD:
        largest, mass, g = tl.load(top + n), tl.load(total + n), tl.load(grad + n)
        for first in range(0, V, BLOCK):
            v = first + tl.arange(0, BLOCK)
            x = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
            d = g * (tl.where(v == target, 1.0, 0.0) - tl.exp(x - largest) / mass)
            tl.store(row + v, d.to(logits.dtype.element_ty), mask=v < V)
    else:
        best = tl.full((BLOCK,), -float("inf"), tl.float32)                 # for each lane; combined at the end
        mass = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, V, BLOCK):
            v = first + tl.arange(0, BLOCK)
            x = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
            now = tl.maximum(best, x)
            shift = tl.where(now == -float("inf"), 0.0, now)                # lanes beyond a short vocabulary: -inf
            mass = mass * tl.exp(best - shift) + tl.exp(x - shift)
            best = now
        largest = tl.max(best, 0)
        tl.store(top + n, largest)
        tl.store(total + n, tl.sum(mass * tl.exp(best - largest), 0))
        known = (target >= 0) & (target < V)
        tl.store(chosen + n, tl.load(row + target, mask=known, other=float("nan")).to(tl.float32))


def tiling(dtype: torch.dtype, experts: int) -> dict[str, int]:
    """Rows, vocabulary tokens and width of a tile, and its warps and pipeline stages. The largest tile that spills no
    register on an H100, where 16-bit products run on matrix units and exact float32 products do not."""
    sizes = (32, 64, 32) if dtype == torch.float32 else (128, 128, 64) if experts == 1 else (128, 64, 64)
    stages = 2 if dtype == torch.float32 else 3
    return dict(zip(("BN", "BV", "BC"), sizes)) | {"num_warps": 8, "num_stages": stages}


def padded(size: int) -> int:
    """The inner size of a product, padded as matrix units require: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


class FusedLogps(torch.autograd.Function):
    """As logprob.TiledLogps: rows (N,C), W (V,C), A (K,V,R) or None, B (K,R,C) or None, targets (N,) -> (K,N).

    skip: a probability. Backward ignores a tile without a target if all its probabilities, for all rows and experts,
    are below `skip`. The error of a row's gradient is at most sum_v |grad| skip |W_v|; of a token's gradient, at most
    sum_n |grad_n| skip |h_n|."""

    @staticmethod
    def forward(ctx, rows, W, A, B, targets, skip=0.0):
        (N, C), V = rows.shape, len(W)
        K, R = (1, 0) if A is None else (len(A), A.shape[-1])
        rows, W, targets = rows.contiguous(), W.contiguous(), targets.contiguous()
        u, A = (None, None) if A is None else (torch.einsum("nc,krc->knr", rows, B).contiguous(), A.contiguous())
        sizes = {"C": C, "K": K, "R": R, "RP": padded(R)} | tiling(W.dtype, K)
        blocks, tiles = triton.cdiv(N, sizes["BN"]), triton.cdiv(V, sizes["BV"])
        span = triton.cdiv(tiles, min(tiles, triton.cdiv(SPLITS, max(blocks, 1)))) * sizes["BV"]
        parts = triton.cdiv(V, span)
        top, total, chosen = (torch.empty(parts, K, N, dtype=torch.float32, device=rows.device) for _ in range(3))
        peak = torch.empty(blocks, tiles, dtype=torch.float32, device=rows.device) if skip else None
        if N:
            forward_kernel[(blocks, parts)](rows, W, u, A, targets, top, total, chosen, peak, N, V, span,
                                            KP=triton.next_power_of_2(K), SKIP=skip > 0, **sizes)
        best = top.amax(0)                                                  # (K,N)
        mass = (total * torch.exp(top - best)).sum(0)
        known = (targets >= 0) & (targets < V)
        wanted = None
        if skip and N:                                                      # log p <= peak + its part's top - logsumexp
            below = F.pad((top - best - torch.log(mass)).amax(1), (0, -N % sizes["BN"]), value=-torch.inf)   # (S,I*BN)
            of_part = below.unflatten(1, (blocks, -1)).amax(2).T            # (I,S)
            of_tile = of_part.repeat_interleave(span // sizes["BV"], dim=1)[:, :tiles]
            wanted = (peak + of_tile > math.log(skip)).to(torch.int8)       # (I,J)
            block = torch.arange(N, device=rows.device) // sizes["BN"]
            wanted[block[known], targets[known] // sizes["BV"]] = 1
        ctx.save_for_backward(rows, W, A, B, targets, u, best, mass, wanted)
        return torch.where(known, chosen.sum(0), torch.nan) - best - torch.log(mass)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, W, A, B, targets, u, top, total, wanted = ctx.saved_tensors
        need_rows, need_W, need_A, need_B = ctx.needs_input_grad[:4]
        (N, C), V = rows.shape, len(W)
        K, R = (1, 0) if A is None else (len(A), A.shape[-1])
        sizes, grad = {"C": C, "K": K, "R": R, "RP": padded(R)} | tiling(W.dtype, K), grad.contiguous()
        BV, I = sizes["BV"], triton.cdiv(N, sizes["BN"])
        of_token = N * W.element_size() + 4 * K * R * (N / BV + I)          # bytes for each token of a chunk
        width = min(V, max(BV, int(CHUNK / max(1, of_token)) // BV * BV))
        d_rows = torch.zeros(N, C, dtype=torch.float32, device=rows.device)
        d_W = torch.empty_like(W) if need_W else None
        d_u = torch.zeros(K, N, R, dtype=torch.float32, device=rows.device)
        d_A = torch.zeros(K, V, R, dtype=torch.float32, device=rows.device)
        for begin in range(0, V, width):
            here = min(width, V - begin)
            make = torch.empty if wanted is None else torch.zeros
            d = make(N, here, dtype=W.dtype, device=W.device)
            parts = [None if A is None else make(shape, dtype=torch.float32, device=W.device)
                     for shape in ((triton.cdiv(here, BV), K, N, R), (I, K, here, R))]
            if N:
                backward_kernel[(I, triton.cdiv(here, BV))](
                    rows, W, u, A, targets, top, total, grad, d, *parts, wanted, N, V, begin, here,
                    SKIP=wanted is not None, **sizes)
            if A is not None:
                d_u += parts[0].sum(0)
                d_A[:, begin : begin + here] = parts[1].sum(0)
            if need_rows:
                d_rows += d @ W[begin : begin + here]
            if need_W:
                torch.mm(d.T, rows, out=d_W[begin : begin + here])
        if A is not None:
            d_rows += torch.einsum("knr,krc->nc", d_u.to(rows.dtype), B)
        d_B = torch.einsum("knr,nc->krc", d_u.to(rows.dtype), rows) if need_B else None
        return d_rows.to(rows.dtype) if need_rows else None, d_W, d_A.to(A.dtype) if need_A else None, d_B, None, None


class KeptLogps(torch.autograd.Function):
    """Equals FusedLogps for one head, without low-rank factors: rows (N,C), W (V,C), targets (N,) -> (1,N). For few
    rows: the logits are stored, and backward replaces them by their gradient in place."""

    @staticmethod
    def forward(ctx, rows, W, targets):
        logits = rows @ W.T                                                 # (N,V) the first of three large products
        top, total, chosen = (torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(3))
        if len(rows):
            rows_kernel[(len(rows),)](logits, targets.contiguous(), top, top, total, chosen, len(W), False, BLOCK=1024)
        ctx.save_for_backward(rows, W, targets, top, total)
        ctx.logits = logits
        return (chosen - top - torch.log(total))[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, W, targets, top, total = ctx.saved_tensors
        need_rows, need_W = ctx.needs_input_grad[:2]
        logits, ctx.logits = ctx.logits, None
        if len(rows):
            rows_kernel[(len(rows),)](logits, targets.contiguous(), grad[0].contiguous(), top, total, top, len(W), True,
                                      BLOCK=1024)
        return logits @ W if need_rows else None, logits.T @ rows if need_W else None, None
