"""The same EM with linear rewards, h_ik = theta_k . x_i: small enough that its M-step is a convex problem.

    E-step   q from w and h, as for any experts (M7, M11)
    M-step   theta_k: one damped Newton step on sum_i q_ik log sigma(h_ik) - l2/2 |theta_k|^2
             w: given; or closed (M10); or log softmax(V c), one step on sum_g q_g . log w(c_g) - l2/2 |V|^2 (M9)

On the frozen reference's features it takes seconds, and gives a run of language models its start (start.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mixdpo.mixture import e_step, random_responsibilities, update_weights


@dataclass(frozen=True)
class LinearMixture:
    """K linear rewards theta_k . phi(y) with their responsibilities;
    `bound` is the penalised log-likelihood of this start, `bounds` all starts'."""

    theta: torch.Tensor     # (K,D)
    log_w: torch.Tensor     # (K,), or (G,K) of a gate
    log_q: torch.Tensor     # (G,K)
    bound: float            # nats, summed over groups, of exactly these theta and log_w
    bounds: list[float]
    V: torch.Tensor         # (K,D+1) of a gate, whose logits are V c and a constant; else (K,0)

    def weights(self, c: torch.Tensor) -> torch.Tensor:
        """The gate's log w (N,K) at c (N,D)."""
        return torch.log_softmax(F.pad(c, (0, 1), value=1.0) @ self.V.T, dim=-1)


@torch.no_grad()
def linear_mixture(
    x: torch.Tensor, group: torch.Tensor, experts: int, l2: float = 1e-2, starts: int = 5, iterations: int = 50,
    seed: int = 0, log_w: torch.Tensor | None = None, c: torch.Tensor | None = None,
) -> LinearMixture:
    """The same EM with linear rewards, where the M-step is a convex problem: h_ik = theta_k . x_i.

    x: (B,D) differences of features, chosen minus rejected; group: (B,) int64 in 0..G-1.
    Each M-step is one damped Newton step per expert on sum_i q_ik log sigma(h_ik) - l2/2 |theta_k|^2
    (generalised EM: the bound never falls). log_w: (K,) or (G,K) fixed weights, or None for the closed-form update, or,
    where c (G,D) tells what a gate may look at, for a linear gate on it.
    The best of `starts` random starts by the bound is returned: EM finds local optima, and restarts matter.
    """
    dtype, x, generator = x.dtype, x.double(), torch.Generator().manual_seed(seed)
    c = None if c is None else F.pad(c.double(), (0, 1), value=1.0)         # (G,D+1) with a constant
    best, bounds = None, []
    for _ in range(starts):
        log_q = random_responsibilities(int(group.max()) + 1, experts, generator).double()
        theta = torch.zeros(experts, x.shape[1], dtype=x.dtype)             # (K,D)
        V = torch.zeros(experts, 0 if c is None else c.shape[1], dtype=x.dtype)             # (K,D+1)
        last = -torch.inf
        for _ in range(iterations):
            if c is not None:
                V = gate_step(c, log_q.exp(), V, l2)
                weights = torch.log_softmax(c @ V.T, dim=-1)                # (G,K)  M9
            else:
                weights = update_weights(log_q) if log_w is None else log_w.double()        # M10
            theta = torch.stack([newton_step(x, log_q[group, k].exp(), theta[k], l2) for k in range(experts)])  # (K,D)
            log_p, log_q = e_step(weights if weights.ndim == 1 else weights[group], x @ theta.T, group)
            bound = (log_p.sum() - 0.5 * l2 * (theta.square().sum() + V.square().sum())).item()
            if bound - last < 1e-9 * abs(bound):
                break
            last = bound
        bounds.append(bound)
        if best is None or bound > best.bound:
            best = LinearMixture(theta.to(dtype), weights.to(dtype), log_q.to(dtype), bound, bounds, V.to(dtype))
    return best


@torch.no_grad()
def foretold(x: torch.Tensor, group: torch.Tensor, experts: int, l2: float, log_w: torch.Tensor | None = None,
             **options) -> float:
    """What half of each group's pairs foretells of the other half, nats a pair: a linear_mixture of every second pair
    of a group; then, for the others, log sum_k q_k prod_i sigma(h_ik), q the group's responsibilities so far.
    l2: for all pairs, so half of it is used. Groups of one pair only train."""
    order = torch.argsort(group, stable=True)
    nth = torch.arange(len(group)) - torch.searchsorted(group[order], group[order])         # place in its group
    learns, asked = order[nth % 2 == 0], order[nth % 2 == 1]
    fit = linear_mixture(x[learns], group[learns], experts, l2 / 2, log_w=log_w, **options)
    units, number = group[asked].unique(return_inverse=True)
    log_q = fit.log_q[units].double()[number]                                               # (B',K)
    return float(e_step(log_q, x[asked].double() @ fit.theta.double().T, number)[0].sum()) / len(asked)


def newton_step(x: torch.Tensor, q: torch.Tensor, theta: torch.Tensor, ridge: float) -> torch.Tensor:
    """One Newton step, halved until it does not fall, on sum_i q_i log sigma(theta . x_i) - ridge/2 |theta|^2:
    (B,D), (B,), (D,) -> (D,)."""
    def objective(t):
        return (q * F.logsigmoid(x @ t)).sum() - 0.5 * ridge * t.square().sum()

    miss = torch.sigmoid(-(x @ theta))                                      # (B,)  1 - sigma(h)
    gradient = x.T @ (q * miss) - ridge * theta                             # (D,)
    hessian = (x.T * (q * miss * (1 - miss))) @ x                           # (D,D)
    hessian.diagonal().add_(ridge)
    step, before = torch.linalg.solve(hessian, gradient), objective(theta)
    for halving in range(30):
        new = theta + step * 0.5**halving
        if objective(new) >= before:
            return new
    return theta


def gate_step(c: torch.Tensor, q: torch.Tensor, V: torch.Tensor, ridge: float) -> torch.Tensor:
    """One step on sum_g q_g . log softmax(V c_g) - ridge/2 |V|^2 that never lowers it: (G,D), (G,K), (K,D) -> (K,D).

    Newton's with a fixed matrix that bounds the curvature (Boehning 1992): no logit's variance exceeds 1/2.
    """
    gradient = (q - torch.softmax(c @ V.T, dim=-1)).T @ c - ridge * V       # (K,D)
    bound = 0.5 * c.T @ c
    bound.diagonal().add_(ridge)
    return V + torch.linalg.solve(bound, gradient.T).T
