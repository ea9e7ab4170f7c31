"""Token log-probs in tiles of the vocabulary, in plain PyTorch: what logprob.token_logps runs where no kernel does.

The forward pass walks over the tiles and keeps only the parts of the logsumexp. The backward pass computes each tile
again. Tiles cut the vocabulary and not the tokens: each row of the weight's gradient is then written once, and not once
a tile. Within a tile, experts take turns: the work between two products is done in the processor's cache, in place, in
memory that all tiles share. Left out: second derivatives.
"""

import torch
from torch.autograd.function import once_differentiable

HELD = 4 * 2**20        # bytes of logits in one tile: 1024 of each of 1024 rows in float32. On a CPU half or four times
                        # as many take about the same time, others more


class TiledLogps(torch.autograd.Function):
    """rows (N,C), W (V,C) or (K,V,C), A (K,V,R) or None, B (K,R,C) or None, targets (N,) -> (K,N)."""

    @staticmethod
    def forward(ctx, rows, W, A, B, targets, tile):
        heads, experts = heads_and_experts(W, A)
        u = None if A is None else torch.einsum("nc,krc->knr", rows, B)     # (K,N,R)
        exact, cuts = torch.promote_types(rows.dtype, torch.float32), tiles(rows, W, tile)
        top = rows.new_full((sum(map(len, experts)), len(rows)), -torch.inf, dtype=exact)       # largest logit so far
        total = torch.zeros_like(top)                                       # sum of exp(logit - top) so far
        chosen = torch.full_like(top, torch.nan)                            # the target's logit, once its tile comes by
        product_of = scratch(rows, cuts, W.dtype) if tile is not None else lambda columns: None     # None: new memory
        in_place, kept = tile is not None and A is None and W.dtype == exact, []
        room_of = product_of if in_place else scratch(rows, cuts, exact)
        for columns in cuts:
            inside, where = locate(targets, columns)
            for head, its_experts in zip(heads, experts):
                product = torch.mm(rows, head[columns].T, out=product_of(columns))              # (N,v)
                kept += [product] if tile is None else []
                for k in its_experts:
                    logits = expert_logits(product, A, u, k, columns, room_of(columns))
                    chosen[k] = torch.where(inside, logits.gather(-1, where).squeeze(-1).to(exact), chosen[k])
                    before, top[k] = top[k].clone(), torch.maximum(top[k], logits.amax(-1))
                    shifted = less(logits, top[k], room_of(columns))
                    total[k] = total[k] * torch.exp(before - top[k]) + shifted.exp_().sum(-1)
        ctx.save_for_backward(rows, W, A, B, targets, u, top, total)
        ctx.tile, ctx.kept = tile, kept
        return chosen - top - torch.log(total)                              # in this order: a large top cancels

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):                                            # (K,N): d l_t[v] = grad_t (1[v=y_t] - p_t[v])
        rows, W, A, B, targets, u, top, total = ctx.saved_tensors
        need_rows, need_W, need_A, need_B = ctx.needs_input_grad[:4]
        heads, experts = heads_and_experts(W, A)
        exact, cuts = top.dtype, tiles(rows, W, ctx.tile)
        d_rows = torch.zeros_like(rows, dtype=exact)
        d_W = torch.empty_like(W) if need_W else None
        d_A = torch.empty_like(A) if need_A else None
        d_u = None if A is None else torch.zeros_like(u, dtype=exact)
        kept, ctx.kept = ctx.kept[::-1], []                                 # each is let go as soon as it is used
        product_of = None if kept else scratch(rows, cuts, W.dtype)
        sum_of = None if A is None and W.dtype == exact else scratch(rows, cuts, exact)     # None: the product itself
        d_of = scratch(rows, cuts, exact) if A is not None and len(A) > 1 else None
        passed_on = need_rows or need_W
        for columns in cuts:
            inside, where = locate(targets, columns)
            for h, its_experts in enumerate(experts):
                d_product = None
                product = kept.pop() if kept else torch.mm(rows, heads[h][columns].T, out=product_of(columns))
                for k in its_experts:
                    first = k == its_experts[0]                             # it begins the sum over this head's experts
                    room = product if sum_of is None else sum_of(columns) if first else d_of(columns)       # (N,v)
                    d = less(expert_logits(product, A, u, k, columns, room), top[k], room)
                    d.exp_().mul_((-grad / total)[k, :, None])
                    d.scatter_add_(-1, where, torch.where(inside, grad[k], 0.0)[:, None])
                    if A is not None:
                        d_k = d.to(W.dtype)
                        d_u[k] += d_k @ A[k, columns]
                        if need_A:
                            torch.mm(d_k.T, u[k], out=d_A[k, columns])
                    if passed_on:
                        d_product = d if first else d_product.add_(d)       # they share one product here too
                if passed_on and W.dtype != exact:
                    d_product = product.copy_(d_product)
                if need_rows:
                    d_rows += d_product @ heads[h][columns]
                if need_W:
                    torch.mm(d_product.T, rows, out=d_W.view_as(heads)[h, columns])
        if A is not None:
            d_rows += torch.einsum("knr,krc->nc", d_u.to(rows.dtype), B)
        d_B = torch.einsum("knr,nc->krc", d_u.to(rows.dtype), rows) if need_B else None
        return d_rows.to(rows.dtype) if need_rows else None, d_W, d_A, d_B, None, None


def heads_and_experts(W: torch.Tensor, A: torch.Tensor | None) -> tuple[torch.Tensor, list]:
    """The heads (1,V,C) or (K,V,C), and which experts each serves: all of them, or its own."""
    heads = W if W.ndim == 3 else W[None]
    return heads, [[k] for k in range(len(heads))] if A is None else [list(range(len(A)))]


def tiles(rows: torch.Tensor, W: torch.Tensor, tile: int | None) -> list[slice]:
    """Cuts the vocabulary into runs of `tile` tokens; 0: as many as HELD bytes hold; None, for products that are kept:
    the same on a CPU, no cuts on a GPU."""
    V = W.shape[-2]
    if tile is None and W.is_cuda:
        tile = V
    tile = tile or max(256, HELD // max(1, len(rows) * rows.element_size()))
    return [slice(start, min(start + tile, V)) for start in range(0, V, tile)]


def scratch(rows: torch.Tensor, cuts: list[slice], dtype: torch.dtype):
    """columns -> an uninitialised (N,v), always in the same memory, allocated once."""
    held = rows.new_empty(len(rows) * (cuts[0].stop - cuts[0].start), dtype=dtype)          # the first is the widest
    return lambda c: held[: len(rows) * (c.stop - c.start)].view(len(rows), c.stop - c.start)


def expert_logits(product, A, u, k, columns, room):
    """Expert k's logits in a tile, (N,v): the product; or, in `room` if it has their dtype, with A_k (B_k h) on it."""
    if A is None:
        return product
    return torch.addmm(product, u[k], A[k, columns].T, out=room if room.dtype == product.dtype else None)


def less(logits, top, room):
    """logits (N,v) - top (N,) in `room`, which may be where the logits are. Cast first: torch would cast into new
    memory."""
    logits = logits if logits.dtype == room.dtype else room.copy_(logits)
    return torch.sub(logits, top[:, None], out=room)


def locate(targets, columns):
    """Which targets lie in this tile (N,), and their place in it (N,1), clamped where they do not."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, (targets - columns.start).clamp(0, columns.stop - columns.start - 1)[:, None]
