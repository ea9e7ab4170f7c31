"""A private run: its secret key, its random draws, its noise, and what it says of its guarantee.

    noise-key       the run's secret and a fingerprint of its options; there only while the run is unfinished
    privacy.json    epsilon and delta in all, what they are made of, what they cover and what they do not

Neighbouring files differ in one example: one pair, or one user with all of their pairs. What an example takes part in,
where it starts and which of its pairs are context is drawn under the key from the example's own identity (keys.py), so
a neighbour changes its own example and nothing else.
Left out: what other runs on the same data have spent, unless experts are taken over from them.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mixdpo.config import InputError, lines_of, reading, to_json, write_whole
from mixdpo.plan import Plan
from mixdpo.preferences import Pair
from mixdpo.private.accountant import Mechanism, epsilon_of, noise_multiplier
from mixdpo.private.dp_sgd import NOT_COVERED, Noise, participants
from mixdpo.private.keys import Key, identities

SECRET = "noise-key"
COVERED = "the weights of experts and gate, as eval.py and an export read them, and all that is made of these alone"
NOT_RELEASED = ("metrics.jsonl, responsibilities.jsonl, step-*.jsonl, the responsibilities in checkpoint/, cache/, and "
                "what is printed, warnings among it: made from the data without noise; do not publish them")


# --- the secret -------------------------------------------------------------------------------------------------------


def kept_key(folder: Path, options: dict, resumes: bool) -> Key:
    """The key of an unfinished run: drawn at its first call, found again when it resumes. A key is bound to the run's
    options: with others, a new one is drawn, since two releases must never share noise.

    Raises: InputError if a run resumes and its key is gone.
    """
    path, of = folder / SECRET, hashlib.sha256(to_json(options, sort_keys=True).encode()).hexdigest()
    if path.exists():
        with reading(path, "it is not a key of this program: remove the run, and begin again"):
            found = json.loads(path.read_text())
            if found["options"] == of:
                return Key(bytes.fromhex(found["key"]))
    if resumes:
        raise InputError("is missing or belongs to other options, and the checkpoint beside it was made with it; put "
                         "it back, or remove the folder and begin again", file=path)
    key, part = Key.fresh(), folder / f"{SECRET}.part"
    part.unlink(missing_ok=True)
    with open(part, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(to_json({"key": key.secret.hex(), "options": of}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return key


def drop_key(folder: Path) -> None:
    """Forgets the secret of what is released: nothing is left to draw, and no other release may use it."""
    (folder / SECRET).unlink(missing_ok=True)


def certify(folder: Path, facts: dict | None) -> None:
    """Writes privacy.json, which vouches for a finished private run; None: removes a stale one."""
    if facts is None:
        (folder / "privacy.json").unlink(missing_ok=True)
    else:
        write_whole(folder / "privacy.json", to_json(facts, indent=1) + "\n")


# --- experts of other runs --------------------------------------------------------------------------------------------


def spent_before(config) -> list[dict]:
    """What the runs that --init-experts names have spent: {"run", "epsilon", "delta"} of each, once a run.

    Raises: InputError if one has no privacy.json, or hides another unit: its experts are not covered then.
    """
    runs = [entry.rpartition(":")[0] for entry in config.init_experts.split(",") if entry not in ("", "fresh")]
    found = {}
    for run in runs:
        path = Path(run) / "privacy.json"
        if not path.exists():
            raise InputError(f"{run} was trained without privacy, so --epsilon cannot cover its experts; wanted a run "
                             "with its own privacy.json, or fresh", option="init_experts")
        with reading(path):
            its = json.loads(path.read_text())
            unit, epsilon, delta = its["unit"], float(its["epsilon"]), float(its["delta"])
        if unit != config.privacy_unit:
            raise InputError(f"{run} hides each {unit}, this run each {config.privacy_unit}; the two budgets do not "
                             "add up: choose the same --privacy-unit", option="init_experts")
        found[Path(run).resolve()] = {"run": run, "epsilon": epsilon, "delta": delta}
    return [*found.values()]


# --- a private run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Private:
    """How a run under --epsilon draws, and how much noise it adds."""

    key: Key
    sources: list[dict]             # of spent_before

    def shuffled(self, pairs: list[Pair], group: list[int]) -> list[int]:
        """The pairs of one user in random order; which, depends on this user alone."""
        return self.key.generator("context", pairs[group[0]].user).permutation(group).tolist()

    def start(self, plan: Plan, experts: int, latent: str) -> torch.Tensor:
        """Random log q of each unit (U,K), each row Dirichlet(1) from the unit's own identity."""
        firsts, names = [unit[0] for unit in plan.units], pair_names(plan.pairs)
        names = [plan.pairs[i].user or names[i] if latent == "user" else names[i] for i in firsts]
        q = [self.key.generator("start", latent, name).dirichlet(np.ones(experts)) for name in names]
        return torch.from_numpy(np.log(np.maximum(q, 1e-30))).float()

    def budgeted(self, plan: Plan, config) -> tuple[Plan, Noise, dict]:
        """The plan with steps drawn by Poisson sampling, the noise that keeps the run within its epsilon, and what
        privacy.json says once the run is finished. Raises: InputError."""
        with lines_of(config.data):
            owner, names = examples_of(plan, config.privacy_unit)
        count = config.examples or len(names)
        rate = min(1.0, config.batch / count)
        if (delta := config.delta + sum(run["delta"] for run in self.sources)) * count >= 1:
            raise InputError(f"together {delta:g} for {count} examples; wanted less than {1 / count:.1g}: otherwise "
                             "releasing one example in full would be allowed", option="delta")
        visits = [[] for _ in names]
        for v, n in enumerate(owner.tolist()):
            visits[n].append(v)
        drawn = participants(self.key, names, rate, math.ceil(config.epochs / rate - 1e-9))
        steps = [(int(t * rate), [v for n in taking for v in visits[n]]) for t, taking in enumerate(drawn)]
        sigma = noise_multiplier(config.epsilon, config.delta, rate, len(steps))
        facts = statement(config, self.sources, Mechanism(sigma, rate, len(steps)), count)
        print(f"privacy: epsilon {facts['epsilon']:.4g} at delta {facts['delta']:g} for each of {count} "
              f"{config.privacy_unit}s: noise {sigma:.4g} times --clip {config.clip:g}, rate {rate:.4g}, {len(steps)} "
              f"steps; what that covers will be in {Path(config.out) / 'privacy.json'}")
        noise = Noise(sigma, config.clip, rate * count, self.key)
        return replace(plan, steps=steps, owner=torch.from_numpy(owner)), noise, facts


def pair_names(pairs: list[Pair]) -> list[str]:
    """The identity of each pair: everything that training may read of it."""
    return identities([(p.user, p.domain, p.context, p.prompt, p.chosen, p.rejected) for p in pairs])


def examples_of(plan: Plan, unit: str) -> tuple[np.ndarray, list[str]]:
    """The example of each visit (V,) and the examples' names; unit: pair or user. Raises: InputError."""
    pairs, firsts = plan.pairs, [visit.trained[0] for visit in plan.visits]
    if unit == "user":
        nameless = [pairs[i].line for i in firsts if pairs[i].user is None]
        if nameless:
            raise InputError("names no user; wanted one on every line, since --privacy-unit user hides users",
                             line=nameless[0], option="privacy_unit")
        names = [pairs[i].user for i in firsts]
    else:
        all_names = pair_names(pairs)
        names = [all_names[i] for i in firsts]
    place = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return np.array([place[name] for name in names]), [*place]


def statement(config, sources: list[dict], mechanism: Mechanism, count: int) -> dict:
    """What privacy.json says. Budgets of several runs on the same data add up (basic composition)."""
    own = epsilon_of([mechanism], config.delta)
    return {"epsilon": own + sum(run["epsilon"] for run in sources),
            "delta": config.delta + sum(run["delta"] for run in sources),
            "unit": config.privacy_unit, "examples": count, "rate": mechanism.rate, "steps": mechanism.steps,
            "noise_multiplier": mechanism.sigma, "clip": config.clip,
            "this_run": {"epsilon": own, "delta": config.delta}, "experts_taken_over": sources, "covered": COVERED,
            "not_covered": [f"the reference, --model {config.model}: taken to be public, with its tokenizer. If it was "
                            "trained on these data (an export, or a fine-tuned model), that is not in the budget",
                            *NOT_COVERED, NOT_RELEASED]}
