"""mixdpo/serving/facts.py on tiny trained runs and on results.json files of known content.
Docstrings name the faults that each test was seen to fail on."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import tinyjob

import eval as evaluation
from mixdpo.gates import KINDS
from mixdpo.runs.load_run import load_run
from mixdpo.serving import facts as serving
from mixdpo.serving.facts import facts


@pytest.fixture(scope="module")
def job(tmp_path_factory, model_dir):
    """A folder with two mixtures and DPO, evaluated on held-out pairs and new users."""
    folder = tmp_path_factory.mktemp("job")
    records = tinyjob.make_records(users=6, each=4)
    tinyjob.write(folder / "train.jsonl", records)
    tinyjob.write(folder / "heldout.jsonl", tinyjob.make_records(users=6, each=4, seed=1))
    tinyjob.write(folder / "adapt-new.jsonl",
                  [record | {"user": f"new-{record['user']}"} for record in tinyjob.make_records(4, 6, seed=2)])
    data, users = str(folder / "train.jsonl"), dict(latent="user", start="linear")
    for name, options in (("another", users | {"seed": 1}), ("dpo", {"experts": 1}), ("mine", users)):
        tinyjob.run(folder, model_dir, records, name, data=data, **options)
    evaluation.evaluate(evaluation.EvalConfig(dir=str(folder)))
    return folder


def served(path, **other):
    """What facts() reads of policies.ServedRun."""
    run = load_run(path, "cpu", "")
    names = ["reference", *(f"expert-{k}" for k in range(run.config.experts))]
    values = dict(run=run, name=run.name, K=run.config.experts, names=names, chat=False, context=64, max_prompt=9,
                  max_response=8, dpo=None)
    return SimpleNamespace(**values | other)


def with_config(served, **options):
    """The same with other options."""
    run = dataclasses.replace(served.run, config=dataclasses.replace(served.run.config, **options))
    return SimpleNamespace(**vars(served) | {"run": run})


def write_results(path, **parts):
    """results.json with these parts; the others are empty."""
    path.write_text(json.dumps({"preferences": {}, "adapt": {}, "policies": {}, "own_reward": []} | parts))


def figures(own):
    """As little as preference_figures may have, of a run whose experts are named `own`."""
    return {"experts": len(own), "own": own, "trained_on": ["all"], "type_of_pair": ["all"],
            "log_likelihood_own": {"mean": -0.7, "se": 0.1, "n": 4}}


def reasons(found):
    return {row["what"]: row["why"] for row in found["cannot"]}


@pytest.fixture
def alone(tmp_path, model_dir):
    """A mixture with one type per pair, alone in its folder and not evaluated."""
    records = [{name: text for name, text in record.items() if name in ("prompt", "chosen", "rejected")}
               for record in tinyjob.make_records()]
    return tinyjob.run(tmp_path, model_dir, records, "alone")


def test_an_evaluated_run(job):
    """Faults: the counts of units in place of pairs; the options with their defaults; labels without names; the
    adaptation of another run; no alarm of a short run."""
    found = facts(served(job / "mine", dpo=object()))
    results = json.loads((job / "results.json").read_text())
    assert found["summary"] == ("2 experts, each a head (output layer) on one shared model, trained by Mix-DPO on 24 "
                                "comparisons by 6 users; each user has one type of taste.")
    own = results["preferences"]["mine"]["own"]
    assert found["labels"] == [f"Expert {k}" + (f" ({name})" if name else "") for k, name in enumerate(own)]
    assert any(own), "no expert has a name: the test would not see it"
    assert found["data"] == ["train.jsonl"] and found["gate"] == "fixed" and found["latent"] == "user"
    assert found["options"]["--latent"] == "user" and found["options"]["--start"] == "linear"
    assert not found["options"].keys() & {"--data", "--model", "--out", "--gate", "--beta"}
    curve = results["adapt"]["adapt-new"]["mine"]
    assert found["adaptation"] == [{"file": "adapt-new", "points": [
        {"shown": point["shown"], "users": point["users"], "mean": point["accuracy"]["mean"],
         "se": point["accuracy"]["se"]} for point in curve]}]
    assert curve != results["adapt"]["adapt-new"]["another"]
    steps = len((job / "mine" / "metrics.jsonl").read_text().splitlines())
    assert serving.steps_of(load_run(job / "mine", "cpu", "")) == steps
    found = facts(with_config(served(job / "mine"), warmup=99))
    assert any(alarm.startswith(f"The run has {steps} optimizer steps") for alarm in found["alarms"])
    assert not any(alarm.startswith(("warning", "Warning")) for alarm in found["alarms"])


def test_the_headline_is_about_the_served_run(job):
    """Faults: the sentence about the first mixture of the folder; all sentences; none."""
    for name in ("mine", "another"):
        headline = facts(served(job / name))["headline"]
        assert headline.startswith(f"{name} predicts 0.") and "dpo, one policy for all" in headline
        assert "log-likelihood" not in headline


def test_a_collapse_is_an_alarm(job):
    """Faults: the alarm of another run; the prefix of the command line."""
    results = json.loads((job / "results.json").read_text())
    figures = results["preferences"]["mine"]["collapse"]
    found = [alarm for alarm in facts(served(job / "mine"))["alarms"] if "optimizer steps" not in alarm]
    assert len(found) == (figures["verdict"] != "all active")
    assert not found or found[0][0].isupper() and "mine" not in found[0]


def test_no_folder_leaves_the_server(job, model_dir):
    """Faults: the path of the model; the paths of the data."""
    found = facts(served(job / "mine"))
    text = json.dumps(found, allow_nan=False)
    assert str(job) not in text and str(model_dir.parent) not in text and found["model"] == model_dir.name


def test_figures_without_a_standard_error(tmp_path, alone):
    """Faults: null kept as None, on which formatting fails; every null made NaN, of which JSON has none."""
    point = {"shown": 0, "users": 1, "accuracy": {"mean": 0.25, "se": None, "n": 3}, "flips_bayes": None}
    figure = {"mean": 0.1, "se": None, "n": 4}
    row = figures([None, None]) | {"collapse": {"verdict": "posterior collapse", "slope": figure, "active": [0],
                                                "gain": figure}, "log_likelihood_own": figure}
    write_results(tmp_path / "results.json", preferences={"alone": row}, adapt={"adapt-x": {"alone": [point]}})
    found = facts(served(alone))
    assert found["adaptation"][0]["points"] == [{"shown": 0, "users": 1, "mean": 0.25, "se": None}]
    assert found["alarms"][0].startswith("Posterior collapse: the weights of the 2 experts")
    assert "alone predicts held-out choices" in found["headline"]
    assert serving.read_results(tmp_path)["adapt"]["adapt-x"]["alone"][0]["flips_bayes"] is None


def test_a_run_without_an_evaluation_says_what_is_missing(alone):
    """Faults: no reason; a reason that does not apply; an evaluation of other runs is used."""
    found = facts(served(alone))
    assert found["summary"].endswith("on 18 comparisons; each comparison has its own type of taste.")
    assert found["labels"] == ["Expert 0", "Expert 1"] and found["headline"] == "" and found["adaptation"] == []
    assert [*reasons(found)] == ["Types of people", "DPO beside the experts", "A headline figure"]
    assert "Run eval.py" in reasons(found)["A headline figure"]
    write_results(alone.parent / "results.json", preferences={"other": {"own": ["a", "b"]}})
    assert facts(served(alone)) == found


def test_one_policy_says_that_there_is_nothing_to_compare(job):
    """Faults: the reasons of a mixture; its summary."""
    found = facts(served(job / "dpo"))
    assert found["summary"] == "One policy for everybody, trained by DPO on 24 comparisons by 6 users."
    assert [*reasons(found)] == ["Experts, colours and your own type"]
    assert found["labels"] == ["DPO"]


@pytest.mark.parametrize("damage", [{"preferences": {"alone": {"own": 3}}}, {"preferences": {"alone": None}},
                                    {"own_reward": [{"run": "alone"}]}, {"preferences": [["alone"]]}])
def test_a_damaged_evaluation_is_reported_and_harms_nothing(alone, damage):
    """Faults: an error; silence."""
    write_results(alone.parent / "results.json", **damage)
    found = facts(served(alone))
    assert "damaged or of another version" in reasons(found)["A headline figure"]
    assert found["labels"] == ["Expert 0", "Expert 1"] and found["headline"] == ""


def test_an_evaluation_of_the_run_alone_comes_first(alone):
    """Faults: the folder's evaluation first; only one of the two places."""
    write_results(alone.parent / "results.json", preferences={"alone": figures(["a", "b"])})
    assert facts(served(alone))["labels"] == ["Expert 0 (a)", "Expert 1 (b)"]
    write_results(alone / "results.json", preferences={"alone": figures(["c", None])})
    assert facts(served(alone))["labels"] == ["Expert 0 (c)", "Expert 1"]


def test_example_prompts(alone):
    """Faults: samples.jsonl before prompts.jsonl; a prompt twice; more than PROMPTS; a faulty line is an error; texts
    for a chat; a conversation that the page cannot show; prompts of a private run's people; an error for brackets
    that no reader of JSON can follow; a turn without text."""
    home, run = alone.parent, load_run(alone, "cpu", "")
    private = dataclasses.replace(run, config=dataclasses.replace(run.config, epsilon=8.0))
    assert serving.example_prompts(run, False) == []
    tinyjob.write(home / "heldout.jsonl", [{"prompt": "held out", "chosen": "a", "rejected": "b"}])
    assert serving.example_prompts(run, False) == ["held out"] and serving.example_prompts(private, False) == []
    tinyjob.write(home / "samples.jsonl", [{"prompt": "a sample", "texts": {}}])
    assert serving.example_prompts(private, False) == ["a sample"]
    assert serving.example_prompts(run, True) == []                         # a sample's prompt is its text
    one = [{"role": "user", "content": "hi"}]
    two = [{"role": "system", "content": "s"}, *one]
    long = [one[0], {"role": "assistant", "content": "yes"}, one[0]]
    mute = [{"role": "user", "content": None}]
    prompts = (mute, [*mute, *one], "first", "first", one, "  ", long, two, *map(str, range(40)))
    (home / "prompts.jsonl").write_text(f"no JSON\n[]\n{{}}\n{'[' * 100_000}\n" + "".join(
        json.dumps({"prompt": p}) + "\n" for p in prompts))
    assert serving.example_prompts(run, False) == ["first", *map(str, range(11))]
    assert serving.example_prompts(run, True) == [one, two]


def test_a_chat_is_a_run_that_was_trained_on_messages(alone, tmp_path):
    """Faults: every tokenizer with a template is a chat; a faulty first line decides."""
    assert facts(served(alone, chat=True))["chat"] is False
    messages = {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": "c"}]}
    (tmp_path / "chat.jsonl").write_text('{"prompt": 3}\n' + json.dumps(messages) + "\n")
    chat = with_config(served(alone, chat=True), data=str(tmp_path / "chat.jsonl"))
    assert facts(chat)["chat"] is True
    assert facts(SimpleNamespace(**vars(chat) | {"chat": False}))["chat"] is False


def test_a_private_run_shows_no_counts(job):
    """Faults: the number of pairs; the number of users; no epsilon; experts named after the annotators of the training
    data, who are counted without noise."""
    found = facts(with_config(served(job / "mine"), epsilon=8.0))
    assert "trained by Mix-DPO on comparisons, with differential privacy (epsilon 8)" in found["summary"]
    assert "24" not in found["summary"] and "users" not in found["summary"]
    assert "Numbers of comparisons and users" in reasons(found) and found["labels"] == ["Expert 0", "Expert 1"]


def test_names_of_models_and_data(tmp_path):
    """Faults: a hub name without its owner; a folder's parents; the name of the folder of a model that a job tuned; an
    error for another program's finetune.json."""
    (tmp_path / "reference").mkdir()
    assert serving.model_name(str(tmp_path / "reference")) == "reference"
    assert serving.model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    (tmp_path / "reference" / "finetune.json").write_text(json.dumps({"settings": {"model": "/else/smollm2"}}))
    assert serving.model_name(str(tmp_path / "reference")) == "smollm2, fine-tuned on the job's texts"
    for other in ({"settings": 3}, {"settings": {"model": 3}}, {"settings": {"model": str(tmp_path / "reference")}}):
        (tmp_path / "reference" / "finetune.json").write_text(json.dumps(other))
        assert serving.model_name(str(tmp_path / "reference")) == "reference"
    assert serving.data_names("/a/b/x.jsonl,c/y.csv,hub:OWNER/NAME:test") == ["x.jsonl", "y.csv", "hub:OWNER/NAME:test"]


def test_every_gate_has_a_note():
    """Fault: a kind without one."""
    assert serving.GATES.keys() == {*KINDS}
