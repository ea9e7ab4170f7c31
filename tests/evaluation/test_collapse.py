"""mixdpo/evaluation/collapse.py on enumerated choices, by brute force and by simulation.
Docstrings name the faults that each test was seen to fail on."""

import math
from types import SimpleNamespace

import brute
import numpy as np
import pytest
import tinyjob
import torch

import eval as evaluation
from mixdpo.evaluation import collapse
from mixdpo.evaluation.collapse import (
    FLOOR,
    Z,
    active_experts,
    collapse_figures,
    describe_active,
    describe_collapse,
    detectable,
    exceeds,
    half_split_weights,
)
from mixdpo.evaluation.heldout import collapse_of
from mixdpo.preferences import Pair
from mixdpo.variants.rankings import records_of


def two_domains(weight, share, times=40, margin=math.log(3)):
    """Choices in their exact proportions: two opposed experts with choice probability 3/4 in two domains. The gate
    gives a domain's expert `weight`; its type judges `share` of the pairs. -> log_v, h (80 times,2), prompts."""
    log_v, h = [], []
    for domain in (0, 1):
        for n in range(40):
            own = n < round(40 * (0.75 * share + 0.25 * (1 - share)))       # the choice that the domain's type prefers
            sign = 1 if own == (domain == 0) else -1
            h.append([sign * margin, -sign * margin])
            log_v.append([math.log(weight), math.log(1 - weight)][:: 1 if domain == 0 else -1])
    log_v, h = torch.tensor(log_v).double().repeat(times, 1), torch.tensor(h).double().repeat(times, 1)
    return log_v, h, list(range(len(h)))


def test_the_figures_of_two_opposed_types_by_hand():
    """p is 0.7 for the choice that its domain prefers, as 7 of 10 are, and p_0 is 1/2.
    Faults: the slope without - 1; the gain against the uniform weights of one pair; over the worst expert; a gain over
    the log of the mean choice."""
    found = collapse_figures(*two_domains(0.9, 0.9))
    assert found["slope"]["mean"] == pytest.approx(0.7 * 0.7 / 0.5 + 0.3 * 0.3 / 0.5 - 1)
    assert found["gain"]["mean"] == pytest.approx(0.7 * math.log(1.4) + 0.3 * math.log(0.6))
    single = (math.log(0.75) + math.log(0.25)) / 2                          # either expert
    assert found["over_best"]["mean"] == pytest.approx(0.7 * math.log(0.7) + 0.3 * math.log(0.3) - single)
    assert found["verdict"] == "all active" and found["active"] == [0, 1]
    better = two_domains(0.9, 0.9)
    better[1][:, 1] = 2.0                                                   # expert 1 always right
    assert collapse_figures(*better)["best"] == 1


def test_overconfident_weights_know_types_and_gain_nothing():
    """The type of 6 of 10 pairs gets nearly all weight. By hand: 0.55 of the choices are the preferred one.
    Faults: the verdict by the slope alone; by the gain alone (posterior collapse)."""
    found = collapse_figures(*two_domains(1 - 1e-9, 0.6))
    assert found["slope"]["mean"] == pytest.approx(0.55 * 1.5 + 0.45 * 0.5 - 1)
    assert found["gain"]["mean"] == pytest.approx(0.55 * math.log(1.5) + 0.45 * math.log(0.5))
    assert found["verdict"] == "no gain"


def test_a_single_expert_that_predicts_as_well_is_no_gain():
    """Faults: the best expert left out of the verdict."""
    log_v, h, prompts = two_domains(0.9, 0.9)
    mixed = (log_v.exp() * h.sigmoid()).sum(1, keepdim=True)                # an expert that is the mixture
    h = torch.cat([h, torch.logit(mixed)], 1)
    log_v = torch.cat([log_v + math.log(1 - 1e-9), torch.full((len(h), 1), math.log(1e-9)).double()], 1)
    found = collapse_figures(log_v, h, prompts)
    assert exceeds(found["gain"]) and found["best"] == 2 and found["verdict"] == "no gain"


@pytest.mark.parametrize("copies, active", [([0, 0], 1), ([0, 1], 2), ([0, 0, 1], 2), ([0, 1, 1, 0, 0], 2)])
def test_equal_experts_count_once(copies, active):
    """Copies share the weight of their expert. Faults: experts tested one by one in the full mixture, so that of two
    equal ones none counts; the last expert removed too; weights renormalised, so that of unequal shares all count."""
    log_v, h, prompts = two_domains(0.9, 0.9)
    log_v = torch.stack([log_v[:, k] - math.log(copies.count(k)) for k in copies], 1).log_softmax(1)
    found = collapse_figures(log_v, h[:, copies], prompts)
    assert len(found["active"]) == active == len({copies[k] for k in found["active"]})
    usual = "all active" if len(copies) == active else "inactive experts"
    assert found["verdict"] == ("posterior collapse" if active == 1 else usual)


def test_an_expert_without_weight_is_not_active():
    """Weight 0 everywhere, and weight 0 or 1 by domain. Faults: it counts where it is the last; it takes the weight of
    another."""
    log_v, h, prompts = two_domains(0.9, 0.9)
    none = torch.full((len(h), 1), -math.inf).double()
    assert active_experts(torch.cat([none, log_v], 1), torch.cat([5 * h[:, :1], h], 1), prompts) == [1, 2]
    assert active_experts(torch.cat([none, none, log_v], 1), torch.cat([h, h], 1), prompts) == [2, 3]
    hard = torch.where(log_v > math.log(0.5), 0.0, -math.inf)
    found = collapse_figures(hard, h, prompts)
    assert found["active"] == [0, 1] and found["verdict"] == "all active" and math.isfinite(found["gain"]["mean"])


def test_nothing_is_said_where_nothing_can_be_tested():
    """Faults: rounded constant weights tested; a missing error taken for a collapse; figures of one expert."""
    log_v, h, prompts = two_domains(0.9, 0.9)
    noise = 1e-8 * torch.randn(len(h), 2, generator=torch.Generator().manual_seed(0)).double()
    assert collapse_figures(noise.log_softmax(1), h, prompts)["verdict"] == "untested"
    alone = collapse_figures(log_v, h, [0] * len(h))
    assert alone["verdict"] == "untested" and math.isnan(alone["gain"]["se"]) and not exceeds(alone["gain"])
    assert collapse_figures(log_v[:, :1], h[:, :1], prompts) == {}


def test_weights_of_new_users_come_from_their_other_half():
    """By brute force. Faults: a pair's own choice among those that its weights are from; pairs of other users; halves
    in a row, which a user's first and last pairs may differ in; a single pair without weights."""
    rng = np.random.default_rng(0)
    user = ["a", "b", "a", "a", 4, "b", "a", "b"]                           # 4: a pair without a user
    h, w = torch.tensor(rng.normal(size=(8, 3))), rng.dirichlet([1, 1, 1], 8)
    got = half_split_weights(torch.tensor(w).log(), h, user).exp().tolist()
    other = {0: [2, 6], 3: [2, 6], 2: [0, 3], 6: [0, 3], 1: [5], 5: [1, 7], 7: [5], 4: []}     # halves: 0, 3 and 2, 6
    for n, others in other.items():
        joint = [w[n][k] * math.prod(brute.sigma(float(h[i, k])) for i in others) for k in range(3)]
        assert got[n] == pytest.approx([x / sum(joint) for x in joint])


def test_a_ranking_is_in_one_half():
    """Two rankings of three texts and one pair of one user, by brute force. Fault: a pair's weights from another pair
    of its own ranking, from which it follows: experts of random rewards then looked like types."""
    rng = np.random.default_rng(3)
    pairs = [Pair([1], [a], [b], user="u", line=line) for line in (4, 9) for a, b in ((1, 2), (1, 3), (2, 3))]
    pairs.append(Pair([1], [1], [2], user="u", line=12))
    h, even = torch.tensor(rng.normal(size=(7, 2))), torch.full((7, 2), 0.5).log()
    got = half_split_weights(even, h, ["u"] * 7, records_of(pairs)).exp()
    for n, others in {**dict.fromkeys((0, 1, 2, 6), [3, 4, 5]), **dict.fromkeys((3, 4, 5), [0, 1, 2, 6])}.items():
        joint = [math.prod(brute.sigma(float(h[i, k])) for i in others) for k in range(2)]
        assert got[n].tolist() == pytest.approx([x / sum(joint) for x in joint])
    config = SimpleNamespace(latent="pair", gate="fixed")
    found = collapse_of(SimpleNamespace(config=config), h, even, pairs, list(range(7)), ["u"] * 7)
    assert found["slope"]["mean"] == pytest.approx(collapse_figures(got.log(), h, list(range(7)))["slope"]["mean"])


def simulated(rng, N, tilt=0.3, types=True, margin=1.5, repeat=1):
    """Choices of two types with opposed margins; weights lean to the pair's type, or to a random one. Every choice
    occurs `repeat` times under one prompt."""
    z, a = rng.integers(2, size=N), margin * rng.normal(size=N)
    hint = z if types else rng.integers(2, size=N)
    chosen = rng.random(N) < 1 / (1 + np.exp(-np.where(z == 0, a, -a)))
    s = np.where(chosen, a, -a)
    w = np.where(np.arange(2) == hint[:, None], 0.5 + tilt, 0.5 - tilt)
    h, prompts = np.stack([s, -s], 1), np.arange(N)
    repeated = (np.repeat(x, repeat, 0) for x in (np.log(w), h, prompts))
    log_w, h, prompts = repeated
    return torch.tensor(log_w), torch.tensor(h), prompts.tolist()


def test_the_false_alarms_and_misses_of_the_test(monkeypatch):
    """600 worlds each, without a floor. Weights that know nothing pass in 5 % of worlds (one standard error: 0.009);
    on 2,000 pairs of real types no world is called collapsed.
    Faults: another quantile, two-sided 5 % or 1 %; repeated prompts counted as independent (0.2 pass)."""
    monkeypatch.setattr(collapse, "FLOOR", 0.0)
    rng = np.random.default_rng(0)
    for repeat in (1, 4):
        passed = [exceeds(mean_slope(*simulated(rng, 400, types=False, repeat=repeat))) for _ in range(600)]
        assert 0.03 < np.mean(passed) < 0.075, (repeat, np.mean(passed))
    found = [collapse_figures(*simulated(rng, 2000)) for _ in range(60)]
    assert all(of["verdict"] == "all active" for of in found)


def mean_slope(log_v, h, prompts):
    return collapse_figures(log_v, h, prompts)["slope"]


def test_a_gain_below_the_floor_is_none():
    """Faults: a floor of 0, by which a gain of 0.00001 nats counts if there are pairs enough."""
    assert not exceeds({"mean": 0.5 * FLOOR, "se": 1e-9}) and exceeds({"mean": 2 * FLOOR, "se": 1e-9})
    assert not exceeds({"mean": 0.1, "se": 0.1}) and not exceeds({"mean": 0.1, "se": math.nan})
    rng = np.random.default_rng(0)
    seen = [rng.normal(detectable({"se": 1.0}), 1.0) > Z + FLOOR for _ in range(4000)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("latent, gate, users, verdict", [
    ("user", "fixed", "new", "all active"), ("pair", "fixed", "new", "all active"),
    ("user", "fixed", "known", "posterior collapse"), ("pair", "fixed", "unnamed", "untested"),
    ("pair", "linear", "new", "untested"),
])
def test_each_kind_of_run_has_its_weights(latent, gate, users, verdict):
    """Users of two types; responsibilities from training that are wrong for half of the users.
    Faults: known users by their held-out pairs, which hides what training learnt; new users by the gate alone; users
    who set the weights of a gate that does not know them."""
    rng, pairs, h = np.random.default_rng(0), [], []
    for n in range(600):
        user, a = n % 60, rng.normal() * 2
        sign = 1 if rng.random() < 1 / (1 + math.exp(-a if user % 2 else a)) else -1
        h.append([sign * -a, sign * a])
        pairs.append(Pair([n], [2], [3], user=None if users == "unnamed" else f"{users}{user}"))
    names = [f"known{u}" for u in range(60)]
    table = torch.tensor([[0.9, 0.1] if u % 4 < 2 else [0.1, 0.9] for u in range(60)]).log()
    plan = SimpleNamespace(units=[[u] for u in range(60)], pairs=[Pair([1], [2], [3], user=name) for name in names])
    run = SimpleNamespace(config=SimpleNamespace(latent=latent, gate=gate, experts=2), table=table, plan=plan)
    named = [n if p.user is None else p.user for n, p in enumerate(pairs)]
    log_w = torch.full((600, 2), -math.log(2))
    found = collapse_of(run, torch.tensor(h).float(), log_w, pairs, list(range(600)), named)
    assert found["verdict"] == verdict, found


def test_a_warning_says_what_to_do_and_only_where_there_is_something():
    """Faults: a warning for a healthy mixture or for DPO; none for a collapse; a number that is null in an evaluation
    read from a file; results of an older evaluation, which have no such figures."""
    found = collapse_figures(*two_domains(0.9, 0.9))
    nan = {"mean": math.nan, "se": math.nan, "n": 4}
    says = {"posterior collapse": "--experts 1", "no gain": "smaller --beta", "inactive experts": "--experts 2",
            "untested": "cannot be tested", "all active": ""}
    for verdict, words in says.items():
        of = found | {"verdict": verdict} | ({"slope": nan, "gain": nan} if verdict == "untested" else {})
        line = describe_collapse("mix", {"experts": 3, "collapse": of})
        assert words in line and line.startswith("warning: mix: ") == bool(words) and "nan" not in line, line
        assert "\n" not in line and describe_active({"experts": 3, "collapse": of}) == "2 of 3"
    line = describe_collapse("mix", {"experts": 3, "collapse": found | {"verdict": "posterior collapse", "gain": nan,
                                                                        "slope": nan | {"mean": 0.0}}})
    assert "nan" not in line, line
    for older in ({"experts": 2}, {"experts": 1, "collapse": {}}):
        assert describe_collapse("mix", older) == "" and describe_active(older) == "–"


@pytest.mark.parametrize("verdict, options", [
    ("posterior collapse", dict(rank=0, start="none")), ("all active", dict(start="linear", start_steps=4))])
def test_runs_built_to_fail_are_found(verdict, options, tmp_path, capsys):
    """The symmetric saddle, whose experts stay equal, and a healthy run. Faults: a warning that nobody prints; one for
    every run."""
    model = tinyjob.make_model(tmp_path / "model")
    records = tinyjob.make_records(users=8, each=6)
    out = tinyjob.run(tmp_path, model, records, epochs=12, latent="user", beta=1.0, **options)
    tinyjob.write(tmp_path / "heldout.jsonl", tinyjob.make_records(users=8, each=12, seed=5))
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "write_report", lambda home: None)
        results = evaluation.evaluate(evaluation.EvalConfig(dir=str(out), heldout=str(tmp_path / "heldout.jsonl")))
    assert results["preferences"]["run"]["collapse"]["verdict"] == verdict
    printed = capsys.readouterr().out
    assert ("warning: run: " in printed) == (verdict != "all active")
    assert f"{1 if verdict != 'all active' else 2} of 2" in printed
