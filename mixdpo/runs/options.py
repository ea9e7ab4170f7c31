"""The options of a training run, and which of them go together."""

import math
from dataclasses import asdict, dataclass, fields

from mixdpo.config import SEEDS, InputError, check_choices, check_ranges, compute_dtype, convert
from mixdpo.gates import KINDS, READS_PROMPT, TRAINED, first_weights
from mixdpo.runs.distributed import world
from mixdpo.runs.loggers import MODULES
from mixdpo.text.shapes import parse_columns
from mixdpo.variants.e_steps import SAMPLED, VARIANTS

LARGEST = (2 - 2**-23) * 2.0**127   # float32's largest number: log-probs, margins and parameters are float32


@dataclass(frozen=True)
class TrainConfig:
    """Trains DPO (--experts 1) or a mixture of K expert policies on preferences."""

    # --- data and model
    data: str                       # * preferences: .jsonl, .json, .csv, .tsv (also .gz, .zst) or .parquet, several
                                    # files with commas between them, or hub:OWNER/NAME[:SPLIT]
    model: str                      # * reference model: gpt2, smollm2, llama-3.2-1b, a name on the Hugging Face hub
                                    # (OWNER/NAME), a directory or a .gguf file; with --sharing models also K of them:
                                    # a,b
    out: str                        # * directory of the run; an unfinished run in it is resumed
    max_prompt: int = 256           # longest prompt in tokens; a longer prompt loses its first tokens, a conversation
                                    # its oldest turns
    max_response: int = 256         # longest response in tokens, end token included; a longer response loses its last
                                    # tokens
    columns: str = ""               # which columns of the data are which fields, as in prompt=instruction,user=worker;
                                    # needed if the shape is not a known one (docs/own-data.md). Empty: by their names
    drop: bool = False              # true: skip and report lines with a fault; false: stop at the first one
    data_folder: str = ""           # folder that is searched for model and data files before a download; empty: none

    # --- mixture
    experts: int = 2                # * number of experts K; 1 is DPO; auto: chosen from the data, as on a command line
                                    # without this option
    sharing: str = "heads"          # * heads (K heads on one trunk), lora (K adapters in one frozen model) or models (K
                                    # models)
    rank: int = 16                  # rank of low-rank heads or adapters; 0: full heads. With --experts 1 it needs
                                    # --train-trunk false or --sharing lora; without either, all parameters of the model
                                    # are trained (DPO)
    shared_rank: int = 0            # with --sharing lora: rank of one more adapter, which all experts share; 0: none
    targets: str = ""               # with --sharing lora: the projections with adapters, comma-separated, or all;
                                    # empty: c_attn (GPT-2), or q_proj,v_proj (Llama)
    train_trunk: bool = True        # * false: freeze the trunk and train the heads alone; also for one head (--experts
                                    # 1)
    latent: str = "pair"            # * what has one latent type: each pair, or each user with all of the user's pairs
    init_experts: str = ""          # start of each expert, K entries, comma-separated: RUN:k (expert k of a finished
                                    # run) or fresh (the reference); empty: all fresh
    freeze: str = ""                # experts that are not trained: their numbers from 0, as in 0,2, or all; empty: none

    # --- mixture weights
    gate: str = "fixed"             # * what the mixture weights depend on: fixed (nothing), linear or mlp (prompt),
                                    # user, prompt-user, domain, random (prompt, but not trained)
    gate_features: str = "last"     # what a gate reads of the prompt: last or mean hidden state of the reference
    gate_lr: float = 1e-2           # peak learning rate of the gate (AdamW)
    gate_temperature: float = 1.0   # softmax temperature of the gate at the first step; it falls to 1 by the middle of
                                    # the run
    gate_entropy: float = 0.0       # bonus per nat of the entropy of each unit's weights; 0: none
    gate_balance: float = 0.0       # bonus per nat of the entropy of a step's mean weights; 0: none
    weights: str = "uniform"        # weights of a fixed gate: uniform, update (closed form after each step), or K
                                    # positive numbers as in 0.3,0.7
    prior: float = 1.0              # Dirichlet parameter of --weights update, at least 1; 1: maximum likelihood

    # --- E-step
    start: str = "dirichlet"        # * first responsibilities: dirichlet (random), linear (fit of linear rewards) or
                                    # none (the E-step runs from the first step)
    start_steps: int = 10           # optimizer steps that use the first responsibilities; after them the E-step runs.
                                    # Not with --start linear --estep context, where each E-step combines both
    restarts: int = 5               # number of fits of --start linear; the fit with the best bound is used
    estep: str = "all"              # * pairs that the E-step reads: all, context (trained on last) or first (once,
                                    # at the first visit; then kept)
    context: int = 0                # * context pairs per user for --estep context; 0: those that the file marks
    em: str = "minibatch"           # log-likelihoods that the E-step uses: minibatch (of this step), incremental (of
                                    # earlier steps too, so that a user's pairs may lie in several batches)
    variant: str = "exact"          # E-step: exact, tempered, hard (all weight on the most likely expert), monte-carlo,
                                    # gumbel
    variant_temperature: float = 1.0  # temperature of --variant tempered or gumbel
    draws: int = 1                  # samples of the latent type per unit, with --variant monte-carlo

    # --- training
    beta: float = 0.1               # * DPO's beta, reward per nat of log-ratio; larger values stay closer to the
                                    # reference
    epochs: int = 1                 # * passes over the data
    batch: int = 32                 # * largest number of pairs per optimizer step, in which a user's pairs stay
                                    # together; with --epsilon the mean number of examples
    lr: float = 2e-5                # * peak learning rate of trunk, models and full heads (AdamW)
    head_lr: float = 3e-4           # * peak learning rate of low-rank heads and adapters (AdamW)
    warmup: int = 10                # optimizer steps of linear warm-up; a linear decay to a tenth of the peak follows
    clip: float = 1.0               # largest gradient norm; inf: no clipping. With --epsilon: the largest norm of each
                                    # example's gradient
    moments: str = "float32"        # AdamW's moments: float32, or bfloat16 (half of their memory, stochastic rounding)
    validation: str = ""            # held-out preferences for early stopping: the parameters that predict them best are
                                    # kept; empty: none
    evaluate_every: int = 20        # optimizer steps between two evaluations on the --validation file
    label_noise: float = 0.0        # assumed share of flipped labels, at least 0 and less than 0.5
    robust: float = 0.0             # group-DRO step size: users with a larger loss count more; 0: all count the same
    seed: int = 0                   # seed of all random numbers, 0 to 4294967295

    # --- privacy (DP-SGD)
    epsilon: float = math.inf       # privacy budget epsilon; inf: no privacy
    delta: float = 1e-5             # privacy parameter delta; below 1 / number of examples
    privacy_unit: str = "pair"      # what one example is: pair, or user (all pairs of a user)
    examples: int = 0               # number of examples; give it if it is public. 0: that of the file, which the run
                                    # then discloses

    # --- memory and speed
    micro: int = 16                 # largest number of pairs per forward pass; with --latent user a user's pairs stay
                                    # together, and may exceed it
    head_rows: int = -1             # response tokens whose logits are in memory at once; -1: as many as 1 GiB holds; 0:
                                    # all, in vocabulary tiles
    checkpointing: bool = False     # true: activation checkpointing; less memory, one more forward pass
    packing: bool = False           # true: texts share a row without padding; needs a GPU
    shard: bool = False             # true: divide parameters, gradients and moments of trunk or models among the
                                    # processes that torchrun starts (FSDP2); each then needs less memory
    compile: bool = False           # true: torch.compile for the trunks; the first steps wait for the compiler
    dtype: str = "auto"             # dtype of matrix products: auto (bfloat16 on hardware that is built for it),
                                    # float32 or bfloat16; parameters stay float32

    # --- checkpoints and curves
    save_minutes: float = 10.0      # minutes between checkpoints; 0: one after each step; inf: only when the run ends
                                    # or is stopped
    keep: int = 2                   # number of newest checkpoints that an unfinished run keeps
    log: str = ""                   # where curves are shown: tensorboard (files in the run's directory), wandb or
                                    # trackio; needs the extra `log`. With --epsilon only what the budget covers, at
                                    # the end. Empty: nowhere

    @property
    def known_steps(self) -> int:
        """The number of first steps whose responsibilities are those of the start. With --start linear and context
        pairs it is 0: the E-step runs from the first step, and the start's evidence is part of it (start.py)."""
        combined = self.start == "linear" and self.estep == "context"
        return 0 if self.experts == 1 or self.start == "none" or combined else self.start_steps

    @property
    def models(self) -> list[str]:
        """The reference of all experts, or one reference for each."""
        return self.model.split(",") if self.sharing == "models" else [self.model]

    @property
    def frozen(self) -> list[int]:
        """The experts that are not trained, in ascending order."""
        if self.freeze == "all":
            return list(range(self.experts))
        return sorted(convert(self.freeze, tuple[int, ...], "--freeze"))


def validate(config: TrainConfig) -> None:
    """Raises: InputError on values out of range, options without effect, and options that contradict each other."""
    validate_values(config)
    parse_columns(config.columns)
    refuse(without_effect(config))
    refuse(unfit_experts(config))
    refuse(unfit_e_step(config))
    refuse(unfit_shard(config))
    if config.epsilon < math.inf:
        refuse(unfit_privacy(config))


def refuse(rules: list[tuple[str, bool, str]]) -> None:
    """rules: (option, whether the configuration breaks the rule, message). Raises: InputError of the first broken
    rule."""
    for option, broken, message in rules:
        if broken:
            raise InputError(message, option=option)


CHOICES = {
    "sharing": ("heads", "lora", "models"), "latent": ("pair", "user"), "estep": ("all", "context", "first"),
    "start": ("dirichlet", "linear", "none"), "em": ("minibatch", "incremental"), "gate": KINDS,
    "gate_features": ("last", "mean"), "variant": VARIANTS, "log": ("", *MODULES),
    "moments": ("float32", "bfloat16"), "privacy_unit": ("pair", "user")}
RANGES = {
    **dict.fromkeys(("experts", "epochs", "batch", "micro", "restarts", "draws", "keep", "max_prompt", "max_response",
                     "prior", "evaluate_every"), "[1, inf)"),
    **dict.fromkeys(("rank", "shared_rank", "context", "start_steps", "warmup", "examples", "gate_entropy",
                     "gate_balance", "robust"), "[0, inf)"),
    **dict.fromkeys(("beta", "lr", "head_lr", "gate_lr", "gate_temperature", "variant_temperature", "delta"),
                    "(0, inf)"),
    "clip": "(0, inf]", "epsilon": "(0, inf]", "save_minutes": "[0, inf]",
    "label_noise": "[0, 0.5)", "head_rows": "[-1, inf)", "seed": SEEDS}


def validate_values(config: TrainConfig) -> None:
    """Raises: InputError on an option whose value is wrong whatever the other options are."""
    check_choices(config, CHOICES)
    check_ranges(config, RANGES)
    refuse([(f.name, LARGEST < abs(getattr(config, f.name)) < math.inf,
             f"got {getattr(config, f.name)}, more than float32 can hold; choose at most {LARGEST:.3g}")
            for f in fields(config) if f.type is float])
    first_weights(config), compute_dtype(config.dtype, "cpu")               # each checks its own option


def compared(config: TrainConfig) -> dict:
    """The options that must be equal for a run to be resumed: all but those that change nothing, or rounding only.
    --dtype auto is left out: the dtype that it stands for is compared once the device is known. So is --columns, which
    is a part of the key of the data."""
    free = ["out", "data_folder", "columns", "save_minutes", "keep", "micro", "head_rows", "checkpointing",
            "shard", "log"]
    free += ["dtype"] * (config.dtype == "auto")
    return {name: value for name, value in asdict(config).items() if name not in free}


def short_run(config: TrainConfig, steps: int) -> list[str]:
    """Warnings about a run of so few optimizer steps that the E-step or the peak learning rate is never reached."""
    remedy = "more --epochs or a smaller --batch" + f", or --{{}} {max(1, steps // 4)}" * (steps > 1)
    found = []
    if 0 < config.known_steps and steps <= config.known_steps:
        random = ", and random responsibilities do not depend on the data" * (config.start == "dirichlet")
        found.append(f"warning: the run has {steps} optimizer steps, and all of them use the responsibilities of "
                     f"--start {config.start} (--start-steps {config.start_steps}): the E-step never runs{random}. "
                     "Choose " + remedy.format("start-steps"))
    if steps <= config.warmup:
        found.append(f"warning: the run has {steps} optimizer steps, and the learning rate rises over --warmup "
                     f"{config.warmup}: the last step has {steps / config.warmup:.0%} of the peak, earlier steps have "
                     "less. Choose " + remedy.format("warmup"))
    return found


def without_effect(config: TrainConfig) -> list[tuple[str, bool, str]]:
    """Rules: an option that is not at its default must have an effect."""
    several, lora, private = config.experts > 1, config.sharing == "lora", config.epsilon < math.inf
    trained = several and config.gate in TRAINED
    heads = config.sharing == "heads" and (several or not config.train_trunk)           # else one model: DPO
    of_mixture, of_gate = (several, "--experts 2 or more"), (trained, "a --gate that is trained")
    needs = {
        **dict.fromkeys(("gate", "variant", "start"), of_mixture),
        "em": (several and config.latent == "user", "--experts 2 or more and --latent user"),
        "sharing": (several or lora, "--experts 2 or more"),
        "rank": (lora or heads, "--experts 2 or more heads, --train-trunk false or --sharing lora"),
        "targets": (lora, "--sharing lora"),
        "shared_rank": (lora and several, "--sharing lora and --experts 2 or more"),
        "head_lr": (lora or heads and config.rank > 0, "low-rank heads or adapters"),
        "lr": (not lora and (config.train_trunk or config.rank == 0),
               "a trained trunk or full heads (the learning rate of low-rank heads and adapters is --head-lr)"),
        "weights": (several and config.gate == "fixed", "--experts 2 or more and --gate fixed"),
        "prior": (config.weights == "update", "--weights update"),
        **dict.fromkeys(("gate_lr", "gate_temperature", "gate_entropy", "gate_balance"), of_gate),
        "gate_features": (config.gate in READS_PROMPT, "a --gate that reads prompts"),
        "start_steps": (several and config.start != "none" and (config.start, config.estep) != ("linear", "context"),
                        "--experts 2 or more and a --start (with --start linear and --estep context, the E-step uses "
                        "both from the first step)"),
        "restarts": (config.start == "linear", "--start linear"),
        "context": (config.estep == "context", "--estep context"),
        "evaluate_every": (bool(config.validation), "--validation"),
        "draws": (config.variant == "monte-carlo", "--variant monte-carlo"),
        "variant_temperature": (config.variant in ("tempered", "gumbel"), "--variant tempered or gumbel"),
        **dict.fromkeys(("delta", "privacy_unit", "examples"), (private, "--epsilon"))}
    return [(name, getattr(config, name) != getattr(TrainConfig, name) and not used,
             f"has no effect without {need}; add that, or leave this option out")
            for name, (used, need) in needs.items()]


def unfit_experts(config: TrainConfig) -> list[tuple[str, bool, str]]:
    """Rules for the experts, and for those that are taken over or frozen."""
    K, sharing, frozen = config.experts, config.sharing, config.frozen
    begun = config.init_experts.split(",") if config.init_experts else []
    given = "init_experts" if begun else "freeze"
    all_frozen = len(frozen) == K and config.gate not in TRAINED and config.weights != "update"
    return [
        ("rank", sharing == "lora" and config.rank == 0,
         "got 0, but adapters (--sharing lora) have a rank; choose 1 or more"),
        ("train_trunk", not config.train_trunk and sharing != "heads",
         f"got false, but --sharing {sharing} has no heads to train; use --sharing heads, or leave this option out"),
        (given, bool(begun or frozen) and config.shared_rank > 0,
         "cannot be used with --shared-rank, because every expert has the shared adapter; leave one of them out"),
        ("start", config.shared_rank > 0 and config.start == "none",
         "got none with --shared-rank: the experts begin equal, and adapters that deviate from the shared one "
         "learn from differences only, so they would stay equal; choose --start linear or dirichlet"),
        ("rank", not config.train_trunk and K == 1 and config.rank == 0,
         "got 0 with --experts 1 and --train-trunk false, so nothing is trained; choose 1 or more"),
        ("model", "," in config.model and sharing != "models",
         f"got several models ({config.model}), but --sharing {sharing} has one; give one model, or use --sharing "
         "models"),
        ("model", len(config.models) not in (1, K) or len(config.models) > 1 and "" in config.models,
         f"got {config.model!r} for {K} experts; give one model, or one for each expert"),
        ("init_experts", bool(begun) and len(begun) != K,
         f"got {len(begun)} entries for {K} experts; give RUN:k or fresh for each expert"),
        ("freeze", any(k < 0 or k >= K for k in frozen) or len(set(frozen)) < len(frozen),
         f"got {config.freeze!r}; choose different numbers from 0 to {K - 1}, or all"),
        (given, bool(begun or frozen) and K == 1,
         "is for a mixture, but --experts is 1; use --experts 2 or more, or leave this option out"),
        (given, bool(begun or frozen) and sharing == "heads" and config.train_trunk,
         "needs a frozen trunk, since a head fits only the trunk that it was trained on; add --train-trunk false"),
        ("init_experts", bool(begun) and config.start != "none",
         f"starts from experts that differ, but --start {config.start} is for equal experts; add --start none"),
        ("freeze", all_frozen,
         "got all experts, and the mixture weights are fixed, so nothing is trained; choose a --gate that is trained, "
         "or --weights update")]


def unfit_shard(config: TrainConfig) -> list[tuple[str, bool, str]]:
    """Rules for sharded parameters."""
    needs = [(world() > 1, "several processes: start it with torchrun --standalone --nproc-per-node N train.py ..."),
             (config.train_trunk and config.sharing != "lora", "a trunk that is trained"),
             (config.moments == "float32", "--moments float32"), (not config.compile, "--compile false"),
             (not config.freeze, "no --freeze"), (config.epsilon == math.inf, "no --epsilon: an example's gradient is "
                                                                             "clipped before gradients are summed")]
    return [("shard", config.shard and not fine, f"needs {need}") for fine, need in needs]


def unfit_e_step(config: TrainConfig) -> list[tuple[str, bool, str]]:
    """Rules for the E-step."""
    random_start = config.start == "dirichlet" and config.start_steps > 0 and config.experts > 1
    return [
        ("em", config.em != "minibatch" and config.estep == "first",
         f"got {config.em}, which updates responsibilities, but --estep first keeps them; choose --em minibatch, or "
         "another --estep"),
        ("weights", config.weights == "update" and config.prior == 1 and config.variant in ("hard", "monte-carlo"),
         f"got update with --variant {config.variant}: an expert without any unit would keep the weight 0 for ever; "
         "add --prior 2"),
        ("gate", config.latent == "user" and config.gate not in ("fixed", "user"),
         f"got {config.gate}, which has weights for each pair, but --latent user needs weights for each user; choose "
         "--gate user or fixed, or --latent pair"),
        ("estep", config.estep == "context" and config.latent != "user",
         "got context, which reads other pairs of the same user; add --latent user"),
        ("estep", config.estep == "first" and random_start,
         "got first, which would keep the random responsibilities of --start dirichlet; choose --start linear or none, "
         "or --start-steps 0")]


def unfit_privacy(config: TrainConfig) -> list[tuple[str, bool, str]]:
    """Rules for DP-SGD: the guarantee must cover everything that is computed from the data."""
    wanted = {
        "clip": (config.clip < math.inf, "a finite number, the largest gradient norm of an example"),
        "delta": (config.delta < 1, "a number below 1"),
        "start": (config.start != "linear", "--start dirichlet or none: a linear start is fitted without noise"),
        "gate": (config.gate in ("fixed", "linear", "mlp", "random"),
                 "fixed, linear, mlp or random: other gates store the users or domains of the data"),
        "gate_balance": (config.gate_balance == 0, "0: the bonus depends on all examples of a step together"),
        "weights": (config.weights != "update",
                    "uniform, numbers, or --gate linear: the closed form sums responsibilities without noise"),
        "validation": (not config.validation, "none: the guarantee does not cover the choice of the best parameters"),
        "robust": (config.robust == 0, "0: weights of users depend on losses without noise"),
        "em": (config.em == "minibatch", "minibatch: responsibilities may depend on the current parameters only"),
        "estep": (config.estep != "first",
                  "all or context: responsibilities may depend on the current parameters only"),
        "variant": (config.variant not in SAMPLED, "exact, tempered or hard"),
        "privacy_unit": (config.latent == "pair" or config.privacy_unit == "user",
                         "user, since --latent user makes the pairs of a user depend on each other")}
    return [(name, not fine, f"got {getattr(config, name)} with --epsilon; choose {want}")
            for name, (fine, want) in wanted.items()]
