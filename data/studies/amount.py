"""How much data: types that a file of given size and agreement can reveal, and types that a mixture finds."""

from data.report.pictures import curves
from data.studies import texts
from data.studies.aggregate import by, mean_over, over, pm_of, se_over, table_of
from data.studies.study import Study
from data.studies.worlds import ONE, World, figures, fit, look, oracle, write
from mixdpo.evaluation.statistics import mean_se

SEEDS = {"smoke": 1, "quick": 3, "full": 10}
PAIRS = {"smoke": (200,), "quick": (200, 800, 3200), "full": (100, 200, 400, 800, 1600, 3200, 6400)}
EACH = {"smoke": (1, 10), "quick": (1, 2, 5, 10, 20), "full": (1, 2, 5, 10, 20)}
AGREE = {"smoke": (0.0,), "quick": (0.0, 0.5, 0.9), "full": (0.0, 0.5, 0.8, 0.9, 0.95)}


def cells(preset: str) -> list[dict]:
    settings = [(a, p, e, s) for a in AGREE[preset] for p in PAIRS[preset] for e in EACH[preset]
                for s in range(SEEDS[preset])]
    planted = [{"world": "planted", "agree": a, "pairs": p, "each": e, "experts": K, "seed": s}
               for a, p, e, s in settings for K in (1, 2)]
    return planted + [{"world": "texts", "pairs": p, "each": e, "experts": K, "seed": s, "preset": preset}
                      for p in PAIRS[preset] for e in EACH[preset] for s in range(SEEDS[preset]) for K in (1, 2)]


def measure(cell: dict, folder) -> dict:
    seed, each, users = cell["seed"], cell["each"], cell["pairs"] // cell["each"]
    if cell["world"] == "texts":
        found = texts.load(folder.parent.parent, cell["preset"])
        training = texts.judge(found, texts.Judges(("warm", "terse"), users, each, seed))
        held = texts.judge(found, texts.Judges(("warm", "terse"), 200, 10, seed), heldout=True)
        return texts.figures(texts.fit(training, cell["experts"], seed), training, held)
    world = World(seed=seed, users=users, each=each, agree=cell["agree"])
    write(world, folder)
    size = max(20, min(50, cell["pairs"] // 20))                   # at least 20: a user with 20 pairs fits into a batch
    options = ONE if cell["experts"] == 1 else {"latent": "user", "start": "linear"}
    found = look(fit(folder, "run", seed=seed, batch=size, micro=size, **options), folder / "heldout.jsonl")
    bound = oracle(world)
    return figures(found) | {"bayes_ari": bound["ari"], "oracle_user": bound["ll_user"]}


def page(rows):
    planted = by([(c, f) for c, f in rows if c["world"] == "planted"], "agree", "pairs", "each", "experts")
    real = by([(c, f) for c, f in rows if c["world"] == "texts"], "pairs", "each", "experts")
    found = {("planted", *key): of for key, of in planted.items()}
    found |= {("texts", "-", *key): of for key, of in real.items()}
    body, shown, ahead, lags = [], {}, {}, []
    for (world, agree, pairs, each, K), of in found.items():
        if K == 1:
            continue
        gap = mean_se([f["ll"]["mean"] - d["ll"]["mean"] if each == 1 else f["ll_user"]["mean"] - d["ll"]["mean"]
                       for f, d in zip(of, found[world, agree, pairs, each, 1])])
        name = "real sentences" if world == "texts" else f"agreement {agree:g}"
        body.append([name, pairs, each, mean_over(of, "ari"), mean_over(of, "bayes_ari"), pm_of(gap, "+"),
                     f"{over(of, 'oracle_user')['mean']:.3f}"])
        f = over(of, "ari")
        shown.setdefault(name, {}).setdefault(f"{each} each", []).append((pairs, f["mean"], se_over(f)))
        ahead.setdefault((name, each), {})[pairs] = gap["mean"] > 2 * se_over(gap)
        lags.append((agree, gap["mean"] < -2 * se_over(gap)))

    def first(name: str, each: int) -> str:
        """The smallest number of pairs from which the mixture is ahead by two standard errors."""
        pairs = []
        for p, yes in sorted(ahead[name, each].items(), reverse=True):
            if not yes:
                break
            pairs.append(p)
        return f"{pairs[-1]}" if pairs else "none"

    eaches = sorted({each for _, each in ahead})
    names = list(dict.fromkeys(name for name, _ in ahead))
    firsts = [f"{name}: " + ", ".join(f"{first(name, each)} at {each} a user" for each in eaches) for name in names]
    clear = found["planted", 0.0, max(key[2] for key in found), max(eaches), 2]
    single = found["planted", 0.0, max(key[2] for key in found), min(eaches), 2]
    leads = [yes for of in ahead.values() for yes in of.values()]
    behind, alike = (sum(lag for agree, lag in lags if which(agree)) for which in (
        lambda _: True, lambda agree: agree != "-" and agree >= 0.5))
    reading = (
        "The smallest number of pairs from which the mixture is ahead of one policy by two standard "
        f"errors. {'; '.join(firsts)}. It is behind by as much in {behind} of {len(body)} kinds of files, {alike} of "
        f"them with types that agree to 0.5 or more, and neither in {len(body) - behind - sum(leads)}: where it is not "
        f"ahead, one policy (DPO) is the simpler choice. With the most pairs, independent rewards and {max(eaches)} a "
        f"user, the ARI is {mean_over(clear, 'ari')} of a possible {mean_over(clear, 'bayes_ari')}; with one a user "
        f"{mean_over(single, 'ari')} of {mean_over(single, 'bayes_ari')}.")
    head = ["types", "pairs", "pairs a user", "ARI", "ARI, Bayes", "log-likelihood less one policy's", "true rewards'"]
    text = "\n\n".join([reading, table_of(head, body), "ARI of the training users; Bayes: assignment by the true "
                        "rewards, the most that the file can show. Log-likelihood of new users who judge as many "
                        "(sentences: ten; M11; of pairs alone where users have one), nats a pair, less that of one "
                        "low-rank head on the same trunk; mean over worlds ± SE, which of three worlds is itself "
                        "uncertain. Agreement: correlation of the two types' rewards."])
    return text, {"pairs": curves(shown, ("training pairs", "ARI of the users"), 2, columns=4)}


STUDY = Study(
    "How much data",
    "Two types of judges, by the number of comparisons, how many of them a user makes, and how far the types agree: "
    "how much heterogeneity could the file show at best, how much is found, and when is plain DPO the better choice?",
    cells, measure, page, texts.prepare)
