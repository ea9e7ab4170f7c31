"""Writes a run for other servers: `python eval.py RUN --export OUT --format vllm | gguf | gguf-q8_0`.

    vllm        OUT/base        the reference, a Hugging Face directory
                OUT/expert-k    a PEFT adapter on it. Heads, whole models and GPT-2: a merged model, see `why_merged`
    gguf        OUT/expert-k.gguf   a merged expert in F16 (gguf-q8_0: in Q8_0) with its tokenizer, for llama.cpp
    all         OUT/router.json, OUT/router.safetensors   how to draw an expert (router.py)
                OUT/README.md   the commands that serve it

The format hf is export.py's. docs/serving.md has a client that draws the expert of each request.
"""

import shutil
from pathlib import Path

from mixdpo.config import InputError, check_choices, write_text
from mixdpo.evaluation.export import copy_tokenizer, export_run, must_be_empty, run_to_export
from mixdpo.evaluation.inputs import refuse_unused
from mixdpo.evaluation.peft import full_rank, save_adapter
from mixdpo.evaluation.router import write_router
from mixdpo.experts import Adapters, Heads, Models
from mixdpo.models.gguf_llama import architecture_of, gguf_of
from mixdpo.models.gguf_write import write_gguf
from mixdpo.models.gpt2 import GPT2
from mixdpo.models.weights import load_model, locate, save_model, weight_files
from mixdpo.runs.load_run import Run
from mixdpo.text.gguf_tokenizer import to_metadata
from mixdpo.text.tokenizer import load_tokenizer

FORMATS = ("hf", "vllm", "gguf", "gguf-q8_0")
RANKS = (8, 16, 32, 64, 128, 256, 512)      # that every version of vLLM takes as --max-lora-rank; its default is 16
PORTS = {"vllm": 8000, "gguf": 8080}        # of the first server; these are the servers' own defaults

HEADS = ("Heads cannot be adapters: an adapter changes projections inside the model, and a head is another "
         "unembedding, which vLLM's LoRA does not replace. So each expert is a whole model with a server of its own. "
         "`python -m mixdpo.serving RUN` serves all heads of one trunk in one process.")
MODELS = "Each expert is a whole model, so each has a server of its own. `python -m mixdpo.serving RUN` serves all."
GPT2S = "vLLM has no LoRA for GPT-2, so each expert is a merged model with a server of its own."


def export(config) -> list[Path]:
    """Writes the experts of the run config.dir (an EvalConfig) to config.export as config.format; returns their
    places. Raises: InputError, before anything is written."""
    refuse_unused(config, "--export evaluates nothing", ("dir", "export", "format", "data_folder"))
    check_choices(config, {"format": FORMATS})
    path, out, data = Path(config.dir).resolve(), Path(config.export), config.data_folder
    if config.format == "hf":
        return export_run(path, config.export, data)
    run = run_to_export(path, data)
    must_be_empty(out)
    if config.format == "vllm":
        places = export_vllm(run, out, data or None)
    else:
        places = export_gguf(run, out, "Q8_0" if config.format == "gguf-q8_0" else "F16", data or None)
    print(f"{out}: {run.config.experts} experts and their router; {out / 'README.md'} has the commands")
    return places


# --- vLLM -------------------------------------------------------------------------------------------------------------


def export_vllm(run: Run, out: Path, data) -> list[Path]:
    """Returns the experts' directories. Raises: InputError if adapters have a rank that vLLM does not take."""
    experts, models, K = run.experts, run.config.models, run.config.experts
    merged, rank = why_merged(run), full_rank(experts) if isinstance(experts, Adapters) else 0
    if not merged and rank > RANKS[-1]:
        raise InputError(f"got vllm for adapters of rank {rank}, and vLLM takes at most {RANKS[-1]}; use gguf, or "
                         "serve the run with python -m mixdpo.serving", option="format")
    write_base(models[0], data, out / "base")
    places = [out / f"expert-{k}" for k in range(K)]
    for k, place in enumerate(places):
        if isinstance(experts, Adapters) and not merged:
            save_adapter(experts, k, place, str((out / "base").resolve()))
        else:
            save_model(experts.policy(k)[0], place, experts.policy(k)[1])
        copy_tokenizer(models[k % len(models)], data, place)
    ports = [PORTS["vllm"] + k * bool(merged) for k in range(K)]
    facts = write_router(run, out, ports, start_tokens(run, data))
    write_text(out / "README.md", readme(run, facts, "vLLM", *(
        merged_commands(facts, merged) if merged else adapter_commands(facts, rank))))
    return places


def why_merged(run: Run) -> str:
    """Why the experts cannot be adapters in vLLM; "" if they can."""
    if isinstance(run.experts, Adapters):
        return GPT2S if isinstance(run.experts.trunk, GPT2) else ""
    model = isinstance(run.experts, Heads) and run.config.experts == 1 and not run.experts.rank        # DPO
    return MODELS if model or isinstance(run.experts, Models) else HEADS


def write_base(model: str, data, place: Path) -> None:
    """The run's model as a Hugging Face directory: a copy, or what save_model makes of a name or a GGUF file."""
    source = locate(model, data)
    if source.is_dir():
        place.mkdir(parents=True)
        for file in [source / "config.json", *weight_files(source), *source.glob("model.safetensors.index.json")]:
            shutil.copyfile(file, place / file.name)
    else:
        save_model(load_model(model, data=data), place)
    copy_tokenizer(model, data, place)


def adapter_commands(facts: dict, rank: int) -> tuple[list[str], list[str]]:
    """The commands, and what is to be known of them: one server for all experts."""
    names, most = facts["experts"], next(r for r in RANKS if r >= rank)
    why = "more than vLLM's default of 16, so --max-lora-rank must be given" if rank > 16 else "within vLLM's default"
    serve = (f"vllm serve base --served-model-name reference --generation-config vllm --enable-lora \\\n"
             f"        --max-loras {len(names)} --max-lora-rank {most} \\\n"
             f"        --lora-modules {' '.join(f'{name}={name}' for name in names)}")
    return [serve, request(facts, PORTS["vllm"])], [
        f"The adapters have rank {rank}: {why}. It takes {', '.join(map(str, RANKS))}; unused ranks cost memory.",
        "The base model answers as `reference`. --max-loras lets requests of all experts share a batch.", DEFAULTS]


def merged_commands(facts: dict, why: str) -> tuple[list[str], list[str]]:
    """The same for one server per expert."""
    serve = [f"vllm serve {name} --served-model-name {name} --generation-config vllm --port {port}"
             for name, port in zip(facts["experts"], facts["ports"])]
    return [*serve, request(facts, PORTS["vllm"])], [why, DEFAULTS]


DEFAULTS = ("--generation-config vllm: a request that names no temperature samples at 1. Without it vLLM takes the "
            "temperature and top_p of the model's generation_config.json, and samples from another policy.")


# --- GGUF -------------------------------------------------------------------------------------------------------------


def export_gguf(run: Run, out: Path, kind: str, data) -> list[Path]:
    """Returns the experts' files. kind: "F16" or "Q8_0". Raises: InputError if llama.cpp has no such model or
    tokenizer, or if a weight is too large for F16."""
    experts, models, K = run.experts, run.config.models, run.config.experts
    first = experts.policy(0)[0]
    architecture_of(first)
    tokens = to_metadata(load_tokenizer(models[0], data), first.config.vocab)
    out.mkdir(parents=True, exist_ok=True)
    places = [out / f"expert-{k}.gguf" for k in range(K)]
    for k, place in enumerate(places):
        metadata, tensors = gguf_of(*experts.policy(k))
        general = {"general.name": f"{run.name} expert-{k}", "general.file_type": {"F16": 1, "Q8_0": 7}[kind],
                   "general.quantization_version": 2}
        write_gguf(place, metadata | general | tokens, tensors, kind)
    facts = write_router(run, out, [PORTS["gguf"] + k for k in range(K)], start_tokens(run, data))
    serve = [f"llama-server -m {place.name} --alias {place.stem} --port {port}"
             for place, port in zip(places, facts["ports"])]
    cuts = ("A request must set temperature 1, top_k 0, top_p 1 and min_p 0 as here: llama.cpp's own defaults sample "
            "from another policy.")
    base = ["The gate reads states of the base model: --format vllm writes it as OUT/base."] * bool(facts["features"])
    write_text(out / "README.md", readme(run, facts, "llama.cpp", [
        *serve, request(facts, PORTS["gguf"], ', "top_k": 0, "top_p": 1, "min_p": 0')], [cuts, *base]))
    return places


# --- README.md -------------------------------------------------------------------------------------------------------


def readme(run: Run, facts: dict, server: str, commands: list[str], notes: list[str]) -> str:
    """OUT/README.md: the commands, to be run in OUT, and what is to be known of them."""
    K = len(facts["experts"])
    given = {"fixed": "nothing", "domain": "the prompt's domain", "user": "the user"}.get(
        facts["gate"], f"the {facts['features']} state of the prompt under the base model"
        + " and the user" * (facts["gate"] == "prompt-user"))
    fixed = f": {', '.join(f'{w:.4f}' for w in run.gate.log_w.exp().tolist())}" if facts["gate"] == "fixed" else ""
    notes = [*notes, f"Gate `{facts['gate']}`: the weights depend on {given}{fixed}.",
             f"{len(facts['users'])} users of the training data have a posterior of their own. router.json has their "
             "names: do not publish it with them." if facts["users"] else "No user has a posterior of their own.",
             "A client that draws the expert and names it: docs/serving.md of mixdpo."]
    return (f"# {run.name}: {K} expert{'s' * (K > 1)} for {server}\n\n"
            "One expert answers a request: draw k from the weights w(x), name expert k as the model, decode with it.\n"
            "In this folder:\n\n" + "".join(f"    {command}\n" for command in commands) + "\n"
            + "".join(f"- {note}\n" for note in notes))


def request(facts: dict, port: int, more: str = "") -> str:
    """A request to expert 0."""
    return (f"""curl http://localhost:{port}/v1/completions -H 'Content-Type: application/json' \\\n"""
            f"""        -d '{{"model": "{facts['experts'][0]}", "prompt": "The film", "max_tokens": 32, """
            f""""temperature": 1{more}}}'""")


def start_tokens(run: Run, data) -> int:
    """How many tokens begin every prompt: 1 if the tokenizer has a start token, else 0."""
    return int(load_tokenizer(run.config.models[0], data).bos is not None)
