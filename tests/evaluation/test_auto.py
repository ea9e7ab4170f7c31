"""mixdpo/evaluation/auto.py: what is chosen for a file, and what of it the command line keeps. How often the number of
types is right, and what it costs, is a study (data/studies/auto.py). What each test catches stands in its docstring."""

import json

import pytest
import tinyjob
import torch
from letters import pair
from raising import raises_at

import train
from mixdpo.evaluation import auto
from mixdpo.evaluation.auto import Tried, fewest, try_experts, unit_options, units_of
from mixdpo.plan import mark_context
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.rules import validate


def people(users=24, each=10, **more):
    return [pair([n + 1], [u + 1], [u + 2], user=f"u{u}", **more) for u in range(users) for n in range(each)]


@pytest.mark.parametrize("pairs, want", [
    (people(), {"latent": "user", "em": "incremental", "estep": "context", "context": 2}),
    (people(each=50), {"latent": "user", "em": "incremental", "estep": "context", "context": 8}),
    (people(each=3), {"latent": "user", "em": "incremental"}),
    (people(users=9), {"latent": "pair"}), (people(each=1), {"latent": "pair"}),
    ([*people(), pair([1], [2], [3])], {"latent": "pair"}),
    ([*people(), *people(1, 2)], {"latent": "user", "em": "incremental", "estep": "context", "context": 2}),
    ([pair([n], [1], [2], domain="ab"[n % 2]) for n in range(40)], {"latent": "pair", "gate": "domain"}),
    (people(context=True) + people(), {"latent": "user", "em": "incremental", "estep": "context", "context": 0})])
def test_units_by_what_the_file_has(pairs, want):
    """Caught: users with a choice each pooled; a context that leaves a user no pair to train on; one line without a
    user; the file's own context pairs replaced; domains beside users."""
    options, reasons = unit_options(pairs)
    assert options == want and reasons["latent"].startswith(want["latent"])


@pytest.mark.parametrize("marks, want", [
    (lambda u, n: n < 2 if u < 12 else None, {"estep": "context", "context": 2}),
    (lambda u, n: False, {}), (lambda u, n: u == 3 or n == 0, {})])
def test_context_pairs_that_the_file_marks_in_part(marks, want):
    """Caught: marks of some users taken for marks of all, and marks that leave a user without context pairs or without
    others: the run ended with an error about --context, which nobody had given."""
    pairs = [pair([n + 1], [u + 1], [u + 2], user=f"u{u}", context=marks(u, n)) for u in range(24) for n in range(10)]
    options, reasons = unit_options(pairs)
    assert options == {"latent": "user", "em": "incremental"} | want and "estep" in reasons
    if want:
        marked = mark_context(pairs, options["context"], 0)
        assert sum(bool(pair.context) for pair in marked) == 2 * 24


def planted(types, users=40, each=10, seed=0):
    """Features (P,2,6) of choices by linear rewards of each user's type, and the units."""
    generator = torch.Generator().manual_seed(seed)
    theta = 3 * torch.randn(types, 6, generator=generator)
    features = torch.randn(users * each, 2, 6, generator=generator)
    kind = torch.arange(users).repeat_interleave(each) % types
    gap = ((features[:, 0] - features[:, 1]) * theta[kind]).sum(1)
    right = torch.rand(len(gap), generator=generator) < torch.sigmoid(gap)
    features = torch.where(right[:, None, None], features, features.flip(1))
    return features, [list(range(u * each, (u + 1) * each)) for u in range(users)]


@pytest.mark.parametrize("types", [1, 2, 3])
def test_the_number_of_types_is_found(types):
    """Caught: users of the fold that is predicted among those that are fitted; choices taken alone; the largest K."""
    right = 0
    for seed in range(4):
        features, units = planted(types, users=60, seed=seed)
        tried = try_experts(units, [0] * 60, features, torch.tensor([[0, 1]] * len(features)), 4, seed)
        assert [t.experts for t in tried] == [1, 2, 3, 4] and all(t.by_unit.isfinite().all() for t in tried)
        right += fewest(tried) == types
    assert right >= 3


def test_domains_have_their_own_weights():
    """Two domains with a type each, single choices. Caught: the same weights for all; those of another domain."""
    features, units = planted(2, users=2, each=150, seed=1)
    single = [[i] for unit in units for i in unit]
    order = torch.tensor([[0, 1]] * len(features))
    by_domain = try_experts(single, [0] * 150 + [1] * 150, features, order, 2, 0)
    alike = try_experts(single, [0] * 300, features, order, 2, 0)
    assert fewest(by_domain) == 2 and by_domain[1].by_unit.mean() > alike[1].by_unit.mean() + 0.05


def test_the_smallest_within_one_standard_error():
    """Users differ by 0.1 nats, which all K share: only the difference between two K counts, with its error 0.01 or 0.
    Caught: the best K; the error of one K's mean; of another K; nats summed over users."""
    users, noise = torch.tensor([-0.1] * 50 + [0.1] * 50), torch.tensor([-0.1, 0.1] * 50)
    three, four = Tried(3, users - 0.5), Tried(4, users + 5 * noise - 0.52)
    assert fewest([Tried(1, users - 0.509), Tried(2, users + noise - 0.509), three, four]) == 2
    assert fewest([Tried(1, users - 0.509), Tried(2, users + noise - 0.511), three, four]) == 3


def test_too_few_users_are_not_divided():
    """Caught: folds of a handful of users."""
    features, units = planted(2, users=9)
    tried, = try_experts(units, [0] * 9, features, torch.tensor([[0, 1]] * 90), 4, 0)
    assert tried.experts == 1


def test_a_part_of_a_large_file(monkeypatch):
    """Caught: a user cut in two; the first users of the file alone."""
    monkeypatch.setattr(auto, "LARGEST", 55)
    units, domains = units_of(people(), {"latent": "user"})
    assert [len(unit) for unit in units] == [10] * 5 and domains == [0] * 5 and units[0][0] != 0


# ---- the command


@pytest.fixture
def words(tmp_path, model_dir):
    """A file of two kinds of users, and a command line that names nothing but files."""
    data = tinyjob.write(tmp_path / "prefs.jsonl", tinyjob.make_records(users=30, each=6))
    return ["--data", data, "--model", str(model_dir), "--out", str(tmp_path / "run"), "--dtype", "float32"]


def test_a_command_without_options(words, tmp_path, capsys):
    """The whole way, and the same command again. Caught: a plan that is not followed, not printed, or not the same when
    the run is resumed; reasons without the numbers that they rest on."""
    train.main(words)
    said = capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    got = {name: config[name] for name in ("experts", "latent", "estep", "context", "start", "em", "sharing", "targets",
                                           "shared_rank")}
    assert got == {"experts": 2, "latent": "user", "estep": "context", "context": 1, "start": "linear", "sharing":
                   "lora", "em": "incremental", "targets": "all", "shared_rank": 16}
    assert "--latent   user: 30 users with 6 choices each" in said and "K = 1: -0." in said
    assert "--experts 2 --sharing lora --targets all --shared-rank 16 --start linear" in said
    train.main(words)
    assert "finished before" in capsys.readouterr().out


def test_options_on_the_command_line_are_kept(words, capsys):
    """Caught: an option that is given and changed; a K that is given and chosen again; defaults for choices."""
    given = auto.parse([*words, "--latent=user", "--start", "dirichlet", "--experts", "auto"], "train.py")
    assert (given.start, given.experts, given.latent, given.shared_rank) == ("dirichlet", 2, "user", 16)
    assert "--start" not in capsys.readouterr().out
    asked = auto.parse([*words, "--experts", "3"], "train.py")
    assert asked == TrainConfig(words[1], words[3], words[5], dtype="float32", experts=3)
    assert capsys.readouterr().out == ""
    with raises_at(option="experts"):
        auto.parse([*words, "--experts", "many"], "train.py")
    with raises_at(option="beta"):
        auto.parse([*words, "--beta", "-1"], "train.py")


@pytest.mark.parametrize("given, want", [
    (["--latent", "pair"], {"latent": "pair", "em": "minibatch", "estep": "all", "context": 0}),
    (["--sharing", "heads"], {"sharing": "heads", "targets": "", "shared_rank": 0, "latent": "user", "experts": 2}),
    (["--estep", "all"], {"estep": "all", "context": 0, "latent": "user", "experts": 2}),
    (["--start", "none"], {"start": "none", "shared_rank": 0, "sharing": "lora", "latent": "user"}),
    (["--train-trunk", "false"], {"train_trunk": False, "sharing": "heads", "latent": "user", "experts": 2})])
def test_what_is_chosen_fits_the_options_that_are_given(words, given, want):
    """Caught: options chosen for users beside --latent pair, adapters' options beside heads, context pairs beside
    --estep all, a shared adapter beside --start none: the run was refused, with an error about an option that nobody
    had given. More left out than has to be."""
    config = auto.parse([*words, *given], "train.py")
    validate(config)
    assert {name: getattr(config, name) for name in want} == want


def test_a_gate_that_reads_prompts_has_types_of_single_choices(words, capsys):
    """Caught: the number of types chosen by users, and an error about --latent, which nobody had given."""
    config = auto.parse([*words, "--gate", "linear"], "train.py")
    assert (config.experts, config.latent) == (1, "pair") and "--experts  1, which is DPO" in capsys.readouterr().out
    with raises_at("--experts 2", option="gate"):
        validate(config)


def test_users_are_pooled_if_asked():
    """Caught: too few users to choose --latent user, and the number of types chosen by pairs although it is given."""
    assert unit_options(people(users=9), "user")[0]["latent"] == "user"
    assert unit_options(people(), "pair")[0] == {"latent": "pair"}


def test_a_private_run_chooses_nothing_from_its_data(words, tmp_path, capsys, monkeypatch):
    """Caught: options of a private run that depend on its data without noise; its file read before the run."""
    monkeypatch.setattr(auto, "read_preferences", None)                     # a call of it is a TypeError
    private = auto.parse([*words, "--epsilon", "8"], "train.py")
    assert private == TrainConfig(words[1], words[3], words[5], dtype="float32", epsilon=8.0)
    assert capsys.readouterr().out == ""
    with raises_at("--epsilon", option="experts"):
        auto.parse([*words, "--epsilon", "8", "--experts", "auto"], "train.py")


def test_people_who_agree_get_dpo(tmp_path, model_dir, capsys):
    """Caught: a mixture for one type; a plan that does not say that this is DPO."""
    records = [record | {"user": f"u{n % 30}"} for n, record in enumerate(
        r for r in tinyjob.make_records(users=60, each=6) if r["annotator"] == "first")]
    data = tinyjob.write(tmp_path / "prefs.jsonl", records)
    config = auto.parse(["--data", data, "--model", str(model_dir), "--out", str(tmp_path / "run")], "train.py")
    assert (config.experts, config.latent, config.sharing, config.shared_rank) == (1, "pair", "lora", 0)
    assert "--experts  1, which is DPO" in capsys.readouterr().out
