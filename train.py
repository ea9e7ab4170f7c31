"""Mix-DPO and MoE-DPO by stochastic variational EM: `python train.py --data prefs.jsonl --model DIR --out runs/x`.

One optimizer step, `step`:

    log-probs of K experts -> margins h                                   (M4)
    E-step      q = posterior over experts, detached                      (M7, M11)
    M-step      sum_k q_k (-log sigma(h_k)) of each pair                  (M8); one forward pass serves both steps
                KL(q || w(x)) of each unit: the gate                      (M9); fixed weights: the closed form (M10)
    bound       sum_k q_k (log w_k + log sigma(h_k) - log q_k)            (M6), what EM maximises, logged per unit

The loss is a sum over pairs divided by the number of pairs in the step, so micro-batches do not change it. K = 1 is
DPO. All experts start equal to the reference, and equal experts stay equal. So a run starts with responsibilities that
differ between units, or with evidence for them, from mixdpo/start.py. The E-step can read context pairs, which the
M-step trains on only at the end, when responsibilities are final. Variants replace functions in `EM`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo.config import InputError, command
from mixdpo.dpo import margins
from mixdpo.evaluation import auto, identifiability, leaks
from mixdpo.experts import Adapters, Heads, Models, pair_logp
from mixdpo.fast.backward import backward
from mixdpo.fast.memory import tune_process
from mixdpo.fast.optimizer import clip_and_step, set_rate
from mixdpo.gates import TRAINED, Gate, Inputs, gate_objective
from mixdpo.metrics import bound_summary, chosen_and_rejected, step_summary
from mixdpo.mixture import e_step, elbo, expert_loss, update_weights
from mixdpo.plan import Micro, Plan, gathered, micro_batches
from mixdpo.preferences import Batch
from mixdpo.private.keys import Key
from mixdpo.runs.checkpoint import Saver
from mixdpo.runs.distributed import joined
from mixdpo.runs.log import Log
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.parallel import logp_in_parts
from mixdpo.runs.setup import Job, finish, log_of, nonfinite_message, opened, prepare, resume, saver_of, snapshot
from mixdpo.variants.choose import Variants


@dataclass(frozen=True)
class Problem:
    """What training reads: P pairs in U units, each of which has one latent type (a pair alone, or a user's pairs)."""
    config: TrainConfig
    plan: Plan
    ref_logp: torch.Tensor          # (P,1,2) of all pairs, nats; (P,K,2) if each expert has its own reference
    inputs: Inputs                  # (U,...) what the gate reads of each unit
    start: torch.Tensor | None      # (U,K) log q for the first config.start_steps steps
    evidence: torch.Tensor          # (U,K) the start's log-likelihood of pairs that the E-step does not read, or 0
    linear: torch.Tensor            # (P,K) the start's margins of context pairs, or 0; both: start.start_evidence
    rows_of: Callable               # a batch's layout: preferences.rows_of, or fast/packing.py's


@dataclass
class EMState:
    """What training changes."""

    experts: Heads | Adapters | Models
    gate: Gate
    optimizer: torch.optim.Optimizer
    log_q: torch.Tensor             # (U,K) latest responsibilities of each unit, NaN before the first; on the CPU
    t: int = 0                      # steps done


def accumulate(gradient: Callable, micros: list[Micro]) -> list:
    """Calls gradient(micros, count) once, for the mean over all pairs of a step; returns a list of its results."""
    return [gradient(micros, sum(len(micro.train.ids) for micro in micros))]


@dataclass(frozen=True)
class EM:
    """The functions of one step. The defaults are the method; variants/ and private/ have others. `visits` are indices
    into plan.visits: units, or slices of units (plan.py)."""

    margins: Callable = lambda logp, ref_logp, beta, order: margins(logp, ref_logp, beta)           # h (b,K)  M4
    prior: Callable = lambda log_w, visits: log_w           # gate (G,K) -> prior of z (G,K)
    vary: Callable = lambda log_q, prior, visits: log_q     # posterior (g,K) -> responsibilities (g,K)  M12
    weigh: Callable = lambda loss, visits: loss             # losses of pairs (b,) -> (b,)
    accumulate: Callable = accumulate                       # adds the gradient of all micro-batches to .grad
    clip: float = 1.0                                       # largest gradient norm


# --- one step ---------------------------------------------------------------------------------------------------------


def em_loss(micro: Micro, log_w: torch.Tensor, known: torch.Tensor | None, problem: Problem, em: EM, count: int):
    """The method: from log-probs to the loss of EM's M-step.

    log_w (G,K): prior of the G units of the micro-batch. known (G,K): log q, if it is known. Returns a function that
    fast/backward.py calls for b pairs at a time, sorted by unit: loss_of(logp (b,K,2), part: their slice) -> the sum of
    M8 / count, and log_q, h (b,K), logp. Unless log q is known, they are all pairs of g complete units.
    """
    pair, order, device = micro.train.pair.to(log_w.device), micro.train.order, log_w.device       # (B,), (B,2)

    def loss_of(logp: torch.Tensor, part: slice):
        h = em.margins(logp, problem.ref_logp[pair[part]].to(logp), problem.config.beta, order[part])   # (b,K)  M4
        unit = micro.train.group[part]                                      # (b,) of each pair, ascending, in 0..G-1
        rows, row = slice(int(unit[0]), int(unit[-1]) + 1), (unit - unit[0]).to(device)
        if known is None:
            log_q = e_step(log_w[rows][row], h, row)[1]                     # (g,K)  M7, M11; the prior per pair
            log_q = em.vary(log_q, log_w[rows], micro.visits[rows])         # (g,K)  M12
        else:
            log_q = known[rows]                                             # (g,K)
        loss = em.weigh(expert_loss(log_q[row], h), micro.visits[unit])                             # (b,)  M8
        return loss.sum() / count, (log_q[row], h.detach(), logp.detach())

    return loss_of


@torch.no_grad()
def posterior(experts, batch: Batch, log_w: torch.Tensor, problem: Problem, em: EM) -> torch.Tensor:
    """The E-step without an M-step: log q (G,K) of the units of a batch with the prior log_w (G,K)."""
    pair, group = batch.pair.to(log_w.device), batch.group.to(log_w.device)                         # (B,) each
    logp, ref_logp = pair_logp(experts, batch, problem.rows_of), problem.ref_logp[pair].to(log_w)   # (B,K,2), (B,1,2)
    h = em.margins(logp, ref_logp, problem.config.beta, batch.order) + problem.linear[pair]         # (B,K)  M4
    return e_step(log_w[group], h, group)[1]                                                        # M7, M11


def step(state: EMState, problem: Problem, em: EM) -> tuple[dict, list[int]]:
    """The next step of the plan. Changes `state`; returns the step's figures and the units of its visits.
    Raises: FloatingPointError, before any parameter changes, if the loss or a gradient is not finite."""
    config, plan, gate = problem.config, problem.plan, state.gate
    epoch, ids = plan.steps[state.t]
    micros, visits = micro_batches(plan, ids, config), torch.tensor(ids, dtype=torch.int64)         # (G,)
    units, device = plan.unit_of[visits], problem.ref_logp.device
    inputs, share = problem.inputs[units.to(device)], plan.share[visits].to(device)
    gate.temperature = config.gate_temperature ** max(0.0, 1 - 2 * state.t / len(plan.steps))     # 1 in the second half
    log_w = gate(inputs).detach()                                                                   # (G,K)
    known = known_responsibilities(state, problem, units)                                           # (G,K) or None
    prior = log_w if known is not None else em.prior(log_w + problem.evidence[units].to(log_w), visits)

    def gradient(micros: list[Micro], count: int):
        """E-step and M-step of some micro-batches: adds the gradient of sum (M8 + M9) / count to .grad. Returns, for
        each of their pairs, the place of its visit in the step, log_q, h, and what is reported of its texts."""
        seen = []
        for micro in micros:
            here, given = micro.places, None if known is None else known[micro.places]              # (G,K)
            if given is None and micro.context is not None:
                given = posterior(state.experts, micro.context, prior[here], problem, em)
                given = em.vary(given, prior[here], micro.visits)
            loss_of = em_loss(micro, prior[here], given, problem, em, count)
            parts = backward(state.experts, micro.train, loss_of, problem.rows_of, config.head_rows,
                             whole_groups=given is None)
            log_q, h, logp = (torch.cat(column) for column in zip(*parts))                          # (B,K) two, (B,K,2)
            texts = chosen_and_rejected(log_q, logp, problem.ref_logp[micro.train.pair.to(device)], config.beta)
            seen.append((micro.first + micro.train.group.to(device), log_q, h, texts))
        place, log_q, h, texts = (torch.cat(column) for column in zip(*seen))
        if gate.kind in TRAINED:
            rows = slice(micros[0].first, micros[-1].places.stop)
            per_visit = log_w.index_copy(0, place, log_q)[rows]             # one row a visit; its pairs write the same
            (gate_objective(gate, inputs[rows], per_visit, config, share[rows], inputs) / count).backward()     # M9
        return place, log_q, h, texts

    set_rate(state.optimizer, state.t, len(plan.steps), config.warmup)
    seen = em.accumulate(gradient, micros)                                     # E-step and M-step
    place, of_pair, h, texts = (torch.cat(column) for column in zip(*seen))     # (B,), (B,K) two, (B,4)
    log_q = log_w.index_copy(0, place, of_pair)                             # (G,K)
    bound = elbo(log_q, log_w, h, place)                                    # (G,)  M6, M11, under the gate's weights
    figures = {"step": state.t + 1, "epoch": epoch, "rate": state.optimizer.param_groups[0]["lr"], "pairs": len(h)}
    figures |= step_summary(of_pair, log_w[place], h, texts) | bound_summary(bound, log_w, h, place)
    figures["grad_norm"] = clip_and_step(state.optimizer, figures["loss"] if micros else 0.0, em.clip)
    row_of = {unit: n for n, unit in enumerate(units.tolist())}             # of a user's slices in one step: the last
    state.log_q[list(row_of)] = log_q[list(row_of.values())].cpu()
    if config.weights == "update":
        gate.log_w.copy_(update_weights(state.log_q[~state.log_q.isnan().any(1)], config.prior))    # M10
    state.t += 1
    return figures, list(row_of)


def known_responsibilities(state: EMState, problem: Problem, units: torch.Tensor) -> torch.Tensor | None:
    """log q (G,K) of some units if the start, their first visits or the last E-step have fixed them; else None."""
    first = problem.start is not None and state.t < min(problem.config.start_steps, problem.plan.last_part)
    final = problem.config.estep == "first" or state.t >= problem.plan.last_part
    table = problem.start if first else state.log_q if final else None
    return None if table is None or table[units].isnan().any() else table[units].to(problem.ref_logp.device)


# --- one run ----------------------------------------------------------------------------------------------------------


def visit_log_likelihoods(state: EMState, problem: Problem, margins: Callable, after_each: Callable) -> torch.Tensor:
    """sum_i log sigma(h_ik) over the E-step's pairs of each visit, up to a constant per row: (E,K), on the CPU."""
    plan, config, name = problem.plan, problem.config, f"{Path(problem.config.out).name} E-step on all pairs"
    batch = gathered(plan.pairs, [visit.context or visit.trained for visit in plan.visits[: plan.inferred]])
    ref_logp = logp = problem.ref_logp[batch.pair].expand(-1, config.experts, -1)   # (B,K,2), of experts before step 1
    if state.t or config.init_experts:
        logp = logp_in_parts(state.experts, [plan.pairs[i] for i in batch.pair], name, after_each)
    h = margins(logp.to(ref_logp), ref_logp, config.beta, batch.order) + problem.linear[batch.pair]     # (B,K)  M4
    return e_step(torch.zeros_like(h), h, batch.group.to(h.device))[1].cpu()                        # M7, M11


def fit(state: EMState, problem: Problem, variants: Variants, log: Log, saver: Saver, now: Callable) -> None:
    """All remaining steps, and the last E-step, on all units. now(): what a checkpoint holds. Raises: Stopped."""
    config, total = problem.config, len(problem.plan.steps)
    infers = config.experts > 1 and config.estep != "first"

    def all_pairs() -> torch.Tensor:
        return visit_log_likelihoods(state, problem, variants.margins, lambda: saver.check(state.t, total, now))

    while True:
        if state.t == problem.plan.last_part and infers:
            state.gate.temperature = 1.0
            with torch.no_grad():
                log_w = state.gate(problem.inputs).cpu() + problem.evidence                         # (U,K)
            state.log_q = torch.log_softmax(log_w + problem.plan.pooled(all_pairs()), dim=-1)       # M7, M11
        if state.t == total:
            return log.responsibilities(total, list(range(len(state.log_q))), state.log_q) if infers else None
        try:
            figures, units = step(state, problem, EM(**variants.functions(state.t, all_pairs)))
        except FloatingPointError as why:
            raise InputError(nonfinite_message(why, problem.plan, state.t, config), config.data, option="lr") from None
        log.step(figures | variants.end_step(), units, state.log_q[units])
        saver.after(state.t, total, now)


def run(config: TrainConfig, key: Key | None = None) -> Path:
    """Trains, or resumes an interrupted run of the same configuration; returns its directory. key: a noise key for
    tests of private runs; default: a secret one. Raises: InputError on bad input or too little memory; Stopped."""
    with opened(config, key) as job:                                        # None: finished before
        if job is not None:
            learn(job)
    return Path(config.out)


def learn(job: Job) -> None:
    """One run, from its files to its last checkpoint."""
    config, made = job.config, prepare(job)
    print("\n".join(identifiability.describe_data(made.plan.pairs, config)
                    + leaks.describe_leak(made.plan.pairs, made.tokenizer)))
    problem = Problem(config, made.plan, made.ref_logp, made.inputs, *made.start, made.rows_of)
    t, log_q = resume(job, made)
    state = EMState(made.experts, made.gate, made.optimizer, log_q, t)
    log, saver = log_of(job, made, t), saver_of(job, made, t)
    fit(state, problem, made.variants, log, saver, lambda: snapshot(made, log, state.log_q))
    finish(job, made, lambda: saver.save(state.t, *snapshot(made, log, state.log_q, finished=True)))
    log.close()


def main(argv: list[str]) -> None:
    tune_process()
    with joined():
        run(auto.parse(argv, "python train.py"))


if __name__ == "__main__":
    command(main)
