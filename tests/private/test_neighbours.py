"""Neighbouring files: one example is removed, added or replaced anywhere in the file, and the run is repeated.

The guarantee requires that the clipped sum of a step moves by at most C (2 C if an example is replaced), and that
nothing else depends on the data. The neighbour's run therefore gets, step by step, what the first run released: so both
have the same parameters at every step. Then each sum and each contribution are compared bit by bit.
The number of examples is public (--examples), as privacy.json says.
"""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tinyjob
import torch

from mixdpo.private import dp_sgd as privacy
from mixdpo.private.keys import Key
from mixdpo.tabular import dp_tbart as tabular
from mixdpo.tabular.columns import columns_of
from mixdpo.tabular.dp_tbart import TableConfig, fit, look

C = 0.05                        # small: every gradient is clipped, so that one too many would show
KEY = Key.public(5)
USERS, EACH = 8, 3
CASES = {
    "dpo, pair": {"experts": 1},
    "dpo, user": {"experts": 1, "privacy_unit": "user"},
    "mix, pair": {"rank": 0},
    "mix, user, one type a pair": {"privacy_unit": "user", "train_trunk": False},
    "mix, user": {"latent": "user", "privacy_unit": "user"},
    "mix, user, context": {"latent": "user", "privacy_unit": "user", "estep": "context", "context": 1},
    "moe, pair": {"gate": "linear", "gate_entropy": 0.1},
    "moe, user": {"gate": "mlp", "privacy_unit": "user"},
    "lora, pair": {"sharing": "lora"},
    "lora, user": {"sharing": "lora", "latent": "user", "privacy_unit": "user"},
    "models, pair": {"sharing": "models"},
    "models, moe, user": {"sharing": "models", "privacy_unit": "user", "gate": "linear"},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tinyjob.make_model(tmp_path_factory.mktemp("model"))


def without(records, unit, n):
    """The file less its n-th line, or less the n-th user's lines."""
    gone = [records[n]] if unit == "pair" else [r for r in records if r["user"] == f"u{n}"]
    return [r for r in records if r not in gone]


def stranger(unit):
    """An example of a user who is in no file."""
    more = tinyjob.make_records(users=1, each=1 if unit == "pair" else EACH, seed=9)
    return [r | {"user": "stranger"} for r in more]


def neighbours(records, unit):
    """(what, the neighbour's file, how many C its sums may move)."""
    last = (len(records) if unit == "pair" else USERS) - 1
    for n in (0, last // 2, last):
        yield f"remove {n}", without(records, unit, n), 1
    yield "add first", stranger(unit) + records, 1
    yield "add inside", records[:10] + stranger(unit) + records[10:], 1
    if unit == "pair":
        yield "add a copy", records[:5] + [records[12]] + records[5:], 1
    yield "replace", without(records, unit, 1)[:4] + stranger(unit) + without(records, unit, 1)[4:], 2
    turned = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} if r["user"] == "u0" else r for r in records]
    if unit == "user":
        yield "other choices of a user", turned, 2


class Recorded:
    """What a run summed and released, step by step."""

    def __init__(self, monkeypatch, given=None):
        self.parts, self.sums, self.released, self.given = [[]], [], [], given
        add, release = privacy.ClippedSum.add, privacy.Noise.release
        recorded = self

        def watched_add(self):
            before = [s.clone() for s in self.total]
            for s in self.total:
                s.zero_()
            add(self)
            recorded.parts[-1].append(flat(self.total).numpy().tobytes())
            for s, b in zip(self.total, before):
                s.add_(b)

        def watched_release(self, total, t):
            recorded.sums.append(flat(total))
            recorded.parts.append([])
            recorded.released.append(release(self, total, t) if given is None else given[t])
            return recorded.released[-1]

        monkeypatch.setattr(privacy.ClippedSum, "add", watched_add)
        monkeypatch.setattr(privacy.Noise, "release", watched_release)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).clone()


def recorded_run(folder, model, records, options, given=None):
    """Runs in folder/run -> what it summed; what it would publish."""
    with pytest.MonkeyPatch.context() as patch:
        recorded = Recorded(patch, given)
        count = USERS * EACH if options.get("privacy_unit", "pair") == "pair" else USERS
        out = tinyjob.run(folder, model, records, key=KEY, **dict(
            epsilon=4.0, clip=C, batch=count // 3, micro=4, epochs=2, examples=count) | options)
    public = {n: x for n, x in tinyjob.tensors(out).items() if n.startswith(("experts.", "gate."))}
    return recorded, public, json.loads((out / "privacy.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_neighbour_moves_each_sum_by_its_own_gradient(tmp_path, model_dir, case):
    """Faults: draws by an example's position in the file (sampling, start, context); start or gate made from all rows;
    a copy of a line that takes part whenever the first does; a rate or a number of steps from the file; reference
    log-probs whose rounding depends on the pairs that share a batch."""
    options, unit = CASES[case], CASES[case].get("privacy_unit", "pair")
    records = tinyjob.make_records(users=USERS, each=EACH)
    (tmp_path / "whole").mkdir()
    first, public, facts = recorded_run(tmp_path / "whole", model_dir, records, options)
    moved = 0
    for what, other, bound in neighbours(records, unit):
        (folder := tmp_path / what.replace(" ", "-")).mkdir()
        second, its_public, its_facts = recorded_run(folder, model_dir, other, options, first.released)
        assert its_facts == facts and len(second.sums) == len(first.sums), what
        assert its_public.keys() == public.keys() and all(torch.equal(public[n], its_public[n]) for n in public), what
        for a, b, of_a, of_b in zip(first.sums, second.sums, first.parts, second.parts):
            assert float((a - b).norm()) <= bound * C * (1 + 1e-4), (what, float((a - b).norm()) / C)
            gone, come = Counter(of_a) - Counter(of_b), Counter(of_b) - Counter(of_a)
            assert gone.total() <= 1 - what.startswith("add") and come.total() <= 1 - what.startswith("remove"), what
            moved += bool(gone or come)
    assert moved > 5                                                        # the changed example did take part


def test_a_table_without_one_row_moves_each_sum_by_one_gradient(monkeypatch):
    """DP-TBART, after the same first look. Faults: sampling by position; a row counted twice; sums clipped by
    micro-batch. This table has many copies of rows; copies are drawn independently."""
    rng = np.random.default_rng(0)
    columns = columns_of([{"name": f"c{j}", "type": "category", "values": [*"abc"[: 2 + j % 2]]} for j in range(3)])
    codes = np.stack([rng.integers(0, c.size, 60) for c in columns], axis=1)
    config = TableConfig(epsilon=2.0, delta=1e-3, clip=C, steps=8, batch=12, micro=5, width=8, layers=1, heads=2,
                         examples=60, pretrain=3)
    table = look(columns, codes, config, KEY)
    monkeypatch.setattr(tabular, "calibrate", lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        first = Recorded(patch)
        fit(table, config, KEY)
    moved = 0
    for bound, other in ((1, codes[1:]), (1, codes[:-1]), (1, np.delete(codes, 30, 0)),
                         (1, np.insert(codes, 7, codes[40], 0)),
                         (2, np.concatenate([codes[:9], [[1, 2, 1]], codes[10:]]))):
        with pytest.MonkeyPatch.context() as patch:
            second = Recorded(patch, first.released)
            fit(replace(table, codes=other), config, KEY)
        off = [float((a - b).norm()) / C for a, b in zip(first.sums, second.sums)]
        assert max(off) <= bound + 1e-3, off
        moved += sum(x > 1e-3 for x in off)
    assert moved > 5
