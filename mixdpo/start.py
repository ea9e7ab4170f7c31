"""How a run starts: the first responsibilities, and what must hold before the first step.

Experts that are all equal stay equal: every h is 0, q = w, and all get the same gradient, for ever (the symmetric
saddle; low-rank heads differ in their B_k, so they part, but by chance, not by what the data say). So the first steps
take responsibilities that differ between groups: random ones, or those of the same mixture with linear rewards on the
reference's frozen features, which sees what experts equal to the reference cannot see yet.
"""

import math

import torch

from mixdpo.dpo import margins
from mixdpo.experts import pair_logp
from mixdpo.gates import TRAINED, looked_at
from mixdpo.linear import foretold, linear_mixture
from mixdpo.mixture import e_step, elbo, log_marginal, random_responsibilities

RIDGES = (0.01, 0.1, 1.0)           # a pair, of the linear start: the least that still tells users' types is taken


@torch.no_grad()
def first_responsibilities(config, units: list[list[int]], features: torch.Tensor, log_w: torch.Tensor | None = None,
                           reads: torch.Tensor | None = None, drawn: torch.Tensor | None = None
                           ) -> torch.Tensor | None:
    """log q (G,K) of all groups for the first config.start_steps steps; None to start at the saddle.

    units: the pairs of each group; features (P,2,C): the reference's mean hidden state over each response; log_w (K,)
    or (G,K): weights that training keeps, None if it does not; reads (G,D): what a gate that is trained looks at;
    drawn (G,K): random log q to start from, if they are not to be drawn by config.seed.
    """
    if config.experts == 1 or config.start == "none":
        return None
    if drawn is None:
        drawn = random_responsibilities(len(units), config.experts, torch.Generator().manual_seed(config.seed))
    if config.start == "dirichlet":
        return drawn
    index, group = [i for unit in units for i in unit], [g for g, unit in enumerate(units) for _ in unit]
    x = features[index, 0] - features[index, 1]                             # (P,C) chosen minus rejected
    x = x / x.square().mean(0).sqrt().clamp_min(1e-6)
    group, l2 = torch.tensor(group), RIDGES[0] * len(x)             # little: without a gate, chance parts the experts;
    if reads is not None:                                           # with one, it would hide the types, and
        reads = (reads - reads.mean(0)) / reads.std(0, correction=0).clamp_min(1e-6)
        reads = reads * math.sqrt(x.shape[1] / reads.shape[1])      # margins and logits have deviation 1 a priori
        l2 = x.shape[1]
    elif len(units) < len(x):                                       # some have several pairs: half foretells the rest
        told = {ridge: foretold(x, group, config.experts, ridge * len(x), log_w, starts=config.restarts,
                                seed=config.seed) for ridge in RIDGES}
        if max(told.values()) > -math.log(2):                       # a coin's: below, half of the pairs are too few
            l2 = max(told, key=told.get) * len(x)
        print("linear start: half of a user's pairs foretells the other, by ridge: "
              + ", ".join(f"{ridge:g}: {nats:.4f} nats" for ridge, nats in told.items()))
    fit = linear_mixture(x, group, config.experts, l2, config.restarts, seed=config.seed, log_w=log_w, c=reads)
    shares = ", ".join(f"{q:.2f}" for q in fit.log_q.exp().mean(0))
    bounds = ", ".join(f"{bound:.1f}" for bound in fit.bounds)
    print(f"linear start: bounds {bounds} nats; best {fit.bound:.1f}, shares {shares}")
    apart = (fit.theta - fit.theta.mean(0)).square().sum() / fit.theta.square().sum()
    if apart < 1e-2:
        print("linear start: its experts are equal, the features show no types; starting at random responsibilities")
        return drawn
    return fit.log_q


@torch.no_grad()
def make_start(gate, inputs, plan, features: torch.Tensor, config, drawn: torch.Tensor | None = None
               ) -> torch.Tensor | None:
    """first_responsibilities of a plan's groups, under the weights that training keeps or by what its gate reads."""
    kept = gate.kind not in TRAINED and config.weights != "update"
    reads = looked_at(gate, inputs).cpu() if gate.kind in TRAINED and config.latent == "pair" else None
    log_w = gate(inputs).cpu()                                              # (G,K)
    log_q = first_responsibilities(config, plan.units, features, log_w if kept else None, reads, drawn)
    if log_q is None or not log_w.isinf().any():
        return log_q
    return torch.log_softmax(log_q.masked_fill(log_w.isinf(), -torch.inf), dim=-1)     # w_k = 0 leaves no q_k


@torch.no_grad()
def check_start(experts, batch, ref_logp: torch.Tensor, log_w: torch.Tensor, beta: float) -> None:
    """Step-0 invariants, before anything breaks the tie: margins 0, loss ln 2, q = w, ELBO = log-marginal.

    Exact in real arithmetic; the slack is for products that round differently in batches of another shape.
    """
    h = margins(pair_logp(experts, batch), ref_logp[batch.pair.to(log_w.device)].to(log_w), beta)      # (B,K)
    log_p, log_q = e_step(log_w, h)
    slack = beta * (1e-3 if experts.dtype == torch.float32 else 1.0)        # nats a response, times beta
    off = h.abs().max()
    assert off <= slack, (f"margins at step 0 are up to {off:.3g}, want 0 within {slack:.1g}: "
                          "policy and reference differ")
    off = (log_p + math.log(2)).abs().max()
    assert off <= slack, f"the loss at step 0 is off ln 2 by {off:.3g}"
    off = (log_q.exp() - log_w.exp()).abs().max()
    assert off <= slack, f"responsibilities at step 0 are off the weights by {off:.3g}"
    off = (elbo(log_q, log_w, h) - log_marginal(log_w, h)).abs().max()
    assert off <= 1e-5, f"the bound is {off:.3g} below the log-likelihood at the exact posterior, want 0"
