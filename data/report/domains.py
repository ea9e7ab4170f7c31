"""Tables of an experiment on several domains: rewards where they are wanted, what gates know, and who explains best.

    reward of a domain    of the annotators who judge there, mean over its prompts
    gate accuracy         share of prompts whose likeliest expert is that of most held-out prompts of the domain
    information           I(z; x) = entropy of the mean weights less mean entropy (nats): ln 2 if a gate of two is sure
    likelihood            log p(y+ > y-) (M5) of held-out pairs; runs are compared pair by pair, errors count prompts
"""

import numpy as np

from data.report.job import Job, run_of
from data.report.tables import NONE, escape, in_ses, plain, pm, section, table
from mixdpo.metrics import matched_accuracy, mean_se


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
        "The reward that a domain's judges follow (mean of all where nothing was trained on), ± standard error, on "
        "prompts that were held out, on reviews that speak of the other domain (crossed), and on domains never trained "
        "on (other).",
        table(["policy", *(f"{escape(d)}, {s}: {plain(wanted[s, d])}" for s, d in parts)], body))


def weights_of(job: Job) -> dict[str, np.ndarray]:
    """Run -> its mixture weights of each evaluation prompt (N,K)."""
    return {run_of(name): np.array(row["w"]) for name, row in job.results["policies"].items() if "w" in row}


def names_of(job: Job, w: np.ndarray) -> dict[int, str]:
    """Expert -> the domain that it stands for, by the held-out prompts."""
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
            told = [names[int(w[n].argmax())] == d for n in part]
            right = f"{np.mean(told):.2f}, " if d in names.values() and np.ptp(w, axis=0).max() > 0 else ""
            cells.append(f"{right}{entropy(w[part]).mean():.2f}")
        held = [n for (s, _), part in parts.items() if s == "held out" for n in part]
        known = entropy(w[held].mean(0)) - entropy(w[held]).mean()
        kind = next((r.config["gate"] for r in job.runs if r.name == run), NONE)
        body.append([escape(run), escape(kind), f"{known:.3f}", f"{np.exp(entropy(w[held].mean(0))):.2f}", *cells])
    return section(
        title,
        "Information and effective experts on held-out prompts; then, for each set of prompts, the share whose "
        "likeliest expert is the domain's own (0.5 is a coin; none where weights are the same for all) and the mean "
        "entropy of the weights in nats (0.69: undecided). A gate that knows what it does not know is undecided on "
        "other domains.",
        table(["run", "gate", "I(z; x) (nats)", "effective experts", *(f"{escape(d)}, {s}" for s, d in parts)], body,
              2))


def likelihoods(job: Job) -> str:
    title, of, body = "Who explains the held-out choices", job.results["preferences"], []
    runs = {run.name: run.config for run in job.runs if run.name in of}

    def less(run: str, base: str | None) -> list[str]:
        if base is None or run == base:
            return [NONE, NONE]
        users = of[run].get("user_of_pair") or of[base].get("user_of_pair")                 # where weights are theirs
        clusters = [of[run]["prompt_of_pair"], *([users] if users else [])]
        gap = mean_se(np.subtract(*(np.array(of[name]["by_pair"], float) for name in (run, base))), *clusters)
        return [pm(gap, 4, sign="+"), in_ses(gap)]

    def first(holds) -> str | None:
        return next((name for name, config in runs.items() if holds(config)), None)

    dpo, chance = first(lambda config: config["experts"] == 1), lambda config: config["gate"] == "random"
    for run, figures in of.items():
        kind = runs.get(run, {}).get("sharing")
        random = first(lambda config: chance(config) and config["sharing"] == kind) or first(chance)
        shares = [pm(f) for f in (figures["log_likelihood"], figures["accuracy_mbt"])]
        body.append([escape(run), *shares, *less(run, dpo), *less(run, random)])
    return section(
        title,
        "Log-likelihood of held-out choices (nats a pair; a coin has -0.693) and the share explained; and how much "
        "better than by DPO and than by a random gate on the same kind of experts, where there is one, pair by pair: "
        "beyond 2 SEs it is hardly chance.",
        table(["run", "log-likelihood", "accuracy", "less DPO's", "in SEs", "less the random gate's", "in SEs"], body))
