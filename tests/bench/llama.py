"""Four experts on random weights of Llama 3.2 1B's shape: `python -m tests.bench.llama` (3 GB of disk, some minutes).
As a user would, it runs train.py on a model directory in the hub's layout, in a new process and for one step: once with
adapters and once with low-rank heads. It prints the program's estimate of memory and the peak that the system measured.
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

    pairs: int = 4              # pairs in the step
    micro: int = 2              # pairs in a forward pass
    tokens: int = 128           # tokens of a prompt, and of a response
    experts: int = 4            # number of experts, K
    quick: bool = False         # true: two narrow layers, to check that everything runs
    folder: str = ""            # folder in which the model is kept; empty: a temporary one


def write_model(folder: Path, shape: LlamaConfig) -> None:
    """Writes the model in bfloat16, and the tokenizer, in the hub's layout."""
    torch.manual_seed(0)
    save_model(Llama(shape).to(torch.bfloat16), folder)
    load_tokenizer("llama-3.2-1b").save(folder)


def write_pairs(path: Path, count: int, tokens: int) -> None:
    """Writes texts of random words; each has more tokens than the run keeps."""
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join("".join(rng.choice(list("aeioulnrst"), 4)) for _ in range(tokens))

    rows = ({"prompt": text(), "chosen": text(), "rejected": text(), "user": f"u{n % 2}"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def one_step(options: str, home: Path, out: str, config: LlamaStepConfig) -> dict:
    """Runs train.py -> estimate and peak of memory (GB), seconds, loss. Raises: InputError with the end of its output
    if it fails."""
    words = (f"train.py --data {home}/pairs.jsonl --model {home}/model --out {home}/{out} --experts {config.experts} "
             f"{options} --batch {config.pairs} --micro {config.micro} --max-prompt {config.tokens} "
             f"--max-response {config.tokens}").split()
    with open(home / f"{out}.log", "w+") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        output = log.read()
    if status:
        raise InputError(f"{' '.join(words)} ended with {status}: {output[-2000:]}")
    began, ended = ((home / out / name).stat().st_mtime for name in ("config.json", "metrics.jsonl"))
    return {"estimate": float(re.search(r"in total ([0-9.]+) of", output)[1]), "peak": usage.ru_maxrss * 1024 / 1e9,
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
        print(f"| K = {config.experts} | estimate (GB) | peak (GB) | seconds: step-0 check, step | loss |\n"
              "|---|---|---|---|---|")
        for n, (name, options) in enumerate(RUNS.items()):
            found = one_step(options, home, f"run{n}", config)
            print(f"| {name} | {found['estimate']:.1f} | {found['peak']:.1f} | {found['seconds']:.1f} "
                  f"| {found['loss']:.4f} |", flush=True)


if __name__ == "__main__":
    command(main)
