"""Group-robust DPO over users: the pairs of users who are served worst count more in the experts' loss.

Exponentiated gradient ascent on max_v sum_u v_u loss_u, log v_u <- log v_u + rate loss_u, mean of v = 1 (Sagawa et al.
2020, arXiv 1911.08731, Algorithm 1). The gradient has a loss of every user. For a user without pairs in a step it is
the loss as last seen, so a user's weight depends on the user's losses and not on how often the user appears.
"""

import math

import torch

from mixdpo.config import InputError


class RobustWeights:
    """The weights v of all users and their losses as last seen; row 0 is for pairs that name no user."""

    def __init__(self, user: torch.Tensor, rate: float, data: str):
        """user (V,): each visit's user, 0 if unknown. data: the file, for the error."""
        if not int(user.max()):
            raise InputError("no line names a user, and --robust weighs users; leave it out", data, option="robust")
        self.user, self.rate = user, rate
        seen = user.bincount().clamp_max(1)                                 # 0 only where no visit is of no user
        self.log_v = seen.log().float()                                     # (U+1,) log weights; -inf: nobody's
        self.loss = torch.full_like(self.log_v, math.log(2))                # (U+1,) where experts are the reference
        self.total = torch.zeros(2, len(seen), device=user.device)          # (2,U+1) losses of this step, and pairs

    def weigh(self, loss: torch.Tensor, visits: torch.Tensor) -> torch.Tensor:
        """Each pair's loss times its user's weight: (b,), the visit of each pair (b,) -> (b,)."""
        user = self.user[visits.to(self.user.device)]                       # (b,)
        self.total = self.total.index_add(1, user, torch.stack([loss.detach(), torch.ones_like(loss)]))
        return self.log_v.exp()[user] * loss

    @torch.no_grad()
    def end_step(self) -> None:
        """Moves the weights by the losses that `weigh` has seen since the last step."""
        loss = self.total[0] / self.total[1]                                # 0/0 is NaN: no pairs in this step
        self.loss = torch.where(loss.isnan(), self.loss, loss)
        log_v = self.log_v + self.rate * self.loss
        self.log_v = log_v - torch.logsumexp(log_v, dim=0) + math.log(int(log_v.isfinite().sum()))
        self.total = torch.zeros_like(self.total)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it."""
        return {"log_v": self.log_v, "user_loss": self.loss}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        self.log_v, self.loss = (tensors[name].to(self.user.device) for name in ("log_v", "user_loss"))
