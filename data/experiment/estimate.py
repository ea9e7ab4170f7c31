"""Estimates the time of a preset before it starts, from token counts and the speed of this computer.

A forward pass costs 2 operations for each parameter and token; a backward pass 4 more, or almost none with a frozen
trunk. A context pair needs a forward pass only. The speed is that of one matrix product in the compute dtype, measured
at the start, times the share of it that the program reaches (measured with SmolLM2 on two CPU cores; on a GPU, where a
small model uses little of it, a cautious guess). Downloads are not included.
"""

import time
from pathlib import Path

import torch

from mixdpo.config import compute_dtype

PARAMETERS = {"gpt2": 124e6, "smollm2": 135e6, "llama-3.2-1b": 1236e6}
# Share of the product's speed. AMX, matrix units for bfloat16, makes products so fast that other work counts.
REACHED = {"amx": {"pass": 0.4, "decode": 0.19}, "cpu": {"pass": 0.8, "decode": 0.6},
           "cuda": {"pass": 0.2, "decode": 0.02}}
PARSED = 100  # texts that spaCy parses in a second on one processor
JUDGE = 25  # seconds to read 12,000 reviews and fit the judge of sentiment


def work(preset: dict, parameters: float, prompt: int) -> dict[str, dict[str, float]]:
    """Stage -> {"pass" | "decode": operations, "seconds": time of one processor}. prompt: tokens of a prompt."""
    response, forward = preset["max_response"], 2 * parameters
    continuations = (preset["prompts"] + preset["heldout"]) * preset["continuations"]
    pairs, held = preset["users"] * preset["pairs"], preset["users"] * preset["heldout_pairs"]
    held += 2 * preset.get("new_users", 0) * preset.get("new_pairs", 0)
    tuned = {"steps": 100, "batch": 16, "tokens": 128} | preset["finetune"]
    runs = [preset["train"] | run for run in preset["runs"].values()]
    copies = [1 if run.get("sharing", "heads") == "heads" else run["experts"] for run in runs]      # trunks that run
    seen, passes = prompt + 2 * response, 0.0                           # tokens of a pair; passes over all pairs
    for run, copy in zip(runs, copies):
        share = 1 / len(preset["annotators"]) if "data" in run else 1.0     # of the pairs: those of one type
        in_e_step = preset["context"] / preset["pairs"] if run.get("estep") == "context" else 0.0
        of_step = (3 if run.get("sharing") != "lora" else 2) if run.get("train_trunk", True) else 0.3
        passes += share * (1 + copy * (run.get("epochs", 1) * (of_step + in_e_step) + in_e_step))   # 1: the reference
    kl = preset.get("evaluation", {}).get("kl", ())
    times = preset["evaluate"] * (1 + len(kl))                              # at most: not every run goes so far
    completed = preset["evaluate"] + times * sum(run["experts"] for run in runs)
    for_kl = times * sum((1 + copy) * (prompt + run["experts"] * response) for run, copy in zip(runs, copies))
    return {
        "annotating": {"seconds": JUDGE * preset["judge_reviews"] / 12000 + continuations / PARSED},
        "fine-tuning": {"pass": 3 * forward * tuned["steps"] * tuned["batch"] * tuned["tokens"]},
        "sampling": {"decode": forward * continuations * response},
        "training": {"pass": forward * pairs * seen * passes},
        "evaluation": {"decode": forward * completed * response, "seconds": completed / PARSED,
                       "pass": forward * ((1 + sum(copies)) * held * seen + for_kl)},
    }


def product_rate(device: str) -> tuple[float, torch.dtype, str]:
    """Operations per second of a matrix product with 1,024 rows, its dtype, and the units that compute it, one of
    REACHED."""
    dtype, why = compute_dtype("auto", device)
    rows, matrix = (torch.randn(shape, device=device, dtype=dtype) for shape in ((1024, 768), (768, 3072)))
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for _ in range(3):
        rows @ matrix                                                       # warm-up
    wait()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.3:
        rows @ matrix
        wait()
        count += 1
    units = "amx" if "amx" in why else device
    return 2 * rows.numel() * 3072 * count / (time.perf_counter() - began), dtype, units


def estimate(preset: dict, model: str, prompt: int) -> str:
    """One line for the user: total minutes, and minutes of each stage."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate, dtype, units = product_rate(device)
    parameters = PARAMETERS.get(model) or sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) / 4
    speed = {kind: rate * share for kind, share in REACHED[units].items()} | {"seconds": 1.0}
    minutes = {stage: sum(amount / speed[kind] for kind, amount in parts.items()) / 60
               for stage, parts in work(preset, parameters, prompt).items()}
    name = f"{rate / 1e9:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}"
    parts = ", ".join(f"{stage} {value:.0f}" for stage, value in minutes.items())
    return f"about {sum(minutes.values()):.0f} minutes on this machine ({name}): {parts}; finished stages are skipped"
