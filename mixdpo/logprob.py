"""Token log-probabilities from hidden states: the one place where the unembedding is applied.

    log pi(y_t | ...) = l_t[y_t] - logsumexp_v l_t[v],    l_t = W h_t                     one head
                                                          l_t = W_k h_t                   K full heads
                                                          l_t = W h_t + A_k (B_k h_t)     K low-rank heads, W h_t once

`token_logps_reference` is the plain form. `token_logps` equals it without allocating the logits: on a CPU by tiles of
the vocabulary (fast/tiled.py), on a GPU with Triton and 16-bit inputs by a kernel (fast/kernels.py). Its gradient flows
to every input, so any loss can follow it. Products run in the dtype of
`hidden` and `weight`, everything after them in float32.
"""

import functools

import torch

from mixdpo.fast.tiled import TiledLogps


def token_logps_reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                          low_rank: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """(..., C), (V, C) or (K, V, C), (...) -> (...) or (K, ...) nats. low_rank = A (K, V, R), B (K, R, C): (K, ...)."""
    logits = torch.einsum("...c,vc->...v" if weight.ndim == 2 else "...c,kvc->k...v", hidden, weight)
    if low_rank is not None:
        logits = logits + torch.einsum("...c,krc,kvr->k...v", hidden, low_rank[1], low_rank[0])
    logps = torch.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=-1)
    return logps.gather(-1, targets.expand(logps.shape[:-1])[..., None]).squeeze(-1)


def token_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                low_rank: tuple[torch.Tensor, torch.Tensor] | None = None, tile: int | None = 0,
                skip: float = 0.0) -> torch.Tensor:
    """Equals token_logps_reference without allocating (..., V), if tile is not None: at most three tiles of logits.

    hidden (..., C); weight (V, C) or (K, V, C); targets (...) int64 in 0..V-1, other ids give nan; low_rank: A (K, V,
    R) and B (K, R, C), with a (V, C) weight. Returns nats, float32 (float64 for float64 inputs): (...) for one head,
    (K, ...) for K. tile: tokens of the vocabulary per tile; 0: as many as 4 MiB hold; None: no tiles, for few rows: the
    logits are kept for backward, 6 N V C FLOPs instead of 8. skip: the kernels may ignore a tile in backward if all its
    probabilities are below it (kernels.FusedLogps bounds the error); the CPU ignores none.
    """
    assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight is {weight.dtype}: one compute dtype"
    got = f"got hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)}"
    assert hidden.shape[:-1] == targets.shape, f"{got}, want (..., C) and (...)"
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)  # (N,C), (N,)
    assert weight.ndim == 2 or low_rank is None, "low-rank heads share one (V, C) weight"
    A, B = low_rank if low_rank is not None else (None, None)
    triton = kernels() if rows.is_cuda and rows.dtype.itemsize == 2 else None
    if triton is None:
        logps = TiledLogps.apply(rows, weight, A, B, flat, tile)            # (1,N) or (K,N)
    elif tile is None and A is None:
        logps = torch.cat([triton.KeptLogps.apply(rows, W, flat) for W in weight.view(-1, *weight.shape[-2:])])
    else:
        logps = torch.cat([triton.FusedLogps.apply(rows, W, A, B, flat, skip)
                           for W in weight.view(-1, *weight.shape[-2:])])
    return logps.view(targets.shape) if weight.ndim == 2 and A is None else logps.view(len(logps), *targets.shape)


@functools.cache
def kernels():
    """fast/kernels.py, or None where there is no Triton."""
    try:
        from mixdpo.fast import kernels
    except ImportError:
        return None
    return kernels


# --- from tokens to responses -----------------------------------------------------------------------------------------


def sum_responses(logps: torch.Tensor, sequence: torch.Tensor, pairs: int, sides: int = 2) -> torch.Tensor:
    """Sums token log-probs over each response: logps (K,M), sequence (M,), the response of each token in
    0..sides*pairs-1, -> (pairs,K,sides) nats, in the dtype of logps."""
    logp = torch.zeros(len(logps), sides * pairs, dtype=logps.dtype, device=logps.device).index_add(1, sequence, logps)
    return logp.view(len(logps), pairs, sides).transpose(0, 1)              # (pairs,K,sides)
