"""DP-TBART: the model by enumeration, fitting against a slow loop, the first look, and full runs of
data/tables/synth.py. Docstrings name the faults that each test is there for."""

import csv
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from raising import raises_at

from data.tables import synth
from data.tables.marginals import parity_table, satisfied, total_variation
from mixdpo.config import InputError
from mixdpo.fast.optimizer import make_optimizer, set_rate
from mixdpo.private.accountant import Mechanism, epsilon_of, noise_multiplier
from mixdpo.private.dp_sgd import Noise, clipped_sum_slow, participants
from mixdpo.private.keys import Key, identities
from mixdpo.runs.checkpoint import checkpoints
from mixdpo.tabular import dp_tbart as tabular
from mixdpo.tabular.columns import columns_of
from mixdpo.tabular.dp_tbart import TBART, TableConfig, account, draw, fit, look, row_losses, sample, validate
from mixdpo.tabular.plan import plan_of

SIZES = [3, 2, 4]
KEY = Key.public(5)
TINY = dict(width=8, layers=2, heads=2, batch=6, steps=7, lr=1e-2, micro=3, pretrain=2)


def columns(sizes=SIZES):
    return columns_of([{"name": f"c{j}", "type": "category", "values": [*map(str, range(n))]}
                       for j, n in enumerate(sizes)])


def codes_of(rows=40, seed=0, sizes=SIZES):
    return np.random.default_rng(seed).integers(0, sizes, size=(rows, len(sizes)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = TBART(SIZES, 8, 2, 2)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return made


def probabilities(model):
    """p of every possible row, by the chain rule."""
    rows = torch.tensor([*itertools.product(*map(range, SIZES))])
    return rows, torch.exp(-row_losses(model, rows)).detach()


def test_the_model_is_a_distribution_over_legal_rows(model):
    """All rows' probabilities sum to one. Faults: no start token (the first column would see itself); a column that
    sees itself or a later one; losses averaged over columns."""
    rows, p = probabilities(model)
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    states = model(rows[:, :-1])
    changed = rows.clone()
    changed[:, 1] = 1 - changed[:, 1]
    other = model(changed[:, :-1])
    assert torch.allclose(states[:, :2], other[:, :2]) and not torch.allclose(states, other)


def test_samples_follow_the_model_given_or_not(model):
    """Within 5 standard errors, and a cache changes nothing. Faults: the cache's place off by one; the first column
    sampled again where it was given; greedy choice."""
    rows, p = probabilities(model)
    n, place = 40000, {tuple(r): i for i, r in enumerate(rows.tolist())}
    drawn = sample(model, n, np.random.default_rng(1))
    share = torch.bincount(torch.tensor([place[tuple(r)] for r in drawn.tolist()]), minlength=len(rows)) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()
    assert torch.equal(drawn, sample(model, n, np.random.default_rng(1)))
    assert not torch.equal(drawn, sample(model, n, np.random.default_rng(2)))
    given = torch.full((n, 1), 2)
    drawn = sample(model, n, np.random.default_rng(1), given=given)
    assert (drawn[:, 0] == 2).all()
    kept = rows[:, 0] == 2
    p = p * kept / p[kept].sum()
    share = torch.bincount(torch.tensor([place[tuple(r)] for r in drawn.tolist()]), minlength=len(rows)) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()


# --- fitting ----------------------------------------------------------------------------------------------------------


def slow_fit(table, config, key):
    """The training loop, written again: Poisson sampling, clipping of each example, noise, Adam, average."""
    rows, (torch_seed, N) = table.ordered(), (config.seed, len(table.codes))
    rate = min(1.0, config.batch / N)
    sigma = noise_multiplier(config.epsilon, config.delta, rate, config.steps, table.spent)
    torch.manual_seed(torch_seed)
    model = TBART(table.sizes, config.width, config.layers, config.heads, table.prior)
    optimizer, _ = make_optimizer(model, config.lr)
    average = [p.detach().clone() for p in model.parameters()]

    def loss(parameters, row):
        named = {f"model.{name}": p for name, p in parameters.items()}
        return torch.func.functional_call(Losses(model), named, (row[None],))[0]

    drawn = participants(key, identities([row.tobytes() for row in table.codes]), rate, config.steps)
    for t in range(config.steps):
        set_rate(optimizer, t, config.steps, config.steps // 20)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        total = clipped_sum_slow(loss, parameters, config.clip, rows[drawn[t]])
        noised = Noise(sigma, config.clip, rate * N, key).release(list(total.values()), t)
        for p, g in zip(model.parameters(), noised):
            p.grad = g
        optimizer.step()
        keep = min(tabular.DECAY, (t + 1) / (t + 10))
        average = [keep * a + (1 - keep) * p.detach() for a, p in zip(average, model.parameters())]
    return average


class Losses(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows):
        return row_losses(self.model, rows)


@pytest.mark.parametrize("batch, share", [(6, 0.0), (0.7, 0.0), (6, 0.4)])
def test_fitting_is_the_slow_loop(batch, share, monkeypatch):
    """To 1e-5, over steps of which some are empty (batch 0.7 of 40 rows); DP-SGD alone, as in the paper, and after
    noisy marginals. Faults: no clipping; no noise; the budget of the marginals spent twice;
    noise without clip; batches of fixed size; division by the actual instead of the expected number; an empty step
    skipped; a micro-batch clipped as one example; the average of an untrained model."""
    config = TableConfig(**TINY | {"batch": 6, "clip": 0.4, "pretrain": 0}, first_look=share)
    object.__setattr__(config, "batch", batch)
    table = look(columns(), codes_of(), config, KEY)
    assert (table.prior is None) == (share == 0) and bool(table.spent) == (share > 0)
    monkeypatch.setattr(tabular, "calibrate", lambda *_: None)
    if batch < 1:
        drawn = participants(KEY, identities([row.tobytes() for row in table.codes]), batch / 40, config.steps)
        assert any(len(taking) == 0 for taking in drawn)
    fitted = fit(table, config, KEY)
    for p, wanted in zip(fitted.model.parameters(), slow_fit(table, config, KEY)):
        assert torch.allclose(p, wanted, atol=1e-5)


def test_calibrated_samples_have_the_noisy_marginals(model):
    """Every column has them, and the dependence between columns remains. Faults: one step for all columns; a column
    calibrated after columns that were sampled before their calibration."""
    torch.manual_seed(1)
    prior = torch.cat([torch.log_softmax(torch.randn(n), 0) for n in SIZES])
    before = sample(model, 20000, np.random.default_rng(2))
    tabular.calibrate(model, prior, seed=4)
    after = sample(model, 20000, np.random.default_rng(2))
    for j, wanted in enumerate(prior.split(SIZES)):
        share = torch.bincount(after[:, j], minlength=SIZES[j]) / 20000
        assert (share - wanted.exp()).abs().max() < 0.02
    odds = [np.log(np.histogram2d(*x[:, :2].T.numpy(), bins=[3, 2])[0]) for x in (before, after)]
    odds = [o[:, 1] - o[:, 0] for o in odds]
    assert np.abs((odds[0] - odds[0][0]) - (odds[1] - odds[1][0])).max() < 0.25


@pytest.mark.parametrize("rows, options, mechanisms", [
    (40, {}, 1), (40, dict(steps=7), 2), (40, dict(first_look=0.0, steps=7), 1), (40, dict(first_look=1.0), 1),
    (4000, dict(first_look=1.0), 3), (4000, dict(first_look=0.3, steps=7), 4), (4000, dict(epsilon=3.0), 4)])
def test_what_is_spent_is_the_budget(rows, options, mechanisms):
    """All mechanisms together spend epsilon and no more, for every plan. Faults: counts, scores or pairs that are not
    reported; a share spent twice; a second count of the columns without its share."""
    config = TableConfig(**TINY | {"steps": 0, "batch": 6} | options)
    table = look(columns(), codes_of(rows), config, KEY)
    if table.plan.steps > 20:                                               # as many as the rule says take long
        object.__setattr__(table.plan, "steps", 7)
    fitted = fit(table, config, KEY)
    facts = account(fitted, config, rows)
    assert 0.999 < facts["epsilon"] / config.epsilon <= 1 and facts["not_covered"]
    assert len(facts["spent"]) == mechanisms
    assert facts["epsilon"] == epsilon_of([Mechanism(**m) for m in facts["spent"]], 1e-5)


def test_without_privacy_nothing_is_spent():
    config = TableConfig(**TINY, epsilon=math.inf)
    table = look(columns(), codes_of(), config, KEY)
    free = fit(table, config, KEY)
    assert not table.spent and free.sigma == 0 and account(free, config, 40)["epsilon"] == math.inf


def test_the_look_is_noisy_counts():
    """Deviation sigma sqrt(d) on each count of each column. Faults: no noise; sigma without sqrt(d), although a row is
    in d counts; the same noise for all columns; a deviation that is not the noise's."""
    codes = np.zeros((10**6, 2), dtype=np.int64)
    table = look(columns([4000, 4000]), codes, TableConfig(first_look=0.5, epsilon=0.01), KEY)
    assert [*table.marginals.measured] == [(0,), (1,)]                      # 16 million cells of a pair: too noisy
    noise = [table.marginals.measured[(j,)][0][1:] for j in range(2)]
    for n, (_, s) in zip(noise, table.marginals.measured.values()):
        assert abs(n.std() / (table.spent[0].sigma * math.sqrt(2)) - 1) < 0.05 and abs(n.std() / s - 1) < 0.05
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.08


def test_a_model_begins_as_independent_columns():
    """Without privacy its first samples have the table's 1-way marginals. Fault: the prior in the schema's order."""
    each = np.repeat([0, 1, 2], [600, 300, 100]), np.tile([0, 0, 0, 0, 1], 200), np.tile([3, 3, 1, 2], 250)
    codes = np.stack(each, axis=1)
    for order in ("given", "random", "entropy"):
        config = TableConfig(epsilon=math.inf, order=order, seed=1)
        table = look(columns(), codes, config, KEY)
        assert sorted(table.order) == [0, 1, 2] and table.sizes == [SIZES[j] for j in table.order]
        torch.manual_seed(0)
        made = table.as_given(sample(TBART(table.sizes, 8, 1, 2, table.prior), 20000, np.random.default_rng(3)))
        assert total_variation(codes, made, SIZES, 1).max() < 0.08
    assert table.order == [2, 0, 1]                                         # entropies 1.04, 0.90 and 0.50 nats


def test_it_learns_what_no_pair_of_columns_shows():
    """Parity of four bits: every pair is uniform. Faults: a model without attention; one that sees the last column
    alone."""
    codes, rng = parity_table(4000, 4, np.random.default_rng(0)), columns([2] * 4)
    config = TableConfig(epsilon=math.inf, width=32, layers=2, heads=2, batch=256, steps=250, lr=1e-2, pretrain=0)
    table = look(rng, codes, config, Key.public(1))
    made = draw(table, fit(table, config, Key.public(1)), 4000, np.random.default_rng(3))
    assert satisfied(made) > 0.97 and total_variation(codes, made, [2] * 4, 2).max() < 0.05


def test_a_fit_that_was_stopped_ends_as_another(tmp_path, monkeypatch):
    """To the bit. Faults: the average not saved; the schedule begun anew; noise drawn in order instead of by step."""
    config = TableConfig(**TINY, save_minutes=0.0)
    table = look(columns(), codes_of(), config, KEY)
    uninterrupted = fit(table, config, KEY)
    (tmp_path / "run").mkdir()
    shown, progress = [], tabular.Progress.__call__

    def stop_at_4(self, done, total, note=""):
        shown.append(done)
        if done == 4:
            raise KeyboardInterrupt
        progress(self, done, total, note)

    monkeypatch.setattr(tabular.Progress, "__call__", stop_at_4)
    with pytest.raises(KeyboardInterrupt):
        fit(table, config, KEY, tmp_path / "run", {"a": 1})
    monkeypatch.setattr(tabular.Progress, "__call__", progress)
    again = fit(table, config, KEY, tmp_path / "run", {"a": 1})
    assert len(again.losses) == config.steps and np.array_equal(again.losses, uninterrupted.losses, equal_nan=True)
    states = (fitted.model.state_dict().values() for fitted in (uninterrupted, again))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    with raises_at("a: there 1, now 2", file=checkpoints(tmp_path / "run")[0]):
        fit(table, config, KEY, tmp_path / "run", {"a": 2})


def test_a_fit_resumes_without_a_named_configuration(tmp_path, monkeypatch):
    """Fault: `same` left out, the default, ends the resumed fit with a TypeError."""
    config = TableConfig(**TINY, save_minutes=0.0)
    table = look(columns(), codes_of(), config, KEY)
    (tmp_path / "run").mkdir()
    progress = tabular.Progress.__call__

    def stop_at_4(self, done, total, note=""):
        if done == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(tabular.Progress, "__call__", stop_at_4)
    with pytest.raises(KeyboardInterrupt):
        fit(table, config, KEY, tmp_path / "run")
    monkeypatch.setattr(tabular.Progress, "__call__", progress)
    assert len(fit(table, config, KEY, tmp_path / "run").losses) == config.steps


@pytest.mark.parametrize("option, values", [
    ("order", ["size", ""]), ("epsilon", [0.0, -1.0, math.nan, -math.inf]), ("clip", [0.0, -1.0, math.nan, math.inf]),
    ("delta", [0.0, 1.0, -1e-5, 1e-13, math.nan, math.inf]), ("first_look", [1.1, -0.1, -2.0, math.nan, math.inf]),
    ("lr", [0.0, -1e-3, math.nan, math.inf]), ("save_minutes", [-1.0, math.nan]), ("seed", [-1, 2**32]),
    ("examples", [-1]), ("steps", [-1]), ("pretrain", [-1]),
    *((name, [0, -1]) for name in ("width", "layers", "heads", "batch", "micro")),
])
def test_options_out_of_range_are_errors(option, values):
    """Every option of a table. Faults: NaN passes x <= 0; an infinite rate; a seed that ends in a traceback,
    or that gives the numbers of another one."""
    for value in values:
        with pytest.raises(InputError) as error:
            validate(TableConfig(**{option: value}))
        assert error.value.option == option


def test_contradictory_options_are_errors():
    for options, option in (({"order": "entropy", "first_look": 0.0}, "order"), ({"heads": 3}, "width"),
                            ({"first_look": 1.0, "steps": 5}, "first_look")):
        with pytest.raises(InputError) as error:
            validate(TableConfig(**options))
        assert error.value.option == option
    validate(TableConfig(epsilon=math.inf, first_look=0.0, save_minutes=math.inf, seed=2**32 - 1))


# --- whole runs -------------------------------------------------------------------------------------------------------


SCHEMA = [{"name": "colour", "type": "category", "values": ["red", "green", "blue"], "missing": "?"},
          {"name": "wage", "type": "number", "low": 0, "high": 50, "quantiles": 4},
          {"name": "rich", "type": "category", "values": ["no", "yes"]}]


@pytest.fixture
def own(tmp_path):
    """A user's table, its schema and its test table, as options."""
    rng = np.random.default_rng(0)
    for name, n in (("table", 300), ("test", 100)):
        wage = rng.beta(1, 4, n) * 50
        rows = [[["red", "green", "blue", "?"][rng.integers(4)], f"{w:.2f}", ["no", "yes"][int(w > 12)]] for w in wage]
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["colour", "wage", "rich"], *rows])
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return {"data": tmp_path / "table.csv", "schema": tmp_path / "schema.json", "test": tmp_path / "test.csv",
            "target": "rich", "out": tmp_path / "out", "preset": "smoke"}


def call(options):
    synth.main([word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))])


def test_a_table_of_ones_own(own, monkeypatch):
    """From files to files: all values legal, the number of rows as given, the budget reported, no secret left. Faults:
    the test table in the bins as they were before the look; rows in the model's order of columns."""
    monkeypatch.setattr(Key, "fresh", classmethod(lambda cls: cls.public(0)))               # the same bins every time
    call(own | {"rows": 50, "order": "random"})
    rows = [*csv.DictReader(open(own["out"] / "synthetic.csv"))]
    assert len(rows) == 50 and [*rows[0]] == ["colour", "wage", "rich"]
    assert {r["colour"] for r in rows} <= {"red", "green", "blue", "?"} and {r["rich"] for r in rows} <= {"no", "yes"}
    assert all(0 <= float(r["wage"]) <= 50 for r in rows)
    facts, figures = (json.loads((own["out"] / name).read_text()) for name in ("privacy.json", "figures.json"))
    assert facts["epsilon"] <= 1 and len(facts["spent"]) == 4 and facts["rows"] == 300
    assert [*figures["figures"]] == ["DP-TBART", "independent columns", "MST", "the real table", "a second real table"]
    real = figures["figures"]["the real table"]
    assert real["distance"] == {"1": 0, "2": 0, "3": 0} and real["utility"]["boosting"]["accuracy"] > 0.8
    report = (own["out"] / "report.md").read_text()
    assert "DP-TBART" in report and "Not covered" in report and "--rows 50" in report
    assert not (own["out"] / "noise-key").exists()


def test_what_may_be_published_is_said(own, capsys):
    """On screen and in the report. Faults: a report of exact figures that does not say so; the same sentence for a
    table that has no privacy."""
    for epsilon, out, wanted in ((1, "a", "May be published: synthetic.csv"), ("inf", "b", "Nothing here may be")):
        call(own | {"epsilon": epsilon, "out": own["out"] / out})
        for text in (capsys.readouterr().out, (own["out"] / out / "report.md").read_text()):
            assert wanted in text and ("May be published" in text) == (epsilon == 1)


def test_a_plan_is_printed_before_it_is_paid_for(own, capsys):
    """--plan prints what the run prints, and writes nothing. Faults: quantiles planned with their fine bins; missing
    values left out; a table of independent columns without a warning."""
    options = {name: own[name] for name in ("data", "schema", "out")} | {"epsilon": 0.1, "preset": "quick"}
    call(options | {"plan": "true"})
    plan = capsys.readouterr().out.replace("No budget was spent.\n", "")
    assert "independent" in plan and len(plan.splitlines()) == 6 and not own["out"].exists()
    call(options | {"pretrain": 4})
    assert capsys.readouterr().out.startswith(plan)
    call(options | {"plan": "true", "epsilon": 100})
    assert "independent" not in capsys.readouterr().out


def test_the_docs_give_the_number_of_values_for_which_pairs_are_measured():
    """Fault: a rule that has changed, and docs/privacy.md as before."""
    text = (Path(__file__).parents[2] / "docs/privacy.md").read_text()
    rows, values = (re.findall(r"[\d,]+", re.search(rf"^ +\| {name} \|(.*)", text, re.MULTILINE)[1])
                    for name in ("rows", "values"))
    assert len(rows) == len(values) == 6
    cases = [(int(n.replace(",", "")), 8, int(k)) for n, k in zip(rows, values)] + [(500, 30, 4), (50_000, 30, 40)]
    for n, d, k in cases:
        assert plan_of(n, [k] * d, TableConfig()).pairs and not plan_of(n, [k + 1] * d, TableConfig()).pairs, (n, d, k)


def test_one_key_gives_one_table_and_no_key_is_used_twice(own, tmp_path, monkeypatch):
    """Noise, sampling and published rows have separate keys. Faults: rows drawn from the seed of the noise; one
    generator for the look and for a step; rows that do not depend on the key at all."""
    used, generator = [], Key.generator
    monkeypatch.setattr(Key, "generator", lambda self, *about: used.append(about) or generator(self, *about))
    made = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        monkeypatch.setattr(Key, "fresh", classmethod(lambda cls, seed=seed: cls.public(seed)))
        used.clear()
        call(own | {"out": tmp_path / name})
        release = used[: used.index(("numbers",)) + 1]
        assert len(set(release)) == len(release)
        assert {"look", "sampling", "noise", "rows"} <= {what for what, *_ in release}
        made.append((tmp_path / name / "synthetic.csv").read_bytes())
    assert made[0] == made[1] != made[2]


def test_help_lists_inherited_options(capsys):
    """Fault: only those of the last class have their comments as help."""
    with pytest.raises(SystemExit):
        synth.main(["--help"])
    told = capsys.readouterr().out
    assert "--epsilon" in told and "privacy budget" in told and "held-out table, to test classifiers" in told


@pytest.mark.parametrize("change, option", [
    ({"data": ""}, "data"), ({"target": ""}, "target"), ({"target": "poor"}, "target"), ({"test": ""}, "test"),
    ({"delta": 0.01}, "delta"), ({"preset": "huge"}, "preset"), ({"dataset": "adults"}, "dataset"),
    ({"first_look": 0.0}, "first_look"), ({"dataset": "adult"}, "data"), ({"rows": -5}, "rows"),
])
def test_an_impossible_command_is_an_error(own, change, option):
    """Before the first step. Faults: a negative number of rows, found only after training; --test with a data set that
    has its own, ignored without an error."""
    with pytest.raises(InputError) as error:
        call(own | change)
    assert error.value.option == option and not (own["out"] / "checkpoint").exists()
    assert not (own["out"] / "synthetic.csv").exists()


def test_a_learning_rate_that_leaves_no_numbers_is_named(own):
    """Fault: sampling from NaN, with a traceback."""
    with pytest.raises(InputError) as error:
        call(own | {"lr": 1e30})
    assert error.value.option == "lr" and not (own["out"] / "synthetic.csv").exists()
