"""data/report/job.py on a made-up job: NumPy says what the figures should be. Each docstring names what the test
catches."""

import json

import numpy as np
from fakejob import make_job, write

from data.report.job import by_annotator, last_responsibilities, read_job, smooth

# ---- reading


def test_runs_are_those_of_the_results_in_their_order(tmp_path):
    """Caught: reference/ (it has a config.json) taken for a run; runs of other data beside an evaluated run shown;
    alphabetical order.
    """
    assert [run.name for run in read_job(make_job(tmp_path / "usual")).runs] == ["dpo", "mix-pair", "mix-user"]
    other = make_job(tmp_path / "job", runs={"z": (2, "pair"), "a": (1, "pair")})
    assert [run.name for run in read_job(other).runs] == ["z", "a"]
    results = json.loads((other / "results.json").read_text())
    results["preferences"].pop("z")
    results["policies"] = {name: row for name, row in results["policies"].items() if not name.startswith("z ")}
    (other / "results.json").write_text(json.dumps(results))
    assert [run.name for run in read_job(other).runs] == ["a"]
    (other / "results.json").unlink()
    assert [run.name for run in read_job(other).runs] == ["a", "z"]


def test_groups_are_pairs_in_file_order_and_users_by_first_appearance(tmp_path):
    """Caught: users sorted by name, or by last appearance; an empty line counted; the whole file for a run that
    dropped lines.
    """
    home = make_job(tmp_path / "job", runs={"p": (2, "pair"), "u": (2, "user"), "d": (2, "pair")})
    order = [("z", "sentiment"), ("a", "grammar"), ("z", "sentiment"), ("m", "informativeness"), ("a", "grammar")]
    write(
        home / "train.jsonl",
        [{"prompt": "p", "chosen": "c", "rejected": "r", "user": u, "annotator": a} for u, a in order],
    )
    text = (home / "train.jsonl").read_text()
    (home / "train.jsonl").write_text(text.replace("\n", "\n\n", 1))
    config = json.loads((home / "d/config.json").read_text())
    (home / "d/config.json").write_text(json.dumps(config | {"drop": True}))
    p, u, d = read_job(home).runs
    assert p.units == [a for _, a in order]
    assert u.units == ["sentiment", "grammar", "informativeness"]
    assert d.units == []


# ---- figures


def test_responsibilities_by_annotator_pool_all_groups_of_an_interval(tmp_path):
    """Caught: a mean of steps' means; q of the wrong unit; an interval without groups of an annotator as 0; midpoints
    off by one.
    """
    run = read_job(make_job(tmp_path / "job")).runs[2]
    run.config["experts"], run.units = 2, ["b", "a", "b"]
    run.steps = [
        {"step": 1, "groups": [2, 0], "q": [[0.2, 0.8], [0.4, 0.6]]},
        {"step": 2, "groups": [0], "q": [[0.9, 0.1]]},
        {"step": 3, "groups": [1], "q": [[1.0, 0.0]]},
        {"step": 4, "groups": [1, 2], "q": [[0.5, 0.5], [0.7, 0.3]]},
    ]
    found = by_annotator(run, intervals=2)
    assert list(found) == ["b", "a"]
    np.testing.assert_allclose(found["b"][0], [1.5, 3.5])
    np.testing.assert_allclose(found["b"][1], [[0.5, 0.5], [0.7, 0.3]])
    np.testing.assert_allclose(found["a"][1], [[np.nan, np.nan], [0.75, 0.25]])
    last = last_responsibilities(run)
    np.testing.assert_allclose(last["b"], [[0.9, 0.1], [0.7, 0.3]])
    np.testing.assert_allclose(last["a"], [[0.5, 0.5]])


def test_curves_are_means_of_consecutive_steps():
    """Caught: steps left out at the end; a curve that starts at step 0; one number a step and one an expert
    treated alike.
    """
    values = [[float(t), 10.0 * t] for t in range(1, 8)]
    x, y = smooth(values, intervals=3)
    np.testing.assert_allclose(x, [1.5, 4.0, 6.5])
    np.testing.assert_allclose(y, [[1.5, 15], [4, 40], [6.5, 65]])
    np.testing.assert_allclose(smooth([1.0, 2.0], intervals=50), [[1, 2], [1, 2]])
