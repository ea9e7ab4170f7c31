"""Completions of the evaluation prompts by every policy, with their rewards and their KL to the reference.

    reference   the frozen model
    head k      expert k alone
    mixture     an expert z ~ w(x) for each prompt, then the full text from it (M13, M14)
    sparse      the expert with the largest w(x) for each prompt
    KL          mean over prompts of log pi(y|x) - log pi_ref(y|x), with y sampled from pi. pi is the policy at the
                sampling temperature, pi_ref is at temperature 1. If each expert has its own reference, pi_ref is the
                first one

The random numbers of a completion depend on the seed and the prompt's number alone. So the mixture's completion of a
prompt is that of the expert drawn for it, and the rows mixture and sparse need no sampling of their own.
"""

import copy
import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo.config import replacing, write_text
from mixdpo.evaluation.generate import Sampling, choose_expert, generate_heads
from mixdpo.evaluation.heldout import weights
from mixdpo.evaluation.statistics import mean_se
from mixdpo.evaluation.strength import at_strength
from mixdpo.experts import Heads, Transformer
from mixdpo.fast.casts import cast_linears
from mixdpo.fast.texts import logp_of_texts
from mixdpo.files.atomic import save_tensors
from mixdpo.gates import READS_PROMPT
from mixdpo.mixture import mixture_logp
from mixdpo.preferences import Pair
from mixdpo.runs.load_run import Run
from mixdpo.runs.log import Progress
from mixdpo.runs.parallel import in_parts, logp_in_parts
from mixdpo.runs.reference import compute_reference, divided, prompt_features


@dataclass(frozen=True)
class CompletionTask:
    """What every policy completes, and the reference that its KL is measured to."""

    reference: Transformer
    prompts: list[Pair]             # without responses
    sampling: Sampling


@dataclass(frozen=True)
class Policy:
    """A run's experts at a strength (strength.py), and the reference, or that of each expert."""

    run: Run
    strength: float = 1.0
    references: tuple = ()          # not needed at strength 1

    @property
    def name(self) -> str:
        return self.run.name + f" at {self.strength:.2f}" * (self.strength < 1)


def policy_rows(runs: list[Run], task: CompletionTask, done: dict | None = None) -> dict:
    """Completions by the reference and by every policy of the runs: policy -> a row (run_rows). Fills done: run -> what
    `complete` returns of it, and "reference" -> its completions."""
    dtype, done = runs[0].experts.dtype, {} if done is None else done
    states = prompt_features(task.reference, [p.prompt for p in task.prompts], dtype)       # (N,2,C)
    rows = {"reference": reference_row(task, dtype)}
    done["reference"] = rows["reference"]["ids"]
    for run, found in zip(runs, complete([Policy(run) for run in runs], task)):
        done[run.name] = found
        rows |= run_rows(run, task, states, *found)
    return rows


def reference_row(task: CompletionTask, dtype: torch.dtype) -> dict:
    """Completions by the reference, as a row of `run_rows`."""
    texts, own = sample([(task.reference, task.reference.unembedding)], task, dtype, "reference")
    kl = torch.zeros(len(own[0]))                                           # exactly, at temperature 1
    if task.sampling.temperature != 1:
        kl = (policy_logp(task, None, texts, own)[..., 0] - reference_logp(task, dtype, texts))[0]
    return {"ids": texts[0], "kl": kl, "z": None}


def complete(policies: list[Policy], task: CompletionTask) -> list[tuple[list[list[list[int]]], torch.Tensor]]:
    """For each policy: completions by each of its experts, K lists of N, and log pi_j - log pi_ref of each under every
    expert j, (K,N,K) nats. The reference's log-probs are computed of all policies together, each prompt once for
    several completions."""
    found = []
    for policy in policies:
        K, experts, name = policy.run.config.experts, policy.run.experts, policy.name
        with at_strength(experts, list(policy.references), policy.strength):
            parts = [sample([experts.policy(k) for k in some], task, experts.dtype,
                            f"{name} expert {'+'.join(map(str, some))}")
                     for some in ([range(K)] if policy.run.config.sharing == "heads" else [[k] for k in range(K)])]
            texts, own = [ids for some, _ in parts for ids in some], torch.cat([logp for _, logp in parts])
            found.append((texts, policy_logp(task, policy, texts, own)))
    if not found:
        return []
    dtype, counts = policies[0].run.experts.dtype, [len(texts) for texts, _ in found]
    base = reference_logp(task, dtype, [ids for texts, _ in found for ids in texts]).split(counts)
    return [(texts, logp - ref[..., None]) for (texts, logp), ref in zip(found, base)]


def run_rows(run: Run, task: CompletionTask, states: torch.Tensor, ids: list, kl: torch.Tensor) -> dict:
    """The policies of one run, from what `complete` returns: policy -> {"ids": the completion of each prompt, "kl":
    (N,) log pi - log pi_ref of each in nats, "z": the expert of each, and for a mixture "w": (N,K)}. states (N,2,C): of
    the prompts."""
    K, seed = run.config.experts, task.sampling.seed
    log_w, n, rows = weights(run, task.prompts, states), torch.arange(len(task.prompts)), {}
    for mode in ("mixture", "sparse", *range(K)) if K > 1 else (0,):
        z = choose_expert(log_w, len(n), str(mode), seed)                   # (N,)  M13
        chosen = kl[z, n]                                                   # (N,K)
        log_ratio = mixture_logp(log_w, chosen) if mode == "mixture" else chosen[n, z]      # M14
        name = run.name if K == 1 else f"{run.name} {mode if mode in ('mixture', 'sparse') else f'head {mode}'}"
        rows[name] = {"ids": [ids[k][i] for i, k in enumerate(z.tolist())], "kl": log_ratio, "z": z.tolist()}
        rows[name] |= {"w": log_w.exp()} if mode == "mixture" else {}
    return rows


def sample(policies: list[tuple], task: CompletionTask, dtype, name: str) -> tuple[list[list[list[int]]], torch.Tensor]:
    """Completions of all prompts by each of some experts, (model, unembedding), that share a trunk, and the log-prob of
    each (K,N). All experts use the same random numbers. Each process of several completes a part of the prompts."""
    model = copy.deepcopy(policies[0][0]).to(dtype)                         # one cast here, not one a token
    heads, progress = [head.to(model.unembedding) for _, head in policies], Progress(name)

    def of_part(part) -> tuple[list[list[list[int]]], torch.Tensor]:
        return generate_heads(model, heads, [task.prompts[n].prompt for n in part], task.sampling, part, progress)

    ids, logp = zip(*in_parts(range(len(task.prompts)), of_part))
    return [list(itertools.chain(*of_head)) for of_head in zip(*ids)], torch.cat(logp, dim=1)


def policy_logp(task: CompletionTask, policy: Policy | None, texts: list[list[list[int]]], own: torch.Tensor
                ) -> torch.Tensor:
    """log pi_j of every expert's completions under every expert j of a policy: (K,N,K) nats. None: the reference.

    pi_j is the policy as it was sampled: at the sampling temperature, token by token. At temperature 0 it has
    probability 1 for its own completion and 0 for others. texts: K lists of N completions; own (K,N): the log-prob with
    which each was sampled. Experts without a common trunk pass over the others' completions only.
    """
    K, temperature, prompts = len(texts), task.sampling.temperature, [p.prompt for p in task.prompts]
    if not temperature:
        equal = [[[text[n] == other[n] for other in texts] for n in range(len(prompts))] for text in texts]
        return torch.tensor(equal).float().log()                            # (K,N,K) log 1 or log 0
    if K == 1 or policy is None:
        return own[..., None]
    experts, name = policy.run.experts, f"{policy.name} KL"
    if isinstance(experts, Heads):
        pairs = [Pair(prompt, first, second, more=tuple(more), sides=K)
                 for prompt, first, second, *more in zip(prompts, *texts)]
        if not policy.run.config.train_trunk:                               # the trunk is the reference's
            of_part = functools.partial(compute_reference, task.reference, dtype=experts.dtype)
            pairs = divided(pairs, of_part).with_states(pairs)
        return logp_in_parts(experts, pairs, name, temperature=temperature).permute(2, 0, 1)
    out = own[..., None].repeat(1, 1, K)
    for j in range(K):
        alone = Heads(cast_linears(experts.policy(j)[0], experts.dtype), 1, dtype=experts.dtype)
        others = [k for k in range(K) if k != j]
        out[others, :, j] = completion_logp(alone, prompts, [texts[k] for k in others], f"{name} {j}", temperature)
    return out


def reference_logp(task: CompletionTask, dtype: torch.dtype, texts: list[list[list[int]]]) -> torch.Tensor:
    """log pi_ref of L lists of N completions: (L,N) nats."""
    alone = Heads(cast_linears(task.reference, dtype), 1, dtype=dtype)
    return completion_logp(alone, [p.prompt for p in task.prompts], texts, "reference, completions")


def completion_logp(expert: Heads, prompts: list[list[int]], texts: list[list[list[int]]], name: str,
                    temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of L lists of N completions under a lone expert: (L,N) nats."""
    of_prompt = [[(tuple(prompt), tuple(ids)) for ids in column] for prompt, *column in zip(prompts, *texts)]
    progress = Progress(name)

    def of_part(rows) -> torch.Tensor:
        known = logp_of_texts(expert, itertools.chain(*rows), {}, progress, temperature=temperature)
        return torch.stack([torch.stack([known[text][0] for text in row]) for row in rows], dim=1)

    return torch.cat(in_parts(of_prompt, of_part), dim=1)


def plain_texts(task: CompletionTask, completions: list[list[int]], tokenizer) -> list[str]:
    """Each prompt and its completion as one text, without the start token and the token that ends a completion."""
    end = task.sampling.eos
    return [tokenizer.decode([t for t in pair.prompt if t != tokenizer.bos] + [t for t in ids if t != end])
            for pair, ids in zip(task.prompts, completions)]


def reward_table(rows: dict, texts: dict, dataset: dict, score) -> dict:
    """Rewards, KL and length of every policy, each a mean with its standard error over prompts.

    texts: policy -> its texts; dataset: dataset.json, which names the annotators; score: texts -> {reward: the score of
    each}. "trained" is the mean of the rewards that the annotators of the training pairs follow,
    "gain" is "trained" minus the reference's on the same prompts, and "values" holds all rewards by prompt (N,R), for
    paired comparisons.
    """
    unique = sorted({text for column in texts.values() for text in column})
    found = score(unique)
    rewards, scores = list(found), dict(zip(unique, zip(*found.values())))
    table: dict[str, dict] = {}
    base = None
    for name, row in rows.items():
        values = torch.tensor([scores[text] for text in texts[name]], dtype=torch.float64)          # (N,R)
        trained = values[:, [rewards.index(a) for a in dataset["annotators"]]].mean(1)   # (N,)
        base = trained if base is None else base
        table[name] = {reward: mean_se(values[:, r]) for r, reward in enumerate(rewards)}
        table[name] |= {"trained": mean_se(trained), "gain": mean_se(trained - base), "kl": mean_se(row["kl"])}
        table[name] |= {"length": mean_se(torch.tensor([len(y) for y in row["ids"]])), "values": values.tolist()}
        table[name] |= {"w": row["w"].tolist()} if "w" in row else {}
    return table


def all_scores(score: Callable, dataset: dict, folder: Path) -> Callable:
    """texts -> {reward: the score of each}: the rewards that dataset.json names, and the utilities of types that it
    defines as sums of weight times reward. Each text is scored once. score(texts, rewards, folder):
    data/annotators/rewards.py's."""
    known: dict[str, tuple] = {}

    def scores(texts: list[str]) -> dict[str, list[float]]:
        new = list(dict.fromkeys(text for text in texts if text not in known))
        if new:
            found = score(new, dataset["rewards"], folder)
            known.update(zip(new, zip(*(found[reward] for reward in dataset["rewards"]))))
        columns = map(list, zip(*(known[text] for text in texts)))
        return with_utilities(dict(zip(dataset["rewards"], columns)), dataset.get("utilities", {}))

    return scores


def with_utilities(scores: dict[str, list[float]], types: dict[str, dict[str, float]]) -> dict[str, list[float]]:
    """The scores {reward: [n]} with the utility of each type added: {type: [n]}, the sum of weight times reward.
    types: type -> {reward: weight}."""
    terms = {kind: [[w * s for s in scores[reward]] for reward, w in of.items()] for kind, of in types.items()}
    return scores | {kind: list(map(sum, zip(*of))) for kind, of in terms.items()}


def write_samples(folder: Path, prompts: list[str], texts: dict) -> None:
    """samples.jsonl: {"prompt", "texts": {policy: prompt and completion}} a line."""
    samples = [{"prompt": prompt, "texts": {name: column[n] for name, column in texts.items()}}
               for n, prompt in enumerate(prompts)]
    write_text(folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))


def write_prompt_states(folder: Path, runs: list[Run], task: CompletionTask) -> None:
    """prompt-states.safetensors: the features (N,2,C) of the prompts that gates look at, for the report's pictures.
    Nothing is written if no run has such a gate."""
    if any(run.config.gate in READS_PROMPT for run in runs):
        states = prompt_features(task.reference, [p.prompt for p in task.prompts], runs[0].experts.dtype)
        with replacing(folder / "prompt-states.safetensors") as part:
            save_tensors(part, {"states": states}, {"format": "pt"})
