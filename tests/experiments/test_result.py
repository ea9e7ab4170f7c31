"""data/report/result.py on a made-up job: the sentence and the table that open a report. What each test catches stands
in its docstring."""

import json

import numpy as np
import pytest
from fakejob import make_job

from data.report.job import read_job
from data.report.result import compared_runs, headline, own_rewards, result, sentence
from data.report.tables import aligned

TYPES = ["sentiment", "informativeness"]


@pytest.fixture
def job(tmp_path):
    return read_job(make_job(tmp_path / "job"))


def test_own_reward_is_that_of_the_expert_that_serves_the_type(job):
    """Caught: a type's reward on another type's completions; the mixture's row for its experts'; experts in the order
    of the types when they are named otherwise; KL of one expert."""
    job.results["preferences"]["mix-user"]["own"] = TYPES[::-1]
    found, rows = own_rewards(job), job.results["policies"]
    values = {name: np.array(row["values"]) for name, row in rows.items()}  # columns: sentiment, informativeness, ...
    swapped = (values["mix-user head 1"][:, 0] + values["mix-user head 0"][:, 1]) / 2
    np.testing.assert_allclose(found["mix-user"]["values"], swapped)
    straight = (values["mix-pair head 0"][:, 0] + values["mix-pair head 1"][:, 1]) / 2
    np.testing.assert_allclose(found["mix-pair"]["values"], straight)
    np.testing.assert_allclose(found["dpo"]["values"], values["dpo"][:, :2].mean(1))
    kl = (rows["mix-user head 0"]["kl"]["mean"] + rows["mix-user head 1"]["kl"]["mean"]) / 2
    assert found["mix-user"]["kl"]["mean"] == pytest.approx(kl)
    assert list(found) == ["reference", "dpo", "mix-pair", "mix-user"]
    job.results["preferences"]["mix-user"]["own"] = ["sentiment", None]     # nobody serves informativeness
    assert "mix-user" not in own_rewards(job)
    job.dataset["domains"] = {"movie": ["sentiment"]}
    assert own_rewards(job) == {}


def test_the_table_pairs_differences_with_dpo(job):
    """Caught: unpaired differences; a difference of DPO from itself; a type's accuracy in another type's column."""
    head, rows = headline(job)
    found = {row[0]: dict(zip(head, row)) for row in rows}
    own = own_rewards(job)
    gap = own["mix-user"]["values"] - own["dpo"]["values"]
    se = gap.std(ddof=1) / len(gap) ** 0.5
    assert found["mix-user"]["minus dpo"] == f"{gap.mean():+.3f} ± {se:.3f}"
    assert found["mix-user"]["in SEs"] == f"{gap.mean() / se:+.1f}" and found["dpo"]["minus dpo"] == "–"
    for kind in TYPES:
        a = job.results["preferences"]["mix-user"]["types"][kind]["accuracy"]
        assert found["mix-user"][f"accuracy, {kind}"] == f"{a['mean']:.3f} ± {a['se']:.3f}"
    lines = aligned(head, rows).splitlines()
    assert len(lines) == len(rows) + 1 and len({line.index("accuracy") for line in lines[:1]}) == 1
    assert len({len(line) for line in lines}) == 1, "the last column is right-aligned, so all lines end together"


@pytest.mark.parametrize("ours, theirs, wanted", [(0.7, 0.6, "is better than"), (0.5, 0.6, "is worse than"),
                                                  (0.61, 0.6, "does not differ clearly from")])
def test_the_sentence_says_which_is_better(job, ours, theirs, wanted):
    """Caught: the sign; two standard errors of one run taken for those of the difference; best results picked."""
    of = job.results["preferences"]
    of["mix-user"]["accuracy_own"], of["dpo"]["accuracy_own"] = ({"mean": m, "se": 0.02} for m in (ours, theirs))
    of["mix-pair"]["accuracy_own"] = {"mean": 0.9, "se": 0.02}              # better, and not what the options choose
    assert compared_runs(job) == ("mix-user", "dpo")
    text = sentence(job)
    assert f"mix-user {wanted} dpo" in text and f"{ours:.3f} ± 0.020" in text and text.endswith(".")
    assert text in result(job)


def test_missing_figures_leave_a_sentence(tmp_path):
    """Caught: a job without a mixture, without DPO, without completions, without an evaluation; nan in a cell."""
    def text(**options):
        return sentence(read_job(make_job(tmp_path / json.dumps(options)[:40].replace("/", ""), **options)))

    assert "no mixture to compare it with" in text(runs={"dpo": (1, "pair")})
    assert "no DPO run to compare it with" in text(runs={"mix": (2, "user")})
    assert "own reward" not in text(completions=False)
    assert text(heldout=False) == "No held-out choices were evaluated."
    job = read_job(make_job(tmp_path / "one", prompts=1))
    job.results["policies"]["dpo"]["kl"]["mean"] = float("nan")
    assert "nan" not in result(job)
