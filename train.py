"""Mix-DPO and MoE-DPO by stochastic variational EM:
`python train.py --data prefs.jsonl --model DIR --experts 2 --out runs/x`.

One optimizer step is `step`. For each micro-batch, `em_loss` makes the loss, and fast/backward.py takes its gradient:

    log-probs of K experts -> margins h                                   (M4)
    E-step:  q = posterior over experts, detached                         (M7, M11)
    M-step:  sum_k q_k * -log sigma(h_k)                                  (M8); one forward pass serves both
    M-step of the gate, on all visits of the step:  KL(q || w(x))         (M9), or fixed weights' closed form (M10)
    AdamW

One run is `run` (one process a directory, what memory refuses), in it `learn` (set-up, the loop, checkpoints), and for
each step of the plan `advance`, which carries responsibilities and weights on.

q is known before where it comes from the start (start.py), from a pair's first visit, or from context pairs, which have
a forward pass of their own (`posterior`).

The loss is a sum over pairs divided by the step's number of trained pairs, so the result does not depend on how a
step is cut into micro-batches or their parts. K = 1 is DPO.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo import config as configs
from mixdpo.config import InputError
from mixdpo.dpo import label_loss, margins, observed_margins
from mixdpo.evaluation.identifiability import counts_of, describe_counts
from mixdpo.experts import load_state, make_experts, once_a_step, pair_logp, projections, trained_state, trunks
from mixdpo.fast.backward import backward
from mixdpo.fast.memory import steady
from mixdpo.fast.optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_rate
from mixdpo.files.atomic import alone, must_be_writable
from mixdpo.gates import TRAINED, Inputs, gate_state, load_gate, make_gate
from mixdpo.metrics import step_summary
from mixdpo.mixture import balance, e_step, elbo, entropy, expert_loss, gate_loss, reweigh, update_weights, vary
from mixdpo.models.weights import content_key
from mixdpo.plan import Micro, make_plan, micro_batches
from mixdpo.preferences import Batch, check_lengths, data_key, read_preferences
from mixdpo.private.budget import Private, certify, drop_key, kept_key, spent_before
from mixdpo.private.dp_sgd import ClippedSum, Noise
from mixdpo.private.keys import Key
from mixdpo.runs import memory_estimate as fits
from mixdpo.runs.init_experts import adopt
from mixdpo.runs.options import TrainConfig, compared, short_run, validate
from mixdpo.runs.reference import load_references, reference_of
from mixdpo.runs.rundir import (
    Log,
    Progress,
    Stop,
    compute_dtype,
    environment,
    load_checkpoint,
    must_be_run,
    save_checkpoint,
)
from mixdpo.start import check_start, make_start
from mixdpo.text.records import lines
from mixdpo.variants.latent import Latent, apply_variant, latent_of, pooled

# --- one step ---------------------------------------------------------------------------------------------------------


def em_loss(batch: Batch, ref_logp: torch.Tensor, latent: Latent, pairs: int, config):
    """Everything that the method is: log-probs of some whole units -> the loss whose gradient is EM's M-step.

    Returns loss_of(logp (b,K,2), part: which pairs of the batch) -> sum of M8 / pairs, and of these pairs
    (log_q of the groups or None, log_q of each pair, log_w of each, h), detached.
    """
    device = ref_logp.device
    pair, group = batch.pair.to(device), batch.group.to(device)             # (B,) each

    def loss_of(logp: torch.Tensor, part: slice):
        h = margins(logp, ref_logp[pair[part]].to(logp), config.beta)                               # (b,K)  M4
        h = observed_margins(h, config.label_noise, config.label_loss)
        log_q, of_pair = responsibilities(latent, h, group[part], batch.group[part], config)        # M7, M11, M12
        loss = label_loss(lambda h: expert_loss(of_pair, h), h, config.label_noise, config.label_loss)      # (b,)  M8
        weight = 1.0 if latent.weight is None else latent.weight[group[part]]
        return (weight * loss).sum() / pairs, (log_q, of_pair, latent.log_w[group[part]], h.detach())

    return loss_of


def responsibilities(latent: Latent, h: torch.Tensor, group: torch.Tensor, places: torch.Tensor, config):
    """The E-step of some whole groups of a batch: log_q of the groups (g,K), and of each of their pairs (b,K). The
    first is None where responsibilities are given. group, places (b,): each pair's group, on h's device and the CPU."""
    if latent.given is not None:
        return None, latent.given[group]
    first, last = int(places[0]), int(places[-1])
    log_q = e_step(latent.prior[group], h, group - first)[1]                # (g,K)  M7, M11
    log_q = apply_variant(log_q, latent[first : last + 1], config)
    return log_q, log_q[group - first]


def accumulate(experts, micro: Micro, ref_logp: torch.Tensor, latent: Latent, pairs: int, config) -> list[tuple]:
    """Adds one micro-batch's gradient of sum M8 / pairs; returns what em_loss shows of each of its parts."""
    loss_of = em_loss(micro.train, ref_logp, latent, pairs, config)
    check = all_finite if config.in_backward else None
    return backward(experts, micro.train, loss_of, config.head_rows, config.packing, latent.given is None, check)


def all_finite(seen: list[tuple]) -> None:
    """Raises: FloatingPointError, while no parameter has stepped yet, if a margin is NaN or infinite."""
    if not all(h.isfinite().all() for *_, h in seen):
        raise FloatingPointError("margins that are not finite")


@torch.no_grad()
def posterior(experts, batch: Batch, ref_logp: torch.Tensor, log_w: torch.Tensor, config) -> torch.Tensor:
    """An E-step by a pass of its own: q of each group (G,K) from the pairs of `batch`, log_w (G,K). Out of sample if
    these are context pairs, which the M-step never trains on."""
    pair, group = batch.pair.to(log_w.device), batch.group.to(log_w.device)                   # (B,) each
    logp = pair_logp(experts, batch, packed=config.packing)                 # (B,K,2)
    h = margins(logp, ref_logp[pair].to(log_w), config.beta)                # (B,K)  M4
    h = observed_margins(h, config.label_noise, config.label_loss)
    return e_step(log_w[group], h, group)[1]                                # M7, M11


@torch.no_grad()
def full_e_step(experts, gate, plan, ref_logp, inputs: Inputs, config, name: str,
                between=lambda: None) -> tuple[torch.Tensor, torch.Tensor]:
    """Responsibilities of all units under the experts and the gate as they are (U,K), and the log-likelihoods of
    each visit's pairs (V,K), up to a constant a row. On the CPU. between: called after each micro-batch."""
    micros, loglik = micro_batches(plan, list(range(len(plan.visits))), config), []
    progress = Progress(f"{Path(config.out).name} {name}")
    for n, micro in enumerate(micros, 1):
        nothing = ref_logp.new_zeros(len(micro.units), config.experts)
        loglik.append(posterior(experts, micro.context or micro.train, ref_logp, nothing, config).cpu())
        progress(n, len(micros))
        between()
    loglik = torch.cat(loglik)
    return torch.log_softmax(gate(inputs).cpu() + pooled(loglik, plan), dim=-1), loglik       # M7, M11


def step(experts, gate, optimizer, micros: list[Micro], ref_logp: torch.Tensor, latent: Latent, config,
         clipped: ClippedSum | None = None) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """One optimizer step on whole visits, those of `latent` in the order of the micro-batches. clipped: for DP-SGD; its
    examples come one after another, experts' and gate's gradients of each are clipped as one.

    Returns the step's figures (parameters before the update), the responsibilities used (G,K), and the mean loss of
    each user's pairs (U+1,), NaN of those without any.
    """
    pairs, used, seen, of_group, first = sum(len(m.train.ids) for m in micros), [], [], [], 0
    share = pairs if clipped is None else 1                                 # an example's gradient is of its own sum
    for micro in micros:
        part = latent[first : first + len(micro.units)]
        of_group.append(first + micro.train.group.to(part.log_w.device))
        first += len(micro.units)
        if part.given is None and micro.context is not None:
            log_q = posterior(experts, micro.context, ref_logp, part.prior, config)
            part = dataclasses.replace(part, given=apply_variant(log_q, part, config))
        parts = accumulate(experts, micro, ref_logp, part, share, config)
        used.append(torch.cat([q for q, *_ in parts]) if part.given is None else part.given)
        seen += parts
        if clipped is not None:
            if gate.kind in TRAINED:
                gate_objective(gate, part, used[-1], config).backward()
            if micro.ends:
                clipped.add()
    if clipped is not None:
        clipped.release()                                                   # of an empty step too
    elif gate.kind in TRAINED:
        (gate_objective(gate, latent, torch.cat(used), config) / pairs).backward()
    if not micros:
        nothing = latent.log_w.new_full((1, config.experts), math.nan)
        norm = descend(optimizer, 0.0, math.inf)
        figures = step_summary(nothing, nothing, nothing) | {"pairs": 0, "bound": math.nan, "grad_norm": norm}
        figures["clipped"] = math.nan
        return figures, latent.log_w, latent.log_w.new_full((gate.users + 1,), math.nan)
    log_q = torch.cat(used)                                                 # (G,K)
    of_pair, w_of_pair, h = (torch.cat(column) for column in list(zip(*seen))[1:])
    figures = step_summary(of_pair, w_of_pair, h) | {"pairs": pairs}
    figures["bound"] = elbo(log_q, latent.log_w, h, torch.cat(of_group)).mean().item()      # M6, M11: what EM maximises
    figures["grad_norm"] = descend(optimizer, figures["loss"], math.inf if clipped else config.clip)
    if clipped is not None:
        figures["clipped"] = sum(norm > config.clip for norm in clipped.norms) / len(clipped.norms)
    user = latent.inputs.user[torch.cat(of_group)]                          # (B,)
    total = h.new_zeros(gate.users + 1).index_add(0, user, expert_loss(of_pair, h))         # (U+1,)
    return figures, log_q, total / user.bincount(minlength=gate.users + 1)  # 0/0 is NaN


def gate_objective(gate, latent: Latent, log_q: torch.Tensor, config) -> torch.Tensor:
    """The gate's loss, summed over units: M9, less what the entropy of each unit's weights and that of their mean are
    worth. The two pull apart: the first wants each w(x) flat, the second all experts used, by weights however sharp."""
    log_w = gate(latent.inputs)                                             # (G,K), with gradient
    share = torch.ones_like(log_w[:, 0]) if latent.share is None else latent.share          # (G,) a slice is not a unit
    loss = gate_loss(log_q, log_w)                                          # (G,)  M9
    if gate.kind in ("user", "prompt-user"):
        loss = loss + gate_loss(log_q, gate.generic(latent.inputs))
    loss = (share * (loss - config.gate_entropy * entropy(log_w))).sum()
    return loss - config.gate_balance * share.sum() * balance(log_w)


def descend(optimizer, loss: float, clip: float) -> float:
    """Clips the accumulated gradients, steps, clears them; returns their norm before.

    Raises: FloatingPointError, and steps nowhere, if the loss or the norm is NaN or infinite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    if norm > clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, torch.tensor(norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def minimise(loss: torch.Tensor, optimizer, clip: float) -> float:
    """One step on a scalar loss, for supervised fine-tuning (data/finetune.py); returns the loss."""
    loss.backward()
    descend(optimizer, loss.item(), clip)
    return loss.item()


# --- one run ----------------------------------------------------------------------------------------------------------


def prepare(config, between=lambda: None, private: Private | None = None):
    """Everything the loop needs: experts, plan, reference, what a checkpoint must have been written with, device.
    Prints what it decided. between: called after each batch of the reference's pass."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, why = compute_dtype(config.dtype, device)
    if config.packing and device == "cpu":
        raise InputError("got true, which needs a CUDA device; leave this option out", option="packing")
    print(*fits.describe_memory(config, dtype, fits.available(device)), sep="\n")
    models, tokenizer = load_references(config, device)
    for model in models:
        model.checkpointing = config.checkpointing
    if config.sharing == "lora":
        projections(models[0], config.targets)                              # an unknown one is told before long passes
    pairs = read_preferences(config.data, tokenizer, config.max_prompt, config.max_response, config.drop)
    check_lengths(pairs, min(model.config.context for model in models), config.data)
    with configs.lines_of(config.data):
        plan = make_plan(pairs, config, private and private.shuffled, private and (lambda *_: []))
    name, cache = str(dtype).removeprefix("torch."), Path(config.out).parent / "cache"
    trained = sum(len(visit.trained) for visit in plan.visits)
    slices = f", in {len(plan.visits)} slices" if len(plan.visits) > len(plan.units) else ""
    print(f"{len(pairs)} pairs, {len(pairs) - trained} of them set aside as context; the {trained} others in "
          f"{len(plan.units)} groups ({config.latent}){slices}; products in {name}: {why}")
    if config.experts > 1:
        pooled = config.latent == "user" or config.gate.endswith("user")    # either way a user's pairs speak together
        print(*describe_counts(counts_of(pairs), config.experts, "user" if pooled else "pair"), sep="\n")
    reference = reference_of(config.data, pairs, models, tokenizer, config, dtype, cache, between, private is not None)
    if not config.train_trunk:
        plan = dataclasses.replace(plan, pairs=reference.with_states(plan.pairs))
    keys, experts = [content_key(model) for model in models], make_experts(models, config, dtype)
    adopt(experts, config, keys)
    if config.compile:
        for model in trunks(experts):
            model.compile(dynamic=True)
    keys = {"model_key": "+".join(keys), "tokenizer_key": tokenizer.key, "dtype": name}
    return experts, plan, reference, keys, device


def given_responsibilities(t: int, plan, start, table, kept, e_step_of_all, config):
    """What step t takes as known, log q of all units (U,K), or None: its E-step is its own. And `kept`: log q of this
    M-phase, which an epoch's first step computes anew (em = full); or each visit's log-likelihoods (em =
    incremental), which takes one pass over all pairs before the first E-step that looks up a user's other slices."""
    if start is not None and t < config.start_steps:
        return start, kept
    if config.estep == "first":
        return table, kept
    if config.em == "full":
        if kept.isnan().any() or t == 0 or plan.steps[t - 1][0] < plan.steps[t][0]:
            phase = e_step_of_all(f"E-step {plan.steps[t][0] + 1}")[0]
            kept = vary(phase, config.variant, None, config.variant_temperature)        # M12
        return kept, kept
    if config.em == "incremental" and config.latent == "user" and kept.isnan().any():
        kept = e_step_of_all("first E-step")[1]
    return None, kept


@dataclass
class Carried:
    """What a run carries from step to step, beside weights and moments."""

    t: int                          # steps done
    table: torch.Tensor             # (U,K) log q of each unit as last used, NaN before
    kept: torch.Tensor              # (V,K) what em = full or incremental keeps, NaN before
    log_v: torch.Tensor             # (U+1,) log weights of the users in the loss, the unknown one first
    user_loss: torch.Tensor         # (U+1,) each user's loss as last seen

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "t"}


def advance(experts, gate, optimizer, plan, ref_logp, inputs: Inputs, start, carried: Carried, e_step_of_all,
            config, noise: Noise | None = None) -> tuple[dict, list[int]]:
    """Takes the next step of the plan, and carries on. Returns its figures, and the units it looked at.
    Raises: FloatingPointError, and changes nothing."""
    t, (epoch, ids) = carried.t, plan.steps[carried.t]
    gate.temperature = config.gate_temperature ** max(0.0, 1 - 2 * t / len(plan.steps))     # 1 from half the run on
    given, kept = given_responsibilities(t, plan, start, carried.table, carried.kept, e_step_of_all, config)
    set_rate(optimizer, t, len(plan.steps), config.warmup)
    micros = micro_batches(plan, ids, config, apart=noise is not None)
    latent = latent_of(gate, inputs, plan, ids, given, kept, t, config, carried.log_v if config.robust else None)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    clipped = None if noise is None else ClippedSum(parameters, noise, t)
    figures, log_q, losses = step(experts, gate, optimizer, micros, ref_logp, latent, config, clipped)
    last = {plan.visits[v].unit: n for n, v in enumerate(ids)}              # of several slices of a user, the last
    carried.table[list(last)] = log_q[list(last.values())].cpu()
    if latent.loglik is not None:
        kept[ids] = latent.loglik.cpu()
    carried.t, carried.kept = t + 1, kept
    carried.log_v, carried.user_loss = reweigh(carried.log_v, carried.user_loss, losses, config.robust)
    if config.weights == "update":
        gate.log_w.copy_(update_weights(carried.table[~carried.table.isnan().any(1)], config.prior))        # M10
    return {"step": t + 1, "epoch": epoch, "rate": optimizer.param_groups[0]["lr"]} | figures, list(last)


def learn(config: TrainConfig, same: dict, stop: Stop, private: Private | None = None) -> None:
    """All steps that are left. same: what a checkpoint must have been written with. Raises: Stopped, all saved."""
    out, (experts, plan, reference, keys, device) = Path(config.out), prepare(config, stop.check, private)
    same = same | keys
    plan, noise, guarantee = private.budgeted(plan, config) if private else (plan, None, None)
    print(end="".join(f"{line}\n" for line in short_run(config, len(plan.steps))))
    ref_logp, (gate, inputs) = reference.logp.to(device), make_gate(plan, reference, config, device)
    optimizer, names = make_optimizer(experts, config.lr, config.head_lr, gate, config.gate_lr, config.moments,
                                      config.seed, once_a_step(experts) if config.in_backward else [])
    if config.robust and not gate.users:
        raise InputError("no line names a user, and --robust weighs users; leave it out", config.data, option="robust")
    drawn = private and private.start(plan, config.experts, config.latent)
    start = make_start(gate, inputs, plan, reference.features, config, drawn)
    carried = resumed(out, same, experts, gate, optimizer, names, device)
    configs.save(config, out / "config.json")                               # not before all input is known to be good
    if carried:
        print(f"resumed at step {carried.t} of {len(plan.steps)}")
    else:
        users = inputs.user.bincount(minlength=gate.users + 1).clamp_max(1).log().to(ref_logp)              # (U+1,)
        never = 0.0 if config.experts == 1 else torch.nan                   # one expert: log q = 0 without any E-step
        carried = Carried(0, torch.full((len(plan.units), config.experts), never),
                          torch.full((len(plan.visits), config.experts), torch.nan), users,
                          torch.full_like(users, math.log(2)))              # the loss where experts are the reference
    if carried.t == 0 and not config.init_experts:
        first = micro_batches(plan, plan.steps[0][1] or [0], config)[0]
        log_w = gate(inputs[first.units]).detach()[first.train.group.to(device)]
        check_start(experts, first.train, ref_logp, log_w, config.beta)

    def e_step_of_all(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return full_e_step(experts, gate, plan, ref_logp, inputs, config, name, leave_if_asked)

    def save(finished: bool) -> None:
        log.sync()
        moments = {} if finished else optimizer_state(optimizer, names)
        save_checkpoint(out, trained_state(experts) | gate_state(gate) | moments | carried.tensors(),
                        {"step": carried.t, "finished": finished, "config": same, "device": device},
                        1 if finished else config.keep)

    def leave_if_asked() -> None:
        """In an E-step nothing has changed since the step before it: that is saved, and the E-step is done again."""
        if stop.asked and carried.t:
            save(finished=False)
        stop.check(f"stopped and saved after step {carried.t} of {len(plan.steps)}" if carried.t else None)

    log, saved = Log(out, carried.t, len(plan.steps), config), time.monotonic()
    while carried.t < len(plan.steps):
        try:
            figures, units = advance(experts, gate, optimizer, plan, ref_logp, inputs, start, carried, e_step_of_all,
                                     config, noise)
        except FloatingPointError as error:
            raise InputError(nonfinite_message(error, plan, carried.t, config), config.data, option="lr") from None
        log.step(figures, units, carried.table[units])
        if carried.t < len(plan.steps):
            leave_if_asked()
            if time.monotonic() - saved > 60 * config.save_minutes:
                save(finished=False)
                saved = time.monotonic()
    gate.temperature = 1.0                                                  # a run of one step ends before it is there
    if config.experts > 1 and config.estep != "first":                      # a first visit is kept for good
        carried.table = e_step_of_all("last E-step")[0]
        log.responsibilities(carried.t, list(range(len(carried.table))), carried.table)
    certify(out, guarantee)                                                 # not before all steps are done
    save(finished=True)
    log.close()
    drop_key(out)


def resumed(out: Path, same: dict, experts, gate, optimizer, names: list[str], device) -> Carried | None:
    """Puts the run's newest whole checkpoint back; None if there is none."""
    if (found := load_checkpoint(out, same)) is None:
        return None
    tensors, state = found
    if state["device"] != device:
        print(f"{out}: begun on {state['device']}, goes on on {device}: the same steps, up to rounding")
    load_state(experts, tensors, out)
    load_gate(gate, tensors)
    load_optimizer_state(optimizer, names, tensors)
    return Carried(state["step"], tensors["table"], tensors["kept"],
                   *(tensors[name].to(device) for name in ("log_v", "user_loss")))


def nonfinite_message(error: FloatingPointError, plan, t: int, config) -> str:
    """What to say of a step that gave no number. Its lines are copied beside the run, to be looked at."""
    numbers = {plan.pairs[i].line for v in plan.steps[t][1] for i in plan.visits[v].trained}
    path = Path(config.out) / f"step-{t}.jsonl"
    path.write_bytes(b"".join(raw for n, raw in enumerate(lines(config.data), 1) if n in numbers))
    return (f"step {t}: {error}; nothing was updated. Lines of this batch: {sorted(numbers)}; they are in {path}. "
            "Lower --lr, or look at these lines")


def run(config: TrainConfig, key: Key | None = None) -> Path:
    """Trains, or goes on where an interrupted run of the same configuration stopped; returns the run directory.
    key: of a private run on made data, where nothing is secret; default: a fresh secret, kept until it is finished.

    Raises: InputError on bad input, where another process is at work in the directory, and where memory is too small;
    Stopped if SIGINT or SIGTERM asked for it.
    """
    validate(config)
    must_be_run(config)
    same = compared(config) | {"data_key": data_key(config.data)}
    try:
        with alone(Path(config.out)), Stop(config.out) as stop:
            found = load_checkpoint(Path(config.out), same)
            if found and found[1]["finished"]:
                print(f"{config.out}: finished before")
                drop_key(Path(config.out))                                  # if it was killed before it could
            else:
                must_be_writable(Path(config.out))                          # told before long passes, not after
                print(configs.to_json(dataclasses.asdict(config) | environment()))
                private = None
                if config.epsilon < math.inf:
                    sources = spent_before(config)
                    private = Private(key or kept_key(Path(config.out), same, found is not None), sources)
                learn(config, same, stop, private)
    except RuntimeError as error:                                           # CUDA's out-of-memory is one, too
        if not fits.exceeded(error):
            raise
        raise InputError(fits.smaller(config, error), option="micro") from None
    return Path(config.out)


def main(argv: list[str]) -> None:
    steady()
    run(configs.parse(TrainConfig, argv, "python train.py"))


if __name__ == "__main__":
    configs.command(main)
