"""train.py --epsilon. Runs are compared with an oracle that shares no code with them (private_oracle.py). Docstrings
name the faults that each test was seen to catch."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tinyjob
import torch
from private_oracle import Twin, public_secret
from raising import raises_at

import train
from mixdpo.config import InputError
from mixdpo.private import budget
from mixdpo.private import dp_sgd as privacy
from mixdpo.private.accountant import Mechanism, epsilon_of
from mixdpo.private.keys import Key
from mixdpo.runs import setup
from mixdpo.runs.checkpoint import gate_state
from mixdpo.runs.gate_inputs import make_gate
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.rules import validate

PRIVATE = dict(epsilon=8.0, clip=17.0, batch=6, micro=3, beta=1.0)           # a user of four pairs is cut by micro
USERS = dict(latent="user", privacy_unit="user", batch=2, clip=55.0)
HEADS, LORA = dict(train_trunk=False, clip=0.7), dict(sharing="lora", targets="q_proj,up_proj", clip=0.7)
CASES = {
    "dpo": dict(experts=1),
    "one head": HEADS | dict(experts=1),
    "pairs": dict(rank=0),
    "gate": dict(experts=3, gate="linear", gate_entropy=0.1),
    "users": USERS,
    "users, one type a pair": HEADS | dict(privacy_unit="user", gate="mlp", batch=2, clip=5.0),
    "models": dict(USERS, sharing="models", weights="0.3,0.7"),
    "lora": LORA,
    "context": dict(USERS, estep="context", context=1, epochs=2),
    "empty steps": dict(experts=1, batch=1),
    "declared number": dict(HEADS, examples=40),
    "frozen head": dict(HEADS, freeze="1", gate="linear"),
    "frozen adapter": dict(LORA, freeze="0"),
    "heads of a private run": dict(HEADS, start="none", init_experts="heads:1,fresh", freeze="0"),
    "adapters of a private run": dict(LORA, start="none", init_experts="fresh,lora:0", epochs=2),
}


def records():
    """Six users with four pairs each; two lines again; a line of a domain; a user whose context the file says."""
    made = tinyjob.make_records(users=6, each=4)
    made[3]["domain"], made[5]["context"], made[11]["context"] = "letters", True, False
    return made + [made[0], made[4], made[0]]


def private(options) -> dict:
    """All options of a tiny run. Ten times the usual rates: posteriors then leave their prior in a few steps."""
    made = tinyjob.small(**PRIVATE | options)
    return made | {name: 10 * made[name] for name in ("lr", "head_lr") if name in made}


def job(folder, model, name="run", key=Key(public_secret(11)), **options):
    return tinyjob.run(folder, model, records(), name=name, key=key, **private(options))


def twin(folder, model, name="run", secret=public_secret(11), **options):
    tinyjob.write(folder / f"{name}.jsonl", records())
    paths = dict(data=str(folder / f"{name}.jsonl"), model=str(model), out=str(folder / "twin"))
    return Twin(TrainConfig(**paths | private(options)), secret)


def off(folder, wanted) -> float:
    found = tinyjob.tensors(folder)
    assert {n for n in found if n.startswith("experts.")} == {n for n in wanted if n.startswith("experts.")}
    return max(float((found[name] - value).abs().max()) for name, value in wanted.items())


def privacy_of(folder) -> dict:
    return json.loads((folder / "privacy.json").read_text())


@pytest.fixture(scope="module")
def sources(tmp_path_factory, model_dir):
    """Finished runs of two experts to take over: private ones, one of them of users, and one without privacy."""
    folder = tmp_path_factory.mktemp("sources")
    wide = dict(batch=30, epsilon=6.0)                                      # one step
    made = {name: job(folder, model_dir, name=name, **wide | options)
            for name, options in (("heads", HEADS), ("lora", LORA), ("of users", HEADS | dict(privacy_unit="user")))}
    return made | {"open": tinyjob.run(folder, model_dir, records(), name="open", train_trunk=False)}


def taking(sources, options) -> dict:
    """The options, with the source's folder for its name."""
    named = [entry.split(":") for entry in options.get("init_experts", "").split(",")]
    return options | {"init_experts": ",".join(":".join([str(sources.get(name, name)), *k]) for name, *k in named)}


# --- the run and its twin ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_private_run_is_its_twin(tmp_path, model_dir, sources, case):
    """To 2e-6. Faults: draws for sampling, start or context by position in the file; one draw for all; batches of
    fixed size; the same noise in each step; a user clipped by micro-batch, by parameter, or without the gate; the
    mean over pairs that came; noise in frozen experts; a step without examples left out; a rate for another number of
    steps; NaN in the table."""
    options = taking(sources, CASES[case])
    out, other = job(tmp_path, model_dir, **options), twin(tmp_path, model_dir, **options)
    wanted, found = other.train(), tinyjob.tensors(out)
    assert off(out, wanted) < 2e-6
    assert min(other.norms) < other.config.clip < max(other.norms), "some are clipped, some are not"
    assert case != "empty steps" or 0 in other.sizes
    assert found["table"].isfinite().all()
    begun = twin(tmp_path, model_dir, **options).experts.float()
    for name, p in begun.named_parameters():
        for k in other.config.frozen if p.requires_grad else ():
            assert torch.equal(found[f"experts.{name}"][k], p[k]) and not torch.equal(found[f"experts.{name}"], p)


def no_clipping(monkeypatch):
    monkeypatch.setattr(privacy, "clip_factors", lambda norm, clip: torch.ones_like(norm))


def no_noise(monkeypatch):
    monkeypatch.setattr(privacy.Noise, "release", lambda self, total, t: [g / self.expected for g in total])


def no_chance(monkeypatch):
    monkeypatch.setattr(budget, "participants", lambda key, names, rate, steps: [
        range(t % 2, len(names), round(1 / rate)) for t in range(steps)])


def no_empty_step(monkeypatch):
    real_step = train.step

    def step(state, problem, em):
        if not problem.plan.steps[state.t][1]:
            state.optimizer.step = lambda: None
        result = real_step(state, problem, em)
        vars(state.optimizer).pop("step", None)
        return result

    monkeypatch.setattr(train, "step", step)


FAULTS = {"clipping": no_clipping, "noise": no_noise, "Poisson sampling": no_chance, "an empty step": no_empty_step}


@pytest.fixture(scope="module")
def of_empty_steps(tmp_path_factory, model_dir):
    return twin(tmp_path_factory.mktemp("twin"), model_dir, **CASES["empty steps"]).train()


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_taken_away_is_missed(tmp_path, model_dir, monkeypatch, of_empty_steps, what):
    """A run without one part of the mechanism differs much from the oracle, which has this part."""
    FAULTS[what](monkeypatch)
    assert off(job(tmp_path, model_dir, **CASES["empty steps"]), of_empty_steps) > 1e-3


def test_noise_of_the_right_size_reaches_every_parameter(tmp_path, model_dir, monkeypatch):
    """What is stepped with on an empty step is noise of deviation sigma C / expected, in experts and gate. Faults: the
    gate without noise; factors that have no gradient yet without noise."""
    seen, release = [], privacy.ClippedSum.release

    def kept(self):
        release(self)
        seen.append((len(self.norms), [p.grad.flatten() for p in self.parameters]))

    monkeypatch.setattr(privacy.ClippedSum, "release", kept)
    facts = privacy_of(job(tmp_path, model_dir, batch=1, gate="linear"))
    wanted = facts["noise_multiplier"] * facts["clip"] / (facts["rate"] * facts["examples"])
    empty = [grads for count, grads in seen if count == 0]
    assert len(empty) > 4 and all(g.abs().max() > 0 for grads in empty for g in grads)
    assert float(torch.cat([g for grads in empty for g in grads]).std()) == pytest.approx(wanted, rel=0.02)


# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit, examples", [("pair", 27), ("user", 6)])
def test_the_budget_is_what_was_asked_for(tmp_path, model_dir, unit, examples):
    """Faults: passes counted as steps; the rate of pairs used for users; a pair that the file marks as context,
    and that is trained on, not counted; the key kept."""
    out = job(tmp_path, model_dir, privacy_unit=unit, epochs=3, batch=2)
    facts, rate, steps = privacy_of(out), 2 / examples, -(-3 * examples // 2)
    assert (facts["unit"], facts["examples"], facts["rate"], facts["steps"]) == (unit, examples, rate, steps)
    assert 7.99 < facts["epsilon"] <= 8 and facts["delta"] == 1e-5 and facts["experts_taken_over"] == []
    assert facts["epsilon"] == epsilon_of([Mechanism(facts["noise_multiplier"], rate, steps)], 1e-5)
    assert "metrics.jsonl" in facts["not_covered"][-1] and not (out / "noise-key").exists()


def test_budgets_of_private_experts_add_up(tmp_path, model_dir, sources):
    """Faults: a source missing in epsilon or delta; a source of two experts counted twice."""
    heads = Path(sources["heads"])
    again = heads.parent / "." / ".." / heads.parent.name / heads.name      # the same folder
    own = job(tmp_path, model_dir, name="own", **HEADS)
    both = job(tmp_path, model_dir, name="both", start="none", init_experts=f"{heads}:0,{again}:1", **HEADS)
    facts, first, this = privacy_of(both), privacy_of(heads), privacy_of(own)
    assert facts["this_run"] == {"epsilon": this["epsilon"], "delta": this["delta"]}
    assert facts["epsilon"] == pytest.approx(this["epsilon"] + first["epsilon"], rel=1e-12) and first["epsilon"] > 5.9
    assert facts["delta"] == pytest.approx(2e-5, rel=1e-12)
    assert [(run["epsilon"], run["delta"]) for run in facts["experts_taken_over"]] == [(first["epsilon"], 1e-5)]
    third = job(tmp_path, model_dir, name="third", start="none", init_experts=f"{both}:0,fresh", **HEADS)
    assert privacy_of(third)["epsilon"] == pytest.approx(facts["epsilon"] + this["epsilon"], rel=1e-12)


@pytest.mark.parametrize("entries, unit", [("open:0,fresh", "pair"), ("heads:0,open:1", "pair"),
                                           ("heads:0,fresh", "user"), ("of users:0,fresh", "pair")])
def test_experts_outside_of_the_budget_are_refused(tmp_path, model_dir, sources, entries, unit):
    """And nothing is written. Faults: experts trained without privacy pass as covered; only the first source is looked
    at; pairs' budgets added to users'."""
    options = taking(sources, dict(HEADS, init_experts=entries, privacy_unit=unit, start="none"))
    with pytest.raises(InputError) as error:
        job(tmp_path, model_dir, key=None, **options)
    assert error.value.option == "init_experts"
    assert not any((tmp_path / "run" / name).exists() for name in ("privacy.json", "noise-key", "checkpoint"))


def test_a_run_without_privacy_leaves_no_privacy_json(tmp_path, model_dir):
    """In a directory where a private one was killed before its first checkpoint. Fault: its privacy.json stays, and
    --init-experts takes the experts trained without privacy as covered."""
    killed(tmp_path, model_dir, 1, **HEADS)
    out = tinyjob.run(tmp_path, model_dir, records(), train_trunk=False)
    assert not (out / "privacy.json").exists()


def test_a_user_who_never_took_part_leaves_no_nan(tmp_path, model_dir):
    """DPO's responsibilities are 1, of all users. Fault: NaN in the table of the checkpoint for those not drawn."""
    options = dict(USERS, experts=1, batch=1)
    assert 0 in twin(tmp_path, model_dir, **options).draws().sum(1), "not everybody takes part"
    table = tinyjob.tensors(job(tmp_path, model_dir, **options))["table"]
    assert table.shape == (6, 1) and not table.any() and not table.isnan().any()


# --- the key ----------------------------------------------------------------------------------------------------------


def killed(folder, model, t: int, **options) -> Path:
    """The key's file of a run that was killed after step t, before its checkpoint; the one of step t - 1 is there."""
    def stopping(state, problem, em):
        result = step(state, problem, em)
        if state.t == t:
            raise KeyboardInterrupt
        return result

    step = train.step
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "step", stopping)
        job(folder, model, key=None, save_minutes=0.0, **options)
    return folder / "run" / "noise-key"


def test_a_private_run_that_was_killed_ends_as_another(tmp_path, model_dir):
    """Bit-identical, with the secret that is in the directory until then, its owner's only. Faults: the secret drawn
    again; sampling from --seed, which is published; the secret kept."""
    kept = killed(tmp_path, model_dir, 2)
    found = json.loads(kept.read_text())
    secret = bytes.fromhex(found["key"])
    assert kept.stat().st_mode & 0o777 == 0o600 and set(found) == {"key", "options"} and len(secret) == 32
    out, reference = job(tmp_path, model_dir, key=None), job(tmp_path, model_dir, name="reference", key=Key(secret),
                                                         data=str(tmp_path / "run.jsonl"))
    assert tinyjob.equal(out, reference) and not kept.exists()
    assert off(out, twin(tmp_path, model_dir, secret=secret).train()) < 2e-6
    public = job(tmp_path, model_dir, name="public", data=str(tmp_path / "run.jsonl"))
    assert not tinyjob.equal(out, public)
    assert not any(found["key"].encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_key_belongs_to_the_options(tmp_path, model_dir):
    """Faults: two releases that share noise; a key drawn anew at each call, before the first checkpoint or after it."""
    first = json.loads(killed(tmp_path, model_dir, 1).read_text())
    again = json.loads(killed(tmp_path, model_dir, 1).read_text())
    other = json.loads(killed(tmp_path, model_dir, 1, clip=1.5).read_text())
    assert again == first and other["key"] != first["key"] and other["options"] != first["options"]
    later = json.loads(killed(tmp_path, model_dir, 2, clip=1.5).read_text())
    assert later == json.loads(killed(tmp_path, model_dir, 3, clip=1.5).read_text()) == other


@pytest.mark.parametrize("gone", ["file", "options"])
def test_a_run_does_not_resume_under_another_key(tmp_path, model_dir, gone):
    """Fault: a fresh key for an old checkpoint; the sampling would not be Poisson sampling."""
    kept = killed(tmp_path, model_dir, 3)
    found = json.loads(kept.read_text())
    kept.unlink()
    if gone == "options":
        kept.write_text(json.dumps(found | {"options": "0" * 64}))
    with pytest.raises(InputError) as error:
        job(tmp_path, model_dir, key=None)
    assert error.value.file == kept


def test_a_key_that_outlived_its_run_is_dropped(tmp_path, model_dir, monkeypatch):
    """Killed between the last checkpoint and dropping the key. Fault: a secret that remains for ever, with the results
    that were made with it."""
    def kill(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "delete_key", kill)
    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, model_dir, key=None)
    assert (tmp_path / "run" / "noise-key").exists()
    monkeypatch.undo()
    job(tmp_path, model_dir, key=None)
    assert not (tmp_path / "run" / "noise-key").exists()


def test_a_public_key_is_the_documented_one():
    assert Key.public(11).secret == public_secret(11) and len({Key.fresh().secret for _ in range(3)}) == 3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, name", [
    (dict(clip=math.inf), "clip"), (dict(start="linear"), "start"), (dict(gate="user"), "gate"),
    (dict(gate="domain"), "gate"), (dict(weights="update"), "weights"), (dict(robust=0.1), "robust"),
    (dict(em="incremental", latent="user", privacy_unit="user"), "em"),
    (dict(variant="gumbel"), "variant"), (dict(delta=2.0), "delta"),
    (dict(gate="linear", gate_balance=0.1), "gate-balance"), (dict(latent="user"), "privacy-unit"),
    (dict(estep="first", start="none"), "estep"), (dict(epsilon=0.0), "epsilon"),
])
def test_what_would_leak_is_refused(options, name):
    """Each of these learns from the data outside of the clipped sums, or lets one example affect the others."""
    with raises_at(option=name):
        validate(TrainConfig(**dict(data="", model="", out="", epsilon=1.0) | options))


@pytest.mark.parametrize("options", [dict(delta=1e-6), dict(privacy_unit="user"), dict(examples=3)])
def test_privacy_options_without_epsilon_have_no_effect_and_are_refused(options):
    with raises_at("--epsilon", option=next(iter(options))):
        validate(TrainConfig(data="", model="", out="", **options))


def test_too_large_a_delta_and_nameless_users_are_refused(tmp_path, model_dir):
    with raises_at(option="delta"):
        job(tmp_path, model_dir, delta=0.05)
    nameless = [{name: value for name, value in r.items() if name != "user"} for r in records()]
    with raises_at(file=tmp_path / "nameless.jsonl", line=1, option="privacy_unit"):
        tinyjob.run(tmp_path, model_dir, nameless, name="nameless", **PRIVATE, privacy_unit="user")


def test_a_private_gate_keeps_nothing_of_the_data(tmp_path, model_dir):
    """Its weights for a prompt do not depend on the other rows. Faults: mean and scale of
    the data, in the weights or in the checkpoint, which is published."""
    config = twin(tmp_path, model_dir, gate="linear").config
    _, plan, reference, _ = tinyjob.read(config)
    gate, inputs = make_gate(plan, reference, config, "cpu")
    few = dataclasses.replace(plan, units=plan.units[:5])
    other, _ = make_gate(few, reference, config, "cpu")
    with torch.no_grad():
        for g in (gate, other):
            g.W.copy_(torch.arange(g.W.numel()).view_as(g.W) * 0.1)
    assert torch.equal(gate(inputs), other(inputs))
    assert all(torch.equal(a, b) for a, b in zip(gate_state(gate).values(), gate_state(other).values()))
