"""DP-TBART: private synthetic tables from an autoregressive transformer (Castellon, Gopal, Bloniarz, Rosenberg 2023,
arXiv 2307.10430; the model is in model.py). Training is DP-SGD with Adam. The result is the moving average of the
parameters, which costs no privacy.

    look      noisy counts of every column, and noisy tables of selected pairs where plan.py says so. They determine
              bins by quantiles, the order by entropy, and a log-linear estimate of the table (marginals.py)
    fit       the biases of the logits start at the logarithms of the counts; the model is trained on rows of the
              estimate, which costs no privacy; then DP-SGD has the rest of the budget, if plan.py says so. At the end
              the biases are adjusted until samples have the 1-way marginals (calibrate)
    sample    column by column, with a cache of keys and values; the first columns of the order may be given
    draw      the table: rows of the model, or of the estimate if there was no DP-SGD, weighted to have the measured
              marginals, from which an even sample is taken

All but DP-SGD is our addition to the paper. --first-look 0 leaves it out.
epsilon = inf trains without noise and clipping, on the same batches.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mixdpo.config import InputError
from mixdpo.fast.backward import minimise
from mixdpo.fast.optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_rate
from mixdpo.private.accountant import Mechanism, epsilon_of, noise_multiplier
from mixdpo.private.dp_sgd import NOT_COVERED, Noise, ghost_clipped_sum, participants
from mixdpo.private.keys import Key, identities
from mixdpo.runs.checkpoint import Saver, Stop, load_checkpoint
from mixdpo.runs.log import Progress
from mixdpo.tabular.columns import Column, joined
from mixdpo.tabular.marginals import POOL, Marginals, even, measure, noisy, simplex
from mixdpo.tabular.model import TBART, calibrate, row_losses, sample
from mixdpo.tabular.plan import Plan, TableConfig, plan_of, validate

__all__ = ["TBART", "Fitted", "Table", "TableConfig", "account", "calibrate", "draw", "fit", "look", "plan_for",
           "pretrain", "row_losses", "sample", "simplex", "validate"]

DECAY = 0.99            # decay per step of the moving average of the parameters
PRETRAIN = 256          # rows in a step on the estimate
PART = 8_192            # rows of a table that are chosen together


# ---- the first look


@dataclass
class Table:
    """A table prepared for training, with columns in the schema's order, and the budget spent on it so far."""

    columns: list[Column]
    codes: np.ndarray               # (N,d)
    order: list[int]                # the model's j-th column is columns[order[j]]
    plan: Plan
    prior: torch.Tensor | None = None       # (V,) log-probabilities of all values, in the model's order
    marginals: Marginals | None = None
    spent: list[Mechanism] = field(default_factory=list)
    fine: list[np.ndarray | None] = field(default_factory=list)     # new code of each fine bin; None: bins unchanged

    def coded(self, codes: np.ndarray) -> np.ndarray:
        """Codes (M,d) made with the columns before their bins were merged -> codes after."""
        return np.stack([x if code is None else code[x] for x, code in zip(codes.T, self.fine)], axis=1)

    @property
    def sizes(self) -> list[int]:
        """The number of values of each column, in the model's order."""
        return [self.columns[j].size for j in self.order]

    def ordered(self) -> torch.Tensor:
        """The codes (N,d) with columns in the model's order."""
        return torch.from_numpy(self.codes[:, self.order])

    def as_given(self, codes: torch.Tensor) -> np.ndarray:
        """Codes (N,d) in the model's order -> in the schema's order."""
        return codes.numpy()[:, np.argsort(self.order)]


def plan_for(columns: list[Column], rows: int, config: TableConfig) -> Plan:
    """The plan for a table with these columns and so many rows, from public facts only. Bins by quantiles count as many
    as they can become."""
    return plan_of(rows, [min(c.quantiles or c.known, c.known) + c.size - c.known for c in columns], config)


def look(columns: list[Column], codes: np.ndarray, config: TableConfig, key: Key) -> Table:
    """The table with quantile bins, column order, prior and marginals from noisy counts; without if first_look is 0.

    A row adds 1 to one count in each of d columns, so all counts together have sensitivity sqrt(d). Noise of standard
    deviation sigma sqrt(d) on every count is then one Gaussian mechanism with noise multiplier sigma.
    Raises: InputError."""
    d, rows = codes.shape[1], config.examples or len(codes)
    if [c for c in columns if c.quantiles] and not config.first_look:
        raise InputError("bins by quantiles are computed from noisy counts, which need a value above 0; set it, or "
                         "give the column edges or bins", option="first_look")
    plan, order = plan_for(columns, rows, config), [*range(d)]
    print(plan.why)
    if config.order == "random":
        order = np.random.default_rng([config.seed, 23]).permutation(d).tolist()
    if not config.first_look:
        return Table(columns, codes, order, plan, fine=[None] * d)
    rng, s = key.generator("look"), plan.deviation(plan.ones, d)
    counts = [(noisy(codes, (j,), [c.size for c in columns], s, rng), s) for j in range(d)]
    columns = [*columns]
    fine: list[np.ndarray | None] = [None] * d
    for j, column in enumerate(columns):
        if column.quantiles:
            columns[j], merged = joined(column, counts[j][0])
            fine[j], size = merged, columns[j].size                         # a bin has the noise of all its fine bins
            counts[j] = (np.bincount(merged[: column.size], weights=counts[j][0], minlength=size),
                         s * math.sqrt(column.size / size))
    coded = np.stack([x if code is None else code[x] for x, code in zip(codes.T, fine)], axis=1)
    marginals, others = measure(coded, counts, plan, rows, rng)
    if config.order == "entropy":
        order = np.argsort([(np.exp(q) * q).sum() for q in marginals.log_q], kind="stable").tolist()
    prior = torch.from_numpy(np.concatenate([marginals.log_q[j] for j in order])).float()
    sigmas = [plan.deviation(plan.ones, 1), *others] if plan.sigma else []
    return Table(columns, coded, order, plan, prior, marginals, [Mechanism(sigma) for sigma in sigmas], fine)


# ---- fitting


@dataclass
class Fitted:
    """A trained model and its privacy cost."""

    model: TBART
    sigma: float                    # noise multiplier of the steps; 0 without steps or without privacy
    spent: list[Mechanism]          # first look and steps; empty without privacy
    losses: list[float]             # mean loss of each step's rows in nats; NaN for an empty step. Not private


def fit(table: Table, config: TableConfig, key: Key, out: Path | None = None, same: dict | None = None) -> Fitted:
    """Trains on table.codes.

    key: the secret key for sampling and noise. out: the folder for checkpoints; a stopped run resumes from there. same:
    the configuration that the checkpoint must have been written with; None: any. Raises: Stopped, InputError."""
    rows, plan = table.ordered(), table.plan
    N, steps, private = config.examples or len(rows), plan.steps, config.epsilon < math.inf
    rate = min(1.0, plan.batch / N)
    sigma = noise_multiplier(config.epsilon, config.delta, rate, steps, table.spent) if private and steps else 0.0
    clip = config.clip if private else math.inf
    noise = Noise(sigma, config.clip, rate * N, key)
    drawn = participants(key, identities([row.tobytes() for row in table.codes]), rate, steps)
    torch.manual_seed(config.seed)
    model = TBART(table.sizes, config.width, config.layers, config.heads, table.prior)
    found = load_checkpoint(out, same or {}) if out else None
    if table.marginals is not None and not found:
        pretrain(model, torch.from_numpy(table.marginals.pool[:, table.order]), config)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, names = make_optimizer(model, config.lr)
    losses, t = [], 0
    if found:
        tensors, state = found
        model.load_state_dict({n.removeprefix("model."): x for n, x in tensors.items() if n.startswith("model.")})
        load_optimizer_state(optimizer, names, tensors)
        average = {name: tensors[f"average.{name}"] for name in average}
        losses, t = state["losses"], state["step"]
        print(f"resumed at step {t} of {steps}")
    progress = Progress(out.name if out else "fit", t)

    def snapshot() -> tuple[dict[str, torch.Tensor], dict]:
        tensors = {f"model.{n}": x.contiguous() for n, x in model.state_dict().items()}
        tensors |= {f"average.{n}": x for n, x in average.items()} | optimizer_state(optimizer, names)
        return tensors, {"losses": losses, "config": same or {}}

    with Stop(str(out)) as stop:
        saver = Saver(out, stop, config.save_minutes) if out else None
        while t < steps:
            set_rate(optimizer, t, steps, steps // 20)
            total, seen = dp_sum(model, rows[drawn[t]], clip, config.micro)
            for p, g in zip(model.parameters(), noise.release(total, t)):
                p.grad = g
            optimizer.step()
            t += 1
            keep = min(DECAY, t / (t + 9))                                  # smaller in early steps, as in a warm-up
            for name, p in model.named_parameters():
                average[name].lerp_(p.detach(), 1 - keep)
            losses.append(float(seen.mean()))
            progress(t, steps, f"loss {losses[-1]:.3f}")
            if saver:
                saver.after(t, steps, snapshot)
    if not all(x.isfinite().all() for x in average.values()):
        raise InputError(f"got {config.lr}, after which the parameters are not finite; choose a lower one", option="lr")
    model.load_state_dict(average, strict=False)
    if table.prior is not None and steps:
        calibrate(model, table.prior, config.seed)
    spent = [*table.spent, *([Mechanism(sigma, rate, steps)] if steps else [])] if private else []
    return Fitted(model.eval(), sigma, spent, losses)


def pretrain(model: TBART, rows: torch.Tensor, config: TableConfig) -> None:
    """Trains the model on rows (M,d) of the estimate, without noise: they come from released numbers only."""
    rng = np.random.default_rng([config.seed, 41])
    optimizer, _ = make_optimizer(model, config.lr)
    for t in range(config.pretrain):
        set_rate(optimizer, t, config.pretrain, config.pretrain // 20)
        loss = row_losses(model, rows[rng.integers(len(rows), size=PRETRAIN)]).mean()
        try:
            minimise(loss, optimizer, clip=math.inf)
        except FloatingPointError as error:
            raise InputError(f"step {t} on rows of the estimate: {error}; choose a lower one", option="lr") from None


def draw(table: Table, fitted: Fitted, rows: int, rng: np.random.Generator) -> np.ndarray:
    """-> the codes (rows,d) of a table, columns in the schema's order."""
    if table.marginals is None:
        return table.as_given(sample(fitted.model, rows, rng))
    sizes, pool = table.marginals.sizes, table.marginals.pool
    parts: list[np.ndarray] = []
    for n in [min(PART, rows - start) for start in range(0, rows, PART)]:
        log_w = np.zeros(len(pool))
        if table.plan.steps:
            pool = table.as_given(sample(fitted.model, max(8 * n, POOL), rng))
            log_w = table.marginals.corrected(pool, own=False)
        elif parts:                                                         # other rows; Gibbs steps alone would drift
            pool = table.marginals.moved(pool, rng)
            log_w = table.marginals.corrected(pool)
        parts.append(even(pool, log_w, n, sizes, rng))
    return np.concatenate(parts)


def dp_sum(model: TBART, rows: torch.Tensor, clip: float, micro: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """-> the sum of the rows' clipped gradients, one tensor for each parameter (0 without rows); the rows' losses (N,).
    micro: rows in a forward pass."""
    total, seen = [torch.zeros_like(p) for p in model.parameters()], []
    for part in rows.split(micro) if len(rows) else ():
        grads, losses = ghost_clipped_sum(model, lambda part=part: row_losses(model, part), clip)
        seen.append(losses)
        for s, (name, _) in zip(total, model.named_parameters()):
            s += grads[name]
    return total, torch.cat([*seen, torch.empty(0)])


def account(fitted: Fitted, config: TableConfig, rows: int) -> dict:
    """The content of privacy.json: the budget that was spent, and what it does not cover. rows: their number."""
    if not fitted.spent:
        return {"epsilon": math.inf, "spent": [], "not_covered": ["everything: no noise was added"]}
    return {"epsilon": epsilon_of(fitted.spent, config.delta), "delta": config.delta, "unit": "a row",
            "rows": rows, "spent": [vars(m) for m in fitted.spent], "not_covered": list(NOT_COVERED)}
