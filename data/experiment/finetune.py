"""Supervised fine-tuning on plain texts, since DPO assumes a reference that knows the domain.

`python -m data.experiment.finetune --data reviews.jsonl --model smollm2 --out DIR` writes the model and tokenizer to
DIR in Hugging Face's layout, and finetune.json with the perplexity on held-out blocks before and after. Texts are
joined, each followed by an end token, and cut into blocks. An interrupted run resumes at its last checkpoint.
"""

import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo import config as configs
from mixdpo.config import SEEDS, InputError, check_ranges, compute_dtype
from mixdpo.experts import Heads
from mixdpo.fast.backward import minimise
from mixdpo.fast.optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_rate
from mixdpo.files.atomic import must_be_own
from mixdpo.models.weights import content_key, load_model, save_model
from mixdpo.runs.checkpoint import Saver, Stop, load_checkpoint, load_state, trained_state
from mixdpo.runs.distributed import everyone, joined, rank, world
from mixdpo.runs.log import Progress
from mixdpo.runs.parallel import first_alone, sum_gradients
from mixdpo.text.records import data_key, lines
from mixdpo.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tunes a model on texts (JSON Lines with a field "text")."""

    data: str                       # file of texts, .jsonl or .jsonl.gz
    model: str                      # as train.py --model
    out: str                        # directory for the tuned model and tokenizer, Hugging Face layout
    steps: int = 100                # optimizer steps
    batch: int = 16                 # blocks for each step
    tokens: int = 128               # tokens in a block
    held: int = 64                  # held-out blocks at the end of the data, for the perplexity
    lr: float = 5e-5                # peak learning rate of AdamW; warm-up over a tenth of the steps
    dtype: str = "auto"             # dtype of matrix products: auto, float32 or bfloat16
    seed: int = 0                   # seed of the order of blocks
    save_minutes: float = 10.0      # minutes between checkpoints
    data_folder: str = ""           # folder of local files, used before anything is fetched


def validate(config: FinetuneConfig) -> None:
    """Raises: InputError on values out of range."""
    check_ranges(config, {"steps": "[1, inf)", "batch": "[1, inf)", "held": "[1, inf)", "tokens": "[2, inf)",
                          "lr": "(0, inf)", "seed": SEEDS, "save_minutes": "[0, inf]"})
    compute_dtype(config.dtype, "cpu")                                      # raises on an unknown dtype


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tunes and saves; returns the directory. A finished result of the same configuration and data is reused."""
    out, device = Path(config.out), "cuda" if torch.cuda.is_available() else "cpu"
    validate(config)
    report, begun = out / "finetune.json", out / "unfinished.json"
    mark = report if report.exists() else begun
    must_be_own(out, [("data", config.data), ("model", config.model)], mark.name, {"settings"})
    model = first_alone(lambda: load_model(config.model, device=device, data=config.data_folder or None))
    places = ("out", "data", "data_folder", "save_minutes")                 # options that do not change the result
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in places}
    settings |= {"data_key": data_key(config.data), "model_key": content_key(model)}    # contents as well as names
    if report.exists() and json.loads(report.read_text())["settings"] == settings:
        facts = json.loads(report.read_text())
        print(f"[finetune] finished before: perplexity {facts['perplexity_before']:.2f} before, "
              f"{facts['perplexity_after']:.2f} after")
        return out
    began, (dtype, why) = time.monotonic(), compute_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model, config.data_folder or None)
    blocks = read_blocks(config.data, tokenizer, config.tokens)             # (N,T)
    if len(blocks) < config.held + config.batch:
        raise InputError(f"{len(blocks)} blocks of {config.tokens} tokens; wanted at least "
                         f"{config.held + config.batch} (--held and one batch); get more texts or lower --tokens",
                         file=config.data)
    blocks, held = blocks[: -config.held], blocks[-config.held :]
    policy = Heads(model, 1, dtype=dtype)
    before, unfinished = perplexity(policy, held), out.with_name(f"{out.name}-unfinished")
    tune(policy, blocks, config, unfinished, settings | {"dtype": str(dtype)})              # what auto resolves to
    after = perplexity(policy, held)
    facts = {"perplexity_before": before, "perplexity_after": after, "settings": settings}
    if rank() == 0:
        write(out, policy.trunk, tokenizer, facts)
        shutil.rmtree(unfinished, ignore_errors=True)
    everyone(None)
    print(f"[finetune] {time.monotonic() - began:.0f} s: perplexity {before:.2f} before, {after:.2f} after; "
          f"{len(blocks)} blocks of {config.tokens} tokens, dtype {str(dtype).removeprefix('torch.')} ({why})")
    return out


def write(out: Path, model, tokenizer, facts: dict) -> None:
    """Writes the tuned model. finetune.json is written last: with it all files are complete."""
    report, begun = out / "finetune.json", out / "unfinished.json"
    out.mkdir(parents=True, exist_ok=True)
    configs.write_text(begun, configs.to_json({"settings": facts["settings"]}) + "\n")      # marks the folder as ours
    report.unlink(missing_ok=True)
    save_model(model, out)
    tokenizer.save(out)
    configs.write_text(report, configs.to_json(facts) + "\n")
    begun.unlink()


def tune(policy, blocks: torch.Tensor, config: FinetuneConfig, unfinished: Path, settings: dict) -> None:
    """Trains `policy` in place on blocks (N,T), in passes over all blocks. Resumes from the checkpoint in `unfinished`
    unless its settings differ."""
    optimizer, names = make_optimizer(policy, config.lr)
    generator, passes = torch.Generator().manual_seed(config.seed), -(-config.steps // (len(blocks) // config.batch))
    orders = [torch.randperm(len(blocks), generator=generator) for _ in range(passes)]
    plan = [ids for order in orders for ids in order.split(config.batch) if len(ids) == config.batch]
    t = 0
    if found := load_checkpoint(unfinished, {}):
        tensors, state = found
        if state["config"] == settings:
            load_state(policy, tensors, unfinished)
            load_optimizer_state(optimizer, names, tensors)
            t = state["step"]
            print(f"[finetune] resumed at step {t} of {config.steps}")
    progress = Progress("finetune", t)

    def snapshot() -> tuple[dict[str, torch.Tensor], dict]:
        return trained_state(policy) | optimizer_state(optimizer, names), {"config": settings}

    with Stop(config.out) as stop:
        saver = Saver(unfinished, stop, config.save_minutes)
        while t < config.steps:
            set_rate(optimizer, t, config.steps, config.steps // 10)
            mine = plan[t].tensor_split(world())[rank()]                    # the blocks of this process
            logps = block_logps(policy, blocks[mine].to(policy.trunk.unembedding.device))
            try:
                own = minimise(-logps.sum() / (len(plan[t]) * (config.tokens - 1)), optimizer, 1.0, sum_gradients)
            except FloatingPointError as error:
                raise InputError(f"step {t}: {error}; nothing was saved. Lower --lr", file=config.data) from None
            t += 1
            progress(t, config.steps, f"loss {sum(everyone(own)):.4f}")
            saver.after(t, config.steps, snapshot)


def read_blocks(path: str, tokenizer, tokens: int) -> torch.Tensor:
    """The texts as blocks of ids (N, tokens). Each text has a start token, if the tokenizer has one, and an end token;
    a last, shorter block is dropped. Raises: InputError naming the line that is not valid."""
    ids, start = [], [] if tokenizer.bos is None else [tokenizer.bos]
    for number, line in enumerate(lines(path), 1):
        try:
            if not isinstance(text := json.loads(line)["text"], str):
                raise TypeError("text is no string")
            ids += [*start, *tokenizer.encode(text), tokenizer.eos]
        except (ValueError, KeyError, TypeError) as error:          # no JSON, no text, or no token for a character
            raise InputError(f'wanted {{"text": "..."}}, got {line[:80]!r} ({error})', file=path, line=number) from None
    return torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens)


def block_logps(policy, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of all tokens but the first of each block: (N,T) -> (N*(T-1),)."""
    return policy.token_logps(policy.hidden(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), None)[0]


@torch.no_grad()
def perplexity(policy, blocks: torch.Tensor) -> float:
    """exp of the mean negative log-prob of the tokens of blocks (N,T)."""
    device = policy.trunk.unembedding.device
    return math.exp(-torch.cat([block_logps(policy, part.to(device)) for part in blocks.split(8)]).mean().item())


def main(argv: list[str]) -> None:
    with joined():
        finetune(configs.parse(FinetuneConfig, argv, "python -m data.experiment.finetune"))


if __name__ == "__main__":
    configs.command(main)
