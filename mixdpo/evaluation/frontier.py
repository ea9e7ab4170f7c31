"""Own reward of methods at equal KL: from the rows of own reward (served.py) to a table and a sentence.

A method is a set of runs that differ in seed and beta only; their training files may be in different folders, but have
one name. Its points are its runs at each beta, as they were trained and at smaller KL (strength.py), means over seeds.
Methods serve users in one of these ways:

    one policy     K = 1: everybody gets the same policy                        (users: "all users")
    mixture        every user is served under the user's weights ("known users") or, without users, under those of a
                   trained gate ("unknown users")
    fixed weights  without users: the weights are constant, or given by the domain or at random
    known types    one policy for each type, told which user is of which type   ("type X"): the ceiling, if no type
                   lacks one
    in context     the reference, with a few of the user's choices in the prompt
    soup           the mean of a mixture's experts, for everybody

The baseline is one policy: the frontier of all such methods together. A soup is none of them: it is made from a
mixture, and has a row of its own. Methods are compared at the largest KL that the mixture and the baseline both reach.
That is mostly where the baseline ends, and methods that go farther have a point there.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixdpo.evaluation.own_reward import compare_frontiers, hull
from mixdpo.evaluation.statistics import NONE, evidence, mean_se, pm
from mixdpo.gates import TRAINED

FREE = ("seed", "beta", "out", "data", "data_folder", "micro", "save_minutes", "keep")      # not part of a method
KNOWN = "one policy per known type"
SERVES = ("one policy", "mixture", "fixed weights", "known types", "in context", "soup")


@dataclass(frozen=True)
class Point:
    """One policy of a method, or one for each type: by prompt, means over seeds and types."""

    beta: float
    target: float | str | None  # nats that the strengths were chosen for, or served.BASELINE; None: as it was trained
    kl: np.ndarray              # (S,N) nats, of each seed
    gain: np.ndarray            # (S,N) own reward minus the reference's
    types: dict                 # type -> mean gain
    length: float
    seeds: tuple[int, ...]      # (S,)


@dataclass(frozen=True)
class Method:
    """A method and its points."""

    name: str
    serves: str                 # one of SERVES
    points: list[Point]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """KL and gain of all points by seed and prompt: (P,S,N) each; seeds that a point lacks are left out of all. If
        none is left, each point has its first ones."""
        first, *others = [p.seeds for p in self.points]
        common = [seed for seed in first if all(seed in seeds for seeds in others)]
        fewest = min(map(len, (first, *others)))
        rows = [[p.seeds.index(seed) for seed in common] or [*range(fewest)] for p in self.points]
        kl, gain = ([getattr(p, what)[own] for p, own in zip(self.points, rows)] for what in ("kl", "gain"))
        return np.stack(kl), np.stack(gain)

    def line(self) -> tuple[np.ndarray, np.ndarray]:
        """The corners of the frontier: KL and gain."""
        kl, gain = (array.mean((1, 2)) for array in self.arrays())
        return hull(kl, gain)

    @property
    def full(self) -> Point:
        """The method as it was trained, with the beta of the first run."""
        return next(p for p in self.points if p.target is None)


def methods(results: dict) -> list[Method]:
    """The methods of an evaluation, in the order of SERVES and then of the runs; [] without own rewards."""
    groups: dict[tuple, list[dict]] = {}
    for row in results.get("own_reward", []):
        config = row["config"]
        serves = {"all users": "one policy", "known users": "mixture", "in context": "in context"}.get(row["users"], "")
        serves = "known types" if row["users"].startswith("type ") else serves
        serves = "soup" if row["run"].endswith("-soup") else serves
        if row["users"] == "unknown users" and config["latent"] == "pair":      # has no weights of users
            serves = "mixture" if config["gate"] in TRAINED else "fixed weights"
        if serves:
            options = tuple((name, str(value)) for name, value in sorted(config.items()) if name not in FREE)
            data = "" if serves == "known types" else unnumbered(Path(config["data"]).name)
            groups.setdefault((serves, options, data), []).append(row)
    found = [Method(name_of(rows, serves), serves, points_of(rows)) for (serves, *_), rows in groups.items()]
    return sorted(filter(lambda method: method.points, found), key=lambda method: SERVES.index(method.serves))


def unnumbered(name: str) -> str:
    """A name without seed and beta."""
    return re.sub(r"-(seed|beta)[0-9.e-]+", "", name)


def name_of(rows: list[dict], serves: str) -> str:
    """The name of the method's first run, without seed and beta."""
    return unnumbered(rows[0]["run"]) if serves != "known types" else KNOWN


def points_of(rows: list[dict]) -> list[Point]:
    """A point for each beta and target. Several types of one seed, each from its own run, are averaged. A target that
    one of these runs does not reach is no point: the mean of the others would be that of other seeds or types. For the
    same reason a seed that lacks a type is left out of a point."""
    kinds = {kind for row in rows for kind in row["types"]}
    found: dict[tuple, dict[int, list[dict]]] = {}
    for row in rows:
        config = row["config"]
        found.setdefault((config["beta"], row["target"]), {}).setdefault(config["seed"], []).append(row)
    for key, of in found.items():
        found[key] = {seed: own for seed, own in of.items() if {kind for row in own for kind in row["types"]} == kinds}
    points = []
    for (beta, target), of in found.items():
        if not of or sum(map(len, of.values())) < sum(map(len, found[beta, None].values())):
            continue
        kl, gain = (np.array([np.mean([row[what] for row in rows], axis=0) for rows in of.values()])
                    for what in ("kl_by_prompt", "gain_by_prompt"))
        each = [row for rows in of.values() for row in rows]
        types = {kind: float(np.mean([row["types"][kind]["mean"] for row in each if kind in row["types"]]))
                 for kind in dict.fromkeys(kind for row in each for kind in row["types"])}
        points.append(Point(beta, target, kl, gain, types, float(np.mean([row["length"] for row in each])), (*of,)))
    return points


def main_methods(found: list[Method]) -> tuple[Method | None, Method | None, Method | None]:
    """The mixture that the result is about, the baseline, and the ceiling; None where there is none. The mixture is
    the first one in the order of SERVES and of the runs; the baseline has the points of all methods of one policy; the
    ceiling has a policy for each type of the others."""
    def first(serves: str) -> Method | None:
        return next((m for m in found if m.serves == serves), None)

    single = [m for m in found if m.serves == "one policy"]
    baseline = Method(single[0].name, "one policy", [p for m in single for p in m.points]) if single else None
    mixture, ceiling = first("mixture") or first("fixed weights"), first("known types")
    of_all = ceiling and all(m.full.types.keys() == ceiling.full.types.keys() for m in (mixture, baseline) if m)
    return mixture, baseline, ceiling if of_all else None


def common_kl(*found: Method) -> float:
    """The largest KL that all these methods reach. Beyond it nothing is compared: there a frontier is not measured."""
    return min(float(m.arrays()[0].mean((1, 2)).max()) for m in found)


def compare(ours: Method, theirs: Method, kl: float | None = None) -> dict:
    """compare_frontiers of two methods, at the largest KL that both reach or at a smaller one."""
    largest = common_kl(ours, theirs)
    return compare_frontiers(ours.arrays(), theirs.arrays(), largest if kl is None else min(kl, largest))


def own_reward_sentence(results: dict) -> str:
    """The result in one sentence; "" unless there is a mixture and a baseline."""
    mixture, baseline, ceiling = main_methods(methods(results))
    if mixture is None or baseline is None:
        return ""
    found = compare(mixture, baseline)
    gap = found["difference"]
    name = "the mixture" if mixture.name == "mixture" else mixture.name
    text = (f"Each user's own reward rises by {found['ours']:.3f} with {name} and by {found['theirs']:.3f} with "
            f"one policy for all ({baseline.name}) at the same KL of {found['kl']:.1f} nats: the difference is "
            f"{pm(gap, sign='+')}, {evidence(gap)}")
    if math.isfinite(found["ratio"]) and gap["mean"] > 2 * gap["se"]:
        text += f". The mixture reaches {baseline.name}'s gain at {found['ratio']:.2f} of its KL"
    if ceiling is not None:
        best = compare(mixture, ceiling, found["kl"])                       # at a smaller KL, if it reaches no larger
        text += f". One policy per known type gains {best['theirs']:.3f} at {best['kl']:.1f} nats"
        text += f"; the mixture has {best['ours'] / best['theirs']:.0%} of that" if best["theirs"] > 0 else ""
    return text + "."


def own_reward_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: each method as it was trained, and its difference to the baseline at equal KL."""
    found = methods(results)
    mixture, baseline, _ = main_methods(found)
    if not found:
        return [], []
    kinds = list(dict.fromkeys(kind for m in found for kind in m.full.types))
    head = ["method", "own reward,\ngain", *(f"gain of\n{kind}" for kind in kinds), "KL\n(nats)", "length\n(tokens)",
            "at equal KL,\nminus baseline", "at KL\n(nats)"]
    rows = []
    for m in found:
        p, cells = m.full, [NONE, NONE]
        if baseline is not None and m.serves != "one policy" and p.types.keys() == baseline.points[0].types.keys():
            c = compare(m, baseline)
            cells = [pm(c["difference"], sign="+"), f"{c['kl']:.1f}"]
        rows.append([m.name, pm(mean_se(p.gain.mean(0)), sign="+"),
                     *(f"{p.types[kind]:+.3f}" if kind in p.types else NONE for kind in kinds),
                     f"{p.kl.mean():.1f}", f"{p.length:.1f}", *cells])
    return head, rows
