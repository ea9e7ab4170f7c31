"""Which functions of the EM step a run's options replace, and what these carry from step to step.

    label noise      margins      label_noise.py
    rankings         margins      rankings.py
    incremental EM   prior        incremental.py
    E-step variants  vary         e_steps.py
    robust weights   weigh        robust.py
    privacy          accumulate   ../private/step.py
"""

import math
from typing import Any

import torch

from mixdpo.config import InputError, as_flag
from mixdpo.dpo import margins
from mixdpo.mixture import expert_loss
from mixdpo.plan import Plan
from mixdpo.preferences import Pair
from mixdpo.private.dp_sgd import ClippedSum, Noise
from mixdpo.private.step import clip_examples, clipped_share
from mixdpo.variants.e_steps import SAMPLED, vary, visit_noise
from mixdpo.variants.incremental import Incremental
from mixdpo.variants.label_noise import noisy_margins
from mixdpo.variants.rankings import ranking_margins
from mixdpo.variants.robust import RobustWeights


class Variants:
    """The parts of EM that config's options replace. user (U,): each unit's user, 0 if unknown. noise: of a private
    run. parameters: those that learn. processes: what a run of several processes replaces (runs/distributed.py)."""

    def __init__(self, config, plan: Plan, user: torch.Tensor, noise: Noise | None, parameters: list, processes=None):
        self.config, self.noise, self.parameters, self.processes = config, noise, parameters, processes
        self.clipped: ClippedSum | None = None                              # of the last step
        self.margins = choose_margins(config, plan.pairs)
        self.incremental = Incremental(plan, config.experts) if config.em == "incremental" else None
        of_visit = user[plan.unit_of.to(user.device)]                       # (V,)
        self.robust = RobustWeights(of_visit, config.robust, config.data) if config.robust else None
        self.carries = [part for part in (self.incremental, self.robust) if part is not None]

    def functions(self, t: int, log_likelihoods) -> dict:
        """The arguments of train.EM for step t. log_likelihoods() -> those of all visits (V,K), by a pass over them."""
        config = self.config
        found: dict[str, Any] = {"margins": self.margins, "clip": config.clip if self.noise is None else math.inf}
        if self.incremental:
            if t >= config.known_steps and self.incremental.table.isnan().any():
                self.incremental.table = log_likelihoods()
            found["prior"] = self.incremental.prior
        if self.incremental or config.variant != "exact":
            found["vary"] = lambda log_q, prior, visits: self.vary(t, log_q, prior, visits)
        if self.robust:
            found["weigh"] = self.robust.weigh
        if self.noise:
            self.clipped = ClippedSum(self.parameters, self.noise, t)
            found["accumulate"] = clip_examples(self.clipped, config.experts)
        if self.processes:
            if self.clipped:
                self.clipped.over_processes = self.processes.summed
            self.width = config.experts if self.incremental and t < self.incremental.plan.last_part else 0
            found["accumulate"] = self.processes.accumulate(self, found.get("accumulate"))
        return found

    def noted(self, visits: torch.Tensor) -> torch.Tensor:
        """What this process has noted of some visits (n,) in this step, for the other processes: (n,D), D = 0 or K."""
        return self.incremental.table[visits] if self.incremental and self.width else torch.empty(len(visits), 0)

    def note(self, visits: torch.Tensor, log_q: torch.Tensor, h: torch.Tensor, noted: torch.Tensor) -> None:
        """Notes all pairs of the step in the place of this process's: their visits (B,), log_q and h (B,K), `noted`."""
        if self.incremental and self.width:
            self.incremental.table = self.incremental.table.index_copy(0, visits, noted.cpu())
        if self.robust:
            self.robust.total.zero_()
            self.robust.weigh(expert_loss(log_q, h), visits)

    def vary(self, t: int, log_q: torch.Tensor, prior: torch.Tensor, visits: torch.Tensor) -> torch.Tensor:
        """The responsibilities that the M-step of step t uses: exact ones of some visits (g,K) -> (g,K)."""
        config, noise = self.config, None
        if self.incremental:
            self.incremental.keep(log_q, prior, visits)
        if config.variant in SAMPLED:
            noise = visit_noise(config.seed, t, visits, config.draws, config.experts).to(log_q.device)
        return vary(log_q, config.variant, noise, config.variant_temperature)

    def end_step(self) -> dict:
        """To be called after each step; returns figures to log."""
        if self.robust:
            self.robust.end_step()
        return {"clipped": clipped_share(self.clipped)} if self.clipped else {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""
        return {name: x for part in self.carries for name, x in part.tensors().items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        for part in self.carries:
            part.load(tensors)



def choose_margins(config, pairs: list[Pair]):
    """The `margins` of train.EM: of pairs, of noisy pairs, or of rankings, if the file has any. Raises: InputError if
    an option does not support rankings."""
    first = next((pair for pair in pairs if pair.order != (0, 1)), None)
    if first is None:
        if config.label_noise:
            return noisy_margins(config.label_noise)
        return lambda logp, ref_logp, beta, order: margins(logp, ref_logp, beta)
    for option, given in (("label_noise", config.label_noise > 0), ("epsilon", config.epsilon < math.inf)):
        if given:
            raise InputError(f"is a ranking or a tie, which {as_flag(option)} does not support: wanted chosen and "
                             "rejected in every line", file=first.file or config.data, line=first.line, option=option)
    return ranking_margins
