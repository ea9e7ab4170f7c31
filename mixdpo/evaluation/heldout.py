"""Figures of a finished run on held-out preferences, with standard errors.

    h               margins of every pair under every expert, with --label-noise as in training     (M4)
    w               the gate's weights (M9); the user's weights are its responsibilities from training (M11) if the user
                    was trained on, else w
    accuracy        of each expert, by annotator, and of the mixture
    log-likelihood  log p(y+ > y-) of the mixture (M5)
    ELBO gap        KL(q || posterior) of a pair, with q the user's weights before the pair is seen (M6)
    alignment       agreement of responsibilities with the annotators
    collapse        whether K experts are of use, and how many of them (collapse.py)

Standard errors cluster by prompt. Under each user's own weights they cluster by prompt and user.
"""

import dataclasses
import math
from pathlib import Path

import torch

from mixdpo.config import InputError
from mixdpo.dpo import accuracy, margins, mixture_accuracy
from mixdpo.evaluation.calibration import calibrated
from mixdpo.evaluation.collapse import collapse_figures, half_split_weights
from mixdpo.evaluation.statistics import (
    adjusted_rand_index,
    bayes_posterior,
    difference_se,
    matched_accuracy,
    mean_se,
)
from mixdpo.files.sources import short_name
from mixdpo.metrics import effective_experts
from mixdpo.mixture import e_step, elbo, log_marginal
from mixdpo.preferences import Pair, check_lengths, read_preferences
from mixdpo.runs.gate_inputs import gate_inputs, known_pairs
from mixdpo.runs.load_run import Run
from mixdpo.runs.parallel import logp_in_parts
from mixdpo.runs.reference import Source, reference_of
from mixdpo.variants.label_noise import flipped_margins
from mixdpo.variants.rankings import as_pairs, records_of


def margins_of(runs: list[Run], references: list, tokenizer, path, cache: Path, columns: str = ""):
    """For each run yields (run, pairs of the file, margins h (P,K) (M4), log w (P,K)). The references' log-probs of the
    file are kept in the folder `cache`. path, columns: as train.py --data and --columns.
    Raises: InputError if the file cannot be used."""
    config, dtype = dataclasses.replace(runs[0].config, columns=columns), runs[0].experts.dtype
    pairs = as_pairs(read_preferences(path, tokenizer, config.max_prompt, config.max_response, config.drop,
                                      columns=columns))
    if not pairs:
        raise InputError("has ties only, and a tie is no choice to predict; wanted a chosen and a rejected response on "
                         "some lines", file=path)
    check_lengths(pairs, min(model.config.context for model in references), path)
    ref = reference_of(Source(path, pairs, config), references, tokenizer, dtype, cache)
    for run in runs:
        run_pairs = pairs if run.config.train_trunk else ref.with_states(pairs)
        name = f"{run.name} {short_name(path)}"
        logp = logp_in_parts(run.experts, run_pairs, name, known=run.known_logp())          # (P,K,2)
        h = margins(logp, ref.logp, run.config.beta)                        # (P,K)  M4
        h = flipped_margins(h, run.config.label_noise)
        yield run, pairs, h, weights(run, pairs, ref.prompt)


@torch.no_grad()
def weights(run: Run, pairs: list[Pair], prompts: torch.Tensor) -> torch.Tensor:
    """log w(x) of each pair (P,K), from the states of its prompt (P,2,C), its user and its domain."""
    prompts = prompts[:, ("last", "mean").index(run.config.gate_features)]
    return run.gate(gate_inputs(run.config.gate, pairs, prompts, known_pairs(run.plan)))


def user_weights(run: Run, pairs: list[Pair], log_w: torch.Tensor) -> torch.Tensor:
    """log weights of each held-out pair (P,K): its user's responsibilities from training (M11) if the user was trained
    on, else log_w. A user that no training step drew has a row of NaN in the run's table and counts as unknown."""
    log_w = log_w.clone()
    if run.config.latent == "user":
        row = {run.plan.pairs[unit[0]].user: g for g, unit in enumerate(run.plan.units)
               if not run.table[g].isnan().any()}
        known = [(n, row[p.user]) for n, p in enumerate(pairs) if p.user in row]
        log_w[[n for n, _ in known]] = run.table[[g for _, g in known]]
    return log_w


def collapse_of(run: Run, h: torch.Tensor, log_w: torch.Tensor, pairs: list[Pair], prompt: list, user: list) -> dict:
    """Figures on collapse (collapse.py) from margins h and weights log_w (P,K), the prompt and the user of each pair.

    If types belong to users, or no gate sets weights, a user's other pairs give the weights of a pair. Users that were
    trained on have their responsibilities from training instead: those are what training is judged by.
    """
    of_users = run.config.latent == "user" or run.config.gate == "fixed"
    log_v = user_weights(run, pairs, half_split_weights(log_w, h, user, records_of(pairs)) if of_users else log_w)
    by_user = of_users or run.config.gate in ("user", "prompt-user")
    return collapse_figures(log_v, h, *([prompt, user] if by_user else [prompt]))


def alignment(log_q: torch.Tensor, units: list[list[int]], pairs: list[Pair]) -> dict:
    """How well responsibilities (G,K) identify the annotators of the units: ARI and matched accuracy, and, if the pairs
    have all annotators' scores, the same for the Bayes-optimal assignment. {} with fewer than two known annotators.
    Units that no training step drew have no responsibilities (NaN) and are left out."""
    drawn = ~log_q.isnan().any(1)
    log_q, units = log_q[drawn], [unit for unit, known in zip(units, drawn.tolist()) if known]
    truth = [name for unit in units if (name := pairs[unit[0]].annotator) is not None]
    if len(truth) < len(units) or len(set(truth)) < 2:
        return {}
    found = log_q.argmax(1).tolist()
    share, naming = matched_accuracy(found, truth, log_q.shape[1])
    result = {"ari": adjusted_rand_index(found, truth), "matched": share,
              "naming": {str(k): kind for k, kind in naming.items()}, "units": len(units)}
    kinds = sorted(set(truth))
    if all(p.scores and p.scores.keys() >= set(kinds) for p in pairs):
        posterior = bayes_posterior([[pairs[i].scores or {} for i in unit] for unit in units], kinds)     # (G,A)
        best = posterior.max(1).values
        bayes = [kinds[a] for a in posterior.argmax(1).tolist()]
        result |= {"bayes_matched": best.mean().item(), "bayes_ari": adjusted_rand_index(bayes, truth)}
    return result


def disagree(pair: Pair, kinds) -> bool:
    """Whether two of the annotators `kinds` order the responses differently by their scores; ties do not count."""
    return {-1, 1} <= {(a > b) - (a < b) for name, (a, b) in (pair.scores or {}).items() if name in kinds}


def preference_figures(run: Run, pairs: list[Pair], h: torch.Tensor, log_w: torch.Tensor) -> dict:
    """All figures of a run on held-out pairs, from their margins h (P,K) and weights log_w (P,K).

    Pairs on one prompt are not independent, so standard errors cluster by prompt. A user with wrong weights is wrong on
    all of its pairs, so figures under each user's own weights cluster by prompt and user. Experts are named after
    annotators by the training units alone; the held-out pairs are not used. A figure of a type is NaN if no expert is
    named after it.
    """
    log_own, right = user_weights(run, pairs, log_w), accuracy(h)           # (P,K), (P,K)
    log_p, log_q = e_step(log_w, h)
    log_p_own = log_marginal(log_own, h)
    right_own = mixture_accuracy(log_p_own)                                 # M5 > 1/2 under each user's own weights
    number = {p: n for n, p in enumerate(dict.fromkeys(tuple(pair.prompt) for pair in pairs))}
    prompt, kind_of = [number[tuple(p.prompt)] for p in pairs], [p.annotator or "all" for p in pairs]
    user = [n if p.user is None else p.user for n, p in enumerate(pairs)]   # each unknown user is its own cluster
    owner = [prompt[n] if p.user is None else p.user for n, p in enumerate(pairs)]
    log_p_calibrated, temperatures = calibrated(log_own, h, owner)
    gate_clusters = [prompt, user] if run.config.gate in ("user", "prompt-user") else [prompt]  # w depends on the user
    masks = {kind: torch.tensor([k == kind for k in kind_of]) for kind in sorted(set(kind_of))}
    training = alignment(run.table, run.plan.units, run.plan.pairs) if run.config.experts > 1 else {}
    named = [training.get("naming", {}).get(str(k)) for k in range(run.config.experts)]

    def among(mask, values, *clusters):
        return mean_se(values[mask], *([x for x, keep in zip(cluster, mask) if keep] for cluster in clusters))

    expert = torch.tensor([0 if run.config.experts == 1 else named.index(k) if k in named else -1 for k in kind_of])
    of_own_expert = right.gather(1, expert.clamp_min(0)[:, None])[:, 0].masked_fill(expert < 0, math.nan)   # (P,)
    conflict = torch.tensor([disagree(pair, masks) for pair in pairs])      # types disagree on these pairs
    return {
        "types": {kind: {"accuracy": among(mask, right_own, prompt, user),
                         "log_likelihood": among(mask, log_p_own, prompt, user),
                         "own_expert": among(mask, of_own_expert, prompt)} for kind, mask in masks.items()},
        "conflicts": among(conflict, of_own_expert, prompt) if conflict.any() else None,
        "conflicts_by_pair": of_own_expert[conflict].tolist(),
        "conflicts_prompt": [p for p, keep in zip(prompt, conflict) if keep],
        "experts": run.config.experts,
        "weights": log_w.exp().mean(0).tolist(),
        "accuracy": {kind: [among(mask, column, prompt) for column in right.T] for kind, mask in masks.items()},
        "accuracy_all": [mean_se(column, prompt) for column in right.T],    # of each expert
        "own": named,                                                       # the annotator that each is named after
        "own_other": [difference_se(column, masks[kind], prompt) if kind in masks and len(masks) > 1 else None
                      for kind, column in zip(named, right.T)],             # accuracy on its pairs minus on the others
        "accuracy_mbt": mean_se(mixture_accuracy(log_p), *gate_clusters),   # M5 > 1/2 under w
        "accuracy_own": mean_se(right_own, prompt, user),
        "log_likelihood": mean_se(log_p, *gate_clusters),                   # M5 under w
        "log_likelihood_own": mean_se(log_p_own, prompt, user),             # M5 under each user's own weights
        "log_likelihood_calibrated": mean_se(log_p_calibrated, prompt, user),
        "temperatures": temperatures,                                       # of margins: calibration.py
        "elbo_gap": mean_se(log_p_own - elbo(log_own, log_own, h), prompt, user),
        "prompts": len(set(prompt)),
        "by_pair": log_p.tolist(),                                          # M5 under w, for paired comparisons of runs
        "by_pair_own": log_p_own.tolist(),                                  # the same under each user's own weights
        "prompt_of_pair": prompt,
        "type_of_pair": kind_of,
        "trained_on": sorted({pair.annotator for pair in run.plan.pairs if pair.annotator}),
        "user_of_pair": user if len(gate_clusters) == 2 else None,          # a second cluster of by_pair
        "user_of_pair_own": user,                                           # the second cluster of by_pair_own
        "effective_experts": effective_experts(log_q),
        "collapse": collapse_of(run, h, log_w, pairs, prompt, user),        # {} for one expert
        "alignment_heldout": alignment(log_q, [[i] for i in range(len(pairs))], pairs),
        "alignment_train": training,
    }
