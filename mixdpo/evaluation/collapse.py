"""Collapse: do the K experts of a mixture serve a purpose? Tests on held-out choices; no annotator is needed.

    v_k        weights of a pair, known before its choice: the gate's, the user's responsibilities from training, or,
               for a new user, the responsibilities of the other half of the user's held-out pairs    (half_split_weights)
    p          sum_k v_k sigma(h_k): the mixture                                                                    (M5)
    p_0        the same with constant weights, the mean of v. For choices this is ONE policy: its margin is logit(p_0)

    slope      mean of p / p_0 - 1. The log-likelihood of (1 - t) p_0 + t p is concave in t, and this is its slope at
               t = 0. If it is not positive, no step from constant weights towards v predicts better: responsibilities
               say nothing about types (posterior collapse)
    gain       mean of log p - log p_0, nats a pair: what v adds as it is. Overconfident experts can have a positive
               slope and a negative gain
    over best  mean of log p - log sigma(h_k), k the best single expert: a mixture of use beats this one too
    active     experts that are left when, one at a time, the expert whose removal loses least is removed (its weight
               goes to the others) for as long as the loss is not above FLOOR

Each statement is a one-sided test at 5 %: mean - 1.645 SE > FLOOR. Without it the statement is not made, so few held-out
pairs give a warning too; `detectable` is the smallest gain that such data would show in 80 % of cases. With weights that
are the same for all pairs there is no test: K experts are then one policy for choices, whatever they are as policies.
Not tested: whether one expert trained alone, by DPO, predicts better; evaluate such a run beside the mixture.
"""

import math

import torch

from mixdpo.dpo import log_likelihood
from mixdpo.evaluation.statistics import mean_se
from mixdpo.mixture import log_marginal

Z = 1.645           # standard normal quantile of a one-sided test at 5 %
FLOOR = 1e-4        # nats a pair; a smaller gain is of no use even if it is certain


def exceeds(figure: dict) -> bool:
    """Whether a mean is above FLOOR at 5 %, one-sided; false without a standard error."""
    return figure["mean"] - Z * figure["se"] > FLOOR


def half_split_weights(log_w: torch.Tensor, h: torch.Tensor, user: list) -> torch.Tensor:
    """log v (P,K) of each pair: its weights log_w (P,K) times the likelihood of the other half of its user's pairs
    (M11). A user's pairs are halved alternately. A user's only pair keeps log_w."""
    number = {name: n for n, name in enumerate(dict.fromkeys(user))}
    seen, cell = dict.fromkeys(user, 0), []
    for name in user:
        cell.append(2 * number[name] + seen[name] % 2)                      # (user, half)
        seen[name] += 1
    half = torch.tensor(cell)
    log_lik = log_likelihood(h)                                             # (P,K)
    sums = log_lik.new_zeros(2 * len(number), h.shape[1]).index_add(0, half, log_lik)       # (2U,K)
    return torch.log_softmax(log_w.to(h.dtype) + sums[half ^ 1], dim=-1)


def constant_weights(log_v: torch.Tensor) -> torch.Tensor:
    """log of the mean weights: (P,K) -> (K,)."""
    return torch.logsumexp(log_v, dim=0) - math.log(len(log_v))


def restricted(log_v: torch.Tensor, experts: list[int]) -> torch.Tensor:
    """log weights (P,J) of a mixture of these J experts alone, renormalised. A pair that gave them no weight gets their
    mean weights."""
    kept = log_v[:, experts]
    lost = torch.isneginf(kept).all(1)
    mean = torch.log_softmax(constant_weights(kept), -1)
    if lost.all():
        mean = torch.full_like(mean, -math.log(len(experts)))
    return torch.where(lost[:, None], mean, torch.log_softmax(kept.masked_fill(lost[:, None], 0.0), -1))


def removal_loss(log_v: torch.Tensor, h: torch.Tensor, experts: list[int], k: int, *clusters: list) -> dict:
    """Held-out log-likelihood (nats a pair) that a mixture of `experts` loses without its expert k: mean and SE."""
    rest = [j for j in experts if j != k]
    whole, part = (log_marginal(restricted(log_v, some), h[:, some]) for some in (experts, rest))
    return mean_se(whole - part, *clusters)


def active_experts(log_v: torch.Tensor, h: torch.Tensor, *clusters: list) -> list[int]:
    """The experts that change held-out choices, by backward elimination; at least one. Of equal experts one is left."""
    experts = list(range(h.shape[1]))
    while len(experts) > 1:
        losses = {k: removal_loss(log_v, h, experts, k, *clusters) for k in experts}
        useless = [k for k in experts if not exceeds(losses[k])]
        if not useless:
            break
        experts.remove(min(useless, key=lambda k: losses[k]["mean"]))
    return experts


def collapse_figures(log_v: torch.Tensor, h: torch.Tensor, *clusters: list) -> dict:
    """Every figure at the head of this file, from log v and h (P,K). clusters: one or two lists of P names (statistics.
    clustered_se). {} for one expert.

    "verdict": "untested" (constant weights, or no standard error), "posterior collapse" (no slope), "no gain" (a slope, but one policy or one
    expert predicts as well), "inactive experts" (a gain, but fewer than K are active) or "all active".
    """
    K = h.shape[1]
    if K == 1:
        return {}
    log_v, h = log_v.double(), h.double()
    log_v0 = constant_weights(log_v)                                        # (K,)
    log_p, log_p0, single = log_marginal(log_v, h), log_marginal(log_v0, h), log_likelihood(h)
    best = int(single.mean(0).argmax())
    slope, gain, over_best = (mean_se(values, *clusters) for values in
                              (torch.expm1(log_p - log_p0), log_p - log_p0, log_p - single[:, best]))
    active = active_experts(log_v, h, *clusters)
    varies = float((log_v.exp() - log_v0.exp()).abs().max()) > 1e-6         # float32 resolution
    if not (varies and math.isfinite(slope["se"])):
        verdict = "untested"
    elif not exceeds(slope):
        verdict = "posterior collapse"
    elif not (exceeds(gain) and exceeds(over_best)):
        verdict = "no gain"
    else:
        verdict = "all active" if len(active) == K else "inactive experts"
    return {"verdict": verdict, "slope": slope, "gain": gain, "over_best": over_best, "best": best, "active": active,
            "detectable": FLOOR + (Z + 0.842) * gain["se"]}
