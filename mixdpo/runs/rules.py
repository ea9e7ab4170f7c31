"""Rules for the options of a training run: their values, and which of them go together."""

import math
from dataclasses import fields

from mixdpo.config import SEEDS, InputError, check_choices, check_ranges, compute_dtype
from mixdpo.gates import KINDS, READS_PROMPT, TRAINED, first_weights
from mixdpo.runs.distributed import world
from mixdpo.runs.loggers import MODULES
from mixdpo.runs.options import TrainConfig
from mixdpo.text.shapes import parse_columns
from mixdpo.variants.e_steps import SAMPLED, VARIANTS

LARGEST = (2 - 2**-23) * 2.0**127   # float32's largest number: log-probs, margins and parameters are float32

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


def validate(config: TrainConfig) -> None:
    """Raises: InputError on values out of range, options without effect, and options that contradict each other."""
    validate_values(config)
    parse_columns(config.columns)
    refuse(without_effect(config))
    refuse(unfit_experts(config))
    refuse(unfit_e_step(config))
    refuse(unfit_shard(config))
    refuse(unfit_expert_parallel(config))
    if config.epsilon < math.inf:
        refuse(unfit_privacy(config))


def refuse(rules: list[tuple[str, bool, str]]) -> None:
    """rules: (option, whether the configuration breaks the rule, message). Raises: InputError of the first broken
    rule."""
    for option, broken, message in rules:
        if broken:
            raise InputError(message, option=option)


def validate_values(config: TrainConfig) -> None:
    """Raises: InputError on an option whose value is wrong whatever the other options are."""
    check_choices(config, CHOICES)
    check_ranges(config, RANGES)
    refuse([(f.name, LARGEST < abs(getattr(config, f.name)) < math.inf,
             f"got {getattr(config, f.name)}, more than float32 can hold; choose at most {LARGEST:.3g}")
            for f in fields(config) if f.type is float])
    first_weights(config), compute_dtype(config.dtype, "cpu")               # each checks its own option


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


def unfit_expert_parallel(config: TrainConfig) -> list[tuple[str, bool, str]]:
    """Rules for experts in different processes."""
    K, private = config.experts, config.epsilon < math.inf
    needs = [(K > 1 and config.sharing == "models", "--sharing models and --experts 2 or more"),
             (world() % K == 0, f"a number of processes that is a multiple of --experts {K}, not {world()}: start it "
                                f"with torchrun --standalone --nproc-per-node {K} train.py ..."),
             (not config.shard, "--shard false, because each model is in one process"),
             (config.moments == "float32", "--moments float32"),
             (not private, "no --epsilon: an example's gradient is clipped over all experts together")]
    return [("expert_parallel", config.expert_parallel and not fine, f"needs {need}") for fine, need in needs]


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
