"""A private run: its secret key, its random draws, its noise, and the statement of its guarantee.

    noise-key       the run's secret and a fingerprint of its options; exists only while the run is unfinished
    privacy.json    total epsilon and delta, their parts, what they cover and what they do not cover

Neighbouring files differ in one example: one pair, or one user with all of their pairs. The draws for an example (the
steps in which it takes part, its first responsibilities, its context pairs) depend on the key and on the example's
identity (keys.py). So adding an example does not change the draws of the others.
Left out: the budget of other runs on the same data, except runs from which experts are taken.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mixdpo.config import InputError, lines_of, reading, to_json, write_text
from mixdpo.files.atomic import replacing
from mixdpo.plan import Plan
from mixdpo.preferences import Pair
from mixdpo.private.accountant import Mechanism, epsilon_of, noise_multiplier
from mixdpo.private.dp_sgd import NOT_COVERED, Noise, participants
from mixdpo.private.keys import Key, identities

SECRET = "noise-key"
COVERED = "the weights of experts and gate, as eval.py and an export read them, and all that is computed from them only"
NOT_RELEASED = ("metrics.jsonl, responsibilities.jsonl, step-*.jsonl, the responsibilities in checkpoint/, cache/, and "
                "printed output with its warnings: computed from the data without noise; do not publish them")


# --- the secret -------------------------------------------------------------------------------------------------------


def load_or_create_key(folder: Path, options: dict, resumes: bool) -> Key:
    """The key of an unfinished run: drawn when the run starts, read again when it resumes.

    The key is stored with a fingerprint of the run's options. With other options a new key is drawn, because two
    releases must never share noise. Raises: InputError if a run resumes and its key is missing; OSError.
    """
    path, fingerprint = folder / SECRET, hashlib.sha256(to_json(options, sort_keys=True).encode()).hexdigest()
    if path.exists():
        with reading(path, "it is not a key of this program: remove the run and start again"):
            found = json.loads(path.read_text())
            if found["options"] == fingerprint:
                return Key(bytes.fromhex(found["key"]))
    if resumes:
        raise InputError("is missing or belongs to other options, but the checkpoint in this folder needs it; restore "
                         "it, or remove the folder and start again", file=path)
    key = Key.fresh()
    with replacing(path) as part:
        with open(part, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:   # its owner's only
            file.write(to_json({"key": key.secret.hex(), "options": fingerprint}) + "\n")
    return key


def delete_key(folder: Path) -> None:
    """Deletes the secret when the run is released: it is no longer needed, and no other release may use it."""
    (folder / SECRET).unlink(missing_ok=True)


def write_guarantee(folder: Path, facts: dict | None) -> None:
    """Writes privacy.json, the guarantee of a finished private run. None removes a file of an earlier run."""
    if facts is None:
        (folder / "privacy.json").unlink(missing_ok=True)
    else:
        write_text(folder / "privacy.json", to_json(facts, indent=1) + "\n")


# --- experts of other runs --------------------------------------------------------------------------------------------


def budgets_of_sources(config) -> list[dict]:
    """The budgets of the runs in --init-experts: {"run", "epsilon", "delta"} of each; each run counts once.

    Raises: InputError if a run has no privacy.json, or another privacy unit: then its experts are not covered.
    """
    runs = [entry.rpartition(":")[0] for entry in config.init_experts.split(",") if entry not in ("", "fresh")]
    found = {}
    for run in runs:
        path = Path(run) / "privacy.json"
        if not path.exists():
            raise InputError(f"{run} was trained without privacy, so --epsilon cannot cover its experts; use a run "
                             "that has a privacy.json, or fresh", option="init_experts")
        with reading(path):
            facts = json.loads(path.read_text())
            unit, epsilon, delta = facts["unit"], float(facts["epsilon"]), float(facts["delta"])
        if unit != config.privacy_unit:
            raise InputError(f"{run} protects each {unit}, this run each {config.privacy_unit}, and such budgets "
                             "cannot be added; choose the same --privacy-unit", option="init_experts")
        found[Path(run).resolve()] = {"run": run, "epsilon": epsilon, "delta": delta}
    return [*found.values()]


# --- a private run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Private:
    """The random draws and the noise of a run with --epsilon."""

    key: Key
    sources: list[dict]             # from budgets_of_sources

    def shuffled(self, pairs: list[Pair], group: list[int]) -> list[int]:
        """The pairs of one user in random order. The order depends only on the key and the user."""
        user = pairs[group[0]].user
        assert user is not None, f"got a pair without a user, line {pairs[group[0]].line}; want groups of users"
        return self.key.generator("context", user).permutation(group).tolist()

    def start(self, plan: Plan, experts: int, latent: str) -> torch.Tensor:
        """Random log q (U,K). Each unit's row is drawn from Dirichlet(1) by the key and the unit's identity."""
        firsts, names = [unit[0] for unit in plan.units], pair_names(plan.pairs)
        names = [plan.pairs[i].user or names[i] if latent == "user" else names[i] for i in firsts]
        q = [self.key.generator("start", latent, name).dirichlet(np.ones(experts)) for name in names]
        return torch.from_numpy(np.log(np.maximum(q, 1e-30))).float()

    def budgeted(self, plan: Plan, config) -> tuple[Plan, Noise, dict]:
        """-> the plan with steps drawn by Poisson sampling; the noise that keeps the run within epsilon; the content
        of privacy.json for the finished run. Raises: InputError."""
        with lines_of(config.data):
            owner, names = examples_of(plan, config.privacy_unit)
        count = config.examples or len(names)
        rate = min(1.0, config.batch / count)
        if (delta := config.delta + sum(run["delta"] for run in self.sources)) * count >= 1:
            raise InputError(f"together {delta:g} for {count} examples, wanted less than {1 / count:.1g}: otherwise "
                             "releasing one example in full would be allowed; lower it", option="delta")
        visits: list[list[int]] = [[] for _ in names]
        for v, n in enumerate(owner.tolist()):
            visits[n].append(v)
        drawn = participants(self.key, names, rate, math.ceil(config.epochs / rate - 1e-9))
        steps = [(int(t * rate), [v for n in examples for v in visits[n]]) for t, examples in enumerate(drawn)]
        sigma = noise_multiplier(config.epsilon, config.delta, rate, len(steps))
        facts = statement(config, self.sources, Mechanism(sigma, rate, len(steps)), count)
        print(f"privacy: epsilon {facts['epsilon']:.4g} at delta {facts['delta']:g} for each of {count} "
              f"{config.privacy_unit}s: noise {sigma:.4g} times --clip {config.clip:g}, rate {rate:.4g}, {len(steps)} "
              f"steps; {Path(config.out) / 'privacy.json'} will list what this covers")
        noise = Noise(sigma, config.clip, rate * count, self.key)
        return replace(plan, steps=steps, owner=torch.from_numpy(owner)), noise, facts


def pair_names(pairs: list[Pair]) -> list[str]:
    """The identity of each pair, from all of its fields that training may read."""
    return identities([(p.user, p.domain, p.context, p.prompt, p.chosen, p.rejected) for p in pairs])


def examples_of(plan: Plan, unit: str) -> tuple[np.ndarray, list[str]]:
    """-> the example's index for each visit (V,), and the examples' names. unit: "pair" or "user".
    Raises: InputError if the unit is the user and a pair has none."""
    pairs, firsts = plan.pairs, [visit.trained[0] for visit in plan.visits]
    if unit == "user":
        names = [user for i in firsts if (user := pairs[i].user) is not None]
        if len(names) < len(firsts):
            nameless = next(pairs[i] for i in firsts if pairs[i].user is None)
            raise InputError("no user in this line, wanted one in every line for --privacy-unit user; add it",
                             nameless.file, nameless.line, option="privacy_unit")
    else:
        all_names = pair_names(pairs)
        names = [all_names[i] for i in firsts]
    place = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return np.array([place[name] for name in names]), [*place]


def statement(config, sources: list[dict], mechanism: Mechanism, count: int) -> dict:
    """The content of privacy.json. Budgets of several runs on the same data add up (basic composition).

    sources: from budgets_of_sources; count: the number of examples."""
    own = epsilon_of([mechanism], config.delta)
    return {"epsilon": own + sum(run["epsilon"] for run in sources),
            "delta": config.delta + sum(run["delta"] for run in sources),
            "unit": config.privacy_unit, "examples": count, "rate": mechanism.rate, "steps": mechanism.steps,
            "noise_multiplier": mechanism.sigma, "clip": config.clip,
            "this_run": {"epsilon": own, "delta": config.delta}, "experts_taken_over": sources, "covered": COVERED,
            "not_covered": [f"the reference, --model {config.model}, and its tokenizer: taken to be public. If it was "
                            "trained on these data (an export, or a fine-tuned model), the budget does not include "
                            "that", *NOT_COVERED, NOT_RELEASED]}
