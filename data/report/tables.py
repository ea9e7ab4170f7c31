"""Tables: a job's figures as Markdown. One function writes one section, with a caption that says what to look at.

Texts by models and users pass through `escape`, so that no markup in them acts. A section without figures says so.
"In SEs" is a figure divided by its standard error; beyond 2 in size it is hardly chance.
"""

import dataclasses
import math
import re
import time
from collections import Counter
from pathlib import Path

from data.report.job import Job, annotators_of, heads_of, paired, rewards_of
from mixdpo.evaluation.collapse import describe_active, describe_collapse
from mixdpo.runs.options import TrainConfig

PAPER_REWARDS = ("sentiment", "informativeness", "grammar")
PAPER = {  # arXiv 2510.08256, its table for IMDb with GPT-2
    "DPO": (0.610, 0.363, 0.216),
    "mixture": (0.654, 0.326, 0.241),
    "sparse": (0.616, 0.396, 0.263),
    "head 0": (0.720, 0.394, 0.213),
    "head 1": (0.632, 0.342, 0.267),
}
PAPER_PROMPTS = 10000
NONE = "–"  # an empty cell
# What Markdown acts on inside a line: _ not within a word, : not before a space (links, emoji), . of a bare www. link
ACTIVE = r"[\\`*\[\]<>&|~$@]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])|:(?=\S)|(?<=www)\."


# ---- Markdown


def escape(text) -> str:
    """Markdown that shows the text literally, in a paragraph or a table cell: no markup or line break in it acts."""
    text = re.sub(r"\r\n?", "\n", str(text))
    text = re.sub(ACTIVE, lambda m: f"&#{ord(m[0])};", text)
    pictures = {c: 0x2400 + c for c in range(32) if c != 10} | {127: 0x2421}               # control characters, visible
    return text.translate(pictures).replace("\n", "<br>")


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table. Cells are Markdown; the first `left` columns are left-aligned, the others right-aligned."""
    rule = [":--"] * left + ["--:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def aligned(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """The same table for the console: columns padded with spaces, the first `left` of them left-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    pads = [str.ljust if n < left else str.rjust for n in range(len(head))]
    return "\n".join("  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths)).rstrip()
                     for row in (head, *rows))


def section(title: str, caption: str, *parts: str) -> str:
    """A section of Markdown; empty parts are left out."""
    return "\n\n".join([f"## {title}", caption, *filter(None, parts)])


def measured(figure: dict, what: str = "mean") -> bool:
    """Whether the figure's entry `what` is a finite number."""
    return math.isfinite(figure[what])


def pm(figure: dict, digits: int = 3, sign: str = "") -> str:
    """mean ± SE; the mean alone if there is no SE; an empty cell if there is no mean."""
    if not measured(figure):
        return NONE
    mean = f"{figure['mean']:{sign}.{digits}f}"
    return f"{mean} ± {figure['se']:.{digits}f}" if measured(figure, "se") else mean


def in_ses(figure: dict) -> str:
    """The mean divided by its standard error; an empty cell if the error is missing or 0."""
    return f"{figure['mean'] / figure['se']:+.1f}" if measured(figure) and figure["se"] > 0 else NONE


def plain(value) -> str:
    """A value of a JSON file on one line."""
    if isinstance(value, dict):
        inner = {k: f"({plain(v)})" if isinstance(v, dict) else plain(v) for k, v in value.items()}
        return ", ".join(f"{escape(k)} {v}" for k, v in inner.items())
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return f"{value:.4g}" if isinstance(value, float) else escape(value)


# ---- what was run


def base_model(job: Job) -> str:
    """The model that the reference was fine-tuned from, or the reference itself if no fine-tuning is recorded."""
    model = job.tuned.get("settings", {}).get("model") or (job.runs[0].config["model"] if job.runs else "unknown")
    return Path(model).name


def what_was_run(job: Job) -> str:
    facts = {"model": escape(base_model(job))}
    if job.tuned:
        before, after = job.tuned["perplexity_before"], job.tuned["perplexity_after"]
        facts["model"] += f", fine-tuned on texts of the domain: perplexity {before:.2f} before, {after:.2f} after"
    facts |= {name: plain(value) for name, value in job.dataset.items()}
    facts |= {f"{name}.jsonl": describe(rows) for name, rows in job.files.items()}
    settings = ("seed", "temperature", "limit", "max_new", "batch")
    facts["evaluation"] = plain({k: v for k, v in job.results.get("config", {}).items() if k in settings})
    facts["environment"] = plain(job.results.get("environment", {}))
    paths = ("data", "model", "out", "data_folder", "save_minutes")
    usual = {field.name: field.default for field in dataclasses.fields(TrainConfig) if field.name not in paths}
    columns = [name for name, default in usual.items() if name in ("experts", "latent", "beta", "lr", "seed")
               or any(run.config[name] != default for run in job.runs)]
    rows = [[escape(run.name), *(plain(run.config[c]) for c in columns), str(len(run.metrics)), duration(run.seconds)]
            for run in job.runs]
    return section(
        "What was run",
        "Data, settings and runs behind the figures. Options without a column have their default in all runs.",
        "\n".join(f"- {escape(name)}: {value}" for name, value in facts.items() if value),
        table(["run", *columns, "steps", "time"], rows) if rows else "")


def describe(rows: list[dict]) -> str:
    """Counts of a file's lines, users and annotators."""
    users = len({row["user"] for row in rows if row.get("user")})
    judged = Counter(row["annotator"] for row in rows if row.get("annotator"))
    parts = [f"{len(rows)} lines", f"{users} users" if users else "",
             f"judged by {plain(dict(sorted(judged.items())))}" if judged else ""]
    return "; ".join(filter(None, parts))


def duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 3600:.1f} h"


# ---- rewards


def policies(job: Job) -> str:
    title, rows, rewards = "Rewards of the policies", job.results["policies"], rewards_of(job)
    if not rows:
        return section(title, "No completions were evaluated.")
    body = []
    for name, row in rows.items():
        gain = [NONE, NONE] if name == "reference" else [pm(row["gain"], sign="+"), in_ses(row["gain"])]
        body.append([escape(name), *(pm(row[r]) for r in rewards), pm(row["trained"]), *gain, pm(row["kl"], 2),
                     pm(row["length"], 1)])
    note, head = "", ["policy", *map(escape, rewards), "mean of trained", "gain over reference", "in SEs", "KL (nats)",
                      "length (tokens)"]
    if set(rewards) & set(PAPER_REWARDS) and "domains" not in job.dataset:                # IMDb, as in the paper
        for name, figures in PAPER.items():
            of = dict(zip(PAPER_REWARDS, figures))
            body.append([f"*paper: {name}*", *(f"*{of[r]:.3f}*" if r in of else NONE for r in rewards), *[NONE] * 5])
        note = difference_to_paper(job, rows["reference"]["trained"]["n"])
    return section(
        title,
        "Look at the gain over the reference: it is the paired difference in *mean of trained*, the mean of the "
        "rewards that the training annotators follow. KL is measured at the sampling temperature.",
        table(head, body), note)


def difference_to_paper(job: Job, prompts: int) -> str:
    """How the job differs from the paper's, so that figures cannot be compared directly."""
    base, judges = base_model(job), [name for name in annotators_of(job) if name != "all"]
    differ = [] if base == "gpt2" else [f"the model is {escape(base)}, not GPT-2"]
    if sorted(judges) != sorted(PAPER_REWARDS):
        differ.append(f"the pairs are judged by {plain(judges) or 'nobody named'}, not by {plain(list(PAPER_REWARDS))}")
    if prompts != PAPER_PROMPTS:
        differ.append(f"there are {prompts} evaluation prompts, not {PAPER_PROMPTS:,}")
    differ.append("the reward functions, which set the scale of each column, are those of data/annotators/rewards.py")
    return (f"The paper's rows are for GPT-2 on IMDb (arXiv 2510.08256). Here {'; '.join(differ)}. "
            "So compare directions, not levels.")


def head_differences(job: Job) -> str:
    title, rewards, body = "Differences between the heads", rewards_of(job), []
    for run, names in heads_of(job).items():
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                figures = paired(job.results["policies"], a, b)
                cells = [pm(f, sign="+") + (f" ({in_ses(f)} SE)" if in_ses(f) != NONE else "") for f in figures]
                body.append([escape(run), f"{a.removeprefix(f'{run} ')} minus {b.removeprefix(f'{run} ')}", *cells])
    if not body:
        return section(title, "No completions of a run with several experts were evaluated.")
    return section(
        title,
        "Paired differences of each reward over the prompts. Beyond 2 SEs the heads differ in that reward.",
        table(["run", "heads", *map(escape, rewards)], body, left=2))


# ---- held-out pairs


def preferences(job: Job) -> str:
    title, kinds = "Held-out preferences", annotators_of(job)
    if not job.results["preferences"]:
        return section(title, "No held-out pairs were evaluated.")
    of_expert, of_run = [], []
    for run, figures in job.results["preferences"].items():
        by = figures["accuracy"]
        for k in range(figures["experts"]):
            own, gap = figures["own"][k], figures["own_other"][k]
            shares = [pm(by[kind][k]) if kind in by else NONE for kind in kinds]
            of_expert.append([escape(run), str(k), escape(own or NONE), *shares, pm(figures["accuracy_all"][k]),
                              *([pm(gap, sign="+"), in_ses(gap)] if gap else [NONE, NONE])])
        nats = [pm(figures[name], 4) for name in ("log_likelihood", "log_likelihood_own",
                                                      "log_likelihood_calibrated", "elbo_gap")]
        of_run.append([escape(run), plain(figures["weights"]), pm(figures["accuracy_mbt"]), pm(figures["accuracy_own"]),
                       *nats, f"{figures['effective_experts']:.2f}", describe_active(figures)])
    judged = [f"judged by {escape(kind)}" if kind != "all" else "judge unknown" for kind in kinds]
    head = ["run", "expert", "named after", *judged, "all", "own - other", "in SEs"]
    head_of_run = ["run", "w", "accuracy, w", "accuracy, user's weights", "log-likelihood, w (nats)",
                   "log-likelihood, user's weights (nats)", "log-likelihood, calibrated (nats)", "ELBO gap (nats)",
                   "effective experts", "active experts"]
    warnings = [describe_collapse(run, figures) for run, figures in job.results["preferences"].items()]
    return section(
        title,
        "Look at *own - other*: an expert that learnt its annotator is more often right on that annotator's held-out "
        "pairs than on the others' (0.5 is chance). An expert is named after the annotator with most of its training "
        "groups. Standard errors are clustered by prompt.",
        table(head, of_expert, left=3),
        "The mixture of Bradley-Terry per pair. A log-likelihood above -0.6931 is better than chance. The user's "
        "weights are the user's responsibilities after training, or w for an unknown user; their standard errors are "
        "clustered by prompt and user. Calibrated: margins are divided by a temperature that is fitted on the other "
        "half of the users. Removing an active expert lowers the log-likelihood (one-sided test at 5 %).",
        table(head_of_run, of_run),
        "\n".join(f"- {escape(warning)}" for warning in warnings if warning))


def alignment(job: Job) -> str:
    title, body = "Experts and annotators", []
    for run, figures in job.results["preferences"].items():
        for key, what in (("alignment_train", "training groups"), ("alignment_heldout", "single held-out pairs")):
            if figures["experts"] > 1 and (found := figures[key]):
                measures = ("ari", "bayes_ari", "matched", "bayes_matched")
                body.append([escape(run), what, *(f"{found[m]:.3f}" if m in found else NONE for m in measures),
                             str(found["units"])])
    if not body:
        return section(title, "Not measured: this needs several experts and held-out pairs of several annotators.")
    return section(
        title,
        "Compare ARI with its Bayes column: ARI says how well responsibilities recover who judged (0 chance, 1 "
        "perfect), Bayes how well the true scores could. *Matched* is the share assigned rightly by the best naming.",
        table(["run", "units", "ARI", "ARI, Bayes", "matched", "matched, Bayes", "number of units"], body, left=2))


# ---- completions


def samples(job: Job) -> str:
    """Completions of the first prompts; policies with the same text share a row."""
    title, rewards, blocks = "Sample completions", rewards_of(job), []
    if not job.samples:
        return section(title, "No completions were evaluated.")
    for n, sample in enumerate(job.samples):
        of_text = {}
        for name, text in sample["texts"].items():
            of_text.setdefault(text.removeprefix(sample["prompt"]), []).append(name)
        rows = []
        for text, names in of_text.items():
            values = job.results["policies"].get(names[0], {}).get("values", [])
            cell = " ".join(f"{v:.2f}" for v in values[n]) if n < len(values) else NONE
            rows.append([", ".join(map(escape, names)), cell, escape(text)])
        head = ["policy", "rewards", "completion"]
        blocks.append(f"**{n + 1}.** {escape(sample['prompt'])}\n\n{table(head, rows, left=3)}")
    return section(
        title,
        f"Completions of the first {len(job.samples)} prompts. All policies use the same random numbers, so a mixture "
        "writes what its drawn expert writes." + (f" Rewards: {plain(rewards)}." if rewards else ""),
        *blocks)
