"""A new user: which type is it? A posterior from a few of its pairs, no weight touched.

    w_u(x) proportional to  w(x) prod_i sigma(h_ik)      i: the pairs that the user has judged so far     (M11)

and the user's other pairs are answered by the mixture under w_u (M5). Shown none, the weights are the gate's, of the
generic user where it knows users. How much a handful of pairs is worth is a curve: each user's pairs are shuffled once,
the second half is what is asked, and of the first half 0, 1, 2, 4, 8, 16 are shown, so that a curve's points differ in
nothing else. A user without so many counts in the points before.
"""

import numpy as np
import torch
import torch.nn.functional as F

from mixdpo.dpo import mixture_accuracy
from mixdpo.evaluation.statistics import mean_se
from mixdpo.mixture import log_marginal
from mixdpo.preferences import Pair, groups

SHOWN = (0, 1, 2, 4, 8, 16)


def weights_after(log_w: torch.Tensor, h: torch.Tensor, shown: list[int], asked: list[int]) -> torch.Tensor:
    """log w_u of the pairs `asked` (A,K), when the pairs `shown` of their user have been judged: log_w, h (P,K)."""
    evidence = F.logsigmoid(h[shown]).sum(0)                                # (K,)
    return torch.log_softmax(log_w[asked] + evidence, dim=-1)               # M11


@torch.no_grad()
def adapted(pairs: list[Pair], h: torch.Tensor, log_w: torch.Tensor, seed: int = 0) -> list[dict]:
    """The curve: for each number of pairs shown, accuracy and log-likelihood (nats) of those asked, in all and by type;
    and the rise, how much more accurate it is for the same users than with none shown. h (P,K) margins, log_w (P,K)
    weights of a gate that does not know the users. SEs count users and prompts, those of the rise users.

    Raises: InputError if a pair has no user.
    """
    order, curve, first_of = np.random.default_rng([seed, 31]), [], {}
    halves = [(unit[: len(unit) // 2], unit[len(unit) // 2 :])
              for unit in (order.permutation(unit).tolist() for unit in groups(pairs, "user"))]
    for n in SHOWN:
        able = [(first[:n], asked) for first, asked in halves if len(first) >= n]
        if not able:
            break
        index = torch.tensor([i for _, asked in able for i in asked])
        after = torch.cat([weights_after(log_w, h, shown, asked) for shown, asked in able])            # (A,K)
        log_p = log_marginal(after, h[index])                               # M5
        right, user = mixture_accuracy(log_p), [pairs[i].user for i in index.tolist()]
        prompt = [tuple(pairs[i].prompt) for i in index.tolist()]
        kind = [pairs[i].annotator or "all" for i in index.tolist()]

        def figures(keep: list[bool]) -> dict:
            clusters = [[x for x, k in zip(of, keep) if k] for of in (user, prompt)]
            named = (("accuracy", right), ("log_likelihood", log_p))
            return {name: mean_se(values[torch.tensor(keep)], *clusters) for name, values in named}

        of_user = {u: float(right[torch.tensor([v == u for v in user])].mean()) for u in dict.fromkeys(user)}
        first_of = first_of or of_user
        types = {name: figures([k == name for k in kind]) for name in sorted(set(kind))}
        rise = mean_se([share - first_of[u] for u, share in of_user.items()])
        curve.append({"shown": n, "users": len(able), "rise": rise} | figures([True] * len(kind)) | {"types": types})
    return curve
