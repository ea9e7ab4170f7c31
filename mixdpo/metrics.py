"""What training reports at each step.

    loss                M8, mean over the step's pairs
    bound               ELBO (M6, M11) in nats, mean over the step's visits, under the parameters before the update and
                        the responsibilities in use: what EM maximises. A visit is a pair; with one latent per user it
                        is all of a user's pairs
    gap                 log-marginal minus bound, mean over visits: KL(q || posterior given the pairs of the visit that
                        are trained on), 0 if q is that posterior
    rewards/chosen      sum_k q_k beta (log pi_k - log pi_ref(k))(y+ | x), mean over pairs: the chosen response's reward
    rewards/rejected    (M3, without beta log Z, as DPO's trainers report it), weighted by the responsibilities in use;
                        the same for y-. With K = 1 it is DPO's
    rewards/margins     chosen minus rejected reward; rewards/accuracies: the share of pairs where it is positive, a tie
                        counts one half. The responsibilities have seen the labels; accuracy_mbt's weights have not
    logps/chosen        sum_k q_k log pi_k(y+ | x), nats per response, mean over pairs; logps/rejected: of y-
    effective experts   exp(entropy of the mean responsibilities): K if all experts are used equally, 1 if only one is
    information         I(z; x) = entropy of the mean weights minus mean entropy of the weights: what the gate knows

None of these shows on training pairs whether K experts are of use: experts that memorise explain their pairs. That is
tested on held-out choices (evaluation/collapse.py). Standard errors are in evaluation/statistics.py.
"""

import math

import torch

from mixdpo.dpo import accuracy, log_likelihood, mixture_accuracy
from mixdpo.mixture import balance, elbo, entropy, expert_loss, gate_loss, log_marginal, weighted


def effective_experts(log_q: torch.Tensor) -> float:
    """exp of the entropy of the mean responsibilities: (N,K) -> number in 1..K."""
    return math.exp(entropy(log_q.exp().mean(0).log()))


@torch.no_grad()
def chosen_and_rejected(log_q: torch.Tensor, logp: torch.Tensor, ref_logp: torch.Tensor, beta: float) -> torch.Tensor:
    """Rewards of chosen and rejected, then their log-probs, each sum_k q_k of the experts': log_q (B,K), logp (B,K,2),
    ref_logp (B,1,2) or (B,K,2) -> (B,4), nats. Of a ranking: its best two responses."""
    rewards = beta * (logp - ref_logp.to(logp))                             # (B,K,2)  M3, without beta log Z
    return torch.cat([weighted(log_q[:, None], x[..., :2].mT) for x in (rewards, logp)], dim=1)     # (B,2) each


@torch.no_grad()
def bound_summary(bound: torch.Tensor, log_w: torch.Tensor, h: torch.Tensor, group: torch.Tensor) -> dict:
    """The bound (G,) of a step's visits, and its gap. log_w (G,K); h (B,K) of pairs, group (B,) of each."""
    log_p = torch.logsumexp(log_w.to(h.dtype).index_add(0, group, log_likelihood(h)), dim=-1)       # (G,)  M5, M11
    return {"bound": bound.mean().item(), "gap": (log_p - bound).mean().item()}


@torch.no_grad()
def step_summary(log_q: torch.Tensor, log_w: torch.Tensor, h: torch.Tensor, texts: torch.Tensor) -> dict:
    """The figures of a step from its trained pairs: log_q (B,K) as the M-step used it, log_w (B,K) of the gate,
    h (B,K) before the update, texts (B,4) of chosen_and_rejected.

    All are means over pairs. log_marginal (M5) is per pair even if the latent unit is a user; elbo is for the
    responsibilities in use.
    """
    log_p, margin = log_marginal(log_w, h), texts[:, 0] - texts[:, 1]       # (B,) each
    return {
        "loss": expert_loss(log_q, h).mean().item(),
        "log_marginal": log_p.mean().item(),
        "elbo": elbo(log_q, log_w, h).mean().item(),
        "accuracy": accuracy(h).mean(0).tolist(),                           # of each expert on all pairs of the step
        "accuracy_mbt": mixture_accuracy(log_p).mean().item(),              # of the mixture of Bradley-Terry: p > 1/2
        "margin": h.mean(0).tolist(),
        "q": log_q.exp().mean(0).tolist(),
        "q_entropy": entropy(log_q).mean().item(),
        "q_gain": gate_loss(log_q, log_w).mean().item(),                    # KL(q || w): what the pairs tell about z
        "effective_experts": effective_experts(log_q),
        "w": log_w.exp().mean(0).tolist(),
        "gate_entropy": entropy(log_w).mean().item(),                       # of a pair's weights, on average
        "gate_information": balance(log_w).item() - entropy(log_w).mean().item(),          # I(z; x)
        **dict(zip(("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"), texts.mean(0).tolist())),
        "rewards/margins": margin.mean().item(),
        "rewards/accuracies": accuracy(margin).mean().item(),
    }
