"""data/studies/audit.py: the statistics on cases with known answers, the audit on the program as it is, and on the
program with its noise or its clipping taken away. Docstrings name the faults that each test is there for."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from data.studies import audit
from data.studies.audit import CHOSEN, DELTA, Runs, fitted_bound, lower_bound, p_value, rates, scores_of
from mixdpo.private import dp_sgd as privacy
from mixdpo.private.accountant import Mechanism, noise_multiplier
from mixdpo.private.dp_sgd import Noise

# ---- statistics


def test_the_published_example():
    """Steinke et al. 2023, appendix D: 75 of 100 guesses right, 1,000 canaries, delta 1e-4, 95 %: epsilon 0.673.
    Faults: the factor 2 m delta, or the division by i, left out; >= taken for >."""
    found = audit.largest(lambda epsilon: p_value(1000, 100, 75, epsilon, 1e-4) <= 0.05)
    assert found == pytest.approx(0.673, abs=5e-4)


def test_a_p_value_without_delta_is_a_binomial_tail():
    """Summed term by term. Faults: the tail above v without v itself; the chance of a wrong guess for a right one."""
    q = math.exp(1.5) / (1 + math.exp(1.5))
    tail = sum(math.comb(20, k) * q**k * (1 - q) ** (20 - k) for k in range(17, 21))
    assert p_value(50, 20, 17, 1.5, 0.0) == pytest.approx(tail, rel=1e-9) and p_value(50, 20, 0, 1.5, 1e-3) == 1


def guesses(seed: int, m: int = 4000):
    rng = np.random.default_rng(seed)
    return rng, rng.random(m) < 0.5


def test_randomized_response_is_found_out():
    """Each coin is published, wrong with chance 1 / (1 + e^epsilon): exactly epsilon-DP, and no mechanism is easier to
    audit. Faults: a bound above the truth; a bound far below it."""
    for seed, epsilon in enumerate((0.5, 1.0, 2.0, 4.0)):
        rng, inside = guesses(seed)
        answer = np.where(rng.random(len(inside)) < 1 / (1 + math.exp(epsilon)), ~inside, inside)
        score = answer + 1e-3 * rng.random(len(inside))
        assert 0.75 * epsilon < lower_bound([score], inside, 0.0) <= epsilon


def test_all_guesses_right_is_a_bound_by_hand():
    """Coins that are published as they are: the best of six sets of guesses has 40 % of the canaries in and 40 % out,
    all right, so q^800 = 0.05 / 6. Faults: the canaries guessed to be out not counted, or counted as wrong; another
    division of the error probability."""
    inside = np.arange(1000) % 2 == 0
    q = (0.05 / 6) ** (1 / 800)
    assert lower_bound([inside.astype(float)], inside, 0.0) == pytest.approx(math.log(q / (1 - q)))


def test_what_says_nothing_gives_zero():
    """epsilon_lower is above 0 in 5 % of 200 audits or fewer, but for chance; epsilon_fit never. Faults: many guesses
    tried, each at 95 % confidence; scores that see the coins."""
    above = 0
    for seed in range(200):
        rng, inside = guesses(seed, 400)
        scores = [rng.normal(size=400) for _ in range(3)]
        above += lower_bound(scores, inside, DELTA) > 0
        assert seed > 20 or fitted_bound(scores, inside, Mechanism(1.0, 0.5, 2), DELTA) == 0
    assert above <= 15


@pytest.mark.parametrize("rate, steps", [(1.0, 1), (0.25, 8)])
def test_a_gaussian_mechanism_of_known_epsilon(rate, steps):
    """Made here, not by the program. epsilon_fit is nearly tight, epsilon_lower below it; with half the noise
    epsilon_fit exceeds what was claimed. Faults: sigma without the clip norm; steps or rate not in the trade-off."""
    for seed, epsilon in enumerate((2.0, 4.0)):
        rng, inside = guesses(seed, 10_000)
        mechanism = Mechanism(noise_multiplier(epsilon, DELTA, rate, steps), rate, steps)
        takes, noise = (rng.random((steps, 10_000)) < rate) & inside, mechanism.sigma * rng.normal(size=(steps, 10_000))
        scores = scores_of(takes + noise, mechanism)
        assert 0 < lower_bound(scores, inside, DELTA) < epsilon
        assert 0.4 * epsilon < fitted_bound(scores, inside, mechanism, DELTA) <= epsilon
        assert fitted_bound(scores_of(takes + noise / 2, mechanism), inside, mechanism, DELTA) > 1.2 * epsilon


def test_rates_are_covered_by_their_bounds():
    """Clopper-Pearson by its definition: at the bound, what was seen or more has just the error's chance. Faults: upper
    and lower mixed up, inside and outside mixed up."""
    inside = np.arange(100) < 60
    score = np.concatenate([np.linspace(0.5, 1.5, 60), np.linspace(0, 1, 40)])
    above = score > np.quantile(score, 0.7)
    hits, false = int((above & inside).sum()), int((above & ~inside).sum())
    low, high = rates(score, inside, 0.3, 0.01)
    assert hits + false == 30 and low < hits / 60 and high > false / 40
    assert binom.sf(hits - 1, 60, low) == pytest.approx(0.01) and binom.cdf(false, 40, high) == pytest.approx(0.01)


# ---- the program


def no_noise(monkeypatch):
    monkeypatch.setattr(Noise, "release", lambda self, total, t: [g / self.expected for g in total])


def no_clipping(monkeypatch):
    monkeypatch.setattr(privacy, "clip_factors", lambda norm, clip: norm * 0 + 1)


def made(count: int, m: int, epsilon: float, seed: int, folder):
    return audit.audit(Runs(CHOSEN, m, folder), count, epsilon, seed)


def test_chosen_gradients_stay_below_the_accountant(tmp_path):
    """The parts of DP-SGD against the adversary that the accountant assumes. Faults: noise of half the deviation, a
    clip norm that is exceeded by a factor of two, one draw of noise for all steps."""
    for seed, epsilon in enumerate((1.0, 4.0), 1):
        found = made(1, 4000, epsilon, seed, tmp_path)
        assert 0.99 * epsilon < found["claimed"] <= epsilon
        assert 0 < found["lower"] < 0.6 * epsilon and found["lower"] < found["fit"] < 0.95 * epsilon


@pytest.mark.parametrize("fault", audit.FAULTS)
def test_each_fault_of_the_study_is_found_with_chosen_gradients(tmp_path, fault):
    """A fault that the audit misses here would be missed on the page, too. epsilon_fit must exceed what was claimed;
    epsilon_lower as well, except for half the noise, which is less than its distance to the accountant."""
    found = audit.audit(Runs(CHOSEN, 10_000, tmp_path), 1, 2.0, 5, fault)
    assert found["fit"] > 1.3 * found["claimed"]
    assert (found["lower"] > found["claimed"]) == (fault != "half the noise")


@pytest.mark.parametrize("way", ["DPO, pairs", "Mix-DPO, users"])
def test_an_audit_of_train_run(tmp_path, way, monkeypatch):
    """train.run itself: below the claimed epsilon as it is, far above without noise and without clipping. The faults
    are put in here, and not by the study's own table."""
    runs = Runs(way, 60, tmp_path)
    assert np.median([float(g.norm()) for g in runs.directions]) == pytest.approx(1)
    found = audit.audit(runs, 4, 1.0, 1)
    assert found["claimed"] <= 1 and found["lower"] < 0.8 and found["fit"] < 0.8
    for fault in (no_noise, no_clipping):
        with monkeypatch.context() as patch:
            fault(patch)
            broken = audit.audit(runs, 4, 1.0, 1)
        assert broken["claimed"] == found["claimed"] and broken["lower"] > 1.3 and broken["fit"] > 2, fault.__name__


def test_canaries_have_gradients_that_are_clipped(tmp_path):
    """Longer than the clip norm, each: otherwise an audit is weaker than it says. And nearly orthogonal."""
    with audit.observing("add") as found:
        runs = Runs("DPO, users", 20, tmp_path)
    assert min(float(g.norm()) for g in found) > 3 and len(found) == 20
    gram = runs.directions @ runs.directions.T
    assert float(gram.fill_diagonal_(0).abs().max()) < 0.5


def test_estimates_are_of_the_canaries_that_take_part():
    """Ridge regression on known sums. Faults: rows and columns mixed up; estimates shrunk towards 0."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(30, 2000, generator=generator), dim=1)
    takes = (torch.rand(4, 30, generator=generator) < 0.3).float()
    x = audit.decode(directions, takes @ directions)
    assert x.shape == (4, 30) and np.abs(x - takes.numpy()).max() < 0.25
    assert abs(x[takes.numpy() == 1].mean() - 1) < 0.05
