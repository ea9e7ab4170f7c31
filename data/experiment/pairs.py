"""Pairs: from scored continuations to comparisons judged by simulated users.

An annotator (sentiment, ...) is a type of user; many users have the same type. A user judges pairs of continuations of
one prompt and prefers the continuation with the higher score of the user's type. Choices have no noise: a margin
removes close pairs.

    gap_a(i, j)      (score_a(i) - score_a(j)) / spread_a
    spread_a         standard deviation of a's scores within a prompt, pooled over the train prompts
    clear for a      |gap_a| >= margin, and not 0
    agreeing         clear for every annotator, and all prefer the same continuation
    conflicting      clear for the judge and for another annotator, who prefers the other continuation

A user visits the prompts in a random order and takes at most one pair of each, until the wanted numbers of agreeing and
conflicting pairs are reached; without a wanted share of agreeing pairs, a pair of any kind will do. Both kinds are
needed: conflicts distinguish types; agreement makes types identifiable from single comparisons (with two exactly
opposed types each comparison is at one half). If a prompt has several pairs of the wanted kind, the user takes the pair
that fewest earlier users have seen, so that the data hold many different pairs; among equals the clearest (largest
minimum of |gap| over the annotators that define the kind). If the prompts run out, any pair that is clear for the judge
is taken, and counted as "filled".
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from mixdpo.config import InputError
from mixdpo.evaluation.statistics import bayes_posterior


@dataclass(frozen=True)
class Rules:
    """How pairs are chosen."""

    agree: float | None         # wanted share of agreeing pairs; None: pairs of any kind
    margin: float               # smallest gap, in spreads
    spread: dict[str, float]    # annotator -> spread of its scores


def name_users(count: int, annotators: list[str], seed: int) -> dict[str, str]:
    """user-0001 ... -> type. Types are as even as possible, and shuffled, so that names do not reveal types."""
    types = [annotators[i % len(annotators)] for i in range(count)]
    order = np.random.default_rng([seed, 10]).permutation(count)
    return {f"user-{n + 1:04d}": types[order[n]] for n in range(count)}


def spreads(scores: list[dict[str, list[float]]], annotators: list[str]) -> dict[str, float]:
    """spread_a of each annotator. scores: one {name: [n]} for each prompt. Raises: InputError if no prompt has two
    continuations, or if a spread is 0."""
    several = [s for s in scores if len(s[annotators[0]]) > 1]
    if not several:
        raise InputError(f"none of {len(scores)} prompts has two continuations to compare; choose a preset with more "
                         "continuations", option="preset")
    pooled = {a: math.sqrt(np.mean([np.var(s[a], ddof=1) for s in several])) for a in annotators}
    if flat := [a for a in annotators if pooled[a] == 0]:
        raise InputError(f"annotator {flat[0]} gives all continuations of a prompt the same score, so it prefers none; "
                         "choose a preset with more continuations or other annotators", option="preset")
    return pooled


def kinds(scores: dict[str, list[float]], judge: str, spread: dict, margin: float) -> dict[str, list[tuple]]:
    """The pairs of a prompt that are clear for the judge: kind -> [(clearness, chosen, rejected)], clearest first.

    Kinds: agree, conflict, other. clearness: the smallest |gap| among the annotators that define the kind.
    """
    found = {"agree": [], "conflict": [], "other": []}
    for i, j in itertools.permutations(range(len(scores[judge])), 2):
        gap = {a: (scores[a][i] - scores[a][j]) / spread[a] for a in spread}
        if gap[judge] <= 0 or gap[judge] < margin:
            continue                                                        # not clear, or counted as (j, i)
        least = min(gap.values())
        if least > 0 and least >= margin:
            found["agree"].append((least, i, j))
        elif least < 0 and -least >= margin:
            found["conflict"].append((min(gap[judge], -least), i, j))
        else:
            found["other"].append((gap[judge], i, j))
    return {kind: sorted(pairs, reverse=True) for kind, pairs in found.items()}


def judge_pairs(scores: list[dict], users: dict[str, str], each: int, rules: Rules, seed: int) -> list[dict]:
    """`each` pairs for every user, in random order: {"user", "annotator", "kind", "prompt", "chosen", "rejected"}.

    The last three are indices. Raises: InputError if the prompts have too few pairs that are clear for a user.
    """
    out, seen = [], Counter()                                               # (prompt, the two responses) -> users
    table = {judge: [kinds(s, judge, rules.spread, rules.margin) for s in scores] for judge in set(users.values())}

    def fresh(p: int, pairs: list[tuple]) -> tuple[int, int]:
        """(chosen, rejected) of the pair that was seen least, the clearest among equals; counts it as seen."""
        _, _, i, j = min((seen[p, frozenset(pair[1:])], -pair[0], *pair[1:]) for pair in pairs)
        seen[p, frozenset((i, j))] += 1
        return i, j

    for u, (user, judge) in enumerate(users.items()):
        order = np.random.default_rng([seed, 11, u]).permutation(len(scores)).tolist()
        agree = 0 if rules.agree is None else round(rules.agree * each)
        wanted = Counter() if rules.agree is None else Counter(agree=agree, conflict=each - agree)
        taken = {}                                                          # prompt -> (kind, chosen, rejected)
        for p in order:
            if len(taken) == each:
                break
            offered = [kind for kind in wanted if wanted[kind] and table[judge][p][kind]]
            if offered:
                kind = max(offered, key=lambda k: wanted[k])                # the kind that lacks most pairs
                wanted[kind] -= 1
                taken[p] = (kind, *fresh(p, table[judge][p][kind]))
        for p in order if len(taken) < each else ():                        # no prompts left, or any kind will do
            rest = [pair for kind in table[judge][p].values() for pair in kind]
            if rest and p not in taken and len(taken) < each:
                taken[p] = ("filled" if wanted else "any", *fresh(p, rest))
        if len(taken) < each:
            raise InputError(f"{user} ({judge}) finds {len(taken)} pairs on {len(scores)} prompts; wanted {each}; "
                             f"choose a preset with more prompts or continuations, or a margin below {rules.margin}",
                             option="preset")
        out += [{"user": user, "annotator": judge, "kind": kind, "prompt": p, "chosen": i, "rejected": j}
                for p, (kind, i, j) in taken.items()]
    return [out[i] for i in np.random.default_rng([seed, 12]).permutation(len(out))]


def judge_with_context(scores: list[dict], users: dict[str, str], each: int, context: int, rules: Rules,
                       seed: int) -> list[dict]:
    """judge_pairs with {"context": bool} added: `context` of each user's `each` pairs are for the E-step alone.

    Context pairs of all users are on the same first prompts (a share context / each), and no other pair is. Users share
    texts: if each user had other context prompts, they would be other users' training prompts, which experts memorise.
    """
    if not context:
        return judge_pairs(scores, users, each, rules, seed)
    cut, out = round(len(scores) * context / each), []
    shares = (scores[:cut], 0, context, seed + 2), (scores[cut:], cut, each - context, seed)
    for part, first, count, own_seed in shares:
        judged = judge_pairs(part, users, count, rules, own_seed)
        out += [pair | {"prompt": pair["prompt"] + first, "context": first == 0} for pair in judged]
    return out


# ---- lines and counts


def pair_line(row: dict, pair: dict) -> dict:
    """One line of a preference file. row: {"prompt", "responses", "scores": {name: [n]}}; pair: one of judge_pairs."""
    i, j = pair["chosen"], pair["rejected"]
    line = {"prompt": row["prompt"], "chosen": row["responses"][i], "rejected": row["responses"][j]}
    line |= {name: pair[name] for name in ("user", "annotator", "context") if name in pair}
    line |= {"domain": row["domain"]} if "domain" in row else {}
    return line | {"scores": {name: [column[i], column[j]] for name, column in row["scores"].items()}}


def pair_facts(rows: list[dict], judged: list[dict], types: list[str], spread: dict) -> dict:
    """Counts, mean gaps, share of pairs on which all types agree (judged pairs, all pairs), Bayes-optimal
    assignment."""
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
