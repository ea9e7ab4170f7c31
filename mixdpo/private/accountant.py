"""The accountant: the privacy budget (epsilon, delta) that noisy releases have spent together.

A mechanism adds Gaussian noise to a sum. In every step each example independently takes part in the sum with
probability q (Poisson sampling; q = 1: all take part). Neighbours differ in one example, added or removed. The unit is
the most by which one example can move the sum. Then the worst case is one-dimensional (a dominating pair):

    with the example   P = (1 - q) N(0, sigma^2) + q N(1, sigma^2)
    without it         Q = N(0, sigma^2)
    privacy loss       L = log P(x)/Q(x) = log(1 - q + q exp((2x - 1) / (2 sigma^2)));  the losses of steps add up
    removal            delta(epsilon) = E max(0, 1 - exp(epsilon - L)),  x from P
    addition           the same with -L, x from Q;  the larger of the two deltas counts

There are two accountants; both give upper bounds.

    rdp, epsilon_rdp        Renyi divergences D_a = log E_Q (P/Q)^a / (a - 1) add up over steps. Some percent too large:
                            epsilon = min_a  D_a + log((a - 1)/a) - (log delta + log a) / (a - 1)
                            Removal has the larger divergence (Mironov, Talwar & Zhang 2019, arXiv 1908.10530). The
                            conversion is from Balle et al. 2020, arXiv 1905.09982, and Canonne, Kamath & Steinke
                            2020, arXiv 2004.00010.
    delta_of, epsilon_of    the distribution of L on a grid, composed by FFT. Relative error of epsilon about 1e-7
                            (larger for sigma below 0.04, for more than 10^5 steps, or for delta below 1e-7: 4e-6 at
                            1e-9 and 3e-4 at 1e-11, because of CHARGE).
                            The mass of a grid cell moves to the two ends of the cell, so that its probabilities under P
                            and under Q stay the same. For one step, delta is exact at grid points and too large
                            between them ("connect the dots").
                            Losses beyond the grid count as infinite. The FFT's error is added to delta as CHARGE: from
                            wrapping around (Chernoff's bound) and from rounding (measured).

Koskela et al. 2020, arXiv 1906.03049, and Gopi et al. 2021, arXiv 2106.02848 (FFT); Doroshenko et al. 2022, arXiv
2207.04380 (connect the dots); Zhu, Dong & Wang 2022, arXiv 2106.08567 (dominating pairs compose, also if a step
depends on earlier steps); Lebeda et al. 2024, arXiv 2405.20769 (addition may be worse for many steps even if removal is
worse for one).
Left out: other noise, batches of fixed size, shuffling, neighbours that replace an example, delta below 1e-12.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from mixdpo.config import InputError

ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
CHARGE = 1e-13          # added to delta, plus 2e-16 per step: 1e-15 of it for wrapping around, the rest for rounding
REACH = 9.0             # standard deviations of the noise that the grid covers; a step's mass beyond is 1e-19
EXACT, SEARCH = 1e-7, 1e-5          # relative error of epsilon from the grid: of returned values, during a search
LEAST, MOST = 2.0**-10, 2.0**20     # range of noise multipliers in the search


@dataclass(frozen=True)
class Mechanism:
    """Gaussian noise on a sum over examples drawn at random, `steps` times. Raises: InputError."""

    sigma: float            # standard deviation of the noise, in units of the most by which one example moves the sum
    rate: float = 1.0       # probability that an example takes part in a step
    steps: int = 1

    def __post_init__(self):
        if not (0 <= self.sigma < math.inf and 0 <= self.rate <= 1 and self.steps >= 0):
            raise InputError(f"got {self}, wanted a finite sigma of 0 or more, a rate from 0 to 1, steps of 0 or more")


def require_delta(delta: float) -> None:
    """Raises: InputError unless the accountant can handle this delta."""
    if not 10 * CHARGE <= delta < 1:
        raise InputError(f"got {delta}, wanted {10 * CHARGE:g} or more and less than 1", option="delta")


def loss_at(x: np.ndarray, sigma: float, rate: float) -> np.ndarray:
    """L in nats of outputs x. It increases with x and is above log(1 - rate)."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-rate), math.log(rate) + (x - 0.5) / sigma**2)


# --- Renyi divergences ------------------------------------------------------------------------------------------------


def rdp(mechanism: Mechanism, orders=ORDERS) -> np.ndarray:
    """Renyi divergences of all steps together in nats: orders (A,), real numbers above 1 -> (A,).

    E_Q (P/Q)^a by the trapezoidal rule in log space; for a function this smooth the rule is exact up to rounding."""
    sigma, rate, orders = mechanism.sigma, mechanism.rate, np.asarray(orders, dtype=float)
    if not (rate and mechanism.steps):
        return np.zeros_like(orders)
    if sigma == 0:
        return np.full_like(orders, np.inf)
    dx = sigma / 8
    x = np.arange(-10 * sigma, orders.max() + 10 * sigma, dx)               # most of (P/Q)^a Q is between 0 and a
    log_q = -0.5 * (x / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi) / dx)
    loss = loss_at(x, sigma, rate)

    def divergence(a: float) -> float:
        terms = log_q + a * loss
        return max(0.0, terms.max() + math.log(np.exp(terms - terms.max()).sum())) / (a - 1)

    return mechanism.steps * np.array([divergence(a) for a in orders.tolist()])


def epsilon_rdp(mechanisms, delta: float, orders=ORDERS) -> float:
    """Epsilon of all mechanisms together, by Renyi divergences. Raises: InputError on delta."""
    require_delta(delta)
    a = np.asarray(orders, dtype=float)
    total = sum((rdp(m, orders) for m in mechanisms), np.zeros_like(a))     # (A,)
    if not total.any():
        return 0.0
    return max(0.0, float(np.min(total + np.log((a - 1) / a) - (math.log(delta) + np.log(a)) / (a - 1))))


# --- distributions of the privacy loss --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """A distribution of privacy losses on a grid: h (first + i) nats with probability p_i, otherwise infinite."""

    h: float                # width of a cell, nats
    first: int              # index of the first grid point
    p: np.ndarray           # (m,)
    infinite: float         # probability of an infinite loss

    def tail(self, epsilon: float) -> tuple[float, float]:
        """Sums of p and of p exp(epsilon - l) over losses l >= epsilon. Their difference is delta's finite part."""
        start = int(np.clip(np.ceil(epsilon / self.h) - self.first, 0, len(self.p)))
        p, l = self.p[start:], self.h * np.arange(self.first + start, self.first + len(self.p))
        return float(p.sum()), float(p @ np.exp(epsilon - l))

    def delta(self, epsilon: float) -> float:
        """Delta at this epsilon."""
        above, discounted = self.tail(epsilon)
        return min(1.0, above - discounted + self.infinite)

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon, 0 or more, whose delta is at most this delta."""
        if self.delta(0.0) <= delta:
            return 0.0
        if self.infinite >= delta:
            return math.inf
        low, high = 0, self.first + len(self.p)                             # delta(h low) > delta >= delta(h high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.delta(self.h * middle) <= delta else (middle, high)
        above, discounted = self.tail(self.h * (low + 0.5))                 # all epsilon of a cell have the same terms
        return self.h * (low + 0.5) + math.log((above + self.infinite - delta) / discounted)


def normal_masses(z: np.ndarray) -> np.ndarray:
    """Probabilities of a standard normal below z_0, between adjacent z, above the last z: (m,) increasing -> (m+1,).
    Computed as differences of the smaller tail, so that small probabilities keep their precision."""
    z = np.concatenate([[-np.inf], z, [np.inf]])
    tail = 0.5 * np.array(list(map(math.erfc, (np.abs(z) / math.sqrt(2)).tolist())))
    left, right = tail[:-1], tail[1:]
    return np.where(z[1:] <= 0, right - left, np.where(z[:-1] >= 0, left - right, 1 - left - right))


def connect(mass: np.ndarray, other: np.ndarray, first: int, h: float) -> Losses:
    """Moves probabilities (m+1,) below, between and above m grid points to these points ("connect the dots").

    In each cell, `up` goes to the upper end and `down` to the lower end, with up + down = mass and
    exp(-upper) up + exp(-lower) down = other, the cell's probability under the other distribution."""
    inner, lower = mass[1:-1], h * np.arange(first, first + len(mass) - 2)
    with np.errstate(divide="ignore"):
        scaled = np.exp(np.log(np.where(other > 1e-290, other, 0.0)[1:-1]) + lower)     # if it underflows: all up
    up = np.clip((inner - scaled) / -math.expm1(-h), 0.0, inner)
    p = np.concatenate([mass[:1], up])
    p[:-1] += inner - up
    return Losses(h, first, p, float(mass[-1]))


def one_step(sigma: float, rate: float, h: float) -> tuple[Losses, Losses]:
    """Privacy losses of one step, for removal and for addition."""
    low, high = loss_at(np.array([-REACH * sigma, 1 + REACH * sigma]), sigma, rate)
    first, last = math.floor(low / h), math.ceil(high / h)
    points = h * np.arange(first, last + 1)                                 # (m,)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = sigma**2 * (points + np.log(-np.expm1(np.log1p(-rate) - points)) - math.log(rate)) + 0.5    # L(x) = points
    x = np.where(np.isnan(x), -np.inf, x)                                   # every loss is above log(1 - rate)
    without = normal_masses(x / sigma)                                      # (m+1,)
    having = (1 - rate) * without + rate * normal_masses((x - 1) / sigma)   # (m+1,)
    return connect(having, without, first, h), connect(without[::-1], having[::-1], -last, h)


def grid(steps: Counter, accuracy: float) -> float:
    """The cell width h. steps: (sigma, rate) -> number of steps.

    Connecting dots adds about h^2 / 6 to the variance of a step's loss. h is chosen so that this is the fraction
    `accuracy` of the total variance; but at accuracy 1e-7 there are at most about 10^6 cells for a step, and 5 10^6
    for all steps."""
    variance = span = 0.0
    for (sigma, rate), n in steps.items():
        x = np.linspace(-REACH * sigma, 1 + REACH * sigma, 4001)
        loss, w = loss_at(x, sigma, rate), np.exp(-0.5 * (x / sigma) ** 2)
        w /= w.sum()
        variance += n * float(w @ (loss - w @ loss) ** 2)
        span = max(span, float(loss[-1] - loss[0]))
    return math.sqrt(accuracy) * max(math.sqrt(variance) * max(math.sqrt(6 / steps.total()), 0.012), 0.003 * span)


def farthest(losses: list[Losses], counts: list[int], sign: int) -> int:
    """A grid point that the sum of all steps' losses exceeds (sign -1) or stays below (sign 1), except with probability
    1e-15. By Chernoff's bound: min over some t of (log 1e15 + sum of log E exp(t loss)) / t."""
    points = [sign * l.h * np.arange(l.first, l.first + len(l.p)) for l in losses]
    ends = [x.max() for x in points]
    variance = sum(n * (l.p @ (x - l.p @ x) ** 2) for l, n, x in zip(losses, counts, points))
    best = sum(n * end for n, end in zip(counts, ends))
    by_variance = math.sqrt(2 * math.log(1e15) / variance) * 4.0 ** np.arange(-4, 2)
    by_largest = 2.0 ** np.arange(8) / max(ends)                            # where losses are rare and large
    for t in (*by_variance, *by_largest):
        moments = sum(n * (t * end + math.log(l.p @ np.exp(t * (x - end)) + 1e-300))
                      for l, n, x, end in zip(losses, counts, points, ends))
        best = min(best, (math.log(1e15) + moments) / t)
    return sign * math.ceil(best / losses[0].h)


def compose(losses: list[Losses], counts: list[int]) -> Losses:
    """Losses of all steps together: the product of powers of the Fourier transforms. counts: steps of each."""
    first, last = (farthest(losses, counts, sign) for sign in (-1, 1))
    size = 2 ** math.ceil(math.log2(last - first + 2))
    transform: complex | np.ndarray = 1.0
    for l, n in zip(losses, counts):
        place = np.arange(l.first, l.first + len(l.p)) % size
        transform = transform * np.fft.rfft(np.bincount(place, l.p, size)) ** n
    p = np.roll(np.fft.irfft(transform, size), -first)
    return Losses(losses[0].h, first, p, CHARGE + sum(n * (2e-16 + l.infinite) for l, n in zip(losses, counts)))


def both_ways(mechanisms, accuracy: float) -> list[Losses]:
    """Losses of all mechanisms together, for removal and for addition. accuracy: see `grid`."""
    steps: Counter[tuple[float, float]] = Counter()                         # (sigma, rate) -> steps
    for m in mechanisms:
        steps[m.sigma, m.rate] += m.steps if m.rate else 0
    steps = +steps
    if not steps:
        return [Losses(1.0, 0, np.ones(1), 0.0)] * 2
    if any(sigma == 0 for sigma, _ in steps):
        return [Losses(1.0, 0, np.zeros(1), 1.0)] * 2
    h = grid(steps, accuracy)
    return [compose(list(way), list(steps.values())) for way in zip(*(one_step(*key, h) for key in steps))]


def delta_of(mechanisms, epsilon: float) -> float:
    """Delta of all mechanisms together at any epsilon, also a negative one; 1 without noise."""
    return max(way.delta(epsilon) for way in both_ways(mechanisms, EXACT))


def epsilon_of(mechanisms, delta: float) -> float:
    """Epsilon, 0 or more, of all mechanisms together at this delta; inf without noise. Raises: InputError on delta."""
    require_delta(delta)
    return max(way.epsilon(delta) for way in both_ways(mechanisms, EXACT))


def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int, others=()) -> float:
    """Smallest sigma with which `steps` steps at `rate`, together with the mechanisms `others`, have at most `epsilon`.

    epsilon_of never exceeds epsilon; it is below by a fraction of at most 1e-3 (mostly 1e-5). 0 if nothing is released
    or epsilon is inf; otherwise at least 2^-10. (That minimum is the result where delta exceeds the probability that an
    example is drawn at all: then any noise suffices.)
    Raises: InputError if no sigma suffices."""
    others = list(others)
    if not epsilon > 0:
        raise InputError(f"got {epsilon}, wanted more than 0", option="epsilon")
    Mechanism(0.0, rate, steps)                                             # or InputError
    spent = epsilon_of(others, delta)
    if epsilon == math.inf or (spent <= epsilon and not (rate and steps)):
        return 0.0

    def enough(sigma: float, accuracy: float) -> bool:
        return max(w.delta(epsilon) for w in both_ways([*others, Mechanism(sigma, rate, steps)], accuracy)) <= delta

    if not enough(MOST, SEARCH):
        raise InputError(f"got {epsilon} at delta {delta}; other releases spend {spent:.6g}, and the rest is too "
                         f"little for {steps} steps: raise it, or add more noise to the other releases",
                         option="epsilon")
    low, high = LEAST, MOST
    for accuracy in (100 * SEARCH, SEARCH):                                 # most of the search is on a coarse grid
        while low > LEAST and enough(low, accuracy):
            low = max(LEAST, low / 1.01)
        while high > low * (1 + accuracy):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(middle, accuracy) else (middle, high)
        low = max(LEAST, high / 1.01)
    while epsilon_of([*others, Mechanism(high, rate, steps)], delta) > epsilon:
        high *= 1 + SEARCH
    return high
