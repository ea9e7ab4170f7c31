"""GPT-2 (Radford et al. 2019), from token ids to hidden states.

    x_0     = wte[ids] + wpe[position]
    x      <- x + c_proj(attend(c_attn(ln_1(x))))          each of L blocks
    x      <- x + c_proj(gelu(c_fc(ln_2(x))))
    hidden  = ln_f(x_L)                                    (N, T, C); logprob.py makes logits, hidden @ unembedding.T

Parameters have the names of the published checkpoints, so weights.py needs no table of names. The GELU is the tanh
form, with which GPT-2 was trained; the exact (erf) form differs by up to 4.7e-4 per activation. Left out on purpose:
dropout. So a policy and its reference are the same function in training and in evaluation.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mixdpo.fast.memory import activated
from mixdpo.models.attention import KVCache, attend

# The four published sizes, as arguments of GPT2Config: 124M, 355M, 774M and 1.5B parameters.
SIZES = {
    "gpt2": dict(width=768, layers=12, heads=12),
    "gpt2-medium": dict(width=1024, layers=24, heads=16),
    "gpt2-large": dict(width=1280, layers=36, heads=20),
    "gpt2-xl": dict(width=1600, layers=48, heads=25),
}


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2. The defaults are the smallest published model's."""

    vocab: int = 50257              # V
    context: int = 1024             # longest row in tokens; each position has a learned vector
    width: int = 768                # C
    layers: int = 12                # L
    heads: int = 12                 # H
    inner: int | None = None        # width inside the MLP; None: 4 C
    eps: float = 1e-5               # of the layer norms
    tied: bool = True               # the unembedding is the token embedding
    bos: int | None = None          # bos and eos are not used here; they are read from config.json and saved to it
    eos: int | tuple | None = None

    def __post_init__(self):
        assert self.width % self.heads == 0, f"width {self.width} is not a multiple of heads {self.heads}"
        if self.inner is None:
            object.__setattr__(self, "inner", 4 * self.width)


class Attention(nn.Module):
    """x (N, T, C) -> (N, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x, layer, window):
        N, T, C = x.shape
        q, k, v = self.c_attn(x).view(N, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (N, H, T, D) each
        return self.c_proj(attend(q, k, v, layer, window))


class MLP(nn.Module):
    """x (N, T, C) -> (N, T, C). keep: see fast/memory.py."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.inner)
        self.c_proj = nn.Linear(config.inner, config.width)

    def forward(self, x, keep):
        return activated(self.c_proj, gelu, self.c_fc(x), keep=keep)


def gelu(x):
    """GELU in the tanh form."""
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    """One transformer block: x (N, T, C) -> (N, T, C). layer: its index in the cache; window: see attention.py."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x, layer, window, keep=False):
        x = x + self.attn(self.ln_1(x), layer, window)
        return x + self.mlp(self.ln_2(x), keep)


class GPT2(nn.Module):
    """model(ids) (N, T) int64 -> hidden (N, T, C), final norm applied, all positions. With a cache: see KVCache.

    With `checkpointing = True` each block keeps only its input (N, T, C) for backward and is computed again there:
    the same gradients, less memory, a third more time.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width, eps=config.eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:                            # as GPT-2: projections into the residual stream start smaller
                nn.init.normal_(p, std=0.02 / (2 * config.layers) ** 0.5 if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def unembedding(self) -> nn.Parameter:
        """The parameter (V, C) that maps hidden states to logits; if config.tied, it is the token embedding."""
        return self.wte.weight if self.config.tied else self.lm_head.weight

    def new_cache(self, rows, tokens):
        """An empty KVCache for `rows` rows of up to `tokens` tokens, in the model's dtype and on its device."""
        c, weight = self.config, self.wte.weight
        assert tokens <= c.context, f"got {tokens} tokens a row, want at most the context of {c.context}"
        return KVCache((c.layers, rows, c.heads, tokens, c.width // c.heads), weight.dtype, weight.device)

    def forward(self, ids, cache=None, window=None):
        (N, T), most = ids.shape, self.config.context
        assert T <= most or window is not None, f"got rows of {T} tokens, want at most the context of {most}"
        window = window if cache is None else cache.window(N, T)
        positions = torch.arange(T, device=ids.device) if window is None else window.positions      # (T,) or (N, T)
        x = self.wte(ids) + self.wpe(positions)         # (N, T, C)
        for layer, block in enumerate(self.h):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layer, window, True, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, layer, window)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)
