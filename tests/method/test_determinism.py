"""The same seed gives the same bits, whatever else draws random numbers; a step cut otherwise differs in rounding only;
and a trajectory that is committed says when numbers move at all. `python -m tests.method.test_determinism` writes it
anew: a change of it belongs into a commit that says why."""

import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinyjob

GOLDEN = Path(__file__).parents[1] / "golden" / "trajectory.json"
CASES = {
    "shared trunk, users": {"latent": "user", "gate": "user", "gate_lr": 1e-3, "rank": 2},
    "own models, users' slices, tempered": {"sharing": "models", "latent": "user", "em": "incremental",
                                            "variant": "tempered", "variant_temperature": 0.5},
    "one expert": {"experts": 1},
    "adapters, context": {"sharing": "lora", "lr": 2e-5, "latent": "user", "estep": "context", "context": 1,
                          "batch": 6},
    "frozen trunk, robust, noisy labels": {"train_trunk": False, "latent": "user", "robust": 0.1, "label_noise": 0.1},
}
TEN_STEPS = {"batch": 8, "micro": 8, "epochs": 2, "lr": 2e-5, "head_lr": 3e-4, "beta": 0.5, "head_rows": 0}


def ten_steps(folder, model, name, **options):
    """A run of ten steps of eight pairs; and of four more if context pairs are trained on in the end."""
    records = tinyjob.make_records(users=10, each=4)
    known = tinyjob.small(**options)                                        # what has an effect beside the options
    used = {key: value for key, value in TEN_STEPS.items() if key in known or key not in tinyjob.SMALL}
    out = tinyjob.run(folder, model, records, name=name, **used | options)
    assert len(tinyjob.lines(out / "metrics.jsonl")) == (14 if options.get("estep") == "context" else 10)
    return out


def difference(a, b):
    """The largest and the mean difference of what two runs learnt."""
    a, b = (tinyjob.tensors(run) for run in (a, b))
    gaps = torch.cat([(a[name] - b[name]).abs().flatten() for name in a if name.startswith(("experts.", "gate."))])
    return float(gaps.max()), float(gaps.mean())


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_whatever_else_is_random(case, tmp_path, model_dir):
    """Catches: a draw from a generator that others draw from too."""
    runs = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        runs.append(ten_steps(tmp_path, model_dir, f"run{seed}", **CASES[case]))
    assert tinyjob.equal(*runs)
    for file in ("metrics.jsonl", "responsibilities.jsonl"):
        assert (runs[0] / file).read_bytes() == (runs[1] / file).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_a_step_in_parts_is_the_same_step(case, tmp_path, model_dir):
    """Micro-batches of 8, 4, 2 and 1, and activation checkpointing, after all steps in float32. AdamW's steps are as
    long where the gradient is rounding alone, so the difference grows with the rate: the gate's is a tenth of the
    default. Catches: a mean over the micro-batch, a gate that steps twice, noise that belongs to the part."""
    whole = ten_steps(tmp_path, model_dir, "whole", **CASES[case])
    for name, options in (("4", {"micro": 4}), ("2", {"micro": 2}), ("1", {"micro": 1}),
                          ("kept", {"checkpointing": True})):
        most, mean = difference(whole, ten_steps(tmp_path, model_dir, name, **CASES[case] | options))
        assert most <= 1e-6 and mean <= 1e-6, f"{name}: {most:.2g} at most, {mean:.2g} in the mean"


def trajectories(folder, model):
    """Case -> the figures of every step, and the sums of what was learnt."""
    out = {}
    for n, (case, options) in enumerate(CASES.items()):
        run = ten_steps(folder, model, f"golden{n}", **options)
        metrics = [{key: row[key] for key in ("loss", "grad_norm", "accuracy")} for row in
                   tinyjob.lines(run / "metrics.jsonl")]
        sums = {name: float(x.double().square().sum()) for name, x in sorted(tinyjob.tensors(run).items())
                if name.startswith(("experts.", "gate.", "table"))}
        out[case] = {"metrics": metrics, "sums": sums}
    return out


def test_the_committed_trajectory(tmp_path, model_dir):
    """Catches: any change of the numbers, wherever it comes from. Accuracy not at step 1: margins are 0 there but for
    rounding, and their signs are the processor's."""
    wanted, got = json.loads(GOLDEN.read_text()), trajectories(tmp_path, model_dir)
    assert wanted.keys() == got.keys()
    for case in wanted:
        for step, (a, b) in enumerate(zip(wanted[case]["metrics"], got[case]["metrics"], strict=True), 1):
            for key in a if step > 1 else ("loss", "grad_norm"):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), f"{case}, step {step}, {key}"
        assert got[case]["sums"].keys() == wanted[case]["sums"].keys()
        for name, value in wanted[case]["sums"].items():
            assert got[case]["sums"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), f"{case}: {name}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model = tinyjob.make_model(Path(folder) / "model")
        GOLDEN.write_text(json.dumps(trajectories(Path(folder), model), indent=1) + "\n")
