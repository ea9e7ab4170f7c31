"""Pairs: from scored continuations to comparisons judged by simulated people.

A type of annotator (sentiment, ...) stands for many users. A user judges pairs of continuations of one prompt and
prefers the one that its type scores higher. There is no noise, and no coin: a margin keeps close calls away.

    gap_a(i, j)      (score_a(i) - score_a(j)) / spread_a
    spread_a         standard deviation of a's scores within a prompt, pooled over the train prompts
    clear for a      |gap_a| >= margin, and not 0
    agreeing         clear for every annotator, and all of them prefer the same continuation
    conflicting      clear for the judge and for another annotator, who prefers the other continuation

A user walks through the prompts in an order of its own and takes at most one pair of each, until it has its agreeing
and its conflicting ones. Both are needed: conflicts tell types apart, agreement is what makes types identifiable from
single comparisons (two exactly opposed types leave each comparison at one half). Of several pairs of the wanted kind
it sees the one that fewest users before it have seen, so that the data hold as many different pairs as they can; of
these the clearest, whose smallest |gap| among the annotators that make it of its kind is largest. Should the prompts
run out, any pair that is clear for the judge fills the place, and is counted.
"""

import itertools
import math
from collections import Counter

import numpy as np

from mixdpo.config import InputError
from mixdpo.metrics import bayes_posterior


def name_users(count: int, annotators: list[str], seed: int) -> dict[str, str]:
    """user-0001 ... -> type. Types are as even as can be, and shuffled: a name says nothing about its type."""
    types = [annotators[i % len(annotators)] for i in range(count)]
    order = np.random.default_rng([seed, 10]).permutation(count)
    return {f"user-{n + 1:04d}": types[order[n]] for n in range(count)}


def spreads(scores: list[dict[str, list[float]]], annotators: list[str]) -> dict[str, float]:
    """spread_a of each annotator. scores: one {name: [n]} a prompt."""
    several = [s for s in scores if len(s[annotators[0]]) > 1]
    if not several:
        raise InputError(f"none of {len(scores)} prompts has two continuations to compare; choose a preset that "
                         "samples more of each", option="preset")
    pooled = {a: math.sqrt(np.mean([np.var(s[a], ddof=1) for s in several])) for a in annotators}
    if flat := [a for a in annotators if pooled[a] == 0]:
        raise InputError(f"annotator {flat[0]} gives all continuations of a prompt the same score, so it prefers none; "
                         "choose a preset that samples more, or other annotators", option="preset")
    return pooled


def kinds(scores: dict[str, list[float]], judge: str, spread: dict, margin: float) -> dict[str, list[tuple]]:
    """A prompt's pairs that are clear for the judge: kind -> [(clearness, chosen, rejected)], the clearest first.

    Kinds: agree, conflict, other. clearness: the smallest |gap| among the annotators that make it of its kind.
    """
    found = {"agree": [], "conflict": [], "other": []}
    for i, j in itertools.permutations(range(len(scores[judge])), 2):
        gap = {a: (scores[a][i] - scores[a][j]) / spread[a] for a in spread}
        if gap[judge] <= 0 or gap[judge] < margin:
            continue                                                        # not clear, or (j, i)'s turn
        least = min(gap.values())
        if least > 0 and least >= margin:
            found["agree"].append((least, i, j))
        elif least < 0 and -least >= margin:
            found["conflict"].append((min(gap[judge], -least), i, j))
        else:
            found["other"].append((gap[judge], i, j))
    return {kind: sorted(pairs, reverse=True) for kind, pairs in found.items()}


def judge_pairs(scores: list[dict], users: dict[str, str], each: int, agree: float, margin: float, spread: dict,
                seed: int) -> list[dict]:
    """`each` pairs for every user, in random order: {"user", "annotator", "kind", "prompt", "chosen", "rejected"}.

    The last three are indices. Raises: InputError if the prompts do not hold that many pairs clear for a user.
    """
    out, seen = [], Counter()                                               # (prompt, the two responses) -> users
    table = {judge: [kinds(s, judge, spread, margin) for s in scores] for judge in set(users.values())}

    def fresh(p: int, pairs: list[tuple]) -> tuple[int, int]:
        """(chosen, rejected) of the least seen of a prompt's pairs, the clearest of several; it is seen once more."""
        _, _, i, j = min((seen[p, frozenset(pair[1:])], -pair[0], *pair[1:]) for pair in pairs)
        seen[p, frozenset((i, j))] += 1
        return i, j

    for u, (user, judge) in enumerate(users.items()):
        order = np.random.default_rng([seed, 11, u]).permutation(len(scores)).tolist()
        wanted = Counter(agree=round(agree * each))
        wanted["conflict"] = each - wanted["agree"]
        taken = {}                                                          # prompt -> (kind, chosen, rejected)
        for p in order:
            if len(taken) == each:
                break
            offered = [kind for kind in wanted if wanted[kind] and table[judge][p][kind]]
            if offered:
                kind = max(offered, key=lambda k: wanted[k])                # the one it lacks most
                wanted[kind] -= 1
                taken[p] = (kind, *fresh(p, table[judge][p][kind]))
        for p in order if len(taken) < each else ():                        # they ran out
            rest = [pair for kind in table[judge][p].values() for pair in kind]
            if rest and p not in taken and len(taken) < each:
                taken[p] = ("filled", *fresh(p, rest))
        if len(taken) < each:
            raise InputError(f"{user} ({judge}) finds {len(taken)} pairs on {len(scores)} prompts, wanted {each}; "
                             f"choose a preset of more prompts or continuations, or with a margin under {margin}",
                             option="preset")
        out += [{"user": user, "annotator": judge, "kind": kind, "prompt": p, "chosen": i, "rejected": j}
                for p, (kind, i, j) in taken.items()]
    return [out[i] for i in np.random.default_rng([seed, 12]).permutation(len(out))]


def judge_apart(scores: list[dict], users: dict[str, str], each: int, context: int, agree: float, margin: float,
                spread: dict, seed: int) -> list[dict]:
    """judge_pairs, `context` of each user's `each` pairs on prompts of their own: {"context": bool} is added.

    Users share texts. Were pairs set aside user by user, most of them would be somebody else's training pairs, and what
    experts say of these is memory. So the first prompts, their share that of the context pairs, are context for all.
    """
    if not context:
        return judge_pairs(scores, users, each, agree, margin, spread, seed)
    cut, out = round(len(scores) * context / each), []
    shares = (scores[:cut], 0, context, seed + 2), (scores[cut:], cut, each - context, seed)
    for part, first, count, own_seed in shares:
        judged = judge_pairs(part, users, count, agree, margin, spread, own_seed)
        out += [pair | {"prompt": pair["prompt"] + first, "context": first == 0} for pair in judged]
    return out


# ---- what is written down


def pair_line(row: dict, pair: dict) -> dict:
    """One line of a preference file. row: {"prompt", "responses", "scores": {name: [n]}}; pair: one of judge_pairs."""
    i, j = pair["chosen"], pair["rejected"]
    line = {"prompt": row["prompt"], "chosen": row["responses"][i], "rejected": row["responses"][j]}
    line |= {name: pair[name] for name in ("user", "annotator", "context") if name in pair}
    line |= {"domain": row["domain"]} if "domain" in row else {}
    return line | {"scores": {name: [column[i], column[j]] for name, column in row["scores"].items()}}


def pair_facts(rows: list[dict], judged: list[dict], types: list[str], spread: dict) -> dict:
    """Counts, mean gaps, how often all types agree (on judged pairs, on all pairs), and Bayes-optimal assignment."""
    scores = [pair_line(rows[pair["prompt"]], pair)["scores"] for pair in judged]
    gaps = [{a: (s[a][0] - s[a][1]) / spread[a] for a in types} for s in scores]
    own = {a: [gap[a] for gap, pair in zip(gaps, judged) if pair["annotator"] == a] for a in types}
    everything = [[row["scores"][a][i] > row["scores"][a][j] for a in types]
                  for row in rows for i, j in itertools.combinations(range(len(row["responses"])), 2)]
    users = {}
    for pair, s in zip(judged, scores):
        users.setdefault(pair["user"], []).append(s)
    return {
        "pairs": len(judged), "context": sum(pair.get("context", False) for pair in judged),
        "users": len(users), "kinds": Counter(pair["kind"] for pair in judged),
        "prompts_judged": len({pair["prompt"] for pair in judged}),
        "agreement": float(np.mean([len({g > 0 for g in gap.values()}) == 1 for gap in gaps])),
        "agreement_of_all_pairs": float(np.mean([len(set(prefers)) == 1 for prefers in everything])),
        "mean_gap_of_judge": {a: float(np.mean(values)) for a, values in own.items() if values},
        "bayes_assignment_of_pairs": bayes_posterior([[s] for s in scores], types).max(1).values.mean().item(),
        "bayes_assignment_of_users": bayes_posterior(list(users.values()), types).max(1).values.mean().item(),
    }
