"""New users: how accurate is the mixture for a user without training data, once a few of the user's pairs are known?
Nothing is trained. The user's mixture weights are a posterior given those pairs:

    w_u(x) proportional to  w(x) prod_i sigma(h_ik)      i: the known pairs of the user     (M11)

The user's other pairs are predicted by the mixture under w_u (M5). With no known pair the weights are the gate's; if
the gate uses user identities, they are those of an unknown user. The result is a curve over the number of known pairs.
Each user's pairs are shuffled once, those of a ranking together. The second half is predicted; of the first half 0, 1,
2, 4, 8 and 16 pairs are known. So the points of a curve differ in nothing else. A user with too few pairs for a point
is left out of it.

Flip rate: how many predictions change if the labels of the known pairs are reversed? None, if the mixture does not use
them. Beside it: the same if each of these labels is drawn by a coin (chance), and if the user's type is inferred, and
predictions are made, by the types' true scores (Bayes).
"""

import numpy as np
import torch
import torch.nn.functional as F

from mixdpo.dpo import mixture_accuracy
from mixdpo.evaluation.statistics import bayes_posterior, mean_se
from mixdpo.mixture import log_marginal
from mixdpo.preferences import Pair, groups
from mixdpo.variants.rankings import records_of

SHOWN = (0, 1, 2, 4, 8, 16)                                                 # known pairs of each point


def weights_after(log_w: torch.Tensor, h: torch.Tensor, known: list[int], predicted: list[int]) -> torch.Tensor:
    """log w_u (A,K) for the pairs `predicted`, given the pairs `known` of the same user; log_w, h (P,K)."""
    evidence = F.logsigmoid(h[known]).sum(0)                                # (K,)
    return torch.log_softmax(log_w[predicted] + evidence, dim=-1)           # M11


def flips(log_w: torch.Tensor, h: torch.Tensor, known: list[int], predicted: list[int], signs: torch.Tensor
          ) -> torch.Tensor:
    """Share of the prediction of each pair in `predicted` that changes (A,), 0, 1, or one half for a tie, if the labels
    of the known pairs are multiplied by `signs` (their number,)."""
    changed = h.clone()
    changed[known] = h[known] * signs[:, None].to(h)
    before, after = (mixture_accuracy(log_marginal(weights_after(log_w, x, known, predicted), h[predicted]))
                     for x in (h, changed))
    return (before - after).abs()


def bayes_flips(pairs: list[Pair], known: list[int], predicted: list[int], kinds: list[str]) -> torch.Tensor:
    """The same for reversed labels, if the weights are the posterior of the types `kinds` by their own scores, and each
    type predicts the response with the higher score."""
    scores = [pairs[i].scores or {} for i in known]
    turned = [{kind: own[::-1] for kind, own in score.items()} for score in scores]
    likes = torch.tensor([[a - b for a, b in ((pairs[i].scores or {})[kind] for kind in kinds)] for i in predicted])
    before, after = (1 + (bayes_posterior([seen], kinds) * likes.sign()).sum(1).sign() for seen in (scores, turned))
    return (before - after).abs() / 2


def halves(pairs: list[Pair], seed: int) -> list[tuple[list[int], list[int]]]:
    """The records of each user, shuffled and divided: of the pairs of the first half some are known, those of the
    second half are predicted. A pair is a record, or one of those of a ranking."""
    order, record = np.random.default_rng([seed, 31]), records_of(pairs)
    divided: list[tuple[list[int], list[int]]] = []
    for unit in groups(pairs, "user"):
        of_record: dict = {}
        for i in unit:
            of_record.setdefault(record[i], []).append(i)
        parts = [[*of_record.values()][n] for n in order.permutation(len(of_record))]
        divided.append((sum(parts[: len(parts) // 2], []), sum(parts[len(parts) // 2 :], [])))
    return divided


def posteriors_after(pairs: list[Pair], h: torch.Tensor, log_w: torch.Tensor, seed: int = 0
                     ) -> dict[int, tuple[torch.Tensor, list[str | None]]]:
    """Number of known pairs -> log w_u of all users (U,K) given these, and the annotator of each user; only numbers
    that all users have. Arguments as for adaptation_curve."""
    units, found = halves(pairs, seed), {}
    for n in SHOWN:
        if all(len(first) >= n for first, _ in units):
            log_q = torch.cat([weights_after(log_w, h, first[:n], second[:1]) for first, second in units])
            found[n] = log_q, [pairs[second[0]].annotator for _, second in units]
    return found


@torch.no_grad()
def adaptation_curve(pairs: list[Pair], h: torch.Tensor, log_w: torch.Tensor, seed: int = 0) -> list[dict]:
    """A point for each number of known pairs: {"shown": that number, "users": how many users have so many pairs,
    "accuracy" and "log_likelihood" (nats a pair) of the predicted pairs, "types": both by annotator, "rise": accuracy
    minus that of the same users with no known pair, "flips", "flips_chance", "flips_bayes": flip rates, the last one
    None unless all types have scores}.

    h (P,K): margins; log_w (P,K): weights for unknown users. Standard errors cluster by user and prompt, those of the
    rise by user. Raises: InputError if a pair has no user.
    """
    curve, divided, coin = [], halves(pairs, seed), np.random.default_rng([seed, 32])
    kinds = sorted({pair.annotator for pair in pairs if pair.annotator})
    scored = len(kinds) > 1 and all(pair.scores and pair.scores.keys() >= set(kinds) for pair in pairs)
    first_of: dict[str | None, float] = {}
    for n in SHOWN:
        units = [(first[:n], second) for first, second in divided if len(first) >= n]
        if not units:
            break
        index = torch.tensor([i for _, second in units for i in second])
        posterior = torch.cat([weights_after(log_w, h, known, second) for known, second in units])     # (A,K)
        log_p = log_marginal(posterior, h[index])                           # M5
        right, user = mixture_accuracy(log_p), [pairs[i].user for i in index.tolist()]
        prompt = [tuple(pairs[i].prompt) for i in index.tolist()]
        kind = [pairs[i].annotator or "all" for i in index.tolist()]

        def figures(keep: list[bool]) -> dict:
            clusters = [[name for name, k in zip(names, keep) if k] for names in (user, prompt)]
            named = (("accuracy", right), ("log_likelihood", log_p))
            return {name: mean_se(values[torch.tensor(keep)], *clusters) for name, values in named}

        of_user = {u: float(right[torch.tensor([v == u for v in user])].mean()) for u in dict.fromkeys(user)}
        first_of = first_of or of_user
        types = {name: figures([k == name for k in kind]) for name in sorted(set(kind))}
        rise = mean_se([share - first_of[u] for u, share in of_user.items()])
        turned = {"flips": [flips(log_w, h, *unit, -torch.ones(n)) for unit in units],
                  "flips_chance": [flips(log_w, h, *unit, torch.from_numpy(coin.choice([-1.0, 1.0], n)))
                                   for unit in units],
                  "flips_bayes": [bayes_flips(pairs, *unit, kinds) for unit in units] if scored else None}
        rates = {name: found and mean_se(torch.cat(found), user, prompt) for name, found in turned.items()}
        curve.append({"shown": n, "users": len(units), "rise": rise} | figures([True] * len(kind)) | {"types": types}
                     | rates)
    return curve
