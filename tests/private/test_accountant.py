"""mixdpo.private.accountant against closed forms, quadrature, saddle-point inversion (Alghamdi et al. 2022,
arXiv 2208.09595), and figures published by others. What each test catches stands in its docstring."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
from raising import raises_at
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from mixdpo.config import InputError
from mixdpo.private import accountant
from mixdpo.private.accountant import (
    EXACT,
    ORDERS,
    SEARCH,
    Mechanism,
    both_ways,
    delta_of,
    epsilon_of,
    epsilon_rdp,
    noise_multiplier,
    rdp,
)


def loss(x, sigma, rate):
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-rate), np.log(rate) + (2 * x - 1) / (2 * sigma**2))


def gaussian_delta(mu, epsilon):
    """Of Gaussian noise, mu = 1 / sigma (Balle & Wang 2018, arXiv 1805.06530)."""
    return norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))


def one_step_delta(sigma, rate, epsilon, way):
    """Of one step: closed form in the x where the loss is epsilon. (N,) -> (N,)"""
    target = np.expm1(epsilon if way == "removed" else -epsilon) + rate     # rate exp((2x - 1) / 2 sigma^2)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(target > 0, sigma**2 * np.log(target / rate) + 0.5, -np.inf)
    tail = norm.sf if way == "removed" else norm.cdf
    without, having = tail(x / sigma), (1 - rate) * tail(x / sigma) + rate * tail((x - 1) / sigma)
    return having - np.exp(epsilon) * without if way == "removed" else without - np.exp(epsilon) * having


def two_steps_delta(first, second, epsilon, way):
    """Of two mechanisms of one step: quadrature over the first one's output, the second in closed form."""
    x = np.linspace(-12 * first.sigma, 1 + 12 * first.sigma, 40001)
    L = loss(x, first.sigma, first.rate)
    log_q = norm.logpdf(x, scale=first.sigma)
    weight, L = (np.exp(log_q + L), L) if way == "removed" else (np.exp(log_q), -L)
    return float(weight @ one_step_delta(second.sigma, second.rate, epsilon - L, way) * (x[1] - x[0]))


def saddle_point_delta(mechanism, epsilon, way):
    """Of n steps, without a grid of losses: max(0, 1 - exp(epsilon - s)) is the integral of exp(z (s - epsilon)) /
    (2 pi i z (z + 1)) over the line Re z = c > 0, so delta is that of M(z)^n exp(-z epsilon) / (...)."""
    s, q, n = mechanism.sigma, mechanism.rate, mechanism.steps
    x, dx = np.linspace(-12 * s, 12 + 12 * s, 2000, retstep=True)
    L = loss(x, s, q)
    log_q = norm.logpdf(x, scale=s) + np.log(dx)
    log_weight, L = (log_q + L, L) if way == "removed" else (log_q, -L)

    def exponent(z):
        return n * np.log(np.exp(log_weight + z * L).sum()) - z * epsilon - np.log(z * (z + 1))

    c = min(np.geomspace(0.05, 10, 100), key=exponent)
    width = 1e-3 / math.sqrt(exponent(c + 1e-3) - 2 * exponent(c) + exponent(c - 1e-3))     # standard deviation in u
    u = np.arange(0, 30, 0.05) * width
    f = np.array([np.exp(exponent(c + 1j * v)).real for v in u])
    assert max(abs(f[-100:])) < 1e-10 * f[0], "the line is cut too short"
    return float((f.sum() - f[0] / 2) * (u[1] - u[0]) / math.pi)


# --- Renyi divergences ------------------------------------------------------------------------------------------------


def test_opacus_rdp_figure():
    """opacus/tests/accountants_test.py of github.com/pytorch/opacus says 7.32911117143. Catches: the older conversion
    (rdp + log(1/delta) / (a - 1)) or a wrong sign in the newer, orders left out, divergences of the other way."""
    assert abs(epsilon_rdp([Mechanism(1.5, 0.04, 2250)], 1e-5) - 7.32911117143) < 1e-9
    assert epsilon_rdp([Mechanism(1.5, 0.04, 1000), Mechanism(1.5, 0.04, 1250)], 1e-5) == \
        pytest.approx(7.32911117143, abs=1e-9)


@pytest.mark.parametrize("sigma, rate", [(1.5, 0.04), (0.5, 0.2), (4.0, 0.001), (0.03, 0.01), (30.0, 0.9)])
def test_divergences_of_whole_orders(sigma, rate):
    """Mironov et al. 2019, section 3.3: a binomial sum. Catches: a range or a spacing of the quadrature that does for
    small orders or large sigma only."""
    orders = [2, 3, 10, 32, 63]
    for a, got in zip(orders, rdp(Mechanism(sigma, rate, 7), orders)):
        terms = [math.log(math.comb(a, k)) + k * math.log(rate) + (a - k) * math.log1p(-rate)
                 + k * (k - 1) / (2 * sigma**2) for k in range(a + 1)]
        want = (max(terms) + math.log(math.fsum(math.exp(t - max(terms)) for t in terms))) / (a - 1)
        assert got == pytest.approx(7 * want, rel=1e-11, abs=2e-14)


@pytest.mark.parametrize("sigma, rate", [(1.5, 0.04), (0.4, 0.3), (3.0, 0.01)])
def test_divergences_of_fractional_orders(sigma, rate):
    """Against adaptive quadrature, and at least those of the added way. Catches: orders rounded or interpolated, P and
    Q exchanged."""
    orders = [1.1, 1.7, 5.5, 10.9]
    for a, got in zip(orders, rdp(Mechanism(sigma, rate), orders)):
        removed, added = (
            math.log(quad(lambda x: math.exp(norm.logpdf(x, scale=sigma) + power * loss(x, sigma, rate)),
                          -15 * sigma, 12 + 15 * sigma, points=[0, a], epsabs=1e-14, epsrel=1e-12, limit=400)[0])
            / (a - 1) for power in (a, 1 - a))
        assert got == pytest.approx(removed, rel=1e-8) and removed > added


def test_divergences_at_the_ends():
    """Catches: nan for full batches, which have a / (2 sigma^2), steps not counted, noise or releases of nothing."""
    assert len(ORDERS) == 151 and min(ORDERS) == 1.1 and max(ORDERS) == 63
    assert np.allclose(rdp(Mechanism(2.0, 1.0, 3)), 3 * np.array(ORDERS) / 8, rtol=1e-11)
    assert np.isinf(rdp(Mechanism(0.0, 0.5))).all() and epsilon_rdp([Mechanism(0.0, 0.5)], 1e-5) == math.inf
    for nothing in ([], [Mechanism(1.0, 0.0, 5)], [Mechanism(1.0, 0.5, 0)], [Mechanism(0.0, 0.0)]):
        assert epsilon_rdp(nothing, 1e-5) == 0


# --- distributions of the loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism, delta, exact", [
    (Mechanism(1.5, 0.04, 2250), 1e-5, 6.7687804), (Mechanism(1.5, 0.04, 2249), 1e-5, 6.7670441),
    (Mechanism(0.8, 0.05, 100), 1e-6, 6.7306287), (Mechanism(2.0, 0.2, 100), 1e-6, 5.6617881)])
def test_six_digits(mechanism, delta, exact):
    """Exact by saddle_point_delta. A connected grid of 1e-4, as dp_accounting 0.6.0 has, says 6.768787, 6.767051,
    6.730629, 5.661788. Catches: masses rounded up to the grid (not tight) or down (not a bound), a grid whose error
    adds up over steps, one way only."""
    got = epsilon_of([mechanism], delta)
    assert exact - 1e-7 < got < exact + 1e-6
    if mechanism.sigma > 1:
        assert delta * (1 - 4e-6) < saddle_point_delta(mechanism, got, "removed") < delta   # a bound, and a tight one
    assert got < epsilon_rdp([mechanism], delta)


@pytest.mark.parametrize("mechanisms, epsilons", [
    ([Mechanism(1.0)], [-3.0, -0.5, 0.0, 1.0, 4.0]), ([Mechanism(5.0, 1.0, 9)], [0.0, 0.3, 2.0]),
    ([Mechanism(4.0), Mechanism(1.0, 1.0, 2)], [-1.0, 0.0, 3.0, 6.0]), ([Mechanism(0.05)], [0.0, 200.0, 220.0]),
    ([Mechanism(1e4)], [0.0, 1e-4]), ([Mechanism(0.7), Mechanism(3.0), Mechanism(0.0, 0.0)], [1.0, 5.0])])
def test_gaussians(mechanisms, epsilons):
    """Of several, mu = sqrt(sum of steps / sigma^2). Catches: sigma for sigma^2, sensitivity 2, standard deviations
    that add up, a distribution that loses mass at its ends, underflow at small sigma."""
    mu = math.sqrt(sum(m.steps / m.sigma**2 for m in mechanisms if m.rate))
    for epsilon in epsilons:
        want = gaussian_delta(mu, epsilon)
        assert want <= delta_of(mechanisms, epsilon) <= want * (1 + 1e-6) + 2e-13, epsilon
    assert delta_of([Mechanism(1.0)], 1.0) == pytest.approx(0.1269367, abs=5e-8)


@pytest.mark.parametrize("delta, least, most", [(1e-5, 0.0, 2e-7), (1e-7, 0.0, 2e-7), (1e-9, 1e-6, 6e-6),
                                                (1e-11, 1e-4, 5e-4)])
def test_the_error_of_epsilon_is_the_stated_one(delta, least, most):
    """The module says 1e-7, and how much more for a small delta. Catches: a statement that leaves out what CHARGE costs
    there; another charge."""
    exact = brentq(lambda epsilon: gaussian_delta(1.0, epsilon) - delta, 0.0, 50.0, xtol=1e-13, rtol=1e-14)
    error = epsilon_of([Mechanism(1.0)], delta) / exact - 1
    assert least <= error <= most
    stated = [float(word) for word in re.findall(r"(\d+e-\d+) at\s+%s\b" % f"{delta:g}".replace("e-0", "e-"),
                                                 accountant.__doc__)]
    assert len(stated) == (delta < 1e-7) and all(error == pytest.approx(value, rel=0.5) for value in stated)


WAYS = {"removed": 0, "added": 1}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first, second", [(Mechanism(1.0, 0.1), Mechanism(0.6, 0.3)),
                                           (Mechanism(2.0, 1.0), Mechanism(0.5, 0.02)),
                                           (Mechanism(0.8, 0.95), Mechanism(3.0, 0.5))])
def test_two_mechanisms_by_quadrature(first, second, way):
    """Different ones, each way by itself. Catches: one mechanism's rate or sigma for both, ways mixed up between
    mechanisms (one removed, the other added), losses of the wrong sign, grids that do not fit together."""
    got = both_ways([first, second], EXACT)[WAYS[way]]
    for epsilon in (-1.0, 0.0, 0.2, 1.0, 2.5):
        want = two_steps_delta(first, second, epsilon, way)
        assert want - 1e-12 <= got.delta(epsilon) <= want * (1 + 1e-5) + 2e-13, epsilon


@pytest.mark.parametrize("way", WAYS)
def test_many_steps_by_inversion(way):
    """Catches: a power that is not the number of steps, sums that wrap around, one way for the other."""
    mechanism = Mechanism(1.0, 0.1, 50)
    got = both_ways([mechanism], EXACT)[WAYS[way]]
    for epsilon in (0.0, 1.0, 3.0):
        want = saddle_point_delta(mechanism, epsilon, way)
        assert want <= got.delta(epsilon) <= want * (1 + 2e-6) + 2e-13, epsilon


def test_the_larger_way_counts():
    """Removed is the larger one above 0, added below: 100 steps at sigma 2 and q 0.2 have epsilon 5.66 and 4.50.
    Catches: one way only, whichever, or their mean."""
    mechanism = Mechanism(2.0, 0.2, 100)
    removed, added = both_ways([mechanism], EXACT)
    assert removed.epsilon(1e-6) == pytest.approx(5.661788, abs=1e-6)
    assert added.epsilon(1e-6) == pytest.approx(4.504051, abs=1e-6)
    assert epsilon_of([mechanism], 1e-6) == removed.epsilon(1e-6)
    for epsilon in (0.5, 2.0):
        assert delta_of([mechanism], epsilon) == removed.delta(epsilon) > added.delta(epsilon) + 1e-3
        assert delta_of([mechanism], -epsilon) == added.delta(-epsilon) > removed.delta(-epsilon) + 1e-3
        exchanged = 1 - math.exp(-epsilon) * (1 - removed.delta(epsilon))   # delta of (Q, P) at -epsilon, from (P, Q)
        assert added.delta(-epsilon) == pytest.approx(exchanged, abs=1e-7)


@pytest.mark.parametrize("sigma, rate, steps, published", [
    (0.8, 0.05, 100, 6.74105193941409996938), (1.5, 0.05, 100, 1.95385313568420015961),
    (2.0, 0.2, 100, 5.67205560882372950004), (3.0, 0.001, 100, 0.02152050943908820326),
    (2.0, 0.05, 1000, 4.17279986668931890392), (3.0, 0.05, 1000, 2.52757432605973830774)])
def test_published_bounds(sigma, rate, steps, published):
    """opacus/tests/prv_accountant.py of github.com/pytorch/opacus, from github.com/microsoft/prv_accountant: at 1e-6,
    estimates for delta (1 - 1/1000) plus 0.01. Catches: bounds that are loose, and figures that are too small."""
    assert published - 0.0107 < epsilon_of([Mechanism(sigma, rate, steps)], 1e-6) < published


@pytest.mark.parametrize("way", WAYS)
def test_what_the_grid_does_not_cover(way, monkeypatch):
    """At three standard deviations for nine it is no longer nothing. Catches: tails dropped, or moved to the grid's end
    where they are losses too small; epsilon that does not count them."""
    monkeypatch.setattr(accountant, "REACH", 3.0)
    losses = both_ways([Mechanism(1.0, 0.1)], EXACT)[WAYS[way]]
    for epsilon in (-0.5, 0.0, 0.5, 2.0):
        assert one_step_delta(1.0, 0.1, epsilon, way) <= losses.delta(epsilon)
    assert 1e-4 < losses.infinite < 2e-3
    assert losses.delta(losses.epsilon(2e-3)) == pytest.approx(2e-3, rel=1e-8)
    assert losses.epsilon(losses.infinite) == math.inf


def test_where_masses_underflow():
    """Q's do at most losses of P here. Catches: masses then moved to smaller losses, exp(epsilon) that overflows."""
    want = gaussian_delta(1 / 0.02, 1300.0)
    assert want <= delta_of([Mechanism(0.02)], 1300.0) < 1.01 * want


def test_a_coarser_grid_is_a_larger_bound():
    """And a grid much too coarse is still one. Catches: dots that are not connected but moved to the nearer end."""
    mechanism = Mechanism(1.2, 0.3, 8)
    exact = saddle_point_delta(mechanism, 2.0, "removed")
    found = [both_ways([mechanism], accuracy)[0].delta(2.0) for accuracy in (1e-7, 1e-5, 1e-3, 1e-1)]
    assert all(a < b for a, b in pairwise([exact, *found]))
    assert found[0] < exact * (1 + 1e-6) and found[2] > exact * (1 + 1e-4)


def test_rounding_is_charged():
    """Where the truth is nothing, 300,000 steps leave noise of either sign. Catches: delta below 0, or below what
    noise can hide; a charge that does not grow with steps."""
    for losses in both_ways([Mechanism(2.0, 0.02, 300_000)], SEARCH):
        l = losses.h * np.arange(losses.first, losses.first + len(losses.p))
        mean = float(losses.p @ l)
        far = mean + 9 * math.sqrt(float(losses.p @ (l - mean) ** 2))
        assert far < l[-1]
        noise = np.abs(np.cumsum(losses.p[::-1])[: int((l > far).sum())]).max()
        assert 0 < noise < 0.6 * losses.infinite < 1e-10


def test_rare_and_large_losses_need_no_large_grid():
    """Catches a grid that holds the largest loss of all steps together, which is never reached. Here it had 256 times
    as many points as are needed; for epsilon 1000 at rate 0.001 it needed 32 GB, and the process was killed."""
    assert max(len(way.p) for way in both_ways([Mechanism(0.01, 1e-6, 1000)], 100 * SEARCH)) <= 2**17


def test_monotone():
    """Catches: an accountant by which more noise, fewer steps or a lower rate cost more."""
    spent = [epsilon_of([Mechanism(*values)], 1e-5) for values in (
        (5.0, 0.1, 2), (2.0, 0.1, 2), (1.99, 0.1, 2), (1.0, 0.1, 2), (1.0, 0.1, 3), (1.0, 0.1, 10), (1.0, 0.11, 10),
        (1.0, 0.5, 10), (1.0, 0.9999, 10))]
    assert all(better < worse for better, worse in pairwise(spent))
    assert spent[-1] == pytest.approx(epsilon_of([Mechanism(1.0, 1.0, 10)], 1e-5), rel=2e-4)    # as q goes to 1


def test_mechanisms_add_up_in_any_grouping():
    """Catches: only the last of equal mechanisms counted, order that matters, one release too many or too few."""
    whole = epsilon_of([Mechanism(3.0), Mechanism(1.0, 0.1, 30)], 1e-5)
    pieces = [Mechanism(1.0, 0.1, 10), Mechanism(3.0), Mechanism(1.0, 0.1, 20), Mechanism(0.5, 0.1, 0)]
    assert epsilon_of(pieces, 1e-5) == pytest.approx(whole, rel=1e-12)
    assert epsilon_of(iter(pieces), 1e-5) > epsilon_of(pieces[:1] + pieces[2:], 1e-5) + 0.1


@pytest.mark.parametrize("mechanisms", [[Mechanism(1.0)], [Mechanism(0.9, 0.2, 10), Mechanism(6.0)]])
def test_delta_and_epsilon_are_inverse(mechanisms):
    """Catches: epsilon off by a cell of the grid, infinite losses left out on one side."""
    for delta in (0.1, 1e-3, 1e-6, 1e-9):
        assert delta_of(mechanisms, epsilon_of(mechanisms, delta)) == pytest.approx(delta, rel=1e-8)
    assert epsilon_of(mechanisms, 0.99) == 0


def test_nothing_and_everything():
    """Catches: nan, or noise of 0 that is taken for no release."""
    assert 0 <= delta_of([Mechanism(1.0)], math.inf) < 2e-13 and delta_of([Mechanism(1.0)], -math.inf) == 1
    for nothing in ([], [Mechanism(1.0, 0.0, 5)], [Mechanism(1.0, 0.5, 0)], [Mechanism(0.0, 0.0)]):
        assert epsilon_of(nothing, 1e-5) == 0 and delta_of(nothing, 0.0) == 0
    for bare in ([Mechanism(0.0)], [Mechanism(2.0), Mechanism(0.0, 0.01)]):
        assert epsilon_of(bare, 1e-5) == math.inf and delta_of(bare, 50.0) == 1


# --- how much noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon, delta, rate, steps, others", [
    (1.0, 1e-5, 0.05, 300, []), (6.0, 1e-6, 0.2, 5, [Mechanism(2.0)]), (0.1, 1e-5, 1.0, 4, []),
    (3.0, 1e-5, 0.1, 20, [Mechanism(4.0), Mechanism(1.0, 0.1, 2)])])
def test_noise_is_enough_and_no_more(epsilon, delta, rate, steps, others):
    """Catches: `others` forgotten, sigma from the wrong side of the last interval, a search that stops early, a bound
    as loose as RDP's."""
    sigma = noise_multiplier(epsilon, delta, rate, steps, iter(others))
    assert epsilon * (1 - 1e-3) < epsilon_of([*others, Mechanism(sigma, rate, steps)], delta) <= epsilon
    assert epsilon_of([*others, Mechanism(sigma * (1 - 1e-4), rate, steps)], delta) > epsilon


@pytest.mark.parametrize("epsilon, delta", [(1.0, 1e-5), (1e-5, 1e-6), (50.0, 1e-9)])
def test_noise_of_one_release(epsilon, delta):
    """Catches: sigma by the classical formula, sqrt(2 log(1.25 / delta)) / epsilon, which is 4.84 for 3.73."""
    want = 1 / brentq(lambda mu: gaussian_delta(mu, epsilon) - delta, 1e-6, 10, xtol=1e-12)
    assert want <= noise_multiplier(epsilon, delta, 1.0, 1) <= want * (1 + 1e-4)


def test_noise_where_any_or_none_will_do():
    """Catches: a search without end, noise for a release that is none."""
    assert noise_multiplier(1.0, 1e-5, 0.0, 10) == noise_multiplier(1.0, 1e-5, 0.1, 0) == 0
    assert noise_multiplier(math.inf, 1e-5, 0.1, 10) == 0
    assert noise_multiplier(1.0, 1e-2, 1e-3, 1) < 0.001     # one example in a thousand may be published at this delta


@pytest.mark.parametrize("arguments, refused", [
    ((0.0, 1e-5, 0.1, 10), "epsilon 0.0"), ((-1.0, 1e-5, 0.1, 10), "epsilon -1.0"),
    ((math.nan, 1e-5, 0.1, 10), "epsilon nan"), ((1.0, 0.0, 0.1, 10), "delta 0.0"), ((1.0, 1.0, 0.1, 10), "delta 1.0"),
    ((1.0, math.nan, 0.1, 10), "delta nan"), ((1.0, 1e-5, 1.1, 10), " rate=1.1"), ((1.0, 1e-5, -0.1, 10), " rate=-0.1"),
    ((1.0, 1e-5, 0.1, -1), " steps=-1"), ((1.0, 1e-5, 0.1, 10, [Mechanism(1.0)]), "epsilon 4.37"),
    ((1.0, 1e-5, 0.0, 10, [Mechanism(1.0)]), "epsilon 4.37"), ((1.0, 1e-5, 0.1, 10, [Mechanism(0.0)]), "epsilon inf"),
    ((1e-9, 1e-9, 1.0, 100), "epsilon 100")])
def test_the_impossible_is_refused(arguments, refused):
    """Catches: a number from nowhere, a search without end, an error that does not say what is wrong."""
    option, value = refused.split(" ")
    with raises_at(value, option=option or None):
        noise_multiplier(*arguments)


def test_what_is_no_mechanism_is_refused():
    """Catches: rates above 1, negative noise and nan, which would go through to the end."""
    for values in ((-1.0, 0.1, 1), (math.nan, 0.1, 1), (math.inf, 0.1, 1), (1.0, 1.5, 1), (1.0, math.nan, 1),
                   (1.0, 1.0, -1)):
        with pytest.raises(InputError):
            Mechanism(*values)
    for delta in (0.0, 1.0, -1.0, 1e-13, math.nan):
        for account in (epsilon_of, epsilon_rdp):
            with pytest.raises(InputError):
                account([Mechanism(1.0)], delta)
