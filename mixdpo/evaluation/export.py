"""A run's experts as files that other programs open.

    heads, models   OUT/expert-k    a Hugging Face model directory, parameters in float32
    lora            OUT/expert-k    a PEFT adapter on the run's own model directory; where the run's model is none (a
                                    name, a GGUF file), on OUT/base, which is then written first

Tokenizer files go with each: those of the model's directory, or else what load_tokenizer made. The mixture's weights
are no part of an expert: they stand in the run's checkpoint, and eval.py prints them.
"""

import shutil
from pathlib import Path

from mixdpo.config import InputError
from mixdpo.evaluation.peft import save_adapter
from mixdpo.experts import Adapters, Heads, Models
from mixdpo.models.weights import load_model, locate, save_model
from mixdpo.text.tokenizer import load_tokenizer

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "chat_template.jinja", "generation_config.json")


def export_experts(experts: Heads | Adapters | Models, out, models: list[str], data=None) -> list[Path]:
    """Writes all K experts; returns their directories. models, data: what the run's model was loaded by
    (load_model), or each expert's.
    Raises: InputError if there is something in `out`: files of two exports would be taken for one."""
    out, model = Path(out), models[0]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("is not an empty folder; choose another one for the export", file=out)
    places = [out / f"expert-{k}" for k in range(experts.K)]
    sources = [locate(name, data) for name in models]
    if isinstance(experts, Adapters) and not sources[0].is_dir():
        save_model(load_model(model, data=data), out / "base")
        load_tokenizer(model, data).save(out / "base")
        sources = [out / "base"]
    for k, place in enumerate(places):
        source = sources[k % len(sources)]
        if isinstance(experts, Adapters):
            save_adapter(experts, k, place, str(source.resolve()))
        else:
            trunk, unembedding = experts.policy(k)
            save_model(trunk, place, unembedding)
        if source.is_dir():
            for file in (source / name for name in TOKENIZER):
                if file.is_file():
                    shutil.copyfile(file, place / file.name)
        else:
            load_tokenizer(models[k % len(models)], data).save(place)
    return places
