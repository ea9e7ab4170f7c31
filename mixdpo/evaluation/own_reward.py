"""Own reward: what each user gets from the policy that this user is served.

A mixture serves different policies to different users, so the mean reward of one policy does not describe it. For a
user u of type a with weights q_u over the experts,

    own reward      sum_k q_uk r_a(y_k)                      y_k: expert k's completion of the prompt         (M13)
    KL              sum_k q_uk log sum_j q_uj pi_j(y_k) / pi_ref(y_k)                                         (M1, M14)

each a mean over users and prompts. One policy for all (DPO) is the case K = 1. Standard errors cluster by prompt, and
by user too where weights differ between users of a type.

Methods are compared at equal KL, because more KL buys more reward with any method. The frontier of one seed is the
upper concave hull of its points (KL, gain in own reward) and of the reference (0, 0): a point between two policies is
served by choosing one of them at random for each completion, whose KL is at most the mean of the two (KL is convex).
A method's frontier is the mean of its seeds' at equal KL.
The standard error of a difference between frontiers is a bootstrap over prompts and seeds: all points are computed
again on each resample, since their completions share prompts and random numbers. Of S seeds S - 1 are drawn, because
the mean of S drawn ones would vary too little, by the factor (S - 1) / S (Rao and Wu 1988).
"""

from dataclasses import dataclass

import numpy as np
import torch

from mixdpo.evaluation.statistics import clustered_se, grid_se

RESAMPLES = 1000
AT_ONCE = 64        # users whose numbers are in memory together


@dataclass(frozen=True)
class Served:
    """Policies as they are served to some users, on N prompts. Means over users of each type, with equal weight of all
    types."""

    reward: torch.Tensor        # (T,N) of each type's users, on each prompt
    kl: torch.Tensor            # (N,) nats, mean over users
    q: torch.Tensor             # (N,K) weights of the experts, mean over users
    se: float                   # of the mean reward
    by_type: list[dict]         # T figures: mean and standard error of each type's own reward

    @property
    def figure(self) -> dict:
        """Own reward: mean, standard error, number of prompts."""
        return {"mean": float(self.reward.mean()), "se": self.se, "n": self.reward.shape[1]}


def serve(values: torch.Tensor, log_ratio: torch.Tensor, log_q: torch.Tensor, kind: torch.Tensor,
          base: torch.Tensor | None = None) -> Served:
    """Serves every user the mixture under the user's weights.

    values (K,N,T): reward of expert k's completion of prompt n for type t; log_ratio (K,N,K): log pi_j - log pi_ref of
    expert k's completion under expert j, nats; log_q (U,K): weights of each user, or (U,N,K) if they depend on the
    prompt; kind (U,): the user's type; base (N,T): rewards that are subtracted, for a gain.
    """
    values = values.double() if base is None else values.double() - base.double()
    N, T = values.shape[1:]
    log_q, users = log_q[:, None] if log_q.ndim == 2 else log_q, kind.bincount(minlength=T)         # (U,1 or N,K)
    assert users.all(), f"got types without users: {users.tolist()}"
    weight = 1 / (T * users.double()[kind])                                 # (U,) sums to 1
    own, kl, mean_q = [], torch.zeros(N, dtype=torch.float64), torch.zeros(N, values.shape[0], dtype=torch.float64)
    for some in range(0, len(kind), AT_ONCE):                               # (u,N,K,K) numbers at once, not (U,N,K,K)
        u = slice(some, some + AT_ONCE)
        q = log_q[u].double().exp().expand(-1, N, -1)                       # (u,N,K)
        own.append(torch.einsum("unk,knu->un", q, values[..., kind[u]]))
        mixed = torch.logsumexp(log_q[u, None].double() + log_ratio.double(), dim=-1)       # (u,K,N) of y_k  M14
        kl += torch.einsum("u,unk,ukn->n", weight[u], q, mixed.masked_fill(q.mT == 0, 0.0))
        mean_q += torch.einsum("u,unk->nk", weight[u], q)
    all_own = torch.cat(own)                                                # (U,N)
    reward = torch.stack([all_own[kind == t].mean(0) for t in range(T)])    # (T,N)
    residual = all_own - reward.mean(1)[kind, None]                         # (U,N)
    by_type = [{"mean": float(row.mean()), "se": se_of_mean(residual[kind == t], T * weight[kind == t], 1), "n": N}
               for t, row in enumerate(reward)]
    return Served(reward, kl, mean_q, se_of_mean(residual, weight, T), by_type)


def se_of_mean(residual: torch.Tensor, weight: torch.Tensor, types: int) -> float:
    """Standard error of the weighted mean over users and prompts, clustered by both: residuals (U,N) from the mean of
    the user's type, weights of users (U,). One user of each type stands for all of them, and is no cluster."""
    influence = weight[:, None] / residual.shape[1] * residual
    return grid_se(influence, types) if len(weight) > types else clustered_se(influence.sum(0))


# --- comparisons at equal KL ------------------------------------------------------------------------------------------


def hull(kl: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper concave hull of points (P,) and (0, 0), from KL 0 on: its corners' KL and gain, both ascending."""
    order = np.lexsort((-gain, kl))
    points = [(0.0, 0.0)]
    for x, y in zip(kl[order], gain[order]):
        if y <= points[-1][1] or x < 0:
            continue                                                        # more KL for no more reward
        while len(points) > 1 and cross(points[-2], points[-1], (x, y)) >= 0:
            points.pop()
        if x <= points[-1][0]:
            points[-1] = (points[-1][0], y)
        else:
            points.append((x, y))
    corners = np.array(points)
    return corners[:, 0], corners[:, 1]


def cross(a: tuple, b: tuple, c: tuple) -> float:
    """Positive if b lies below the line from a to c."""
    return (c[1] - a[1]) * (b[0] - a[0]) - (b[1] - a[1]) * (c[0] - a[0])


def frontier_of(points: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The corners of a method's frontier, KL and gain, both ascending. points: KL and gain (P,) of each seed. Beyond
    its last corner a seed's frontier stays level."""
    lines = [hull(*own) for own in points]
    kl = np.unique(np.concatenate([x for x, _ in lines]))
    return kl, np.mean([np.interp(kl, *line) for line in lines], axis=0)


def compare_frontiers(ours: list[tuple[np.ndarray, np.ndarray]], theirs: list[tuple[np.ndarray, np.ndarray]], kl: float,
                      seed: int = 0) -> dict:
    """Our frontier minus theirs at this KL, with its standard error, and the ratio of the KL at which each reaches
    their gain; NaN if ours does not, or if theirs gains nothing. ours, theirs: KL and gain by point and prompt, (P,N)
    each, of each seed, on the same prompts in the same order. A resample draws prompts, the same for both, and seeds.
    """
    def figures(index, *seeds) -> tuple[float, float, float]:
        a, b = (frontier_of([tuple(x[:, index].mean(1) for x in side[s]) for s in own])
                for side, own in zip((ours, theirs), seeds))
        mine, others = (float(np.interp(kl, *line)) for line in (a, b))
        reached, needed = (float(np.interp(others, *line[::-1])) for line in (a, b))
        return mine, others, reached / needed if needed > 0 and others <= a[1][-1] else float("nan")

    def drawn(S: int) -> np.ndarray:
        return rng.integers(S, size=max(S - 1, 1))

    N, S, T, rng = ours[0][0].shape[1], len(ours), len(theirs), np.random.default_rng([seed, 17])
    mine, others, ratio = figures(np.arange(N), range(S), range(T))
    resampled = np.array([figures(rng.integers(N, size=N), drawn(S), drawn(T)) for _ in range(RESAMPLES)])
    return {"kl": kl, "ours": mine, "theirs": others, "ratio": ratio,
            "difference": {"mean": mine - others, "se": float((resampled[:, 0] - resampled[:, 1]).std(ddof=1)), "n": N}}
