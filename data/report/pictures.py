"""The pictures of a report: a job -> figures by name. The only file that draws.

An expert has one colour, line and hatch in all pictures, an annotator one colour, line and marker; they differ
without colour too. Figures come from job.py. pyplot is not used: it keeps global state.
"""

import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from data.report import domains, users
from data.report.job import (
    Job,
    Run,
    annotators_of,
    by_annotator,
    heads_of,
    last_responsibilities,
    rewards_of,
    run_of,
    smooth,
)
from mixdpo.evaluation import frontier
from mixdpo.evaluation.statistics import mean_se

EXPERTS = ["#0b5394", "#e07b00", "#4f9d69", "#a64d79", "#7f7f7f", "#9c7a00"]  # reused from the first, with another line
LINES, HATCHES = ["-", "--", ":", "-."], ["", "///", "...", "xx", "\\\\\\", "++"]
ANNOTATORS = ["#6a1b4d", "#1b9e9e", "#d4a017", "#555555", "#8c6bb1", "#7a9a01"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.3, "savefig.dpi": 110,
}


def style():
    """The context manager in which figures are drawn and saved."""
    return matplotlib.rc_context(STYLE)


def expert_line(k: int) -> dict:
    return {"color": EXPERTS[k % len(EXPERTS)], "linestyle": LINES[k % len(LINES)]}


def annotator_look(job: Job, name: str) -> dict:
    i = annotators_of(job).index(name)
    return {"color": ANNOTATORS[i % len(ANNOTATORS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[i % 4]}


def panels(count: int, columns: int, width: float, height: float, **options) -> tuple[Figure, list]:
    """A figure with `count` panels of width x height inches, row by row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def legend(figure: Figure, axes: list, columns: int = 6) -> None:
    """One legend under the panels, each label once."""
    once = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=min(columns, len(once)))


# ---- the pictures: a job -> {file name: figure}, empty if there is nothing to draw


def result(job: Job) -> dict[str, Figure]:
    """The first picture of the report: own reward against KL of each method, and held-out accuracy by type. A panel is
    left out if its figures are missing."""
    results, found = job.results["preferences"], frontier.methods(job.results)
    kinds = [kind for kind in annotators_of(job) if all(kind in figures["types"] for figures in results.values())]
    of = accuracies(results, kinds)
    count = bool(of and kinds) + bool(found)
    if not count:
        return {}
    figure, axes = panels(count, 2, 4.2, 2.8)
    names = list(dict.fromkeys([*(method.name for method in found), *of]))  # one look in both panels
    if found:
        frontiers(axes[0], found, names)
    if of and kinds:
        axis, width, runs = axes[-1], 0.8 / max(2, len(of)), list(of)
        for n, run in enumerate(runs):
            x = np.arange(len(kinds)) + (n - (len(runs) - 1) / 2) * width
            bars(axis, x, of[run], width, names.index(run), run)
        axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="type of user", ylabel="accuracy (share of pairs)", ylim=(0, 1), xlim=(-0.6, len(kinds) - 0.4))
        axis.set_xticks(range(len(kinds)), kinds)
        axis.grid(axis="x", visible=False)
    legend(figure, axes, columns=3)
    return {"result": figure}


def accuracies(results: dict, kinds: list[str]) -> dict[str, list[dict]]:
    """Run -> accuracy on the held-out choices of each type. Runs of further seeds are left out. Runs of one type are
    together the policies of known types, each for its own type."""
    first = {run: figures for run, figures in results.items() if not re.search(r"-seed\d", run)}
    of_type = {figures["trained_on"][0]: figures for figures in first.values() if len(figures["trained_on"]) == 1}
    known = of_type if len(kinds) > 1 and {*of_type} >= {*kinds} else {}
    out = {run: [figures["types"][kind]["accuracy"] for kind in kinds] for run, figures in first.items()
           if not known or figures not in known.values()}
    return out | ({frontier.KNOWN: [known[kind]["types"][kind]["accuracy"] for kind in kinds]} if known else {})


def frontiers(axis, found: list[frontier.Method], names: list[str]) -> None:
    """Own reward against KL: a method's points, with standard errors over prompts, and its frontier as a line. names:
    those of all methods, whose order gives each its look."""
    for method in found:
        n = names.index(method.name)
        look = {"color": EXPERTS[n % len(EXPERTS)]}
        axis.plot(*method.line(), linestyle=LINES[n % len(LINES)], label=method.name, **look)
        for point in method.points:
            gain = mean_se(point.gain)
            axis.errorbar(point.kl.mean(), gain["mean"], yerr=gain["se"], capsize=2, markersize=4, linestyle="none",
                          marker=MARKERS[n % len(MARKERS)], **look)
    axis.set(xlabel="KL to the reference (nats)", ylabel="gain in own reward")


def bars(axis, x: np.ndarray, column: list[dict], width: float, n: int, label: str) -> None:
    """Bars of figures with their standard errors, in the look of expert or run number n."""
    axis.bar(x, [f["mean"] for f in column], width * 0.94, yerr=[f["se"] for f in column], capsize=2,
             facecolor=EXPERTS[n % len(EXPERTS)], hatch=HATCHES[n % len(HATCHES)], edgecolor="white", ecolor="black",
             error_kw={"linewidth": 1}, label=label)


def rewards(job: Job) -> dict[str, Figure]:
    """One panel for each reward, one row for each policy, error bars of one standard error; a line at the reference.
    """
    rows, names = job.results["policies"], [*rewards_of(job), "trained"]
    if not rows:
        return {}
    heads = {row: k for column in heads_of(job).values() for k, row in enumerate(column)}
    shaded = list(dict.fromkeys(map(run_of, rows)))[1::2]
    figure, axes = panels(len(names), len(names), 2.3, 0.7 + 0.17 * len(rows), sharey=True)
    for axis, name in zip(axes, names):
        for y, (row, figures) in enumerate(rows.items()):
            colour = EXPERTS[heads[row] % len(EXPERTS)] if row in heads else "black"
            marker = "o" if row in heads else "s" if row.endswith(" sparse") else "D"
            fill = "white" if row.endswith(" sparse") else colour
            axis.errorbar(figures[name]["mean"], y, xerr=figures[name]["se"], color=colour, marker=marker, mfc=fill,
                          markersize=4, capsize=2, linestyle="none")
            if run_of(row) in shaded:
                axis.axhspan(y - 0.5, y + 0.5, color="#f4f4f4", linewidth=0)
        axis.axvline(rows["reference"][name]["mean"], color="#888888", linewidth=0.8, linestyle=":")
        axis.set_xlabel("mean of trained rewards" if name == "trained" else f"{name} (0 to 1)")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return {"rewards": figure}


def training(job: Job) -> dict[str, Figure]:
    """One picture for each run, with common scales: loss, log-marginal, accuracy, margins, effective experts by step.
    """
    runs = [run for run in job.runs if run.metrics]
    labels = {"loss": "loss (nats a pair)", "log_marginal": "log-marginal (nats a pair)", "accuracy": "accuracy",
              "margin": "margin h (nats)", "effective_experts": "effective experts"}
    curves = {run.name: {key: smooth([step[key] for step in run.metrics]) for key in [*labels, "accuracy_mbt"]}
              for run in runs}
    figures = {}
    for run in runs:
        figure, axes = panels(5, 5, 2.1, 1.9)
        for axis, (key, label) in zip(axes, labels.items()):
            x, y = curves[run.name][key]
            for k, column in enumerate(y.T if y.ndim == 2 else ()):
                axis.plot(x, column, **expert_line(k), label=f"expert {k}")
            if y.ndim == 1:
                kind = "mixture" if run.config["experts"] > 1 else "policy"
                axis.plot(x, y, color="black", linewidth=1, label=kind)
            if key == "accuracy" and run.config["experts"] > 1:
                axis.plot(x, curves[run.name]["accuracy_mbt"][1], color="black", linewidth=1)
            drawn = [key, "accuracy_mbt"] if key == "accuracy" else [key]
            low, high = (pick([pick(curves[name][of][1]) for name in curves for of in drawn])
                         for pick in (np.nanmin, np.nanmax))
            axis.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
            axis.set(title=label, xlabel="step")
        figure.suptitle(run.name, fontsize=9, fontweight="bold")
        legend(figure, axes)
        figures[f"training-{run.name}"] = figure
    return figures


def mixtures(job: Job) -> list[tuple[Run, int]]:
    """The (run, expert) panels of the pictures of responsibilities. Two experts need one panel: the other has 1 - q."""
    runs = [run for run in job.runs if run.config["experts"] > 1 and run.units and run.steps]
    return [(run, k) for run in runs for k in range(run.config["experts"] if run.config["experts"] > 2 else 1)]


def responsibilities(job: Job) -> dict[str, Figure]:
    """The paper's Figure 1: mean responsibilities of each annotator's groups through training."""
    shown = mixtures(job)
    if not shown:
        return {}
    figure, axes = panels(len(shown), 3, 3.2, 2.2, sharey=True)
    for axis, (run, k) in zip(axes, shown):
        for name, (x, means) in by_annotator(run).items():
            axis.plot(x, means[:, k], **annotator_look(job, name), markersize=3.5, markevery=3, label=name)
        if run.config["start"] != "none" and run.config["start_steps"]:
            axis.axvline(run.config["start_steps"] + 0.5, color="#888888", linewidth=0.8)
        axis.axhline(1 / run.config["experts"], color="black", linewidth=0.8, linestyle=":")
        axis.set(title=f"{run.name}, expert {k}", xlabel="step", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("mean responsibility q")
    legend(figure, axes)
    return {"responsibilities": figure}


def accuracy(job: Job) -> dict[str, Figure]:
    """Held-out accuracy: one panel for each run, a group of bars for each annotator, a bar for each expert."""
    rows = job.results["preferences"]
    if not rows:
        return {}
    figure, axes = panels(len(rows), 3, 3.2, 2.0, sharey=True)
    for axis, (run, figures) in zip(axes, rows.items()):
        kinds = [name for name in annotators_of(job) if name in figures["accuracy"]]
        width = 0.8 / max(2, figures["experts"])
        for k in range(figures["experts"]):
            column = [figures["accuracy"][kind][k] for kind in kinds]
            x = np.arange(len(kinds)) + (k - (figures["experts"] - 1) / 2) * width
            bars(axis, x, column, width, k, f"expert {k}")
        axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=run, ylim=(0, 1), xlabel="pairs judged by", xlim=(-0.6, len(kinds) - 0.4))
        axis.set_xticks(range(len(kinds)), kinds)
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("accuracy (share of pairs)")
    legend(figure, axes)
    return {"accuracy": figure}


def adaptation(job: Job) -> dict[str, Figure]:
    """Accuracy on new users' pairs by number of pairs shown: one panel for each file, one line for each run."""
    files = job.results["adapt"]
    if not files:
        return {}
    figure, axes = panels(len(files), 3, 3.2, 2.2, sharey=True)
    for axis, (name, runs) in zip(axes, files.items()):
        for n, (run, curve) in enumerate(runs.items()):
            x, of = range(len(curve)), [point["accuracy"] for point in curve]
            axis.errorbar(x, [f["mean"] for f in of], [f["se"] for f in of], **expert_line(n), marker=MARKERS[n % 6],
                          markersize=3.5, capsize=2, label=run)
            axis.set_xticks(x, [str(point["shown"]) for point in curve])
        axis.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="pairs shown")
    axes[0].set_ylabel("accuracy (share of pairs)")
    legend(figure, axes)
    return {"adaptation": figure}


def histogram(job: Job) -> dict[str, Figure]:
    """Histogram of the last responsibilities of the training groups, one line for each annotator."""
    shown = mixtures(job)
    if not shown:
        return {}
    figure, axes = panels(len(shown), 3, 3.2, 2.0, sharey=True)
    for axis, (run, k) in zip(axes, shown):
        for name, q in last_responsibilities(run).items():
            colour, line = annotator_look(job, name)["color"], annotator_look(job, name)["linestyle"]
            axis.hist(q[:, k], np.linspace(0, 1, 21), weights=np.full(len(q), 1 / max(len(q), 1)), histtype="step",
                      color=colour, linestyle=line, linewidth=1.5, label=name)
        axis.set(title=f"{run.name}, expert {k}", xlabel="last responsibility q", xlim=(-0.02, 1.02))
    axes[0].set_ylabel("share of groups")
    legend(figure, axes)
    return {"histogram": figure}


def gate_weights(job: Job) -> dict[str, Figure]:
    """Gate weight of each evaluation prompt: one panel for each run whose weights vary, one row for each set and
    domain.
    """
    shown = {run: w for run, w in domains.weights_of(job).items() if np.ptp(w, axis=0).max() > 0}
    parts = domains.parts_of(job)
    if not shown or len(parts) < 2:
        return {}
    figure, axes = panels(len(shown), 3, 3.0, 0.8 + 0.22 * len(parts), sharey=True)
    for axis, (run, w) in zip(axes, shown.items()):
        for y, part in enumerate(parts.values()):
            lift = np.random.default_rng(0).uniform(-0.25, 0.25, len(part))  # jitter
            axis.plot(w[part, 0], y + lift, ".", markersize=3, color=ANNOTATORS[y % len(ANNOTATORS)])
            axis.plot([w[part, 0].mean()] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1)
        axis.set(title=run, xlim=(-0.03, 1.03), xlabel="weight of expert 0")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(parts)), [f"{domain}, {which}" for which, domain in parts])
    axes[0].invert_yaxis()
    return {"gate": figure}


def prompt_features(job: Job) -> dict[str, Figure]:
    """Inputs of the first learnt gate in two dimensions, PCA and t-SNE, coloured by domain and by gate weight."""
    run = next((r for r in job.runs if r.config["gate"] in ("linear", "mlp", "prompt-user")), None)
    path, parts = job.home / "prompt-states.safetensors", domains.parts_of(job)
    if run is None or not path.exists() or run.name not in (weights := domains.weights_of(job)):
        return {}
    from safetensors.numpy import load_file  # imported here: only this picture needs them
    from sklearn.manifold import TSNE

    states = load_file(path)["states"][:, ("last", "mean").index(run.config["gate_features"])].astype(float)
    x = (states - states.mean(0)) / (states.std(0) + 1e-9)
    flat = {"PCA": (x - x.mean(0)) @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T}
    if len(x) > 5:
        flat["t-SNE"] = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=0).fit_transform(x)
    figure, axes = panels(2 * len(flat), 2, 3.4, 2.8)
    for row, (name, xy) in enumerate(flat.items()):
        for n, (which, domain) in enumerate(parts):
            axes[2 * row].scatter(*xy[parts[which, domain]].T, s=9, color=ANNOTATORS[n % len(ANNOTATORS)],
                                  marker=MARKERS[n % len(MARKERS)], label=f"{domain}, {which}")
        dots = axes[2 * row + 1].scatter(*xy.T, s=9, c=weights[run.name][:, 0], cmap="cividis", vmin=0, vmax=1)
        figure.colorbar(dots, ax=axes[2 * row + 1], label="weight of expert 0")
        axes[2 * row].set_title(f"{name}: domain and set")
        axes[2 * row + 1].set_title(f"{name}: {run.name}")
    legend(figure, axes, columns=3)
    return {"prompts": figure}


def knowledge(job: Job) -> dict[str, Figure]:
    """Runs with a learnt gate by step: entropies of weights and responsibilities, information, effective experts."""
    runs = [run for run in job.runs if run.metrics and run.config["gate"] in ("linear", "mlp", "user", "prompt-user")]
    labels = {"gate_entropy": "mean entropy of w", "gate_information": "I(z; x)", "q_gain": "KL(q || w)",
              "q_entropy": "mean entropy of q", "effective_experts": "effective experts"}
    if not runs:
        return {}
    figure, axes = panels(5, 5, 2.1, 1.9)
    for axis, (key, label) in zip(axes, labels.items()):
        for n, run in enumerate(runs):
            axis.plot(*smooth([step[key] for step in run.metrics]), **expert_line(n), label=run.name)
        axis.set(title=label + ("" if key == "effective_experts" else " (nats)"), xlabel="step")
    legend(figure, axes)
    return {"knowledge": figure}


# ---- pictures of studies and planted worlds


def curves(shown: dict[str, dict[str, list[tuple]]], labels: tuple[str, str], log: int = 0,
           lines: dict[str, float] = {}, columns: int = 3, one_scale: bool = True) -> Figure:
    """Panel -> line -> (x, mean, SE or 0). labels: of the x and y axes; log: base of the x axis, 0 for a linear axis;
    lines: name -> level of a dotted line."""
    figure, axes = panels(len(shown), columns, 3.2, 2.4, sharey=one_scale)
    names = list(dict.fromkeys(name for of in shown.values() for name in of))              # the same look in all panels
    for axis, (title, of) in zip(axes, shown.items()):
        for name, points in of.items():
            (at, means, ses), n = zip(*points), names.index(name)
            axis.errorbar(at, means, ses, color=ANNOTATORS[n % 6], marker=MARKERS[n % 6], linestyle=LINES[n % 4],
                          markersize=3.5, capsize=2, label=name)
        for n, (name, level) in enumerate(lines.items()):
            axis.axhline(level, color=("black", "#999999")[n % 2], linewidth=0.8, linestyle=":", label=name)
        if log:
            ticks = sorted({p[0] for points in of.values() for p in points})
            axis.set_xscale("log", base=log)
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axis.minorticks_off()
        axis.set(title=title, xlabel=labels[0])
    axes[0].set_ylabel(labels[1])
    legend(figure, axes)
    return figure


def maps(shown: dict[str, tuple[list, list, np.ndarray]], x: str, y: str, label: str, columns: int = 4,
         marks: dict = {}) -> Figure:
    """Panel -> (x values, y values, numbers (Y,X)), with a common scale. marks: panel -> [(x index, y index, sign)]."""
    figure, axes = panels(len(shown), columns, 2.4, 2.1, sharex=True, sharey=True)
    every = np.concatenate([np.ravel(z) for *_, z in shown.values()])
    low, high = np.nanmin(every), np.nanmax(every)
    for axis, (title, (xs, ys, z)) in zip(axes, shown.items()):
        drawn = axis.imshow(z, origin="lower", aspect="auto", cmap="cividis", vmin=low, vmax=high)
        for i, j, sign in marks.get(title, []):
            axis.text(i, j, sign, ha="center", va="center", fontsize=7, color="white" if z[j][i] < (low + high) / 2
                      else "black")
        axis.set_xticks(range(len(xs)), [f"{v:g}" for v in xs])
        axis.set_yticks(range(len(ys)), [f"{v:g}" for v in ys])
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(visible=False)
        axis.label_outer()
    figure.colorbar(drawn, ax=axes, label=label)
    return figure


def dots(shown: dict[str, dict[str, np.ndarray]], columns: int = 4) -> Figure:
    """Panel -> group -> points (N,2), without scales."""
    figure, axes = panels(len(shown), columns, 2.6, 2.4)
    for axis, (title, of) in zip(axes, shown.items()):
        for n, (name, xy) in enumerate(of.items()):
            axis.plot(*np.asarray(xy).T, MARKERS[n % 6], color=ANNOTATORS[n % 6], markersize=3, alpha=0.8, label=name)
        axis.set(title=title, xticks=[], yticks=[])
    legend(figure, axes)
    return figure


def planted(found: dict) -> Figure:
    """ARI / Bayes-optimal ARI by number of pairs a user judges, one panel for each number of types (planted.py)."""
    shown = {}
    for row in found["rows"]:
        for way in users.WAYS:
            f = users.of_bayes(row, way)
            points = shown.setdefault(f"{row['types']} types", {}).setdefault(way, [])
            points.append((row["each"], f["mean"], f["se"]))
    return curves(shown, ("pairs a user judges", "ARI / Bayes-optimal ARI"), 2, {"Bayes-optimal": 1.0})


PICTURES = [  # title, caption, drawing
    (
        "Rewards",
        "Mean over the evaluation prompts ± one standard error; the dotted line is the reference. Coloured dots are "
        "single heads, diamonds mixtures, hollow squares sparse mixtures.",
        rewards,
    ),
    (
        "Training",
        "Look for margins that separate: then the experts have begun to differ. Values are measured before each update "
        "and averaged over up to 50 intervals of steps.",
        training,
    ),
    (
        "Responsibilities by annotator",
        "Where the lines separate, experts have found their annotators (the paper's Figure 1). Dotted: 1/K; left of "
        "the grey line responsibilities come from the start.",
        responsibilities,
    ),
    (
        "Held-out accuracy",
        "An expert that learnt one annotator is high there and lower elsewhere. Bars show ± one standard error; "
        "dotted: chance.",
        accuracy,
    ),
    (
        "Last responsibilities",
        "Annotators at opposite ends were separated; 0 and 1 are certain assignments.",
        histogram,
    ),
]
OF_USERS = [
    (
        "New users",
        "Look at the rise from left to right: the gain from a posterior over types, for users without training data.",
        adaptation,
    ),
]
OF_GATES = [
    (
        "What the gate knows, by step",
        "A gate learns where I(z; x) rises and KL(q || w) falls. Effective experts near 1 mean that the gate gives all "
        "to one expert.",
        knowledge,
    ),
    (
        "Gate weights by domain",
        "Domains at opposite ends were separated. A dot is an evaluation prompt, a line the mean of its set.",
        gate_weights,
    ),
    (
        "What the gate reads",
        "Prompt features in two dimensions: left by domain, right by gate weight. Where the colours match, the gate "
        "has found the domains.",
        prompt_features,
    ),
]
