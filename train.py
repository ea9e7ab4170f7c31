"""Mix-DPO by stochastic variational EM, in one file: `python train.py --data prefs.jsonl --model NAME_OR_DIR --experts 2 --out runs/x`.

One optimizer step, top to bottom, is `step` below:

    hidden states of the trunk                                            one forward pass serves E and M
    for each chunk of whole pairs (whole users):
        log-probs of K experts -> margins h                               (M4)
        E-step:  q = posterior over experts, detached                     (M7, M11)
        M-step:  sum_k q_k * -log sigma(h_k), backward into states and heads  (M8)
    one backward pass of the trunk, then AdamW

The loss is a sum over pairs divided by the step's number of trained pairs, so the result does not depend on how a step is cut into
micro-batches or chunks. K = 1 is DPO. Only this file calls backward.
"""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo import config as configs
from mixdpo.config import InputError
from mixdpo.diagnostics import step_summary
from mixdpo.dpo import margins
from mixdpo.experts import load_state, make_experts, pair_logp, trained_state
from mixdpo.logprob import sum_responses
from mixdpo.mixture import e_step, elbo, expert_loss, linear_mixture, log_marginal, random_responsibilities, update_weights
from mixdpo.optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_rate
from mixdpo.preferences import Batch, Pair, batches, check_lengths, collate, data_key, groups, mark_context, read_preferences, response_positions
from mixdpo.reference import cached_reference, compute_reference
from mixdpo.rundir import Progress, compute_dtype, environment, load_checkpoint, save_checkpoint
from mixdpo.tokenizer import load_tokenizer
from mixdpo.weights import content_key, load_model


@dataclass(frozen=True)
class TrainConfig:
    """Trains DPO (experts = 1) or a mixture of experts on a preference file (JSON Lines: prompt, chosen, rejected, optional user)."""

    data: str                       # preference file, .jsonl or .jsonl.gz
    model: str                      # reference and start: gpt2, smollm2, llama-3.2-1b or a Hugging Face directory
    out: str                        # run directory; an unfinished run in it is resumed
    experts: int = 2                # K; 1 is DPO
    sharing: str = "heads"          # heads: one trunk, K unembeddings; models: K independent models
    rank: int = 16                  # rank of the heads W + A_k B_k; 0: full heads
    train_trunk: bool = True        # false: only the heads learn
    latent: str = "pair"            # one type a pair, or one a user (M11)
    estep: str = "all"              # pairs the E-step looks at: all, context (pairs never trained on), first (a pair's first visit)
    context: int = 0                # pairs of each user set aside for the E-step, where the file does not mark them
    weights: str = "uniform"        # mixture weights (M10): uniform, update (closed form, every epoch), or K numbers: 0.3,0.7
    prior: float = 1.0              # Dirichlet prior of the closed-form update
    start: str = "dirichlet"        # first responsibilities: dirichlet (random), linear (mixture of linear rewards), none (the saddle)
    start_steps: int = 10           # optimizer steps that use them before the E-step takes over
    restarts: int = 5               # starts of the linear mixture; the best bound is taken
    beta: float = 0.1               # strength of the pull to the reference, per nat
    lr: float = 2e-5                # AdamW's peak learning rate
    head_lr: float = 1e-3           # the same for the low-rank factors A_k, B_k
    epochs: int = 1                 # passes over the data
    batch: int = 32                 # pairs an optimizer step, at most; whole users
    micro: int = 16                 # pairs a forward pass, at most; whole users, so one large user may exceed it
    head_rows: int = 1024           # response tokens a head micro-batch, about; 0: the composable route, all at once in vocabulary tiles
    warmup: int = 10                # steps of linear warm-up; then linear decay to a tenth
    clip: float = 1.0               # largest gradient norm
    max_prompt: int = 256           # tokens; longer prompts are cut from the left
    max_response: int = 256         # tokens, the end token among them
    drop: bool = False              # true: faulty lines are dropped and reported, not an error
    checkpointing: bool = False     # activation checkpointing: less memory, one more forward pass
    dtype: str = "auto"             # of the products: auto, float32, bfloat16; parameters stay float32
    seed: int = 0                   # of everything random
    save_minutes: float = 10.0      # between checkpoints
    data_folder: str = ""           # local files looked into before anything is fetched


@dataclass(frozen=True)
class Micro:
    """Whole groups for one forward pass: the pairs that are trained on, those only the E-step looks at, and the groups' numbers (G,)."""

    train: Batch
    context: Batch | None
    groups: torch.Tensor


# --- one step ------------------------------------------------------------------------------------------------------------------------


def chunks(batch: Batch, sequence: torch.Tensor, head_rows: int, whole_groups: bool):
    """Cuts a micro-batch into runs of pairs of about head_rows response tokens: yields (first pair, last pair, first token, last token)."""
    ends = torch.bincount(sequence // 2, minlength=len(batch.ids)).cumsum(0).tolist()          # tokens up to and with each pair
    group, first = batch.group.tolist(), 0
    for b in range(len(ends)):
        cut = b + 1 == len(ends) or (ends[b + 1] - (ends[first - 1] if first else 0) > head_rows and not (whole_groups and group[b] == group[b + 1]))
        if cut and (head_rows or b + 1 == len(ends)):
            yield first, b + 1, ends[first - 1] if first else 0, ends[b]
            first = b + 1


def accumulate(experts, micro: Micro, ref_logp: torch.Tensor, log_w: torch.Tensor, log_q: torch.Tensor | None, pairs: int, config) -> list[tuple]:
    """Adds one micro-batch's gradient of sum_pairs M8 / pairs. log_q (G,K) if the responsibilities are already known, else None.

    Returns per chunk (log_q of the groups, log_q of the pairs, h), detached.
    """
    batch, known, seen = micro.train, log_q, []
    where, targets, sequence = response_positions(batch)                    # (M,) each
    rows = experts.rows(experts.hidden(batch.ids.flatten(0, 1)), where)     # (M,C), or (K,M,C) for independent models
    split = config.head_rows > 0
    states = rows.detach().requires_grad_(rows.requires_grad) if split else rows
    for p, p_end, m, m_end in chunks(batch, sequence, config.head_rows, whole_groups=known is None):
        logps = experts.token_logps(states[..., m:m_end, :], targets[m:m_end], tile=None if split else 4096)         # (K,m)
        logp = sum_responses(logps, sequence[m:m_end] - 2 * p, p_end - p)                                            # (b,K,2)
        h = margins(logp, ref_logp[batch.pair[p:p_end], None].to(logp), config.beta)                                 # (b,K)  M4
        group = batch.group[p:p_end]
        if known is None:
            base = int(group[0])
            log_q = e_step(log_w, h, group - base)[1]                                                                # (g,K)  M7, M11
            of_pair = log_q[group - base]
        else:
            of_pair = known[group]
        loss = expert_loss(of_pair, h).sum() / pairs                                                                 # M8
        loss.backward()
        seen.append((log_q, of_pair, h.detach()))
    if split and rows.requires_grad:
        rows.backward(states.grad)                                          # one pass through the trunk
    return seen


def step(experts, optimizer, micros: list[Micro], ref_logp: torch.Tensor, log_w: torch.Tensor, given: torch.Tensor | None, config) -> tuple[dict, torch.Tensor]:
    """One optimizer step on whole groups. given (all groups, K): responsibilities to use if no group of the step has NaN; else the E-step computes all.

    Returns the step's figures (parameters before the update) and the responsibilities used, (groups of the step, K).
    """
    pairs, used, seen = sum(len(m.train.ids) for m in micros), [], []
    known = given is not None and not given[torch.cat([m.groups for m in micros])].isnan().any()   # of the step: not of one micro-batch
    for micro in micros:
        if known:
            log_q = given[micro.groups].to(log_w.device)
        else:
            log_q = context_posterior(experts, micro, ref_logp, log_w, config) if micro.context is not None else None
        parts = accumulate(experts, micro, ref_logp, log_w, log_q, pairs, config)
        used.append(torch.cat([q for q, _, _ in parts]) if log_q is None else log_q)
        seen += parts
    h, of_pair = torch.cat([h for *_, h in seen]), torch.cat([q for _, q, _ in seen])
    figures = step_summary(of_pair, log_w, h) | {"pairs": pairs}
    figures["grad_norm"] = descend(optimizer, figures["loss"], config.clip)
    return figures, torch.cat(used)


def descend(optimizer, loss: float, clip: float) -> float:
    """Clips the accumulated gradients, steps, clears them; returns their norm before. Raises: FloatingPointError, and steps nowhere, on NaN or infinity."""
    norm = float(torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def minimise(loss: torch.Tensor, optimizer, clip: float) -> float:
    """One step on a scalar loss, for supervised fine-tuning (data/finetune.py); returns the loss."""
    loss.backward()
    descend(optimizer, loss.item(), clip)
    return loss.item()


@torch.no_grad()
def context_posterior(experts, micro: Micro, ref_logp: torch.Tensor, log_w: torch.Tensor, config) -> torch.Tensor:
    """The out-of-sample E-step: q of each group from its context pairs, which the M-step never trains on. (G,K)"""
    h = margins(pair_logp(experts, micro.context), ref_logp[micro.context.pair, None].to(log_w), config.beta)
    return e_step(log_w, h, micro.context.group)[1]


@torch.no_grad()
def check_start(experts, micro: Micro, ref_logp: torch.Tensor, log_w: torch.Tensor, config) -> None:
    """Step-0 invariants, before anything breaks the tie: margins 0, loss ln 2, q = w, ELBO = log-marginal."""
    h = margins(pair_logp(experts, micro.train), ref_logp[micro.train.pair, None].to(log_w), config.beta)            # (B,K)
    slack = config.beta * (1e-3 if experts.dtype == torch.float32 else 1.0)  # nats a response: rounding that depends on the batch's shape
    assert h.abs().max() <= slack, f"margins at step 0 are up to {h.abs().max():.3g}, want 0 within {slack:.1g}: policy and reference differ"
    log_p, log_q = e_step(log_w, h)
    assert (log_p + math.log(2)).abs().max() <= slack, f"loss at step 0 is {-log_p.mean():.6f}, want ln 2"
    assert (log_q.exp() - log_w.exp()).abs().max() <= slack, f"responsibilities at step 0 differ from the weights by {(log_q.exp() - log_w.exp()).abs().max():.3g}"
    assert (elbo(log_q, log_w, h) - log_marginal(log_w, h)).abs().max() <= 1e-5, "the bound is not tight at the exact posterior"


# --- one run ------------------------------------------------------------------------------------------------------------------------


def first_weights(config) -> torch.Tensor:
    """log w (K,) at the start (M10)."""
    if config.weights in ("uniform", "update"):
        return torch.full((config.experts,), -math.log(config.experts))
    w = torch.tensor(configs.convert(config.weights, tuple[float, ...], "--weights"))
    if len(w) != config.experts or (w <= 0).any():
        raise InputError(f"--weights: got {config.weights!r}, wanted uniform, update, or {config.experts} positive numbers")
    return torch.log(w / w.sum())


def first_responsibilities(config, units: list[list[int]], features: torch.Tensor) -> torch.Tensor | None:
    """log q (G,K) that breaks the symmetry for start_steps steps: random, or from the same mixture with linear rewards on frozen features."""
    if config.experts == 1 or config.start == "none":
        return None
    if config.start == "dirichlet":
        return random_responsibilities(len(units), config.experts, torch.Generator().manual_seed(config.seed))
    if config.start != "linear":
        raise InputError(f"--start: got {config.start!r}, wanted dirichlet, linear or none")
    index, group = [i for unit in units for i in unit], [g for g, unit in enumerate(units) for _ in unit]
    x = features[index, 0] - features[index, 1]                             # (P,C) chosen minus rejected
    x = x / x.square().mean(0).sqrt().clamp_min(1e-6)
    fit = linear_mixture(x, torch.tensor(group), config.experts, l2=1e-2 * len(x), starts=config.restarts, seed=config.seed)
    print(f"linear start: bounds of {config.restarts} starts {', '.join(f'{b:.1f}' for b in fit.bounds)}; mean q {fit.log_q.exp().mean(0).tolist()}")
    return fit.log_q


def micro_batches(pairs: list[Pair], units: list[list[int]], ids: list[int], config, device) -> list[Micro]:
    """The groups `ids` in runs of whole groups with about config.micro trained pairs each."""
    aside = config.estep == "context"
    runs, size = [[]], 0
    for g in ids:
        count = sum(not (aside and pairs[i].context) for i in units[g])
        if runs[-1] and size + count > config.micro:
            runs.append([])
            size = 0
        runs[-1].append(g)
        size += count
    out = []
    for run in runs:
        index = [i for g in run for i in units[g]]
        trained = [i for i in index if not (aside and pairs[i].context)]
        held = [i for i in index if aside and pairs[i].context]
        context = collate(pairs, held, config.latent).to(device) if held else None
        out.append(Micro(collate(pairs, trained, config.latent).to(device), context, torch.tensor(run)))
    return out


def prepare(config):
    """Everything the loop needs: experts, pairs, units, reference, device. Prints what it found and decided."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, why = compute_dtype(config.dtype, device)
    folder = config.data_folder or None
    tokenizer = load_tokenizer(config.model, folder)
    pairs = read_preferences(config.data, tokenizer, config.max_prompt, config.max_response, config.drop)
    if config.estep == "context":
        pairs = mark_context(pairs, config.context, config.seed)
    model = load_model(config.model, device=device, data=folder)
    check_lengths(pairs, model.config.context)
    model.checkpointing = config.checkpointing
    units = groups(pairs, config.latent)
    print(f"{len(pairs)} pairs in {len(units)} groups ({config.latent}); products in {str(dtype).removeprefix('torch.')}: {why}")
    key = (content_key(model), data_key(config.data), tokenizer.key, config.max_prompt, config.max_response, config.drop, str(dtype), device)
    store = Path(config.out).parent / "cache"
    reference = cached_reference(store, key, lambda: compute_reference(model, pairs, dtype, progress=Progress("reference")))
    return make_experts(model, config, dtype), pairs, units, reference, device


def validate(config: TrainConfig) -> None:
    """Refuses options that contradict each other; nothing is ignored in silence."""
    choices = {"sharing": ("heads", "models"), "latent": ("pair", "user"), "estep": ("all", "context", "first"), "start": ("dirichlet", "linear", "none")}
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise InputError(f"--{name}: got {getattr(config, name)!r}, wanted one of {', '.join(known)}")
    least = {"experts": 1, "batch": 1, "micro": 1, "epochs": 1, "restarts": 1, "prior": 1, "rank": 0, "start_steps": 0, "warmup": 0, "head_rows": 0, "context": 0}
    above = {"beta": 0, "clip": 0, "lr": 0, "head_lr": 0}
    for name, bound in (least | above).items():
        if getattr(config, name) < bound or (name in above and getattr(config, name) == bound):
            raise InputError(f"--{name.replace('_', '-')}: got {getattr(config, name)}, wanted {'more than' if name in above else 'at least'} {bound}")
    for name, other, value in (("prior", "weights", "update"), ("restarts", "start", "linear")):
        if getattr(config, name) != getattr(TrainConfig, name) and getattr(config, other) != value:
            raise InputError(f"--{name} has no effect without --{other} {value}; choose it, or leave --{name} out")
    first_weights(config), compute_dtype(config.dtype, "cpu")               # each refuses what it does not know
    if config.context and config.estep != "context":
        raise InputError("--context sets pairs aside for --estep context; choose it, or leave --context out")
    if config.estep == "context" and config.latent != "user":
        raise InputError("--estep context infers a user's type from other pairs of the same user: it wants --latent user")
    if not config.train_trunk and (config.sharing == "models" or config.experts == 1):
        raise InputError("--train-trunk false leaves only expert heads to train: it wants --experts 2 or more and --sharing heads")


def run(config: TrainConfig) -> Path:
    """Trains, or goes on where an interrupted run of the same configuration stopped; returns the run directory."""
    validate(config)
    out = Path(config.out)
    same = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "data_folder", "save_minutes")} | {"data_key": data_key(config.data)}
    found = load_checkpoint(out, same)
    if found and found[1]["finished"]:
        print(f"{out}: finished before")
        return out
    print(json.dumps(dataclasses.asdict(config) | environment()))
    experts, pairs, units, reference, device = prepare(config)
    same |= {"model_key": content_key(experts.policy(0)[0])}                # still the reference
    found = load_checkpoint(out, same)
    optimizer, names = make_optimizer(experts, config.lr, config.head_lr)
    ref_logp, log_w = reference.logp.to(device), first_weights(config).to(device)
    start = first_responsibilities(config, units, reference.features)
    trained = [[i for i in unit if not (config.estep == "context" and pairs[i].context)] for unit in units]
    plan = [(epoch, ids) for epoch in range(config.epochs) for ids in batches(trained, config.batch, config.seed, epoch, pairs)]
    out.mkdir(parents=True, exist_ok=True)                                  # not before all input is known to be good
    configs.save(config, out / "config.json")
    table, t = torch.full((len(units), config.experts), torch.nan), 0      # (G,K) every group's last responsibilities; the step
    if found:
        tensors, state = found
        load_state(experts, {n.removeprefix("experts."): v for n, v in tensors.items() if n.startswith("experts.")}, out)
        load_optimizer_state(optimizer, names, tensors)
        table, log_w, t = tensors["table"], tensors["log_w"].to(device), state["step"]
        print(f"resumed at step {t} of {len(plan)}")
    else:
        check_start(experts, micro_batches(pairs, units, plan[0][1], config, device)[0], ref_logp, log_w, config)

    def save(finished: bool) -> None:
        tensors = {f"experts.{n}": v for n, v in trained_state(experts).items()} | {"table": table, "log_w": log_w}
        moments = {} if finished else optimizer_state(optimizer, names)
        save_checkpoint(out, tensors | moments, {"step": t, "finished": finished, "config": same})

    progress, saved = Progress(out.name), time.monotonic()
    log, log_of_q = keep_lines(out / "metrics.jsonl", t), keep_lines(out / "responsibilities.jsonl", t)
    while t < len(plan):
        epoch, ids = plan[t]
        given = start if start is not None and t < config.start_steps else table if config.estep == "first" else None
        set_rate(optimizer, t, len(plan), config.warmup)
        try:
            figures, log_q = step(experts, optimizer, micro_batches(pairs, units, ids, config, device), ref_logp, log_w, given, config)
        except FloatingPointError as error:
            lines = sorted(pairs[i].line for g in ids for i in trained[g])
            raise InputError(f"{config.data}: step {t}: {error}; nothing was updated. Lines of this batch: {lines}. Lower --lr, or look at these lines") from None
        t, table[ids] = t + 1, log_q.cpu()
        if config.weights == "update" and (t == len(plan) or plan[t][0] > epoch):
            log_w = update_weights(table[~table.isnan().any(1)], config.prior).to(device)                            # M10, once an epoch
        log.write(json.dumps({"step": t, "epoch": epoch, "rate": optimizer.param_groups[0]["lr"], "w": log_w.exp().tolist()} | figures) + "\n")
        log_of_q.write(json.dumps({"step": t, "groups": ids, "q": table[ids].exp().mul(1e4).round().div(1e4).tolist()}) + "\n")
        log.flush(), log_of_q.flush()
        progress(t, len(plan), f"loss {figures['loss']:.4f}  accuracy {' '.join(f'{a:.2f}' for a in figures['accuracy'])}")
        if time.monotonic() - saved > 60 * config.save_minutes and t < len(plan):
            save(finished=False)
            saved = time.monotonic()
    log.close(), log_of_q.close()
    save(finished=True)
    return out


def keep_lines(path: Path, steps: int):
    """A file with one line a step, opened for appending, cut back to the first `steps` lines: those of a step done again would stand twice."""
    kept = path.read_text().splitlines(keepends=True)[:steps] if path.exists() and steps else []
    path.write_text("".join(kept))
    return path.open("a")


def main(argv: list[str]) -> None:
    try:
        run(configs.parse(TrainConfig, argv, "python train.py"))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
