"""Writes a run's experts as files of Hugging Face's libraries (--format hf). Other formats: export_servers.py.

    heads, models   OUT/expert-k    a Hugging Face model directory, parameters in float32
    lora            OUT/expert-k    a PEFT adapter; its base is the directory of the run's model. If the model is a name
                                    or a GGUF file instead of a directory, the base is OUT/base, which is written first

Each gets the tokenizer files of the model's directory or, without one, those that load_tokenizer makes. The mixture
weights are not part of an expert: they are in the run's checkpoint, and eval.py prints them.
"""

import shutil
from pathlib import Path

from mixdpo.config import InputError
from mixdpo.evaluation.peft import save_adapter
from mixdpo.experts import Adapters, Heads, Models
from mixdpo.models.weights import load_model, locate, save_model
from mixdpo.runs.load_run import Run, load_run
from mixdpo.text.tokenizer import load_tokenizer

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "chat_template.jinja", "generation_config.json")


def export_run(path: Path, out: str, data_folder: str) -> list[Path]:
    """Writes the experts of the run in `path` to `out`, prints their directories and fixed weights, and returns the
    directories. Raises: InputError if it is not a run."""
    run = run_to_export(path, data_folder)
    places = export_experts(run.experts, out, run.config.models, data_folder or None)
    for k, place in enumerate(places):
        print(f"{place}" + (f": mixture weight {run.gate.log_w[k].exp():.4f}" if run.config.gate == "fixed" else ""))
    return places


def run_to_export(path: Path, data_folder: str) -> Run:
    """The finished run in `path`. Raises: InputError if it is not a run."""
    if not (path / "checkpoint").exists():
        raise InputError("is not a run; --export takes one run, a directory that train.py wrote", file=path)
    return load_run(path, "cpu", data_folder)


def must_be_empty(out: Path) -> None:
    """Raises: InputError if `out` is not empty, because files of two exports could be mixed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("is not an empty folder; choose a new or an empty folder for the export", file=out)


def export_experts(experts: Heads | Adapters | Models, out, models: list[str], data=None) -> list[Path]:
    """Writes all K experts; returns their directories. models: the name or directory of the run's model, or of each
    expert's; data: the folder of local files, as for load_model. Raises: InputError if `out` is not empty."""
    out = Path(out)
    must_be_empty(out)
    places = [out / f"expert-{k}" for k in range(experts.K)]
    sources = [locate(name, data) for name in models]
    if isinstance(experts, Adapters) and not sources[0].is_dir():
        save_model(load_model(models[0], data=data), out / "base")
        copy_tokenizer(models[0], data, out / "base")
        sources = [out / "base"]
    for k, place in enumerate(places):
        if isinstance(experts, Adapters):
            save_adapter(experts, k, place, str(sources[0].resolve()))
        else:
            trunk, unembedding = experts.policy(k)
            save_model(trunk, place, unembedding)
        copy_tokenizer(models[k % len(models)], data, place)
    return places


def copy_tokenizer(model: str, data, place: Path) -> None:
    """Copies the tokenizer files of a model's directory to `place`. A model that is no directory: those that
    load_tokenizer makes."""
    source = locate(model, data)
    if not source.is_dir():
        return load_tokenizer(model, data).save(place)
    for file in (source / name for name in TOKENIZER):
        if file.is_file():
            shutil.copyfile(file, place / file.name)
