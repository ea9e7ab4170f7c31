"""Every shape and container from a file to experts: train, evaluate on held-out pairs and new users, export.
What each test catches stands in its docstring."""

import csv
import json

import pytest
import tinyjob
from hubserver import hub  # noqa: F401  (a fixture)
from raising import raises_at

import eval as evaluation
import train
from eval import EvalConfig, evaluate, export
from mixdpo.config import InputError
from mixdpo.evaluation import identifiability, leaks, show
from mixdpo.preferences import read_preferences
from mixdpo.text.tokenizer import load_tokenizer


def bot(text):
    return [{"role": "assistant", "content": text}]


def user(text):
    return [{"role": "user", "content": text}]


def message(who, text):
    return {"from": who, "value": text}


def sides(r):
    return {"chosen": r["chosen"], "rejected": r["rejected"]}


def two(r):
    """The outputs of a record by turns in either place, and which is better."""
    first = len(r["prompt"]) % 2
    return {"output_1": r["rejected" if first else "chosen"], "output_2": r["chosen" if first else "rejected"],
            "preference": 1 + first}


def as_chat(r):
    return {"prompt": user(r["prompt"])} | {side: bot(text) for side, text in sides(r).items()}


def transcript(prompt, answer):
    return f"\n\nHuman: {prompt}\n\nAssistant:{answer}"


SHAPES = {                                                                  # a record -> a row, the same as own format
    "messages": (lambda r: as_chat(r) | {"split": "x"}, as_chat),
    "transcripts": (lambda r: {side: user(r["prompt"]) + bot(text) for side, text in sides(r).items()}, as_chat),
    "messages + answers": (lambda r: {"messages": user(r["prompt"])} | sides(r), as_chat),
    "conversations": (lambda r: {"conversations": [message("human", r["prompt"])]}
                      | {side: message("gpt", text) for side, text in sides(r).items()}, as_chat),
    "HH": (lambda r: {side: transcript(r["prompt"], " " + text) for side, text in sides(r).items()},
           lambda r: {"prompt": transcript(r["prompt"], "")} | {side: " " + text for side, text in sides(r).items()}),
    "instruction": (lambda r: {"instruction": r["prompt"], "input": "", **two(r)},
                    lambda r: {"prompt": r["prompt"] + "\n\n"} | sides(r)),
    "question": (lambda r: {"question": r["prompt"], "response_j": r["chosen"], "response_k": r["rejected"]},
                 lambda r: {"prompt": r["prompt"] + "\n\n"} | sides(r)),
    "columns": (lambda r: {"ask": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "seen": True},
                lambda r: {"prompt": r["prompt"]} | sides(r), "prompt=ask,chosen=good,rejected=bad,"),
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return tinyjob.make_model(tmp_path_factory.mktemp("model"), special=("<end>", "<|im_start|>", "<|im_end|>"))


def go(folder, model, data, heldout, columns):
    """One run, its evaluation and its export, as the three commands do it; returns the evaluation's results."""
    options = {"train_trunk": False, "latent": "user", "rank": 2, "batch": 8, "max_prompt": 40, "max_response": 12,
               "head_lr": 0.01, "start_steps": 1, "experts": 2, "warmup": 1, "dtype": "float32", "columns": columns}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    train.main(["--data", data, "--model", str(model), "--out", str(folder / "run"), *words])
    results = evaluate(EvalConfig(str(folder / "run"), heldout=heldout, adapt=heldout))
    assert len(export(EvalConfig(str(folder / "run"), export=str(folder / "experts")))) == 2
    return results


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(evaluation, "write_report", lambda folder: None)
    monkeypatch.setattr(train, "tune_process", lambda: None)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_from_its_file_to_experts(tmp_path, chat_model, shape):
    """Catches: other ids than those of the same records in the project's own format; --columns that evaluation or
    export does not know of."""
    convert, own, *columns = SHAPES[shape]
    columns, tokenizer = "".join(columns) + "user=worker", load_tokenizer(chat_model)
    files = []
    for name, seed in (("data", 0), ("held", 5)):
        records = tinyjob.make_records(users=4, each=3, seed=seed)
        files.append(tinyjob.write(tmp_path / f"{name}.jsonl",
                                   [convert(r) | {"worker": int(r["user"][1:])} for r in records]))
        wanted = tinyjob.write(tmp_path / "own.jsonl", [own(r) | {"user": r["user"][1:]} for r in records])
        assert read_preferences(files[-1], tokenizer, 40, 12, columns=columns) == read_preferences(
            wanted, tokenizer, 40, 12)
    results = go(tmp_path, chat_model, *files, columns)
    assert len(results["preferences"]["run"]["by_pair"]) == 12 and results["adapt"]["held"]["run"]


def as_csv(path, records):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected", "user"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)


def as_parquet(path, records):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path)


CONTAINERS = {"a.json": lambda path, records: path.write_text(json.dumps(records, indent=1)), "a.csv": as_csv,
              "a.parquet": as_parquet}


@pytest.mark.parametrize("name", CONTAINERS)
def test_several_files_and_the_rows_of_a_failed_step(tmp_path, model_dir, name):
    """Two files of one container. Catches: rows of the other file with the same numbers kept, or none; an evaluation
    that reads one file only; an --out folder that holds one of the files."""
    records = tinyjob.make_records()
    for part in range(2):
        (tmp_path / str(part)).mkdir()
        CONTAINERS[name](tmp_path / str(part) / name, records[9 * part : 9 * part + 9])
    data = f"{tmp_path / '0' / name},{tmp_path / '1' / name}"
    with raises_at(tmp_path / "bad" / "step-2.jsonl", file=data, option="lr"):
        tinyjob.run(tmp_path, model_dir, None, name="bad", data=data, lr=1e30, warmup=0)
    kept = tinyjob.lines(tmp_path / "bad" / "step-2.jsonl")
    known, found = ({(r["prompt"], r["chosen"], r["rejected"], r["user"]) for r in rows} for rows in (records, kept))
    assert len(kept) == 8 and found < known
    (tmp_path / "1" / "config.json").write_text(json.dumps(dict.fromkeys(["data", "model", "out", "experts"])))
    with raises_at(tmp_path / "1" / name, option="out"):
        tinyjob.run(tmp_path, model_dir, None, data=data, out=str(tmp_path / "1"))
    run = tinyjob.run(tmp_path, model_dir, None, data=data)
    whole = tinyjob.run(tmp_path, model_dir, records, name="whole")
    assert tinyjob.equal(run, whole)
    results = evaluate(EvalConfig(str(run), heldout=data, adapt=data))
    assert len(results["preferences"]["run"]["by_pair"]) == 18 and list(results["adapt"]) == ["a+a"]


def test_a_run_on_other_files_is_not_resumed(tmp_path, model_dir):
    """Catches: a finished run taken for that of other columns or of more files; an evaluation with the columns of one
    of two runs."""
    records = [r | {"worker": r["user"], "rater": r["user"][::-1]} for r in tinyjob.make_records()]
    data = tinyjob.write(tmp_path / "a.jsonl", records)
    more = tinyjob.write(tmp_path / "b.jsonl", records)
    run = tinyjob.run(tmp_path, model_dir, None, data=data, columns="user=worker")
    for changed in (dict(data=data, columns="user=rater"), dict(data=f"{data},{more}", columns="user=worker")):
        with pytest.raises(InputError):
            tinyjob.run(tmp_path, model_dir, None, **changed)
    tinyjob.run(tmp_path, model_dir, None, name="other", data=data, columns="user=rater")
    with raises_at(option="columns"):
        evaluate(EvalConfig(str(tmp_path), heldout=data))
    (tmp_path / "other").rename(tmp_path.parent / f"{tmp_path.name}-other")
    own = tinyjob.write(tmp_path / "own.jsonl", tinyjob.make_records())
    for options in (dict(heldout=own), dict(heldout=own, columns="none"), dict(heldout=data, columns="user=rater")):
        assert evaluate(EvalConfig(str(run), **options))["preferences"]
    with raises_at(file=tmp_path / "absent.jsonl", option="heldout"):
        evaluate(EvalConfig(str(run), heldout=f"{own},{tmp_path / 'absent.jsonl'}"))


def test_a_cached_reference_is_of_the_same_columns(tmp_path, model_dir):
    """Catches: the reference's log-probs of one column's prompts used for those of another."""
    records = [r | {"first": r["prompt"], "second": r.pop("prompt")[::-1] + "m"} for r in tinyjob.make_records()]
    data = tinyjob.write(tmp_path / "a.jsonl", records)
    (tmp_path / "fresh").mkdir()
    tinyjob.run(tmp_path, model_dir, None, name="one", data=data, columns="prompt=first")
    two = tinyjob.run(tmp_path, model_dir, None, name="two", data=data, columns="prompt=second")
    assert tinyjob.equal(two, tinyjob.run(tmp_path / "fresh", model_dir, None, data=data, columns="prompt=second"))


def test_validation_preferences_have_the_same_columns(tmp_path, model_dir):
    """Catches: --columns that --validation does not know of; a validation file in the own format that is refused."""
    own = tinyjob.make_records()
    data = tinyjob.write(tmp_path / "a.jsonl", [{"worker": r.pop("user")} | r for r in tinyjob.make_records()])
    found = []
    for name, validation in (("foreign", data), ("own", tinyjob.write(tmp_path / "own.jsonl", own))):
        run = tinyjob.run(tmp_path, model_dir, None, name=name, data=data, columns="user=worker", validation=validation,
                          latent="user", evaluate_every=1)
        found.append((run / "validation.jsonl").read_text())
    assert found[0] == found[1]


def test_the_hub_from_its_split_to_experts(tmp_path, model_dir, hub):
    """Catches: a split of the hub that one of the three commands does not know; its rows that are not kept."""
    for split in ("train", "test"):
        as_parquet(tmp_path / "a.parquet", tinyjob.make_records(users=4, each=3, seed=len(split)))
        hub.files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / "a.parquet").read_bytes()
    results = go(tmp_path, model_dir, "hub:someone/prefs", "hub:someone/prefs:test", "")
    assert len(results["preferences"]["run"]["by_pair"]) == 12 and list(results["adapt"]) == ["prefs:test"]
    with raises_at(file="hub:someone/prefs", option="lr"):
        tinyjob.run(tmp_path, model_dir, None, name="bad", data="hub:someone/prefs", lr=1e30, warmup=0)
    assert len(tinyjob.lines(tmp_path / "bad" / "step-2.jsonl")) == 4


@pytest.mark.parametrize("command", [identifiability, leaks, show], ids=lambda module: module.__name__.split(".")[-1])
def test_commands_that_look_at_a_file_know_its_columns(tmp_path, model_dir, command, capsys):
    """Catches: a command to which --columns is unknown, or that ignores it."""
    records = tinyjob.make_records(users=4, each=3)
    data = tinyjob.write(tmp_path / "a.jsonl", [{"ask": r.pop("prompt"), "worker": r.pop("user")} | r for r in records])
    own = tinyjob.write(tmp_path / "own.jsonl", tinyjob.make_records(users=4, each=3))
    printed = []
    for file, columns in ((data, ["--columns", "prompt=ask,user=worker"]), (own, [])):
        command.main([file, "--model", str(model_dir), "--max-prompt", "40", "--max-response", "12", *columns])
        printed.append([line for line in capsys.readouterr().out.splitlines() if str(tmp_path) not in line])
    assert printed[0][-len(printed[1]) :] == printed[1]
