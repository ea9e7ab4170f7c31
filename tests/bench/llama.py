"""Four experts on a model of Llama 3.2 1B's shape, random weights: `python -m tests.bench.llama` (3 GB of disk, some
minutes). The program is the user's: a model directory as the hub has it, train.py in a process of its own for one step,
once with adapters and once with low-rank heads; its own estimate of memory beside the highest that the system saw.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mixdpo.config import InputError, command, parse
from mixdpo.models.llama import Llama, LlamaConfig, RopeScaling
from mixdpo.models.weights import save_model
from mixdpo.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHAPE = LlamaConfig(vocab=128256, context=131072, width=2048, inner=8192, layers=16, heads=32, kv_heads=8, head_dim=64,
                    eps=1e-5, theta=500000.0, scaling=RopeScaling(32.0), tied=True, bos=128000, eos=128001)
TINY = {"width": 64, "inner": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}
RUNS = {"adapters": "--sharing lora", "low-rank heads, frozen trunk": "--sharing heads --train-trunk false"}


@dataclass(frozen=True)
class LlamaStepConfig:
    """One step of K experts on random weights of Llama 3.2 1B's shape."""

    pairs: int = 4              # of the step
    micro: int = 2              # pairs a forward pass
    tokens: int = 128           # of a prompt, and of a response
    experts: int = 4            # K
    quick: bool = False         # two narrow layers, the same vocabulary: does everything run?
    folder: str = ""            # where the model is written and kept; default: a temporary one


def write_model(folder: Path, shape: LlamaConfig) -> None:
    """The model in bfloat16, and the tokenizer, as a directory of the hub."""
    torch.manual_seed(0)
    save_model(Llama(shape).to(torch.bfloat16), folder)
    load_tokenizer("llama-3.2-1b").save(folder)


def write_pairs(path: Path, count: int, tokens: int) -> None:
    """Texts of random words, each longer than the tokens that are kept of it."""
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join("".join(rng.choice(list("aeioulnrst"), 4)) for _ in range(tokens))

    rows = ({"prompt": text(), "chosen": text(), "rejected": text(), "user": f"u{n % 2}"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_step(options: str, home: Path, out: str, config: LlamaStepConfig) -> dict:
    """What a run of train.py says and takes. Raises: InputError with its last words if it fails."""
    words = (f"train.py --data {home}/pairs.jsonl --model {home}/model --out {home}/{out} --experts {config.experts} "
             f"{options} --batch {config.pairs} --micro {config.micro} --max-prompt {config.tokens} "
             f"--max-response {config.tokens}").split()
    with open(home / f"{out}.log", "w+") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        said = log.read()
    if status:
        raise InputError(f"{' '.join(words)} ended with {status}: {said[-2000:]}")
    began, ended = ((home / out / name).stat().st_mtime for name in ("config.json", "metrics.jsonl"))
    return {"estimate": float(re.search(r"together ([0-9.]+) GB", said)[1]), "peak": usage.ru_maxrss * 1024 / 1e9,
            "seconds": ended - began, "loss": json.loads((home / out / "metrics.jsonl").read_text())["loss"]}


def main(argv: list[str]) -> None:
    config = parse(LlamaStepConfig, argv, "python -m tests.bench.llama")
    shape = LlamaConfig(**vars(SHAPE) | TINY) if config.quick else SHAPE
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(config.folder or temporary)
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "model" / "tokenizer_config.json").exists():
            write_model(home / "model", shape)
        write_pairs(home / "pairs.jsonl", config.pairs, config.tokens)
        print(f"| K = {config.experts} | estimate (GB) | highest (GB) | seconds: step-0 check, step | loss |\n"
              "|---|---|---|---|---|")
        for n, (name, options) in enumerate(RUNS.items()):
            found = one_step(options, home, f"run{n}", config)
            print(f"| {name} | {found['estimate']:.1f} | {found['peak']:.1f} | {found['seconds']:.1f} "
                  f"| {found['loss']:.4f} |", flush=True)


if __name__ == "__main__":
    command(main)
