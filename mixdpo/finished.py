"""Runs that ended, read back: the experts, the gate, and who was trained on."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo import config as configs
from mixdpo.config import InputError
from mixdpo.experts import load_state, make_experts
from mixdpo.gates import Gate, saved_gate
from mixdpo.options import TrainConfig
from mixdpo.plan import Plan, make_plan
from mixdpo.preferences import data_key, read_preferences
from mixdpo.rundir import compute_dtype, load_checkpoint
from mixdpo.tokenizer import load_tokenizer
from mixdpo.weights import content_key, load_model


@dataclass
class Run:
    """A finished run, loaded."""

    name: str
    config: TrainConfig
    experts: torch.nn.Module
    gate: Gate
    plan: Plan                      # of its training pairs
    table: torch.Tensor             # (G,K) log q
    path: Path


def load_run(path: Path, device: str, data_folder: str) -> Run:
    """Rebuilds a run's experts from its model and its checkpoint."""
    config = dataclasses.replace(configs.load(TrainConfig, path / "config.json"), data_folder=data_folder)
    tensors, state = load_checkpoint(path, {})
    if not state["finished"]:
        raise InputError(f"{path}: stopped at step {state['step']}; finish it with the options in its config.json")
    model = load_model(config.model, device=device, data=data_folder or None)
    for what, now in (("model", content_key(model)), ("data", data_key(config.data))):
        if state["config"][f"{what}_key"] != now:
            raise InputError(f"{path}: was trained with another {what} than lies in {getattr(config, what)} now; "
                             "put that back, or train again into another --out")
    experts = make_experts(model, config, compute_dtype(config.dtype, device)[0]).eval()
    load_state(experts, tensors, path)
    pairs = read_preferences(config.data, load_tokenizer(config.model, data_folder or None), config.max_prompt,
                             config.max_response, config.drop, report=lambda line: None)
    plan = make_plan(pairs, config)
    return Run(path.name, config, experts, saved_gate(config, tensors, plan.pairs), plan, tensors["table"], path)


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs in it in the order in which they were begun."""
    found = [path.parent for path in sorted(folder.glob("*/checkpoint"), key=lambda path: path.stat().st_mtime)]
    if (folder / "checkpoint").exists():
        return [folder]
    if not found:
        raise InputError(f"{folder}: no run in it; wanted a directory that train.py wrote, or a folder of such")
    return found
