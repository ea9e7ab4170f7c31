"""Estimates the memory of a training step before any weights are read.

    weights       4 bytes for each parameter of the experts, frozen ones included
    gradients     4 bytes for each trained parameter; twice with epsilon: one example's gradient, and their sum; and
                  twice in a run of several processes: this one's, and the sum
    moments       AdamW's two, of 4 or 2 bytes for each trained parameter
    activations   what the forward pass of a micro-batch keeps for backward: measured on the CPU for one and two
                  blocks of this width with random weights and two and three rows; further ones are like the last
    logits        those of one head micro-batch (backward.KEPT), and their gradient

With --shard each process has its part of the first three, for trunk and models; with --expert-parallel each has one
expert, whose gradients count once if no other process has it. Parameters are counted on a model on the meta device.
Left out: the pass for the reference's log-probs (one micro-batch without gradient, less than a step),
the pages of the weight file while it is read (2 bytes for each parameter of a bfloat16 model), fragmentation, and the
memory of libraries.
"""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from mixdpo.config import compute_dtype
from mixdpo.experts import make_experts, trunks
from mixdpo.fast.backward import KEPT
from mixdpo.models.weights import MODELS, config_of
from mixdpo.runs.distributed import world

TIGHT = 0.9             # largest share of the free memory that is safe, because of fragmentation and libraries

TOGETHER = {"expert_parallel": False}   # of remedies that it cannot be combined with

# Remedies, the cheapest first: their names and options.
REMEDIES: list[tuple[str, dict[str, Any]]] = [
    ("--checkpointing true", {"checkpointing": True}),
    ("--micro 4 --checkpointing true", {"checkpointing": True, "micro": 4}),
    ("--moments bfloat16 --checkpointing true", {"checkpointing": True, "moments": "bfloat16"} | TOGETHER),
    ("--sharing lora --checkpointing true", {"checkpointing": True, "sharing": "lora"} | TOGETHER),
    ("--train-trunk false (low-rank heads)", {"sharing": "heads", "rank": 16, "train_trunk": False} | TOGETHER),
]


def estimate(config, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of each part, as above, for a TrainConfig whose products are in `dtype`."""
    shapes = [config_of(name, config.data_folder or None) for name in config.models]
    team = config.experts if config.expert_parallel else 1
    if config.expert_parallel:                                              # one expert: the largest
        config, shapes = dataclasses.replace(config, experts=1), [max(shapes, key=lambda shape: shape.layers)]
    with torch.device("meta"):                                              # shapes only
        models = [MODELS[type(shape)](shape) for shape in shapes]
    experts = make_experts(models, config, dtype)
    learns = [p for p in experts.parameters() if p.requires_grad]
    divided = {p for model in trunks(experts) for p in model.parameters()} if config.shard else set()
    twice = config.epsilon < math.inf or world() > team                     # of one part, and the sum

    def count(parameters) -> float:
        return sum(p.numel() / (world() if p in divided else 1) for p in parameters)

    gradients = count(p for p in learns for _ in range(2 if twice and p not in divided else 1))
    rows, T = 2 * config.micro, config.max_prompt + config.max_response
    frozen_trunk = config.sharing == "heads" and not config.train_trunk
    V, heads = shapes[0].vocab, 1 if config.sharing == "lora" else config.experts
    chunk = min(KEPT, config.micro * 2 * config.max_response * heads * V * dtype.itemsize)
    return {
        "weights": 4.0 * count(experts.parameters()), "gradients": 4.0 * gradients,
        "moments": (4.0 if config.moments == "bfloat16" else 8.0) * count(learns),
        "activations": 0.0 if frozen_trunk else activations(shapes[0], config, dtype, T, rows),
        "logits": 2.0 * chunk}


def activations(shape, config, dtype: torch.dtype, T: int, rows: int) -> float:
    """Bytes that the forward pass of two or more rows of T tokens keeps for backward. What it keeps once,
    the weights in `dtype`, is among them."""
    def of_rows(n: int) -> int:
        one, two = (kept(dataclasses.replace(shape, layers=layers, vocab=8), config, dtype, T, n) for layers in (1, 2))
        return one + (two - one) * (shape.layers - 1)

    two, three = of_rows(2), of_rows(3)                                     # of a single row some tensors are views
    return two + (three - two) * (rows - 2)


def kept(shape, config, dtype: torch.dtype, T: int, rows: int) -> int:
    """The same, measured: the storages that autograd keeps of some rows, without those of parameters."""
    model = MODELS[type(shape)](shape)
    model.checkpointing = config.checkpointing
    experts = make_experts([copy.deepcopy(model) for _ in config.models], config, dtype)
    own, held = {p.untyped_storage().data_ptr() for p in experts.parameters()}, {}

    def pack(x):
        if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)        # x: so that none is reused
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        experts.hidden(torch.zeros(rows, min(T, shape.context), dtype=torch.int64))
    return sum(size for size, _ in held.values())


def available(device: str) -> float:
    """Free bytes on the device; infinity if the system does not report them."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def exceeded(error: RuntimeError) -> bool:
    """Whether the error means that memory was too small: a type of its own for CUDA, a message for the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def smaller(config, error: RuntimeError) -> str:
    """The error message when memory ran out: the largest micro-batch that would fit by the estimate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, free = compute_dtype(config.dtype, device)[0], available(device)
    sizes = {m: sum(estimate(dataclasses.replace(config, micro=m), dtype).values()) for m in range(1, config.micro)}
    found = [m for m, size in sizes.items() if size <= TIGHT * free]
    would = (f"--micro {found[-1]} fits by the estimate: {sizes[found[-1]] / 1e9:.1f} GB" if found else
             "no --micro fits by the estimate:\n" + "\n".join(remedies(config, dtype)))
    return (f"got {config.micro}, and memory ran out ({str(error).splitlines()[0]}). {free / 1e9:.1f} GB are free; "
            f"{would}. Change that option and run the command again to resume")


def remedies(config, dtype: torch.dtype) -> list[str]:
    """The remedies, and the memory that each would need."""
    others = {name: dataclasses.replace(config, **options) for name, options in REMEDIES}
    return [f"    {name}: {sum(estimate(other, dtype).values()) / 1e9:.1f} GB" for name, other in others.items()
            if other != config and len(other.models) == len(config.models)]             # own models cannot share one


def describe_memory(config, dtype: torch.dtype, free: float) -> list[str]:
    """The estimate in one line; if it exceeds the free memory, also a warning with remedies."""
    parts = estimate(config, dtype)
    total = sum(parts.values())
    lines = ["memory of a step (GB, estimate): " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
             + f", in total {total / 1e9:.1f} of {free / 1e9:.1f} that are free"]
    if total <= TIGHT * free:
        return lines
    return [*lines, "warning: this may not fit; with one of these changes it needs about:", *remedies(config, dtype)]
