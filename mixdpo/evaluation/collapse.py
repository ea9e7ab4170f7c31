"""Collapse: do the K experts of a mixture serve a purpose? Tests on held-out choices; no annotator is needed.

    v_k        weights of a pair, known before its choice: the gate's, the user's responsibilities from training, or,
               for a new user, the responsibilities of the other half of the user's held-out pairs
    p          sum_k v_k sigma(h_k): the mixture                                                                    (M5)
    p_0        the same with constant weights, the mean of v. For choices this is ONE policy: its margin is logit(p_0)

    slope      mean of p / p_0 - 1. The log-likelihood of (1 - t) p_0 + t p is concave in t, and this is its slope at
               t = 0. If it is not positive, no step from constant weights towards v predicts better: responsibilities
               say nothing about types (posterior collapse)
    gain       mean of log p - log p_0, nats a pair: what v adds as it is. Overconfident experts can have a positive
               slope and a negative gain
    over best  mean of log p - log sigma(h_k), k the best single expert: a mixture of use beats this one too
    active     experts that are left when, one at a time, the expert whose removal loses least is removed, as long as
               the loss is not above FLOOR. The weight of a removed expert goes to the best substitute among the others

Each statement is a one-sided test at 5 %: mean - 1.645 SE > FLOOR. If it fails, the statement is not made, so too few
held-out pairs give a warning as well; `detectable` is the gain that they would show. If all pairs have the same
weights, different experts are not tested: for choices they are then one policy, whatever they write. Not tested:
whether one expert trained alone (DPO) predicts better. For that, evaluate such a run too.
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


def detectable(figure: dict) -> float:
    """The smallest mean, in the figure's unit, that a test on such data exceeds in 80 % of cases."""
    return FLOOR + (Z + 0.842) * figure["se"]


def half_split_weights(log_w: torch.Tensor, h: torch.Tensor, user: list, record: list | None = None) -> torch.Tensor:
    """log v (P,K) of each pair: its weights log_w (P,K) times the likelihood of the other half of its user's pairs
    (M11). A user's records are halved alternately. A user's only record keeps log_w. record (P): rankings.records_of,
    so that the pairs of a ranking are in one half; None: each pair is one."""
    number = {name: n for n, name in enumerate(dict.fromkeys(user))}
    seen, cell = dict.fromkeys(user, 0), dict[tuple, int]()
    units = [*zip(user, range(len(user)) if record is None else record)]
    for name, of in dict.fromkeys(units):
        cell[name, of] = 2 * number[name] + seen[name] % 2                  # (user, half)
        seen[name] += 1
    half = torch.tensor([cell[unit] for unit in units])
    log_lik = log_likelihood(h)                                             # (P,K)
    sums = log_lik.new_zeros(2 * len(number), h.shape[1]).index_add(0, half, log_lik)       # (2U,K)
    return torch.log_softmax(log_w.to(h.dtype) + sums[half ^ 1], dim=-1)


def constant_weights(log_v: torch.Tensor) -> torch.Tensor:
    """log of the mean weights: (P,K) -> (K,)."""
    return torch.logsumexp(log_v, dim=0) - math.log(len(log_v))


def without(log_v: torch.Tensor, h: torch.Tensor, k: int) -> torch.Tensor:
    """A mixture without its expert k: another expert j gets its weight, the one that predicts best with it. -> log
    weights (P,K), -inf for k. Renormalised weights would be others even if expert k equals a remaining one."""
    def given_to(j: int) -> torch.Tensor:
        moved = log_v.clone()
        moved[:, j], moved[:, k] = torch.logaddexp(log_v[:, j], log_v[:, k]), -math.inf
        return moved

    others = [j for j in range(h.shape[1]) if j != k and not torch.isneginf(log_v[:, j]).all()]
    return given_to(max(others, key=lambda j: float(log_marginal(given_to(j), h).mean())))


def active_experts(log_v: torch.Tensor, h: torch.Tensor, *clusters: list) -> list[int]:
    """The experts that change held-out choices, by backward elimination; at least one. Of equal experts one is left."""
    active = [k for k in range(h.shape[1]) if not torch.isneginf(log_v[:, k]).all()]
    while len(active) > 1:
        log_p, reduced = log_marginal(log_v, h), {k: without(log_v, h, k) for k in active}
        losses = {k: mean_se(log_p - log_marginal(reduced[k], h), *clusters) for k in active}
        useless = [k for k in active if not exceeds(losses[k])]
        if not useless:
            break
        k = min(useless, key=lambda k: losses[k]["mean"])
        log_v = reduced[k]
        active.remove(k)
    return active


def collapse_figures(log_v: torch.Tensor, h: torch.Tensor, *clusters: list) -> dict:
    """Every figure at the head of this file, from log v and h (P,K). clusters: one or two lists of P names, as in
    statistics.clustered_se. {} for one expert.

    "verdict": "untested" (constant weights or no standard error, and unequal experts), "posterior collapse" (no slope),
    "no gain" (a slope, but one policy or one expert predicts as well), "inactive experts" (a gain, but fewer than K are
    active) or "all active".
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
    varies, equal = (log_v.exp() - log_v0.exp()).abs().max() > 1e-6, (h - h[:, :1]).abs().max() < 1e-6      # in float32
    if not equal and not (varies and math.isfinite(slope["se"])):
        verdict = "untested"
    elif not exceeds(slope):
        verdict = "posterior collapse"
    elif not (exceeds(gain) and exceeds(over_best)):
        verdict = "no gain"
    else:
        verdict = "all active" if len(active) == K else "inactive experts"
    return {"verdict": verdict, "slope": slope, "gain": gain, "over_best": over_best, "best": best, "active": active}


# --- in words ---------------------------------------------------------------------------------------------------------


def describe_active(figures: dict) -> str:
    """"2 of 4" from a run's figures on held-out preferences; "–" for one expert, or an evaluation without the test."""
    found = figures.get("collapse")
    return f"{len(found['active'])} of {figures['experts']}" if found else "–"


def describe_collapse(run: str, figures: dict) -> str:
    """A warning in one line if a run's experts are not all of use, "" if they are or nothing was tested."""
    found, K = figures.get("collapse"), figures["experts"]
    if not found or found["verdict"] == "all active":
        return ""

    def nats(name: str) -> str:
        mean = f"{found[name]['mean']:+.4f}"
        return f"{mean} ± {found[name]['se']:.4f}" if math.isfinite(found[name]["se"]) else mean

    active = found["active"]
    if found["verdict"] == "untested":
        text = (f"whether the {K} experts are of use cannot be tested: all held-out pairs have the same weights, or "
                "the same prompt or user. Evaluate several pairs of each of several users, or train with --gate linear")
    elif found["verdict"] == "posterior collapse":
        text = (f"posterior collapse: the weights of the {K} experts add nothing measurable to the prediction of "
                f"held-out choices (slope {nats('slope')}), so --experts 1 serves as well")
        if math.isfinite(found["gain"]["se"]):
            text += (f". These {found['gain']['n']} pairs would show a gain of {detectable(found['gain']):.4f} nats a "
                     "pair")
    elif found["verdict"] == "no gain":
        text = (f"the weights of the {K} experts say something about held-out choices (slope {nats('slope')}), but one "
                f"policy predicts these as well: the gain over constant weights is {nats('gain')} nats a pair, over "
                f"expert {found['best']} alone {nats('over_best')}. If the margins are too large, use a smaller --beta "
                "or fewer epochs")
    else:
        text = (f"only {len(active)} of {K} experts change held-out choices ({', '.join(map(str, active))}); try "
                f"--experts {len(active)}")
    return f"warning: {run}: {text}"
