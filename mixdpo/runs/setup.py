"""From a configuration to everything that a run needs; and what is done before the first step and after the last."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo import config as configs
from mixdpo.config import InputError, compute_dtype
from mixdpo.experts import Adapters, Heads, Models, make_experts, trunks
from mixdpo.fast.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from mixdpo.fast.packing import compact_rows
from mixdpo.files.atomic import must_be_own, must_be_writable
from mixdpo.files.sources import data_files, parts_of
from mixdpo.gates import Gate, Inputs
from mixdpo.models.lora import projections
from mixdpo.models.weights import content_key
from mixdpo.plan import Plan, make_plan, micro_batches
from mixdpo.preferences import check_lengths, read_preferences
from mixdpo.private.budget import Private, budgets_of_sources, delete_key, load_or_create_key, write_guarantee
from mixdpo.private.keys import Key
from mixdpo.runs import checkpoint, loggers, memory_estimate, parallel
from mixdpo.runs.checkpoint import Saver, Stop, gate_state, load_checkpoint, load_gate, load_state, trained_state
from mixdpo.runs.distributed import complete, placed, rank, shard, world
from mixdpo.runs.expert_parallel import collected, make_one
from mixdpo.runs.gate_inputs import gate_inputs, known_pairs, make_gate
from mixdpo.runs.init_experts import init_experts
from mixdpo.runs.log import Log, environment, program_key
from mixdpo.runs.options import TrainConfig, compared, short_run
from mixdpo.runs.parallel import first_alone, from_first, must_agree
from mixdpo.runs.reference import Reference, Source, load_references, reference_of
from mixdpo.runs.rules import validate
from mixdpo.runs.validation import Validation
from mixdpo.start import check_start, make_start
from mixdpo.text.containers import rows
from mixdpo.text.records import data_key
from mixdpo.text.tokenizer import Tokenizer
from mixdpo.variants.choose import Variants, choose_margins


@dataclass(frozen=True)
class Job:
    """A run that is to be done, in a directory that this process holds."""

    config: TrainConfig
    facts: dict                     # what a checkpoint must have been written with
    stop: Stop
    private: Private | None

    @property
    def out(self) -> Path:
        return Path(self.config.out)


@contextlib.contextmanager
def opened(config: TrainConfig, key: Key | None) -> Iterator[Job | None]:
    """Within it this process holds the run's directory. Yields the job, or None if the run is finished.
    Raises: InputError on bad options, a directory that is not this run's, and memory that is too small."""
    validate(config)
    loggers.must_be_installed(config.log)
    first, out = rank() == 0, Path(config.out)
    if first:
        must_be_run(config)
    facts = compared(config) | input_keys(config)
    try:
        with parallel.locked(out), Stop(config.out) as stop:
            found = load_checkpoint(out, facts)
            must_agree({"step of the newest checkpoint": found and found[1]["step"]})
            if found and found[1]["finished"]:
                print(f"{config.out}: finished before")
                if first:
                    checkpoint.keep_newest(out, 1)                          # if it was killed before it could
                    delete_key(out)
                yield None
                return
            if first:
                must_be_writable(out)                                       # before long passes, not after
            private = None
            if config.epsilon < math.inf:
                sources = budgets_of_sources(config)
                secret = from_first(lambda: key or load_or_create_key(out, facts, found is not None))
                private = Private(secret, sources)
            yield Job(config, facts, stop, private)
    except RuntimeError as error:                                           # CUDA's out-of-memory is one, too
        if not memory_estimate.exceeded(error):
            raise
        raise InputError(memory_estimate.smaller(config, error), option="micro") from None


def input_keys(config) -> dict[str, str]:
    """What identifies the content of the run's files. Raises: InputError if processes differ in files, options or
    program."""
    if world() > 1:
        own = environment() | {"program": program_key()}
        must_agree({name: own[name] for name in ("revision", "program", "torch", "python")})
        must_agree(dataclasses.asdict(config))
    files = {"data_key": config.data} | ({"validation_key": config.validation} if config.validation else {})
    keys = first_alone(lambda: {name: data_key(file, config.columns) for name, file in files.items()})
    must_agree(keys)
    return keys


def must_be_run(config) -> None:
    """Raises: InputError unless a run of this TrainConfig may write into its --out."""
    before = {"noise-key", "privacy.json", "checkpoint", "metrics.jsonl", "responsibilities.jsonl"}
    inputs = [*(("data", file) for file in parts_of(config.data)), *(("model", model) for model in config.models)]
    must_be_own(Path(config.out), inputs, "config.json", {"data", "model", "out", "experts"}, before)


@dataclass(frozen=True)
class Prepared:
    """Everything that the loop needs."""

    tokenizer: Tokenizer
    experts: Heads | Adapters | Models
    gate: Gate
    optimizer: torch.optim.Optimizer
    names: list[str]                # of the optimizer's parameters
    plan: Plan
    ref_logp: torch.Tensor          # (P,1,2) or (P,K,2)
    inputs: Inputs                  # (U,...)
    start: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]           # (U,K), (U,K), (P,K): start.make_start
    log_q: torch.Tensor             # (U,K) before the first step
    rows_of: Callable
    variants: Variants
    validation: Validation | None
    facts: dict                     # of the job, and the keys of model, tokenizer and dtype
    guarantee: dict | None          # what privacy.json says in the end


def prepare(job: Job) -> Prepared:
    """Reads, checks and builds. Prints what it decided. Raises: InputError; Stopped."""
    config, private = job.config, job.private
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, why = compute_dtype(config.dtype, device)
    if config.packing and device == "cpu":
        raise InputError("got true, which needs a CUDA device; leave this option out", option="packing")
    print(f"options: {changed(config)}; all are in {job.out / 'config.json'}")
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    print(*memory_estimate.describe_memory(config, dtype, memory_estimate.available(device)), sep="\n")
    experts, plan, reference, validation, keys, tokenizer = read(job, dtype, device)
    describe_plan(plan, config)
    print(f"products in {keys['dtype']}: {why}")
    noise = guarantee = None
    if private:
        plan, noise, guarantee = private.budgeted(plan, config)
    print(end="".join(f"{line}\n" for line in short_run(config, len(plan.steps))))
    gate, inputs = make_gate(plan, reference, config, device)
    optimizer, names = make_optimizer(experts, config.lr, config.head_lr, (gate, config.gate_lr), config.moments,
                                      config.seed, getattr(experts, "norm", None))
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    plan = dataclasses.replace(plan, parts=parallel.divider(plan, parallel.team_of(experts)))
    processes = None if world() == 1 else experts if config.expert_parallel else parallel
    variants = Variants(config, plan, inputs.user, noise, learning, processes)
    drawn = private.start(plan, config.experts, config.latent) if private else None
    start, evidence, linear = make_start(gate, inputs, plan, reference.features, config, drawn)
    never = 0.0 if config.experts == 1 else torch.nan                       # one expert: log q = 0 without any E-step
    log_q = torch.full((len(plan.units), config.experts), never)
    rows_of = functools.partial(compact_rows, packed=config.packing)
    return Prepared(tokenizer, experts, gate, optimizer, names, plan, reference.logp.to(device), inputs,
                    (start, evidence, linear.to(device)), log_q, rows_of, variants, validation, job.facts | keys,
                    guarantee)


def read(job: Job, dtype: torch.dtype, device: str
         ) -> tuple[Heads | Adapters | Models, Plan, Reference, Validation | None, dict, Tokenizer]:
    """Experts, plan, reference and validation file, the keys of what they were read from, and the tokenizer."""
    config, private = job.config, job.private
    models, tokenizer = first_alone(lambda: load_references(config, device))
    for model in models:
        model.checkpointing = config.checkpointing
    if config.sharing == "lora":
        projections(models[0], config.targets)                            # an unknown name: an error before long passes
    pairs = read_preferences(config.data, tokenizer, config.max_prompt, config.max_response, config.drop,
                             columns=config.columns)
    check_lengths(pairs, min(model.config.context for model in models), config.data)
    with configs.lines_of(config.data):
        plan = make_plan(pairs, config, private and private.shuffled, private and (lambda *_: []))
    cache = Path(config.out).parent / "cache"
    source = Source(config.data, pairs, config, one_by_one=private is not None)
    reference = reference_of(source, models, tokenizer, dtype, cache, job.stop.check)
    if not config.train_trunk:
        plan = dataclasses.replace(plan, pairs=reference.with_states(plan.pairs))
    validation = validation_of(job, models, tokenizer, plan, dtype)
    make = make_one if config.expert_parallel else make_experts
    keys, experts = [content_key(model) for model in models], make(models, config, dtype)
    init_experts(experts, config, keys)
    if config.compile:
        for model in trunks(experts):
            model.compile(dynamic=True)
    if config.shard:
        shard(trunks(experts))
    name = str(dtype).removeprefix("torch.")
    read_from = {"model_key": "+".join(keys), "tokenizer_key": tokenizer.key, "dtype": name}
    must_agree(read_from)
    return experts, plan, reference, validation, read_from, tokenizer


# --- what is printed --------------------------------------------------------------------------------------------------


def changed(config: TrainConfig) -> str:
    """The options that are not at their defaults, as the command line has them."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return " ".join(f"--{name.replace('_', '-')} {str(value).lower() if isinstance(value, bool) else value}"
                    for name, value in values.items() if value != getattr(TrainConfig, name, None))


def describe_plan(plan: Plan, config) -> None:
    """Prints how many pairs and units there are."""
    trained = sum(len(visit.trained) for visit in plan.visits[: plan.inferred])
    slices = f", in {plan.inferred} slices" if plan.inferred > len(plan.units) else ""
    later = ", and to train on in the last part" * bool(plan.closing)
    print(f"{len(plan.pairs)} pairs: {trained} to train on, {len(plan.pairs) - trained} for context{later}; "
          f"{len(plan.units)} units ({config.latent}){slices}")


def nonfinite_message(error: FloatingPointError, plan: Plan, t: int, config) -> str:
    """What to say of a step whose loss or gradient is not finite. Its lines or rows are copied into the run."""
    pairs = [plan.pairs[i] for v in plan.steps[t][1] for i in plan.visits[v].trained]
    places, several = {(pair.file, pair.line) for pair in pairs}, len({pair.file for pair in pairs}) > 1
    path = Path(config.out) / f"step-{t + 1}.jsonl"
    path.write_bytes(b"".join(row.line() for source in data_files(config.data) for row in rows(source)
                              if (row.file, row.number) in places))
    shown = ", ".join(f"{file}:{n}" if several else str(n) for file, n in sorted(places)[:8])
    shown += ", ..." * (len(places) > 8)
    return (f"step {t + 1}: {error}; this step was not made. Lower the learning rate that is used (--lr, --head-lr, "
            f"--gate-lr) or --beta, or check the {len(places)} lines of this step ({shown}), which are in {path}")


# --- before the first step, and after the last ------------------------------------------------------------------------


def resume(job: Job, made: Prepared) -> tuple[int, torch.Tensor]:
    """Puts the newest checkpoint back, if there is one: steps done, and log_q (U,K). A new run is checked instead:
    every expert is the reference (start.check_start)."""
    config, device = job.config, str(made.ref_logp.device)
    found = load_checkpoint(job.out, made.facts)
    if found:
        tensors, state = found
        if state["device"] != made.ref_logp.device.type:
            print(f"{job.out}: begun on {state['device']}, resumed on {device}: the same steps, up to rounding")
        load_state(made.experts, tensors, job.out)
        load_gate(made.gate, tensors)
        load_optimizer_state(made.optimizer, made.names, tensors, placed)
        made.variants.load(tensors)
        print(f"resumed at step {state['step']} of {len(made.plan.steps)}")
    if rank() == 0:
        configs.save(config, job.out / "config.json")                       # not before all input is known to be good
    if not found and not config.init_experts:
        first = micro_batches(made.plan, made.plan.steps[0][1] or [0], config)[0]
        units = made.plan.unit_of[first.visits].to(made.ref_logp.device)
        log_w = made.gate(made.inputs[units]).detach()[first.train.group.to(made.ref_logp.device)]
        check_start(made.experts, first.train, made.ref_logp, log_w, config.beta)
    return (state["step"], tensors["table"]) if found else (0, made.log_q)


def log_of(job: Job, made: Prepared, t: int) -> Log:
    """The log of a run that has made t steps."""
    logger = loggers.logger_of(job.config, job.out, t) if rank() == 0 else loggers.NONE
    return Log(job.out, t, len(made.plan.steps), job.config, rank() == 0, logger)


def saver_of(job: Job, made: Prepared, t: int) -> Saver:
    """The checkpoints of a run that has made t steps; with --validation also its evaluations (validation.py)."""
    config, found = job.config, made.validation
    before = (lambda t: None) if found is None else (lambda t: found.after(t, made.experts, made.gate, made.plan))
    if found is not None:
        found.load(t)
    return Saver(job.out, job.stop, config.save_minutes, config.keep, before)


def validation_of(job: Job, models: list, tokenizer, plan: Plan, dtype: torch.dtype) -> Validation | None:
    """The run's held-out preferences, or None. Raises: InputError if the file cannot be used."""
    config = job.config
    if not config.validation:
        return None
    pairs = read_preferences(config.validation, tokenizer, config.max_prompt, config.max_response, config.drop,
                             columns=config.columns)
    check_lengths(pairs, min(model.config.context for model in models), config.validation)
    source = Source(config.validation, pairs, config)
    found = reference_of(source, models, tokenizer, dtype, Path(config.out).parent / "cache", job.stop.check)
    prompts = found.prompt[:, ("last", "mean").index(config.gate_features)]
    inputs = gate_inputs(config.gate, pairs, prompts, known_pairs(plan)).to(models[0].unembedding.device)
    pairs = pairs if config.train_trunk else found.with_states(pairs)
    return Validation(job.out, config.evaluate_every, pairs, found.logp, inputs, config.latent,
                      choose_margins(config, pairs), config.beta)


def snapshot(made: Prepared, log: Log, log_q: torch.Tensor, finished: bool = False
             ) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and facts of a checkpoint, after the lines of the log that it needs are on disk."""
    log.sync()
    moments = {} if finished else optimizer_state(made.optimizer, made.names, complete)
    tensors = trained_state(made.experts) | gate_state(made.gate) | moments | made.variants.tensors()
    facts = {"finished": finished, "config": made.facts, "device": made.ref_logp.device.type}
    return collected(made.experts, tensors) | {"table": log_q}, facts


def finish(job: Job, made: Prepared, save: Callable) -> None:
    """Ends a run: privacy.json, the last checkpoint by save(), and the secret key is deleted."""
    first = rank() == 0
    if first:
        write_guarantee(job.out, made.guarantee)                                    # not before all steps are done
    save()
    if first:
        delete_key(job.out)
    print(f"finished: {job.out}. Evaluate it with: python eval.py {job.out} --heldout FILE")
