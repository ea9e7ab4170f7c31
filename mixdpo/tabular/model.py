"""The model of DP-TBART: a transformer over the columns of a row, samples from it, and their calibration.

    log p(row) = sum_j log p(x_j | x_1 ... x_j-1)              columns in the model's order

A row is a sequence of d tokens after a start token. Each column has its own tokens, and position j can only take the
tokens of column j, so every sampled row is legal under the schema.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mixdpo.models.attention import KVCache
from mixdpo.models.gpt2 import Block, GPT2Config


class TBART(nn.Module):
    """model(codes), codes (N,j) of the first j columns -> states (N,j+1,C); logits(j, states[:, j]) -> (N,sizes[j]).

    sizes: the number of values of each column, in the model's order. The token ids of column j follow those of column
    j-1. The logits of column j are over its own tokens only, which equals a mask over the tokens of all columns.
    prior: log-probabilities of all tokens (V,), the initial biases of the logits; None: 0."""

    first: torch.Tensor             # (d,) first token of each column

    def __init__(self, sizes: list[int], width: int, layers: int, heads: int, prior: torch.Tensor | None = None):
        super().__init__()
        V, d = sum(sizes), len(sizes)
        config = GPT2Config(vocab=V + 1, context=d, width=width, layers=layers, heads=heads)
        self.sizes, self.config = list(sizes), config
        self.wte, self.wpe = nn.Embedding(V + 1, width), nn.Embedding(d, width)     # token V starts a row
        self.h = nn.ModuleList(Block(config) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, eps=config.eps)
        outputs = [nn.Linear(width, size) for size in sizes]
        self.heads = nn.ModuleList(outputs)
        # Clipping bounds one norm over all parameters, so their gradients should have similar sizes. With GPT-2's small
        # initial embeddings (0.02), the first layer norm makes the gradients of the embeddings by far the largest. With
        # its small initial projections, a position hardly depends on the others at first.
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                is_embedding, is_head = name in ("wte.weight", "wpe.weight"), name.startswith("heads")
                nn.init.normal_(p, std=1.0 if is_embedding else 0.02 if is_head else p.shape[1] ** -0.5)
        nn.init.constant_(self.ln_f.weight, width**-0.5)
        if prior is not None:
            for head, log_p in zip(outputs, prior.split(self.sizes)):
                head.bias.data.copy_(log_p)
        self.register_buffer("first", torch.tensor([0, *sizes[:-1]]).cumsum(0))     # (d,) column j's first token

    def forward(self, codes: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """States (N,j+1,C) of all positions; with a cache, only of the positions that it does not hold yet."""
        N, j = codes.shape
        ids = F.pad(codes + self.first[:j], (1, 0), value=self.wte.num_embeddings - 1)      # (N,j+1)
        place = torch.arange(j + 1, device=ids.device).expand(N, -1)
        window = None
        if cache is not None:
            ids, place = ids[:, cache.used :], place[:, cache.used :]
            window = cache.window(*ids.shape)
        x = self.wte(ids) + self.wpe(place)                                 # (N,T,C)
        for layer, block in enumerate(self.h):
            x = block(x, layer, window, keep=True)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.ln_f(x)

    def logits(self, j: int, states: torch.Tensor) -> torch.Tensor:
        """Logits of column j's values: states (N,C) -> (N,sizes[j])."""
        return self.heads[j](states)


def row_losses(model: TBART, codes: torch.Tensor) -> torch.Tensor:
    """-log p of each row in nats: codes (N,d) -> (N,)."""
    states = model(codes[:, :-1])                                           # (N,d,C)
    return sum((F.cross_entropy(model.logits(j, states[:, j]), codes[:, j], reduction="none")
                for j in range(codes.shape[1])), start=torch.zeros(()))


@torch.no_grad()
def sample(model: TBART, rows: int, rng: np.random.Generator, given: torch.Tensor | None = None,
           most: int = 4096) -> torch.Tensor:
    """-> codes of sampled rows (N,d), columns in the model's order. given (N,p): codes of the first p columns, p < d;
    None: sample all columns. most: rows in one batch."""
    d, C, c = len(model.sizes), model.config.width, model.config
    given = torch.empty(rows, 0, dtype=torch.int64) if given is None else given
    assert len(given) == rows and given.shape[1] < d, f"got given {tuple(given.shape)}, want ({rows}, less than {d})"
    made = []
    for codes in given.split(most):
        cache = KVCache((c.layers, len(codes), c.heads, d, C // c.heads), torch.float32, codes.device)
        for j in range(given.shape[1], d):
            up_to = torch.softmax(model.logits(j, model(codes, cache)[:, -1]), dim=-1).double().cumsum(-1)  # (N,size)
            u = torch.from_numpy(rng.random((len(codes), 1))) * up_to[:, -1:]
            drawn = (up_to <= u).sum(1, keepdim=True).clamp_max(up_to.shape[1] - 1)
            codes = torch.cat([codes, drawn], dim=1)
        made.append(codes)
    return torch.cat(made)


@torch.no_grad()
def calibrate(model: TBART, prior: torch.Tensor, seed: int, rows: int = 20_000) -> None:
    """Changes the model's biases until sampled rows have the 1-way marginals `prior` (V,), log-probabilities.

    It goes column by column; the columns before are sampled from the calibrated model. It uses only released values, so
    it costs no privacy."""
    generator, codes = torch.Generator().manual_seed(seed), torch.empty(rows, 0, dtype=torch.int64)
    for j, wanted in enumerate(prior.split(model.sizes)):
        states = torch.cat([model(part)[:, -1] for part in codes.split(4096)])              # (rows,C)
        for _ in range(20):
            log_share = torch.log_softmax(model.logits(j, states), dim=-1).logsumexp(0) - math.log(rows)
            model.heads[j].bias += (wanted - log_share).clamp(-1, 1)
        p = torch.softmax(model.logits(j, states), dim=-1)
        codes = torch.cat([codes, torch.multinomial(p, 1, generator=generator)], dim=1)
