"""A mixture with linear rewards on frozen features, by EM: the start of a run (start.py) before any expert is trained.

    h_ik = theta_k . x_i    x_i: features of the chosen response minus features of the rejected one
    E-step   q from w and h, as for any experts (M7, M11)
    M-step   theta_k: one damped Newton step on sum_i q_ik log sigma(h_ik) - l2/2 |theta_k|^2
             w: fixed; or in closed form (M10); or log softmax(V c), by one step on
             sum_g q_g . log w(c_g) - l2/2 |V|^2 (M9)

This M-step is a convex problem, and the fit takes seconds.

The penalty is a prior: with D features of unit mean square and theta ~ N(0, I / l2), a margin theta . x has the
standard deviation s = sqrt(D / l2) nats, so a value of s means the same for models of any width and files of any
length. The data choose s, by Laplace's approximation of the log evidence (log_evidence; Bishop 2006, section 4.4).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mixdpo.mixture import e_step, update_weights

DEVIATIONS = (2.8, 1.4, 0.7)        # candidates for a margin's prior standard deviation, nats


@dataclass(frozen=True)
class LinearOptions:
    """Options of linear_mixture."""

    l2: float = 1e-2                # weight of the penalty l2/2 (|theta|^2 + |V|^2)
    starts: int = 5                 # random starts; the best one is kept
    iterations: int = 50            # of EM in each start, at most
    seed: int = 0                   # of the random starts


@dataclass(frozen=True)
class LinearMixture:
    """K linear rewards theta_k . x and their responsibilities. `bound` is the penalised log-likelihood of the best
    start, `bounds` has that of every start."""

    theta: torch.Tensor     # (K,D)
    log_w: torch.Tensor     # (K,); with a gate (G,K)
    log_q: torch.Tensor     # (G,K)
    bound: float            # nats, summed over groups, at exactly this theta and log_w
    bounds: list[float]
    V: torch.Tensor         # (K,D+1) weights of a linear gate, the constant last; without a gate (K,0)
    l2: float               # weight of the penalty

    def weights(self, c: torch.Tensor) -> torch.Tensor:
        """The gate's log w (N,K) at its features c (N,D)."""
        return torch.log_softmax(F.pad(c, (0, 1), value=1.0) @ self.V.T, dim=-1)


@torch.no_grad()
def linear_mixture(x: torch.Tensor, group: torch.Tensor, experts: int, options: LinearOptions = LinearOptions(),
                   log_w: torch.Tensor | None = None, c: torch.Tensor | None = None) -> LinearMixture:
    """Fits a mixture with linear rewards h_ik = theta_k . x_i by EM.

    x: (B,D) features of the chosen response minus those of the rejected one; group: (B,) int64 in 0..G-1.
    The mixture weights are `log_w` (K,) or (G,K), kept fixed; or those of a linear gate on its features `c` (G,D); or,
    with neither, updated in closed form (M10). The M-step is one damped Newton step per expert, so the bound never
    falls (generalised EM). EM finds local optima: the best of options.starts random starts is returned.
    """
    dtype, x, generator = x.dtype, x.double(), torch.Generator().manual_seed(options.seed)
    c = None if c is None else F.pad(c.double(), (0, 1), value=1.0)         # (G,D+1) with a constant
    best: LinearMixture | None = None
    bounds, l2 = [], options.l2
    for _ in range(options.starts):
        log_q = random_responsibilities(int(group.max()) + 1, experts, generator).double()
        theta = torch.zeros(experts, x.shape[1], dtype=x.dtype)             # (K,D)
        V = torch.zeros(experts, 0 if c is None else c.shape[1], dtype=x.dtype)             # (K,D+1)
        last = -torch.inf
        for _ in range(options.iterations):
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
            best = LinearMixture(theta.to(dtype), weights.to(dtype), log_q.to(dtype), bound, bounds, V.to(dtype), l2)
    assert best is not None, f"got {options.starts} starts, want at least 1"
    return best


def log_evidence(fit: LinearMixture, x: torch.Tensor, group: torch.Tensor, l2: float) -> float:
    """Laplace's approximation of log p(choices | l2) without a gate, nats, summed over groups:

        bound - 1/2 sum_k log det(H_k / l2),  H_k = sum_i q_ik sigma(h_ik) sigma(-h_ik) x_i x_i^T + l2 I

    A weak penalty fits better and loses more volume of the prior. The responsibilities count as known.
    """
    x, evidence = x.double(), fit.bound
    for k, theta in enumerate(fit.theta.double()):
        evidence -= 0.5 * float(torch.logdet(curvature(x, fit.log_q[group, k].double().exp(), theta, l2) / l2))
    return evidence


def curvature(x: torch.Tensor, q: torch.Tensor, theta: torch.Tensor, ridge: float) -> torch.Tensor:
    """The negative Hessian (D,D) of newton_step's objective."""
    miss = torch.sigmoid(-(x @ theta))                                      # (B,)  1 - sigma(h)
    hessian = (x.T * (q * miss * (1 - miss))) @ x                           # (D,D)
    hessian.diagonal().add_(ridge)
    return hessian


def newton_step(x: torch.Tensor, q: torch.Tensor, theta: torch.Tensor, ridge: float) -> torch.Tensor:
    """One Newton step on sum_i q_i log sigma(theta . x_i) - ridge/2 |theta|^2, halved until the objective does not
    fall: (B,D), (B,), (D,) -> (D,)."""
    def objective(t):
        return (q * F.logsigmoid(x @ t)).sum() - 0.5 * ridge * t.square().sum()

    miss = torch.sigmoid(-(x @ theta))                                      # (B,)  1 - sigma(h)
    gradient = x.T @ (q * miss) - ridge * theta                             # (D,)
    step, before = torch.linalg.solve(curvature(x, q, theta, ridge), gradient), objective(theta)
    for halving in range(30):
        new = theta + step * 0.5**halving
        if objective(new) >= before:
            return new
    return theta


def gate_step(c: torch.Tensor, q: torch.Tensor, V: torch.Tensor, ridge: float) -> torch.Tensor:
    """One step on sum_g q_g . log softmax(V c_g) - ridge/2 |V|^2 that never lowers it: (G,D), (G,K), (K,D) -> (K,D).

    Newton's step with a constant upper bound of the curvature (Boehning 1992): no logit's variance exceeds 1/2.
    """
    gradient = (q - torch.softmax(c @ V.T, dim=-1)).T @ c - ridge * V       # (K,D)
    bound = 0.5 * c.T @ c
    bound.diagonal().add_(ridge)
    return V + torch.linalg.solve(bound, gradient.T).T


def random_responsibilities(
    groups: int, experts: int, generator: torch.Generator, concentration: float = 1.0
) -> torch.Tensor:
    """Random log q (G,K), each row from Dirichlet(concentration): breaks the symmetric saddle.

    Identical experts under uniform weights have h equal and q = w for ever, and the mixture reproduces DPO;
    any q that differs between pairs leaves that point.
    """
    shape = torch.full((groups, experts), concentration, dtype=torch.float64)           # the Gammas' shape parameter
    gamma = torch._standard_gamma(shape, generator=generator)
    return torch.log_softmax(gamma.clamp_min(1e-30).log(), dim=-1).float()
