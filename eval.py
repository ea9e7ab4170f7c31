"""Evaluation: `python eval.py DIR`, where DIR is a finished run or a folder of finished runs.

    held-out preferences    heldout.jsonl: accuracy and log-likelihood (M5) of choices that no run was trained on
    new users               adapt-*.jsonl: the same, when a few pairs of an unknown user are known
    completions             prompts.jsonl: rewards and KL of every policy, and own reward: what each user gets

These files are looked for in the folder of the runs. results.json, samples.jsonl and, if matplotlib is installed,
report.md with its pictures are written into DIR. No run is changed.

    torchrun --standalone --nproc-per-node N eval.py DIR        the same, divided among N processes
    python eval.py RUN --export OUT     only writes the run's experts to OUT/expert-k; for other servers: --format vllm
    python eval.py DIR --judge JUDGE    only compares the completions of an earlier evaluation
"""

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mixdpo import config as configs
from mixdpo.config import to_json, write_text
from mixdpo.evaluation.adaptation import adaptation_curve, posteriors_after
from mixdpo.evaluation.completions import (
    CompletionTask,
    all_scores,
    plain_texts,
    policy_rows,
    reward_table,
    write_prompt_states,
    write_samples,
)
from mixdpo.evaluation.export_servers import export
from mixdpo.evaluation.generate import Sampling, rows_at_once
from mixdpo.evaluation.heldout import margins_of, preference_figures
from mixdpo.evaluation.inputs import EvalInputs, check_options, read_inputs, refuse_unused
from mixdpo.evaluation.served import own_reward_rows
from mixdpo.evaluation.tables import all_tables, conclusions, win_rate_tables
from mixdpo.fast.memory import tune_process
from mixdpo.files.atomic import read_json_or_empty
from mixdpo.files.sources import short_name
from mixdpo.runs.distributed import joined, rank
from mixdpo.runs.log import environment
from mixdpo.runs.parallel import from_first


@dataclass(frozen=True)
class EvalConfig:
    """Evaluates a run directory, or every finished run in a directory."""

    dir: str                        # a finished run, or a folder of finished runs
    heldout: str = ""               # held-out preferences; default: heldout.jsonl in the folder of the runs
    adapt: str = ""                 # preferences of new users; default: adapt-*.jsonl in the folder of the runs
    columns: str = ""               # --columns of train.py for these two; default: as in the runs; none: by their names
    prompts: str = ""               # file of prompts, {"prompt": ...} a line; default: prompts.jsonl in that folder
    limit: int = 0                  # number of prompts to use, the first ones of the file; 0: all
    max_new: int = 0                # tokens of a completion; 0: as in dataset.json, else the runs' max_response
    temperature: float = 1.0        # of sampling; 0: greedy. KL is from the policy at this temperature to the
                                    # reference at temperature 1
    batch: int = 0                  # completions sampled together; 0: as many as fit into 1 GiB of keys and values,
                                    # on a GPU into 4 GiB
    seed: int = 1                   # of sampling; the same for every policy
    kl: tuple[float, ...] = ()      # also evaluate policies between the reference and each run, with about these KL
                                    # in nats, as in 1,2,4, and that of the baseline: own reward by KL. Empty: none
    examples: int = 4               # of a user's choices in front of the prompt: the baseline without training; 0: none
    data_folder: str = ""           # folder of local files that is searched before anything is downloaded
    judge: str = ""                 # only compare the completions of an earlier evaluation, by annotator:NAME,
                                    # classifier:PATH or llm:MODEL (data/annotators/judges.py)
    against: str = ""               # with --judge: the policy that all others are compared with; default: dpo
    export: str = ""                # only write the run's experts, as models or adapters, to this folder
    format: str = "hf"              # with --export: hf (Hugging Face models, PEFT adapters), vllm (the same with the
                                    # base model and the router), gguf (F16, for llama.cpp) or gguf-q8_0


def evaluate(config: EvalConfig) -> dict:
    """Evaluates, writes results.json, samples.jsonl and the report, and returns the results. Files of an earlier
    evaluation are replaced once their successors exist.
    Raises: InputError, before anything is computed."""
    check_options(config)
    inputs = read_inputs(config)
    dtype = str(inputs.runs[0].experts.dtype).removeprefix("torch.")
    known: dict[str, dict] = {}                                             # run -> posteriors of new users
    results = {
        "environment": environment() | {"dtype": dtype},
        "config": dataclasses.asdict(config),
        "preferences": heldout_preferences(inputs),
        "adapt": new_users(inputs, config.seed, known),
        **dict(zip(("policies", "own_reward"), completions(inputs, config, known))),
        "trained_rewards": inputs.dataset.get("annotators", []),
        "asked": inputs.prompts.labels if inputs.prompts else [],
    }
    if rank() == 0:
        write_results(inputs.folder, results)
    return results


def write_results(folder: Path, results: dict) -> None:
    """Writes results.json and the report, and prints the tables."""
    lost = [what for what in ("preferences", "adapt", "policies")
            if read_json_or_empty(folder / "results.json").get(what) and not results[what]]
    if lost:
        print(f"warning: this replaces the earlier evaluation in {folder}, which had {', '.join(lost)} too; to "
              "have all of them, give --heldout, --adapt and --prompts together")
    write_text(folder / "results.json", to_json(results) + "\n")
    print(all_tables(results))
    write_report(folder)
    print(conclusions(results))


def heldout_preferences(inputs: EvalInputs) -> dict:
    """Run -> its figures on the held-out preferences; {} if there are none."""
    if inputs.heldout is None:
        return {}
    return {run.name: preference_figures(run, *found) for run, *found in margins(inputs, inputs.heldout)}


def margins(inputs: EvalInputs, path: str):
    """heldout.margins_of a file of preferences."""
    return margins_of(inputs.runs, inputs.references, inputs.tokenizer, path, inputs.home / "cache", inputs.columns)


def new_users(inputs: EvalInputs, seed: int, known: dict) -> dict:
    """File of new users -> run -> accuracy by the number of known pairs. Fills known: run -> their posteriors, of the
    last file."""
    curves = {}
    for path in inputs.adapt:
        with configs.lines_of(path):
            found, name = list(margins(inputs, path)), short_name(path)
            curves[name] = {run.name: adaptation_curve(pairs, h, log_w, seed) for run, pairs, h, log_w in found}
            known |= {run.name: posteriors_after(pairs, h, log_w, seed) for run, pairs, h, log_w in found}
    return curves


def completions(inputs: EvalInputs, config: EvalConfig, known: dict) -> tuple[dict, list[dict]]:
    """Policy -> its rewards, KL and length; and the rows of own reward (served.py). Nothing if dataset.json names no
    rewards. Writes samples.jsonl. known: posteriors of new users."""
    if inputs.prompts is None:
        return {}, []
    tokenizer, dataset = inputs.tokenizer, inputs.dataset
    reference, prompts, max_new = inputs.references[0], inputs.prompts.pairs, inputs.prompts.max_new
    at_once = config.batch or rows_at_once(reference, max(len(p.prompt) for p in prompts) + max_new)
    sampling = Sampling(max_new, inputs.prompts.end, config.temperature, config.seed, at_once)
    task = CompletionTask(reference, prompts, sampling)
    done: dict[str, tuple] = {}
    rows = policy_rows(inputs.runs, task, done)
    texts = {name: plain_texts(task, row["ids"], tokenizer) for name, row in rows.items()}
    rewards, served = {}, []
    if "rewards" in dataset:
        from data.annotators.rewards import score  # here, because only this needs its packages

        scores = all_scores(lambda *texts: from_first(lambda: score(*texts)), dataset, inputs.home)
        rewards = reward_table(rows, texts, dataset, scores)
        served = own_reward_rows(inputs, task, done, config, known, scores)
    if rank() == 0:
        write_prompt_states(inputs.folder, inputs.runs, task)
        write_samples(inputs.folder, plain_texts(task, [[]] * len(task.prompts), tokenizer), texts)
    return rewards, served


def write_report(folder: Path) -> None:
    """Writes report.md and its pictures, if the packages for them are installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return print("\nwarning: no report is written: matplotlib is not installed; pip install -e .[plots]")
    from data.report.page import report

    print(f"\nReport: {report(folder)}")


def compare(config: EvalConfig) -> dict:
    """Win rates of the policies in samples.jsonl by config.judge; prints and returns them."""
    check_options(config)
    refuse_unused(config, "--judge compares the completions of an earlier evaluation",
                  ("dir", "judge", "against", "seed"))
    from data.annotators.judges import win_rates  # here, because only this needs its packages

    folder = Path(config.dir).resolve()
    found = win_rates(folder, config.judge, config.against, config.seed)
    write_report(folder)
    print(win_rate_tables(found))
    return found


def main(argv: list[str]) -> None:
    """The command: DIR may stand first, without --dir."""
    tune_process()
    flags = argv if argv and argv[0].startswith("-") else ["--dir", *argv]
    config = configs.parse(EvalConfig, flags, "python eval.py DIR")
    with joined():
        if not (config.judge or config.against or config.export):
            evaluate(config)
        elif rank() == 0:                                                   # these divide no work
            compare(config) if config.judge or config.against else export(config)


if __name__ == "__main__":
    configs.command(main)
