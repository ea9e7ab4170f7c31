"""Rankings and ties: choices among more than two responses, or of none.

Expert k has the reward s_r = beta log(pi_k / pi_ref)(y_r | x) for response r (M3). Plackett and Luce's probability of a
ranking y_1 > y_2 > ... > y_R is a product of choices, each of the best of those that are left:

    log p = sum_j [ s_j - log sum_{i >= j} exp s_i ]                   R = 2: log sigma(s_1 - s_2)            (M4, M5)

Equally good responses count as if every order of them had been seen, with equal parts of one observation: log p is the
mean over these orders. The orders of a group of n differ only in the set that is left before each choice, and all sets
of a size are equally frequent, so a group G in front of the worse responses L has

    sum_{r in G} s_r - sum_{m = 1..n} mean over the sets S of m responses of G of log sum_{i in S or L} exp s_i

Responses of the rest (records.REST) are worse than the ranked ones, in an unknown order: they are in L and make no
choice of their own, so the best of four has the probability of a softmax.

A ranking is one observation. Its margin is the log-odds of its probability, h = log p - log(1 - p), so log sigma(h) =
log p, and E-step, bound and losses need no change. Two responses give the margin of a pair, to the bit.
Sources: Plackett 1975; Luce 1959; mixtures of rankings of three or more are identifiable where pairs are not (Zhao,
Piech and Xia 2016, for four or more). Left out: ties with a parameter of their own (Davidson 1970).
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from mixdpo.dpo import log_odds, margins
from mixdpo.preferences import Pair
from mixdpo.text.records import REST

SUREST = -1e-30     # largest log p: the log-odds of p = 1 are infinite


def ranking_margins(logp: torch.Tensor, ref_logp: torch.Tensor, beta: float, order: torch.Tensor) -> torch.Tensor:
    """Margins h of rankings in nats: logp (b,K,R) and ref_logp, which broadcasts against it, float32; order (b,R): the
    place of each response, 0 for the best, equal for equally good ones, -1 for none -> (b,K)."""
    rewards, h = beta * (logp - ref_logp), logp.new_empty(logp.shape[:2])   # (b,K,R)  M3, without log Z(x)
    for places in order.unique(dim=0).tolist():
        rows = (order == order.new_tensor(places)).all(1).nonzero().squeeze(1).to(logp.device)
        if places[:2] == [0, 1] and not any(place >= 0 for place in places[2:]):
            own = margins(logp[rows, :, :2], ref_logp.expand_as(logp)[rows, :, :2], beta)                   # M4
        else:
            log_p = ranking_log_likelihood(rewards[rows], places).clamp_max(SUREST)
            own = log_odds(log_p)
        h = h.index_copy(0, rows, own)
    return h


def ranking_log_likelihood(rewards: torch.Tensor, places: list[int]) -> torch.Tensor:
    """log p of one order under Plackett and Luce: rewards (...,R), places of the R responses -> (...) nats."""
    found = rewards.new_zeros(rewards.shape[:-1])
    for place in sorted({place for place in places if 0 <= place < REST}):
        group = [r for r, own in enumerate(places) if own == place]
        worse = [r for r, own in enumerate(places) if own > place]
        found = found + rewards[..., group].sum(-1)
        for size in range(1, len(group) + 1):
            left = [torch.logsumexp(rewards[..., [*chosen, *worse]], dim=-1)
                    for chosen in itertools.combinations(group, size)]
            found = found - torch.stack(left).mean(0)
    return found


def records_of(pairs: Sequence[Pair]) -> list:
    """The record of each pair. The pairs that as_pairs makes of one ranking have the same one: they are one judgement,
    so some of them must not be known when others are predicted."""
    return [(pair.file, pair.line) if pair.line else n for n, pair in enumerate(pairs)]


def as_pairs(pairs: Sequence[Pair], report=print) -> list[Pair]:
    """Each ranking as the pairs that it contains; equally good responses make none. `report` receives one line."""
    made = []
    for pair in pairs:
        texts = list(zip(pair.responses, pair.order))
        made += [replace(pair, chosen=a, rejected=b, more=(), order=(0, 1), sides=2)
                 for n, (a, best) in enumerate(texts) for b, place in texts[n + 1:] if place > best]
    if len(made) != len(pairs):
        report(f"{len(pairs)} rankings and pairs are evaluated as the {len(made)} pairs that they contain")
    return made
