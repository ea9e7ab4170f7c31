"""Learnt gates, random gates, gates by the domain label, and no gate, by number of training pairs."""

import math

import torch

from data.report.pictures import curves
from data.studies import texts
from data.studies.aggregate import by, mean_over, over, pm_of, se_over, table_of
from data.studies.study import Study
from data.studies.worlds import World, figures, fit, look, oracle, write
from mixdpo.evaluation.statistics import matched_accuracy, mean_se

SEEDS = {"smoke": 1, "quick": 5, "full": 15}
MOST = (50, 100, 200, 400, 800, 1600, 3200)
PAIRS = {"smoke": (100, 400), "quick": MOST, "full": MOST}
GATES = {"uniform": "fixed", "random": "random", "domain": "domain", "linear": "linear", "mlp": "mlp"}
LEARNT = ("linear", "mlp")
TASTES = ("warm", "terse")                  # tastes of judges of products and of editorials


def cells(preset: str) -> list[dict]:
    return [{"world": world, "gate": gate, "pairs": pairs, "seed": seed, "preset": preset}
            for world, gates in (("planted", ("DPO", *GATES)), ("texts", ("DPO", *GATES))) for pairs in PAIRS[preset]
            for gate in gates for seed in range(SEEDS[preset]) if world == "planted" or gate != "mlp"]


def batch(pairs: int) -> int:
    """Batch size for 20 steps an epoch, between 10 and 50 pairs."""
    return max(10, min(50, pairs // 20))


def measure(cell: dict, folder) -> dict:
    if cell["world"] == "texts":
        return of_texts(cell, texts.load(folder.parent.parent, cell["preset"]))
    world = World(seed=cell["seed"], users=cell["pairs"] // 10, domains=True)
    write(world, folder)
    size = batch(cell["pairs"])
    options = {"batch": size, "micro": size, "seed": cell["seed"]}
    if cell["gate"] == "DPO":
        options |= {"experts": 1}
    else:
        options |= {"gate": GATES[cell["gate"]], "start": "linear"}
        options |= {"gate_lr": 0.05, "gate_features": "mean"} if cell["gate"] in LEARNT else {}
    found = look(fit(folder, "run", **options), folder / "heldout.jsonl")
    truth = [pair.domain for pair in found.pairs]
    return figures(found) | {"oracle": oracle(world)["ll"], "gate": right_domains(found.log_w, truth)}


def right_domains(log_w: torch.Tensor, truth: list) -> float:
    """Share of prompts whose likeliest expert is the expert of their domain, by the better naming; 1/2 if all prompts
    have the same likeliest expert."""
    found = log_w.argmax(1).tolist()
    return matched_accuracy(found, truth, log_w.shape[1])[0] if len(set(found)) > 1 else 0.5


def of_texts(cell: dict, found: texts.Texts) -> dict:
    """The same with linear rewards on real sentences; the gate reads the state of a prompt of four sentences."""
    training, held = (texts.judge(found, texts.Judges(TASTES, n, 1, cell["seed"], domains=True), heldout=h)
                      for n, h in ((cell["pairs"], False), (2000, True)))
    c, of = found.c[training.prompt], found.c[held.prompt]
    if cell["gate"] == "linear":
        fitted = texts.fit(training, 2, cell["seed"], c=c)
        log_w = fitted.weights(of)
    else:
        width = c.shape[1]
        V = torch.randn(2, width, generator=torch.Generator().manual_seed(cell["seed"])).double() / math.sqrt(width)
        given = {"uniform": lambda c, z: torch.full((len(z), 2), -math.log(2)).double(),
                 "random": lambda c, z: torch.log_softmax(c @ V.T, dim=-1),
                 "domain": lambda c, z: torch.where(torch.eye(2)[z] > 0, math.log(0.999), math.log(0.001)).double(),
                 "DPO": lambda c, z: torch.zeros(len(z), 1).double()}[cell["gate"]]
        kept, log_w = given(c, torch.from_numpy(training.type)), given(of, torch.from_numpy(held.type))
        fitted = texts.fit(training, log_w.shape[1], cell["seed"], log_w=kept)
    truth = held.gaps[torch.arange(len(held.gaps)), torch.from_numpy(held.type)]
    return texts.figures(fitted, training, held, log_w) | {
        "gate": right_domains(log_w, held.type.tolist()) if log_w.shape[1] > 1 else 0.5,
        "oracle": mean_se(torch.nn.functional.logsigmoid(truth))}


def page(rows):
    found, body, shown = by(rows, "world", "gate", "pairs"), [], {}
    names = {"planted": "planted prompts", "texts": "real sentences"}
    for (world, gate, pairs), of in found.items():
        less = mean_se([f["ll"]["mean"] - d["ll"]["mean"] for f, d in zip(of, found[world, "DPO", pairs])])
        shown_as = "one reward" if (world, gate) == ("texts", "DPO") else gate
        body.append([names[world], shown_as, pairs, pm_of(over(of, "ll")), pm_of(less, "+"), mean_over(of, "accuracy"),
                     mean_over(of, "gate")])
        f, right = over(of, "ll"), over(of, "gate")
        shown.setdefault(f"{names[world]}: log-likelihood (nats)", {}).setdefault(shown_as, []).append(
            (pairs, f["mean"], se_over(f)))
        if gate in LEARNT or gate == "random":
            shown.setdefault(f"{names[world]}: domains found", {}).setdefault(gate, []).append(
                (pairs, right["mean"], se_over(right)))

    def first(world: str, gate: str, other: str) -> str:
        """The smallest number of pairs from which the gate is ahead of another by two SEs."""
        ahead = []
        for pairs in sorted({p for w, g, p in found if (w, g) == (world, gate)}, reverse=True):
            gap = mean_se([f["ll"]["mean"] - d["ll"]["mean"] for f, d in zip(found[world, gate, pairs],
                                                                             found[world, other, pairs])])
            if not gap["mean"] > 2 * se_over(gap):
                break
            ahead.append(pairs)
        return f"from {ahead[-1]} pairs on" if ahead else "from no number of pairs on"

    most = max(p for _, _, p in found)
    given, learnt = (over(found["planted", gate, most], "ll")["mean"] for gate in ("domain", "linear"))
    behind = given - learnt
    reading = (
        "On planted prompts a learnt linear gate is ahead of DPO, by two standard errors, "
        f"{first('planted', 'linear', 'DPO')}; ahead of the random gate {first('planted', 'linear', 'random')}; with "
        f"{most} pairs it sends {mean_over(found['planted', 'linear', most], 'gate')} of held-out prompts to their "
        f"domain's expert, and is {behind:.3f} nats a pair behind the gate with domain labels. DPO reads the "
        "prompt too, and a fully trained model can learn both tastes. The MLP is ahead of the "
        f"linear gate {first('planted', 'mlp', 'linear')}. On real sentences, where products are judged warm and "
        f"editorials terse, the learnt gate is ahead of one reward {first('texts', 'linear', 'DPO')}, ahead of the "
        f"random gate {first('texts', 'linear', 'random')}, and finds "
        f"{mean_over(found['texts', 'linear', most], 'gate')} of the prompts' domains; the domain label is better "
        f"{first('texts', 'domain', 'linear')}. With uniform weights a mixture must infer types from single "
        "comparisons, which carry little information about the judge.")
    text = "\n\n".join([reading, table_of(["world", "gate", "pairs", "log-likelihood", "less DPO's", "accuracy",
                                           "domains found"], body, 2),
                        "Held-out log-likelihood of the mixture of Bradley-Terry (M5), nats a pair, mean over worlds "
                        "± SE; domains found: share of held-out prompts whose likeliest expert is their domain's."])
    return text, {"pairs": curves(shown, ("training pairs", ""), 2, columns=4, one_scale=False)}


STUDY = Study(
    "Gates: learnt, random, by label, or none",
    "A prompt's domain says who judges: planted prompts of two alphabets (nine judges in ten are of the domain's "
    "type), and real sentences behind four sentences of product reviews or of editorials. What is a gate worth, by "
    "the number of training pairs?",
    cells, measure, page, texts.prepare)
