"""The options of a training run. rules.py says which values they may have, and which of them go together."""

import math
from dataclasses import asdict, dataclass

from mixdpo.config import convert


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
    expert_parallel: bool = False   # true: with --sharing models, each process that torchrun starts has one of the K
                                    # experts; K must divide the number of processes
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


def compared(config: TrainConfig) -> dict:
    """The options that must be equal for a run to be resumed: all but those that change nothing, or rounding only.
    --dtype auto is left out: the dtype that it stands for is compared once the device is known. So is --columns, which
    is a part of the key of the data."""
    free = ["out", "data_folder", "columns", "save_minutes", "keep", "micro", "head_rows", "checkpointing",
            "shard", "expert_parallel", "log"]
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
