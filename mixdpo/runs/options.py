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
    """Trains DPO (experts = 1) or a mixture on preferences (JSON Lines: prompt, chosen, rejected, maybe user)."""

    data: str                       # preference file, .jsonl or .jsonl.gz
    model: str                      # reference and start: gpt2, smollm2, llama-3.2-1b, a directory; or K of them: a,b
    out: str                        # run directory; an unfinished run in it is resumed
    experts: int = 2                # K; 1 is DPO
    sharing: str = "heads"          # heads: one trunk, K unembeddings; lora: frozen model, K adapters; models: K models
    rank: int = 16                  # rank of the heads W + W A_k B_k (0: full) or of the adapters W + 2 B_k A_k
    targets: str = ""               # lora: projections with adapters, comma-separated; empty: c_attn, or q_proj,v_proj
    train_trunk: bool = True        # false: only the heads learn
    latent: str = "pair"            # one type a pair, or one a user (M11)
    estep: str = "all"              # E-step on: all pairs, context (never trained on), first (a pair's first visit)
    context: int = 0                # pairs of each user set aside for the E-step, where the file does not mark them
    em: str = "minibatch"           # E-step on: minibatch (a step's groups), full (all, before each epoch), incremental
                                    # (log-likelihoods are kept, so a user's pairs need not stand in one batch)
    damping: float = 0.0            # share of a pair's log-likelihoods kept from its visit before (incremental)
    variant: str = "exact"          # of the E-step (M12): exact, tempered, hard (all on the likeliest expert, a tie is
                                    # shared equally), monte-carlo, gumbel, straight-through
    variant_temperature: float = 1.0    # of tempered and gumbel
    draws: int = 1                  # samples of z a group (monte-carlo)
    gate: str = "fixed"             # w(x) (M9): fixed (--weights), linear, mlp, user, prompt-user, random, domain
    gate_features: str = "last"     # of the prompt: last or mean hidden state of the reference
    gate_lr: float = 1e-2           # AdamW's peak learning rate of the gate
    gate_temperature: float = 1.0   # of the gate's softmax at the start; falls geometrically to 1 over half the run
    gate_entropy: float = 0.0       # bonus a nat of the entropy of each group's weights
    gate_balance: float = 0.0       # bonus a nat of the entropy of the step's mean weights
    weights: str = "uniform"        # of a fixed gate (M10): uniform, update (closed form, each step), or 0.3,0.7
    prior: float = 1.0              # Dirichlet prior of the closed-form update
    robust: float = 0.0             # group-DRO step size over users: log weight += this times the user's loss as last
                                    # seen, each step, so those served worst count more; 0 turns it off
    init_experts: str = ""          # where each begins: K of RUN:k (expert k of a run) and fresh, comma-separated
    freeze: str = ""                # experts that stay as they are: 0,2 and so on, or all
    label_noise: float = 0.0        # share of choices taken to be wrong, turned round at random; under 0.5
    epsilon: float = math.inf       # privacy budget (DP-SGD), with --clip for each example; inf: no privacy
    delta: float = 1e-5             # the chance that epsilon does not hold; below one over the examples
    privacy_unit: str = "pair"      # whose part in the data is hidden: pair, or user with all of their pairs
    examples: int = 0               # with --epsilon: their number, declared public; 0: the file's, which this discloses
    label_loss: str = "flips"       # what is made of it (dpo.py): flips (the likelihood), conservative (cDPO), robust
    start: str = "dirichlet"        # first responsibilities: dirichlet (random), linear (linear rewards), none (saddle)
    start_steps: int = 10           # optimizer steps that use them before the E-step takes over
    restarts: int = 5               # starts of the linear mixture; the best bound is taken
    beta: float = 0.1               # strength of the pull to the reference, per nat
    lr: float = 2e-5                # AdamW's peak learning rate
    head_lr: float = 3e-4           # the same for the low-rank factors A_k, B_k of heads or adapters
    epochs: int = 1                 # passes over the data
    batch: int = 32                 # pairs an optimizer step, at most; whole users. With --epsilon: mean examples
    micro: int = 16                 # pairs a forward pass, at most; whole users, so one large user may exceed it
    head_rows: int = -1             # response tokens a head micro-batch, about; -1: as many as memory allows (KEPT in
                                    # plan.py); 0: all at once, in vocabulary tiles
    warmup: int = 10                # steps of linear warm-up; then linear decay to a tenth
    clip: float = 1.0               # largest gradient norm; inf: none
    moments: str = "float32"        # AdamW's: float32, or bfloat16, rounded at random: half of their memory
    in_backward: bool = False       # true: a trunk's parameters step within backward, and their gradients never lie in
                                    # memory all at once; wants --clip inf, and a step in one micro-batch
    max_prompt: int = 256           # tokens; longer prompts are cut from the left
    max_response: int = 256         # tokens, the end token among them
    drop: bool = False              # true: faulty lines are dropped and reported, not an error
    checkpointing: bool = False     # activation checkpointing: less memory, one more forward pass
    packing: bool = False           # on a GPU: texts behind one another in one row, no padding between them
    compile: bool = False           # torch.compile for the trunks; the first steps wait for the compiler
    dtype: str = "auto"             # of the products: auto, float32, bfloat16; parameters stay float32
    seed: int = 0                   # of everything random
    save_minutes: float = 10.0      # between checkpoints
    keep: int = 2                   # newest checkpoints kept until the run is finished
    data_folder: str = ""           # local files looked into before anything is fetched

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
