"""Options chosen by what a file can show: train.py without --experts, or with --experts auto.

    users with several pairs?      one type per user, which pools a user's choices; context pairs, if every user has
                                   enough
    domains, but no users?         weights for each domain
    neither?                       one type per choice, if the choices can identify types at all (identifiability.py)
    how many types?                the smallest K whose log-likelihood of held-out users is less than the best one's by
                                   at most one standard error of the difference; 1 is DPO

K is chosen before training, with mixtures of linear rewards on the reference's frozen features (start.py): for each of
FOLDS folds of users (or of choices) they are fitted to the others. This takes seconds, and the features are cached for
the run. What a linear reward cannot see, this choice cannot see; --experts 2 overrides it. Options that are given on
the command line are kept. A private run (--epsilon) has the defaults: a choice from its data would not be private.
"""

import contextlib
import dataclasses
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixdpo import config as configs
from mixdpo.config import InputError, compute_dtype
from mixdpo.evaluation.identifiability import counts_of
from mixdpo.evaluation.statistics import mean_se
from mixdpo.linear import DEVIATIONS, LinearOptions, linear_mixture
from mixdpo.mixture import e_step
from mixdpo.preferences import Pair, groups, order_of, read_preferences
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.parallel import first_alone
from mixdpo.runs.reference import Source, load_references, reference_of
from mixdpo.runs.rules import validate
from mixdpo.runs.setup import input_keys
from mixdpo.start import pair_features

MOST = 4            # largest K that is tried
FOLDS = 5
FEWEST = 10         # users, or choices, that the choice of K needs
LARGEST = 4000      # choices that the choice of K looks at
DIRECTIONS = 64     # principal directions of the features that it looks at
CONTEXT = 0.2       # share of the pairs of the user with the fewest, for the E-step alone; at most 8


@dataclass(frozen=True)
class Tried:
    """Held-out log-likelihoods of one K."""

    experts: int
    by_unit: torch.Tensor       # (U,) nats a choice, of each unit under mixtures that were fitted without it


def parse(argv: list[str], program: str) -> TrainConfig:
    """The configuration that the command line asks for. Without --experts, or with --experts auto, options that it does
    not give are chosen from the data, and the choice is printed. Raises: InputError."""
    words = [word for flag in argv for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    asked = [words[n + 1] for n, word in enumerate(words[:-1]) if word == "--experts"]
    if asked and asked != ["auto"] or {"-h", "--help", "--help-all"} & {*argv}:
        return configs.parse(TrainConfig, argv, program)
    if asked:
        at = words.index("--experts")
        words = words[:at] + words[at + 2 :]
    given = {word.removeprefix("--").replace("-", "_") for word in words[::2]}
    config = configs.parse(TrainConfig, words, program)
    if config.epsilon < math.inf:                                           # the choice itself would not be private
        if asked:
            raise InputError("got auto with --epsilon: the choice would read the private data without noise; give a "
                             "number", option="experts")
        return config
    return choose(config, given)


def choose(config: TrainConfig, given: set[str]) -> TrainConfig:
    """`config` with options for its file; those in `given` stay as they are. Prints the plan. Raises: InputError."""
    validate(config)
    input_keys(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models, tokenizer = first_alone(lambda: load_references(config, device))
    pairs = read_preferences(config.data, tokenizer, config.max_prompt, config.max_response, config.drop,
                             report=lambda line: None, columns=config.columns)          # the run itself reports
    dtype = compute_dtype(config.dtype, device)[0]
    reference = reference_of(Source(config.data, pairs, config), models, tokenizer, dtype,
                             Path(config.out).parent / "cache")
    latent = config.latent if "latent" in given or config.gate != TrainConfig.gate else ""
    options, reasons = unit_options(pairs, latent)
    if latent:
        reasons["latent"] = f"{latent}: as --gate {config.gate} needs it"       # not shown if --latent is given
    most = MOST if options["latent"] == "user" or "gate" in options else min(MOST, counts_of(pairs).supports(False))
    units, priors = units_of(pairs, options)
    tried = try_experts(units, priors, reference.features, order_of(pairs), most, config.seed)
    K = fewest(tried)
    reasons["experts"] = describe(tried, len(units), options, most)
    chosen: dict[str, Any] = {"experts": K, "sharing": "lora", "targets": "all"}
    if K > 1:
        chosen |= {"shared_rank": 16, "start": "linear"} | options
    chosen = compatible(config, {name: value for name, value in chosen.items() if name not in given})
    print_plan(chosen, reasons, K, given)
    return dataclasses.replace(config, **chosen)


def compatible(config: TrainConfig, chosen: dict[str, Any]) -> dict[str, Any]:
    """As many of the chosen options as go with the options of `config`; all, if none of them is to blame."""
    names = [name for name in chosen if name != "experts"]
    for count in range(len(names) + 1):
        for left_out in itertools.combinations(names, count):
            kept = {name: value for name, value in chosen.items() if name not in left_out}
            with contextlib.suppress(InputError):
                validate(dataclasses.replace(config, **kept))
                return kept
    return chosen                                                           # the error is the run's to report


def unit_options(pairs: list[Pair], latent: str = "") -> tuple[dict, dict[str, str]]:
    """What shares one latent type, and which pairs the E-step reads: options of TrainConfig, and reasons by option.
    latent: of the command line; "": it is chosen."""
    each = Counter(pair.user for pair in pairs)
    if latent != "user" and (latent or None in each or len(each) < FEWEST or len(pairs) < 2 * len(each)):
        domains = Counter(pair.domain for pair in pairs)
        why = (f"{each[None]} of {len(pairs)} choices have no user" if None in each else
               f"{len(each)} users with {len(pairs) / len(each):.1f} choices each are too few to pool them")
        if len(domains) > 1 and None not in domains:
            return {"latent": "pair", "gate": "domain"}, {"latent": f"pair: {why}",
                                                          "gate": f"domain: the file has {len(domains)} domains"}
        return {"latent": "pair"}, {"latent": f"pair: {why}", "gate": "fixed: the file has no domains"}
    few, many = min(each.values()), max(each.values())
    options: dict[str, Any] = {"latent": "user", "em": "incremental"}
    size = f"{few}" if few == many else f"{few} to {many}"
    reasons = {"latent": f"user: {len(each)} users with {size} choices each",
               "gate": "fixed: a user's choices tell the user's type, so weights need not depend on the prompt"}
    fields: dict[str | None, list] = {}                                     # user -> the field `context` of its lines
    for pair in pairs:
        fields.setdefault(pair.user, []).append(pair.context)
    marked = [own for own in fields.values() if {*own} != {None}]           # plan.mark_context does not change these
    least = min((len(own) for own in fields.values() if {*own} == {None}), default=math.inf)
    if not all(any(own) and not all(own) for own in marked):
        reasons["estep"] = "all: by the file's field context, a user has no context pair, or no other"
    elif least >= 4:
        context = 0 if least == math.inf else min(8, round(CONTEXT * least))
        options |= {"estep": "context", "context": context}
        which = ["those that the file marks"] * bool(marked) + [
            f"{context} choices of each{' other' * bool(marked)} user"] * (context > 0)
        reasons["estep"] = (f"context: {' and '.join(which)} "
                            "tell types and are trained on last, because experts memorise what they are trained on")
    else:
        reasons["estep"] = f"all: a user with {few} choices has none to spare for the E-step alone"
    return options, reasons


def units_of(pairs: list[Pair], options: dict) -> tuple[list[list[int]], list[int]]:
    """Some units, with LARGEST choices at most, and for each the number of its domain, whose weights it has."""
    units = groups(pairs, options["latent"])
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(0)).tolist()
    taken: list[list[int]] = []
    count = 0
    for u in order:
        if count + len(units[u]) > LARGEST and taken:
            break
        taken.append(units[u])
        count += len(units[u])
    names = sorted({str(pair.domain) for pair in pairs})
    return taken, [names.index(str(pairs[unit[0]].domain)) if "gate" in options else 0 for unit in taken]


@torch.no_grad()
def try_experts(units: list[list[int]], priors: list[int], features: torch.Tensor, order: torch.Tensor, most: int,
                seed: int) -> list[Tried]:
    """Held-out log-likelihoods of 1 to `most` experts; of 1 alone if there are fewer than FEWEST units. priors: the
    domain of each unit; features (P,R,C), order (P,R): of all pairs of the file."""
    if len(units) < FEWEST or most == 1:
        return [Tried(1, torch.zeros(len(units)))]
    x, group, _ = pair_features(units, features, order)
    D = x.shape[1]
    x = x @ torch.linalg.svd(x, full_matrices=False)[2][:DIRECTIONS].T
    fold_of = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)) % FOLDS
    domain, found = torch.tensor(priors), []
    for K in range(1, most + 1):
        by_deviation = []
        for s in DEVIATIONS:
            by_unit = torch.empty(len(units))
            for fold in range(FOLDS):
                out = fold_of == fold
                by_unit[out] = of_fold(x, group, domain, out, K, LinearOptions(D / s**2, 3, 30, seed))
            by_deviation.append(by_unit)
        found.append(Tried(K, max(by_deviation, key=lambda values: float(values.mean()))))
    return found


def of_fold(x: torch.Tensor, group: torch.Tensor, domain: torch.Tensor, out: torch.Tensor, K: int,
            options: LinearOptions) -> torch.Tensor:
    """Log-likelihood of each unit of a fold, nats a choice: x (B,D), group (B,) in 0..U-1, domain (U,), out (U,) True
    in the fold."""
    def part(mask):
        rows = mask[group]
        return x[rows], (mask.cumsum(0) - 1)[group[rows]]

    (train_x, train_group), (held_x, held_group) = part(~out), part(out)
    even = torch.full((K,), -math.log(K))
    fit = linear_mixture(train_x, train_group, K, dataclasses.replace(options, starts=1 if K == 1 else options.starts),
                         even)
    log_w = even.expand(len(out), K).double()
    if int(domain.max()) > 0:                                               # a domain's weights: its mean posterior
        shares = torch.zeros(int(domain.max()) + 1, K).index_add(0, domain[~out], fit.log_q.exp()) + 1.0 / K
        log_w = (shares / shares.sum(1, keepdim=True)).log().double()[domain]
    log_p, _ = e_step(log_w[out][held_group], (held_x @ fit.theta.T).double(), held_group)
    return (log_p / held_group.bincount()).float()


def fewest(tried: list[Tried]) -> int:
    """The smallest K whose mean is less than the best one's by at most one standard error of the difference."""
    best = max(tried, key=lambda t: float(t.by_unit.mean()))
    lost = {t.experts: mean_se(best.by_unit - t.by_unit) for t in tried if t is not best}
    return min([best.experts, *(K for K, loss in lost.items() if loss["mean"] <= loss["se"])])


def describe(tried: list[Tried], units: int, options: dict, most: int) -> str:
    """Why this K, in words."""
    K, what = fewest(tried), "users" if options["latent"] == "user" else "choices"
    if len(tried) == 1:
        why = (f"fewer than {FEWEST} {what}" if units < FEWEST else
               "single choices of different responses cannot identify more types")
        return f"1, which is DPO: {why}"
    values = ", ".join(f"K = {t.experts}: {float(t.by_unit.mean()):.3f}" for t in tried)
    dpo = ", which is DPO: more types do not predict held-out " + what if K == 1 else ""
    return f"{K}{dpo}: log-likelihood of held-out {what} with linear rewards, nats a choice: {values}"


def print_plan(chosen: dict, reasons: dict[str, str], K: int, given: set[str]) -> None:
    """Prints the plan: a line for each decision, and the options that give the same run."""
    shown = ["latent", "experts", "gate", "estep"] if K > 1 else ["latent", "experts"]
    lines = [f"  --{name:<8} {reasons[name]}" for name in shown if name in reasons and name not in given]
    if K > 1 and "sharing" in chosen:
        lines.append("  --sharing  lora: K small adapters, and a shared one for what all users want")
    words = " ".join(f"{configs.as_flag(name)} {value}" for name, value in chosen.items())
    print("\n".join(["chosen from the data; the options below, with other values, override it:", *lines, f"  {words}"]))
