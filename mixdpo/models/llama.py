"""Llama (Touvron et al. 2023; Llama 3.1 and 3.2; SmolLM2), from token ids to hidden states.

    x_0     = embed_tokens[ids]
    x      <- x + o_proj(attend(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))      n = rms(x), each of L blocks
    x      <- x + down_proj(silu(gate_proj(n)) * up_proj(n))                       n = rms(x)
    hidden  = rms(x_L)                                     (N, T, C): logits, hidden @ unembedding.T, are logprob.py's

    rms(x)  = g * x / sqrt(mean(x^2) + eps)
    rope    turns the pair (x_i, x_{i + D/2}) of a head by the angle position * f_i,  f_i = theta^(-2i/D), i < D/2

Positions enter only through rope. Parameters carry the names of the published checkpoints, so that weights.py needs no
table of names. Norms and angles are computed in fp32 whatever the weights' dtype. Left out: biases, dropout (everywhere
and on purpose), and scalings of rope other than Llama 3's.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mixdpo.fast.memory import activated
from mixdpo.models.attention import KVCache, attend


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and 3.2 stretch a context: slow frequencies are divided by `factor`, fast ones kept."""

    factor: float                   # 8 in Llama 3.1, 32 in 3.2
    low: float = 1.0                # fewer turns than this over the original context: slow
    high: float = 4.0               # more turns than this: fast
    original: int = 8192            # the context before stretching


@dataclass(frozen=True)
class LlamaConfig:
    """The defaults are SmolLM2-135M's."""

    vocab: int = 49152              # V
    context: int = 8192             # longest row
    width: int = 576                # C
    inner: int = 1536               # width inside the MLP
    layers: int = 30                # L
    heads: int = 9                  # H
    kv_heads: int = 3               # H_kv: each serves H / H_kv query heads
    head_dim: int | None = None     # D; None: C / H
    eps: float = 1e-5               # of the RMS norms
    theta: float = 100000.0         # base of rope's frequencies
    scaling: RopeScaling | None = None
    tied: bool = True               # the unembedding is the token embedding
    bos: int | None = None          # bos and eos are only kept, from config.json to config.json
    eos: int | tuple | None = None

    def __post_init__(self):
        if self.head_dim is None:
            assert self.width % self.heads == 0, f"width {self.width} is not heads {self.heads} times a head_dim"
            object.__setattr__(self, "head_dim", self.width // self.heads)
        assert self.heads % self.kv_heads == 0, f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}"
        assert self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd, and rope turns pairs"


def rope_frequencies(config, device=None):
    """f_i, in radians a token, (D/2,) fp32."""
    D = config.head_dim
    f = 1.0 / config.theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    if config.scaling is None:
        return f
    s = config.scaling
    turns = s.original * f / (2 * math.pi)              # over the original context
    keep = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)     # 1: fast, left as it is; 0: slow, stretched in full
    return f * (keep + (1 - keep) / s.factor)


def rotate(x, cos, sin):
    """x (N, H, T, D); cos, sin (T, D/2) or (N, 1, T, D/2). The products are fp32 by promotion; the result is as x."""
    a, b = x.chunk(2, dim=-1)                           # halves, not neighbours: the checkpoints' layout
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = F.rms_norm(x, self.weight.shape, self.weight, self.eps)         # sums in fp32, also for bf16 x
        kind = x.device.type                            # under autocast: cast once, not in each projection that reads y
        return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x, cos, sin, layer, window):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))             # (N, H or H_kv, T, D)
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, layer, window))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.inner, bias=False)
        self.up_proj = nn.Linear(config.width, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x, keep):
        return activated(self.down_proj, swiglu, self.gate_proj(x), self.up_proj(x), keep=keep)


def swiglu(gate, up):
    return F.silu(gate) * up


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, layer, window, keep=False):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, window)
        return x + self.mlp(self.post_attention_layernorm(x), keep)


class Llama(nn.Module):
    """model(ids) (N, T) int64 -> hidden (N, T, C), final norm applied, all positions. With a cache: see KVCache.

    `checkpointing = True` keeps one (N, T, C) tensor a block for backward and computes the block again: the same
    gradients for less memory and a third more time.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    @property
    def unembedding(self):
        """The parameter (V, C) that turns hidden states into logits; when config.tied, the token embedding itself."""
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def new_cache(self, rows, tokens):
        """An empty cache for `rows` rows of up to `tokens` tokens each, in the model's dtype and on its device."""
        c, weight = self.config, self.embed_tokens.weight
        assert tokens <= c.context, f"got {tokens} tokens a row, want at most the context of {c.context}"
        return KVCache(c.layers, rows, c.kv_heads, tokens, c.head_dim, weight.dtype, weight.device)

    def forward(self, ids, cache=None, window=None):
        (N, T), most = ids.shape, self.config.context
        assert T <= most or window is not None, f"got rows of {T} tokens, want at most the context of {most}"
        window = window if cache is None else cache.window(N, T)
        positions = torch.arange(T, device=ids.device) if window is None else window.positions[:, None]
        angles = positions[..., None] * rope_frequencies(self.config, ids.device)   # (T, D/2) or (N, 1, T, D/2)
        cos, sin = angles.cos(), angles.sin()           # once for all layers
        x = self.embed_tokens(ids)                      # (N, T, C)
        for layer, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, layer, window, True, use_reentrant=False,
                               preserve_rng_state=False)
            else:
                x = block(x, cos, sin, layer, window)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)
