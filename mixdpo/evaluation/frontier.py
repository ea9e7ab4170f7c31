"""Own reward of methods at equal KL: from the rows of own reward (served.py) to a table and a sentence.

A method is a set of runs that differ in seed and beta only; their training files may be in different folders, but have
one name. Its points are its runs of each seed at each beta, as they were trained and at smaller KL (strength.py).
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
mixture, and has a row of its own. Methods are compared at the largest KL that all seeds of the mixture and of the
baseline reach. That is mostly where the baseline ends, and methods that go farther have a point there.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mixdpo.evaluation.own_reward import compare_frontiers, frontier_of
from mixdpo.evaluation.statistics import NONE, evidence, mean_se, pm
from mixdpo.gates import TRAINED

FREE = ("seed", "beta", "out", "data", "data_folder", "micro", "save_minutes", "keep")      # not part of a method
KNOWN = "one policy per known type"
SERVES = ("one policy", "mixture", "fixed weights", "known types", "in context", "soup")


@dataclass(frozen=True)
class Point:
    """One policy of a method, or one for each type, of one seed: by prompt, means over types."""

    run: str                    # without seed and beta
    beta: float
    target: float | str | None  # nats that the strengths were chosen for, or served.BASELINE; None: as it was trained
    seed: int
    kl: np.ndarray              # (N,) nats
    gain: np.ndarray            # (N,) own reward minus the reference's
    types: dict                 # type -> mean gain
    length: float


@dataclass(frozen=True)
class Method:
    """A method and its points."""

    name: str
    serves: str                 # one of SERVES
    points: list[Point]

    def seeds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """KL and gain of the points of each seed, by prompt: (P,N) each. A seed that lacks a beta is left out, unless
        every seed lacks one."""
        trained: dict[int, set] = {}
        for p in self.points:
            trained.setdefault(p.seed, set()).add((p.run, p.beta))
        all_of_them = set().union(*trained.values())
        used = [seed for seed, own in trained.items() if own == all_of_them] or [*trained]
        own = [[p for p in self.points if p.seed == seed] for seed in used]
        return [(np.stack([p.kl for p in points]), np.stack([p.gain for p in points])) for points in own]

    def line(self) -> tuple[np.ndarray, np.ndarray]:
        """The corners of the frontier: KL and gain, up to the largest KL that all seeds reach."""
        kl, gain = frontier_of([(x.mean(1), y.mean(1)) for x, y in self.seeds()])
        end = common_kl(self)
        return np.append(kl[kl < end], end), np.append(gain[kl < end], np.interp(end, kl, gain))

    @property
    def full(self) -> Point:
        """The method as it was trained, with the beta of the first run: means over seeds."""
        first = next(p for p in self.points if p.target is None)
        of = [p for p in self.points if (p.run, p.beta, p.target) == (first.run, first.beta, None)]
        types = {kind: float(np.mean([p.types[kind] for p in of])) for kind in first.types}
        return replace(first, kl=np.mean([p.kl for p in of], 0), gain=np.mean([p.gain for p in of], 0), types=types,
                       length=float(np.mean([p.length for p in of])))


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
    """A point for each beta, target and seed. Several types of one seed, each from its own run, are averaged. If one of
    these runs does not reach a target, or if a type has no run, there is no point: the mean of the others would be that
    of other types."""
    kinds = {kind for row in rows for kind in row["types"]}
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["config"]["beta"], row["target"], row["config"]["seed"]), []).append(row)
    points = []
    for (beta, target, seed), own in found.items():
        if {kind for row in own for kind in row["types"]} != kinds or len(own) < len(found[beta, None, seed]):
            continue
        kl, gain = (np.mean([row[what] for row in own], axis=0) for what in ("kl_by_prompt", "gain_by_prompt"))
        types = {kind: float(np.mean([row["types"][kind]["mean"] for row in own if kind in row["types"]]))
                 for kind in dict.fromkeys(kind for row in own for kind in row["types"])}
        points.append(Point(unnumbered(rows[0]["run"]), beta, target, seed, kl, gain, types,
                            float(np.mean([row["length"] for row in own]))))
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
    """The largest KL that all seeds of these methods reach. Beyond it nothing is compared: there a frontier is not
    measured."""
    return min(float(kl.mean(1).max()) for m in found for kl, _ in m.seeds())


def compare(ours: Method, theirs: Method, kl: float | None = None) -> dict:
    """compare_frontiers of two methods, at the largest KL that both reach or at a smaller one."""
    largest = common_kl(ours, theirs)
    return compare_frontiers(ours.seeds(), theirs.seeds(), largest if kl is None else min(kl, largest))


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
        rows.append([m.name, pm(mean_se(p.gain), sign="+"),
                     *(f"{p.types[kind]:+.3f}" if kind in p.types else NONE for kind in kinds),
                     f"{p.kl.mean():.1f}", f"{p.length:.1f}", *cells])
    return head, rows
