"""Gates under distribution shift: a growing share of each prompt comes from the other domain or an unknown one."""

import math

import numpy as np
import torch

from data.report.pictures import curves
from data.studies import texts
from data.studies.aggregate import by, over, se_over, table_of
from data.studies.gate import TASTES
from data.studies.study import Study
from data.studies.worlds import ALPHABETS, FOREIGN, World, fit, item_probabilities, judged, look, prompt, write
from mixdpo.gates import Inputs
from mixdpo.mixture import entropy
from mixdpo.runs.reference import load_references, prompt_features

SEEDS = {"smoke": 1, "quick": 8, "full": 20}
PROMPTS = 100                               # prompts of each domain at each share
GATES = ("linear", "mlp", "domain")
CANDIDATES = 8                              # sentences that a policy chooses from


def cells(preset: str) -> list[dict]:
    return [{"world": world, "gate": gate, "seed": seed, "preset": preset} for seed in range(SEEDS[preset])
            for world, gates in (("planted", GATES), ("texts", ("linear",))) for gate in gates]


def measure(cell: dict, folder) -> list[dict]:
    """One row for each kind and share of shift: accuracy, entropy of the weights (nats), reward."""
    if cell["world"] == "texts":
        return of_texts(cell, texts.load(folder.parent.parent, cell["preset"]))
    world = World(seed=cell["seed"], users=200, domains=True)
    write(world, folder)
    learnt = {"gate_lr": 0.05, "gate_features": "mean"} if cell["gate"] != "domain" else {}
    run = look(fit(folder, "run", gate=cell["gate"], start="linear", seed=cell["seed"], **learnt),
               folder / "heldout.jsonl").run
    (reference,), tokenizer = load_references(run.config, "cpu")
    rng, rewards, rows = np.random.default_rng([cell["seed"], 9]), torch.from_numpy(world.rewards()), []
    naming = names(run, world)
    for part in ("crossed", "foreign"):
        for share in texts.SHARES:
            drawn = [(d, prompt(rng, ALPHABETS[d], ALPHABETS[1 - d] if part == "crossed" else FOREIGN, share))
                     for d in (0, 1) for _ in range(PROMPTS)]
            domain, prompts = torch.tensor([d for d, _ in drawn]), [text for _, text in drawn]
            if cell["gate"] == "domain":                                    # knows the domain, whatever the text
                known = torch.nn.functional.one_hot(domain, 2).float()
                log_w = run.gate(Inputs(known, torch.zeros(len(drawn), dtype=torch.int64))).detach()
            else:
                states = prompt_features(reference, [tokenizer.encode(text) for text in prompts], torch.float32)
                log_w = run.gate(Inputs(states[:, 1], torch.zeros(len(drawn), dtype=torch.int64))).detach()
            pi = torch.stack([item_probabilities(*run.experts.policy(k), prompts) for k in (0, 1)], 1)      # (P,K,V)
            base = item_probabilities(reference, reference.unembedding, prompts)                            # (P,V)
            got = (pi * rewards[domain][:, None]).sum(-1)                   # (P,K) reward of the domain's type
            rows.append(row(part, share, log_w, torch.tensor(naming)[domain], got, (base * rewards[domain]).sum(-1)))
    return rows


def names(run, world: World) -> list[int]:
    """The expert of each domain: the expert with most responsibility for the domain's training pairs."""
    of = torch.from_numpy(judged(world).domain)
    own = [int(run.table.exp()[of[[unit[0] for unit in run.plan.units]] == d].mean(0).argmax()) for d in (0, 1)]
    return own if own[0] != own[1] else [0, 1]


def row(part: str, share: float, log_w, expert, got, base) -> dict:
    """Figures of P prompts from log_w (P,K), the right expert (P,), rewards of experts (P,K) and of the reference
    (P,)."""
    own = got[torch.arange(len(got)), expert]
    mixed = (log_w.exp() * got).sum(1)
    return {"part": part, "share": share, "accuracy": float((log_w.argmax(1) == expert).double().mean()),
            "entropy": float(entropy(log_w).mean()), "reward": float((mixed - base).mean()),
            "told": float((own - base).mean()), "unsure": float((got.mean(1) - base).mean())}


def of_texts(cell: dict, found: texts.Texts) -> list[dict]:
    """The same with linear rewards: a policy samples from CANDIDATES sentences of the prompt's domain by exp(theta .
    f)."""
    training = texts.judge(found, texts.Judges(TASTES, 2000, 1, cell["seed"], domains=True))
    fitted = texts.fit(training, 2, cell["seed"], c=found.c[training.prompt])
    rng, rows = np.random.default_rng(cell["seed"]), []
    kind = torch.from_numpy(training.type)
    naming = [int(fitted.log_q.exp()[kind == d].mean(0).argmax()) for d in (0, 1)]
    naming = torch.tensor(naming if naming[0] != naming[1] else [0, 1])
    scores = found.x @ fitted.theta.double().T                              # (S,K)
    for part in ("crossed", "foreign"):
        for share in texts.SHARES:
            at = [n for n, p in enumerate(found.prompts) if (p["part"], p["share"]) == (part, share)]
            domain = torch.tensor([texts.DOMAINS.index(found.prompts[n]["domain"]) for n in at])
            pool = [np.flatnonzero(found.domain == d) for d in texts.DOMAINS]
            shown = torch.tensor(np.array([rng.choice(pool[d], CANDIDATES, False) for d in domain.tolist()]))  # (P,8)
            pi = torch.softmax(scores[shown], dim=1)                        # (P,8,K)
            truth = torch.stack([torch.from_numpy(found.rewards[t]) for t in TASTES])[domain[:, None], shown]  # (P,8)
            got = (pi * truth[..., None]).sum(1)                            # (P,K)
            rows.append(row(part, share, fitted.weights(found.c[at]), naming[domain], got, truth.mean(1)))
    return rows


def page(rows):
    flat = [(cell | {"part": r["part"], "share": r["share"]}, r) for cell, of in rows for r in of]
    found, body, shown = by(flat, "world", "gate", "part", "share"), [], {}
    names_of = {"planted": "planted", "texts": "real sentences"}
    for (world, gate, part, share), of in found.items():
        body.append([names_of[world], gate, part, f"{share:g}", *(f"{over(of, what)['mean']:.3f}" for what in (
            "accuracy", "entropy", "reward", "told", "unsure"))])
        for what in ("accuracy", "entropy", "reward"):
            f = over(of, what)
            shown.setdefault(f"{names_of[world]}: {what}", {}).setdefault(f"{gate}, {part}", []).append(
                (share, f["mean"], se_over(f)))

    def figure(world, gate, part, share, what="accuracy") -> str:
        return f"{over(found[world, gate, part, share], what)['mean']:.3f}"

    def sentence(world: str, gate: str) -> str:
        crossed = ", ".join(figure(world, gate, "crossed", share) for share in texts.SHARES)
        foreign = ", ".join(figure(world, gate, "foreign", share) for share in texts.SHARES)
        return (f"is right for {crossed} of the prompts as more and more of them is the other domain's, and for "
                f"{foreign} as more and more is foreign; its entropy goes from "
                f"{figure(world, gate, 'foreign', 0.0, 'entropy')} at home to "
                f"{figure(world, gate, 'foreign', 1.0, 'entropy')} nats on foreign text")

    lost = over(found["planted", "linear", "foreign", 1.0], "reward")["mean"]
    unsure = over(found["planted", "linear", "foreign", 1.0], "unsure")["mean"]
    doubt = {(world, share): 100 * over(found[world, "linear", "foreign", share], "entropy")["mean"] / math.log(2)
             for world in names_of for share in (0.0, 1.0)}
    reading = (
        f"In steps of a quarter, the linear gate on planted prompts {sentence('planted', 'linear')}. The MLP "
        f"{sentence('planted', 'mlp')}. On real sentences the linear gate {sentence('texts', 'linear')}. Undecided "
        f"would be 0.693. On wholly foreign planted prompts the mixture's reward is {lost:.3f}, and {unsure:.3f} under "
        "even weights: " + ("to be sure where nothing is known costs reward." if lost < unsure - 0.02 else
                       "to be sure where nothing is known costs no reward here.")
        + f" There the gate's entropy is {doubt['planted', 1.0]:.0f} % of an undecided one's (at home "
        f"{doubt['planted', 0.0]:.0f} %), on real sentences {doubt['texts', 1.0]:.0f} % (at home "
        f"{doubt['texts', 0.0]:.0f} %): that is all that it says of how far a prompt is from what was trained on.")
    head = ["world", "gate", "from elsewhere", "share", "accuracy", "entropy (nats)", "reward", "reward, told",
            "reward, even weights"]
    text = "\n\n".join([reading, table_of(head, body, 3),
                        "Accuracy: the likeliest expert is that of the domain that the prompt was made for. Reward: "
                        "the mixture's expected true reward for that domain's judges less the reference's, nats; "
                        "told: of the right expert alone; even weights: of a mixture that does not choose. The gate "
                        "`domain` is given "
                        "the label of the domain, whatever the text."])
    return text, {"shift": curves(shown, ("share from elsewhere", ""), columns=3, one_scale=False)}


STUDY = Study(
    "The gate under domain shift",
    "A gate was trained on prompts of two domains. Now 0, 25, 50, 75 or 100 % of a prompt come from the other domain "
    "(crossed), or from domains that nobody trained on (foreign): letters of planted prompts; sentences of real ones, "
    "from films' reviews and tweets.",
    cells, measure, page, texts.prepare)
