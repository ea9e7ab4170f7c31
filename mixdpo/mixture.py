"""The mixture: responsibilities, the bound, and the losses. Tensors in, per-pair tensors out; no model, no
configuration.

Each pair (or each user) has one latent type z in 1..K, and expert k is the policy of type k. With weights w (the gate)
and margins h_k (dpo.py):

    log p(y+ > y- | x) = logsumexp_k [ log w_k + log sigma(h_k) ]             (M5, mixture of Bradley-Terry)
    ELBO(q)            = sum_k q_k [ log w_k + log sigma(h_k) - log q_k ]     (M6; log p - ELBO = KL(q || posterior))
    E-step             : log q_k = log w_k + log sigma(h_k) - log p           (M7: q is the posterior, the gap is 0)
      one type per user: log q_k = log w_k + sum_i log sigma(h_ik) - log p    (M11: i runs over the user's pairs)
      other E-steps    : tempered, hard, sampled: variants/e_steps.py         (M12)
    expert M-step      : - sum_k q_k log sigma(h_k),  q detached              (M8)
    gate M-step        : KL(q || w),                  q detached              (M9)
    fixed weights      : w_k = mean of q_k, in closed form                    (M10)

and as a policy, pi(y|x) = sum_k w_k pi_k(y|x)                                (M1; in log space M14).

With q from the E-step and detached, the gradient of M8 + M9 is the gradient of -log p (Fisher's identity):
EM on minibatches is SGD on the marginal likelihood, and `log_marginal` is the whole method in one line.
Everything over K is float32 (or float64) log space.
Why EM then? Its responsibilities can be inspected, and they can come from elsewhere: from context pairs, from the start
(start.py), or, for a user with many pairs, from the user's pairs in earlier steps (variants/incremental.py).
M5 is not the Bradley-Terry model of the mixture's log-sum-exp reward (M2), because sigma is applied before the sum over
k and not after it.
"""

import math

import torch
import torch.nn.functional as F

from mixdpo.dpo import log_likelihood


def require_precise(*tensors: torch.Tensor) -> None:
    """Everything over K must be float32 or float64: in bfloat16 the spacing at 300 nats is 2 nats."""
    got = {t.dtype for t in tensors}
    assert got <= {torch.float32, torch.float64}, f"got {got}, want float32 or float64"


def log_joint(log_w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """log w_k + log sigma(h_k): (B,K) or (K,), (B,K) -> (B,K), the summand of M5."""
    require_precise(log_w, h)
    assert h.ndim == 2 and log_w.shape[-1] == h.shape[-1], \
        f"got log_w {tuple(log_w.shape)} and h {tuple(h.shape)}, want (B,K) or (K,), and (B,K)"
    return log_w.to(h.dtype) + log_likelihood(h)


def log_marginal(log_w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """log p(y+ > y- | x) in nats, with gradient: (B,K) or (K,), (B,K) -> (B,).
    The one-line reference for the method (M5)."""
    return torch.logsumexp(log_joint(log_w, h), dim=-1)


# --- E-step -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def e_step(
    log_w: torch.Tensor, h: torch.Tensor, group: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact posterior over experts, without gradient.

    log_w: (B,K) or (K,); h: (B,K). Returns log_marginal (B,) and log_q (B,K) in nats (M7).
    With group (B,) int64 in 0..G-1 all pairs of a group, for example of a user, share one expert (M11): the
    log-likelihoods of its pairs are summed. log_w is per pair; it is equal within a group and counts once.
    Returns log_marginal (G,) and log_q (G,K); the posterior of a pair is log_q[group].
    """
    require_precise(log_w, h)
    if group is None:
        joint = log_joint(log_w, h)                                         # (B,K)
    else:
        joint = pool(log_w, log_likelihood(h), group)                         # (G,K)
    log_p = torch.logsumexp(joint, dim=-1)                                  # (B,) or (G,)  M5
    return log_p, joint - log_p[..., None]                                  # M7, M11


def pool(log_w: torch.Tensor, log_lik: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """log w_k(u) + sum over the pairs i of group u of log_lik_ik (M11): (K,) or (B,K), (B,K), (B,) -> (G,K)."""
    assert group.shape == log_lik.shape[:1], f"got group {tuple(group.shape)} for {log_lik.shape[0]} pairs"
    groups = int(group.max()) + 1
    assert len(group.unique()) == groups, f"groups must be numbered 0..G-1 without holes, got {group.unique().tolist()}"
    first = torch.full((groups,), len(group)).scatter_reduce(0, group.cpu(), torch.arange(len(group)), "amin")
    first = first.to(group.device)                                          # (G,) the first pair of each group
    prior = log_w.to(log_lik.dtype).expand_as(log_lik)                      # (B,K)
    assert torch.equal(prior, prior[first][group]), \
        "log_w differs between the pairs of one group; one group has one latent expert, hence one prior"
    return prior[first].index_add(0, group, log_lik)                        # (G,K)


# --- the bound and the M-step's losses --------------------------------------------------------------------------------


def weighted(log_q: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """sum_k q_k values_k, with 0 times -inf counted as 0 (an expert without weight): (B,K), (B,K) -> (B,)."""
    return (log_q.exp() * values.masked_fill(log_q == -torch.inf, 0.0)).sum(-1)


def elbo(log_q: torch.Tensor, log_w: torch.Tensor, h: torch.Tensor, group: torch.Tensor | None = None) -> torch.Tensor:
    """Evidence lower bound in nats, for any q: (B,K), (B,K) or (K,), (B,K) -> (B,)  (M6).

    With group (B,) int64 in 0..G-1 all pairs of a group share one expert (M11): log_q is (G,K), log_w (G,K) or (K,),
    and the bound (G,). EM maximises it; at the exact posterior it is the log-marginal.
    """
    require_precise(log_q)
    if group is None:
        joint = log_joint(log_w, h)                                         # (B,K)
    else:
        joint = log_w.to(h.dtype) + torch.zeros_like(log_q).index_add(0, group, log_likelihood(h))    # (G,K)  M11
    return weighted(log_q, joint - log_q)                                   # M6


def expert_loss(log_q: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """- sum_k q_k log sigma(h_k), q a constant: (B,K), (B,K) -> (B,)  (M8). With K = 1 it is dpo_loss."""
    require_precise(log_q, h)
    return -weighted(log_q.detach(), log_likelihood(h))                       # M8


def gate_loss(log_q: torch.Tensor, log_w: torch.Tensor) -> torch.Tensor:
    """KL(q || w), q a constant: (B,K), (B,K) or (K,) -> (B,)  (M9)."""
    require_precise(log_q, log_w)
    log_q = log_q.detach()
    return weighted(log_q, log_q - log_w.to(log_q.dtype))                   # M9


def entropy(log_q: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last axis, 0 log 0 = 0: (...,K) -> (...)."""
    return -(log_q.exp() * log_q.masked_fill(log_q == -torch.inf, 0.0)).sum(-1)


def balance(log_w: torch.Tensor) -> torch.Tensor:
    """Entropy of the batch's mean weights: (B,K) -> (), ln K if all experts have the same mean weight. The mean entropy
    of the rows differs: it is largest if every row is uniform. This one can be ln K with sharp rows, too."""
    return entropy(torch.logsumexp(log_w, dim=0) - math.log(max(len(log_w), 1)))


def update_weights(log_q: torch.Tensor, prior: float = 1.0) -> torch.Tensor:
    """Closed-form weights (M10): the mode of a symmetric Dirichlet(prior) after N responsibilities.
    (N,K) -> (K,) log weights.

    w_k = (sum_n q_nk + prior - 1) / (N + K (prior - 1)); prior = 1 is the mean of q.
    prior must be at least 1; below 1 the mode may not exist.
    """
    assert prior >= 1.0, f"Dirichlet prior is {prior}, want at least 1"
    require_precise(log_q)
    counts = torch.logsumexp(log_q, dim=0)                               # (K,) log space: no small weight becomes 0
    if prior > 1.0:
        counts = torch.logaddexp(counts, torch.full_like(counts, math.log(prior - 1.0)))
    return torch.log_softmax(counts, dim=0)                                 # the counts sum to N + K (prior - 1)


# --- the mixture as a policy ------------------------------------------------------------------------------------------


def mixture_logp(log_w: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    """log pi(y|x) = logsumexp_k [ log w_k(x) + log pi_k(y|x) ] in nats: (...,K), (...,K) -> (...)  (M1, M14)."""
    require_precise(log_w, logp)
    return torch.logsumexp(log_w.to(logp.dtype) + logp, dim=-1)


def prefix_log_weights(log_w: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """Weights of the experts before each token, given the tokens so far: (...,K), (...,T,K) -> (...,T,K)  (M14).

    log w_k + sum_{s<t} logps_sk, normalised over k.
    Only with these weights is sum_t logsumexp_k(weights_t + logps_t) equal to mixture_logp.
    """
    require_precise(log_w, logps)
    before = F.pad(logps[..., :-1, :].cumsum(-2), (0, 0, 1, 0))             # sum over s < t
    return torch.log_softmax(log_w.to(logps.dtype)[..., None, :] + before, dim=-1)


def mixture_reward(log_w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """r(x,y) = log sum_k w_k(x) exp r_k(x,y) (M2): (...,K), (...,K) -> (...).
    The likelihood M5 is not Bradley-Terry on it: see the module's docstring."""
    return mixture_logp(log_w, r)
