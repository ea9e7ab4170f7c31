"""Sizes of the IMDb experiment. One program: a preset is numbers, nothing else.

    annotators      types of users; each user judges by one of them     users, pairs    users, and pairs each of them judges for training
    prompts         train prompts                                       heldout         held-out prompts; `evaluate` of them get completions
    continuations   sampled for each prompt                             heldout_pairs   pairs each user judges on held-out prompts
    agree           share of pairs on which annotators agree            margin          least gap, in standard deviations (data/pairs.py)
    reviews         reviews of the supervised step                      judge_reviews   most reviews the judge of sentiment is fitted on
    finetune        options of train.FinetuneConfig                     train           options of train.TrainConfig that all runs share
    runs            what is trained: name -> more options               seeds           each run once a seed
"""

TWO, THREE = ["sentiment", "informativeness"], ["sentiment", "informativeness", "grammar"]
COMMON = {"agree": 0.3, "margin": 0.5, "seed": 0, "judge_reviews": 12000}


def runs(experts: int, **users) -> dict:
    """DPO, and the mixture with one type a pair as in the paper and with one type a user."""
    return {"dpo": {"experts": 1}, "mix-pair": {"experts": experts, "latent": "pair"}, "mix-user": {"experts": experts, "latent": "user", **users}}


PRESETS = {
    "smoke": COMMON | {
        "annotators": TWO, "prompts": 24, "heldout": 12, "evaluate": 8, "continuations": 4, "max_response": 16, "users": 4, "pairs": 10,
        "heldout_pairs": 4, "margin": 0.1, "reviews": 60, "judge_reviews": 8000, "finetune": {"steps": 2, "batch": 4, "tokens": 64, "held": 8},
        "train": {"epochs": 1, "batch": 20, "micro": 10}, "runs": runs(2, start="linear"), "seeds": [0],
    },
    "quick": COMMON | {
        "annotators": TWO, "prompts": 240, "heldout": 96, "evaluate": 64, "continuations": 4, "max_response": 48, "users": 40, "pairs": 12,
        "heldout_pairs": 6, "reviews": 1500, "finetune": {"steps": 60, "batch": 16, "tokens": 128, "lr": 1e-4},
        "train": {"epochs": 2, "batch": 24, "micro": 12}, "runs": runs(2, start="linear"), "seeds": [0],
    },
    "cpu": COMMON | {
        "annotators": TWO, "prompts": 800, "heldout": 240, "evaluate": 128, "continuations": 4, "max_response": 48, "users": 160, "pairs": 20,
        "heldout_pairs": 6, "reviews": 4000, "finetune": {"steps": 150, "batch": 16, "tokens": 128, "lr": 1e-4},
        "train": {"epochs": 2, "batch": 40, "micro": 20}, "runs": runs(2, start="linear", estep="context", context=8), "seeds": [0, 1, 2],
    },
    "paper": COMMON | {
        "annotators": THREE, "prompts": 25000, "heldout": 10000, "evaluate": 10000, "continuations": 4, "max_response": 48, "users": 2500, "pairs": 20,
        "heldout_pairs": 4, "reviews": 20000, "judge_reviews": 22000, "finetune": {"steps": 2000, "batch": 64, "tokens": 128, "held": 256},
        "train": {"epochs": 2, "batch": 80, "micro": 80}, "runs": runs(3, start="linear", estep="context", context=8), "seeds": [0],
    },
}
