"""Can these comparisons identify K types of users? A count of equations and unknowns, before training:
`python -m mixdpo.evaluation.identifiability prefs.jsonl --model smollm2`.

The tabular problem: each type has a reward for every response, and all these rewards are independent. An edge e is a
pair of responses that were compared. Comparisons determine these probabilities:

    one comparison           p_e = sum_k w_k sigma(h_ke)                   for each edge e
    two of the same user     p_ef = sum_k w_k sigma(h_ke) sigma(h_kf)      for each two edges e, f that one user judged

    a ranking of m responses                the probabilities of its m! orders, m! - 1 of which are free; if the order
                                            within a group is not known (the rest, or equal ones), of fewer outcomes

If the edges connect n responses into c components, the unknowns are K (n - c) rewards, since rewards are determined up
to a constant in each component, and K - 1 weights. K types are identifiable only if

    K (n - c) + K - 1 <= edges + pairs of edges with a common user          (a full ranking is m! - 1 edges)

If each user judges once, K = 2 needs 5 responses to a prompt, all compared, and K = 3 needs 7. With two comparisons per
user, 3 responses are enough. The condition is necessary, and sufficient at random rewards: test_identifiability.py
computes the rank of the map's derivative. It assumes the probabilities are known, which takes many comparisons. A
language model has fewer degrees of freedom than a table, which helps; but types that it finds where the count allows
only one come from the model and not from the data. Two exactly opposed types of equal weight cannot be identified from
single comparisons: every p_e is then 1/2.

Left out: the information in three or more comparisons of a user, so the count may be too low but not too high.
"""

import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations_with_replacement

from mixdpo.config import InputError, command, parse
from mixdpo.preferences import Pair, read_preferences

MOST = 300  # comparisons of one user whose pairs are counted; 300 comparisons have 45,000 pairs


@dataclass(frozen=True)
class Counts:
    """What a file of comparisons holds."""

    comparisons: int
    edges: int                  # different pairs, or ranked sets, of responses
    frequencies: int            # that one comparison of each edge has: 1 of a pair, m! - 1 of a full ranking of m
    prompts: int
    shared: int                 # responses that are in several edges
    both_ways: int              # edges that were judged in more than one order
    unknowns: int               # n - c: rewards of one type
    judged_together: int        # pairs of edges with a common user
    users: list[int]            # comparisons of each user; [] if users are unknown
    informative: int            # comparisons that share a user or a response with another one, and rankings

    def supports(self, users: bool) -> int:
        """The largest K that the count allows, with one type per user or, if users is false, one per pair."""
        numbers = self.frequencies + (self.judged_together if users else 0)
        return max(1, (numbers + 1) // (self.unknowns + 1))


def counts_of(pairs: list[Pair]) -> Counts:
    """The counts of these comparisons. Responses are equal if their token ids and those of their prompts are equal."""
    Response = tuple[tuple[int, ...], tuple[int, ...]]                      # ids of prompt and response
    edges: dict[tuple[Response, ...], int] = {}
    parent: dict[Response, Response] = {}
    judged: defaultdict[str | None, list[int]] = defaultdict(list)
    edge_of, chosen, free = [], defaultdict(set), Counter[int]()

    def root(node):
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for pair in pairs:
        ends = sorted((tuple(pair.prompt), tuple(side)) for side in pair.responses)
        edge = edges.setdefault(tuple(ends), len(edges))
        for end in ends[1:]:
            parent[root(ends[0])] = root(end)
        edge_of.append(edge)
        free[edge] = max(free[edge], free_outcomes(pair.order))
        chosen[edge].add((tuple(map(tuple, pair.responses)), pair.order))
        if pair.user is not None:
            judged[pair.user].append(edge)
    of_response = Counter(end for ends in edges for end in ends)            # edges of each
    linked = {edge for ends, edge in edges.items() if max(of_response[end] for end in ends) > 1}
    return Counts(
        comparisons=len(pairs), edges=len(edges), frequencies=sum(free.values()),
        prompts=len({ends[0][0] for ends in edges}),
        shared=sum(n > 1 for n in of_response.values()), both_ways=sum(len(sides) > 1 for sides in chosen.values()),
        unknowns=len(of_response) - len({root(end) for end in of_response}),
        judged_together=len({two for own in judged.values() for two in twos([e for e in own if free[e]])}),
        users=sorted(map(len, judged.values())),
        informative=sum(len(judged.get(p.user, ())) > 1 or edge in linked or free_outcomes(p.order) >= len(p.order)
                        for p, edge in zip(pairs, edge_of)))


def free_outcomes(order: tuple[int, ...]) -> int:
    """The probabilities that choices of this form determine: m! orders, in which groups with one place are not ordered;
    one probability follows from the others. order: place of each response."""
    return math.factorial(len(order)) // math.prod(map(math.factorial, Counter(order).values())) - 1


def twos(own: list[int]):
    """Pairs of one user's edges. An edge is paired with itself if the user judged it twice."""
    times = Counter(own[:MOST])
    for e, f in combinations_with_replacement(sorted(times), 2):
        if e != f or times[e] > 1:
            yield e, f


def describe_counts(counts: Counts, experts: int, latent: str) -> list[str]:
    """The counts and a verdict in words, a line each, for `experts` types and --latent pair or user."""
    c, known = counts, bool(counts.users)
    lines = [f"{c.comparisons} comparisons of {c.edges} different pairs of responses to {c.prompts} prompts; "
             f"{c.shared} responses are in more than one of these pairs"]
    if known:
        lines.append(f"{len(c.users)} users, comparisons of each: {c.users[0]} to {c.users[-1]}, median "
                     f"{statistics.median(c.users):g}; users with only one: {sum(n == 1 for n in c.users)}")
    lines.append(f"pairs of responses that were judged both ways: {c.both_ways}")
    lines.append(f"{c.informative} of {c.comparisons} comparisons carry information about types: they share a user or "
                 "a response with another comparison, or rank more than two responses")
    alone, pooled = c.supports(users=False), c.supports(users=True)
    why = f"a count of equations: {c.frequencies} frequencies for {c.unknowns} rewards per type"
    verdict = f"with one type per pair, at most K = {alone} types can be identified ({why})"
    if known:
        most = "; at most one type per user" if pooled > len(c.users) else ""
        verdict += (f"; with one type per user at most K = {min(pooled, len(c.users))} ({c.judged_together} more "
                    f"frequencies, of two pairs of one user{most})")
    supported, remedy = min(pooled, len(c.users)) if known and latent == "user" else alone, "use fewer experts"
    if experts <= supported:
        return [*lines, verdict]
    if latent == "pair" and known and pooled > alone:
        remedy += ", or --latent user, which pools each user's comparisons"
    elif not known:
        remedy += ", or add users to the data, or several comparisons of the same responses"
    return [*lines, verdict, f"warning: --experts {experts} is more than these data support, so they do not determine "
                             f"how the experts differ; {remedy}"]


@dataclass(frozen=True)
class IdentifiabilityConfig:
    """Counts whether comparisons can identify several types of users."""

    data: str                   # preferences, as train.py --data; its flag may be omitted
    columns: str = ""           # which columns are which fields, as train.py --columns
    model: str = "smollm2"      # the model whose tokenizer is used, as train.py --model
    experts: int = 2            # number of types K
    latent: str = "user"        # user: one type per user; pair: one type per pair
    max_prompt: int = 256       # tokens of a prompt, as for train.py
    max_response: int = 256     # tokens of a response, as for train.py
    drop: bool = False          # skip faulty lines and list them
    data_folder: str = ""       # folder of local files that is searched before anything is downloaded


def describe_data(pairs: list[Pair], config) -> list[str]:
    """What a run's pairs can tell of its K experts; nothing for one expert. config: a TrainConfig."""
    if config.experts == 1:
        return []
    by_user = config.latent == "user" or config.gate.endswith("user")       # either way a user's pairs count together
    return describe_counts(counts_of(pairs), config.experts, "user" if by_user else "pair")


def main(argv: list[str]) -> None:
    """The command: prints the counts and the verdict."""
    from mixdpo.text.tokenizer import load_tokenizer  # here, because only this command needs it

    flags = argv if argv and argv[0].startswith("-") else ["--data", *argv]
    config = parse(IdentifiabilityConfig, flags, "python -m mixdpo.evaluation.identifiability FILE")
    if config.experts < 1:
        raise InputError(f"got {config.experts}, wanted at least 1", option="experts")
    if config.latent not in ("pair", "user"):
        raise InputError(f"got {config.latent!r}, wanted pair or user", option="latent")
    tokenizer = load_tokenizer(config.model, config.data_folder or None)
    pairs = read_preferences(config.data, tokenizer, config.max_prompt, config.max_response, config.drop,
                             columns=config.columns)
    print("\n".join(describe_counts(counts_of(pairs), config.experts, config.latent)))


if __name__ == "__main__":
    command(main)
