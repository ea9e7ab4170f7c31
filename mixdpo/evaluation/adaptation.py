"""New users: how accurate is the mixture for a user without training data, once a few of the user's pairs are known?
Nothing is trained. The user's mixture weights are a posterior given those pairs:

    w_u(x) proportional to  w(x) prod_i sigma(h_ik)      i: the known pairs of the user     (M11)

The user's other pairs are predicted by the mixture under w_u (M5). With no known pair the weights are the gate's; if
the gate uses user identities, they are those of an unknown user. The result is a curve over the number of known pairs.
Each user's pairs are shuffled once. The second half is predicted; of the first half 0, 1, 2, 4, 8 and 16 pairs are
known. So the points of a curve differ in nothing else. A user with too few pairs for a point is left out of it.
"""

import numpy as np
import torch
import torch.nn.functional as F

from mixdpo.dpo import mixture_accuracy
from mixdpo.evaluation.statistics import mean_se
from mixdpo.mixture import log_marginal
from mixdpo.preferences import Pair, groups

SHOWN = (0, 1, 2, 4, 8, 16)                                                 # known pairs of each point


def weights_after(log_w: torch.Tensor, h: torch.Tensor, known: list[int], predicted: list[int]) -> torch.Tensor:
    """log w_u (A,K) for the pairs `predicted`, given the pairs `known` of the same user; log_w, h (P,K)."""
    evidence = F.logsigmoid(h[known]).sum(0)                                # (K,)
    return torch.log_softmax(log_w[predicted] + evidence, dim=-1)           # M11


def halves(pairs: list[Pair], seed: int) -> list[tuple[list[int], list[int]]]:
    """The pairs of each user, shuffled and divided: of the first half some are known, the second half is predicted."""
    order = np.random.default_rng([seed, 31])
    return [(unit[: len(unit) // 2], unit[len(unit) // 2 :])
            for unit in (order.permutation(unit).tolist() for unit in groups(pairs, "user"))]


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
    minus that of the same users with no known pair}.

    h (P,K): margins; log_w (P,K): weights for unknown users. Standard errors cluster by user and prompt, those of the
    rise by user. Raises: InputError if a pair has no user.
    """
    curve, divided = [], halves(pairs, seed)
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
        curve.append({"shown": n, "users": len(units), "rise": rise} | figures([True] * len(kind)) | {"types": types})
    return curve
