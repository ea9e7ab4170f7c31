"""Mix-DPO by stochastic variational EM: `python train.py --data prefs.jsonl --model DIR --experts 2 --out runs/x`.

One optimizer step, top to bottom, is `step` and `accumulate` below:

    hidden states of the trunk                                            one forward pass serves E and M
    for each chunk of whole pairs (whole users):
        log-probs of K experts -> margins h                               (M4)
        E-step:  q = posterior over experts, detached                     (M7, M11)
        M-step:  sum_k q_k * -log sigma(h_k), backward into states and heads  (M8)
    one backward pass of the trunk, then AdamW

The loss is a sum over pairs divided by the step's number of trained pairs, so the result does not depend on how a
step is cut into micro-batches or chunks. K = 1 is DPO. Only this file calls backward.
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
from mixdpo.experts import load_state, make_experts, pair_logp, projections, trained_state
from mixdpo.logprob import TILE, sum_responses
from mixdpo.mixture import e_step, expert_loss, update_weights
from mixdpo.optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_rate
from mixdpo.plan import Micro, make_plan, micro_batches
from mixdpo.preferences import Batch, check_lengths, data_key, read_preferences, response_positions
from mixdpo.reference import reference_of
from mixdpo.rundir import Progress, compute_dtype, environment, keep_lines, load_checkpoint, save_checkpoint
from mixdpo.start import check_start, first_responsibilities, first_weights
from mixdpo.tokenizer import load_tokenizer
from mixdpo.weights import content_key, load_model


@dataclass(frozen=True)
class TrainConfig:
    """Trains DPO (experts = 1) or a mixture on preferences (JSON Lines: prompt, chosen, rejected, maybe user)."""

    data: str                       # preference file, .jsonl or .jsonl.gz
    model: str                      # reference and start: gpt2, smollm2, llama-3.2-1b or a Hugging Face directory
    out: str                        # run directory; an unfinished run in it is resumed
    experts: int = 2                # K; 1 is DPO
    sharing: str = "heads"          # heads: one trunk, K unembeddings; lora: frozen model, K adapters; models: K models
    rank: int = 16                  # rank of the heads W + A_k B_k (0: full heads) or of the adapters W + 2 B_k A_k
    targets: str = ""               # lora: projections with adapters, comma-separated; empty: c_attn, or q_proj,v_proj
    train_trunk: bool = True        # false: only the heads learn
    latent: str = "pair"            # one type a pair, or one a user (M11)
    estep: str = "all"              # E-step on: all pairs, context (never trained on), first (a pair's first visit)
    context: int = 0                # pairs of each user set aside for the E-step, where the file does not mark them
    weights: str = "uniform"        # mixture weights (M10): uniform, update (closed form, each epoch), or 0.3,0.7
    prior: float = 1.0              # Dirichlet prior of the closed-form update
    start: str = "dirichlet"        # first responsibilities: dirichlet (random), linear (linear rewards), none (saddle)
    start_steps: int = 10           # optimizer steps that use them before the E-step takes over
    restarts: int = 5               # starts of the linear mixture; the best bound is taken
    beta: float = 0.1               # strength of the pull to the reference, per nat
    lr: float = 2e-5                # AdamW's peak learning rate
    head_lr: float = 1e-3           # the same for the low-rank factors A_k, B_k of heads or adapters
    epochs: int = 1                 # passes over the data
    batch: int = 32                 # pairs an optimizer step, at most; whole users
    micro: int = 16                 # pairs a forward pass, at most; whole users, so one large user may exceed it
    head_rows: int = 1024           # response tokens a head micro-batch, about; 0: all at once, in vocabulary tiles
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


# --- one step ---------------------------------------------------------------------------------------------------------


def accumulate(experts, micro: Micro, ref_logp: torch.Tensor, log_w: torch.Tensor, log_q: torch.Tensor | None,
               pairs: int, config) -> list[tuple]:
    """Adds one micro-batch's gradient of sum M8 / pairs. log_q (G,K) if the responsibilities are known, else None.

    Returns (log_q of the groups, log_q of the pairs, h) of every chunk, detached.
    """
    batch, known, seen = micro.train, log_q, []
    where, targets, sequence = response_positions(batch)                    # (M,) each
    rows = experts.rows(experts.hidden(batch.ids.flatten(0, 1)), where)     # (M,C), or (K,M,C): states of their own
    split = config.head_rows > 0
    states, heads = rows.detach().requires_grad_(rows.requires_grad) if split else rows, experts.heads()
    for p, p_end, m, m_end in chunks(batch, sequence, config.head_rows, whole_groups=known is None):
        tile = None if split else TILE                                      # few rows: keep their logits
        logps = experts.token_logps(states[..., m:m_end, :], targets[m:m_end], tile, heads)         # (K,m)
        logp = sum_responses(logps, sequence[m:m_end] - 2 * p, p_end - p)                           # (b,K,2)
        h = margins(logp, ref_logp[batch.pair[p:p_end], None].to(logp), config.beta)                # (b,K)  M4
        group = batch.group[p:p_end]
        if known is None:
            first = int(group[0])
            log_q = e_step(log_w, h, group - first)[1]                                              # (g,K)  M7, M11
            of_pair = log_q[group - first]
        else:
            of_pair = known[group]
        loss = expert_loss(of_pair, h).sum() / pairs                                                # M8
        loss.backward()
        seen.append((log_q, of_pair, h.detach()))
    if split and rows.requires_grad:
        rows.backward(states.grad)                                          # one pass through the trunk
    return seen


def chunks(batch: Batch, sequence: torch.Tensor, head_rows: int, whole_groups: bool):
    """Cuts a micro-batch into runs of whole pairs (groups) of about head_rows response tokens; 0: no cut.

    Yields (first pair, one past the last, first token, one past the last).
    """
    ends = torch.bincount(sequence // 2, minlength=len(batch.ids)).cumsum(0).tolist()       # where its tokens end
    group, first, begin = batch.group.tolist(), 0, 0
    for b, end in enumerate(ends):
        last = b + 1 == len(ends)
        full = head_rows > 0 and not last and ends[b + 1] - begin > head_rows
        if last or full and not (whole_groups and group[b] == group[b + 1]):
            yield first, b + 1, begin, end
            first, begin = b + 1, end


@torch.no_grad()
def context_posterior(experts, micro: Micro, ref_logp: torch.Tensor, log_w: torch.Tensor, config) -> torch.Tensor:
    """The out-of-sample E-step: q of each group (G,K) from its context pairs, which the M-step never trains on."""
    h = margins(pair_logp(experts, micro.context), ref_logp[micro.context.pair, None].to(log_w), config.beta)
    return e_step(log_w, h, micro.context.group)[1]


def step(experts, optimizer, micros: list[Micro], ref_logp: torch.Tensor, log_w: torch.Tensor,
         given: torch.Tensor | None, config) -> tuple[dict, torch.Tensor]:
    """One optimizer step on whole groups. given (all groups, K): responsibilities to use, if none of the step's is NaN.

    Returns the step's figures (parameters before the update) and the responsibilities used, (groups of the step, K).
    """
    pairs, used, seen = sum(len(m.train.ids) for m in micros), [], []
    known = given is not None and not given[torch.cat([m.groups for m in micros])].isnan().any()    # all or none
    for micro in micros:
        log_q = given[micro.groups].to(log_w.device) if known else None
        if log_q is None and micro.context is not None:
            log_q = context_posterior(experts, micro, ref_logp, log_w, config)
        parts = accumulate(experts, micro, ref_logp, log_w, log_q, pairs, config)
        used.append(torch.cat([q for q, _, _ in parts]) if log_q is None else log_q)
        seen += parts
    h, of_pair = torch.cat([h for *_, h in seen]), torch.cat([q for _, q, _ in seen])
    figures = step_summary(of_pair, log_w, h) | {"pairs": pairs}
    figures["grad_norm"] = descend(optimizer, figures["loss"], config.clip)
    return figures, torch.cat(used)


def descend(optimizer, loss: float, clip: float) -> float:
    """Clips the accumulated gradients, steps, clears them; returns their norm before.

    Raises: FloatingPointError, and steps nowhere, if the loss or the norm is NaN or infinite.
    """
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


# --- one run ----------------------------------------------------------------------------------------------------------


def prepare(config):
    """Everything the loop needs: experts, plan, reference, device. Prints what it found and decided."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, why = compute_dtype(config.dtype, device)
    folder = config.data_folder or None
    tokenizer = load_tokenizer(config.model, folder)
    model = load_model(config.model, device=device, data=folder)
    model.checkpointing = config.checkpointing
    if config.sharing == "lora":
        projections(model, config.targets)                                  # an unknown one is told before long passes
    pairs = read_preferences(config.data, tokenizer, config.max_prompt, config.max_response, config.drop)
    try:
        check_lengths(pairs, model.config.context)
        plan = make_plan(pairs, config)
    except InputError as error:
        raise InputError(f"{config.data}: {error}") from None
    name, cache = str(dtype).removeprefix("torch."), Path(config.out).parent / "cache"
    print(f"{len(pairs)} pairs in {len(plan.units)} groups ({config.latent}); products in {name}: {why}")
    reference = reference_of(config.data, pairs, model, tokenizer, config, dtype, cache)
    return make_experts(model, config, dtype), plan, reference, device


def validate(config: TrainConfig) -> None:
    """Refuses options that contradict each other; nothing is ignored in silence."""
    choices = {"sharing": ("heads", "lora", "models"), "latent": ("pair", "user"), "estep": ("all", "context", "first"),
               "start": ("dirichlet", "linear", "none")}
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise InputError(f"--{name}: got {getattr(config, name)!r}, wanted one of {', '.join(known)}")
    least = {"experts": 1, "batch": 1, "micro": 1, "epochs": 1, "restarts": 1, "prior": 1, "rank": 0, "start_steps": 0,
             "warmup": 0, "head_rows": 0, "context": 0}
    above = {"beta": 0, "clip": 0, "lr": 0, "head_lr": 0}
    for name, bound in (least | above).items():
        value, word = getattr(config, name), "more than" if name in above else "at least"
        if value < bound or (name in above and value == bound):
            raise InputError(f"--{name.replace('_', '-')}: got {value}, wanted {word} {bound}")
    for name, other, value in (("prior", "weights", "update"), ("restarts", "start", "linear"),
                               ("targets", "sharing", "lora")):
        if getattr(config, name) != getattr(TrainConfig, name) and getattr(config, other) != value:
            raise InputError(f"--{name} has no effect without --{other} {value}; choose it, or leave --{name} out")
    first_weights(config), compute_dtype(config.dtype, "cpu")               # each refuses what it does not know
    if config.context and config.estep != "context":
        raise InputError("--context sets pairs aside for --estep context; choose it, or leave --context out")
    if config.estep == "context" and config.latent != "user":
        raise InputError("--estep context looks at other pairs of the same user: it wants --latent user")
    if config.estep == "first" and config.start == "dirichlet" and config.start_steps and config.experts > 1:
        raise InputError("--estep first keeps a pair's first responsibilities, and random ones would stay for ever: "
                         "it wants --start linear or none, or --start-steps 0")
    if not config.train_trunk and (config.sharing != "heads" or config.experts == 1):
        raise InputError("--train-trunk false trains expert heads alone: it wants --experts 2 or more, --sharing heads")
    if config.sharing == "lora" and config.rank == 0:
        raise InputError("--rank 0 means full heads; --sharing lora wants a rank of 1 or more")
    if config.sharing == "lora" and config.lr != TrainConfig.lr:
        raise InputError("--lr has no effect with --sharing lora, whose adapters learn at --head-lr; give that instead")


def run(config: TrainConfig) -> Path:
    """Trains, or goes on where an interrupted run of the same configuration stopped; returns the run directory."""
    validate(config)
    out = Path(config.out)
    same = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "data_folder", "save_minutes")}
    same |= {"data_key": data_key(config.data)}
    found = load_checkpoint(out, same)
    if found and found[1]["finished"]:
        print(f"{out}: finished before")
        return out
    print(json.dumps(dataclasses.asdict(config) | environment()))
    experts, plan, reference, device = prepare(config)
    same |= {"model_key": content_key(experts.policy(0)[0])}                # still the reference
    found = load_checkpoint(out, same)
    optimizer, names = make_optimizer(experts, config.lr, config.head_lr)
    ref_logp, log_w = reference.logp.to(device), first_weights(config).to(device)
    start, steps = first_responsibilities(config, plan.units, reference.features), plan.steps
    out.mkdir(parents=True, exist_ok=True)                                  # not before all input is known to be good
    configs.save(config, out / "config.json")
    table, t = torch.full((len(plan.units), config.experts), torch.nan), 0       # (G,K) last responsibilities; the step
    if found:
        tensors, state = found
        load_state(experts, tensors, out)
        load_optimizer_state(optimizer, names, tensors)
        table, log_w, t = tensors["table"], tensors["log_w"].to(device), state["step"]
        print(f"resumed at step {t} of {len(steps)}")
    else:
        first = micro_batches(plan, steps[0][1], config, device)[0].train
        check_start(experts, first, ref_logp, log_w, config.beta)

    def save(finished: bool) -> None:
        moments = {} if finished else optimizer_state(optimizer, names)
        tensors = trained_state(experts) | moments | {"table": table, "log_w": log_w}
        save_checkpoint(out, tensors, {"step": t, "finished": finished, "config": same})

    progress, saved = Progress(out.name, t), time.monotonic()
    log, log_of_q = keep_lines(out / "metrics.jsonl", t), keep_lines(out / "responsibilities.jsonl", t)
    while t < len(steps):
        epoch, ids = steps[t]
        given = start if t < config.start_steps else None
        if given is None and config.estep == "first":
            given = table
        set_rate(optimizer, t, len(steps), config.warmup)
        micros = micro_batches(plan, ids, config, device)
        try:
            figures, log_q = step(experts, optimizer, micros, ref_logp, log_w, given, config)
        except FloatingPointError as error:
            lines = sorted(plan.pairs[i].line for g in ids for i in plan.trained[g])
            raise InputError(f"{config.data}: step {t}: {error}; nothing was updated. Lines of this batch: {lines}. "
                             "Lower --lr, or look at these lines") from None
        t, log_q, w = t + 1, log_q.cpu(), log_w.exp().tolist()              # w: what this step used
        table[ids] = log_q
        if config.weights == "update" and (t == len(steps) or steps[t][0] > epoch):
            log_w = update_weights(table[~table.isnan().any(1)], config.prior).to(device)           # M10, once an epoch
        rate, q = optimizer.param_groups[0]["lr"], log_q.exp().mul(1e4).round().div(1e4)
        log.write(json.dumps({"step": t, "epoch": epoch, "rate": rate, "w": w} | figures) + "\n")
        log_of_q.write(json.dumps({"step": t, "groups": ids, "q": q.tolist()}) + "\n")
        log.flush(), log_of_q.flush()
        accuracy = " ".join(f"{a:.2f}" for a in figures["accuracy"])
        progress(t, len(steps), f"loss {figures['loss']:.4f}  accuracy {accuracy}")
        if time.monotonic() - saved > 60 * config.save_minutes and t < len(steps):
            save(finished=False)
            saved = time.monotonic()
    log.close(), log_of_q.close()
    save(finished=True)
    return out


def main(argv: list[str]) -> None:
    try:
        run(configs.parse(TrainConfig, argv, "python train.py"))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
