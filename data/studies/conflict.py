"""Conflict: how much a mixture is worth depends on how far the tastes of people are opposed.

Real reviews, SmolLM2, and users of two types who agree about quality and differ in taste:

    utility = quality + c * taste   or   quality - c * taste      quality: informativeness; taste: sentiment, in spreads

At c = 0 all users are alike; the larger c, the more they are opposed. The last world has the paper's annotators, of
which one likes sentiment and the other informativeness. In every world all methods see the same pairs, as often, with
adapters of the same rank on the same projections (data/experiment/presets.py): one policy for all (DPO), the mixture,
one policy per known type (the ceiling), and experts that are trained on the linear start's assignment, without EM.

Own reward is compared at equal KL (mixdpo/evaluation/frontier.py). A method's frontier comes from one run: policies
between the reference and the run (mixdpo/evaluation/strength.py).
"""

from pathlib import Path

from data.experiment.presets import TWO, runs, tastes
from data.experiment.simulated import FILES, data_of_prompts, judge, longest_prompt
from data.imdb import DATASET
from data.report.pictures import curves
from data.studies.aggregate import by, mean_over, pm_of, table_of
from data.studies.study import Study
from eval import EvalConfig, evaluate
from mixdpo.evaluation import frontier
from mixdpo.evaluation.statistics import mean_se
from mixdpo.text.tokenizer import load_tokenizer
from train import TrainConfig, run

SIZES = {
    "smoke": {"prompts": 24, "heldout": 12, "users": 4, "pairs": 8, "context": 3, "heldout_pairs": 2, "evaluate": 8,
              "continuations": 4, "max_response": 16, "margin": 0.1, "reviews": 60, "batch": 16, "seeds": 1,
              "conflicts": (1.0,), "finetune": {"steps": 2, "batch": 4, "tokens": 64, "held": 8}},
    "quick": {"prompts": 300, "heldout": 150, "users": 40, "pairs": 12, "context": 5, "heldout_pairs": 4,
              "evaluate": 150, "continuations": 6, "max_response": 32, "margin": 1.0, "reviews": 1500, "batch": 12,
              "seeds": 3, "conflicts": (0.0, 1.0, 3.0),
              "finetune": {"steps": 40, "batch": 8, "tokens": 128, "lr": 1e-4}},
    "full": {"prompts": 800, "heldout": 600, "users": 120, "pairs": 20, "context": 8, "heldout_pairs": 8,
             "evaluate": 600, "continuations": 6, "max_response": 32, "margin": 1.0, "reviews": 3000, "batch": 24,
             "seeds": 3, "conflicts": (0.0, 0.5, 1.0, 2.0, 3.0),
             "finetune": {"steps": 60, "batch": 16, "tokens": 128, "lr": 1e-4}},
}
KL = (1.0, 2.0, 4.0, 8.0)       # nats
PAPER = "paper's annotators"


def settings(preset: str) -> dict:
    """The sizes as a preset of the experiment."""
    return {"seed": 0, "judge_reviews": 12000, "agree": None} | SIZES[preset]


def cells(preset: str) -> list[dict]:
    worlds = [f"c = {c:g}" for c in SIZES[preset]["conflicts"]] + [PAPER] * (preset != "smoke")
    return [{"world": world, "seed": seed, "preset": preset}
            for seed in range(SIZES[preset]["seeds"]) for world in worlds]


def prepare(home: Path, preset: str, data: str | None) -> None:
    """Texts, reference, continuations and their scores, once for all cells."""
    data_of_prompts(home / f"conflict-{preset}", DATASET, settings(preset), "smollm2", None, data or "")


def measure(cell: dict, folder: Path) -> dict:
    preset, shared = settings(cell["preset"]), folder.parent.parent / f"conflict-{cell['preset']}"
    for name in (*FILES.values(), *(f"{stage}-{file}" for stage in ("sampled", "scored") for file in FILES.values()),
                 "judge.json", "sentiment.safetensors", "split.json"):
        (folder / name).symlink_to((shared / name).resolve())
    preset |= {"annotators": TWO} if cell["world"] == PAPER else tastes(float(cell["world"].split()[-1]))
    preset |= {"seed": cell["seed"]}
    max_prompt = longest_prompt(load_tokenizer(str(shared / "reference")))
    judge(folder, preset, max_prompt)
    for name, options in runs(preset["annotators"], batch=preset["batch"]).items():
        options = {"data": "train.jsonl", "seed": cell["seed"]} | options
        run(TrainConfig(model=str(shared / "reference"), out=str(folder / name), max_prompt=max_prompt,
                        max_response=preset["max_response"], save_minutes=1e9,
                        **options | {"data": str(folder / options["data"])}))
    results = evaluate(EvalConfig(str(folder), limit=preset["evaluate"], kl=KL, examples=0))
    users = {name: results["preferences"][name]["alignment_train"].get("matched", 1.0) for name in ("mixture", "start")}
    return {"own_reward": results["own_reward"], "users": users["mixture"],
            "users_start": users["start"], "accuracy": {name: results["preferences"][name]["accuracy_own"]["mean"]
                                                        for name in ("dpo", "mixture", "start")}}


# ---- the page


def pooled(found: list[dict]) -> list[frontier.Method]:
    """The methods of a world, with all its seeds."""
    return frontier.methods({"own_reward": [row for f in found for row in f["own_reward"]]})


def page(rows):
    worlds, body, lines, reading = by(rows, "world"), [], {}, []
    for world, found in worlds.items():
        methods = {m.name: m for m in pooled(found)}
        mixture, dpo, ceiling = frontier.main_methods(list(methods.values()))
        kl = frontier.common_kl(mixture, dpo, ceiling, methods["start"])
        gap, best, start = (frontier.compare(mixture, other, kl) for other in (dpo, ceiling, methods["start"]))
        d, e = gap["difference"], start["difference"]
        gains = gap["ours"], gap["theirs"], best["theirs"], start["theirs"]
        body.append([world, f"{gap['kl']:.1f}", *(f"{gain:+.3f}" for gain in gains),
                     pm_of(d, "+"), f"{d['mean'] / d['se']:+.1f}", pm_of(e, "+"), mean_over(found, "users_start"),
                     mean_over(found, "users")])
        reading.append((world, d))
        for m in methods.values():
            if m.name in ("dpo", "mixture") or m is ceiling:
                kl, gain = m.line()
                lines.setdefault(world, {})[m.name] = [(x, y, 0.0) for x, y in zip(kl, gain)]
    clear = [world for world, d in reading if d["mean"] > 2 * d["se"]]
    behind = [world for world, d in reading if d["mean"] < -2 * d["se"]]
    lost = mean_se([f["users"] - f["users_start"] for _, f in rows])
    text = (f"At equal KL the mixture is ahead of one policy for all by more than two standard errors at "
            f"{', '.join(clear) or 'no world'}, and behind at {', '.join(behind) or 'none'}. EM changes the share of "
            f"users that are assigned to their type by {lost['mean']:+.3f} on average over worlds and seeds, and by "
            f"{min(f['users'] - f['users_start'] for _, f in rows):+.3f} at worst.")
    head = ["world", "KL", "mixture", "one policy (DPO)", "known types", "start alone", "mixture minus DPO", "in SEs",
            "mixture minus start", "users right, start", "users right, EM"]
    note = ("Gain in own reward at the largest KL (nats) that all methods reach, in spreads (the paper's "
            "annotators: on their scale from 0 to 1); "
            "errors by a bootstrap over prompts and seeds. Users right: share of users assigned to their type.")
    return "\n\n".join([text, table_of(head, body), note]), {
        "frontier": curves(lines, ("KL to the reference (nats)", "gain in own reward"), columns=4)}


STUDY = Study(
    "Conflict: what a mixture is worth",
    "Users share a sense of quality and differ in taste by a dial c. At equal KL, when is a mixture worth more to each "
    "user than one policy for all, and does EM keep the users that the start has assigned?",
    cells, measure, page, prepare)
