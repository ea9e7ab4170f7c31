"""Tables of a job with several domains: rewards by domain, what gates know, and the likelihood of held-out choices.

    reward of a domain    reward of the annotators who judge in the domain, mean over its prompts
    gate accuracy         share of prompts whose likeliest expert is the expert of the domain
    information           I(z; x) = entropy of the mean weights minus mean entropy (nats); ln 2 for a gate of two that
                          is sure
    likelihood            log p(y+ > y-) (M5) of held-out pairs; differences are paired, errors clustered by prompt
"""

import numpy as np

from data.report.job import Job, run_of
from data.report.tables import NONE, escape, in_ses, plain, pm, section, table
from mixdpo.evaluation.statistics import matched_accuracy, mean_se


def parts_of(job: Job) -> dict[tuple[str, str], list[int]]:
    """(set, domain) -> its evaluation prompts, in the order of the file."""
    parts = {}
    for n, row in enumerate(job.results.get("asked", [])):
        parts.setdefault((row.get("set", "held out"), row.get("domain", "")), []).append(n)
    return parts


def rewards_by_domain(job: Job) -> str:
    title, parts, domains = "Rewards by domain", parts_of(job), job.dataset.get("domains", {})
    rewards, body = job.dataset.get("rewards", []), []
    wanted = {part: domains.get(part[1], job.dataset.get("annotators", [])) for part in parts}
    for name, row in job.results["policies"].items():
        if " head " not in name:
            values = np.array(row["values"])                                # (N,R)
            of = {part: values[rows][:, [rewards.index(r) for r in wanted[part]]] for part, rows in parts.items()}
            body.append([escape(name), *(pm(mean_se(columns.mean(1))) for columns in of.values())])
    return section(
        title,
        "The reward of each domain's judges ± standard error, by set of prompts: held out, crossed (they mention the "
        "other domain) and other (domains without training data, mean of all rewards).",
        table(["policy", *(f"{escape(d)}, {s}: {plain(wanted[s, d])}" for s, d in parts)], body))


def weights_of(job: Job) -> dict[str, np.ndarray]:
    """Run -> its mixture weights of each evaluation prompt (N,K)."""
    return {run_of(name): np.array(row["w"]) for name, row in job.results["policies"].items() if "w" in row}


def names_of(job: Job, w: np.ndarray) -> dict[int, str]:
    """Expert -> its domain, by the best one-to-one naming on held-out prompts."""
    held = [(n, d) for (s, d), part in parts_of(job).items() if s == "held out" for n in part]
    return matched_accuracy([int(w[n].argmax()) for n, _ in held], [d for _, d in held], w.shape[1])[1]


def entropy(w: np.ndarray) -> np.ndarray:
    """(..., K) -> (...) nats."""
    return -(w * np.log(np.where(w > 0, w, 1))).sum(-1)


def gates(job: Job) -> str:
    title, parts, body = "What the gates know", parts_of(job), []
    for run, w in weights_of(job).items():
        names, cells = names_of(job, w), []
        for (s, d), part in parts.items():
            named = [names[int(w[n].argmax())] == d for n in part]
            right = f"{np.mean(named):.2f}, " if d in names.values() and np.ptp(w, axis=0).max() > 0 else ""
            cells.append(f"{right}{entropy(w[part]).mean():.2f}")
        held = [n for (s, _), part in parts.items() if s == "held out" for n in part]
        known = entropy(w[held].mean(0)) - entropy(w[held]).mean()
        kind = next((r.config["gate"] for r in job.runs if r.name == run), NONE)
        body.append([escape(run), escape(kind), f"{known:.3f}", f"{np.exp(entropy(w[held].mean(0))):.2f}", *cells])
    return section(
        title,
        "A gate that learnt the domains has high information and gives held-out prompts to the domain's expert. Cells "
        "show that share (0.5 is chance) and the weights' mean entropy in nats (0.69 is undecided, as a good gate is "
        "on other domains).",
        table(["run", "gate", "I(z; x) (nats)", "effective experts", *(f"{escape(d)}, {s}" for s, d in parts)], body,
              2))


def likelihoods(job: Job) -> str:
    title, of, body = "Likelihood of held-out choices", job.results["preferences"], []
    runs = {run.name: run.config for run in job.runs if run.name in of}

    def minus(run: str, base: str | None) -> list[str]:
        if base is None or run == base:
            return [NONE, NONE]
        users = of[run].get("user_of_pair") or of[base].get("user_of_pair")                 # if weights depend on users
        clusters = [of[run]["prompt_of_pair"], *([users] if users else [])]
        gap = mean_se(np.subtract(*(np.array(of[name]["by_pair"], float) for name in (run, base))), *clusters)
        return [pm(gap, 4, sign="+"), in_ses(gap)]

    def first(condition) -> str | None:
        return next((name for name, config in runs.items() if condition(config)), None)

    dpo, chance = first(lambda config: config["experts"] == 1), lambda config: config["gate"] == "random"
    for run, figures in of.items():
        kind = runs.get(run, {}).get("sharing")
        random = first(lambda config: chance(config) and config["sharing"] == kind) or first(chance)
        shares = [pm(f) for f in (figures["log_likelihood"], figures["accuracy_mbt"])]
        body.append([escape(run), *shares, *minus(run, dpo), *minus(run, random)])
    return section(
        title,
        "Look at the paired differences: log-likelihood (nats a pair; chance is -0.693) minus that of DPO, and minus "
        "that of a random gate on the same kind of experts. Beyond 2 SEs it is hardly chance.",
        table(["run", "log-likelihood", "accuracy", "minus DPO", "in SEs", "minus random gate", "in SEs"], body))
