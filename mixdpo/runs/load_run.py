"""Loads finished runs: their experts, their gates, and their training units."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mixdpo import config as configs
from mixdpo.config import InputError, compute_dtype
from mixdpo.experts import Adapters, Heads, Models, make_experts
from mixdpo.files.atomic import read_json_or_empty
from mixdpo.gates import Gate
from mixdpo.models.weights import content_key
from mixdpo.plan import Plan, make_plan
from mixdpo.preferences import read_preferences
from mixdpo.runs.checkpoint import checkpoints, load_checkpoint, load_state
from mixdpo.runs.gate_inputs import known_pairs, saved_gate
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.reference import load_references
from mixdpo.text.records import data_key
from mixdpo.text.tokenizer import load_tokenizer


class Unfinished(InputError):
    """A run that was interrupted, or that another process is training."""


@dataclass
class Run:
    """A finished run."""

    name: str
    config: TrainConfig
    experts: Heads | Adapters | Models
    gate: Gate
    plan: Plan                      # of its training pairs
    table: torch.Tensor             # (G,K) log q
    path: Path
    known: dict = field(default_factory=dict)       # of these experts: log-probs of texts so far (known_logp)

    def known_logp(self) -> dict:
        """Log-probs (K,) of texts under the experts as they are now, for fast/texts.py, which fills it."""
        return self.known.setdefault(tuple(p._version for p in self.experts.parameters()), {})


def load_experts(path: Path, device, data_folder: str, loaded: dict | None = None
                 ) -> tuple[TrainConfig, Heads | Adapters | Models, dict[str, torch.Tensor], dict]:
    """A finished run's options, experts, and the tensors and the state of its checkpoint. loaded: name -> what
    load_references returned; runs that keep a model frozen share it. It is filled."""
    if (found := load_checkpoint(path, {})) is None:
        raise InputError("has no checkpoint; wanted a directory that train.py wrote", file=path)
    config = dataclasses.replace(configs.load(TrainConfig, path / "config.json"), data_folder=data_folder)
    if read_json_or_empty(path / "config.json").get("label_loss", "flips") != "flips":
        config = dataclasses.replace(config, label_noise=0.0)               # an old loss that used the plain margins
    tensors, state = found
    if not state["finished"]:
        raise Unfinished(f"is unfinished (step {state['step']}); finish it with the options in its config.json",
                         file=path)
    if loaded is None or config.sharing != "lora" and config.train_trunk:
        loaded = {}
    if config.model not in loaded:
        loaded[config.model] = load_references(config, device)
    models, _ = loaded[config.model]
    unchanged(path, "model", state, "+".join(map(content_key, models)), config)
    experts = make_experts(models, config, compute_dtype(config.dtype, str(device))[0]).eval()
    load_state(experts, tensors, path)
    return config, experts, tensors, state


def unchanged(path: Path, what: str, state: dict, now: str, config) -> None:
    """Raises: InputError if a run's model or data are not what it was trained with."""
    if state["config"][f"{what}_key"] != now:
        raise InputError(f"was trained with another {what} than the one that is now in {getattr(config, what)}; "
                         "restore it, or train again with another --out", file=path)


def load_run(path: Path, device: str, data_folder: str, loaded: dict | None = None) -> Run:
    """A finished run with its units, which are read from its data again. For a private run with --context it is not
    known which pairs were context: they were drawn under a key that no longer exists. loaded: of load_experts."""
    config, experts, tensors, state = load_experts(path, device, data_folder, loaded)
    unchanged(path, "data", state, data_key(config.data, config.columns), config)
    pairs = read_preferences(config.data, load_tokenizer(config.models[0], data_folder or None), config.max_prompt,
                             config.max_response, config.drop, report=lambda line: None, columns=config.columns)
    plan = make_plan(pairs, config, schedule=lambda *_: [])                 # the units; no steps are left
    return Run(path.name, config, experts, saved_gate(config, tensors, known_pairs(plan)), plan, tensors["table"], path)


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs in it, sorted by name."""
    found = [path.parent for path in sorted(folder.glob("*/checkpoint"))]
    if checkpoints(folder):
        return [folder]
    if not found:
        raise InputError("has no run; wanted a directory that train.py wrote, or a folder of such directories",
                         file=folder)
    return found
