"""What training reports at each step, and the warnings that it gives.

    loss                M8, mean over the step's pairs
    bound               ELBO (M6, M11) in nats, mean over the step's visits, under the parameters before the update and
                        the responsibilities in use: what EM maximises. A visit is a pair; with one latent per user it
                        is all of a user's pairs
    effective experts   exp(entropy of the mean responsibilities): K if all experts are used equally, 1 if only one is
    information         I(z; x) = entropy of the mean weights minus mean entropy of the weights: what the gate knows
    posterior collapse  responsibilities equal the weights in every batch: the pairs show nothing about who judged them
    expert collapse     weights or responsibilities are all on one expert: the other experts learn nothing

Standard errors and other statistics of results are in evaluation/statistics.py.
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


WINDOW = 20     # steps that a warning looks back


def alarms(metrics, experts: int, start_steps: int, window: int = WINDOW) -> dict[str, str]:
    """Warnings about collapse: name -> what is wrong and what to do. They look at the last `window` steps after the
    first `start_steps`; {} while there are fewer. A step without pairs, which DP-SGD's sampling may draw, has no
    figures and is skipped.

    Posterior collapse: KL(q || w) is below a hundredth of ln K while the weights' entropy is above half of ln K.
    Expert collapse: one expert has over 0.95 of all weight or of all responsibilities.
    """
    recent = [step for step in metrics if step["step"] > start_steps and step.get("pairs", 1)][-window:]
    if experts == 1 or len(recent) < window:
        return {}

    def share(key) -> float:
        return sum(key(step) for step in recent) / window / math.log(experts)

    found = {}
    if share(lambda step: step["q_gain"]) < 0.01 and share(lambda step: step["gate_entropy"]) > 0.5:
        found["posterior collapse"] = (
            f"for {window} steps the responsibilities have equalled the mixture weights: the pairs say nothing about "
            "their types. The experts may be equal, or the margins too small. If not used already, --start linear and "
            "--latent user help; so do a larger --beta and larger learning rates")
    if max(sum(step[what][k] for step in recent) / window for what in ("w", "q") for k in range(experts)) > 0.95:
        found["expert collapse"] = (
            f"for {window} steps one expert has had over 0.95 of the weight, so the other experts learn nothing. Raise "
            "--gate-entropy or --gate-balance, start with --gate-temperature above 1, or lower --gate-lr")
    return found
