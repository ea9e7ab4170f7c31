"""The privacy budget of a run: which steps and how much noise keep it, and what is said of it.

    noise-seed      of sampling and noise, its owner's alone; there until nothing is left to draw
    privacy.json    epsilon and what it was made of, what it covers and what it does not

Left out: what other runs on the same data have spent.
"""

import json
import os
from pathlib import Path

from mixdpo.accountant import Mechanism, epsilon_of, noise_multiplier
from mixdpo.config import write_whole
from mixdpo.plan import Plan, sampled
from mixdpo.privacy import NOT_COVERED, Noise, secret_seed

SECRET = "noise-seed"
COVERED = "the weights of experts and gate, as eval.py and an export read them, and all that is made of these alone"
NOT_RELEASED = ("metrics.jsonl, responsibilities.jsonl, the responsibilities in checkpoint/, cache/, what is printed: "
                "they are made of the data without noise, and stay at home")


def kept_seed(folder: Path, given: int) -> int:
    """The seed of a run's sampling and noise, drawn at first (`given` as for secret_seed), found again afterwards."""
    path, part = folder / SECRET, folder / f"{SECRET}.part"
    if not path.exists():
        with open(part, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(f"{secret_seed(given)}\n")
        os.replace(part, path)
    return int(path.read_text())


def budgeted(plan: Plan, config) -> tuple[Plan, Noise]:
    """The plan with steps drawn by chance, and the noise that keeps a TrainConfig's run within its epsilon. Writes
    privacy.json. Raises: InputError."""
    out = Path(config.out)
    seed = kept_seed(out, config.noise_seed)
    plan = sampled(plan, config, seed)
    examples, steps = len(set(plan.owner.tolist())), len(plan.steps)
    sigma = noise_multiplier(config.epsilon, config.delta, plan.rate, steps)
    spent = epsilon_of([Mechanism(sigma, plan.rate, steps)], config.delta)
    told = {"epsilon": spent, "delta": config.delta, "unit": config.privacy_unit, "examples": examples,
            "rate": plan.rate, "steps": steps, "noise_multiplier": sigma, "clip": config.clip, "covered": COVERED,
            "not_covered": [*NOT_COVERED, NOT_RELEASED]}
    write_whole(out / "privacy.json", json.dumps(told, indent=1) + "\n")
    print(f"privacy: epsilon {spent:.4g} at delta {config.delta:g} for each of {examples} {config.privacy_unit}s: "
          f"noise {sigma:.4g} times --clip {config.clip:g}, rate {plan.rate:.4g}, {steps} steps; what that covers is "
          f"in {out / 'privacy.json'}")
    return plan, Noise(sigma, config.clip, plan.rate * examples, seed)
