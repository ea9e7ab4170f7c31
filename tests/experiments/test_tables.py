"""data/report/tables.py on a made-up job: cells against what was put in. What each test catches stands in its
docstring."""

import html
import json
import re

import numpy as np
import pytest
from fakejob import NAMES, make_job, write

from data.report import domains, tables, users
from data.report import job as job_module
from data.report.job import read_job
from mixdpo.evaluation.statistics import mean_se


@pytest.fixture
def home(tmp_path):
    return make_job(tmp_path / "imdb-quick")


def rows_of(markdown: str, number: int = 0) -> list[dict[str, str]]:
    """The Markdown's table `number` as one dict a row."""
    found = [block.splitlines() for block in re.split(r"\n\s*\n", markdown) if block.startswith("| ")][number]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in found]
    assert all(len(row) == len(cells[0]) for row in cells), "a row with another number of cells than its head"
    return [dict(zip(cells[0], row)) for row in cells[2:]]


def shown(values, digits=3, sign="") -> str:
    """mean ± standard error of numbers, as a cell has it."""
    return f"{np.mean(values):{sign}.{digits}f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"


# ---- tables


def test_policy_table(home):
    """Caught: a column of another row or reward; a gain that is not paired; SEs that are not gain over its SE; the
    paper's digits.
    """
    job = read_job(home)
    found = {row["policy"]: row for row in rows_of(tables.policies(job))}
    base = np.array(job.results["policies"]["reference"]["values"])
    for name, row in job.results["policies"].items():
        values = np.array(row["values"])
        assert [found[name][reward] for reward in NAMES] == [shown(column) for column in values.T]
        trained = values[:, :2].mean(1)  # sentiment and informativeness judge here
        assert found[name]["mean of trained"] == shown(trained)
        gain = trained - base[:, :2].mean(1)
        wanted = "–" if name == "reference" else shown(gain, sign="+")
        assert found[name]["gain over reference"] == wanted
        if name != "reference":
            assert found[name]["in SEs"] == f"{gain.mean() / (gain.std(ddof=1) / 7**0.5):+.1f}"
        assert found[name]["KL (nats)"] == f"{row['kl']['mean']:.2f} ± {row['kl']['se']:.2f}"
        assert found[name]["length (tokens)"] == f"{row['length']['mean']:.1f} ± {row['length']['se']:.1f}"
    assert [found["*paper: head 0*"][reward] for reward in NAMES] == ["*0.720*", "*0.394*", "*0.213*"]
    assert [found["*paper: sparse*"][reward] for reward in NAMES] == ["*0.616*", "*0.396*", "*0.263*"]


def test_note_says_how_the_job_differs_from_the_paper(home):
    """Caught: a fixed note; the tuned directory's name for the model's; annotators compared by order."""
    job = read_job(home)
    text = tables.policies(job)
    assert "the model is smollm2, not GPT-2" in text and "7 evaluation prompts, not 10,000" in text
    assert "judged by sentiment, informativeness, not by sentiment, informativeness, grammar" in text
    job.tuned["settings"]["model"], job.dataset["annotators"] = "gpt2", NAMES[::-1]
    job.results["policies"]["reference"]["trained"]["n"] = 10000
    text = tables.policies(job)
    assert not any(part in text for part in ("not GPT-2", "judged by", "not 10,000")) and "compare directions" in text
    for row in job.results["policies"].values():  # other rewards than the paper's
        for old, new in zip(NAMES, ("helpful", "harmless", "brief")):
            row[new] = row.pop(old)
    assert "paper" not in tables.policies(job)


def test_preference_tables(home):
    """Caught: experts or annotators swapped; figures under w and under the user's weights swapped; names of DPO's
    one expert.
    """
    job = read_job(home)
    of_expert, of_run = rows_of(tables.preferences(job)), rows_of(tables.preferences(job), 1)
    assert [(row["run"], row["expert"]) for row in of_expert] == [
        ("dpo", "0"),
        ("mix-pair", "0"),
        ("mix-pair", "1"),
        ("mix-user", "0"),
        ("mix-user", "1"),
    ]
    for row in of_expert:
        figures, k = job.results["preferences"][row["run"]], int(row["expert"])
        for kind in ("sentiment", "informativeness"):
            a = figures["accuracy"][kind][k]
            assert row[f"judged by {kind}"] == f"{a['mean']:.3f} ± {a['se']:.3f}"
        assert row["named after"] == ("–" if row["run"] == "dpo" else ["sentiment", "informativeness"][k])
        if row["run"] != "dpo":
            gap, se = figures["own_other"][k]["mean"], figures["own_other"][k]["se"]
            assert (row["own - other"], row["in SEs"]) == (f"{gap:+.3f} ± {se:.3f}", f"{gap / se:+.1f}")
    for row in of_run:
        figures = job.results["preferences"][row["run"]]
        for column, name, digits in (
            ("accuracy, w", "accuracy_mbt", 3),
            ("accuracy, user's weights", "accuracy_own", 3),
            ("log-likelihood, w (nats)", "log_likelihood", 4),
            ("ELBO gap (nats)", "elbo_gap", 4),
            ("log-likelihood, user's weights (nats)", "log_likelihood_own", 4),
        ):
            assert row[column] == f"{figures[name]['mean']:.{digits}f} ± {figures[name]['se']:.{digits}f}"


def test_a_figure_without_a_number_is_an_empty_cell(home):
    """NaN is null in results.json. Caught: TypeError of null, "nan" in a cell, an SE of 0 divided by, the worst type
    another than the one without a number."""
    nothing = {"mean": None, "se": None, "n": 0}
    results = json.loads((home / "results.json").read_text())
    for figures in results["preferences"].values():
        figures["types"]["sentiment"] = dict.fromkeys(("accuracy", "log_likelihood", "own_expert"), nothing)
        figures["conflicts_by_pair"][0] = None
        figures["log_likelihood_own"] = {"mean": -0.7, "se": None, "n": 1}
    (home / "results.json").write_text(json.dumps(results))
    job = read_job(home)
    assert {row["log-likelihood, user's weights (nats)"] for row in rows_of(tables.preferences(job), 1)} == {"-0.7000"}
    text = users.types(job)
    assert "nan" not in text
    for row in rows_of(text) + rows_of(text, 1):
        assert row["sentiment"] == row["worst type"] == row.get("greatest regret", "–") == "–"
        assert row["informativeness"] != "–"
    assert tables.in_ses({"mean": 1.0, "se": 0.0}) == tables.in_ses({"mean": float("nan"), "se": 1.0}) == "–"
    assert tables.pm({"mean": float("nan"), "se": float("nan")}) == "–"


def test_runs_are_compared_by_prompts_and_by_users_where_weights_are_theirs(tmp_path):
    """Caught: errors of a difference between runs that count prompts alone where a gate knows the user; null taken for
    a number."""
    job = read_job(make_job(tmp_path / "job", runs={"dpo": (1, "pair"), "moe": (2, "pair")}))
    rng = np.random.default_rng(2)
    prompts, names = [n % 20 for n in range(60)], [n // 6 for n in range(60)]
    for run, figures in job.results["preferences"].items():
        own = rng.normal(size=10)[names] if run == "moe" else 0.0
        figures |= {"by_pair": (rng.normal(size=60) + own).tolist(), "prompt_of_pair": prompts}
    of = job.results["preferences"]
    gap = np.subtract(of["moe"]["by_pair"], of["dpo"]["by_pair"])
    for clusters in ([prompts], [prompts, names]):
        of["moe"]["user_of_pair"] = names if len(clusters) == 2 else None
        cell = rows_of(domains.likelihoods(job))[1]["minus DPO"]
        assert cell == tables.pm(mean_se(gap, *clusters), 4, sign="+")
    assert mean_se(gap, prompts, names)["se"] > 1.2 * mean_se(gap, prompts)["se"]


def test_a_step_without_figures_leaves_no_hole_in_a_curve():
    """Caught: null, or NaN, that takes a whole stretch of steps with it."""
    x, y = job_module.smooth([[1.0, 2.0], [None, None], [3.0, 4.0], [None, None]], intervals=2)
    assert x.tolist() == [1.5, 3.5] and y.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert np.isnan(job_module.smooth([None, 1.0], intervals=2)[1]).tolist() == [True, False]


def test_alignment_has_a_row_a_seed_beside_bayes(tmp_path):
    """Caught: columns swapped; held-out for training; one seed kept of several; a row for DPO, which assigns nobody."""
    home = make_job(
        tmp_path / "job",
        runs={"dpo": (1, "pair")} | {f"mix-user{s}": (2, "user") for s in ("", "-seed1", "-seed2")},
        completions=False,
    )
    job = read_job(home)
    found = rows_of(tables.alignment(job))
    assert [row["run"] for row in found] == [
        name for name in ("mix-user", "mix-user-seed1", "mix-user-seed2") for _ in range(2)
    ]
    for i, row in enumerate(found):
        key, what = [("train", "training groups"), ("heldout", "single held-out pairs")][i % 2]
        of = job.results["preferences"][row["run"]][f"alignment_{key}"]
        assert row["units"] == what and row["number of units"] == str(of["units"])
        columns = {"ARI": "ari", "ARI, Bayes": "bayes_ari", "matched": "matched", "matched, Bayes": "bayes_matched"}
        assert [row[column] for column in columns] == [f"{of[name]:.3f}" for name in columns.values()]


def test_what_was_run_names_what_numbers_depend_on(home):
    """Caught: a fact left out; another run's options; nested facts of dataset.json as Python objects; an option that
    some run has and no column tells."""
    text = tables.what_was_run(read_job(home))
    for fact in (
        "smollm2",
        "perplexity 33.12 before, 28.46 after",
        "revision abc123+",
        "torch 2.13.0",
        "margin: 0.5",
        "kinds (agree 4, conflict 8)",
        "train.jsonl: 12 lines; 4 users; judged by informativeness 6, sentiment 6",
    ):
        assert fact in text, fact
    assert [(row["run"], row["experts"], row["latent"], row["steps"]) for row in rows_of(text)] == [
        ("dpo", "1", "pair", "6"),
        ("mix-pair", "2", "pair", "6"),
        ("mix-user", "2", "user", "6"),
    ]
    assert {"start", "start_steps", "epochs", "batch"} < rows_of(text)[0].keys() and "estep" not in rows_of(text)[0]
    path = home / "mix-user/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"estep": "context"}))
    assert [row["estep"] for row in rows_of(tables.what_was_run(read_job(home)))] == ["all", "all", "context"]


def test_heads_differ_by_paired_differences(home):
    """Caught: the standard error of unpaired means; the sign; rewards in another order than `values` has; an SE
    with ddof 0.
    """
    job, rng = read_job(home), np.random.default_rng(1)
    base = rng.normal(0.5, 0.2, (7, 3))
    other = base - np.array([0.1, 0.0, -0.2]) + rng.normal(0, 0.01, (7, 3))  # prompts vary, the difference hardly
    rows = job.results["policies"]
    rows["mix-user head 0"]["values"], rows["mix-user head 1"]["values"] = base.tolist(), other.tolist()
    found = rows_of(tables.head_differences(job))
    assert [(row["run"], row["heads"]) for row in found] == [
        ("mix-pair", "head 0 minus head 1"),
        ("mix-user", "head 0 minus head 1"),
    ]
    for r, name in enumerate(NAMES):
        difference = base[:, r] - other[:, r]
        in_ses = difference.mean() / (difference.std(ddof=1) / 7**0.5)
        assert found[1][name] == f"{shown(difference, sign='+')} ({in_ses:+.1f} SE)"
    assert found[1]["sentiment"].startswith("+0.") and found[1]["grammar"].startswith("-0.")


# ---- completions


HOSTILE = (
    "# no | head\r\n<script>x</script> **b** _i_ `c` [l](http://a.b) ![p](q) &amp; $m$ ~~s~~ www.a.b :cat: a\\|b\x07"
    "\n\n- no list\n| a | b |"
)


def test_completions_are_shown_as_text(tmp_path):
    """Caught: a character that Markdown or HTML acts on left as it is; a line break that ends the cell; & escaped
    after the others.
    """
    cell = tables.escape(HOSTILE)
    assert "\n" not in cell and "\r" not in cell and "\x07" not in cell
    assert not re.search(r"[\\`*\[\]|~$@]|<(?!br>)|&(?!#\d+;)|(?<!\w)_|www\.|:\S", cell.replace("<br>", " "))
    assert html.unescape(cell.replace("<br>", "\n")) == HOSTILE.replace("\r\n", "\n").replace("\x07", "\u2407")
    assert tables.escape("head_lr of 0.5: yes") == "head_lr of 0.5: yes"  # plain text stays readable
    home = make_job(tmp_path / "job")
    write(
        home / "samples.jsonl",
        [{"prompt": "The | film", "texts": {"reference": "The | film" + HOSTILE, "dpo": "The | film."}}],
    )
    (row, plain) = rows_of(tables.samples(read_job(home)))
    assert row["completion"] == cell.strip() and plain["completion"] == "."


def test_samples_are_the_first_prompts_each_text_once(home):
    """Caught: more prompts than six; rewards of another prompt or policy; the prompt repeated in each cell; equal
    texts repeated.
    """
    job = read_job(home)
    text = tables.samples(job)
    assert text.count("**") == 12 and "This film 5" in text and "This film 6" not in text
    found = rows_of(text, 4)
    assert [row["policy"] for row in found][:2] == ["reference, dpo", "mix-pair mixture, mix-pair sparse"]
    assert found[1]["completion"] == "was 1 good."
    assert found[1]["rewards"] == " ".join(f"{v:.2f}" for v in job.results["policies"]["mix-pair mixture"]["values"][4])
