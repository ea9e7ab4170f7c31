"""The supervised step: fine-tunes a model on plain texts, since DPO assumes a reference that knows the domain.

`python -m data.finetune --data reviews.jsonl --model smollm2 --out DIR` writes DIR in Hugging Face's
layout with its tokenizer, and finetune.json with the perplexity on held-out blocks before and after.
Texts are joined with an end token behind each and cut into blocks.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo import config as configs
from mixdpo.config import InputError
from mixdpo.experts import Heads
from mixdpo.optimizer import make_optimizer, set_rate
from mixdpo.preferences import data_key
from mixdpo.records import lines
from mixdpo.rundir import Progress, compute_dtype
from mixdpo.tokenizer import load_tokenizer
from mixdpo.weights import content_key, load_model, save_model
from train import minimise


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tunes a model on texts (JSON Lines with a field "text")."""

    data: str                       # file of texts, .jsonl or .jsonl.gz
    model: str                      # gpt2, smollm2, llama-3.2-1b or a Hugging Face directory
    out: str                        # directory of the tuned model, Hugging Face layout with its tokenizer
    steps: int = 100                # optimizer steps
    batch: int = 16                 # blocks a step
    tokens: int = 128               # tokens a block
    held: int = 64                  # last blocks, never trained on, for the perplexity before and after
    lr: float = 5e-5                # AdamW's peak learning rate; warm-up over a tenth of the steps
    dtype: str = "auto"             # of the products: auto, float32, bfloat16
    seed: int = 0                   # of the order of blocks
    data_folder: str = ""           # local files looked into before anything is fetched


def finetune(config: FinetuneConfig) -> Path:
    """Tunes and saves; a finished result of the same configuration and data is used again. Returns the directory."""
    out, device = Path(config.out), "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(config.model, device=device, data=config.data_folder or None)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "data_folder", "data")}
    settings |= {"data_key": data_key(config.data), "model_key": content_key(model)}    # contents, not only names
    report = out / "finetune.json"
    if report.exists() and json.loads(report.read_text())["settings"] == settings:
        print(f"{out}: tuned before, {report.read_text()}")
        return out
    dtype, why = compute_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model, config.data_folder or None)
    blocks = read_blocks(config.data, tokenizer, config.tokens)              # (N,T)
    if len(blocks) < config.held + config.batch:
        raise InputError(f"{config.data}: {len(blocks)} blocks of {config.tokens} tokens, "
                         f"wanted at least {config.held + config.batch} (--held and one batch)")
    policy = Heads(model, 1, dtype=dtype)
    print(f"fine-tuning on {len(blocks) - config.held} blocks of {config.tokens} tokens, "
          f"products in {str(dtype).removeprefix('torch.')}: {why}")
    optimizer, _ = make_optimizer(policy, config.lr)
    before, order, progress = perplexity(policy, blocks[-config.held :]), [], Progress("finetune")
    generator = torch.Generator().manual_seed(config.seed)
    for t in range(config.steps):
        if len(order) < config.batch:
            order = torch.randperm(len(blocks) - config.held, generator=generator).tolist()
        ids, order = blocks[order[: config.batch]].to(device), order[config.batch :]
        set_rate(optimizer, t, config.steps, config.steps // 10)
        loss = -block_logps(policy, ids).mean()
        try:
            minimise(loss, optimizer, clip=1.0)
        except FloatingPointError as error:
            raise InputError(f"{config.data}: step {t}: {error}; nothing was saved. Lower --lr") from None
        progress(t + 1, config.steps, f"loss {loss.item():.4f}")
    after = perplexity(policy, blocks[-config.held :])
    print(f"perplexity on {config.held} held-out blocks: {before:.2f} before, {after:.2f} after")
    report.unlink(missing_ok=True)                              # a report vouches for all that lies beside it
    save_model(policy.trunk, out)
    tokenizer.save(out)
    report.write_text(json.dumps({"perplexity_before": before, "perplexity_after": after, "settings": settings}) + "\n")
    return out


def read_blocks(path: str, tokenizer, tokens: int) -> torch.Tensor:
    """All texts, a start token (where the tokenizer has one) before and an end token behind each,
    as one run of ids cut into blocks: (N, tokens); the last, shorter one is left out."""
    ids, start = [], [] if tokenizer.bos is None else [tokenizer.bos]
    for number, line in enumerate(lines(path), 1):
        try:
            if not isinstance(text := json.loads(line)["text"], str):
                raise TypeError("text is no string")
            ids += [*start, *tokenizer.encode(text), tokenizer.eos]
        except (ValueError, KeyError, TypeError) as error:          # no JSON, object, text or token for a character
            raise InputError(f'{path}:{number}: wanted {{"text": "..."}}, got {line[:80]!r} ({error})') from None
    return torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens)


def block_logps(policy, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of every token but the first of each block: (N,T) -> (N*(T-1),)."""
    return policy.token_logps(policy.hidden(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), None)[0]


@torch.no_grad()
def perplexity(policy, blocks: torch.Tensor) -> float:
    device = policy.trunk.unembedding.device
    return math.exp(-torch.cat([block_logps(policy, part.to(device)) for part in blocks.split(8)]).mean().item())


def main(argv: list[str]) -> None:
    try:
        finetune(configs.parse(FinetuneConfig, argv, "python -m data.finetune"))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
