"""How a run starts: the first responsibilities or the evidence for them, and what must hold before the first step.

Equal experts stay equal. While all experts equal the reference, every margin h is 0, q = w, and all experts get the
same gradient (the symmetric saddle). Low-rank heads have different B_k and do separate, but by chance, not by the data.
So the first steps use responsibilities that differ between groups: random ones, or those of a mixture with linear
rewards on the reference's frozen features (linear.py), which can already see differences between users. With context
pairs the linear rewards stay in every E-step, as evidence (start_evidence); else they give the responsibilities of the
first steps (first_responsibilities). The start keeps w uniform: with few pairs a user and a strong penalty, weights in
closed form let components vanish.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from mixdpo.dpo import log_odds, margins
from mixdpo.experts import pair_logp
from mixdpo.gates import TRAINED, Gate, Inputs
from mixdpo.linear import (
    DEVIATIONS,
    LinearMixture,
    LinearOptions,
    linear_mixture,
    log_evidence,
    newton_step,
    random_responsibilities,
)
from mixdpo.mixture import e_step, elbo, log_marginal
from mixdpo.preferences import order_of

FOLDS, NEWTON_STEPS = 5, 4          # of fold_margins


@torch.no_grad()
def first_responsibilities(config, units: list[list[int]], features: torch.Tensor, log_w: torch.Tensor | None = None,
                           gate_features: torch.Tensor | None = None, random_q: torch.Tensor | None = None,
                           order: torch.Tensor | None = None) -> torch.Tensor | None:
    """log q (G,K) of all groups for the first steps; None if the run starts at the saddle.

    units: the pairs of each group; features: (P,2,C), the reference's mean hidden state over each response;
    log_w: (K,) or (G,K) mixture weights that training keeps fixed, else None; gate_features: (G,D), what a trained gate
    looks at, else None; random_q: (G,K) random log q, by default drawn from config.seed; order: see pair_features.
    """
    K = config.experts
    if K == 1 or config.start == "none":
        return None
    if random_q is None:
        random_q = random_responsibilities(len(units), K, torch.Generator().manual_seed(config.seed))
    if config.start == "dirichlet":
        return random_q
    x, group, _ = pair_features(units, features, order)
    fit = fit_linear(config, x, group, log_w, gate_features)
    return fit.log_q if differ(fit) else random_q


def pair_features(units: list[list[int]], features: torch.Tensor, order: torch.Tensor | None = None
                  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the chosen response minus those of the rejected one, of mean square 1 (B,C); the group (B,) of each
    pair, and its number (B,) in 0..P-1; the pairs in the order of `units`. order (P,R): preferences.order_of; a ranking
    counts as its pairs of neighbouring places, a tie as a pair without a difference."""
    rows = [(g, i, a, b) for g, unit in enumerate(units) for i in unit
            for a, b in ([(0, 1)] if order is None else neighbours(order[i].tolist()))]
    group, index, better, worse = torch.tensor(rows).T
    x = features[index, better] - features[index, worse]
    return x / x.square().mean(0).sqrt().clamp_min(1e-6), group, index


def neighbours(places: list[int]) -> list[tuple[int, int]]:
    """The pairs of responses of which one has the place before the other's."""
    known = sorted({place for place in places if place >= 0})
    found = [(a, b) for a, place in enumerate(places) for b, other in enumerate(places)
             if 0 <= place < other and known.index(other) == known.index(place) + 1]
    return found or [(0, 0)]


def fit_linear(config, x: torch.Tensor, group: torch.Tensor, log_w: torch.Tensor | None,
               gate_features: torch.Tensor | None = None) -> LinearMixture:
    """The linear start's mixture; arguments as for first_responsibilities and pair_features."""
    K, options = config.experts, LinearOptions(x.shape[1], config.restarts, seed=config.seed)
    if gate_features is not None:       # a weak penalty lets the experts explain each pair, and the gate learns nothing
        c = (gate_features - gate_features.mean(0)) / gate_features.std(0, correction=0).clamp_min(1e-6)
        c = c * math.sqrt(x.shape[1] / c.shape[1])      # margins and gate logits then have prior standard deviation 1
        fit = linear_mixture(x, group, K, options, log_w, c)
    else:                               # uniform weights, even if training updates them
        fit = fit_by_evidence(x, group, K, options, torch.full((K,), -math.log(K)) if log_w is None else log_w)
    shares = ", ".join(f"{q:.2f}" for q in fit.log_q.exp().mean(0))
    bounds = ", ".join(f"{bound:.1f}" for bound in fit.bounds)
    print(f"linear start: best bound of {len(fit.bounds)} fits {fit.bound:.1f} nats (all: {bounds}); mean "
          f"responsibilities {shares}")
    if not differ(fit):
        print("warning: the linear start found equal experts, so the reference's features show no types. Training uses "
              "random responsibilities instead; check that the users in the data have different tastes")
    return fit


def differ(fit: LinearMixture) -> bool:
    """Whether the K linear rewards are different."""
    return bool((fit.theta - fit.theta.mean(0)).square().sum() >= 1e-2 * fit.theta.square().sum())


@torch.no_grad()
def start_evidence(config, plan, features: torch.Tensor, log_w: torch.Tensor | None
                   ) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What linear rewards say of types: the log-likelihood of each unit's training pairs (U,K), nats, and the margins
    of all context pairs (P,K), 0 for other pairs; None if the fit found equal experts. Each pair is scored by rewards
    that were fitted without it (fold_margins).

    The experts cannot judge the pairs that they are trained on, but linear rewards can. Of context pairs the reward is
    the sum of both. So the E-step has one likelihood, with the linear rewards in it from the first step on, and the
    experts take over as far as their margins grow:

        log q_uk = log w_k + sum over training pairs i of log sigma(theta_k . x_i)
                           + sum over context pairs i of log sigma(h_ik + theta_k . x_i)               M11
    """
    x, group, index = pair_features(plan.units, features, order_of(plan.pairs))
    fit = fit_linear(config, x, group, log_w)
    if not differ(fit):
        return None
    context = torch.tensor([bool(plan.pairs[i].context) for i in index.tolist()])
    h = fold_margins(x, group, fit, index).float()                          # (B,K)
    evidence = torch.zeros_like(fit.log_q).index_add(0, group[~context], F.logsigmoid(h[~context]))
    return evidence, choice_margins(h[context], index[context], len(plan.pairs))


def choice_margins(h: torch.Tensor, index: torch.Tensor, choices: int) -> torch.Tensor:
    """Margins of choices from those of their pairs: h (B,K), index (B,) in 0..choices-1 -> (choices,K), 0 for a choice
    without a pair. A ranking has the log-odds of the product of its pairs, above those of a ranking by chance."""
    zero = h.new_zeros(choices, h.shape[1])
    log_p, chance = (zero.index_add(0, index, F.logsigmoid(x)) for x in (h, torch.zeros_like(h)))
    several = index.bincount(minlength=choices)[:, None] > 1
    at_random = chance.clamp_max(-math.log(2))                              # of one pair and of none
    of_rankings = log_odds(log_p.clamp_max(-1e-30)) - log_odds(at_random)
    return torch.where(several, of_rankings, zero.index_copy(0, index, h))


@torch.no_grad()
def fit_by_evidence(x: torch.Tensor, group: torch.Tensor, experts: int, options: LinearOptions, log_w: torch.Tensor
                    ) -> LinearMixture:
    """The linear mixture with the prior standard deviation of DEVIATIONS that has the largest evidence; of those within
    a nat of it, which the data cannot tell apart, the largest deviation."""
    fits, evidence = {}, {}
    for s in DEVIATIONS:
        l2 = x.shape[1] / s**2
        fits[s] = linear_mixture(x, group, experts, replace(options, l2=l2), log_w)
        evidence[s] = log_evidence(fits[s], x, group, l2)
    print("linear start: log evidence, nats, by prior standard deviation of a margin: "
          + ", ".join(f"{s:g}: {nats:.1f}" for s, nats in evidence.items()))
    return fits[max(s for s, nats in evidence.items() if nats >= max(evidence.values()) - 1.0)]


@torch.no_grad()
def make_start(gate, inputs, plan, features: torch.Tensor, config, random_q: torch.Tensor | None = None
               ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """How the responsibilities of a plan's units begin: log q (U,K) of the first config.start_steps steps, or None; and
    the start's evidence (U,K) and margins (P,K), or zeros. They use the gate's weights if training keeps these fixed,
    and what the gate looks at if it is trained."""
    fixed = gate.kind not in TRAINED and config.weights != "update"
    log_w = gate(inputs).cpu()                                              # (U,K)
    none = torch.zeros_like(log_w), log_w.new_zeros(len(plan.pairs), config.experts)
    if config.experts > 1 and config.start == "linear" and config.estep == "context":
        found = start_evidence(config, plan, features, log_w if fixed else None)
        if found is not None:
            return None, *found
        config = replace(config, start="dirichlet")                         # fit_linear has said so
    reads = gate_features(gate, inputs).cpu() if gate.kind in TRAINED and config.latent == "pair" else None
    log_q = first_responsibilities(config, plan.units, features, log_w if fixed else None, reads, random_q,
                                   order_of(plan.pairs))
    if log_q is None or not log_w.isinf().any():
        return log_q, *none
    return torch.log_softmax(log_q.masked_fill(log_w.isinf(), -torch.inf), dim=-1), *none   # w_k = 0: only q_k = 0


@torch.no_grad()
def fold_margins(x: torch.Tensor, group: torch.Tensor, fit: LinearMixture, choice: torch.Tensor | None = None
                 ) -> torch.Tensor:
    """Margins theta_k . x of each pair under rewards that were fitted without it: (B,K) float64, nats. choice (B,): the
    ranking that each pair is of, whose pairs are in one fold; default: each pair is alone.

    The pairs of every group are divided into FOLDS folds. For each fold the K rewards are fitted again to all other
    folds, with the responsibilities of `fit` (the M-step, to convergence), and the fold is scored by them. A linear
    reward explains the pairs that it was fitted to better than others, so their margins would be too large.
    """
    x, q, order = x.double(), fit.log_q.double().exp()[group], torch.argsort(group, stable=True)      # q (B,K)
    nth, choice = torch.empty_like(group), torch.arange(len(group)) if choice is None else choice
    number = torch.unique_consecutive(choice[order], return_inverse=True)[1]
    nth[order] = number - number[torch.searchsorted(group[order], group[order])]            # place within its group
    h = x.new_empty(len(x), len(fit.theta))
    for fold in range(FOLDS):
        out = nth % FOLDS == fold
        for k, theta in enumerate(fit.theta.double()):
            for _ in range(NEWTON_STEPS):
                theta = newton_step(x[~out], q[~out, k], theta, fit.l2)
            h[out, k] = x[out] @ theta
    return h


@torch.no_grad()
def check_start(experts, batch, ref_logp: torch.Tensor, log_w: torch.Tensor, beta: float) -> None:
    """Invariants of step 0, while all experts equal the reference: margins 0, loss ln 2, q = w, ELBO = log-marginal.
    They are exact in real arithmetic; the tolerance covers products that round differently in batches of other shapes.

    Raises: AssertionError if one does not hold.
    """
    logp, ref_logp = pair_logp(experts, batch), ref_logp[batch.pair.to(log_w.device)].to(log_w)
    h = margins(logp[..., :2], ref_logp[..., :2], beta)                     # (B,K); of a ranking, two responses do
    log_p, log_q = e_step(log_w, h)
    tolerance = beta * (1e-3 if experts.dtype == torch.float32 else 1.0)    # nats a response, times beta
    error = h.abs().max()
    assert error <= tolerance, (f"margins at step 0 are up to {error:.3g}, want 0 within {tolerance:.1g}: "
                                "policy and reference differ")
    error = (log_p + math.log(2)).abs().max()
    assert error <= tolerance, f"the loss at step 0 is off ln 2 by {error:.3g}, want {tolerance:.1g} at most"
    error = (log_q.exp() - log_w.exp()).abs().max()
    assert error <= tolerance, f"responsibilities at step 0 differ from the weights by {error:.3g}, want 0"
    error = (elbo(log_q, log_w, h) - log_marginal(log_w, h)).abs().max()
    assert error <= 1e-5, f"the bound is {error:.3g} below the log-likelihood at the exact posterior, want 0"


def gate_features(gate: Gate, inputs: Inputs) -> torch.Tensor:
    """All that a trained gate's weights may depend on, as features (N,D): of the prompt, and which user it is."""
    users = F.one_hot(inputs.user).float()[:, : (int(inputs.user.max()) + 1) * gate.kind.endswith("user")]
    return torch.cat([inputs.features, users], dim=1)
