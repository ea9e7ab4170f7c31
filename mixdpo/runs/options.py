"""What can be asked of a run, and what goes together."""

import math
from dataclasses import asdict, dataclass, fields

from mixdpo.config import InputError, convert
from mixdpo.dpo import LABEL_LOSSES
from mixdpo.gates import KINDS, READS_PROMPT, TRAINED, first_weights
from mixdpo.mixture import SAMPLED, VARIANTS
from mixdpo.runs.rundir import compute_dtype

LARGEST = (2 - 2**-23) * 2.0**127   # float32's largest number: everything over K is float32


@dataclass(frozen=True)
class TrainConfig:
    """Trains DPO (--experts 1) or a mixture of K expert policies on preferences."""

    # --- data and model
    data: str                       # * preferences, .jsonl or .jsonl.gz: prompt, chosen, rejected and, if known, user
    model: str                      # * reference model: gpt2, smollm2, llama-3.2-1b, a directory or a .gguf file; with
                                    # --sharing models also K of them: a,b
    out: str                        # * directory of the run; an unfinished run in it is resumed
    max_prompt: int = 256           # longest prompt in tokens; a longer prompt loses its first tokens
    max_response: int = 256         # longest response in tokens, end token included; a longer response loses its last
                                    # tokens
    drop: bool = False              # true: skip and report lines that cannot be used; false: stop with an error
    data_folder: str = ""           # folder that is searched for model and data files before a download; empty: none

    # --- mixture
    experts: int = 2                # * number of experts K; 1 is DPO
    sharing: str = "heads"          # * heads (K heads on one trunk), lora (K adapters in one frozen model) or models (K
                                    # models)
    rank: int = 16                  # rank of low-rank heads or adapters; 0: full heads. With --experts 1 it needs
                                    # --train-trunk false or --sharing lora: without them the model is trained as it is
                                    # (DPO)
    targets: str = ""               # with --sharing lora: the projections with adapters, comma-separated; empty: c_attn
                                    # (GPT-2), or q_proj,v_proj (Llama)
    train_trunk: bool = True        # * false: freeze the trunk and train the heads alone; also for one head (--experts
                                    # 1)
    latent: str = "pair"            # * unit that has one latent type: pair, or user (with all of the user's pairs)
    init_experts: str = ""          # start of each expert, K entries, comma-separated: RUN:k (expert k of a finished
                                    # run) or fresh (the reference); empty: all fresh
    freeze: str = ""                # experts that are not trained: their numbers from 0, as in 0,2, or all; empty: none

    # --- mixture weights
    gate: str = "fixed"             # * what the mixture weights depend on: fixed (nothing), linear or mlp (prompt),
                                    # user, prompt-user, domain, random (prompt, but not trained)
    gate_features: str = "last"     # what a gate reads of the prompt: last or mean hidden state of the reference
    gate_lr: float = 1e-2           # peak learning rate of the gate (AdamW)
    gate_temperature: float = 1.0   # softmax temperature of the gate at the first step; falls geometrically to 1 at
                                    # half of the run
    gate_entropy: float = 0.0       # bonus per nat of the entropy of each unit's weights; 0: none
    gate_balance: float = 0.0       # bonus per nat of the entropy of a step's mean weights; 0: none
    weights: str = "uniform"        # weights of a fixed gate: uniform, update (closed form after each step), or K
                                    # positive numbers as in 0.3,0.7
    prior: float = 1.0              # Dirichlet parameter of --weights update, at least 1; 1: maximum likelihood

    # --- E-step
    start: str = "dirichlet"        # * first responsibilities: dirichlet (random), linear (fit of linear rewards), none
                                    # (E-step)
    start_steps: int = 10           # optimizer steps that use the first responsibilities; after them the E-step runs
    restarts: int = 5               # number of fits of --start linear; the fit with the best bound is used
    estep: str = "all"              # * pairs that the E-step reads: all, context (never trained on) or first (first
                                    # visit only)
    context: int = 0                # * context pairs per user for --estep context; 0: those that the file marks
    em: str = "minibatch"           # log-likelihoods that the E-step uses: minibatch (of this step), incremental (of
                                    # earlier steps too, so that a user's pairs may lie in several batches)
    damping: float = 0.0            # share of a pair's log-likelihoods kept from its visit before (incremental)
    variant: str = "exact"          # E-step: exact, tempered, hard (all weight on the most likely expert), monte-carlo,
                                    # gumbel
    variant_temperature: float = 1.0  # temperature of --variant tempered or gumbel
    draws: int = 1                  # samples of the latent type per unit, with --variant monte-carlo

    # --- training
    beta: float = 0.1               # * strength of the pull to the reference: reward per nat of log-ratio
    epochs: int = 1                 # * passes over the data
    batch: int = 32                 # * largest number of pairs per optimizer step, users whole; with --epsilon the mean
                                    # number of examples
    lr: float = 2e-5                # * peak learning rate of trunk, models and full heads (AdamW)
    head_lr: float = 3e-4           # * peak learning rate of low-rank heads and adapters (AdamW)
    warmup: int = 10                # optimizer steps of linear warm-up; a linear decay to a tenth of the peak follows
    clip: float = 1.0               # largest gradient norm; inf: no clipping. With --epsilon: norm of each example's
                                    # gradient
    moments: str = "float32"        # AdamW's moments: float32, or bfloat16 (half of their memory, stochastic rounding)
    label_noise: float = 0.0        # assumed share of flipped labels, at least 0 and less than 0.5
    label_loss: str = "flips"       # what is made of it (dpo.py): flips (the likelihood), conservative (cDPO), robust
    robust: float = 0.0             # group-DRO step size over users; 0 turns it off
    seed: int = 0                   # seed of all random numbers, 0 to 4294967295

    # --- privacy (DP-SGD)
    epsilon: float = math.inf       # privacy budget epsilon; inf: no privacy
    delta: float = 1e-5             # privacy parameter delta; below 1 / number of examples
    privacy_unit: str = "pair"      # what one example is: pair, or user (all pairs of a user)
    examples: int = 0               # number of examples, if it is public; 0: the file's number, which the run then
                                    # discloses

    # --- memory and speed
    micro: int = 16                 # largest number of pairs per forward pass, users whole (a user with more pairs
                                    # exceeds it)
    head_rows: int = -1             # response tokens whose logits are in memory at once; -1: as many as 1 GiB holds; 0:
                                    # all, in vocabulary tiles
    in_backward: bool = False       # true: a trunk's parameters step within backward, and their gradients never lie in
                                    # memory all at once; wants --clip inf, and a step in one micro-batch
    checkpointing: bool = False     # true: activation checkpointing; less memory, one more forward pass
    packing: bool = False           # true: texts share a row without padding; needs a GPU
    compile: bool = False           # true: torch.compile for the trunks; the first steps wait for the compiler
    dtype: str = "auto"             # dtype of matrix products: auto (bfloat16 on hardware that is built for it),
                                    # float32 or bfloat16; parameters stay float32

    # --- checkpoints
    save_minutes: float = 10.0      # minutes between checkpoints; 0: one after each step; inf: only when the run ends
                                    # or is stopped
    keep: int = 2                   # number of newest checkpoints that an unfinished run keeps

    @property
    def models(self) -> list[str]:
        """The reference of all experts, or one for each."""
        return self.model.split(",") if self.sharing == "models" else [self.model]

    @property
    def frozen(self) -> list[int]:
        """The experts that stay as they are."""
        if self.freeze == "all":
            return list(range(self.experts))
        return sorted(convert(self.freeze, tuple[int, ...], "--freeze"))


def validate(config: TrainConfig) -> None:
    """Raises: InputError on values out of range, options without effect, and options that contradict each other."""
    validate_values(config)
    validate_effects(config)
    validate_experts(config)
    validate_e_step(config)
    if config.epsilon < math.inf:
        validate_privacy(config)


def validate_values(config: TrainConfig) -> None:
    """Each option by itself."""
    choices = {"sharing": ("heads", "lora", "models"), "latent": ("pair", "user"), "estep": ("all", "context", "first"),
               "start": ("dirichlet", "linear", "none"), "em": ("minibatch", "full", "incremental"), "gate": KINDS,
               "gate_features": ("last", "mean"), "variant": VARIANTS, "label_loss": LABEL_LOSSES,
               "moments": ("float32", "bfloat16"), "privacy_unit": ("pair", "user")}
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise InputError(f"got {getattr(config, name)!r}, wanted one of {', '.join(known)}", option=name)
    for name in [f.name for f in fields(config) if f.type is float]:
        value = getattr(config, name)
        if not (abs(value) <= LARGEST or value == math.inf and name in ("clip", "epsilon", "save_minutes")):
            raise InputError(f"got {value}, wanted a number of at most {LARGEST:.3g}: float32 holds no larger one",
                             option=name)
    least = {"experts": 1, "batch": 1, "micro": 1, "epochs": 1, "restarts": 1, "prior": 1, "rank": 0, "start_steps": 0,
             "warmup": 0, "head_rows": -1, "context": 0, "damping": 0, "draws": 1, "gate_entropy": 0, "gate_balance": 0,
             "robust": 0, "label_noise": 0, "keep": 1, "examples": 0, "seed": 0, "save_minutes": 0, "max_prompt": 1,
             "max_response": 1}
    above = dict.fromkeys(("beta", "epsilon", "delta", "clip", "lr", "head_lr", "gate_lr", "gate_temperature",
                           "variant_temperature"), 0)
    for name, bound in (least | above).items():
        value, word = getattr(config, name), "more than" if name in above else "at least"
        if value < bound or (name in above and value == bound):
            raise InputError(f"got {value}, wanted {word} {bound}", option=name)
    if config.seed >= 2**32:
        raise InputError(f"got {config.seed}, wanted at most {2**32 - 1}: a generator on a CPU reads 32 bits of its "
                         "seed, so larger ones would repeat smaller ones", option="seed")
    if config.label_noise >= 0.5:
        raise InputError(f"got {config.label_noise}, wanted less than 0.5: a coin tells nothing", option="label_noise")
    first_weights(config), compute_dtype(config.dtype, "cpu")               # each refuses what it does not know


def compared(config: TrainConfig) -> dict:
    """The options with which a run may be resumed: all but those that change nothing, or rounding only. --dtype auto is
    left out: what it stands for on this machine is compared once the device is known."""
    apart = ["out", "data_folder", "save_minutes", "keep", "micro", "head_rows", "checkpointing"]
    apart += ["dtype"] * (config.dtype == "auto")
    return {name: value for name, value in asdict(config).items() if name not in apart}


def short_run(config: TrainConfig, steps: int) -> list[str]:
    """Warnings about a run of so few optimizer steps that the E-step or the peak learning rate is never reached."""
    remedy = "more --epochs or a smaller --batch" + f", or --{{}} {max(1, steps // 4)}" * (steps > 1)
    found = []
    if config.experts > 1 and config.start != "none" and steps <= config.start_steps:
        random = ", and random responsibilities do not depend on the data" * (config.start == "dirichlet")
        found.append(f"WARNING: the run has {steps} optimizer steps, and all of them use the responsibilities of "
                     f"--start {config.start} (--start-steps {config.start_steps}): the E-step is never used{random}. "
                     "Choose " + remedy.format("start-steps"))
    if steps <= config.warmup:
        found.append(f"WARNING: the run has {steps} optimizer steps, and the learning rate rises over --warmup "
                     f"{config.warmup}: its last step has {steps / config.warmup:.0%} of the peak, the steps before it "
                     "less. Choose " + remedy.format("warmup"))
    return found


def validate_effects(config: TrainConfig) -> None:
    """Nothing is ignored in silence: an option that is not at its default must have an effect."""
    several, lora = config.experts > 1, config.sharing == "lora"
    heads = config.sharing == "heads" and (several or not config.train_trunk)           # else one model: DPO
    trained = several and config.gate in TRAINED
    needs = {"prior": (config.weights == "update", "--weights update"),
             "weights": (several and config.gate == "fixed", "--experts 2 or more and a fixed gate"),
             "gate": (several, "--experts 2 or more"), "gate_lr": (trained, "a gate that is trained"),
             "gate_temperature": (trained, "a gate that is trained"),
             "gate_entropy": (trained, "a gate that is trained"), "gate_balance": (trained, "a gate that is trained"),
             "gate_features": (config.gate in READS_PROMPT, "a gate that reads prompts"),
             "em": (several, "--experts 2 or more"), "damping": (config.em == "incremental", "--em incremental"),
             "variant": (several, "--experts 2 or more"),
             "draws": (config.variant == "monte-carlo", "--variant monte-carlo"),
             "variant_temperature": (config.variant in ("tempered", "gumbel"), "--variant tempered or gumbel"),
             "start": (several, "--experts 2 or more"), "sharing": (several or lora, "--experts 2 or more"),
             "label_loss": (config.label_noise > 0, "--label-noise"),
             **dict.fromkeys(("delta", "privacy_unit", "examples"), (config.epsilon < math.inf, "--epsilon")),
             "restarts": (config.start == "linear", "--start linear"),
             "start_steps": (several and config.start != "none", "several experts and a --start"),
             "rank": (lora or heads, "--experts 2 or more heads, --train-trunk false or --sharing lora"),
             "targets": (lora, "--sharing lora"),
             "head_lr": (lora or heads and config.rank > 0, "low-rank heads or adapters"),
             "lr": (not lora and (config.train_trunk or config.rank == 0), "a trunk or full heads that learn: low-rank "
                    "heads and adapters learn at --head-lr")}
    for name, (used, need) in needs.items():
        if getattr(config, name) != getattr(TrainConfig, name) and not used:
            raise InputError(f"has no effect without {need}; choose that, or leave this option out", option=name)


def validate_experts(config: TrainConfig) -> None:
    """What experts, and those taken over or frozen, want of the rest."""
    lora = config.sharing == "lora"
    if lora and config.rank == 0:
        raise InputError("got 0, which means full heads; wanted 1 or more with --sharing lora", option="rank")
    if not config.train_trunk and config.sharing != "heads":
        raise InputError(f"false trains heads alone, and --sharing {config.sharing} has no heads of its own; choose "
                         "--sharing heads, or leave this option out", option="train_trunk")
    if not config.train_trunk and config.experts == 1 and config.rank == 0:
        raise InputError("got 0 with --experts 1 and --train-trunk false, so nothing learns; choose 1 or more",
                         option="rank")
    if config.in_backward and (config.clip < math.inf or config.micro < config.batch or lora or not config.train_trunk):
        raise InputError("got true, by which each parameter steps before the norm of all gradients is known; wanted "
                         "with it --clip inf, --micro of at least --batch, and a trunk that learns: neither --sharing "
                         "lora nor --train-trunk false", option="in_backward")
    if "," in config.model and config.sharing != "models":
        raise InputError(f"got {config.model!r} with --sharing {config.sharing}, which has one reference; wanted one "
                         "model, or --sharing models", option="model")
    if len(config.models) not in (1, config.experts) or len(config.models) > 1 and "" in config.models:
        raise InputError(f"got {config.model!r} for {config.experts} experts; wanted one model, or one each",
                         option="model")
    begun, frozen = config.init_experts.split(",") if config.init_experts else [], config.frozen
    given = "init_experts" if begun else "freeze"
    if begun and len(begun) != config.experts:
        raise InputError(f"got {len(begun)} entries for {config.experts} experts; wanted RUN:k or fresh for each",
                         option="init_experts")
    if frozen and (frozen[0] < 0 or frozen[-1] >= config.experts or len(set(frozen)) < len(frozen)):
        raise InputError(f"got {config.freeze!r}, wanted some of 0 to {config.experts - 1}, or all", option="freeze")
    if (begun or frozen) and config.experts == 1:
        raise InputError("is for a mixture, and --experts is 1; wanted --experts 2 or more, or leave this option out",
                         option=given)
    if (begun or frozen) and config.sharing == "heads" and config.train_trunk:
        raise InputError("with --sharing heads it wants --train-trunk false: a head fits the trunk that it was trained "
                         "on, and a trunk that learns becomes another; add that", option=given)
    if begun and config.start != "none":
        raise InputError(f"takes over experts that differ from the first step on, and --start {config.start} is for "
                         "experts that are still equal; add --start none", option="init_experts")
    if len(frozen) == config.experts and config.gate not in TRAINED and config.weights != "update":
        raise InputError("got all experts, so only the weights are left to learn, and these are fixed; choose a --gate "
                         "that is trained, or --weights update", option="freeze")


def validate_privacy(config: TrainConfig) -> None:
    """What is learnt outside of DP-SGD, or of one example by way of another, is not in the budget: it is refused."""
    wanted = {"clip": (config.clip < math.inf, "a finite number: the most that one example may add"),
              "delta": (config.delta < 1, "less than 1"),
              "in_backward": (not config.in_backward, "false: an example's gradient is clipped as a whole"),
              "start": (config.start != "linear", "--start dirichlet or none: a linear start is fitted to the data"),
              "gate": (config.gate in ("fixed", "linear", "mlp", "random"), "fixed, linear, mlp or random: the others "
                       "have a place for each user or domain of the data, which names them"),
              "gate_balance": (config.gate_balance == 0, "0: it is a function of a whole step's weights"),
              "weights": (config.weights != "update", "weights of your own or --gate linear: the closed form sums "
                          "responsibilities without noise"),
              "robust": (config.robust == 0, "0: weights of users go by losses without noise"),
              "em": (config.em == "minibatch", "minibatch: responsibilities of the current parameters alone"),
              "estep": (config.estep != "first", "all or context: responsibilities of the current parameters alone"),
              "variant": (config.variant not in SAMPLED, "exact, tempered or hard"),
              "privacy_unit": (config.latent == "pair" or config.privacy_unit == "user", "user with --latent user: one "
                               "pair of a user tells about the user's others")}
    for name, (fine, want) in wanted.items():
        if not fine:
            raise InputError(f"got {getattr(config, name)} with --epsilon; wanted {want}", option=name)


def validate_e_step(config: TrainConfig) -> None:
    """What the E-step wants of the rest."""
    if config.context and config.estep != "context":
        raise InputError("sets pairs aside for --estep context; choose that, or leave this option out",
                         option="context")
    if config.damping >= 1:
        raise InputError(f"got {config.damping}, wanted less than 1: with 1 a pair's first log-likelihoods would be "
                         "kept for good", option="damping")
    if config.em == "full" and config.variant in SAMPLED:
        raise InputError(f"got {config.variant}, which draws anew at each step, and --em full keeps responsibilities "
                         "for an epoch; choose another variant, or --em minibatch", option="variant")
    if config.em != "minibatch" and config.estep == "first":
        raise InputError(f"got {config.em}, which computes responsibilities anew, and --estep first never does; choose "
                         "--em minibatch, or another --estep", option="em")
    if config.latent == "user" and config.gate not in ("fixed", "user"):
        raise InputError(f"got {config.gate}, which gives each pair its own weights, and --latent user has one prior a "
                         "user; choose --gate user, or --latent pair", option="gate")
    if config.estep == "context" and config.latent != "user":
        raise InputError("got context, which looks at other pairs of the same user; add --latent user",
                         option="estep")
    if config.estep == "first" and config.start == "dirichlet" and config.start_steps and config.experts > 1:
        raise InputError("got first, which keeps a pair's first responsibilities, and those of --start dirichlet are "
                         "random; wanted --start linear or none with it, or --start-steps 0", option="estep")
