"""Causal attention, the same for both model families, with or without a cache of keys and values.

    attend(q, k, v) = softmax(q k^T / sqrt(D) + causal mask) v

H query heads may share H_kv <= H key heads (grouped-query attention): query head h reads key head h // (H / H_kv).
The softmax is torch's scaled_dot_product_attention (SDPA), except for short rows in bfloat16 on a CPU: there separate
matrix products are two to four times as fast. Without a cache no mask is needed: rows are padded on the right, so
causal attention never sees padding. Left out: padding on the left, sliding windows, dropout (no model here has any),
and gradients through the cache.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


class KVCache:
    """Keys and values of the tokens so far, for generation. Allocated once; each row has its own length.

    keys, values (L, N, H_kv, S, D)    slot s of a row is for its token at position s
    length       (N,) int64            tokens stored in each row; later slots are ignored, and written next
    used         int                   slots in use in the longest row; on the CPU, so that no call waits for the device

    A forward call with T new tokens increases `length` and `used` by T. After a call on right-padded rows the caller
    sets `length` to the true lengths; the padding is ignored from then on.
    """

    def __init__(self, shape, dtype, device):
        """shape: (L, N, H_kv, S, D): layers, rows, key heads, slots in a row, head dimension."""
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.length, self.used = torch.zeros(shape[1], dtype=torch.int64, device=device), 0

    def copies(self, rows, tokens):
        """A new cache with `tokens` slots in each row. Its row n is a copy of row rows[n] of this cache; rows (M,)
        int64."""
        L, _, heads, _, head_dim = self.keys.shape
        new = KVCache((L, len(rows), heads, tokens, head_dim), self.keys.dtype, self.keys.device)
        new.keys[:, :, :, : self.used] = self.keys[:, rows, :, : self.used]
        new.values[:, :, :, : self.used] = self.values[:, rows, :, : self.used]
        new.length, new.used = self.length[rows], self.used
        return new

    def advance(self, tokens):
        """Records that every row has `tokens` more tokens."""
        self.length, self.used = self.length + tokens, self.used + tokens

    def window(self, rows, tokens):
        """-> Window: the slots of the next `tokens` tokens of every row. Made once for a forward call, for all layers.

        rows: the number of rows of the call, which must be the cache's."""
        assert not torch.is_grad_enabled(), "the cache carries no gradient: call the model under torch.no_grad()"
        assert rows == len(self.length), f"got {rows} rows of ids, want the cache's {len(self.length)}"
        extent, slots = self.used + tokens, self.keys.shape[3]
        assert extent <= slots, f"the cache has {slots} slots a row and needs {extent}; ask new_cache for more"
        device = self.length.device
        positions = self.length[:, None] + torch.arange(tokens, device=device)      # (N, T)
        mask = None                                     # with an empty cache, plain causal attention
        if extent > tokens:
            mask = torch.arange(extent, device=device) <= positions[:, None, :, None]   # (N, 1, T, extent)
        return Window(self, torch.arange(rows, device=device)[:, None], positions, extent, mask)


@dataclass(frozen=True)
class Window:
    """One forward call's view of a cache."""

    cache: KVCache
    rows: torch.Tensor              # (N, 1): 0..N-1, indexes the cache together with `positions`
    positions: torch.Tensor         # (N, T): slots of the new tokens
    extent: int                     # slots in use after the call, in the longest row
    mask: torch.Tensor | None       # (N, 1, T, extent), True where a new token attends to a slot; None: plain causal

    def extend(self, layer, k, v):
        """Stores the new k, v (N, H_kv, T, D) of a layer and returns all keys and values of the layer so far,
        (N, H_kv, extent, D) each."""
        seen = []
        for new, stored in ((k, self.cache.keys[layer]), (v, self.cache.values[layer])):
            stored[self.rows, :, self.positions] = new.transpose(1, 2).to(stored.dtype)     # (N, T, H_kv, D)
            seen.append(stored[:, :, :self.extent])
        return seen


@dataclass(frozen=True)
class Branches:
    """A window without a cache, with gradient. Each row has a prompt once, followed by several continuations."""

    positions: torch.Tensor         # (N, T): of each token in its own text, which is prompt + continuation
    mask: torch.Tensor              # (N, 1, T, T), True where a token attends to another

    def extend(self, layer, k, v):
        """k and v as they are: there is no cache."""
        return k, v

    def to(self, device):
        return Branches(self.positions.to(device), self.mask.to(device))

    def repeat(self, times):
        """The window for `times` copies of the rows, one after another."""
        return Branches(self.positions.repeat(times, 1), self.mask.repeat(times, 1, 1, 1))


def branches(branch):
    """-> Branches. branch (N, T): 0 in the prompt, n in the n-th continuation, -1 in padding, in this order.

    A token attends to itself and to the earlier tokens of the prompt and of its own continuation. Positions count as if
    each continuation followed the prompt directly."""
    place = torch.arange(branch.shape[1], device=branch.device)
    own = (branch[:, :, None] == branch[:, None, :]) & (branch >= 0)[:, None, :]            # (N, T, T)
    seen = (own | (branch == 0)[:, None, :]) & (place[:, None] >= place)
    return Branches(seen.sum(-1) - 1, seen[:, None])


@dataclass(frozen=True)
class Packed:
    """A window without a cache, with gradient. The rows of Branches, without padding, concatenated into one row."""

    positions: torch.Tensor         # (1, T): of each token in its own text
    row: torch.Tensor               # (T,): the original row of each token; -1 after the last row
    branch: torch.Tensor            # (T,): as in `branches`
    blocks: BlockMask | None = None     # on a GPU: the pairs of token blocks with any attention between them

    def rule(self):
        """A function (batch row, head, q, k) -> True if token q attends to token k."""
        row, branch = self.row, self.branch

        def sees(n, h, q, k):
            return (row[q] == row[k]) & (k <= q) & ((branch[k] == 0) | (branch[k] == branch[q]))

        return sees

    def to(self, device):
        moved = Packed(self.positions.to(device), self.row.to(device), self.branch.to(device))
        T = len(moved.row)
        blocks = create_block_mask(moved.rule(), None, None, T, T, device) if moved.row.is_cuda else None
        return replace(moved, blocks=blocks)

    def repeat(self, times):
        """The window for `times` copies of the row."""
        return replace(self, positions=self.positions.repeat(times, 1))

    def attend(self, q, k, v):
        """As `attend`, (N, H, T, D) each. On a GPU, blocks without any attention are not computed."""
        grouped = q.shape[1] != k.shape[1]
        if self.blocks is not None:
            flex = compiled_flex() if q.is_cuda else flex_attention
            return flex(q, k, v, block_mask=self.blocks, enable_gqa=grouped)
        place = torch.arange(len(self.row), device=q.device)
        mask = self.rule()(0, 0, place[:, None], place)                     # (T, T)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)


@functools.cache
def compiled_flex():
    """flex_attention, compiled: only then is it one kernel."""
    return torch.compile(flex_attention, dynamic=True)


SHORT = 512     # largest row length for attend_by_products, which keeps T^2 numbers a head


def attend_by_products(q, k, v, mask):
    """Equals SDPA, by two matrix products. q (N, H, T, D), k and v (N, H_kv, S, D) -> (N, H, T, D).

    mask (N, 1, T, S), True where a token attends; None: causal. Query heads that share a key head are concatenated
    along the token axis. The softmax is float32."""
    (N, H, T, D), (_, H_kv, S, _) = q.shape, k.shape
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril() if mask is None else mask[:, :, None]
    grouped = (q * D**-0.5).reshape(N, H_kv, H // H_kv * T, D)
    scores = (grouped @ k.mT).view(N, H_kv, H // H_kv, T, S).float().masked_fill_(~mask, -torch.inf)
    p = torch.softmax(scores, dim=-1).to(v.dtype)
    return (p.view(N, H_kv, H // H_kv * T, S) @ v).view(N, H, T, D)


def attend(q, k, v, layer=0, window=None):
    """Causal attention. q (N, H, T, D), k and v (N, H_kv, T, D) -> (N, T, H * D). If the model uses rope, q and k are
    already rotated. layer: the index of the layer in the cache. window: None, Window, Branches or Packed."""
    (N, H, T, D), H_kv = q.shape, k.shape[1]
    if isinstance(window, Packed):
        return window.attend(q, k, v).transpose(1, 2).reshape(N, T, H * D)
    mask = None
    if window is not None:
        k, v = window.extend(layer, k, v)               # (N, H_kv, extent, D)
        mask = window.mask
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= SHORT:
        y = attend_by_products(q, k, v, mask)
    elif mask is not None and T == 1:
        # One new token: the query heads that share a key head take the token axis, so that no key is repeated.
        q = q.reshape(N, H_kv, H // H_kv, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(N, H, T, D)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != H_kv)
    return y.transpose(1, 2).reshape(N, T, H * D)
