"""The figures of an evaluation as plain text: tables for the terminal, and sentences that state the result.

A cell is mean ± standard error. A difference is paired: it is taken pair by pair or prompt by prompt, and only then
averaged. Below two standard errors it may be chance, and the sentence says so.
"""

import math
import re

import numpy as np

from mixdpo.evaluation.collapse import describe_active, describe_collapse
from mixdpo.evaluation.frontier import own_reward_sentence, own_reward_table
from mixdpo.evaluation.statistics import NONE, evidence, mean_se, pm

NO_REWARD = ("trained", "gain", "kl", "length", "values", "w")              # keys of a policy besides its rewards


def table(title: str, head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Aligned columns under a title: the first `left` to the left, the others to the right. A heading may have several
    lines."""
    cells = [cell.split("\n") for cell in head]
    height = max(map(len, cells))
    lines = [*zip(*([""] * (height - len(cell)) + cell for cell in cells)), *rows]
    widths = [max(len(line[c]) for line in lines) for c in range(len(head))]
    text = ["   ".join(cell.ljust(w) if c < left else cell.rjust(w)
                       for c, (cell, w) in enumerate(zip(line, widths))).rstrip() for line in lines]
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join(["", title, "", *text[:height], rule, *text[height:]])


def all_tables(results: dict) -> str:
    """Every table for which there are results."""
    tables = [preference_table, expert_table, alignment_table, new_user_tables, completion_table, served_table]
    return "\n".join(filter(None, (table(results) for table in tables)))


# --- held-out preferences ---------------------------------------------------------------------------------------------


def preference_table(results: dict) -> str:
    """How well each run's mixture predicts held-out choices."""
    rows = []
    for run, figures in results["preferences"].items():
        types = {kind: of["accuracy"] for kind, of in figures["types"].items()}
        worst = min(types, key=lambda kind: types[kind]["mean"])
        rows.append([run, pm(figures["log_likelihood"], 4), pm(figures["log_likelihood_own"], 4),
                     pm(figures["log_likelihood_calibrated"], 4),
                     pm(figures["accuracy_mbt"]), pm(figures["accuracy_own"]),
                     f"{worst} {pm(types[worst])}" if len(types) > 1 else NONE, f"{figures['effective_experts']:.2f}",
                     describe_active(figures)])
    if not rows:
        return ""
    first = next(iter(results["preferences"].values()))
    title = (f"Held-out preferences: {first['log_likelihood']['n']} pairs on {first['prompts']} prompts. The user's "
             "weights are its posterior from training;\nwithout one, and in the other columns, they are the gate's. "
             "Calibrated: user's weights, and margins divided by a\ntemperature that is fitted on the other half of "
             "the users. A coin has log-likelihood -0.6931 and accuracy 0.5.")
    return table(title, ["run", "log-likelihood\n(nats a pair)", "log-likelihood,\nuser's weights",
                         "log-likelihood,\ncalibrated", "accuracy",
                         "accuracy,\nuser's weights", "worst type,\nuser's weights", "effective\nexperts",
                         "active\nexperts"], rows)


def expert_table(results: dict) -> str:
    """The accuracy of each expert on the pairs of each annotator."""
    found, rows = results["preferences"], []
    kinds = sorted({kind for figures in found.values() for kind in figures["accuracy"]} - {"all"})
    for run, figures in found.items():
        for k, accuracy in enumerate(figures["accuracy_all"]):
            by = figures["accuracy"]
            cells = [pm(by[kind][k]) if kind in by else NONE for kind in kinds]
            rows.append([run, str(k), figures["own"][k] or NONE, *cells, pm(accuracy)])
    head = ["run", "expert", "named after", *(f"pairs of\n{kind}" for kind in kinds), "all pairs"]
    return table("Accuracy of each expert on held-out pairs. An expert is named after the annotator of most of its "
                 "training units.", head, rows, left=3) if rows else ""


def alignment_table(results: dict) -> str:
    """How well responsibilities identify the annotators; runs with one expert or one annotator have no row."""
    rows = []
    for run, figures in results["preferences"].items():
        for key, units in (("alignment_train", "training"), ("alignment_heldout", "held-out pairs")):
            if found := figures[key] if figures["experts"] > 1 else {}:
                measures = ("ari", "bayes_ari", "matched", "bayes_matched")
                rows.append([run, units, *(f"{found[m]:.3f}" if m in found else NONE for m in measures),
                             str(found["units"])])
    head = ["run", "units", "adjusted\nRand index", "best\npossible", "correctly\nassigned", "best\npossible", "number"]
    return table("Experts and annotators. Best possible: by the annotators' own scores.", head, rows,
                 left=2) if rows else ""


# --- new users --------------------------------------------------------------------------------------------------------


def new_user_tables(results: dict) -> str:
    """For each file of new users: accuracy by the number of a user's pairs that are used."""
    out = []
    for name, runs in results["adapt"].items():
        counts = max(([point["shown"] for point in curve] for curve in runs.values()), key=len)
        rows = []
        for run, curve in runs.items():
            cells = [pm(point["accuracy"]) for point in curve]
            rows.append([run, *cells, *[NONE] * (len(counts) - len(cells)), pm(curve[-1]["rise"], sign="+")])
        head = ["run", *(f"{n} pair{'s' * (n != 1)}" for n in counts), "gain over\n0 pairs"]
        out.append(table(f"New users in {name}: accuracy on their other pairs, by the number of pairs that their "
                         "weights are computed from.", head, rows))
        out.append(flip_table(name, runs, counts))
    return "\n".join(out)


def flip_table(name: str, runs: dict, counts: list[int]) -> str:
    """How many predictions change if the labels of a new user's known pairs are reversed."""
    rows = []
    for run, curve in runs.items():
        for what in ("flips", "flips_chance", "flips_bayes"):
            if curve[-1].get(what):
                cells = [pm(point[what]) for point in curve[1:]]
                label = run + {"flips": "", "flips_chance": ", chance", "flips_bayes": ", Bayes"}[what]
                rows.append([label, *cells, *[NONE] * (len(counts) - 1 - len(cells))])
    head = ["run", *(f"{n} pair{'s' * (n != 1)}" for n in counts[1:])]
    return table(f"New users in {name}: share of predictions that change if the labels of the known pairs are "
                 "reversed. Chance: drawn by a coin. Bayes: by the types' true scores.", head, rows) if rows else ""


# --- completions ------------------------------------------------------------------------------------------------------


def completion_table(results: dict) -> str:
    """Rewards, KL and length of every policy."""
    rows, policies = [], results["policies"]
    if not policies:
        return ""
    first = next(iter(policies.values()))
    rewards = [name for name in first if name not in NO_REWARD]
    for name, row in policies.items():
        gain = NONE if name == "reference" else pm(row["gain"], sign="+")
        rows.append([name, *(pm(row[reward]) for reward in rewards), pm(row["trained"]), gain, pm(row["kl"], 2),
                     pm(row["length"], 1)])
    head = ["policy", *rewards, "mean reward", "gain over\nreference", "KL to reference\n(nats)", "length\n(tokens)"]
    return table(f"Completions of {first['trained']['n']} prompts. Mean reward: over the rewards that the training "
                 "pairs were judged by.", head, rows)


def served_table(results: dict) -> str:
    """Own reward of each method, and at equal KL."""
    head, rows = own_reward_table(results)
    return table("Own reward: what each user gets from the policy that this user is served, minus the reference's. The "
                 "baseline is\nthe frontier of all methods with one policy for all users.", head, rows) if rows else ""


# --- the result in sentences ------------------------------------------------------------------------------------------


def conclusions(results: dict) -> str:
    """What a reader should take away, a sentence a line; before it, a warning for each collapsed mixture."""
    warnings = [describe_collapse(run, figures) for run, figures in results["preferences"].items()]
    return "\n" + "\n".join([*filter(None, warnings), *(f"Result: {sentence}" for sentence in sentences(results))])


def sentences(results: dict) -> list[str]:
    """The results in plain sentences: what each user gets at equal KL, or, without own rewards, which policy has the
    highest reward, or how often each user's choices are predicted; and which run predicts held-out choices best. Each
    has its difference to a baseline."""
    found = [own_reward_sentence(results) or highest_reward(results) or own_accuracy(results), best_prediction(results)]
    return [sentence for sentence in found if sentence]


def own_accuracy(results: dict) -> str:
    """The share of held-out choices that the first mixture predicts, with the weights of the user who made each; its
    paired difference to the first policy for all; and the share with one policy for each known type. "" unless there
    are a mixture and a policy for all."""
    found = results["preferences"]
    types = {kind for of in found.values() for kind in of["type_of_pair"]}
    single = [run for run, of in found.items() if of["experts"] == 1]
    of_type = {found[run]["trained_on"][0]: run for run in reversed(single)
               if len(found[run]["trained_on"]) == 1 < len(types)}
    mixture = next((run for run, of in found.items() if of["experts"] > 1), None)
    for_all = next((run for run in single if run not in of_type.values()), None)
    if mixture is None or for_all is None:
        return ""
    pairs = found[mixture]

    def difference(*theirs: np.ndarray) -> dict:
        return mean_se(np.subtract(predicted(pairs), *theirs), pairs["prompt_of_pair"], pairs["user_of_pair_own"])

    gap = difference(predicted(found[for_all]))
    text = (f"{mixture} predicts {predicted(pairs).mean():.3f} of the held-out choices under each user's weights, and "
            f"{for_all}, one policy for all, {predicted(found[for_all]).mean():.3f}: the difference is "
            f"{pm(gap, sign='+')} ({evidence(gap)})")
    if {*of_type} >= types:
        known = np.array([predicted(found[of_type[kind]])[n] for n, kind in enumerate(pairs["type_of_pair"])])
        gap = difference(known)
        text += (f". One policy per known type predicts {known.mean():.3f}; the mixture's difference to it is "
                 f"{pm(gap, sign='+')} ({evidence(gap)})")
    return text + "."


def predicted(figures: dict) -> np.ndarray:
    """Whether a run predicts each held-out choice under the user's weights (P,): 1 if its probability is above a half,
    and 0.5 at a half."""
    nats = np.array(figures["by_pair_own"]) + math.log(2)
    return (1 + np.sign(np.where(abs(nats) < 1e-6, 0.0, nats))) / 2


def best_prediction(results: dict) -> str:
    """The run with the highest log-likelihood of held-out choices, under each user's weights where they are known, and
    its paired difference to a run with one expert; if it has one expert itself, to the next best run."""
    found = results["preferences"]
    if not found:
        return ""
    order = sorted(found, key=lambda run: -found[run]["log_likelihood_own"]["mean"])
    best, others = order[0], order[1:]
    nats = f"{pm(found[best]['log_likelihood_own'], 4)} nats a pair under each user's weights"
    if not others:
        gap = {"mean": found[best]["log_likelihood_own"]["mean"] + math.log(2),
               "se": found[best]["log_likelihood_own"]["se"]}
        clear = abs(gap["mean"]) > 2 * gap["se"]
        how = "no clearly better" if not clear else "better" if gap["mean"] > 0 else "worse"
        return (f"{best} predicts held-out choices {how} than a coin: its log-likelihood is {nats}, {pm(gap, 4, '+')} "
                f"against a coin's -0.6931 ({evidence(gap)}).")
    single = [run for run in others if found[run]["experts"] == 1 and found[best]["experts"] > 1]
    other = "dpo" if "dpo" in single else (single or others)[0]
    a, b = found[best], found[other]
    gap = mean_se(np.subtract(a["by_pair_own"], b["by_pair_own"]), a["prompt_of_pair"], a["user_of_pair_own"])
    return (f"{best} predicts held-out choices best, with a log-likelihood of {nats}; this is {pm(gap, 4, '+')} "
            f"against {other} on the same pairs ({evidence(gap)}).")


def highest_reward(results: dict) -> str:
    """The policy with the highest mean reward, its gain over the reference and over a policy with one expert, and the
    KL of each."""
    policies = {name: row for name, row in results["policies"].items() if name != "reference"}
    if not policies:
        return ""
    best = max(policies, key=lambda name: policies[name]["trained"]["mean"])
    row, single = policies[best], [name for name in policies if not re.search(r" (mixture|sparse|head \d+)$", name)]
    if not row["gain"]["mean"] > 0:
        return (f"no policy has a higher mean reward than the reference; the best is {best} with "
                f"{pm(row['gain'], sign='+')} against it.")
    sentence = (f"{best} has the highest mean reward, {pm(row['trained'])}, at a KL of {pm(row['kl'], 2)} nats to the "
                f"reference; this is {pm(row['gain'], sign='+')} against the reference ({evidence(row['gain'])})")
    other = "dpo" if "dpo" in single else next(iter(single), best)
    if other == best:
        return f"{sentence}."
    gap = mean_se(mean_rewards(results, best) - mean_rewards(results, other))
    return (f"{sentence} and {pm(gap, sign='+')} against {other} ({evidence(gap)}), whose KL is "
            f"{pm(policies[other]['kl'], 2)} nats.")


def mean_rewards(results: dict, policy: str) -> np.ndarray:
    """The mean reward of each prompt (N,): over the rewards that the training pairs were judged by."""
    row = results["policies"][policy]
    rewards = [name for name in row if name not in NO_REWARD]
    return np.array(row["values"])[:, [rewards.index(name) for name in results["trained_rewards"]]].mean(1)


# --- win rates --------------------------------------------------------------------------------------------------------


def win_rate_tables(found: dict) -> str:
    """A table for each criterion of a judge, and the result in a sentence for each; found:
    data/annotators/judges.py's."""
    tables, sentences = [], []
    for criterion, policies in found["columns"].items():
        rows = [[name, f"{f['rate']:.3f}" if math.isfinite(f["rate"]) else NONE,
                 f"{f['low']:.3f} to {f['high']:.3f}" if math.isfinite(f["rate"]) else NONE,
                 *(str(f[count]) for count in ("wins", "ties", "losses", "unjudged"))] for name, f in policies.items()]
        head = ["policy", "win rate", "95 % interval", "wins", "ties", "losses", "not judged"]
        tables.append(table(f"{criterion}: win rate against {found['against']} on {found['prompts']} prompts; ties "
                            "count one half", head, rows))
        judged = {name: f for name, f in policies.items() if math.isfinite(f["rate"])}
        if not judged:
            sentences.append(f"warning: nothing was judged by {criterion}; look at the judge's answers in judged.jsonl")
            continue
        best = max(judged, key=lambda name: judged[name]["rate"])
        f = judged[best]
        chance = "" if f["low"] > 0.5 or f["high"] < 0.5 else "; the interval includes 0.5, so this may be chance"
        sentences.append(f"Result: by {criterion}, {best} does best against {found['against']}: win rate "
                         f"{f['rate']:.3f} ({f['low']:.3f} to {f['high']:.3f}){chance}.")
    return "\n".join([*tables, "", *sentences])
