"""Early stopping: held-out choices are predicted every few steps, and the parameters that predict them best are kept.

    --validation FILE       held-out preferences; users may be those of the training file or others
    --evaluate-every N      steps between two evaluations

The figure is the log-likelihood of the file's choices, nats per pair, when nothing is known of the user who made them:
log sum_k w_k prod_i sigma(h_ik), i over the user's pairs (M11; M5 without --latent user). validation.jsonl has a line
for each evaluation. The best parameters so far are in best.safetensors, with their step and figure. They are put back
when the run ends, and before the last E-step, so that the responsibilities belong to them. The file is used to choose
the number of steps, so it is no longer held out for anything else.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mixdpo.config import to_json, write_text
from mixdpo.files.atomic import read_tensors, write_tensors
from mixdpo.gates import Gate, Inputs
from mixdpo.mixture import e_step
from mixdpo.plan import Plan
from mixdpo.preferences import Pair, groups, order_of
from mixdpo.runs.checkpoint import gate_state, load_gate, load_state, trained_state
from mixdpo.runs.distributed import rank
from mixdpo.runs.expert_parallel import collected
from mixdpo.runs.parallel import logp_in_parts


@dataclass
class Validation:
    """The held-out pairs of a run, and its evaluations so far."""

    out: Path                       # the run's directory
    every: int                      # steps
    pairs: list[Pair]
    ref_logp: torch.Tensor          # (P,1,2) or (P,K,2)
    inputs: Inputs                  # (P,...) what the gate reads
    latent: str
    margins: Callable               # as train.EM's
    beta: float
    history: list[dict] = field(default_factory=list)
    best: dict | None = None        # step and figure of best.safetensors; after a kill its step may be above the run's

    def after(self, t: int, experts, gate: Gate, plan: Plan) -> None:
        """To be called after step t: evaluates if it is due, and puts the best parameters back where a part ends."""
        ends = t in (plan.last_part, len(plan.steps))
        if t % self.every == 0 or ends:
            self.evaluate(t, experts, gate)
        if ends and self.best and self.best["step"] != t:
            tensors, _ = read_tensors(self.out / "best.safetensors")
            load_state(experts, tensors, self.out)
            load_gate(gate, tensors)
            now = self.history[-1]["log_likelihood"]
            print(f"early stopping: the parameters of step {self.best['step']} predict the validation file best "
                  f"({self.best['log_likelihood']:.4f} nats per pair; after step {t} {now:.4f}), and are put back")

    @torch.no_grad()
    def evaluate(self, t: int, experts, gate: Gate) -> None:
        """Predicts the file's choices, notes the figure, and keeps the parameters if they are the best so far."""
        self.history = [row for row in self.history if row["step"] < t]     # a resumed run repeats steps
        units = groups(self.pairs, self.latent)
        index = torch.tensor([i for unit in units for i in unit])
        group = torch.tensor([g for g, unit in enumerate(units) for _ in unit])
        h = self.margins(self.log_probs(experts), self.ref_logp, self.beta, order_of(self.pairs))[index]  # (P,K)  M4
        log_w = gate(self.inputs).cpu()[index]
        first = log_w[torch.searchsorted(group, group)]                     # one prior for each unit
        figure = float(e_step(first, h, group)[0].sum()) / len(index)       # M5, M11
        self.history.append({"step": t, "log_likelihood": figure})
        tensors = collected(experts, trained_state(experts) | gate_state(gate))
        if self.best is None or figure > self.best["log_likelihood"]:
            self.best = self.history[-1]
            if rank() == 0:
                write_tensors(self.out / "best.safetensors", tensors, self.best)
        if rank() == 0:
            write_text(self.out / "validation.jsonl", "".join(to_json(row) + "\n" for row in self.history))

    def log_probs(self, experts) -> torch.Tensor:
        """Summed response log-probs of all pairs under every expert: (P,K,2) float32 nats, on the CPU."""
        return logp_in_parts(experts, self.pairs, f"{self.out.name} validation")

    def load(self, t: int) -> None:
        """Reads the evaluations of the first t steps of a run that is resumed, and what best.safetensors holds."""
        path = self.out / "validation.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.history = [row for row in rows if row["step"] <= t]
        if (kept := self.out / "best.safetensors").exists():
            _, self.best = read_tensors(kept)
