"""Noisy annotations: losses in assignment and rewards, and the effect of the likelihood of noisy labels."""

import numpy as np

from data.report.pictures import curves
from data.studies import texts
from data.studies.aggregate import by, mean_over, over, pm_of, se_over, table_of
from data.studies.study import Study
from data.studies.worlds import ITEMS, World, figures, fit, look, oracle, write
from mixdpo.evaluation.statistics import mean_se

SEEDS = {"smoke": 1, "quick": 4, "full": 15}
AMOUNTS = {  # amounts of each kind of noise
    "flips": (0.0, 0.1, 0.2, 0.3, 0.4), "jitter": (1.0, 2.0, 4.0), "other": (0.1, 0.2, 0.3, 0.4),
    "fewer": (0.5, 0.25, 0.1),
}
WAYS = {"flips": "inverted labels", "jitter": "Gaussian noise on scores (nats)",
        "other": "judged by the other type", "fewer": "share of a user's comparisons kept"}
LOSSES = ("none", "flips")       # --label-noise off and on
REAL = ("mean rating", "one person's rating", "0.2 turned round")


def cells(preset: str) -> list[dict]:
    seeds = range(SEEDS[preset])
    amounts = AMOUNTS if preset != "smoke" else {way: amounts[:2] for way, amounts in AMOUNTS.items()}
    spoiled = [{"world": "planted", "way": way, "amount": amount, "loss": "none", "experts": K, "seed": seed}
               for way, many in amounts.items() for amount in many for K in (1, 2) for seed in seeds]
    remedies = [{"world": "planted", "way": "flips", "amount": amount, "loss": loss, "experts": 2, "seed": seed}
                for amount in amounts["flips"] if amount for loss in LOSSES[1:] for seed in seeds]
    real = [{"world": "texts", "way": way, "preset": preset, "experts": K, "seed": seed}
            for way in REAL for K in (1, 2) for seed in seeds]
    return spoiled + remedies + real


def measure(cell: dict, folder) -> dict:
    if cell["world"] == "texts":
        found = texts.load(folder.parent.parent, cell["preset"])
        options = {"one_rating": cell["way"] == REAL[1], "flips": 0.2 * (cell["way"] == REAL[2])}
        training = texts.judge(found, texts.Judges(("warm", "cold"), 120, 12, cell["seed"], **options))
        held = texts.judge(found, texts.Judges(("warm", "cold"), 120, 12, cell["seed"]), heldout=True)
        return texts.figures(texts.fit(training, cell["experts"], cell["seed"]), training, held)
    way, amount = cell["way"], cell["amount"]
    world = World(seed=cell["seed"], **({"each": round(10 * amount)} if way == "fewer" else {way: amount}))
    write(world, folder)
    options = {"experts": 1} if cell["experts"] == 1 else {"latent": "user", "start": "linear"}
    if cell["loss"] != "none":
        options["label_noise"] = amount
    found = look(fit(folder, "run", seed=cell["seed"], **options), folder / "heldout.jsonl")
    rewards = world.rewards()
    return figures(found) | {"oracle": oracle(world), "reward": reward_agreement(found, rewards)}


def reward_agreement(found, rewards: np.ndarray) -> float:
    """Correlation over held-out pairs between each type's true margins and those of the best-matching expert, mean over
    types. 1 means the right reward up to scale."""
    code = {ord(c): n for n, c in enumerate(ITEMS)}
    first, second = (np.array([code[getattr(p, side)[0]] for p in found.pairs]) for side in ("chosen", "rejected"))
    gaps, h = rewards[:, first] - rewards[:, second], found.h.double().numpy().T
    sign = np.random.default_rng(0).choice([-1.0, 1.0], gaps.shape[1])      # against order effects
    return float(np.mean([max(np.corrcoef(sign * gap, sign * own)[0, 1] for own in h) for gap in gaps]))


def page(rows):
    planted = [(c, f) for c, f in rows if c["world"] == "planted"]
    plain = by([(c, f) for c, f in planted if c["loss"] == "none"], "way", "amount", "experts")
    body, shown, clean = [], {}, plain["flips", 0.0, 2]
    for (way, amount, experts), found in plain.items():
        if experts == 2:
            dpo = plain[way, amount, 1]
            less = mean_se([f["ll_user"]["mean"] - d["ll_user"]["mean"] for f, d in zip(found, dpo)])
            bayes = mean_se([f["oracle"]["ari"] for f in found])["mean"]
            body.append([WAYS[way], f"{amount:g}", mean_over(found, "ari"), f"{bayes:.3f}", mean_over(found, "reward"),
                         mean_over(dpo, "reward"), pm_of(over(found, "ll_user")), pm_of(less, sign="+")])
            for name, what in (("ari", "ARI of the users"), ("reward", "agreement of rewards")):
                f = over(found, name)
                shown.setdefault(WAYS[way], {}).setdefault(what, []).append((amount, f["mean"], se_over(f)))
    remedies = by([(c, f) for c, f in planted if c["way"] == "flips" and c["experts"] == 2], "amount", "loss")
    with_them = [[f"{amount:g}", loss, mean_over(found, "ari"), mean_over(found, "reward"), mean_over(found, "own"),
                  pm_of(over(found, "ll_user"))] for (amount, loss), found in sorted(remedies.items(), key=lambda kv: (
                      kv[0][0], LOSSES.index(kv[0][1])))]
    worst = max(amount for amount, _ in remedies)
    helps = []
    for loss in LOSSES[1:]:
        gaps = [mean_se([f["ll_user"]["mean"] - n["ll_user"]["mean"] for f, n in zip(of, remedies[amount, "none"])])
                for (amount, kind), of in remedies.items() if kind == loss]
        better, worse = (sum(sign * g["mean"] > 2 * se_over(g) for g in gaps) for sign in (1, -1))
        helps.append(f"`{loss}` is better at {better} and worse at {worse} of {len(gaps)} shares")
    real = by([(c, f) for c, f in rows if c["world"] == "texts"], "way", "experts")
    of_real = [[way, mean_over(real[way, 2], "ari"), mean_over(real[way, 2], "bayes_ari"),
                pm_of(over(real[way, 2], "ll_user")), pm_of(mean_se([f["ll_user"]["mean"] - d["ll_user"]["mean"] for
                                                                  f, d in zip(real[way, 2], real[way, 1])]), sign="+")]
               for way in REAL]
    half = [amount for (way, amount, K), found in plain.items() if way == "flips" and K == 2
            and over(found, "ari")["mean"] < over(clean, "ari")["mean"] / 2]
    reading = (
        f"Clean choices give an ARI of {mean_over(clean, 'ari')}; assignment "
        + (f"loses half of that from {min(half):g} of the labels turned round on" if half else
           "keeps more than half of that at every share of turned labels that was tried")
        + f", and rewards agree to {mean_over(plain['flips', worst, 2], 'reward')} at {worst:g} (clean "
        f"{mean_over(clean, 'reward')}). The likelihood of noisy labels (`--label-noise`), with the true share given: "
        f"{'; '.join(helps)}. Paired differences to `none` beyond two standard errors are counted. On real "
        "sentences, whose ratings differ between people, judging by one person's rating instead of the noisy "
        f"mean moves the ARI from {mean_over(real[REAL[0], 2], 'ari')} to {mean_over(real[REAL[1], 2], 'ari')}; 0.2 of "
        f"labels turned round, to {mean_over(real[REAL[2], 2], 'ari')}.")
    text = "\n\n".join([
        reading,
        table_of(["spoiled", "amount", "ARI", "ARI, Bayes", "rewards agree", "DPO's agree", "log-likelihood",
                  "less DPO's"], body),
        "Noise is on training pairs only; held-out choices are clean. Log-likelihood of all choices of a new user "
        "(M11), nats a pair, mean over worlds ± SE. Rewards agree: correlation of the nearest expert's margins with a "
        "type's true ones. Bayes: by the true rewards on the spoiled file, as if it were clean.",
        "The remedy, with the true share given (`--label-noise`):",
        table_of(["turned round", "loss", "ARI", "rewards agree", "own accuracy", "log-likelihood"], with_them, 2),
        "Real sentences, warm against cold judges, linear rewards on SmolLM2's states, 120 users of 12:",
        table_of(["judged by", "ARI", "ARI, Bayes", "log-likelihood", "less one reward's"], of_real)])
    return text, {"amounts": curves(shown, ("amount", "ARI, correlation"), columns=4)}


STUDY = Study(
    "How good annotations must be",
    "Two types of judges, 100 users of 10 comparisons each. The training pairs are spoiled: labels turned round, "
    "Gaussian noise on the scores before the choice, somebody of the other type who judges in the user's name, fewer "
    "comparisons. What is left of the assignment and of the rewards, and which remedy helps?",
    cells, measure, page, texts.prepare)
