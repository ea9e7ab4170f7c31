"""Sizes of the experiments. A preset holds numbers and options only; all presets run the same program.

    annotators              types of users
    tastes                  type -> weight of each reward in its utility, per spread; without it, a type is a reward
    users, pairs            users, and training pairs of each (data/experiment/judged.py: users of each type)
    new_users, new_pairs    the same for users without training data
    prompts, heldout        train prompts, and held-out prompts (judged.py: held-out share of the conversations)
    evaluate                held-out prompts that are completed
    evaluation              further options of EvalConfig
    continuations           sampled for each prompt
    heldout_pairs           pairs of each user on held-out prompts
    context                 pairs of each user that the E-step reads, on prompts without other training pairs (pairs.py)
    agree                   share of pairs on which all types agree; None: as they come
    margin                  smallest gap, in spreads (pairs.py)
    reviews                 texts for fine-tuning
    judge_reviews           largest number of reviews to fit the judge of sentiment
    finetune, train         options of FinetuneConfig; options of TrainConfig for all runs
    runs                    name -> options of the run
    domains                 domain -> types that judge it
    apart                   evaluation prompts in each set that is not held out (data/reviews.py)
"""

TWO, THREE = ["sentiment", "informativeness"], ["sentiment", "informativeness", "grammar"]
PRAISE, DETAIL = ["praise", "criticism"], ["detailed", "plain"]
COMMON = {"agree": 0.3, "margin": 1.0, "seed": 0, "judge_reviews": 12000, "continuations": 4, "max_response": 48}


def tastes(conflict: float, types: list[str], quality: str, taste: str) -> dict:
    """Two types of users who agree about quality and differ in taste: utility = quality +- conflict * taste."""
    return {"annotators": types,
            "tastes": {kind: {quality: 1.0, taste: sign * conflict} for kind, sign in zip(types, (1, -1))}}


# All like praise; one half likes detailed texts, the other plain ones.
HEADLINE = tastes(1.0, DETAIL, "sentiment", "informativeness")


ADAPTERS = {"sharing": "lora", "targets": "all", "rank": 16}
LONG = 1000000      # more steps than any run has


def runs(types: list[str], seeds: int = 1, betas: dict | None = None, start: bool = True, **shared) -> dict:
    """One policy for all (DPO); the mixture with one latent type for each user; one policy for each known type, which
    is the ceiling; and, with `start`, the mixture on the assignment of the linear start, without EM. All are adapters
    of the same rank on the same projections, and are trained on the same pairs. Each run once for each seed, the start
    for the first seed; betas: run -> further ones, since one policy stays near the reference where tastes are opposed,
    unless beta is small; shared: options of all runs."""
    single = ADAPTERS | {"experts": 1} | shared
    mixture = ADAPTERS | {"experts": len(types), "shared_rank": 16, "start": "linear", "latent": "user"} | shared
    out = {}
    for seed in range(seeds):
        end, own = f"-seed{seed}" * (seed > 0), {"seed": seed}
        out["dpo" + end] = single | own
        out["mixture" + end] = mixture | {"estep": "context", "em": "incremental"} | own
        out |= {f"dpo-{kind}{end}": single | {"data": f"train-{kind}.jsonl"} | own for kind in types}
        if start and seed == 0:
            out["start"] = mixture | {"estep": "first", "start_steps": LONG} | own
        for name, values in (betas or {}).items():
            out |= {f"{name}-beta{beta}{end}": out[name + end] | {"beta": beta} for beta in values}
    return out


def of_pairs(steps: int, **shared) -> dict:
    """The paper's own setting: one latent type for each pair, adapters (Case 1) and models (Case 2), for two and three
    experts. steps: with responsibilities from the linear start; shared: options of all runs."""
    both = {"start": "linear", "start_steps": steps, "latent": "pair"} | shared
    case_1, case_2 = both | ADAPTERS | {"shared_rank": 16}, both | {"sharing": "models"}
    return {f"pairs-{name}-K{K}": options | {"experts": K} for name, options in (("case-1", case_1), ("case-2", case_2))
            for K in (2, 3)}


CASE_2 = {"sharing": "models", "experts": 2, "start": "linear", "latent": "user", "estep": "context",
          "em": "incremental", "lr": 2e-5}
SMOKE = COMMON | HEADLINE | {
    "prompts": 24, "heldout": 12, "evaluate": 8, "max_response": 16, "margin": 0.1, "agree": None,
    "users": 4, "pairs": 10, "context": 4, "heldout_pairs": 4, "new_users": 2, "new_pairs": 6, "reviews": 60,
    "finetune": {"steps": 2, "batch": 4, "tokens": 64, "held": 8}, "evaluation": {"kl": (0.01,)},
    "train": {"epochs": 1, "batch": 20, "micro": 10}, "runs": runs(DETAIL),
}
QUICK = COMMON | HEADLINE | {
    "seed": 2, "prompts": 160, "heldout": 100, "evaluate": 100, "max_response": 32, "agree": None,
    "users": 32, "pairs": 12, "context": 5, "heldout_pairs": 5, "new_users": 8, "new_pairs": 16, "reviews": 1000,
    "finetune": {"steps": 16, "batch": 8, "tokens": 128, "lr": 1e-4}, "evaluation": {"kl": (1.0, 3.0), "examples": 0},
    "train": {"epochs": 1, "batch": 8, "micro": 8, "warmup": 4, "head_lr": 4e-4},
    "runs": runs(DETAIL, betas={"dpo": (0.02,)}, start=False),
}
CPU = COMMON | HEADLINE | {
    "prompts": 600, "heldout": 400, "evaluate": 400, "max_response": 32, "agree": None,
    "users": 96, "pairs": 16, "context": 6, "heldout_pairs": 6, "new_users": 24, "new_pairs": 24, "reviews": 2000,
    "finetune": {"steps": 40, "batch": 16, "tokens": 128, "lr": 1e-4}, "evaluation": {"kl": (1.0, 4.0)},
    "train": {"epochs": 1, "batch": 16, "micro": 16},
    "runs": runs(DETAIL, seeds=3, betas={"dpo": (0.02,)}) | {"mixture-models": CASE_2},
}
PAPER = COMMON | {
    "annotators": THREE, "prompts": 25000, "heldout": 10000, "evaluate": 10000,
    "users": 2520, "pairs": 20, "context": 8, "heldout_pairs": 4, "new_users": 120, "new_pairs": 32,
    "reviews": 20000, "judge_reviews": 22000,
    "finetune": {"steps": 2000, "batch": 64, "tokens": 128, "held": 256},
    "evaluation": {"kl": (1.0, 2.0, 4.0, 8.0)},
    "train": {"epochs": 2, "batch": 80, "micro": 80},
    "runs": runs(THREE, seeds=3, betas=dict.fromkeys(("dpo", "mixture"), (0.03, 0.3))) | of_pairs(300),
}
IMDB = {"smoke": SMOKE, "quick": QUICK, "cpu": CPU, "paper": PAPER}


def gates(names: list[str], steps: int, models: list[str] = []) -> dict:
    """DPO, at two betas, and mixtures whose weights depend on the prompt: MoE-DPO with learnt gates (moe-linear,
    moe-mlp) and frozen ones (moe-domain: told the domain; moe-random), and Mix-DPO, whose weights depend on nothing.
    The experts are adapters of the same rank (Case 1), and models (Case 2) for `models`. steps: of the first half of a
    run, whose responsibilities come from the linear start."""
    gate: dict[str, dict] = {
        "moe-linear": {"gate": "linear", "gate_features": "mean", "gate_lr": 0.05},
        "moe-mlp": {"gate": "mlp", "gate_features": "mean", "gate_lr": 0.02},
        "moe-domain": {"gate": "domain"}, "moe-random": {"gate": "random", "gate_features": "mean"}, "mix": {}}
    both = {"experts": 2, "start": "linear", "start_steps": steps}
    single = ADAPTERS | {"experts": 1}
    out = {"dpo": single, "dpo-beta0.02": single | {"beta": 0.02}}
    out |= {name: ADAPTERS | both | {"shared_rank": 16} | gate[name] for name in names}
    return out | {f"{name}-models": both | {"sharing": "models", "lr": 5e-5} | gate[name] for name in models}


ALL = ["moe-linear", "moe-mlp", "moe-domain", "moe-random", "mix"]
FEW = ["moe-linear", "moe-domain", "moe-random", "mix"]
TWO_DOMAINS = COMMON | {
    "annotators": TWO, "domains": {"movie": ["informativeness"], "book": ["sentiment"]}, "context": 0,
    "judge_reviews": 22000,
}
REVIEWS = {
    "smoke": TWO_DOMAINS | {
        "prompts": 24, "heldout": 12, "evaluate": 12, "apart": 2, "max_response": 16, "margin": 0.1, "users": 4,
        "pairs": 5, "heldout_pairs": 3, "reviews": 60, "judge_reviews": 14000,
        "finetune": {"steps": 2, "batch": 4, "tokens": 64, "held": 8},
        "train": {"epochs": 1, "batch": 10, "micro": 10}, "runs": gates(ALL, 2, ["moe-linear"]),
    },
    "quick": TWO_DOMAINS | {
        "prompts": 240, "heldout": 120, "evaluate": 200, "apart": 10, "continuations": 5, "max_response": 32,
        "users": 40, "pairs": 10, "heldout_pairs": 8, "reviews": 1500, "evaluation": {"kl": (2.0,)},
        "finetune": {"steps": 40, "batch": 8, "tokens": 128, "lr": 1e-4},
        "train": {"epochs": 1, "batch": 8, "micro": 8, "warmup": 4, "head_lr": 6e-4}, "runs": gates(FEW, 25),
    },
    "cpu": TWO_DOMAINS | {
        "prompts": 480, "heldout": 320, "evaluate": 400, "apart": 20, "continuations": 6, "max_response": 32,
        "users": 60, "pairs": 20, "heldout_pairs": 8, "reviews": 1500, "evaluation": {"kl": (1.0, 4.0)},
        "finetune": {"steps": 60, "batch": 16, "tokens": 128, "lr": 1e-4},
        "train": {"epochs": 1, "batch": 16, "micro": 16}, "runs": gates(ALL, 37, ["moe-linear", "moe-domain"]),
    },
    "paper": TWO_DOMAINS | {
        "prompts": 1200, "heldout": 400, "evaluate": 320, "apart": 40, "continuations": 8,
        "users": 200, "pairs": 20, "heldout_pairs": 8, "reviews": 1200,
        "finetune": {"steps": 200, "batch": 32, "tokens": 128},
        "evaluation": {"kl": (1.0, 2.0, 4.0, 8.0)},
        "train": {"epochs": 2, "batch": 40, "micro": 40}, "runs": gates(ALL, 100, ["moe-linear", "moe-domain"]),
    },
}


def of_users(types: list[str], context: int, steps: int, start: bool = True) -> dict:
    """The methods of `runs`, and MoE-DPO with weights for each user (moe-user), where each pair has a latent type of
    its own. context: pairs of each user that the E-step reads; steps: of the first half of moe-user, whose
    responsibilities come from the linear start."""
    out = runs(types, start=start)
    users = out["mixture"] | {"latent": "pair", "estep": "all", "em": "minibatch", "start_steps": steps}
    return out | {"mixture": out["mixture"] | {"context": context},
                  "moe-user": users | {"gate": "user", "gate_lr": 0.05}}


HELPFUL = ["helpful", "harmless"]
RATED = ["helpfulness", "honesty", "instruction_following", "truthfulness"]
# Here users and new_users are numbers for each type, heldout is a share, and heldout_pairs = 0 means all.
HH = {
    "smoke": {
        "seed": 0, "users": 2, "pairs": 8, "new_users": 1, "new_pairs": 4, "heldout": 0.25,
        "heldout_pairs": 24, "evaluate": 4, "max_prompt": 96, "max_response": 16,
        "train": {"epochs": 1, "batch": 12, "micro": 6}, "runs": of_users(HELPFUL, 3, 1),
    },
    "quick": {
        "seed": 1, "users": 16, "pairs": 30, "new_users": 6, "new_pairs": 20, "heldout": 0.22,
        "heldout_pairs": 800, "evaluate": 48, "max_prompt": 96, "max_response": 48,
        "train": {"epochs": 1, "batch": 16, "micro": 16}, "runs": of_users(HELPFUL, 10, 30, start=False),
    },
    "paper": {
        "seed": 0, "users": 40, "pairs": 40, "new_users": 10, "new_pairs": 32, "heldout": 0.25,
        "heldout_pairs": 0, "evaluate": 500, "max_prompt": 512, "max_response": 256,
        "train": {"epochs": 1, "batch": 80, "micro": 80}, "runs": of_users(HELPFUL, 10, 20),
    },
}
ULTRAFEEDBACK = {
    "smoke": HH["smoke"] | {"max_response": 24, "runs": of_users(RATED, 3, 1, start=False)},
    "quick": HH["quick"] | {"heldout": 0.1, "heldout_pairs": 800, "max_prompt": 256, "max_response": 96,
                            "runs": of_users(RATED, 10, 60, start=False)},
    "paper": {
        "seed": 0, "users": 250, "pairs": 40, "new_users": 50, "new_pairs": 32, "heldout": 0.1,
        "heldout_pairs": 8000, "evaluate": 1000, "max_prompt": 512, "max_response": 512,
        "train": {"epochs": 1, "batch": 80, "micro": 16}, "runs": of_users(RATED, 10, 250),
    },
}
# The published protocol (data/experiment/leaderboard.py). train, test: choices.
LEADERBOARD = {
    "benchmarks": {
        "UF-P-2": {"types": ["helpfulness", "honesty"], "train": 7516, "test": 832},
        "UF-P-4": {"types": RATED, "train": 15740, "test": 1660}},
    "seeds": 3, "max_prompt": 512, "max_response": 512,
    "train": {"epochs": 1, "batch": 32, "micro": 8, "head_lr": 1e-4},
}
