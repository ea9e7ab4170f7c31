"""Token log-probabilities from hidden states: the one place where the unembedding is applied.

    log pi(y_t | ...) = l_t[y_t] - logsumexp_v l_t[v],      l_t = W h_t                    (one head)
                                                            l_t = W_k h_t                  (K full heads)
                                                            l_t = W h_t + A_k (B_k h_t)    (K low-rank heads; W h_t is computed once)

`token_logps_reference` is the plain form. `token_logps` equals it without allocating the logits: it walks over tiles of the vocabulary,
keeps only the logsumexp, and computes each tile again in the backward pass. Its gradient flows to every input, so any loss can stand behind
it; it knows no beta, no experts' weights, no loss. Products run in the dtype of `hidden` and `weight`, everything after them in float32.
Tiles of the vocabulary rather than of tokens: each row of the weight's gradient is then written once, not once a tile.
"""

import torch


def token_logps_reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                          low_rank: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """(..., C), (V, C) or (K, V, C), (...) -> (...) or (K, ...) log-probs in nats; low_rank = A (K, V, R), B (K, R, C) gives (K, ...)."""
    logits = torch.einsum("...c,vc->...v" if weight.ndim == 2 else "...c,kvc->k...v", hidden, weight)
    if low_rank is not None:
        logits = logits + torch.einsum("...c,krc,kvr->k...v", hidden, low_rank[1], low_rank[0])
    logps = torch.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=-1)
    return logps.gather(-1, targets.expand(logps.shape[:-1])[..., None]).squeeze(-1)


def token_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                low_rank: tuple[torch.Tensor, torch.Tensor] | None = None, tile: int | None = 4096) -> torch.Tensor:
    """Equals token_logps_reference without allocating (..., V): no more than (K, ..., tile) of logits live at any time.

    hidden (..., C); weight (V, C) or (K, V, C); targets (...) int64 in 0..V-1; low_rank A (K, V, R) and B (K, R, C), which go with a (V, C)
    weight. Returns float32 (float64 for float64 inputs) nats: (...) for one head, (K, ...) for K. tile=None keeps the logits of all rows
    from forward to backward instead of computing them twice: 6 N V C FLOPs instead of 8, for callers that pass few rows at a time.
    """
    assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight is {weight.dtype}: one compute dtype"
    assert hidden.shape[:-1] == targets.shape, f"got hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)}, want (..., C) and (...)"
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)   # (N,C), (N,)
    if weight.ndim == 3:                                                    # K full heads share nothing but the rows
        assert low_rank is None, "low-rank heads share one (V, C) weight"
        logps = torch.cat([TiledLogps.apply(rows, head, None, None, flat, tile) for head in weight])
        return logps.view(len(weight), *targets.shape)
    A, B = low_rank if low_rank is not None else (None, None)
    logps = TiledLogps.apply(rows, weight, A, B, flat, tile)                # (1,N) or (K,N)
    return logps.view(targets.shape) if A is None else logps.view(-1, *targets.shape)


class TiledLogps(torch.autograd.Function):
    """rows (N,C), W (V,C), A (K,V,R) or None, B (K,R,C) or None, targets (N,) -> (K,N)."""

    @staticmethod
    def forward(ctx, rows, W, A, B, targets, tile):
        u = None if A is None else torch.einsum("nc,krc->knr", rows, B)     # (K,N,R)
        experts, exact = 1 if A is None else len(A), torch.promote_types(rows.dtype, torch.float32)
        lse = torch.full((experts, len(rows)), -torch.inf, dtype=exact, device=rows.device)
        chosen = torch.zeros_like(lse)                                      # the target's logit
        kept = None
        for start, logits in tiles(rows, W, A, u, tile):                    # (K,N,v)
            inside, where = locate(targets, start, logits)
            lse = torch.logaddexp(lse, torch.logsumexp(logits, dim=-1))
            chosen = torch.where(inside, logits.gather(-1, where).squeeze(-1), chosen)
            kept = logits if tile is None else None
        ctx.save_for_backward(rows, W, A, B, targets, lse, u)
        ctx.tile, ctx.kept = tile, kept
        return chosen - lse

    @staticmethod
    def backward(ctx, grad):                                                # grad (K,N): d logp_t[v] = grad_t (1[v = y_t] - p_t[v])
        rows, W, A, B, targets, lse, u = ctx.saved_tensors
        need_rows, need_W, need_A, need_B = ctx.needs_input_grad[:4]
        d_rows = torch.zeros_like(rows, dtype=lse.dtype) if need_rows else None
        d_W = torch.empty_like(W) if need_W else None
        d_A = torch.empty_like(A) if need_A else None
        d_u = torch.zeros_like(u, dtype=lse.dtype) if need_B or (A is not None and need_rows) else None
        for start, logits in tiles(rows, W, A, u, ctx.tile) if ctx.kept is None else [(0, ctx.kept)]:
            stop = start + logits.shape[-1]
            inside, where = locate(targets, start, logits)
            d = logits.sub_(lse[..., None]).exp_().mul_(-grad[..., None])   # (K,N,v) in place: the tile is ours
            d.scatter_add_(-1, where, torch.where(inside, grad, 0.0)[..., None].to(d.dtype))
            if A is not None:
                d_k = d.to(W.dtype)
                if need_A:
                    d_A[:, start:stop] = d_k.mT @ u
                if d_u is not None:
                    d_u += d_k @ A[:, start:stop]
            total = (d[0] if A is None else d.sum(0)).to(W.dtype)           # (N,v): the K experts share one product
            if need_rows:
                d_rows += total @ W[start:stop]
            if need_W:
                torch.mm(total.T, rows, out=d_W[start:stop])
        ctx.kept = None
        d_B = torch.einsum("knr,nc->krc", d_u.to(rows.dtype), rows) if need_B else None
        if need_rows and A is not None:
            d_rows += torch.einsum("knr,krc->nc", d_u.to(rows.dtype), B)
        return None if d_rows is None else d_rows.to(rows.dtype), d_W, d_A, d_B, None, None


def tiles(rows, W, A, u, tile):
    """Yields (start, logits (K,N,v)) over the vocabulary, logits in float32 (float64 for float64 rows)."""
    vocab, exact = len(W), torch.promote_types(rows.dtype, torch.float32)
    for start in range(0, vocab, tile or vocab):
        stop = min(start + (tile or vocab), vocab)
        logits = (rows @ W[start:stop].T).to(exact)[None]                   # (1,N,v) the one vocabulary product
        yield start, logits if A is None else logits + (u @ A[:, start:stop].mT).to(exact)


def locate(targets, start, logits):
    """Which targets lie in this tile (N,), and their place in it (K,N,1), clamped where they do not."""
    experts, _, width = logits.shape
    inside = (targets >= start) & (targets < start + width)
    return inside, (targets - start).clamp(0, width - 1).expand(experts, -1)[..., None]


# --- from tokens to responses ------------------------------------------------------------------------------------------------------------


def sum_responses(logps: torch.Tensor, sequence: torch.Tensor, pairs: int) -> torch.Tensor:
    """Sums token log-probs over each response: (K,M) and the row (M,) in 0..2*pairs-1 of each token -> logp (pairs, K, 2) float32 nats."""
    logp = torch.zeros(len(logps), 2 * pairs, dtype=logps.dtype, device=logps.device).index_add(1, sequence, logps)
    return logp.view(len(logps), pairs, 2).transpose(0, 1)                  # (pairs,K,2)
