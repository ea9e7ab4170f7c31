"""Incremental EM (Neal & Hinton 1998): a user's pairs need not be in one batch.

A user with many pairs is visited in slices. Each visit leaves its log-likelihoods, sum_i log sigma(h_ik), in a table.
The prior of a slice is

    log w_k(u) + the log-likelihoods of the user's other slices at their last visit                 (M11, incremental)

so its posterior is the user's. Only its own log-likelihoods are fresh.
"""

import torch

from mixdpo.plan import Plan


class Incremental:
    """The table of log-likelihoods (E,K), one row a visit with an E-step, NaN before the first."""

    def __init__(self, plan: Plan, experts: int):
        self.plan, self.table = plan, torch.full((plan.inferred, experts), torch.nan)

    def prior(self, log_w: torch.Tensor, visits: torch.Tensor) -> torch.Tensor:
        """log w (G,K) of some visits (G,) -> the prior of each slice (G,K)  (M11, incremental)."""
        units = self.plan.unit_of[visits]
        others = self.plan.pooled(self.table)[units] - self.table[visits].nan_to_num(0.0)       # 0 for a whole unit
        return torch.log_softmax(log_w + others.to(log_w.device), dim=-1)

    def keep(self, log_q: torch.Tensor, prior: torch.Tensor, visits: torch.Tensor) -> None:
        """Notes the log-likelihoods of some visits, up to a constant a row: their posterior less their prior (G,K)."""
        self.table = self.table.index_copy(0, visits, (log_q - prior).nan_to_num(0.0).cpu())    # -inf - -inf: weight 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it."""
        return {"kept": self.table}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        self.table = tensors["kept"]
