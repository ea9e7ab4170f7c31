"""Pairs: from scored continuations to comparisons judged by simulated people.

A type of annotator (sentiment, ...) stands for many users. A user judges pairs of continuations of one prompt, and prefers the one that
its type scores higher: no noise is added, a margin keeps coin flips out. Which two of a prompt's n continuations a user sees:

    gap_a(i, j) = (score_a(i) - score_a(j)) / spread_a      spread_a: standard deviation of a's scores within a prompt, pooled over prompts
    clear for a                                             |gap_a| >= margin
    agreeing pair of a user of type a                       clear for every annotator, and all prefer the same continuation
    conflicting pair of a user of type a                    clear for a and for another annotator, who prefers the other continuation

A user walks through the prompts in an order of its own and takes at most one pair of each, until it has its agreeing and its conflicting
pairs (`agree` is the agreeing share: both kinds are needed, conflicts to tell types apart, agreement to identify them from single pairs).
Of several such pairs of a prompt it sees the one whose smallest |gap| among the annotators involved is largest. Ties cannot occur: a pair that is not
clear for its judge is never shown. Should the prompts run out, any pair that is clear for the judge fills the place, and is counted.
"""

import itertools
import math
from collections import Counter

import numpy as np

from mixdpo.config import InputError


def name_users(count: int, annotators: list[str], seed: int) -> dict[str, str]:
    """user-0001 ... -> type. Types are as even as can be, and shuffled: a name says nothing about its type."""
    types = [annotators[i % len(annotators)] for i in range(count)]
    order = np.random.default_rng([seed, 10]).permutation(count)
    return {f"user-{n + 1:04d}": types[order[n]] for n in range(count)}


def spreads(scores: list[dict[str, list[float]]], annotators: list[str]) -> dict[str, float]:
    """Standard deviation of each annotator's scores within a prompt, pooled over prompts. scores: one {name: [n]} a prompt."""
    pooled = {a: math.sqrt(np.mean([np.var(s[a], ddof=1) for s in scores if len(s[a]) > 1])) for a in annotators}
    if flat := [a for a in annotators if not pooled[a] > 0]:
        raise InputError(f"annotator {flat[0]} gives all continuations of a prompt the same score: it cannot prefer any")
    return pooled


def kinds(scores: dict[str, list[float]], judge: str, spread: dict[str, float], margin: float) -> dict[str, list[tuple]]:
    """{"agree": [...], "conflict": [...], "other": [...]} of one prompt: (clearness, chosen, rejected), the clearest first.

    Only pairs that are clear for the judge. clearness: the smallest |gap| among the annotators that make it what it is.
    """
    found = {"agree": [], "conflict": [], "other": []}
    for i, j in itertools.permutations(range(len(scores[judge])), 2):
        gap = {a: (scores[a][i] - scores[a][j]) / spread[a] for a in spread}
        if not gap[judge] > 0 or gap[judge] < margin:
            continue
        against = [-g for g in gap.values() if g < 0 and -g >= margin]
        if min(gap.values()) > 0 and min(gap.values()) >= margin:
            found["agree"].append((min(gap.values()), i, j))
        elif against:
            found["conflict"].append((min(gap[judge], max(against)), i, j))
        else:
            found["other"].append((gap[judge], i, j))
    return {kind: sorted(pairs, reverse=True) for kind, pairs in found.items()}


def judge_pairs(scores: list[dict], users: dict[str, str], each: int, agree: float, margin: float, spread: dict, seed: int) -> list[dict]:
    """`each` pairs for every user: {"user", "annotator", "kind", "prompt": index, "chosen": index, "rejected": index}.

    Raises: InputError if a user's prompts do not hold that many pairs which are clear for it.
    """
    out = []
    table = {judge: [kinds(s, judge, spread, margin) for s in scores] for judge in set(users.values())}
    for u, (user, judge) in enumerate(users.items()):
        order = np.random.default_rng([seed, 11, u]).permutation(len(scores)).tolist()
        wanted = Counter(agree=round(agree * each))
        wanted["conflict"] = each - wanted["agree"]
        taken = {}                                                          # prompt -> (kind, chosen, rejected)
        for p in order:
            offered = [kind for kind in wanted if wanted[kind] and table[judge][p][kind]]
            if offered:
                kind = max(offered, key=lambda k: wanted[k])                # the one it lacks most
                wanted[kind] -= 1
                taken[p] = (kind, *table[judge][p][kind][0][1:])
        for p in order:                                                     # the prompts ran out
            rest = [pair for kind in table[judge][p] for pair in table[judge][p][kind][:1]]
            if len(taken) < each and p not in taken and rest:
                taken[p] = ("filled", *rest[0][1:])
        if len(taken) < each:
            raise InputError(f"{user} ({judge}) finds {len(taken)} pairs on {len(scores)} prompts, wanted {each}: "
                             f"more prompts, more continuations of each, or a margin under {margin} would do")
        out += [{"user": user, "annotator": judge, "kind": kind, "prompt": p, "chosen": i, "rejected": j} for p, (kind, i, j) in taken.items()]
    return [out[i] for i in np.random.default_rng([seed, 12]).permutation(len(out))]
