"""Evaluation: `python eval.py DIR`. DIR is a run, or a folder of runs with heldout.jsonl and prompts.jsonl beside them.

For every run: held-out preferences (accuracy of each expert, by annotator; log-likelihood M5; ELBO gap; how the
responsibilities align with annotators, beside what the annotators' own scores would allow), and completions of the
evaluation prompts by the reference and by every expert on the same seeds, scored by the reward functions that
dataset.json names. A row's randomness is its own (evaluation/generate.py), so the mixture's completion of a prompt
is that of the expert it draws (M13): the mixture and sparse rows cost nothing more.
Writes results.json, samples.jsonl and, if matplotlib is there, report.md with pictures into DIR. No run is changed.
`python eval.py RUN --export OUT` evaluates nothing and writes the run's experts to OUT/expert-k.
"""

import copy
import dataclasses
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mixdpo import config as configs
from mixdpo.config import InputError, to_json, write_whole
from mixdpo.evaluation.adaptation import adapted
from mixdpo.evaluation.export import export_experts
from mixdpo.evaluation.generate import choose_expert, generate
from mixdpo.evaluation.heldout import expert_logp, margins_of, preference_figures, weights
from mixdpo.experts import Heads
from mixdpo.fast.memory import steady
from mixdpo.gates import READS_PROMPT
from mixdpo.metrics import mean_se
from mixdpo.mixture import mixture_logp
from mixdpo.preferences import Pair, encode_prompt
from mixdpo.runs.load_run import Run, find_runs, load_run
from mixdpo.runs.reference import compute_reference, load_references, prompt_features
from mixdpo.runs.rundir import Progress, environment
from mixdpo.text.chat import template_of
from mixdpo.text.records import check_messages, check_string, lines


@dataclass(frozen=True)
class EvalConfig:
    """Evaluates a run directory, or every finished run in a directory."""

    dir: str                        # a run, or a folder of runs
    heldout: str = ""               # held-out preferences; default: heldout.jsonl in the folder
    adapt: str = ""                 # preferences of new users, some of which are shown; default: adapt-*.jsonl there
    prompts: str = ""               # evaluation prompts, {"prompt": ...} a line; default: prompts.jsonl in the folder
    limit: int = 0                  # evaluate on the first so many prompts; 0: all
    max_new: int = 0                # tokens a completion; 0: what dataset.json says, else the runs' max_response
    temperature: float = 1.0        # of sampling; 0: greedy. KL is of the policies as sampled, to the reference at 1
    batch: int = 128                # prompts sampled together
    seed: int = 1                   # of sampling; the same for every row
    data_folder: str = ""           # local files looked into before anything is fetched
    judge: str = ""                 # compare what was completed before, two policies at a time: annotator:NAME,
                                    # classifier:PATH or llm:MODEL (data/annotators/judges.py), and stop there
    against: str = ""               # with --judge: the policy that the others are compared with; default: dpo
    export: str = ""                # write the run's experts into this folder, as models or adapters, and stop there


def validate(config: EvalConfig) -> None:
    """Raises: InputError on a value out of range, before anything is read, computed or replaced."""
    for name, least in {"limit": 0, "max_new": 0, "temperature": 0, "batch": 1, "seed": 0}.items():
        value = getattr(config, name)
        if not least <= value < math.inf:                                   # false of NaN too
            raise InputError(f"got {value}, wanted a number of at least {least}", option=name)


# --- completions ------------------------------------------------------------------------------------------------------


def sample(policies: list[tuple], dtype, prompts, config: EvalConfig, max_new: int, eos: int, name: str) -> list[list]:
    """Completions of all prompts by each of some experts, (model, unembedding), that share a trunk and decode together:
    each expert's, on the same uniforms."""
    N, K = len(prompts), len(policies)
    model = copy.deepcopy(policies[0][0]).to(dtype)                         # whole: a cast a token would cost more
    heads = [head.to(model.unembedding) for _, head in policies]
    ids = generate(model, prompts * K, max_new, eos, config.temperature, config.seed, config.batch * K, heads,
                   list(range(N)) * K, Progress(name), [k for k in range(K) for _ in range(N)])
    return [ids[k * N : (k + 1) * N] for k in range(K)]


def log_ratios(experts, frozen: bool, reference, texts: list[list], of: list[list[int]], spare: list, name: str,
               temperature: float) -> torch.Tensor:
    """log pi_j - log pi_ref of every expert's completions (K,N), under all experts: (K,N,K) nats. pi_j is the policy
    that was sampled: at that temperature, token by token; at 0 it is sure of its own completion. The reference is at
    temperature 1. frozen: the experts' trunk is the reference's. Two experts' completions of a prompt go through the
    model behind one prompt; an odd one out beside `spare`."""
    policy, base, K = [], [], len(texts)
    for k in range(0, K, 2):
        two = [*texts[k : k + 2], spare][:2]
        pairs = [Pair(prompt, *both) for prompt, *both in zip(of, *two)]
        ref = compute_reference(reference, pairs, experts.dtype)
        base.append(ref.logp.permute(2, 0, 1))                              # (2,N,1)
        if temperature:
            pairs = ref.with_states(pairs) if frozen else pairs
            policy.append(expert_logp(experts, pairs, f"{name} KL {k}", temperature=temperature).permute(2, 0, 1))
    if temperature:
        logp = torch.cat(policy)[:K]                                        # (K,N,K)
    else:
        alike = [[[mine[n] == other[n] for other in texts] for n in range(len(of))] for mine in texts]
        logp = torch.tensor(alike).float().log()                            # (K,N,K) log 1 or log 0
    return logp - torch.cat(base)[:K]


def policy_rows(runs: list[Run], reference, prompts: list[Pair], config: EvalConfig, max_new: int, eos: int) -> dict:
    """Completions of every row of the table: name -> {"ids": of each prompt, "kl": (N,) log pi - log pi_ref of each in
    nats, pi as sampled (log_ratios), "z": the expert of each, or None, "w": of a mixture, (N,K)}. Where experts have
    references of their own, the first is the row's and KL's."""
    dtype, of = runs[0].experts.dtype, [p.prompt for p in prompts]
    states = prompt_features(reference, of, dtype)                          # (N,2,C)
    plain, = sample([(reference, reference.unembedding)], dtype, of, config, max_new, eos, "reference")
    kl = torch.zeros(len(prompts)) if config.temperature == 1 else log_ratios(
        Heads(reference, 1, dtype=dtype), True, reference, [plain], of, plain, "reference", config.temperature)[0, :, 0]
    rows = {"reference": {"ids": plain, "kl": kl, "z": None}}
    for run in runs:
        K, ids = run.config.experts, []
        for experts in [range(K)] if run.config.sharing == "heads" else [[k] for k in range(K)]:
            policies, name = [run.experts.policy(k) for k in experts], "+".join(map(str, experts))
            ids += sample(policies, dtype, of, config, max_new, eos, f"{run.name} expert {name}")
        kl = log_ratios(run.experts, not run.config.train_trunk, reference, ids, of, plain, run.name,
                        config.temperature)                                 # (K,N,K)
        log_w, n = weights(run, prompts, states), torch.arange(len(prompts))
        for mode in ("mixture", "sparse", *range(K)) if K > 1 else (0,):
            z = choose_expert(log_w, len(prompts), str(mode), config.seed)                          # (N,)  M13
            drawn = kl[z, n]                                                # (N,K)
            log_ratio = mixture_logp(log_w, drawn) if mode == "mixture" else drawn[n, z]            # M14
            name = run.name if K == 1 else f"{run.name} {mode if mode in ('mixture', 'sparse') else f'head {mode}'}"
            rows[name] = {"ids": [ids[k][i] for i, k in enumerate(z.tolist())], "kl": log_ratio, "z": z.tolist()}
            rows[name] |= {"w": log_w.exp()} if mode == "mixture" else {}
    return rows


def plain_text(prompt: list[int], completion: list[int], tokenizer, end: int) -> str:
    """Both as one text, without the start token and the one that ends a completion."""
    return tokenizer.decode([t for t in prompt if t != tokenizer.bos] + [t for t in completion if t != end])


def reward_table(rows: dict, texts: dict, dataset: dict, folder: Path) -> dict:
    """Rewards, KL and length of every row. "trained" is the mean of the rewards that the annotators of
    the training pairs follow, "gain" the same less the reference's on the same prompts."""
    from data.annotators.rewards import score  # here: only this needs its packages

    unique = sorted({text for column in texts.values() for text in column})
    scores = dict(zip(unique, zip(*score(unique, dataset["rewards"], folder).values())))
    table, base = {}, None
    for name, row in rows.items():
        values = torch.tensor([scores[text] for text in texts[name]], dtype=torch.float64)          # (N,R)
        trained = values[:, [dataset["rewards"].index(a) for a in dataset["annotators"]]].mean(1)   # (N,)
        base = trained if base is None else base
        table[name] = {reward: mean_se(values[:, r]) for r, reward in enumerate(dataset["rewards"])}
        table[name] |= {"trained": mean_se(trained), "gain": mean_se(trained - base), "kl": mean_se(row["kl"])}
        table[name] |= {"length": mean_se(torch.tensor([len(y) for y in row["ids"]]))}
        table[name] |= {"values": values.tolist()}                          # by prompt: rows are compared in pairs
        table[name] |= {"w": row["w"].tolist()} if "w" in row else {}
    return table


# --- the whole --------------------------------------------------------------------------------------------------------


def read_prompts(path: Path, tokenizer, max_prompt: int, limit: int) -> tuple[list[Pair], int]:
    """The first `limit` prompts (0: all), as pairs without responses; and the token that ends a completion."""
    prompts, kinds = [], set()
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        try:
            prompt = (row := json.loads(line))["prompt"]
            check_messages("prompt", prompt) if isinstance(prompt, list) else check_string("prompt", prompt)
            prompts.append(Pair(encode_prompt(prompt, tokenizer, max_prompt)[0], [], [], domain=row.get("domain")))
        except (ValueError, KeyError, TypeError) as error:                  # no JSON, no prompt, no token for a letter
            got = f"{line[:80]!r} ({error})"
            raise InputError(f'wanted {{"prompt": text or messages}}, got {got}', file=path, line=number) from None
        kinds.add(type(prompt))
    if not prompts:
        raise InputError("no prompt in it; wanted a line a prompt, or no such file", file=path)
    if len(kinds) > 1:
        raise InputError("some prompts are texts and some conversations, which end differently; wanted one kind",
                         file=path)
    return prompts[: limit or None], template_of(tokenizer).end if kinds == {list} else tokenizer.eos


def check_room(prompts: list[Pair], max_new: int, context: int) -> int:
    """max_new. Raises: InputError if so many tokens behind the longest prompt exceed the models' context."""
    longest = max(len(p.prompt) for p in prompts)
    if longest + max_new > context:
        raise InputError(f"{max_new} new tokens behind the longest prompt, of {longest}, exceed the model's context of "
                         f"{context}; wanted at most {context - longest}", option="max_new")
    return max_new


def prompt_labels(path: Path, limit: int) -> list[dict]:
    """What the file says of each prompt besides its text."""
    rows = [json.loads(line) for line in lines(path) if line.strip()][: limit or None]
    return [{name: row[name] for name in ("domain", "set") if name in row} for row in rows]


def files_of(config: EvalConfig, home: Path) -> tuple[Path, Path, dict]:
    """The files of held-out preferences and of prompts, which may be missing, and what dataset.json says, or {}.
    Raises: InputError if a file that an option names is missing, or if there is nothing to evaluate on."""
    heldout, prompts = Path(config.heldout or home / "heldout.jsonl"), Path(config.prompts or home / "prompts.jsonl")
    facts = home / "dataset.json"                                           # which names the rewards, if there are any
    for option, path in (("heldout", heldout), ("adapt", Path(config.adapt)), ("prompts", prompts), ("prompts", facts)):
        if getattr(config, option) and not path.exists():
            raise InputError("no such file; --heldout and --adapt want preferences, --prompts wants prompts and, in "
                             "the folder of the runs, the dataset.json that names their reward functions", file=path,
                             option=option)
    dataset = json.loads(facts.read_text()) if facts.exists() else {}
    if not heldout.exists() and not config.adapt and not (prompts.exists() and dataset):
        raise InputError("nothing to evaluate on; wanted heldout.jsonl there, or --heldout FILE", file=home)
    return heldout, prompts, dataset


def load_runs(folder: Path, device: str, data_folder: str) -> list[Run]:
    """The finished runs to evaluate. Raises: InputError if they cannot be evaluated together."""
    runs = [load_run(path, device, data_folder) for path in find_runs(folder)]
    for run in runs:
        if any(getattr(run.config, name) != getattr(runs[0].config, name)
               for name in ("model", "max_prompt", "max_response", "dtype")):
            raise InputError(f"its model, lengths or dtype differ from {runs[0].path}'s; evaluate such runs one at a "
                             "time", file=run.path)
    return runs


def complete(config: EvalConfig, folder: Path, home: Path, runs: list[Run], reference, tokenizer, asked: list[Pair],
             end: int, max_new: int, dataset: dict) -> dict:
    """Completes the prompts, writes samples.jsonl (and what a gate saw of the prompts) into `folder`; returns the
    table of rewards, {} where dataset.json names none."""
    ids, table = [p.prompt for p in asked], {}
    rows = policy_rows(runs, reference, asked, config, max_new, end)
    texts = {name: [plain_text(p, y, tokenizer, end) for p, y in zip(ids, row["ids"])] for name, row in rows.items()}
    if "rewards" in dataset:
        table = reward_table(rows, texts, dataset, home)
    if any(run.config.gate in READS_PROMPT for run in runs):                # what they look at, for pictures
        states = prompt_features(reference, ids, runs[0].experts.dtype)
        save_file({"states": states}, folder / "prompt-states.safetensors")
    samples = [{"prompt": plain_text(prompt, [], tokenizer, end), "texts": {name: of[n] for name, of in texts.items()}}
               for n, prompt in enumerate(ids)]
    write_whole(folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    return table


def evaluate(config: EvalConfig) -> dict:
    """Evaluates and writes results.json, samples.jsonl and the report; returns the results. What an evaluation before
    wrote is replaced when its successor is there. Raises: InputError, before anything is computed."""
    validate(config)
    folder, device = Path(config.dir).resolve(), "cuda" if torch.cuda.is_available() else "cpu"
    home = folder.parent if (folder / "checkpoint").exists() else folder    # where the data of a single run lie
    runs = load_runs(folder, device, config.data_folder)
    first, cache = runs[0].config, home / "cache"
    references, tokenizer = load_references(first, device)
    heldout, prompts, dataset = files_of(config, home)
    completed = prompts.exists() and bool(dataset)
    if completed:
        asked, end = read_prompts(prompts, tokenizer, first.max_prompt, config.limit)
        max_new = check_room(asked, config.max_new or dataset.get("max_new") or first.max_response,
                             min(model.config.context for model in references))
    facts = environment() | {"dtype": str(runs[0].experts.dtype).removeprefix("torch.")}
    results = {"environment": facts, "config": dataclasses.asdict(config)}
    results |= {"preferences": {}, "adapt": {}, "policies": {}, "asked": []}
    if heldout.exists():
        results["preferences"] = {run.name: preference_figures(run, *found) for run, *found in
                                  margins_of(runs, references, tokenizer, heldout, cache)}
    for path in [Path(config.adapt)] if config.adapt else sorted(home.glob("adapt-*.jsonl"), key=lambda p: p.stem):
        with configs.lines_of(path):
            results["adapt"][path.stem] = {run.name: adapted(*found, config.seed) for run, *found in
                                           margins_of(runs, references, tokenizer, path, cache)}
    if completed:
        results["policies"] = complete(config, folder, home, runs, references[0], tokenizer, asked, end, max_new,
                                       dataset)
        results["asked"] = prompt_labels(prompts, config.limit)
    write_whole(folder / "results.json", to_json(results) + "\n")
    print_tables(results)
    print_curves(results["adapt"])
    write_report(folder)
    return results


def export(config: EvalConfig) -> list[Path]:
    """Writes the experts of the run config.dir into config.export; returns their directories."""
    path = Path(config.dir).resolve()
    refuse_idle(config, "--export evaluates nothing", ("dir", "export", "data_folder"))
    if not (path / "checkpoint").exists():
        raise InputError("is no run; --export takes one run, a directory that train.py wrote", file=path)
    run = load_run(path, "cpu", config.data_folder)
    places = export_experts(run.experts, config.export, run.config.models, config.data_folder or None)
    for k, place in enumerate(places):
        print(f"{place}" + (f": mixture weight {run.gate.log_w[k].exp():.4f}" if run.config.gate == "fixed" else ""))
    return places


def compare(config: EvalConfig) -> dict:
    """Win rates of the policies in samples.jsonl by config.judge; prints and returns them."""
    validate(config)
    refuse_idle(config, "--judge compares what was completed before", ("dir", "judge", "against", "seed"))
    from data.annotators.judges import win_rates  # here: only this needs its packages

    found = win_rates(Path(config.dir).resolve(), config.judge, config.against, config.seed)
    for column, policies in found["columns"].items():
        print(f"\n{column}: win rate against {found['against']} on {found['prompts']} prompts, 95 % interval")
        for name, f in policies.items():
            print(f"{name:<24}{f['rate']:.3f} ({f['low']:.3f} to {f['high']:.3f}), {f['wins']} wins, {f['ties']} ties"
                  + (f", {f['unjudged']} not judged" if f["unjudged"] else ""))
    write_report(Path(config.dir).resolve())
    return found


def refuse_idle(config: EvalConfig, why: str, used: tuple) -> None:
    """Raises: InputError naming an option that is set and has no effect here."""
    idle = [f.name for f in dataclasses.fields(config) if f.name not in used and getattr(config, f.name) != f.default]
    if idle:
        raise InputError(f"{why}; leave this option out", option=idle[0])


def print_tables(results: dict) -> None:
    """The figures as plain text."""
    rewards = [name for name in next(iter(results["policies"].values()), {}) if name not in ("values", "w")]
    if rewards:
        print(f"\n{'policy':<24}" + "".join(f"{name:>18}" for name in rewards))
        for name, row in results["policies"].items():
            print(f"{name:<24}" + "".join(f"{row[r]['mean']:>10.3f} ±{row[r]['se']:6.3f}" for r in rewards))
    for name, figures in results["preferences"].items():
        for what, key in (("log-likelihood", "log_likelihood"), ("accuracy of the mixture", "accuracy_mbt")):
            own = figures[{"log_likelihood": "log_likelihood_own", "accuracy_mbt": "accuracy_own"}[key]]
            print(f"{name}: {what} {figures[key]['mean']:.4f} ±{figures[key]['se']:.4f}, "
                  f"with each user's weights {own['mean']:.4f} ±{own['se']:.4f}")
        print(f"  effective experts {figures['effective_experts']:.2f}")
        by_type = {kind: of["accuracy"]["mean"] for kind, of in figures["types"].items()}
        worst = min(by_type, key=by_type.get)
        print(f"  worst type {worst}: accuracy with each user's weights {by_type[worst]:.4f}")
        for kind, column in figures["accuracy"].items():
            heads = "  ".join(f"head {k} {a['mean']:.3f} ±{a['se']:.3f}" for k, a in enumerate(column))
            print(f"  pairs judged by {kind:<18}{heads}")
        for where in ("alignment_train", "alignment_heldout"):
            shown = ", ".join(f"{key} {value:.3f}" for key, value in figures[where].items() if isinstance(value, float))
            if shown:
                print(f"  {where.replace('_', ' on ')}: {shown}")


def print_curves(found: dict) -> None:
    """Accuracy of new users' answers by the pairs shown."""
    for name, runs in found.items():
        shown = max(([point["shown"] for point in curve] for curve in runs.values()), key=len)
        print(f"\n{name + ', pairs shown':<24}" + "".join(f"{n:>16}" for n in shown))
        for run, curve in runs.items():
            print(f"{run:<24}" + "".join(f"{p['accuracy']['mean']:>8.3f} ±{p['accuracy']['se']:6.3f}" for p in curve))


def write_report(folder: Path) -> None:
    """report.md with its pictures, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed (the `plots` extra)")
        return
    from data.report.page import report

    print(f"report: {report(folder)}")


def main(argv: list[str]) -> None:
    steady()
    flags = argv if argv and argv[0].startswith("-") else ["--dir", *argv]
    config = configs.parse(EvalConfig, flags, "python eval.py DIR")
    if config.judge or config.against:
        compare(config)
    elif config.export:
        export(config)
    else:
        evaluate(config)


if __name__ == "__main__":
    configs.command(main)
