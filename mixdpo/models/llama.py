"""Llama (Touvron et al. 2023) and its relatives, from token ids to hidden states.

    x_0     = embed_tokens[ids]
    x      <- x + o_proj(attend(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))      n = rms(x), each of L blocks
    x      <- x + down_proj(silu(gate_proj(n)) * up_proj(n))                       n = rms(x)
    hidden  = rms(x_L)                                     (N, T, C); logprob.py makes logits, hidden @ unembedding.T

    rms(x)  = g * x / sqrt(mean(x^2) + eps)
    rope    rotates the pair (x_i, x_{i + D/2}) of a head by the angle position * f_i,  f_i = theta^(-2i/D), i < D/2

A family differs by fields of LlamaConfig: Llama 1 to 3.2, SmolLM2 and Mistral by none; Qwen2 and 2.5 have qkv_bias;
Qwen3 has qk_norm "head"; SmolLM3 has no_rope layers; OLMo 2 has qk_norm "row" and post_norm.
Positions enter only through rope. Parameters have the names of the published checkpoints, so weights.py needs no table
of names. Norms and angles are computed in fp32 for every dtype of the weights. Left out on purpose: dropout, other
biases, sliding windows, and scalings of rope other than Llama 3's.
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
    """How Llama 3.1 and 3.2 extend the context: slow frequencies are divided by `factor`, fast ones kept."""

    factor: float                   # 8 in Llama 3.1, 32 in 3.2
    low: float = 1.0                # a frequency with fewer turns over the original context is slow
    high: float = 4.0               # a frequency with more turns is fast
    original: int = 8192            # the original context, in tokens


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama. The defaults are SmolLM2-135M's."""

    vocab: int = 49152              # V
    context: int = 8192             # longest row in tokens
    width: int = 576                # C
    inner: int = 1536               # width inside the MLP
    layers: int = 30                # L
    heads: int = 9                  # H
    kv_heads: int = 3               # H_kv: H / H_kv query heads share one
    head_dim: int | None = None     # D; None: C / H
    eps: float = 1e-5               # of the RMS norms
    theta: float = 100000.0         # base of rope's frequencies
    scaling: RopeScaling | None = None
    tied: bool = True               # the unembedding is the token embedding
    qkv_bias: bool = False          # q, k and v have a bias
    qk_norm: str | None = None      # RMS norm of q and k before rope: "head" (each head) or "row" (all heads at once)
    post_norm: bool = False         # norms follow attention and MLP, inside the residual branch, and precede neither
    no_rope: tuple = ()             # the layers without rope, numbered from 0
    family: str = "llama"           # family, bos and eos are not used here; they are read from config.json and saved
    bos: int | None = None
    eos: int | tuple | None = None

    def __post_init__(self):
        if self.head_dim is None:
            assert self.width % self.heads == 0, f"width {self.width} is not heads {self.heads} times a head_dim"
            object.__setattr__(self, "head_dim", self.width // self.heads)
        assert self.heads % self.kv_heads == 0, f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}"
        assert self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; rope rotates pairs, so it must be even"
        assert self.qk_norm in (None, "head", "row"), f"qk_norm is {self.qk_norm!r}, wanted None, 'head' or 'row'"


def rope_frequencies(config, device=None):
    """f_i in radians per token, (D/2,) fp32."""
    D = config.head_dim
    f = 1.0 / config.theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    if config.scaling is None:
        return f
    s = config.scaling
    turns = s.original * f / (2 * math.pi)              # over the original context
    keep = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)     # 1: fast, kept; 0: slow, divided by the factor
    return f * (keep + (1 - keep) / s.factor)


def rotate(x, cos, sin):
    """rope: x (N, H, T, D) rotated; cos, sin (T, D/2) or (N, 1, T, D/2), fp32. Computed in fp32; the result has x's
    dtype."""
    a, b = x.chunk(2, dim=-1)                           # pairs are (i, i + D/2): the layout of the checkpoints
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """x (..., C) -> (..., C)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x = x.to(self.weight.dtype)                     # under autocast q and k are bf16; fused kernels want one dtype
        y = F.rms_norm(x, self.weight.shape, self.weight, self.eps)         # sums in fp32, also for bf16 x
        kind = x.device.type                            # under autocast: cast once, not in each projection that reads y
        return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y


class Attention(nn.Module):
    """x (N, T, C) -> (N, T, C). cos, sin: see `rotate`."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, self.qk_norm, self.no_rope = config.head_dim, config.qk_norm, config.no_rope
        q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim if config.qk_norm == "head" else q_width, config.eps)
            self.k_norm = RMSNorm(config.head_dim if config.qk_norm == "head" else kv_width, config.eps)

    def forward(self, x, cos, sin, layer, window):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)                    # (N, T, H D), (N, T, H_kv D) twice
        if self.qk_norm == "row":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))  # (N, H or H_kv, T, D)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if layer not in self.no_rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o_proj(attend(q, k, v, layer, window))


class MLP(nn.Module):
    """x (N, T, C) -> (N, T, C). keep: see fast/memory.py."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.inner, bias=False)
        self.up_proj = nn.Linear(config.width, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x, keep):
        return activated(self.down_proj, swiglu, self.gate_proj(x), self.up_proj(x), keep=keep)


def swiglu(gate, up):
    """silu(gate) * up, elementwise."""
    return F.silu(gate) * up


class Block(nn.Module):
    """One transformer block: x (N, T, C) -> (N, T, C). layer: its index in the cache; window: see attention.py."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = None if config.post_norm else RMSNorm(config.width, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)       # before the MLP, except with post_norm
        self.mlp = MLP(config)
        if config.post_norm:
            self.post_feedforward_layernorm = RMSNorm(config.width, config.eps)

    def forward(self, x, cos, sin, layer, window, keep=False):
        if self.input_layernorm is None:                # post_norm
            x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin, layer, window))
            return x + self.post_feedforward_layernorm(self.mlp(x, keep))
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, window)
        return x + self.mlp(self.post_attention_layernorm(x), keep)


class Llama(nn.Module):
    """model(ids) (N, T) int64 -> hidden (N, T, C), final norm applied, all positions. With a cache: see KVCache.

    With `checkpointing = True` each block keeps only its input (N, T, C) for backward and is computed again there:
    the same gradients, less memory, a third more time.
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
    def unembedding(self) -> nn.Parameter:
        """The parameter (V, C) that maps hidden states to logits; if config.tied, it is the token embedding."""
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def new_cache(self, rows, tokens):
        """An empty KVCache for `rows` rows of up to `tokens` tokens, in the model's dtype and on its device."""
        c, weight = self.config, self.embed_tokens.weight
        assert tokens <= c.context, f"got {tokens} tokens a row, want at most the context of {c.context}"
        return KVCache((c.layers, rows, c.kv_heads, tokens, c.head_dim), weight.dtype, weight.device)

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
