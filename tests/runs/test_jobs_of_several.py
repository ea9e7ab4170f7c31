"""Evaluation, sampling, fine-tuning and whole jobs by several processes are those of one (runs/parallel.py), with gloo.
Each docstring names the faults that its test was seen to fail on."""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tinyjob
import torch
from ranks import Group

import eval as evaluation
import train
from data.experiment import finetune as tuning
from data.experiment import simulated, stages
from mixdpo.config import command
from mixdpo.evaluation import completions
from mixdpo.models.weights import load_model
from mixdpo.runs import distributed
from mixdpo.text.tokenizer import load_tokenizer

PROMPTS = ["aab", "b", "abab", "ba", "bbb"]
TYPES = ("first", "second")
FAR = {"head_lr": 0.03}
RUNS = {"dpo": {"experts": 1}, "heads": FAR | {"train_trunk": False, "latent": "user"},
        "models": {"sharing": "models", "latent": "user"}, "adapters": FAR | {"sharing": "lora", "shared_rank": 2}}


def by(count, work, output, seconds=300):
    """Runs work() in `count` processes, as a program does; returns their exit statuses and what they printed."""
    def joined(words):
        with distributed.joined():
            work()

    group = Group(count, lambda rank: command(joined), output)
    return group.wait(seconds), "\n".join(group.printed()[-60:])


def only_the_first_writes():
    """From here on a process other than 0 that replaces or writes a file fails."""
    def writes(*_, **__):
        raise AssertionError("a process other than 0 writes a file")

    if distributed.rank():
        os.replace = Path.write_text = Path.unlink = writes


def score(texts, names, home):
    """Two rewards by hand; only process 0 scores."""
    assert distributed.rank() == 0, "texts are scored by every process"
    return {name: [text.count("ab"[n]) / 9 for text in texts] for n, name in enumerate(names)}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with trained runs and the files of an evaluation."""
    folder = tmp_path_factory.mktemp("job")
    model = tinyjob.make_model(folder / "reference")
    records = tinyjob.make_records(users=6, each=4)
    for n, record in enumerate(records):
        record["annotator"] = TYPES[n // 4 % 2]
    tinyjob.write(folder / "train.jsonl", records)
    tinyjob.write(folder / "heldout.jsonl", tinyjob.make_records(users=6, each=3, seed=5))
    new = tinyjob.make_records(users=4, each=4, seed=6)
    tinyjob.write(folder / "adapt-new.jsonl", [record | {"user": f"new-{record['user']}"} for record in new])
    tinyjob.write(folder / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    (folder / "dataset.json").write_text(json.dumps({"rewards": TYPES, "annotators": TYPES, "max_new": 6}))
    for name, options in RUNS.items():
        train.run(train.TrainConfig(str(folder / "train.jsonl"), str(model), str(folder / name), beta=0.5,
                                    **tinyjob.small(epochs=2, **options)))
    return folder


def evaluate(folder, prompts):
    """eval.py's evaluation of a folder on so many prompts, with the rewards `score`."""
    sys.modules["data.annotators.rewards"] = types.SimpleNamespace(score=score)
    evaluation.write_report = lambda home: None
    return evaluation.evaluate(evaluation.EvalConfig(dir=str(folder), limit=prompts, kl=(0.01,), examples=2))


def numbers(value, path=""):
    """Every number in a JSON document, by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: x for key, part in items for name, x in numbers(part, f"{path}/{key}").items()}
    return {path: value}


@pytest.mark.parametrize("count, prompts", [(2, 5), (3, 2)])
def test_an_evaluation_by_several_processes_is_that_of_one(job, tmp_path, count, prompts):
    """Of three processes one has no prompt.

    Catches: prompts in another order, the random numbers of a prompt's place in its part, log-probs of the first part
    alone, a process that completes all prompts, files and scores of every process."""
    results = {}
    for n in (1, count):
        shutil.copytree(job, tmp_path / "job", ignore=shutil.ignore_patterns("cache"))

        def work():
            only_the_first_writes()
            real = completions.generate_heads

            def part(model, heads, mine, *rest):
                assert len(mine) <= -(-prompts // n), "a process completes more than its part"
                return real(model, heads, mine, *rest)

            completions.generate_heads = part
            evaluate(tmp_path / "job", prompts)

        status, printed = by(n, work, tmp_path / f"{n}.txt")
        assert status == [0] * n, printed
        results[n] = [(tmp_path / "job" / name).read_text() for name in ("results.json", "samples.jsonl")]
        shutil.rmtree(tmp_path / "job")
    assert results[1][1] == results[count][1]
    one, several = (numbers(json.loads(results[n][0])) for n in (1, count))
    assert one.keys() == several.keys() and len(one) > 1000
    for path, value in one.items():
        wanted = pytest.approx(value, abs=2e-5) if isinstance(value, float) else value
        assert several[path] == wanted or path.startswith("/environment"), path


def test_lines_of_several_processes_are_those_of_one(tmp_path):
    """Two processes are interrupted; then the second of three is, and the three go on. Catches: numbers of a part and
    not of all items, lines in another order, parts that are done again, or are left behind."""
    items = list(range(17))

    def lines(name, stops=None):
        def work(start, part):
            assert part == items[start : start + len(part)] and len(part) <= 2
            if distributed.rank() == stops and start >= 7:
                raise KeyboardInterrupt
            with (tmp_path / f"{name}-calls").open("a") as calls:
                calls.write("".join(f"{item}\n" for item in part))
            return [{"item": item} for item in part]

        stages.line_by_line(tmp_path / name, "k" * 64, items, 2, work, name)

    lines("one")
    assert by(2, lambda: lines("three", stops=1), tmp_path / "a.txt")[0] != [0, 0]
    (tmp_path / "three-calls").unlink()
    assert by(3, lambda: lines("three", stops=1), tmp_path / "a.txt")[0] != [0, 0, 0]
    assert not (tmp_path / "three").exists()
    status, printed = by(3, lambda: lines("three"), tmp_path / "b.txt")
    assert status == [0, 0, 0], printed
    assert (tmp_path / "three").read_bytes() == (tmp_path / "one").read_bytes()
    assert not list(tmp_path.glob("three.*"))
    calls = sorted(map(int, (tmp_path / "three-calls").read_text().split()))
    assert calls == items, "an item is worked on twice"


def test_continuations_of_several_processes_are_those_of_one(job, tmp_path):
    """Catches: the random numbers of a prompt's place in its part; continuations cut at another prompt."""
    tokenizer = load_tokenizer(job / "reference")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reference").symlink_to(job / "reference")
        stages.write_lines(tmp_path / name / "p.jsonl", ({"prompt": p} for p in PROMPTS))
    simulated.AT_ONCE, before = 6, simulated.AT_ONCE                         # two prompts a part
    preset = {"continuations": 3, "max_response": 5}
    simulated.sample(tmp_path / "one", preset, tokenizer, "p.jsonl", 3, "k" * 64)
    status, printed = by(2, lambda: simulated.sample(tmp_path / "two", preset, tokenizer, "p.jsonl", 3, "k" * 64),
                         tmp_path / "two.txt")
    simulated.AT_ONCE = before
    assert status == [0, 0], printed
    files = [(tmp_path / name / "sampled-p.jsonl").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1] and files[0].count(b"\n") == len(PROMPTS)


@pytest.mark.parametrize("count, batch", [(2, 5), (3, 2)])
def test_several_processes_fine_tune_as_one(job, tmp_path, count, batch):
    """With three processes and two blocks a step one has no block. Catches: the mean of means over unequal parts,
    gradients that are not summed, files that every process writes."""
    rng = np.random.default_rng(0)
    tinyjob.write(tmp_path / "texts.jsonl", [{"text": "".join(rng.choice(list("ab"), 30))} for _ in range(20)])

    def tuned(out):
        return tuning.finetune(tuning.FinetuneConfig(str(tmp_path / "texts.jsonl"), str(job / "reference"), str(out),
                                                     steps=6, batch=batch, tokens=16, held=4, lr=1e-3,
                                                     dtype="float32"))

    tuned(tmp_path / "one")

    def work():
        only_the_first_writes()
        tuned(tmp_path / "several")
        tuned(tmp_path / "several")                                         # finished before

    status, printed = by(count, work, tmp_path / "several.txt")
    assert status == [0] * count and printed.count("finished before") == 1, printed
    one, several, base = (dict(load_model(str(path)).named_parameters())
                          for path in (tmp_path / "one", tmp_path / "several", job / "reference"))
    for name, p in one.items():
        assert torch.allclose(p, several[name], atol=1e-6), name
    assert max(float((p - base[name]).abs().max().detach()) for name, p in one.items()) > 1e-3
    facts = [json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("one", "several")]
    assert facts[0]["perplexity_after"] == pytest.approx(facts[1]["perplexity_after"], rel=1e-5)


def test_stages_are_made_once(tmp_path):
    """Catches: a stage that every process makes; one that is to be made together, made by the first alone; a process
    that goes on before the files are there."""
    def work():
        def make(name):
            with (tmp_path / name).open("a") as file:
                file.write("made\n")
            return name

        for _ in range(2):
            stages.stage(tmp_path, "alone", "k", ["alone"], lambda: make("alone"))
            assert (tmp_path / "alone").exists()
            stages.stage(tmp_path, "together", "k", ["together"], lambda: make("together"), together=True)

    status, printed = by(3, work, tmp_path / "out.txt")
    assert status == [0] * 3, printed
    assert (tmp_path / "alone").read_text().count("made") == 1
    assert (tmp_path / "together").read_text().count("made") == 3
    assert printed.count("[alone] finished before") == 1 == printed.count("[together] finished before")
