"""Can these comparisons tell K types of judges apart? A count, before anything is trained:
`python -m mixdpo.evaluation.identifiability prefs.jsonl --model smollm2`.

The tabular problem: each type has a reward for every response, unrelated to all others. What comparisons can show are

    of single ones      p_e = sum_k w_k sigma(h_ke)                        one number an edge e: two responses, compared
    of one user's two   p_ef = sum_k w_k sigma(h_ke) sigma(h_kf)           one number for edges e, f that a user judged

and what is unknown are K (n - c) rewards and K - 1 weights, for n responses that the edges join to c components (a
reward is free up to a constant in each). K can be identified only if there are no fewer numbers than unknowns:

    K (n - c) + K - 1 <= edges + pairs of edges with a common judge

So K = 2 takes 5 responses to a prompt, all compared, if each user judges once, K = 3 takes 7; with two comparisons a
user 3 responses are enough. Necessary, and at random rewards sufficient (test_identifiability.py takes the rank
of the map's derivative), but for chance: numbers are known only as well as many comparisons make them. A model is less
free than a table, which helps; what it finds where the count says 1 comes from the model, not from the data. And two
exactly opposed types of equal weight make every p_e one half, whatever the count.

Left out: what three or more comparisons of a user add, so the count is cautious.
"""

import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations_with_replacement

from mixdpo.config import InputError, command, parse
from mixdpo.preferences import Pair, read_preferences

MOST = 300  # comparisons of one user whose pairs are counted: there are 45,000 by then


@dataclass(frozen=True)
class Counts:
    """What a file of comparisons holds."""

    comparisons: int
    edges: int                  # different pairs of responses
    prompts: int
    shared: int                 # responses that stand in several edges
    both_ways: int              # edges of which either response was chosen by somebody
    unknowns: int               # n - c: rewards of one type
    judged_together: int        # pairs of edges with a common judge
    users: list[int]            # comparisons of each; [] where users are not known
    telling: int                # comparisons that have something beside them: a user's other ones, or a shared response

    def supports(self, users: bool) -> int:
        """The largest K that the count allows, with one latent a user or one a pair."""
        numbers = self.edges + (self.judged_together if users else 0)
        return max(1, (numbers + 1) // (self.unknowns + 1))


def counts_of(pairs: list[Pair]) -> Counts:
    """The counts of these comparisons. Responses are the same if their prompts' and their own ids are."""
    edges, edge_of, chosen, judged, parent = {}, [], defaultdict(set), defaultdict(list), {}

    def root(node):
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for pair in pairs:
        ends = sorted((tuple(pair.prompt), tuple(side)) for side in (pair.chosen, pair.rejected))
        edge = edges.setdefault(tuple(ends), len(edges))
        parent[root(ends[0])] = root(ends[1])
        edge_of.append(edge)
        chosen[edge].add(tuple(pair.chosen))
        if pair.user is not None:
            judged[pair.user].append(edge)
    of_response = Counter(end for ends in edges for end in ends)            # edges of each
    beside = {edge for ends, edge in edges.items() if max(of_response[end] for end in ends) > 1}
    return Counts(
        comparisons=len(pairs), edges=len(edges), prompts=len({prompt for (prompt, _), _ in edges}),
        shared=sum(n > 1 for n in of_response.values()), both_ways=sum(len(sides) > 1 for sides in chosen.values()),
        unknowns=len(of_response) - len({root(end) for end in of_response}),
        judged_together=len({two for own in judged.values() for two in twos(own)}),
        users=sorted(map(len, judged.values())),
        telling=sum(len(judged.get(p.user, ())) > 1 or edge in beside for p, edge in zip(pairs, edge_of)))


def twos(own: list[int]):
    """Pairs of one user's edges; of an edge with itself only if it was judged twice."""
    times = Counter(own[:MOST])
    for e, f in combinations_with_replacement(sorted(times), 2):
        if e != f or times[e] > 1:
            yield e, f


def describe_counts(counts: Counts, experts: int, latent: str) -> list[str]:
    """The counts and a verdict in plain words, for a mixture of `experts` with one type a pair or one a user."""
    c, known = counts, bool(counts.users)
    lines = [f"{c.comparisons} comparisons of {c.edges} different pairs of responses to {c.prompts} prompts; "
             f"{c.shared} responses stand in more than one of these pairs"]
    if known:
        lines.append(f"{len(c.users)} users with {c.users[0]} to {c.users[-1]} comparisons each, half of them with "
                     f"{statistics.median(c.users):g} or more; {sum(n == 1 for n in c.users)} with one alone")
    lines.append(f"{c.both_ways} pairs were judged both ways, so judges do differ there" if c.both_ways else
                 "no pair was judged both ways: no two judgements here contradict each other")
    lines.append(f"{c.telling} of {c.comparisons} comparisons can say anything of who judged: they share a user or a "
                 "response with another one")
    alone, pooled = c.supports(users=False), c.supports(users=True)
    why = f"{c.edges} frequencies against {c.unknowns} rewards a type"
    verdict = f"one type a pair: these data support K = {alone} ({why})"
    if known:
        most = ", and no more types than users" if pooled > len(c.users) else ""
        verdict += (f"; one type a user: K = {min(pooled, len(c.users))} ({c.judged_together} frequencies more, of two "
                    f"pairs with a common judge{most})")
    supported = min(pooled, len(c.users)) if known and latent == "user" else alone
    if experts > supported:
        verdict += f". --experts {experts} is more than that: what the experts divide is then the model's choice"
        if latent == "pair" and known and pooled > alone:
            verdict += "; --latent user would let each user's comparisons speak together"
        elif not known:
            verdict += "; users' names, or several comparisons of the same responses, would tell"
    return [*lines, verdict]


@dataclass(frozen=True)
class IdentifiabilityConfig:
    """Whether comparisons can tell types of judges apart, by a count."""

    data: str                   # preference file (.jsonl, .jsonl.gz); its flag may be left out
    model: str = "smollm2"      # whose tokenizer: gpt2, smollm2, llama-3.2-1b or a directory
    experts: int = 2            # K that is asked for
    latent: str = "user"        # one type a pair, or one a user
    max_prompt: int = 256       # tokens, as for train.py
    max_response: int = 256     # tokens, as for train.py
    drop: bool = False          # leave faulty lines out, and list them
    data_folder: str = ""       # local files looked into before anything is fetched


def describe_data(pairs: list[Pair], config) -> list[str]:
    """What a run's pairs can tell of its K experts; nothing for one expert. config: a TrainConfig."""
    if config.experts == 1:
        return []
    by_user = config.latent == "user" or config.gate.endswith("user")       # either way a user's pairs count together
    return describe_counts(counts_of(pairs), config.experts, "user" if by_user else "pair")


def main(argv: list[str]) -> None:
    from mixdpo.text.tokenizer import load_tokenizer  # here, since only this command needs one by name

    flags = argv if argv and argv[0].startswith("-") else ["--data", *argv]
    config = parse(IdentifiabilityConfig, flags, "python -m mixdpo.evaluation.identifiability FILE")
    if config.experts < 1:
        raise InputError(f"got {config.experts}; wanted at least 1", option="experts")
    if config.latent not in ("pair", "user"):
        raise InputError(f"got {config.latent!r}; wanted pair or user", option="latent")
    tokenizer = load_tokenizer(config.model, config.data_folder or None)
    pairs = read_preferences(config.data, tokenizer, config.max_prompt, config.max_response, config.drop)
    print("\n".join(describe_counts(counts_of(pairs), config.experts, config.latent)))


if __name__ == "__main__":
    command(main)
