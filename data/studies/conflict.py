"""Conflict: how much a mixture is worth depends on how far the tastes of people are opposed.

Real reviews, SmolLM2, and users of two types who agree about quality and differ in taste:

    utility = quality + c * taste   or   quality - c * taste      quality: informativeness; taste: sentiment, in spreads

At c = 0 all users are alike; the larger c, the more they are opposed. Four more worlds, with one seed, have

    detail                quality and taste exchanged: all like praise, and differ in the detail that they want
    paper's annotators    one likes sentiment, the other informativeness
    three annotators      these, and a third one, who likes good grammar
    four tastes           types who like both rewards, one and not the other, or neither

In every world all methods see the same pairs, as often, with adapters of the same rank on the same projections
(data/experiment/presets.py): one policy for all (DPO), the mixture, one policy per known type (the ceiling), and, for
the first seed, the mixture on the linear start's assignment, without EM. With three annotators also the paper's own
setting: one latent type for each pair (presets.of_pairs). And, in more files: how many types train.py chooses.

Own reward is compared at equal KL (mixdpo/evaluation/frontier.py). A method's frontier comes from one run: policies
between the reference and the run (mixdpo/evaluation/strength.py).
"""

from pathlib import Path

from data.experiment.presets import HEADLINE, PRAISE, THREE, TWO, of_pairs, runs, tastes
from data.experiment.simulated import FILES, data_of_prompts, judge, longest_prompt
from data.imdb import DATASET
from data.report.pictures import curves
from data.studies.aggregate import by, mean_over, pm_of, table_of
from data.studies.study import Study
from eval import EvalConfig, evaluate
from mixdpo.config import as_flag
from mixdpo.evaluation import auto, frontier
from mixdpo.evaluation.statistics import NONE, mean_se
from mixdpo.text.tokenizer import load_tokenizer
from train import TrainConfig, run

# As a preset of data/experiment/presets.py, and: seeds and conflicts: of the worlds with a dial; counts: files of each
# of them in which train.py chooses the number of types; batch: pairs in a step.
SIZES = {
    "smoke": {"prompts": 24, "heldout": 12, "users": 4, "pairs": 8, "context": 3, "heldout_pairs": 2, "evaluate": 8,
              "continuations": 4, "max_response": 16, "margin": 0.1, "reviews": 60, "batch": 16, "seeds": 1,
              "counts": 1, "conflicts": (1.0,), "finetune": {"steps": 2, "batch": 4, "tokens": 64, "held": 8}},
    "quick": {"prompts": 300, "heldout": 300, "users": 40, "pairs": 12, "context": 5, "heldout_pairs": 4,
              "evaluate": 300, "continuations": 6, "max_response": 32, "margin": 1.0, "reviews": 1500, "batch": 12,
              "seeds": 3, "counts": 5, "conflicts": (0.0, 1.0, 3.0),
              "finetune": {"steps": 40, "batch": 8, "tokens": 128, "lr": 1e-4}},
    "full": {"prompts": 800, "heldout": 600, "users": 120, "pairs": 20, "context": 8, "heldout_pairs": 8,
             "evaluate": 600, "continuations": 6, "max_response": 32, "margin": 1.0, "reviews": 3000, "batch": 24,
             "seeds": 3, "counts": 5, "conflicts": (0.0, 0.5, 1.0, 2.0, 3.0),
             "finetune": {"steps": 60, "batch": 16, "tokens": 128, "lr": 1e-4}},
}
KL = (0.5, 2.0, 4.0)            # nats, of the policies between the reference and a run
COMPARED = (0.5, 1.0, 2.0, 4.0, 8.0)        # nats, at which the page compares
ALIKE = ("c = 0", "c = 0.5", "c = 1")       # worlds in which one policy can go far from the reference
FOUR = {f"{text}-{tone}": {"informativeness": a, "sentiment": b}
        for text, a in (("full", 1.0), ("bare", -1.0)) for tone, b in (("praise", 1.0), ("criticism", -1.0))}
OTHERS = {"detail, c = 1": HEADLINE, "paper's annotators": {"annotators": TWO},
          "three annotators": {"annotators": THREE}, "four tastes": {"annotators": list(FOUR), "tastes": FOUR}}
PAPER = {"world": "three annotators", "seed": 0, "latent": "pair"}


def settings(preset: str) -> dict:
    """The sizes as a preset of the experiment."""
    return {"seed": 0, "judge_reviews": 12000, "agree": None} | SIZES[preset]


def cells(preset: str) -> list[dict]:
    of, dials = SIZES[preset], [f"c = {c:g}" for c in SIZES[preset]["conflicts"]]
    others = [(world, 0) for world in OTHERS if preset != "smoke"]
    policies = [(world, seed) for seed in range(of["seeds"]) for world in dials] + others
    counts = [(world, seed) for seed in range(of["counts"]) for world in dials] + others
    return [{"world": world, "seed": seed, "preset": preset} for world, seed in policies] + [
        {"world": world, "seed": seed, "preset": preset, "counts": True} for world, seed in counts] + [
        PAPER | {"preset": preset}]


def prepare(home: Path, preset: str, data: str | None) -> None:
    """Texts, reference, continuations and their scores, once for all cells."""
    data_of_prompts(home / f"conflict-{preset}", DATASET, settings(preset), "smollm2", None, data or "")


def write_world(cell: dict, folder: Path, shared: Path) -> tuple[dict, dict]:
    """Writes the preference files of a cell. Returns its sizes, and the options of TrainConfig that all runs have."""
    for name in (*FILES.values(), *(f"{stage}-{file}" for stage in ("sampled", "scored") for file in FILES.values()),
                 "judge.json", "sentiment.safetensors", "split.json"):
        if not (folder / name).exists():                                    # an interrupted call left it
            (folder / name).symlink_to((shared / name).resolve())
    preset = settings(cell["preset"]) | {"seed": cell["seed"]}
    dial = 0.0 if cell["world"] in OTHERS else float(cell["world"].split()[-1])
    preset |= OTHERS.get(cell["world"]) or tastes(dial, PRAISE, "informativeness", "sentiment")
    types = len(preset["annotators"])
    preset["users"] = preset["users"] // types * types
    max_prompt = longest_prompt(load_tokenizer(str(shared / "reference")))
    judge(folder, preset, max_prompt)
    return preset, {"model": str(shared / "reference"), "max_prompt": max_prompt,
                    "max_response": preset["max_response"]}


def measure(cell: dict, folder: Path) -> dict:
    shared = folder.parent.parent / f"conflict-{cell['preset']}"
    preset, common = write_world(cell, folder, shared)
    if "counts" in cell:                                                    # how many types does the program choose?
        words = {"data": folder / "train.jsonl", "out": shared / "chosen"} | common
        argv = [str(word) for name, value in words.items() for word in (as_flag(name), value)]
        return {"types": auto.parse(argv, "train.py").experts}
    steps = preset["users"] * preset["pairs"] // preset["batch"]
    betas = {} if cell["world"] in ALIKE else {"dpo": (0.02,)}              # opposed pairs hold it at the reference
    made = of_pairs(max(1, steps // 2), batch=preset["batch"], warmup=4) if "latent" in cell else runs(
        preset["annotators"], betas=betas, start=cell["seed"] == 0, batch=preset["batch"], warmup=4)
    for name, options in made.items():
        options = {"data": "train.jsonl"} | common | options | {"seed": cell["seed"]}
        run(TrainConfig(out=str(folder / name), **options | {"data": str(folder / options["data"])}))
    results = evaluate(EvalConfig(str(folder), limit=preset["evaluate"], kl=KL, examples=0))
    if "latent" in cell:
        return {"own_reward": results["own_reward"], "policies": {
            name: {what: row[what] for what in (*preset["annotators"], "kl")}
            for name, row in results["policies"].items() if "sparse" not in name}}
    of = results["preferences"]
    users = {name: of[name]["alignment_train"].get("matched", 1.0) for name in ("mixture", "start") if name in of}
    return {"own_reward": results["own_reward"], "users": users["mixture"], "users_start": users.get("start"),
            "accuracy": {name: of[name]["accuracy_own"]["mean"] for name in ("dpo", *users)}}


# ---- the page


def pooled(found: list[dict]) -> list[frontier.Method]:
    """The methods of a world, with all its seeds."""
    return frontier.methods({"own_reward": [row for f in found for row in f["own_reward"]]})


def of_cell(cell: dict, figures: dict) -> dict:
    """The figures with the seed of their cell. Cells that were measured before runs had this seed too say seed 0."""
    return figures | {"own_reward": [row | {"config": row["config"] | {"seed": cell["seed"]}}
                                     for row in figures.get("own_reward", [])]}


def counts_of(values: list[int]) -> str:
    """[1, 2, 1] -> "1 in 2, 2 in 1"."""
    return ", ".join(f"{value} in {values.count(value)}" for value in sorted({*values})) or NONE


def page(rows):
    body, at_kl, lines, reading = [], {"mixture": [], "known types": []}, {}, []
    chosen = by([(cell, figures) for cell, figures in rows if "counts" in cell], "world")
    rows = [(cell, of_cell(cell, figures)) for cell, figures in rows if "counts" not in cell]
    paper = [figures for cell, figures in rows if "latent" in cell]
    rows = [(cell, figures) for cell, figures in rows if "latent" not in cell]
    for world, found in by(rows, "world").items():
        mixture, dpo, ceiling = frontier.main_methods(pooled(found))
        kl = frontier.common_kl(mixture, dpo, ceiling)
        gap, best = (frontier.compare(mixture, other, kl) for other in (dpo, ceiling))
        d, first = gap["difference"], [f for f in found if f["users_start"] is not None]
        em = frontier.compare(*(next(m for m in pooled(first) if m.name == name) for name in ("mixture", "start")))
        body.append([world, f"{kl:.1f}", *(f"{gain:+.3f}" for gain in (gap["ours"], gap["theirs"], best["theirs"])),
                     pm_of(d, "+"), f"{d['mean'] / d['se']:+.1f}", pm_of(em["difference"], "+"),
                     mean_over(first, "users_start"), mean_over(first, "users"), mean_over(found, "users"),
                     counts_of([f["types"] for f in chosen.get(world, [])])])
        for name, method in (("mixture", mixture), ("known types", ceiling)):
            at_kl[name].append([world, *at_each(method, dpo)])
        reading.append((world, frontier.compare(mixture, dpo)["difference"]))
        for m in (mixture, dpo, ceiling):
            lines.setdefault(world, {})[m.name] = [(x, y, 0.0) for x, y in zip(*m.line())]
    clear, behind = ([world for world, d in reading if sign * d["mean"] > 2 * d["se"]] for sign in (1, -1))
    change = [f["users"] - f["users_start"] for _, f in rows if f["users_start"] is not None]
    text = (f"At the largest KL that both reach the mixture is ahead of one policy for all by more than two standard "
            f"errors at {'; '.join(clear) or 'no world'}; and behind at {'; '.join(behind) or 'none'}. EM changes the "
            f"share of users that are assigned to their type by {mean_se(change)['mean']:+.3f} on average over worlds, "
            f"and by {min(change):+.3f} at worst.")
    head = ["world", "KL", "mixture", "one policy (DPO)", "known types", "mixture minus DPO", "in SEs",
            "mixture minus start alone", "users right, start", "users right, EM", "users right, EM, all seeds",
            "types chosen"]
    note = ("Gain in own reward at the largest KL (nats) that the mixture, DPO and known types reach, in spreads (the "
            "paper's annotators: on their scale from 0 to 1); errors by a bootstrap over prompts and seeds. Start "
            "alone: of the first seed, at the largest KL that both reach. Users right: share of users assigned to "
            "their type; the first two columns are of the first seed. Types chosen: how many `train.py` without "
            "options takes (1: DPO), and in how many files.")
    columns = ["world", *(f"{nats:g}" for nats in COMPARED), "at the largest", "largest"]
    same = ("Mixture minus DPO at other KL (nats), where both reach it:", table_of(columns, at_kl["mixture"]),
            "One policy per known type minus DPO, which is what there is to win without sharing:",
            table_of(columns, at_kl["known types"]))
    users = [figures for cell, figures in rows if cell["world"] == PAPER["world"]]
    return "\n\n".join([text, table_of(head, body), note, *same, *(as_in_the_paper(users, paper) if paper else [])]), {
        "frontier": curves(lines, ("KL to the reference (nats)", "gain in own reward"), columns=4,
                           one_scale=False)}


def at_each(ours: frontier.Method, theirs: frontier.Method) -> list[str]:
    """Our frontier minus theirs at each KL of COMPARED and at the largest one that both reach, and that KL."""
    both = frontier.common_kl(ours, theirs)
    return [*(pm_of(frontier.compare(ours, theirs, nats)["difference"], "+") if nats <= both else NONE
              for nats in (*COMPARED, both)), f"{both:.1f}"]


def as_in_the_paper(users: list[dict], pairs: list[dict]) -> list[str]:
    """The methods with one latent type per pair beside those of the same world, and the rewards of their experts."""
    head, body = frontier.own_reward_table({"own_reward": [
        row for f in users + pairs for row in f["own_reward"] if not row["run"].endswith("-soup")]})
    policies = pairs[0]["policies"]
    rewards = [name for name in next(iter(policies.values())) if name != "kl"]
    experts = [[name, *(pm_of(row[reward]) for reward in rewards), f"{row['kl']['mean']:.1f}"]
               for name, row in policies.items()]
    return ["**One latent type per pair, as in the paper**: three annotators, two or three experts, adapters (case 1) "
            "and whole models (case 2). Nothing is known of a user, so everybody is served by the mixture under its "
            "weights. Beside them, methods with one latent type per user:",
            table_of([name.replace("\n", " ") for name in head], body),
            "Rewards of each expert's completions, on the scale from 0 to 1, and KL (nats):",
            table_of(["policy", *rewards, "KL"], experts)]


STUDY = Study(
    "Conflict: what a mixture is worth",
    "Users share a sense of quality and differ in taste by a dial c. At equal KL, when is a mixture worth more to each "
    "user than one policy for all, and does EM keep the users that the start has assigned?",
    cells, measure, page, prepare, resumes=True)
