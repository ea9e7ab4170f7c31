"""The rows that decode together on one trunk. Rows join after a pass over their prompts and leave when they end.

    join      prompts of new rows, padded on the right: each different (prompt, adapter) passes once
    draw      a token of every row, from its own last state, head, temperature, top_p and random numbers
    advance   one pass over the tokens drawn, for the rows that go on

Keys and values of all rows lie in one cache. The running rows are its first rows; the last row moves into the place of
one that leaves. Rows and slots of the cache grow with the requests and shrink when these are gone.
At temperature tau the distribution is softmax(logits / tau). top_p then keeps the smallest set of most likely tokens
whose mass is at least top_p; of equally likely tokens it keeps those with smaller ids. Log-probs are those of
temperature 1, of all tokens. As in evaluation/generate.py a token is drawn by inversion at the row's own uniform number
[seed, 0], so a text depends on its own request alone, up to the rounding of products. In 16 bits rounding often changes
a token, so no product has fewer than LEAST rows: idle rows of the cache are computed too, and prompts are padded.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from mixdpo.evaluation.generate import draw
from mixdpo.models.attention import KVCache
from mixdpo.serving.trunks import LEAST, Policy, Trunk, logits_of

LIKELY = 1024       # so many tokens are sorted first for top_p; all, if these have too little mass
SLOTS = 64          # the slots of a cache are a multiple of this


@dataclass(frozen=True)
class Request:
    """What to complete, and how. Tokens are ids; end: the id that ends the text and is not part of it."""

    prompt: list[int]
    policy: str
    max_new: int                # new tokens, at most
    end: int
    temperature: float = 1.0    # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    top_logprobs: int = 0       # how many of the most likely tokens each Token names


@dataclass(frozen=True)
class Token:
    """One token of a text, with log-probs at temperature 1 in nats."""

    id: int
    logp: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Row:
    """A request that waits or runs."""

    request: Request
    policy: Policy
    deliver: Callable[["Token | str | Exception"], None]
    uniforms: np.ndarray = field(init=False)                                # (max_new,)
    drawn: int = 0              # tokens so far
    length: int = 0             # tokens in the cache
    token: int = 0              # the newest token
    cancelled: bool = False

    def __post_init__(self):
        self.uniforms = np.random.default_rng([self.request.seed, 0]).random(self.request.max_new)

    @property
    def slots(self) -> int:
        """Tokens in the cache, at most. The last token is not read."""
        return len(self.request.prompt) + self.request.max_new - 1


class Decoder:
    """The running rows of one trunk. The methods run without gradient, on one thread."""

    def __init__(self, trunk: Trunk):
        self.trunk, self.rows = trunk, list[Row]()
        self.cache: KVCache | None = None                                   # its first rows are those of `rows`
        self.last = trunk.model.unembedding.new_zeros(0, trunk.model.config.width)          # (N,C) last states
        one = trunk.model.new_cache(1, 1)
        self.token_bytes = one.keys.nbytes + one.values.nbytes
        self.least = LEAST if self.last.dtype.itemsize < 4 else 1           # rows of a pass

    def sizes(self, more: list[Row]) -> tuple[int, int]:
        """Rows and slots of the cache once `more` have joined: as they are, unless they are too small for all rows, or
        the cache is four times too large."""
        rows = [*self.rows, *more]
        slots = -(-max((row.slots for row in rows), default=1) // SLOTS) * SLOTS
        N, S = max(1 << (len(rows) - 1).bit_length(), self.least), min(slots, self.trunk.model.config.context)
        if self.cache is not None:
            _, N_now, _, S_now, _ = self.cache.keys.shape
            if N <= N_now and S <= S_now and N_now * S_now <= 4 * N * S:
                return N_now, S_now
        return N, S

    def nbytes(self, more: list[Row]) -> int:
        """Bytes of the cache once `more` have joined; 0 if there is no row."""
        N, S = self.sizes(more)
        return N * S * self.token_bytes if self.rows or more else 0

    @torch.no_grad()
    def join(self, new: list[Row]) -> None:
        """Reads the prompts of new rows. If it raises, the decoder is as before."""
        model, place = self.trunk.model, dict[tuple, int]()                 # (prompt, adapter) -> row of this pass
        own = [place.setdefault((tuple(row.request.prompt), row.policy.adapter), len(place)) for row in new]
        T, device = max(len(row.request.prompt) for row in new), self.last.device
        ids = torch.zeros(len(place), max(T, self.least), dtype=torch.int64)
        for u, (prompt, _) in enumerate(place):
            ids[u, : len(prompt)] = torch.tensor(prompt)
        read = model.new_cache(*ids.shape)
        hidden = self.trunk(ids.to(device), [adapter for _, adapter in place], read)        # (U,T,C)
        cache, n = self.reserved(new), len(self.rows)
        cache.keys[:, n : n + len(new), :, :T] = read.keys[:, own, :, :T]
        cache.values[:, n : n + len(new), :, :T] = read.values[:, own, :, :T]
        ends = torch.tensor([len(row.request.prompt) - 1 for row in new], device=device)
        self.last = torch.cat([self.last, hidden[torch.tensor(own, device=device), ends]])
        for row in new:
            row.length = len(row.request.prompt)
        self.cache, self.rows = cache, self.rows + new

    def reserved(self, new: list[Row]) -> KVCache:
        """The cache with room for new rows: the present one, or a new one with its content."""
        N, S = self.sizes(new)
        if self.cache is not None and self.cache.keys.shape[1] == N and self.cache.keys.shape[3] == S:
            return self.cache
        cache = self.trunk.model.new_cache(N, S)
        if self.cache is not None:
            n, used = len(self.rows), max((row.length for row in self.rows), default=0)
            cache.keys[:, :n, :, :used] = self.cache.keys[:, :n, :, :used]
            cache.values[:, :n, :, :used] = self.cache.values[:, :n, :, :used]
        return cache

    @torch.no_grad()
    def draw(self) -> list[tuple[Row, "Token | str | Exception"]]:
        """Draws a token of every row -> what each row is told. Rows that end leave."""
        if not self.rows:
            return []
        logits = logits_of(self.last, [row.policy for row in self.rows])    # (N,V)
        total = logits.logsumexp(-1)                                        # (N,)
        broken = ~total.isfinite()
        logits[broken] = 0.0                                                # so that these rows can be drawn, too
        tokens = choose(logits, self.rows)
        logps = (logits.gather(1, tokens[:, None])[:, 0] - total).tolist()
        events: list[tuple[Row, Token | str | Exception]] = []
        stay = []
        for n, (row, token, bad) in enumerate(zip(self.rows, tokens.tolist(), broken.tolist())):
            if bad:
                events.append((row, FloatingPointError("the model's log-probs are NaN or infinite")))
                self.forget(n)
            elif token == row.request.end:
                events.append((row, "stop"))
            else:
                most = (logits[n] - total[n]).topk(min(row.request.top_logprobs, logits.shape[1]))
                events.append((row, Token(token, logps[n], list(zip(most.indices.tolist(), most.values.tolist())))))
                row.token, row.drawn = token, row.drawn + 1
                if row.drawn == row.request.max_new:
                    events.append((row, "length"))
                else:
                    stay.append(n)
        self.keep(stay)
        return events

    @torch.no_grad()
    def advance(self) -> None:
        """One pass over the newest token of every row."""
        if not self.rows or self.cache is None:
            return
        idle = [0] * (self.least - len(self.rows))                          # rows that nobody reads
        n, window = len(self.rows) + len(idle), copy.copy(self.cache)       # a view of the running rows
        window.keys, window.values = self.cache.keys[:, :n], self.cache.values[:, :n]
        window.used = max(row.length for row in self.rows)
        window.length = torch.tensor([row.length for row in self.rows] + idle, device=self.last.device)
        tokens = torch.tensor([row.token for row in self.rows] + idle, device=self.last.device)
        adapters = [row.policy.adapter for row in self.rows] + idle
        self.last = self.trunk(tokens[:, None], adapters, window)[: len(self.rows), 0]
        for row in self.rows:
            row.length += 1

    def keep(self, stay: list[int]) -> None:
        """Only the rows of these numbers, in ascending order, stay. The last of them fill the others' places."""
        holes = [n for n in range(len(stay)) if n not in {*stay}]
        order = list(range(len(stay)))
        for hole, n in zip(holes, [n for n in stay if n >= len(stay)]):
            used, order[hole] = self.rows[n].length, n
            if self.cache is not None:
                self.cache.keys[:, hole, :, :used] = self.cache.keys[:, n, :, :used]
                self.cache.values[:, hole, :, :used] = self.cache.values[:, n, :, :used]
        self.last, self.rows = self.last[order], [self.rows[n] for n in order]
        if not self.rows:
            self.cache = None

    def forget(self, n: int) -> None:
        """Empties row n of the cache: a NaN in a slot that is ignored would still spoil the row that comes there."""
        if self.cache is not None:
            self.cache.keys[:, n], self.cache.values[:, n] = 0.0, 0.0


# --- one token of every row -------------------------------------------------------------------------------------------


def choose(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """One token of each row, (N,V) float32 -> (N,)."""
    options, device = [row.request for row in rows], logits.device
    greedy = [n for n, option in enumerate(options) if option.temperature == 0]
    sampled = [n for n, option in enumerate(options) if option.temperature > 0]
    tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
    tokens[greedy] = logits[greedy].argmax(-1)
    if sampled:
        scaled = logits[sampled] / torch.tensor([[options[n].temperature] for n in sampled], device=device)
        cut = [place for place, n in enumerate(sampled) if options[n].top_p < 1]
        if cut:
            top_p = torch.tensor([options[sampled[place]].top_p for place in cut], dtype=torch.float64, device=device)
            scaled[cut] = cut_to(scaled[cut], top_p)
        u = torch.tensor([rows[n].uniforms[rows[n].drawn] for n in sampled], dtype=torch.float64, device=device)
        tokens[sampled] = draw(scaled, 1.0, u)
    return tokens


def cut_to(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The logits of the smallest set of most likely tokens with mass at least top_p; -inf for others. Of equally likely
    tokens those with smaller ids come first. (N,V), (N,) float64 -> (N,V)."""
    p = torch.softmax(logits, dim=-1)
    for size in (min(LIKELY, p.shape[1]), p.shape[1]):
        most = p.topk(size).values                                          # (N,size), descending
        before = most.cumsum(1, dtype=torch.float64) - most                 # mass of the more likely ones
        if (before[:, -1] + most[:, -1] >= top_p).all():
            break
    count = (before < top_p[:, None]).sum(1, keepdim=True)                  # (N,1) tokens of the set
    least = most.gather(1, count - 1)                                       # (N,1) the smallest probability in it
    above, equal = p > least, p == least
    kept = above | equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True))
    return logits.masked_fill(~kept, -torch.inf)
