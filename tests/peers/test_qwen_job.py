"""A model of another family through a whole experiment: a Qwen3 of random weights with SmolLM2's tokenizer and the
smoke preset of imdb, from `python -m data.imdb` to its report."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from mixdpo.models.llama import Llama, LlamaConfig
from mixdpo.models.weights import save_model
from mixdpo.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_the_smoke_job(tmp_path):
    """Catches: a part of the job that knows Llama alone; a family that is lost when the tuned reference is saved."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("smollm2")
    sizes = dict(vocab=49152, context=512, width=64, inner=128, layers=2, heads=4, kv_heads=2, head_dim=16)
    save_model(Llama(LlamaConfig(**sizes, qk_norm="head", family="qwen3", tied=True, eos=tokenizer.eos)),
               tmp_path / "qwen")
    tokenizer.save(tmp_path / "qwen")
    command = [sys.executable, "-m", "data.imdb", "--preset", "smoke", "--model", tmp_path / "qwen"]
    done = subprocess.run([*command, "--out", tmp_path / "job"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "job" / "reference" / "config.json").read_text())["model_type"] == "qwen3"
    results = json.loads((tmp_path / "job" / "results.json").read_text())
    assert {"dpo", "mixture"} <= results["preferences"].keys() and results["own_reward"]
    assert (tmp_path / "job" / "report.md").exists()
