"""data/report/result.py and mixdpo/evaluation/frontier.py on a made-up job: what opens a report. What each test catches
stands in its docstring."""

import copy
import json

import numpy as np
import pytest
from fakejob import make_job

from data.report.job import read_job
from data.report.pictures import accuracies
from data.report.result import accuracy_table, result
from mixdpo.evaluation import frontier
from mixdpo.evaluation.tables import sentences

TYPES = ["sentiment", "informativeness"]


@pytest.fixture
def job(tmp_path):
    return read_job(make_job(tmp_path / "job", prompts=40))


def test_a_method_is_its_runs_of_any_seed_and_beta(job):
    """Caught: seeds as methods of their own; two betas at one point; a mixture without users served by its weights for
    strangers when it knows its users; points of another run; a KL that only one of two seeds reaches as a point; a soup
    in the baseline."""
    rows = job.results["own_reward"]
    again = [copy.deepcopy(row) for row in rows if row["run"] == "dpo"]
    for row in again:
        row["run"], row["config"]["seed"] = "dpo-seed1", 1
        row["gain_by_prompt"] = [value + 1 for value in row["gain_by_prompt"]]
        row["kl_by_prompt"] = [0.8 * value for value in row["kl_by_prompt"]]
    low = [copy.deepcopy(row) for row in rows if row["run"] == "dpo" and row["target"] is None]
    low[0]["run"], low[0]["config"]["beta"] = "dpo-beta0.01", 0.01
    found = {m.name: m for m in frontier.methods({"own_reward": [*rows, *again, *low]})}
    assert list(found) == ["dpo", "mix-user", "mix-pair"]
    assert [(p.beta, p.target, p.seed) for p in found["dpo"].points] == [
        (0.1, None, 0), (0.1, 0.5, 0), (0.1, None, 1), (0.1, 0.5, 1), (0.01, None, 0)]
    assert [kl.shape for kl, _ in found["dpo"].seeds()] == [(3, 40)]        # seed 1 lacks a beta
    assert found["dpo"].full.gain.mean() == pytest.approx(np.mean(rows[0]["gain_by_prompt"]) + 0.5)
    assert [m.serves for m in found.values()] == ["one policy", "mixture", "fixed weights"]
    soup = [row | {"run": "mix-soup", "config": row["config"] | {"rank": 3}} for row in rows if row["run"] == "dpo"]
    mixed = frontier.methods({"own_reward": [*rows, *soup]})
    assert mixed[-1].serves == "soup" and len(frontier.main_methods(mixed)[1].points) == 2
    fewer = frontier.methods({"own_reward": [*rows, *(row for row in again if row["target"] is None)]})[0]
    assert [gain.shape for _, gain in fewer.seeds()] == [(2, 40), (1, 40)]
    assert frontier.common_kl(fewer) == pytest.approx(0.8 * np.mean(rows[0]["kl_by_prompt"]))
    line = frontier.compare(fewer, fewer, 0.4)["ours"]
    each = [np.interp(0.4, *frontier.frontier_of([(kl.mean(1), gain.mean(1))])) for kl, gain in fewer.seeds()]
    assert line == pytest.approx(np.mean(each)) == pytest.approx(np.interp(0.4, *fewer.line()))
    whole = [row for row in rows if row["run"] == "dpo" and row["target"] is None]
    twice = frontier.methods({"own_reward": [*rows, *whole]})
    assert [p.target for p in twice[0].points] == [None], "one of two runs with equal options does not reach it"
    known = next(row for row in rows if row["run"] == "mix-user" and row["users"] == "known users")
    assert found["mix-user"].full.gain.tolist() == known["gain_by_prompt"]


@pytest.mark.parametrize("there, used", [((0, 1), ([0.1, 0.01], [1.1, 1.01])), ((1,), ([1.1, 1.01],)),
                                         ((1, 0), ([0.1, 0.01], [1.1, 1.01])), ((5,), ([0.1], [1.1], [5.01]))], ids=str)
def test_points_are_compared_on_the_same_seeds(job, there, used):
    """Beta 0.1 has the seeds 0 and 1. Caught: seed 0 of it beside seed 1 of a beta that has no seed 0, or has it later;
    a crash where no seed is common."""
    one = next(row for row in job.results["own_reward"] if row["run"] == "dpo" and row["target"] is None)

    def run(seed, beta):
        return one | {"config": one["config"] | {"seed": seed, "beta": beta}, "gain_by_prompt": [seed + beta] * 40}

    found = frontier.methods({"own_reward": [run(seed, 0.1) for seed in (0, 1)] + [run(seed, 0.01) for seed in there]})
    gains = [gain.mean(1).tolist() for _, gain in found[0].seeds()]         # of the points of each seed
    assert gains == [pytest.approx(own) for own in used]


def test_runs_on_other_data_are_another_method(job):
    """Caught: two policies with equal options, trained on other files, averaged under the name of the first; seeds in
    other folders, or whose files have the seed in their names, as methods of their own."""
    rows = [row for row in job.results["own_reward"] if row["run"] == "dpo"]

    def again(name, data, seed=0):
        return [row | {"run": name, "config": row["config"] | {"data": data, "seed": seed},
                       "gain_by_prompt": [value + 1 for value in row["gain_by_prompt"]]} for row in rows]

    noisy = frontier.methods({"own_reward": [*rows, *again("dpo-noisy", "elsewhere/noisy.jsonl")]})
    assert [m.name for m in noisy] == ["dpo", "dpo-noisy"]
    assert [m.full.gain.mean() - np.mean(rows[0]["gain_by_prompt"]) for m in noisy] == pytest.approx([0, 1])
    seeds = again("dpo-seed1", "other/train.jsonl", 1), again("dpo-seed2", "other/train-seed2.jsonl", 2)
    assert len(frontier.methods({"own_reward": [*rows, *seeds[0]]})) == 1
    both = frontier.methods({"own_reward": [*again("dpo-seed1", "a/train-seed1.jsonl", 1), *seeds[1]]})
    assert len(both) == 1 and [p.seed for p in both[0].points] == [1, 1, 2, 2]


def test_a_ceiling_has_all_types(job):
    """Caught: a beta, or a seed, of one type alone as a point of the ceiling, whose gain was then that type's; a
    policy for one of two types as the ceiling, and its gain compared with the mean of both."""
    rows = [copy.deepcopy(row) for row in job.results["own_reward"] if row["run"] == "dpo" and row["target"] is None]

    def of_type(n, **config):
        kind = TYPES[n]
        return [row | {"run": f"dpo-{kind}", "users": f"type {kind}", "types": {kind: row["types"][kind]},
                       "config": row["config"] | config, "kl_by_prompt": [n + 1.0] * 40} for row in rows]

    both = of_type(0) + of_type(1)
    more = both + of_type(0, beta=0.01) + of_type(0, seed=1)
    ceiling = frontier.main_methods(frontier.methods({"own_reward": job.results["own_reward"] + more}))[2]
    assert [(p.beta, p.seed) for p in ceiling.points] == [(0.1, 0)]
    assert ceiling.full.kl.mean() == 1.5 and list(ceiling.full.types) == TYPES
    alone = {"own_reward": job.results["own_reward"] + of_type(0)}
    assert frontier.main_methods(frontier.methods(alone))[2] is None
    head, table = frontier.own_reward_table(alone)
    assert table[-1][0] == "one policy per known type" and table[-1][-2:] == ["–", "–"]
    apart = {"own_reward": of_type(0, beta=0.01) + of_type(1)}
    assert frontier.methods(apart) == []


@pytest.mark.parametrize("gate, serves", [("linear", "mixture"), ("mlp", "mixture"), ("random", "fixed weights"),
                                          ("domain", "fixed weights"), ("fixed", "fixed weights")])
def test_without_users_a_trained_gate_is_the_result(job, gate, serves):
    """Caught: weights that serve everybody alike, or that are given with the domain, as what the result is about; a
    sentence that does not name them; no result where no gate is trained."""
    rows = [row for row in job.results["own_reward"] if row["run"] in ("dpo", "mix-pair")]
    more = [row | {"run": "moe", "config": row["config"] | {"gate": gate}} for row in rows if row["run"] == "mix-pair"]
    found = frontier.methods({"own_reward": rows + more})
    assert {m.name: m.serves for m in found}["moe" if gate != "fixed" else "mix-pair"] == serves
    name = "moe" if serves == "mixture" else "mix-pair"
    assert frontier.main_methods(found)[0].name == name
    assert f" with {name} and by " in frontier.own_reward_sentence({"own_reward": rows + more})


def test_one_policy_per_known_type_is_one_method(job):
    """Caught: the ceiling as two methods; the KL or the gain of one type for the mean of both; the
    ceiling compared at a KL that it does not reach, or that one of its types does not reach."""
    rows = [copy.deepcopy(row) for row in job.results["own_reward"] if row["run"] == "dpo"]
    parts = []
    for n, kind in enumerate(TYPES):
        for row in copy.deepcopy(rows):
            row |= {"run": f"dpo-{kind}", "users": f"type {kind}", "types": {kind: row["types"][kind]}}
            row["config"]["data"] = f"train-{kind}.jsonl"
            row["kl_by_prompt"] = [n + 1.0] * 40
            parts.append(row)
    job.results["own_reward"] += parts
    ceiling = frontier.main_methods(frontier.methods(job.results))[2]
    assert ceiling.name == "one policy per known type" and len(ceiling.points) == 2
    fewer = frontier.methods({"own_reward": [row for row in parts if row is not parts[-1]]})[0]
    assert parts[-1]["target"] is not None and len(fewer.points) == 1
    assert ceiling.full.kl.mean() == 1.5 and list(ceiling.full.types) == TYPES
    mixture, baseline, _ = frontier.main_methods(frontier.methods(job.results))
    assert frontier.common_kl(mixture, baseline) > 1.5 == frontier.common_kl(mixture, baseline, ceiling)
    best = frontier.compare(mixture, ceiling, 4.0)                          # beyond 1.5 it would be taken to stay level
    assert best["kl"] == 1.5 and best["ours"] == pytest.approx(np.interp(1.5, *mixture.line()))
    assert f"{best['theirs']:.3f} at 1.5 nats; the mixture has {best['ours'] / best['theirs']:.0%}" in sentences(
        job.results)[0]


def test_the_sentence_compares_at_equal_kl(job):
    """Caught: gains at different KL; the ratio upside down; the sign; a difference within chance called one; the best
    mixture picked instead of the first."""
    mixture, baseline, _ = frontier.main_methods(frontier.methods(job.results))
    assert (mixture.name, baseline.name) == ("mix-user", "dpo")
    found = frontier.compare(mixture, baseline)
    most = min(m.full.kl.mean() for m in (mixture, baseline))
    assert found["kl"] == pytest.approx(most) and found["theirs"] == pytest.approx(baseline.full.gain.mean())
    kl, gain = mixture.line()
    assert found["ours"] == pytest.approx(np.interp(most, kl, gain)) and found["ratio"] < 1
    text = sentences(job.results)[0]
    assert f"{found['ours']:.3f} with mix-user" in text and f"KL of {most:.1f} nats" in text
    assert f"{found['difference']['mean']:+.3f}" in text and "may be chance" not in text
    for n, row in enumerate(job.results["own_reward"]):
        row["gain_by_prompt"] = (0.1 + np.random.default_rng(n).normal(0, 1, 40)).tolist()
    assert "may be chance" in sentences(job.results)[0]


def test_report_and_console_state_the_same_result(job):
    """Caught: two rules for one result; a type's accuracy in another type's column; a cell that is nan."""
    text = result(job)
    for sentence in sentences(job.results):
        assert sentence.split("±")[0] in text.replace("&#58;", ":")
    head, rows = accuracy_table(job)
    found = {row[0]: dict(zip(head, row)) for row in rows}
    for kind in TYPES:
        a = job.results["preferences"]["mix-user"]["types"][kind]["accuracy"]
        assert found["mix-user"][f"accuracy, {kind}"] == f"{a['mean']:.3f} ± {a['se']:.3f}"
    head, rows = frontier.own_reward_table(job.results)
    assert [row[0] for row in rows] == ["dpo", "mix-user", "mix-pair"] and rows[0][-2:] == ["–", "–"]
    assert "nan" not in text


def test_missing_figures_leave_a_sentence(tmp_path):
    """Caught: a job without a mixture, without DPO, without completions, without an evaluation."""
    def text(**options):
        home = make_job(tmp_path / json.dumps(options)[:40].replace("/", ""), **options)
        return " ".join(sentences(read_job(home).results))

    assert "dpo predicts held-out choices" in text(runs={"dpo": (1, "pair")})
    assert "mix predicts held-out choices" in text(runs={"mix": (2, "user")})
    assert "own reward" not in text(completions=False)
    assert "held-out" not in text(heldout=False)
    assert result(read_job(make_job(tmp_path / "none", heldout=False, completions=False))).count("Nothing") == 1


def test_known_types_are_one_bar_and_seeds_are_none():
    """Caught: a type's choices by another type's policy; a bar for each seed; the policies of two of three types called
    those of all; a bar missing where no run is of one type."""
    def figures(a, b, trained_on=("a", "b")):
        return {"trained_on": [*trained_on], "types": {"a": {"accuracy": {"mean": a}}, "b": {"accuracy": {"mean": b}}}}

    runs = {"dpo": figures(0.5, 0.6), "dpo-seed1": figures(0.1, 0.1), "dpo-a": figures(0.7, 0.2, "a"),
            "dpo-b": figures(0.3, 0.8, "b"), "dpo-a-seed1": figures(0.0, 0.0, "a"), "mixture": figures(0.65, 0.75)}
    found = {run: [f["mean"] for f in of] for run, of in accuracies(runs, ["a", "b"]).items()}
    assert found == {"dpo": [0.5, 0.6], "mixture": [0.65, 0.75], frontier.KNOWN: [0.7, 0.8]}
    assert list(accuracies({name: runs[name] for name in ("dpo", "dpo-a")}, ["a", "b"])) == ["dpo", "dpo-a"]
