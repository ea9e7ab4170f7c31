"""Oracles for the mixture's mathematics: plain loops over Python floats, in probability space.

Nothing here is shared with mixdpo: no torch, no log-sum-exp, no broadcasting. Where the package adds logarithms, this
file multiplies probabilities; where it normalises by logsumexp, this file divides by a sum. It is slow, holds for
moderate margins only, and is easy to check by eye. Arrays are nested lists or numpy arrays of floats: h (B, K) margins,
w (K,) or (B, K) weights as probabilities, q (B, K) responsibilities.
"""

import itertools
import math

import numpy as np


def sigma(a):
    """The logistic function, from its definition."""
    return 1.0 / (1.0 + math.exp(-a))


def row(w, b):
    """Weights of pair b: fixed weights (K,) serve every pair, a gate (B, K) has its own."""
    return w[b] if np.ndim(w) == 2 else w


def marginal(w, h):
    """M5: p(y+ > y- | x) of every pair, a list of B probabilities."""
    return [sum(row(w, b)[k] * sigma(h[b][k]) for k in range(len(h[b]))) for b in range(len(h))]


def posterior(w, h):
    """M7 as Bayes wrote it: q[b][k] = w_k sigma(h_k) / p."""
    p = marginal(w, h)
    return [[row(w, b)[k] * sigma(h[b][k]) / p[b] for k in range(len(h[b]))] for b in range(len(h))]


def user_posterior(w, h, group):
    """M11: one latent per user. Returns (p (G,), q (G, K)): the weight enters once, each of the user's pairs multiplies
    in."""
    p, q = [], []
    for g in range(max(group) + 1):
        members = [b for b in range(len(h)) if group[b] == g]
        joint = [float(row(w, members[0])[k]) for k in range(len(h[0]))]
        for k in range(len(joint)):
            for b in members:
                joint[k] *= sigma(h[b][k])
        p.append(sum(joint))
        q.append([j / sum(joint) for j in joint])
    return p, q


def kl(p, q):
    """KL(p || q) of two finite distributions; a term with p = 0 is 0."""
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def elbo(q, w, h):
    """M6, pair by pair; a term with q = 0 is 0."""
    return [sum(q[b][k] * math.log(row(w, b)[k] * sigma(h[b][k]) / q[b][k]) for k in range(len(h[b])) if q[b][k] > 0)
            for b in range(len(h))]


def numeric_gradient(function, at, step=1e-5):
    """Central differences of a scalar function of a numpy array: the gradient that no autograd has touched."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def adjusted_rand(a, b):
    """Adjusted Rand index from its definition over all pairs of units (Hubert and Arabie 1985)."""
    both = first = second = total = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        both += (a[i] == a[j]) and (b[i] == b[j])
        first += a[i] == a[j]
        second += b[i] == b[j]
        total += 1
    expected = first * second / total
    return (both - expected) / ((first + second) / 2 - expected)


def best_matching(found, truth, experts):
    """Share of units rightly assigned under the best relabelling of the experts."""
    orders = itertools.permutations(range(experts))
    return max(np.mean([order[f] == t for f, t in zip(found, truth)]) for order in orders)
