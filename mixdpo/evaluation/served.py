"""What each kind of user is served by each run, and what it is worth to them: the rows of the own-reward table.

    single          K = 1: one policy for all users. If its training pairs are all of one type, it serves that type only
    known users     a mixture under each training user's responsibilities (M11)
    sparse          the same, all weight on the user's most likely expert
    new users       under the posterior after n of the user's pairs are known (adaptation.py)
    unknown users   under the gate's weights

A run of one type is part of the ceiling: one model per type is what a mixture could reach if types were known.
Rows at a smaller KL, of policies between the reference and the run (strength.py), give the frontier of a run. One of
them has about the KL at which the baseline ends, where methods are compared: between two points that are far apart, the
straight line of a frontier lies well below what policies there would gain.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from mixdpo.evaluation.completions import CompletionTask, Policy, complete, plain_texts
from mixdpo.evaluation.heldout import weights
from mixdpo.evaluation.in_context import served_in_context
from mixdpo.evaluation.inputs import EvalInputs
from mixdpo.evaluation.own_reward import Served, serve
from mixdpo.evaluation.strength import strength_for
from mixdpo.experts import Adapters, Heads, Models
from mixdpo.preferences import Pair
from mixdpo.runs.load_run import Run
from mixdpo.runs.reference import prompt_features

BASELINE = "baseline"   # the target of the rows with the KL at which the baseline, one policy for all, ends
NEAR = 0.1              # of a KL in logarithms: then a row more says nothing


@dataclass(frozen=True)
class Users:
    """Whom the policies serve."""

    types: list[str]                # annotators of the training pairs
    prompts: list[Pair]
    states: torch.Tensor            # (N,2,C) of the prompts, which gates may read
    new: dict                       # run -> {number of known pairs: (log q (U,K), type of each user)}
    base: torch.Tensor              # (N,T) rewards of the reference's completions


@dataclass(frozen=True)
class Completed:
    """A run's completions, at strength 1 or at a smaller one."""

    values: torch.Tensor            # (K,N,T) reward of each expert's completion for each type
    log_ratio: torch.Tensor         # (K,N,K) nats
    length: torch.Tensor            # (K,N) tokens


def own_reward_rows(inputs: EvalInputs, task: CompletionTask, done: dict, config, known: dict, scores: Callable
                    ) -> list[dict]:
    """All rows: {"run", "users", "target", "strength", "config"} and the figures of `row`; [] unless each type has a
    reward. config (EvalConfig): a run that goes farther than one of `kl`, or than the baseline, is also evaluated at
    the strength that has about this KL, and `examples` of a user's choices are shown to the reference. done: run ->
    what `complete` returned at strength 1, and "reference" -> its completions; known: posteriors of new users;
    scores(texts) -> {reward: the score of each}."""
    if "domains" in inputs.dataset:
        task, done = judged_prompts(task, done, inputs.dataset["domains"])
    types, plain = inputs.dataset.get("annotators", []), done["reference"]

    def values(ids: list[list[int]]) -> torch.Tensor:
        found = scores(plain_texts(task, ids, inputs.tokenizer))
        columns = [found[kind] for kind in types] if "domains" not in inputs.dataset else [
            own_scores(found, [pair.domain or "" for pair in task.prompts], inputs.dataset["domains"])]
        return torch.tensor(columns, dtype=torch.float64).T                 # (N,T)

    if not types or not {*types} <= {*inputs.dataset["rewards"], *inputs.dataset.get("utilities", {})}:
        return []
    states = prompt_features(task.reference, [p.prompt for p in task.prompts], inputs.runs[0].experts.dtype)
    served = types if "domains" not in inputs.dataset else ["everybody"]
    users = Users(served, task.prompts, states, known, values(plain))
    rows = rows_of_runs(inputs, task, done, sorted(config.kl, reverse=True), values, users)
    first = max(inputs.runs, key=lambda run: len({*types} & {pair.annotator for pair in run.plan.pairs}))
    in_context = served_in_context(first.plan.pairs, served, config.examples, task, inputs.tokenizer, values,
                                   users.base, first.experts.dtype)
    if in_context:
        rows.append({"run": "in-context", "users": "in context", "target": None, "strength": 1.0,
                     "config": asdict(first.config)} | row(*in_context, served))
    return rows


def rows_of_runs(inputs: EvalInputs, task: CompletionTask, done: dict, targets: list[float], values: Callable,
                 users: Users) -> list[dict]:
    """The rows of the runs and their soups, run by run: at strength 1, then at those that have about the KL of
    `targets`, descending, and of the baseline's end. The policies of one target are completed together."""
    runs = [*inputs.runs, *soups(inputs.runs)]
    reached: dict[str, dict[float, float]] = {run.name: {} for run in runs}         # strength -> KL
    rows: dict[str, list[dict]] = {run.name: [] for run in runs}
    for target in (None, *targets, *[BASELINE] * bool(targets)):
        kl = end_of_baseline(rows, inputs.runs, targets) if isinstance(target, str) else target
        if target is not None and kl is None:
            continue
        strengths = {run.name: 1.0 if kl is None else strength_for(kl, reached[run.name]) for run in runs
                     if kl is None or run.name in done}                     # a soup has one point
        policies = [Policy(run, strength, tuple(inputs.references)) for run in runs
                    if (strength := strengths.get(run.name)) is not None]
        new = [policy for policy in policies if target is not None or policy.run.name not in done]
        found = dict(zip((policy.run.name for policy in new), complete(new, task)))
        for policy in policies:
            run, (ids, log_ratio) = policy.run, found.get(policy.run.name) or done[policy.run.name]
            length = torch.tensor([[len(y) for y in texts] for texts in ids])
            completed = Completed(torch.stack([values(texts) for texts in ids]), log_ratio, length)
            of_users = served_rows(run, completed, users)
            reached[run.name][policy.strength] = of_users.get("known users", next(iter(of_users.values())))["kl"]
            rows[run.name] += [{"run": run.name, "users": kind, "target": target, "strength": policy.strength,
                                "config": asdict(run.config)} | figures for kind, figures in of_users.items()]
    return [row for run in runs for row in rows[run.name]]


def end_of_baseline(rows: dict[str, list[dict]], runs: list[Run], targets: list[float]) -> float | None:
    """The largest KL of a run that serves everybody the same policy, in nats; None if there is none, or if one of the
    targets is as far. rows: of each run."""
    end = max((row["kl"] for run in runs for row in rows[run.name] if row["users"] == "all users"), default=0.0)
    return end if end > 0 and all(abs(math.log(end / kl)) > NEAR for kl in targets) else None


def soups(runs: list[Run]) -> list[Run]:
    """One policy from each mixture of adapters or models: the mean of its experts' parameters, as a run with K = 1."""
    return [replace(run, name=f"{run.name}-soup", config=replace(run.config, experts=1), experts=soup(run.experts),
                    known={})
            for run in runs if run.config.experts > 1 and not isinstance(run.experts, Heads)]


@torch.no_grad()
def soup(experts: Adapters | Models) -> Heads:
    """The mean of the experts' parameters."""
    first, *others = [experts.policy(k)[0] for k in range(experts.K)]
    mean = copy.deepcopy(first)
    for p, *own in zip(mean.parameters(), *(model.parameters() for model in others)):
        p.copy_(torch.stack([p, *own]).mean(0))
    return Heads(mean.requires_grad_(True), 1, dtype=experts.dtype)         # its own parameters, as of a trained model


def judged_prompts(task: CompletionTask, done: dict, judges: dict[str, list[str]]) -> tuple[CompletionTask, dict]:
    """The task and its completions for the prompts whose domain has judges. Prompts of other domains show what a gate
    does there; nobody's reward is known."""
    kept = [n for n, pair in enumerate(task.prompts) if pair.domain in judges]
    few: dict = {"reference": [done["reference"][n] for n in kept]}
    for name in done.keys() - few.keys():
        texts, log_ratio = done[name]
        few[name] = [[of_expert[n] for n in kept] for of_expert in texts], log_ratio[:, kept]
    return replace(task, prompts=[task.prompts[n] for n in kept]), few


def own_scores(found: dict[str, list[float]], domain: list[str], judges: dict[str, list[str]]) -> list[float]:
    """The score of each text by the types that judge its prompt's domain, their mean."""
    return [sum(found[kind][n] for kind in judges[name]) / len(judges[name]) for n, name in enumerate(domain)]


def served_rows(run: Run, completed: Completed, users: Users) -> dict[str, dict]:
    """Kind of user -> the row of the table."""
    types, K, rows = users.types, run.config.experts, {}
    owners = [run.plan.pairs[unit[0]].annotator or "" for unit in run.plan.units]
    everybody = torch.arange(len(types))

    def add(name: str, log_q: torch.Tensor, kind: torch.Tensor, kinds: list[str] = types) -> None:
        columns = [types.index(name) for name in kinds]
        served = serve(completed.values[..., columns], completed.log_ratio, log_q, kind, users.base[:, columns])
        rows[name] = row(served, float((served.q * completed.length.T).sum(1).mean()), kinds)

    if K == 1 and len(set(owners)) == 1 < len(types) and owners[0] in types:
        add(f"type {owners[0]}", torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), owners[:1])
    elif K == 1:
        add("all users", torch.zeros(len(types), 1), everybody)
    else:
        log_w = weights(run, users.prompts, users.states)                   # (N,K)
        add("unknown users", log_w.expand(len(types), -1, -1), everybody)
        known = [n for n, name in enumerate(owners) if name in types and not run.table[n].isnan().any()]
        kind = torch.tensor([types.index(owners[n]) for n in known], dtype=torch.int64)
        if run.config.latent == "user" and len(kind.unique()) == len(types):
            best = torch.nn.functional.one_hot(run.table[known].argmax(1), K).float().log()
            add("known users", run.table[known], kind)
            add("known users, sparse", best, kind)
            for n, (log_q, names) in users.new.get(run.name, {}).items():
                if {*names} == {*types}:
                    add(f"new users, {n} pairs known", log_q, torch.tensor([types.index(name) for name in names]))
    return rows


def row(served: Served, length: float, kinds: list[str]) -> dict:
    """A row of the table, for results.json. length: mean tokens of a completion; kinds: the types that are served."""
    return {"gain": served.figure, "kl": float(served.kl.mean()), "types": dict(zip(kinds, served.by_type)),
            "length": length, "gain_by_prompt": served.reward.mean(0).tolist(),
            "kl_by_prompt": served.kl.tolist()}
