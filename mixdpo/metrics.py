"""What training reports at each step.

    loss                M8, mean over the step's pairs
    bound               ELBO (M6, M11) in nats, mean over the step's visits, under the parameters before the update and
                        the responsibilities in use: what EM maximises. A visit is a pair; with one latent per user it
                        is all of a user's pairs
    effective experts   exp(entropy of the mean responsibilities): K if all experts are used equally, 1 if only one is
    information         I(z; x) = entropy of the mean weights minus mean entropy of the weights: what the gate knows

None of these shows on training pairs whether K experts are of use: experts that memorise explain their pairs. That is
tested on held-out choices (evaluation/collapse.py). Standard errors are in evaluation/statistics.py.
"""

import math

import torch

from mixdpo.dpo import accuracy, mixture_accuracy
from mixdpo.mixture import balance, elbo, entropy, expert_loss, gate_loss, log_marginal


def effective_experts(log_q: torch.Tensor) -> float:
    """exp of the entropy of the mean responsibilities: (N,K) -> number in 1..K."""
    return math.exp(entropy(log_q.exp().mean(0).log()))


@torch.no_grad()
def step_summary(log_q: torch.Tensor, log_w: torch.Tensor, h: torch.Tensor) -> dict:
    """The figures of a step from its trained pairs: log_q (B,K) as the M-step used it, log_w (B,K) of the gate,
    h (B,K) before the update.

    All are means over pairs. log_marginal (M5) is per pair even if the latent unit is a user; elbo is for the
    responsibilities in use.
    """
    log_p = log_marginal(log_w, h)
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
    }
