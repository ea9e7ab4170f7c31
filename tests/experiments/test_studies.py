"""data/studies: planted worlds are what they say, studies go on where they stopped, and pages hold what was measured.
Docstrings name the faults that each test is there for."""

import ast
import importlib
import inspect
import io
import itertools
import json
import math
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import brute
import numpy as np
import pytest
import torch
from raising import raises_at

from data import studies
from data.studies import __main__ as command
from data.studies import collapse, conflict, parity, privacy, study, texts, worlds
from data.studies.texts import Judges
from data.studies.worlds import ITEMS, World, fit, item_probabilities, judged, look, oracle, prompt, write
from data.texts import sentences
from mixdpo.config import InputError
from mixdpo.evaluation.statistics import mean_se
from mixdpo.files import fetch
from train import TrainConfig

# ---- planted worlds


def right(of, rewards):
    """Share of choices for the item that the judge's type likes better."""
    return float((rewards[of.type, of.chosen] > rewards[of.type, of.rejected]).mean())


def test_a_world_is_as_it_says():
    """Catches: rewards of another deviation or correlation, choices without noise or against the judge, users of
    several types, an item compared with itself, worlds that are alike."""
    world = World(users=400, each=10, agree=0.8, sharp=3.0)
    r, of = np.concatenate([World(seed=s, agree=0.8, sharp=3.0).rewards() for s in range(40)], axis=1), judged(world)
    assert r.shape == (2, 40 * len(ITEMS)) and abs(r.std() - 3.0) < 0.2 and abs(np.corrcoef(r)[0, 1] - 0.8) < 0.05
    own, gaps = world.rewards(), np.abs(world.rewards()[of.type, of.chosen] - world.rewards()[of.type, of.rejected])
    assert abs(right(of, own) - (1 / (1 + np.exp(-gaps))).mean()) < 0.02
    assert (of.chosen != of.rejected).all() and len(set(zip(of.user, of.type))) == 400
    assert not np.array_equal(judged(World(seed=1)).chosen, judged(World(seed=0)).chosen)
    assert not np.array_equal(judged(world, heldout=True).chosen[:100], of.chosen[:100])


def test_what_spoils_training_leaves_held_out_pairs_alone():
    """Catches: a share that is another, noise that changes nothing, spoiled held-out pairs, turned labels that turn
    back."""
    clean = World(users=400, each=10)
    base, r = judged(clean), clean.rewards()
    flipped = judged(World(users=400, each=10, flips=0.3))
    assert abs((flipped.chosen != base.chosen).mean() - 0.3) < 0.03
    assert right(judged(World(users=400, each=10, jitter=8.0)), r) < right(base, r) - 0.1
    other = judged(World(users=400, each=10, other=1.0))
    assert abs(right(other, r[::-1]) - right(base, r)) < 0.04                # the other type's choices, in their names
    for spoiled in (dict(flips=0.3), dict(jitter=8.0), dict(other=1.0)):
        assert np.array_equal(judged(World(**spoiled), heldout=True).chosen, judged(World(), heldout=True).chosen)


def test_domains_tell_types(tmp_path):
    """Catches: a prompt in another domain's letters, a share of judges that is another, users named all the same."""
    world = World(types=4, users=60, domains=True, heldout=100)
    of = judged(world)
    assert abs((of.type == of.domain).mean() - worlds.OWN) < 0.04
    write(world, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 600 and not any("user" in row for row in rows)
    for row, domain, z, chosen in zip(rows, of.domain, of.type, of.chosen):
        assert row["domain"] == f"domain {domain}" and row["annotator"] == f"type {z}"
        assert row["chosen"] == ITEMS[chosen]
        assert set(row["prompt"][:-1]) <= set(worlds.ALPHABETS[domain]) and row["prompt"].endswith(">")


def test_prompts_are_mixed_by_their_share():
    """Catches: a share of letters that is rounded down, foreign letters always in front."""
    rng, places = np.random.default_rng(0), set()
    for share in texts.SHARES:
        for _ in range(20):
            text = prompt(rng, "AB", "01", share)[:-1]
            foreign = [n for n, c in enumerate(text) if c in "01"]
            assert len(text) == worlds.LETTERS and len(foreign) == round(share * worlds.LETTERS)
            places |= {tuple(foreign)} if share == 0.25 else set()
    assert len(places) == worlds.LETTERS


def test_the_oracle_is_brute_force():
    """Catches: weights that are not the world's, one latent a pair for one a user, sums for means, an ARI of pairs for
    one of users."""
    world = World(users=30, each=4, heldout=40)
    found, r = oracle(world), world.rewards()
    of, told = judged(world, heldout=True), judged(world)

    def p(z, a, b):
        return 1 / (1 + math.exp(r[z, b] - r[z, a]))

    pairs = [math.log(sum(0.5 * p(z, a, b) for z in (0, 1))) for a, b in zip(of.chosen, of.rejected)]
    assert found["ll"]["mean"] == pytest.approx(np.mean(pairs))
    users = [math.log(sum(0.5 * math.prod(p(z, of.chosen[i], of.rejected[i]) for i in range(4 * u, 4 * u + 4))
                          for z in (0, 1))) / 4 for u in range(10)]
    assert found["ll_user"]["mean"] == pytest.approx(np.mean(users))
    likelier = [max((0, 1), key=lambda z: math.prod(p(z, told.chosen[i], told.rejected[i]) for i in
                                                   range(4 * u, 4 * u + 4))) for u in range(30)]
    assert found["ari"] == pytest.approx(brute.adjusted_rand(likelier, told.type[::4].tolist()))


def test_a_run_on_a_world_finds_its_types(tmp_path):
    """The whole way: file, train.py, held-out figures. Catches: a model too narrow for its items, margins of other
    pairs, types under the wrong names; a policy's probabilities that are not those its margins come from."""
    world = World(users=100, heldout=600)
    write(world, tmp_path)
    found = look(fit(tmp_path, "run", latent="user", start="linear"), tmp_path / "heldout.jsonl")
    dpo = worlds.figures(look(fit(tmp_path, "dpo", experts=1), tmp_path / "heldout.jsonl"))
    mine = worlds.figures(found)
    assert mine["ari"] > 0.8 and mine["own"] > dpo["own"] + 0.05
    assert mine["ll_user"]["mean"] > dpo["ll_user"]["mean"] + 0.05 and mine["ll_user"]["mean"] < 0
    prompts = ["ABCD>", "WXAB>"]
    pi = item_probabilities(*found.run.experts.policy(0), prompts)
    assert pi.shape == (2, len(ITEMS)) and torch.allclose(pi.sum(1), torch.ones(2).double())
    assert pi.argmax(1).tolist() != item_probabilities(*found.run.experts.policy(1), prompts).argmax(1).tolist()


# ---- studies


def fake(calls, fail=()):
    """A study of four cells that counts what it measures."""
    def measure(cell, folder):
        calls.append(cell["n"])
        assert folder.is_dir() and not list(folder.iterdir())
        (folder / "rubbish").write_text("x")
        if cell["n"] in fail:
            raise InputError("no such thing")
        return {"square": cell["n"] ** 2}

    return study.Study("Fake", "Why?", lambda preset: [{"n": n, "preset": preset} for n in range(4)], measure, None)


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Catches: a cell measured twice, another setting's figures, a cell that failed taken as done, what it leaves."""
    calls, home = [], tmp_path / "studies"
    (home / "fake").mkdir(parents=True)
    monkeypatch.setattr(study, "study_of", lambda name: fake(calls, fail=(2,)))
    with raises_at("fake", "'n': 2", "no such thing"):
        for n in range(4):
            study.measured("fake", {"n": n, "preset": "quick"}, home)
    monkeypatch.setattr(study, "study_of", lambda name: fake(calls))
    found = [study.measured("fake", {"n": n, "preset": "quick"}, home)["figures"] for n in range(4)]
    assert found == [{"square": n * n} for n in range(4)] and calls == [0, 1, 2, 2, 3]
    study.measured("fake", {"n": 0, "preset": "full"}, home)
    assert calls[-1] == 0 and not list(home.glob("fake/*.work"))


@pytest.mark.parametrize("resumes, second, kept", [
    (True, "abc", True), (True, "def", False), (True, "abc+", False), (False, "abc", False)])
def test_a_long_cell_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, resumes, second, kept):
    """Catches: hours of a cell lost, a cell made by two revisions, or by a tree that has changed since."""
    def measure(cell, folder):
        found = (folder / "half").exists()
        (folder / "half").write_text("x")
        if len(calls) < 2:
            calls.append(found)
            raise InterruptedError
        return {"found": found}

    calls, home = [], tmp_path / "studies"
    (home / "fake").mkdir(parents=True)
    one = study.Study("Fake", "Why?", lambda preset: [{"n": 0}], measure, None, resumes=resumes)
    monkeypatch.setattr(study, "study_of", lambda name: one)
    for code in ("abc+" if second == "abc+" else "abc", "other"):
        monkeypatch.setattr(study, "revision", lambda code=code: code)
        with pytest.raises(InterruptedError):
            study.measured("fake", {"n": 0}, home)
    monkeypatch.setattr(study, "revision", lambda: second)
    facts = study.measured("fake", {"n": 0}, home)
    assert facts["figures"] == {"found": kept} and facts["resumed"] == kept and calls == [False, False]
    assert not list(home.glob("fake/*.work"))
    text = study.describe_study([facts], "fake", "quick", 60.0)
    assert ("interrupted calls" in text) == kept


def test_a_page_says_whose_minutes_it_gives(tmp_path, monkeypatch):
    """Two calls, of which an earlier one took an hour. Catches: the minutes of all calls as those of the last one."""
    facts = [{"cell": {}, "figures": {}, "seconds": 1.0, "environment": study.environment()}]
    one = study.Study("Fake", "Why?", None, None, lambda rows: ("text", {}))
    for name, replaced in (("study_of", lambda name: one), ("run", lambda *_: facts), ("NAMES", ("fake",))):
        monkeypatch.setattr(command, name, replaced)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/quick.seconds").write_text("3600.0")
    command.main(["--name", "fake", "--out", str(tmp_path / "docs"), "--home", str(tmp_path)])
    assert "calls that ended took 60.0 minutes" in (tmp_path / "docs/fake.md").read_text()


@pytest.mark.parametrize("name", studies.NAMES)
def test_every_study_has_cells_and_a_page_to_come(name):
    """Catches: a study that cannot be opened, two cells that are one, a smoke preset that is not the smallest."""
    of = studies.study_of(name)
    quick, smoke = of.cells("quick"), of.cells("smoke")
    keys = [json.dumps(cell, sort_keys=True) for cell in quick]
    assert 0 < len(smoke) < len(quick) and len(set(keys)) == len(keys) and of.question.endswith(("?", "."))


def test_what_studies_take_from_modules_exists():
    """A study that patches or calls what has moved fails only when it is run. Catches: train.save_checkpoint, which is
    in mixdpo/runs/checkpoint.py."""
    missing = []
    for path in sorted(Path(studies.__file__).parent.glob("[a-z]*.py")):
        names, tree = vars(importlib.import_module(f"data.studies.{path.stem}")), ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                of, name = node.value.id, node.attr
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "patch.object" and len(node.args) > 1 and \
                    isinstance(node.args[0], ast.Name) and isinstance(node.args[1], ast.Constant):
                of, name = node.args[0].id, node.args[1].value
            else:
                continue
            if inspect.ismodule(names.get(of)) and not hasattr(names[of], name):
                missing.append(f"{path.name}:{node.lineno}: {of}.{name}")
    assert not missing, missing


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in studies.NAMES if n != "conflict"])       # which downloads
def test_cells_of_every_study_can_be_measured(name, tmp_path, monkeypatch):
    """The last cell on planted worlds and the last on sentences, which are made up here. Catches: a study that calls
    what has changed."""
    shares = [{"domain": d, "part": part, "share": share} for d in texts.DOMAINS for part in ("crossed", "foreign")
              for share in texts.SHARES for _ in range(4)]
    made = some_texts()
    prompts = made.prompts + shares
    made = replace(made, c=torch.randn(len(prompts), 2).double(), prompts=prompts,
                   rewards=made.rewards | {"lavish": -made.rewards["terse"]})
    monkeypatch.setattr(texts, "load", lambda home, preset: made)
    of = studies.study_of(name)
    for n, cell in enumerate({cell.get("world") == "texts": cell for cell in of.cells("smoke")}.values()):
        folder = tmp_path / "studies" / name / str(n)
        folder.mkdir(parents=True)
        assert of.measure(cell, folder)


def frontier_rows(run, users, gain, seed, far=5.0, **options):
    """Rows of own reward of a run: as it was trained, at the KL `far`, and at two smaller KL; 40 prompts."""
    config = asdict(TrainConfig(**{"data": "d", "model": "m", "out": run, "seed": seed} | options))
    noise = np.random.default_rng([seed, 3]).normal(0, 0.1, 40)
    return [{"run": run, "users": users, "target": target, "strength": 1.0, "config": config, "length": 9.0,
             "types": {"praise": {"mean": gain * kl}, "criticism": {"mean": gain * kl}}, "gain": {"mean": gain * kl},
             "kl": kl, "kl_by_prompt": [kl] * 40, "gain_by_prompt": (gain * kl + noise - noise.mean()).tolist()}
            for target, kl in ((None, far), (2.0, 2.0), (0.5, 0.5))]


def test_the_page_of_conflict(tmp_path, monkeypatch):
    """Worlds of two seeds, stored and read back; the start ran with the first seed only, one world has types of pairs
    too. Catches: points as trained that are lost in storage; a seed without the start that is counted; another sign or
    another row; a mixture that is behind only where known types do not go; types of pairs that are compared with DPO in
    another world, or count as a world's mixture."""
    mixture = {"experts": 2, "sharing": "lora", "latent": "user"}

    def measured(cell, folder):
        seed, ahead, rows = cell["seed"], 0.3 * (cell["world"] == "c = 3"), []
        level = 0.1 if cell["world"] == conflict.PAPER["world"] else 0.2
        if "counts" in cell:
            return {"types": 1 + (1 + seed) * (ahead > 0)}
        if "latent" in cell:
            rows = frontier_rows("pairs-K2", "unknown users", 0.3, seed, sharing="lora", experts=2, latent="pair")
            soup = frontier_rows("pairs-K2-soup", "all users", 0.3, seed, sharing="lora", experts=1, latent="pair")
            return {"own_reward": rows + soup, "policies": {
                "reference": {"praise": mean_se([0.5, 0.7]), "criticism": mean_se([0.2, 0.4]), "kl": mean_se([0.0])}}}
        rows += frontier_rows("dpo", "all users", level, seed, sharing="lora", experts=1)
        gain = level + ahead + 0.1 * seed * (ahead > 0)
        rows += frontier_rows("mixture", "known users", gain, seed, start="linear", **mixture)
        near = 2.0 if cell["world"] == "c = 1" else 5.0
        rows[3]["gain_by_prompt"] = [gain - 0.5 * (near < 5) for gain in rows[3]["gain_by_prompt"]]
        for kind in ("praise", "criticism"):
            rows += frontier_rows(f"dpo-{kind}", f"type {kind}", 0.6, seed, near, sharing="lora", experts=1, data=kind)
        if seed == 0:
            rows += frontier_rows("start", "known users", 0.1, seed, start="linear", estep="first", **mixture)
        return {"own_reward": rows, "users": 0.9 + 0.02 * seed, "users_start": None if seed else 0.8, "accuracy": {}}

    of = studies.study_of("conflict")
    monkeypatch.setattr(study, "study_of", lambda name: replace(of, measure=measured))
    (tmp_path / "conflict").mkdir()
    cells = [{"world": world, "seed": seed} | counts for seed in (0, 1) for world in ("c = 0", "c = 1", "c = 3")
             for counts in ({}, {"counts": True})]
    cells += [{"world": "three annotators", "seed": 0}, {"world": "three annotators", "seed": 1}, conflict.PAPER]
    for _ in range(2):                                                      # measured, and read again
        text, figures = of.page([(cell, study.measured("conflict", cell, tmp_path)["figures"]) for cell in cells])
        level, ahead = (next(line for line in text.splitlines() if line.startswith(f"| {world} ")).split("|")[2:-1]
                        for world in ("c = 0", "c = 3"))
        assert [cell.strip() for cell in ahead[:4]] == ["5.0", "+2.750", "+1.000", "+3.000"]
        assert ahead[4].strip().startswith("+1.750 ±") and ahead[6].strip().startswith("+2.000 ±")
        assert level[4].strip().startswith("+0.000 ±")
        assert [float(cell) for cell in ahead[7:10]] == [0.8, 0.9, 0.91]
        assert (ahead[10].strip(), level[10].strip()) == ("2 in 1, 3 in 1", "1 in 2")
        _, *at_kl = ([cell.split(" ±")[0].strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()
                     if line.startswith("| c = 3 "))
        assert at_kl == [["+0.175", "+0.350", "+0.700", "+1.400", "–", "+1.750", "5.0"],
                         ["+0.200", "+0.400", "+0.800", "+1.600", "–", "+2.000", "5.0"]]
        assert "more than two standard errors at c = 3; and behind at c = 1" in text and "+0.100 on average" in text
        assert [*figures] == ["frontier"]
        lines = text.splitlines()
        same = [line for line in lines if line.startswith("| three annotators ")]
        assert len(same) == 3 and "| +0.500 | +0.500 |" in same[0]
        pairs, = (line for line in lines if line.startswith("| pairs-K2"))
        assert "| +1.500 ±" in pairs and "| +1.000 ±" in pairs
        assert "| reference | 0.600 ± 0.100 | 0.300 ± 0.100 | 0.0 |" in lines


def test_a_cell_of_conflict_has_its_own_seed(tmp_path, monkeypatch):
    """Caught: all cells trained with seed 0, and their rows taken for those of one seed, whose error has no part of the
    seeds."""
    made, rows = [], [{"run": "dpo", "config": {"seed": 0}}]
    preset = {"annotators": ["praise", "criticism"], "users": 4, "pairs": 6, "batch": 12, "evaluate": 5}
    monkeypatch.setattr(conflict, "write_world", lambda *_: (preset, {"model": "m"}))
    monkeypatch.setattr(conflict, "run", made.append)
    monkeypatch.setattr(conflict, "evaluate", lambda config: {"own_reward": rows, "preferences": {
        name: {"alignment_train": {}, "accuracy_own": {"mean": 0.5}} for name in ("dpo", "mixture")}})
    found = conflict.measure({"world": "c = 1", "seed": 2, "preset": "quick"}, tmp_path / "conflict" / "cell")
    assert {config.seed for config in made} == {2} and len(made) > 3
    assert conflict.of_cell({"seed": 2}, found)["own_reward"] == [{"run": "dpo", "config": {"seed": 2}}]


def test_membership_is_told_by_ranks():
    """By hand. Catches: a tie counted as won, the lower score taken for the member's."""
    assert privacy.auc(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == (1 + 1 + 0 + 0.5) / 4


@pytest.mark.parametrize("method", ["transformer", "transformer, epsilon 10", "MST"])
def test_a_cell_of_parity(method, tmp_path):
    """Catches: a table that is not of bits; satisfied by what was trained on instead of what was sampled."""
    found = parity.measure({"method": method, "d": 3, "seed": 0, "steps": 2}, tmp_path)
    assert 0.4 < found["satisfied"] < 0.6 and 0 <= found["two"] < 0.2


def test_a_private_cell_hides_what_it_learns_from(tmp_path, monkeypatch):
    """Members are known by heart without privacy and not with it. Catches: canaries trained on that should not be; an
    epsilon that does not reach the run."""
    monkeypatch.setattr(privacy, "CANARIES", 20)
    found = {}
    for epsilon in ("inf", "1.0"):
        (tmp_path / epsilon).mkdir()
        found[epsilon] = privacy.measure({"preset": "smoke", "seed": 0, "epsilon": epsilon, "way": "inference"},
                                         tmp_path / epsilon)
    assert found["inf"]["loss_in"] < found["1.0"]["loss_in"] - 0.1 and found["inf"]["auc"] > 0.8
    assert found["inf"]["auc_canaries"] > 0.9 > found["1.0"]["auc_canaries"]
    assert found["inf"]["epsilon"] is None and 0.99 < found["1.0"]["epsilon"] <= 1


# ---- real sentences


def archive(path, members):
    with tarfile.open(path, "w:gz") as out:
        for name, text in members.items():
            data = text.encode()
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def members(**changed):
    """Two sentences a domain; the byte order mark stands as in the real files."""
    made = {}
    for name in sentences.FILES.values():
        made[f"{name}_GroundTruth.txt"] = "\ufeff1_1\t1.5\tGood  <br />film.\n1_2\t-1.0\tBad.\n"
        made[f"{name}_anonDataRatings.txt"] = "1_1\t1.5\t0.5\t[1, 2]\n1_2\t-1.0\t0\t[-1, -1]\n"
    return made | changed


def test_sentences_are_read_with_their_ratings(tmp_path, monkeypatch):
    """Catches: ratings of another sentence, a mark before the first ID, markup kept, a faulty line passed over, a
    member that unpacks to anything."""
    path = tmp_path / "sentences.tar.gz"
    monkeypatch.setattr(fetch, "asset", lambda name, data: path)
    archive(path, members())
    found = sentences.load_sentences()
    assert list(found) == list(sentences.FILES)
    good, bad = found["product"]
    assert (good.text, good.document, good.ratings, good.rating) == ("Good film.", "1", (1, 2), 1.5)
    assert bad.rating == -1
    ratings = "tweets_anonDataRatings.txt"
    truth = "tweets_GroundTruth.txt"
    for name, text, place, named in ((truth, "1_1\t1.5\n", (f"{path}: {truth}", 1), ["2"]),
                                     (ratings, "1_1\t1\t0\t[1.5]\n1_2\t1\t0\t[1]\n", (path,), ["1_1", "'[1.5]'"]),
                                     (ratings, "1_1\t1\t0\t[1]\n", (path,), ["1_2", None]),
                                     (ratings, "1_1\t1\t0\tprint(1)\n", (path,), ["1_1", "'print"])):
        archive(path, members(**{name: text}))
        with raises_at(*named, **dict(zip(("file", "line"), place))):
            sentences.load_sentences()
    monkeypatch.setattr(sentences, "MOST", 5)
    archive(path, members())
    with raises_at("5 bytes", file=path):
        sentences.load_sentences()


def some_texts(count=80, seed=0):
    """Texts whose first component is what people's ratings say."""
    rng = np.random.default_rng(seed)
    warm, length = rng.normal(size=count), rng.integers(30, 110, size=count)
    x = torch.from_numpy(np.stack([warm, rng.normal(size=count)], 1))
    ratings = [[int(np.clip(round(2 * w + e), -4, 4)) for e in rng.normal(size=5)] for w in warm]
    rewards = {"warm": 2 * warm, "terse": -2 * texts.standard(length), "cold": -2 * warm}
    prompts = [{"domain": d, "part": "train", "share": 0.0} for d in texts.DOMAINS for _ in range(8)]
    domain = np.array([*texts.DOMAINS] * (count // 2))
    return texts.Texts(x, torch.randn(16, 2).double(), rewards, ratings, domain, prompts)


def test_judges_of_sentences_go_by_their_taste():
    """Catches: chosen and rejected swapped, a taste's sign, held-out sentences that were trained on, two domains in
    one pair, users of several tastes, a rating of another sentence."""
    of = some_texts()
    told, held = (texts.judge(of, Judges(("warm", "cold"), 60, 10, 0), heldout=h) for h in (False, True))
    own = told.gaps[torch.arange(600), torch.from_numpy(told.type)]
    assert (own > 0).double().mean() > 0.7 and torch.equal(told.gaps[:, 0], -told.gaps[:, 1])
    assert torch.allclose(told.x[:, 0] * 2, told.gaps[:, 0])                # x is chosen minus rejected
    assert len(set(zip(told.group.tolist(), told.type.tolist()))) == 60
    differences = {round(float(v), 6) for part in (told,) for v in part.x[:, 1].abs()}
    assert not differences & {round(float(v), 6) for v in held.x[:, 1].abs()}
    domain = {round(float(v), 9): d for v, d in zip(of.x[:, 1], of.domain)}
    values = list(domain)
    apart = {round(abs(a - b), 6) for a, b in itertools.combinations(values, 2) if domain[a] != domain[b]}
    assert len(differences & apart) <= 2                                    # a chance equality of six digits
    one = texts.judge(of, Judges(("warm", "cold"), 60, 10, 0, one_rating=True))
    assert (one.gaps[torch.arange(600), torch.from_numpy(one.type)] > 0).double().mean() > 0.7
    turned = texts.judge(of, Judges(("warm", "cold"), 60, 10, 0, flips=1.0))
    assert torch.equal(turned.x, -told.x)


def test_documents_give_prompts_of_their_own_sentences():
    """Catches: a prompt across two documents, a sentence in two prompts."""
    made = [sentences.Sentence(f"{d}.{n}", "product", d, (0,)) for d, count in (("a", 9), ("b", 3), ("c", 4))
            for n in range(count)]
    assert texts.four_of(made) == [["a.0", "a.1", "a.2", "a.3"], ["a.4", "a.5", "a.6", "a.7"],
                                   ["c.0", "c.1", "c.2", "c.3"]]


# ---- what single studies count


def test_the_one_standard_error_rule():
    """Catches: the best K itself for the smallest near it, the standard error of K's mean for that of its difference,
    a deviation that is not divided by the root of the users."""
    from data.studies.experts import picked

    rng = np.random.default_rng(0)
    users = rng.normal(-0.5, 0.3, size=400)                                 # users differ, by far more than K does
    by_k = {1: users - 0.05 - 0.01 * rng.normal(size=400), 2: users - 0.0001 * rng.normal(size=400), 3: users}
    assert picked(by_k, paired=True) == 2                                   # 0.05 is a hundred paired errors
    assert picked({1: users - 0.01, 2: users}, paired=False) == 1           # and within one of the mean's own, 0.015
    assert picked({1: users - 0.01 - 1e-4 * rng.normal(size=400), 2: users}, paired=True) == 2
    assert picked({1: users - 0.02, 2: users}, paired=False) == 2


def test_nearest_neighbours_are_counted_by_type():
    """Catches: a user that is its own neighbour, the farthest for the nearest."""
    from data.studies.separation import near

    x = np.array([[0.0, 0], [0.1, 0], [5, 5], [5.1, 5], [0.2, 0]])
    assert near(x, np.array([0, 0, 1, 1, 1])) == pytest.approx(4 / 5)


def test_a_linear_gate_says_its_weights_anywhere():
    """LinearMixture.weights at the training units is log_w. Catches: the constant left out, rows for columns."""
    of = some_texts()
    told = texts.judge(of, Judges(("warm", "cold"), 80, 1, 0, domains=True))
    c = of.c[told.prompt]
    found = texts.fit(told, 2, c=c)
    assert torch.allclose(found.weights(c), found.log_w, atol=1e-9) and found.V.shape == (2, 3)


def test_rewards_agree_up_to_scale():
    """Catches: a correlation of chosen-first gaps, which are all positive, an expert used for every type."""
    from data.studies.noise import reward_agreement

    class Like:
        pass

    rng, found = np.random.default_rng(1), Like()
    rewards = rng.normal(size=(2, len(ITEMS)))
    two = np.array([rng.choice(len(ITEMS), 2, replace=False) for _ in range(500)])
    found.pairs = []
    for a, b in two:
        pair = Like()
        pair.chosen, pair.rejected = [ord(ITEMS[a]), 256], [ord(ITEMS[b]), 256]
        found.pairs.append(pair)
    gaps = torch.from_numpy((rewards[:, two[:, 0]] - rewards[:, two[:, 1]]).T)
    found.h = 3 * gaps[:, [1, 0]]  # experts in another order, three times as sure
    assert reward_agreement(found, rewards) == pytest.approx(1.0)
    found.h = torch.from_numpy(rng.normal(size=(500, 2)))
    assert abs(reward_agreement(found, rewards)) < 0.2


# ---- collapse


def test_the_truth_about_collapse_is_brute_force():
    """Expectations over both choices of each pair, and the true probabilities. Catches: the choice that was made taken
    for the probable one; weights of another domain; constant weights of one pair; the worst single expert; an expert
    that equals another counted twice."""
    world = World(users=30, domains=True, heldout=40)
    of, r, got = judged(world, heldout=True), world.rewards(), collapse.true_choices(world)
    for i in range(40):
        p = [1 / (1 + math.exp(r[z, of.rejected[i]] - r[z, of.chosen[i]])) for z in (0, 1)]
        own = of.domain[i]
        assert float(got[i]) == pytest.approx(worlds.OWN * p[own] + (1 - worlds.OWN) * p[1 - own])
    rng = np.random.default_rng(0)
    h, w, p = rng.normal(size=(40, 2)), rng.dirichlet([1, 1], 40), rng.random(40)

    def expected(w, h):
        mixed = np.array(brute.marginal(w, h))
        return np.mean(p * np.log(mixed) + (1 - p) * np.log(1 - mixed))

    exact = collapse.Exact(torch.tensor(w).log(), torch.tensor(h), torch.tensor(p))
    one = max(expected(np.tile(row, (40, 1)), h) for row in (w.mean(0), [1, 0], [0, 1]))
    assert exact.use() == pytest.approx(expected(w, h) - one)
    mixed, flat = (np.array(brute.marginal(v, h)) for v in (w, np.tile(w.mean(0), (40, 1))))
    assert exact.slope() == pytest.approx(np.mean(p * mixed / flat + (1 - p) * (1 - mixed) / (1 - flat)) - 1)
    h[:, 0] = np.log(p / (1 - p))                                           # expert 0 is the truth
    exact = collapse.Exact(torch.tensor(w).log(), torch.tensor(h), torch.tensor(p))
    assert exact.use() == pytest.approx(expected(w, h) - expected(np.tile([1, 0], (40, 1)), h))
    right = np.stack([np.where(of.domain == z, 0.9, 0.1) for z in (0, 1)], 1)
    gaps = of.gaps(r)
    for copies, needed in (([0, 1], 2), ([0, 1, 1], 2), ([0, 0], 1), ([0], 1)):
        share = torch.tensor(right[:, copies] / [copies.count(k) for k in copies])
        found = collapse.Exact((share / share.sum(1, keepdim=True)).log(), gaps[:, copies], got)
        assert found.needed() == needed, copies


def test_the_table_of_collapse_counts_what_it_says():
    """Catches: recall over the runs without collapse; false alarms over all; a limit of ARI on the wrong side; runs
    near 0.05 among the clear ones."""
    def figures(ari, verdict, slope=0.1, needed=2, active=2, se=0.01):
        return {"ari": ari, "ari_se": se, "ari_test": ari, "posterior": ari < 0.05, "expert": False, "use": ari - 0.05,
                "slope": ari - 0.03,
                "needed": needed, "test": {"verdict": verdict, "slope": {"mean": slope, "se": 0.01},
                                           "active": list(range(active))}}

    runs = [figures(0.0, "posterior collapse", 0.0), figures(0.04, "no gain", 0.03), figures(0.06, "all active"),
            figures(0.3, "all active", active=1), figures(0.4, "posterior collapse", 0.0)]
    text = collapse.verdicts(runs, {2: runs}, [runs[0], runs[2]])
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines()
            if line.startswith("| ")}
    assert rows["posterior collapse; truth: ARI below 0.05"] == ["1 of 2 (0.50)", "1 of 3 (0.33)"] == rows["… K = 2"]
    assert rows["… ARI more than 2 SE from 0.05"] == ["1 of 1 (1.00)", "1 of 2 (0.50)"]
    assert rows["… at 3.5 standard errors"] == ["2 of 2 (1.00)", "1 of 3 (0.33)"]
    assert rows["… by annotators: ARI of the test's pairs"] == ["2 of 2 (1.00)", "0 of 3 (0.00)"]
    assert rows["posterior collapse; truth: no slope"] == ["1 of 1 (1.00)", "1 of 4 (0.25)"]
    assert "predict held-out choices in 1 of them" in text
    assert rows["K experts are of no use"] == ["2 of 2 (1.00)", "1 of 3 (0.33)"]
    assert rows["one active expert; truth: one is needed"] == ["0 of 0", "1 of 5 (0.20)"]
    assert "recall 0.50 at 0.33 false alarms" in text and "1 of 2 runs are called collapsed" in text
    assert "needed in 4 of 5 runs, smaller in 1, larger in 0" in text and "have an ARI of 0.040 to 0.040" in text
