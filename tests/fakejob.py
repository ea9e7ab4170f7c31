"""A made-up job directory with the files that data.imdb, train.py and eval.py write, and numbers from a seed."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from mixdpo.runs.options import TrainConfig

NAMES = ["sentiment", "informativeness", "grammar"]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def figure(values) -> dict:
    """{"mean", "se", "n"}, in NumPy's words."""
    values = np.asarray(values, dtype=float)
    return {
        "mean": values.mean(),
        "se": values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan,
        "n": len(values),
    }


def make_job(
    home,
    runs=None,
    judges=("sentiment", "informativeness"),
    users=4,
    each=3,
    prompts=7,
    steps=6,
    seed=0,
    heldout=True,
    completions=True,
    named=True,
):
    """runs: name -> (K, latent). The judges take turns over the users; user u's pairs are apart in the file."""
    home, rng = Path(home), np.random.default_rng(seed)
    runs = {"dpo": (1, "pair"), "mix-pair": (2, "pair"), "mix-user": (2, "user")} if runs is None else runs
    home.mkdir(parents=True, exist_ok=True)
    pairs = [
        {
            "prompt": "p",
            "chosen": "c",
            "rejected": "r",
            "user": f"u{n % users}",
            "annotator": judges[n % users % len(judges)],
        }
        for n in range(users * each)
    ]
    if not named:
        pairs = [{k: v for k, v in pair.items() if k != "annotator"} for pair in pairs]
    write(home / "train.jsonl", pairs)
    results = {
        "environment": {"revision": "abc123+", "torch": "2.13.0", "device": "a device", "threads": 2},
        "config": {"seed": 1, "temperature": 1.0, "batch": 64},
        "preferences": {},
        "policies": {},
        "own_reward": [],
        "trained_rewards": list(judges),
    }
    for name, (K, latent) in runs.items():
        make_run(home / name, K, latent, pairs, users, steps, rng)
        if heldout:
            results["preferences"][name] = held_out(K, list(judges) if named else ["all"], rng)
    if heldout:
        write(home / "heldout.jsonl", pairs)
    if completions:
        make_completions(home, results, runs, prompts, judges, rng)
        if set(judges) <= set(NAMES):
            results["own_reward"] = own_rewards(home, runs, prompts, judges, rng)
    (home / "results.json").write_text(json.dumps(results))
    (home / "reference").mkdir(exist_ok=True)
    (home / "reference/config.json").write_text(json.dumps({"model_type": "llama"}))
    (home / "reference/finetune.json").write_text(
        json.dumps({"perplexity_before": 33.123, "perplexity_after": 28.456, "settings": {"model": "smollm2"}})
    )
    return home


def make_run(path, K, latent, pairs, users, steps, rng):
    path.mkdir(exist_ok=True)
    config = TrainConfig("elsewhere/train.jsonl", "elsewhere/reference", str(path), experts=K, latent=latent,
                         start="linear", start_steps=2, epochs=2, batch=6)
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    metrics, logged, groups = [], [], users if latent == "user" else len(pairs)
    kinds = list(dict.fromkeys(pair.get("annotator", "all") for pair in pairs))
    for t in range(1, steps + 1):
        part = t / steps
        metrics.append(
            {
                "step": t,
                "loss": 0.7 - 0.3 * part + 0.03 * rng.normal(),
                "log_marginal": -0.7 + 0.3 * part,
                "accuracy": rng.uniform(0.4, 0.9, K).tolist(),
                "accuracy_mbt": rng.uniform(0.5, 0.9),
                "margin": (part * np.arange(1, K + 1)).tolist(),
                "effective_experts": 1 + (K - 1) * rng.uniform(0.8, 1),
            }
        )
        ids = sorted(rng.choice(groups, max(1, groups // 2), replace=False).tolist())
        q = []
        for g in ids:
            kind = kinds.index(pairs[g].get("annotator", "all"))  # users and pairs begin alike
            level = rng.normal(0, 1, K) + 4 * part * (np.arange(K) == kind % K)
            q.append(np.round(np.exp(level) / np.exp(level).sum(), 4).tolist())
        logged.append({"step": t, "groups": ids, "q": q})
    write(path / "metrics.jsonl", metrics)
    write(path / "responsibilities.jsonl", logged)


def held_out(K, kinds, rng, n=40):
    of = {
        kind: [figure(rng.random(n + 7 * i) < 0.5 + 0.2 * ((i - k) % len(kinds) == 0)) for k in range(K)]
        for i, kind in enumerate(kinds)
    }
    aligned = [{}, {}]  # of the training groups, of the held-out pairs
    if len(kinds) > 1:
        naming = {str(k): kinds[k] if k < len(kinds) else None for k in range(K)}
        for n in range(2):
            found = ("ari", "matched", "bayes_ari", "bayes_matched")
            aligned[n] = {name: rng.uniform(0, 1) for name in found} | {"units": 12 + n, "naming": naming}
    near = {"accuracy_mbt": 0.6, "accuracy_own": 0.65, "log_likelihood": -0.68, "log_likelihood_own": -0.66,
            "log_likelihood_calibrated": -0.65}
    return {
        "experts": K,
        "weights": [1 / K] * K,
        "accuracy": of,
        "types": {kind: {name: figure(rng.normal(level, 0.1, 30)) for name, level in
                         (("accuracy", 0.6), ("log_likelihood", -0.68), ("own_expert", 0.62))} for kind in kinds},
        "conflicts": figure(rng.random(20) < 0.6) if len(kinds) > 1 else None,
        "conflicts_by_pair": (rng.random(20) < 0.6).astype(float).tolist() if len(kinds) > 1 else [],
        "conflicts_prompt": list(range(20)) if len(kinds) > 1 else [],
        "own": [kinds[k] if 1 < len(kinds) > k and K > 1 else None for k in range(K)],
        "own_other": [{"mean": rng.normal(), "se": 0.03} if 1 < len(kinds) > k and K > 1 else None for k in range(K)],
        "accuracy_all": [figure(rng.random(50) < 0.6) for _ in range(K)],
        **{name: figure(rng.normal(level, 0.1, 50)) for name, level in (near | {"elbo_gap": 0.02}).items()},
        "effective_experts": 1 + 0.9 * (K - 1),
        "by_pair_own": rng.normal(-0.66, 0.1, 50).tolist(),
        "prompt_of_pair": [n // 2 for n in range(50)],
        "user_of_pair_own": [n % 10 for n in range(50)],
        "type_of_pair": [kinds[n % 10 % len(kinds)] for n in range(50)],
        "trained_on": kinds,
        "prompts": 25,
        "collapse": {} if K == 1 else {"verdict": "inactive experts", "active": [0], "best": 0,
                                       **{name: {"mean": 0.01, "se": 0.002, "n": 50}
                                          for name in ("slope", "gain", "over_best")}},
        "alignment_train": aligned[0],
        "alignment_heldout": aligned[1],
    }


def own_rewards(home, runs, prompts, judges, rng, strengths=(1.0, 0.5)) -> list[dict]:
    """The rows of served.py: a gain that grows with strength, KL with its square."""
    rows = []
    for i, (name, (K, latent)) in enumerate(runs.items()):
        config = json.loads((home / name / "config.json").read_text())
        kinds = ["all users"] if K == 1 else ["unknown users"] + ["known users"] * (latent == "user")
        for users in kinds:
            noise = rng.normal(0, 0.02, prompts)
            for strength in strengths:
                gain = strength * (0.1 + 0.05 * i) + noise
                kl = strength**2 * (5.0 + i) + rng.normal(0, 0.1, prompts)
                rows.append({
                    "run": name, "users": users, "target": None if strength == 1 else strength,
                    "strength": strength, "config": config, "gain": figure(gain),
                    "kl": float(kl.mean()), "types": {judge: figure(gain + 0.01 * t) for t, judge in enumerate(judges)},
                    "length": 20.0, "gain_by_prompt": gain.tolist(), "kl_by_prompt": kl.tolist()})
    return rows


def make_completions(home, results, runs, prompts, judges, rng):
    rows = ["reference"]
    for name, (K, _) in runs.items():
        rows += (
            [name] if K == 1 else [f"{name} {mode}" for mode in ("mixture", "sparse", *(f"head {k}" for k in range(K)))]
        )
    trained = [NAMES.index(judge) for judge in judges]
    base = None
    for i, row in enumerate(rows):
        values = np.clip(rng.normal(0.4 + 0.02 * i, 0.15, (prompts, 3)), 0, 1)
        mean = values[:, trained].mean(1)
        base = mean if base is None else base
        results["policies"][row] = {name: figure(values[:, r]) for r, name in enumerate(NAMES)}
        results["policies"][row] |= {
            "trained": figure(mean),
            "gain": figure(mean - base),
            "kl": figure(rng.normal(i, 1, prompts)),
            "length": figure(rng.integers(5, 48, prompts)),
            "values": values.tolist(),
        }
    write(home / "prompts.jsonl", [{"prompt": f"This film {n}"} for n in range(prompts)])
    write(
        home / "samples.jsonl",
        [
            {
                "prompt": f"This film {n}",
                "texts": {row: f"This film {n} was {i // 2} good." for i, row in enumerate(rows)},
            }
            for n in range(prompts)
        ],
    )
    (home / "dataset.json").write_text(
        json.dumps(
            {
                "rewards": NAMES,
                "annotators": list(judges),
                "max_new": 48,
                "seed": 0,
                "margin": 0.5,
                "train": {"pairs": 12, "kinds": {"agree": 4, "conflict": 8}},
            }
        )
    )
