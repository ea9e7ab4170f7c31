"""Mix-DPO and MoE-DPO by stochastic variational EM: `python train.py --data prefs.jsonl --model DIR --out runs/x`.

One optimizer step, `step`:

    log-probs of K experts -> margins h                                   (M4)
    E-step      q = posterior over experts, detached                      (M7, M11)
    M-step      sum_k q_k (-log sigma(h_k)) of each pair                  (M8); one forward pass serves both steps
                KL(q || w(x)) of each unit: the gate                      (M9), or the closed form for fixed weights (M10)
    bound       sum_k q_k (log w_k + log sigma(h_k) - log q_k)            (M6), what EM maximises, logged per unit

The loss is a sum over pairs divided by the step's number of pairs, so a step may be cut into micro-batches anywhere.
K = 1 is DPO. Responsibilities may be known before a step: from the start (start.py), from a pair's first visit, or from
context pairs, which the M-step never trains on. What else a run may ask for replaces one of the functions in `EM`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo import config as configs
from mixdpo.config import InputError
from mixdpo.dpo import margins
from mixdpo.evaluation.identifiability import describe_data
from mixdpo.experts import Adapters, Heads, Models, pair_logp
from mixdpo.fast.backward import backward
from mixdpo.fast.memory import steady
from mixdpo.fast.optimizer import clip_and_step, set_rate
from mixdpo.gates import TRAINED, Gate, Inputs, gate_objective
from mixdpo.metrics import step_summary
from mixdpo.mixture import e_step, elbo, expert_loss, update_weights
from mixdpo.plan import Micro, Plan, micro_batches
from mixdpo.preferences import Batch
from mixdpo.private.keys import Key
from mixdpo.runs.checkpoint import Saver
from mixdpo.runs.log import Log, Progress
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.setup import Job, finish, nonfinite_message, opened, prepare, resume, snapshot
from mixdpo.variants.choose import Variants

# --- what a step reads and changes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What training reads."""

    config: TrainConfig
    plan: Plan
    ref_logp: torch.Tensor          # (P,1,2) of all pairs, nats; (P,K,2) if each expert has its own reference
    inputs: Inputs                  # (U,...) what the gate reads of each unit
    start: torch.Tensor | None      # (U,K) log q for the first config.start_steps steps
    rows_of: Callable               # a batch's layout: preferences.rows_of, or fast/packing.py's


@dataclass
class EMState:
    """What training changes."""

    experts: Heads | Adapters | Models
    gate: Gate
    optimizer: torch.optim.Optimizer
    log_q: torch.Tensor             # (U,K) responsibilities of each unit as last used, NaN before; on the CPU
    t: int = 0                      # steps done


@dataclass(frozen=True)
class EM:
    """The functions of one step. The defaults are the method; variants/ and private/ have others. A visit is a unit in
    the plan (a pair, or a user's pairs), and `visits` are visits' numbers."""

    margins: Callable = margins                             # logp (b,K,2), ref_logp, beta -> h (b,K)
    prior: Callable = lambda log_w, visits: log_w           # gate (G,K) -> prior of z (G,K)
    vary: Callable = lambda log_q, prior, visits: log_q     # posterior (g,K) -> responsibilities (g,K)  M12
    weigh: Callable = lambda loss, visits: loss             # losses of pairs (b,) -> (b,)
    collect: Callable = lambda gradient, micros: [gradient(micros, sum(len(m.train.ids) for m in micros))]  # all at once
    clip: float = 1.0                                       # largest gradient norm


# --- one step ---------------------------------------------------------------------------------------------------------


def em_loss(micro: Micro, log_w: torch.Tensor, log_q: torch.Tensor | None, problem: Problem, em: EM, pairs: int):
    """Everything that the method is: log-probs of some whole units -> the loss whose gradient is EM's M-step.

    log_w (G,K): the prior of each visit. log_q (G,K): responsibilities that are known, or None. Returns
    loss_of(logp (b,K,2), part: a slice of the batch's pairs) -> sum of M8 / pairs, and (log_q, h) of these pairs.
    """
    batch, ref_logp, device = micro.train, problem.ref_logp, log_w.device
    pair = batch.pair.to(device)                                            # (B,)

    def loss_of(logp: torch.Tensor, part: slice):
        h = em.margins(logp, ref_logp[pair[part]].to(logp), problem.config.beta)                    # (b,K)  M4
        group = batch.group[part]                                                                   # (b,)
        units, own = slice(int(group[0]), int(group[-1]) + 1), (group - group[0]).to(device)
        if log_q is None:
            q = e_step(log_w[units][own], h, own)[1]                                                # (g,K)  M7, M11
            q = em.vary(q, log_w[units], micro.visits[units])                                       # (g,K)  M12
        else:
            q = log_q[units]
        loss = em.weigh(expert_loss(q[own], h), micro.visits[group])                                # (b,)   M8
        return loss.sum() / pairs, (q[own], h.detach())

    return loss_of


@torch.no_grad()
def posterior(experts, batch: Batch, log_w: torch.Tensor, problem: Problem, em: EM) -> torch.Tensor:
    """The E-step alone: log q (G,K) of the units of a batch, whose prior is log_w (G,K)."""
    pair, group = batch.pair.to(log_w.device), batch.group.to(log_w.device)                         # (B,) each
    logp = pair_logp(experts, batch, problem.rows_of)                                               # (B,K,2)
    h = em.margins(logp, problem.ref_logp[pair].to(log_w), problem.config.beta)                     # (B,K)  M4
    return e_step(log_w[group], h, group)[1]                                                        # M7, M11


def step(state: EMState, problem: Problem, em: EM) -> tuple[dict, list[int]]:
    """The next step of the plan. Changes `state`; returns the step's figures and the units of its visits.
    Raises: FloatingPointError, before any parameter changes, if the loss or a gradient is not finite."""
    config, plan, gate = problem.config, problem.plan, state.gate
    epoch, ids = plan.steps[state.t]
    micros, visits = micro_batches(plan, ids, config), torch.tensor(ids, dtype=torch.int64)         # (G,)
    units, device = plan.unit_of[visits], problem.ref_logp.device
    inputs, share = problem.inputs[units.to(device)], plan.share[visits].to(device)
    gate.temperature = config.gate_temperature ** max(0.0, 1 - 2 * state.t / len(plan.steps))       # 1 from half on
    log_w = gate(inputs).detach()                                                                   # (G,K)
    prior, known = em.prior(log_w, visits), known_responsibilities(state, problem, units)

    def gradient(micros: list[Micro], pairs: int):
        """Adds the gradient of the sum of M8 and M9 over some micro-batches, / pairs. Returns the place in the step,
        log_q and h of each of their pairs."""
        seen = []
        for micro in micros:
            log_q = None if known is None else known[micro.places]
            if log_q is None and micro.context is not None:
                log_q = posterior(state.experts, micro.context, prior[micro.places], problem, em)
                log_q = em.vary(log_q, prior[micro.places], micro.visits)
            loss_of = em_loss(micro, prior[micro.places], log_q, problem, em, pairs)
            parts = backward(state.experts, micro.train, loss_of, problem.rows_of, config.head_rows, log_q is None)
            seen += [(micro.first + micro.train.group.to(device), *map(torch.cat, zip(*parts)))]
        place, of_pair, h = map(torch.cat, zip(*seen))
        if gate.kind in TRAINED:
            rows = slice(micros[0].first, micros[-1].places.stop)
            log_q = log_w.index_copy(0, place, of_pair)[rows]
            (gate_objective(gate, inputs[rows], log_q, config, share[rows]) / pairs).backward()     # M9
        return place, of_pair, h

    set_rate(state.optimizer, state.t, len(plan.steps), config.warmup)
    nothing = units.new_empty(0).to(device), log_w.new_empty(0, config.experts), log_w.new_empty(0, config.experts)
    place, of_pair, h = map(torch.cat, zip(*em.collect(gradient, micros) or [nothing]))             # E-step and M-step
    log_q = log_w.index_copy(0, place, of_pair)                                                     # (G,K)
    bound = elbo(log_q, log_w, h, place)                                                            # (G,)   M6, M11
    figures = {"step": state.t + 1, "epoch": epoch, "rate": state.optimizer.param_groups[0]["lr"], "pairs": len(h)}
    figures |= step_summary(of_pair, log_w[place], h) | {"bound": bound.mean().item()}
    figures["grad_norm"] = clip_and_step(state.optimizer, figures["loss"] if micros else 0.0, em.clip)
    last = {unit: n for n, unit in enumerate(units.tolist())}               # if a user has several slices, the last
    state.log_q[list(last)] = log_q[list(last.values())].cpu()
    if config.weights == "update":
        gate.log_w.copy_(update_weights(state.log_q[~state.log_q.isnan().any(1)], config.prior))    # M10
    state.t += 1
    return figures, list(last)


def known_responsibilities(state: EMState, problem: Problem, units: torch.Tensor) -> torch.Tensor | None:
    """log q (G,K) of some units where the step takes it as it is: from the start, or from their first visit."""
    config, table = problem.config, None
    if problem.start is not None and state.t < config.start_steps:
        table = problem.start
    elif config.estep == "first":
        table = state.log_q
    return None if table is None or table[units].isnan().any() else table[units].to(problem.ref_logp.device)


# --- one run ----------------------------------------------------------------------------------------------------------


def log_likelihoods(state: EMState, problem: Problem, em: EM, after_each: Callable) -> torch.Tensor:
    """sum_i log sigma(h_ik) over each visit's pairs for the E-step, up to a constant a row: (V,K), on the CPU."""
    micros, found = micro_batches(problem.plan, list(range(len(problem.plan.visits))), problem.config), []
    progress = Progress(f"{Path(problem.config.out).name} E-step on all pairs")
    for n, micro in enumerate(micros, 1):
        flat = problem.ref_logp.new_zeros(len(micro.visits), problem.config.experts)
        found.append(posterior(state.experts, micro.context or micro.train, flat, problem, em).cpu())
        progress(n, len(micros))
        after_each()
    return torch.cat(found)


def fit(state: EMState, problem: Problem, variants: Variants, log: Log, saver: Saver, now: Callable) -> None:
    """All steps that are left, and a last E-step on all pairs. now(): what a checkpoint holds.
    Raises: Stopped, when all is saved."""
    config, total = problem.config, len(problem.plan.steps)

    def all_pairs() -> torch.Tensor:
        return log_likelihoods(state, problem, EM(variants.margins), lambda: saver.check(state.t, total, now))

    while state.t < total:
        try:
            figures, units = step(state, problem, EM(**variants.functions(state.t, all_pairs)))
        except FloatingPointError as error:
            raise InputError(nonfinite_message(error, problem.plan, state.t, config), config.data, option="lr") from None
        log.step(figures | variants.end_step(), units, state.log_q[units])
        saver.after(state.t, total, now)
    state.gate.temperature = 1.0
    if config.experts > 1 and config.estep != "first":
        with torch.no_grad():
            log_w = state.gate(problem.inputs).cpu()                                                # (U,K)
        state.log_q = torch.log_softmax(log_w + problem.plan.pooled(all_pairs()), dim=-1)           # M7, M11
        log.responsibilities(state.t, list(range(len(log_w))), state.log_q)


def run(config: TrainConfig, key: Key | None = None) -> Path:
    """Trains, or resumes an interrupted run of the same configuration; returns the run directory. key: of a private run
    on made data, where nothing is secret.

    Raises: InputError on bad input, if another process works in the directory, and if memory is too small; Stopped.
    """
    with opened(config, key) as job:                                        # None: finished before
        if job is not None:
            learn(job)
    return Path(config.out)


def learn(job: Job) -> None:
    """One run, from its files to its last checkpoint."""
    config, made = job.config, prepare(job)
    print(end="".join(f"{line}\n" for line in describe_data(made.plan.pairs, config)))
    problem = Problem(config, made.plan, made.ref_logp, made.inputs, made.start, made.rows_of)
    t, log_q = resume(job, made)
    state = EMState(made.experts, made.gate, made.optimizer, log_q, t)
    log = Log(job.out, state.t, len(made.plan.steps), config)
    saver = Saver(job.out, job.stop, config.save_minutes, config.keep)

    def now(finished: bool = False):
        log.sync()
        return snapshot(made, state.log_q, finished)

    fit(state, problem, made.variants, log, saver, now)
    finish(job, made, lambda: saver.save(state.t, *now(finished=True)))
    log.close()


def main(argv: list[str]) -> None:
    steady()
    run(configs.parse(TrainConfig, argv, "python train.py"))


if __name__ == "__main__":
    configs.command(main)
