"""What a finished run says of preferences that it never saw, with standard errors that count prompts, and users too
where a figure uses each user's own weights.

    h of every pair under every expert, with --label-noise as in training     (M4)
    w: the gate's weights; own: a known user's responsibilities from training   (M9, M11)
    accuracy of each expert, by annotator; log p(y+ > y-) (M5); the gap to the bound (M6); alignment with the annotators
"""

import math
from pathlib import Path

import torch

from mixdpo.dpo import accuracy, margins, mixture_accuracy, observed_margins
from mixdpo.evaluation.statistics import (
    adjusted_rand_index,
    bayes_posterior,
    difference_se,
    matched_accuracy,
    mean_se,
)
from mixdpo.experts import pair_logp
from mixdpo.gates import gate_inputs, known_pairs
from mixdpo.metrics import effective_experts
from mixdpo.mixture import e_step, elbo, log_marginal
from mixdpo.preferences import Pair, check_lengths, collate, read_preferences
from mixdpo.runs.load_run import Run
from mixdpo.runs.reference import reference_of
from mixdpo.runs.rundir import Progress


def margins_of(runs: list[Run], references: list, tokenizer, path: Path, store: Path):
    """Yields (run, pairs of the file, h (P,K) of each under each of the run's experts (M4), log w of each (P,K))."""
    config, dtype = runs[0].config, runs[0].experts.dtype
    pairs = read_preferences(path, tokenizer, config.max_prompt, config.max_response, config.drop)
    check_lengths(pairs, min(model.config.context for model in references), path)
    ref = reference_of(path, pairs, references, tokenizer, config, dtype, store)
    for run in runs:
        own = pairs if run.config.train_trunk else ref.with_states(pairs)
        logp = expert_logp(run.experts, own, f"{run.name} {Path(path).stem}")               # (P,K,2)
        h = margins(logp, ref.logp, run.config.beta)                        # (P,K)  M4
        h = observed_margins(h, run.config.label_noise, run.config.label_loss)
        yield run, pairs, h, weights(run, pairs, ref.prompt)


@torch.no_grad()
def expert_logp(experts, pairs: list[Pair], name: str, size: int = 16, temperature: float = 1.0) -> torch.Tensor:
    """Summed response log-probs of every pair under every expert, at that temperature: (P,K,2) float32 nats, on the
    CPU. name: of the progress line."""
    out, progress = [], Progress(name)
    for start in range(0, len(pairs), size):
        batch = collate(pairs, list(range(start, min(start + size, len(pairs)))))
        out.append(pair_logp(experts, batch, temperature=temperature).cpu())
        progress(min(start + size, len(pairs)), len(pairs))
    return torch.cat(out)


@torch.no_grad()
def weights(run: Run, pairs: list[Pair], prompts: torch.Tensor) -> torch.Tensor:
    """log w(x) of each pair (P,K), from its prompt's states (P,2,C), user and domain."""
    prompts = prompts[:, ("last", "mean").index(run.config.gate_features)]
    return run.gate(gate_inputs(run.config.gate, pairs, prompts, known_pairs(run.plan)))


def user_weights(run: Run, pairs: list[Pair], log_w: torch.Tensor) -> torch.Tensor:
    """log weights of each held-out pair (P,K): its user's responsibilities from training (M11) where known, else w.
    A user whom no step of training drew has none: a row of NaN."""
    log_w = log_w.clone()
    if run.config.latent == "user":
        row = {run.plan.pairs[unit[0]].user: g for g, unit in enumerate(run.plan.units)
               if not run.table[g].isnan().any()}
        known = [(n, row[p.user]) for n, p in enumerate(pairs) if p.user in row]
        log_w[[n for n, _ in known]] = run.table[[g for _, g in known]]
    return log_w


def alignment(log_q: torch.Tensor, units: list[list[int]], pairs: list[Pair]) -> dict:
    """How well responsibilities (G,K) find the units' annotators, beside Bayes-optimal assignment by their scores."""
    truth = [pairs[unit[0]].annotator for unit in units]
    if any(t is None for t in truth) or len(set(truth)) < 2:
        return {}
    found = log_q.argmax(1).tolist()
    share, naming = matched_accuracy(found, truth, log_q.shape[1])
    naming = {str(k): kind for k, kind in naming.items()}
    result = {"ari": adjusted_rand_index(found, truth), "matched": share, "naming": naming, "units": len(units)}
    kinds = sorted(set(truth))
    if all(p.scores and p.scores.keys() >= set(kinds) for p in pairs):
        posterior = bayes_posterior([[pairs[i].scores for i in unit] for unit in units], kinds)     # (G,A)
        best = posterior.max(1).values
        bayes = [kinds[a] for a in posterior.argmax(1).tolist()]
        result |= {"bayes_matched": best.mean().item(), "bayes_ari": adjusted_rand_index(bayes, truth)}
    return result


def disagree(pair: Pair, kinds) -> bool:
    """Whether the scores of two of these annotators order its responses differently."""
    return {-1, 1} <= {(a > b) - (a < b) for name, (a, b) in (pair.scores or {}).items() if name in kinds}


def preference_figures(run: Run, pairs: list[Pair], h: torch.Tensor, log_w: torch.Tensor) -> dict:
    """Everything that a run's held-out margins h (P,K) and weights log_w (P,K) say. Pairs on one prompt are not
    independent: standard errors count prompts; under each user's own weights, prompts and users, since a user with the
    wrong weights errs on all of its pairs. Experts are named by the training groups: held-out pairs have no say.
    NaN is of a type for which no expert stands."""
    own, right = user_weights(run, pairs, log_w), accuracy(h)               # (P,K), (P,K)
    log_p, log_q = e_step(log_w, h)
    number = {p: n for n, p in enumerate(dict.fromkeys(tuple(pair.prompt) for pair in pairs))}
    prompt, of = [number[tuple(p.prompt)] for p in pairs], [p.annotator or "all" for p in pairs]
    user = [n if p.user is None else p.user for n, p in enumerate(pairs)]  # unknown ones: each a user by itself
    of_gate = [prompt, user] if run.config.gate in ("user", "prompt-user") else [prompt]    # w is the user's own there
    by = {kind: torch.tensor([a == kind for a in of]) for kind in sorted(set(of))}
    log_p_own = log_marginal(own, h)
    train_side = alignment(run.table, run.plan.units, run.plan.pairs) if run.config.experts > 1 else {}
    named = [train_side.get("naming", {}).get(str(k)) for k in range(run.config.experts)]

    def among(mask, values, *clusters):
        return mean_se(values[mask], *([x for x, keep in zip(cluster, mask) if keep] for cluster in clusters))

    chosen_own = mixture_accuracy(log_p_own)                                # M5 > 1/2 under each user's own weights
    expert = torch.tensor([0 if run.config.experts == 1 else named.index(a) if a in named else -1 for a in of])
    of_own_expert = right.gather(1, expert.clamp_min(0)[:, None])[:, 0].masked_fill(expert < 0, math.nan)   # (P,)
    apart = torch.tensor([disagree(pair, by) for pair in pairs])
    return {
        "types": {kind: {"accuracy": among(mask, chosen_own, prompt, user),
                         "log_likelihood": among(mask, log_p_own, prompt, user),
                         "own_expert": among(mask, of_own_expert, prompt)} for kind, mask in by.items()},
        "conflicts": among(apart, of_own_expert, prompt) if apart.any() else None,  # pairs on which types disagree
        "conflicts_by_pair": of_own_expert[apart].tolist(),
        "conflicts_prompt": [p for p, keep in zip(prompt, apart) if keep],
        "experts": run.config.experts,
        "weights": log_w.exp().mean(0).tolist(),
        "accuracy": {kind: [among(mask, column, prompt) for column in right.T] for kind, mask in by.items()},
        "accuracy_all": [mean_se(column, prompt) for column in right.T],    # of each expert
        "own": named,                                                       # the annotator that each stands for
        "own_other": [difference_se(column, by[kind], prompt) if kind in by and len(by) > 1 else None
                      for kind, column in zip(named, right.T)],             # its accuracy there, less that elsewhere
        "accuracy_mbt": mean_se(mixture_accuracy(log_p), *of_gate),         # M5 > 1/2 under w
        "accuracy_own": mean_se(chosen_own, prompt, user),
        "log_likelihood": mean_se(log_p, *of_gate),                         # M5 under w
        "log_likelihood_own": mean_se(log_p_own, prompt, user),             # M5 under each user's own weights
        "elbo_gap": mean_se(log_p_own - elbo(own, own, h), prompt, user),   # KL(q || posterior), q before the pair
        "prompts": len(set(prompt)),
        "by_pair": log_p.tolist(),                                          # M5 under w: runs are compared pair by pair
        "prompt_of_pair": prompt,
        "user_of_pair": user if len(of_gate) == 2 else None,                # where by_pair depends on the user, too
        "effective_experts": effective_experts(log_q),
        "alignment_heldout": alignment(log_q, [[i] for i in range(len(pairs))], pairs),
        "alignment_train": train_side,
    }
