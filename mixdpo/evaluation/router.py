"""The router of an exported run: what a client needs to draw an expert for a request, without this program.

    router.json         experts     names of the K experts, as servers know them; ports: that of each one's server
                        gate        kind of the gate (gates.py)
                        features    the state of the prompt that it reads: last or mean, of the base model; null: none
                        prompt      of those states: tokens at most, and how many begin every prompt (0 or 1: <s>)
                        unit_rows   whether the features are scaled to length sqrt(D) first
                        rows        names of the rows of E from 1 on: users, or domains of prompts; row 0: unknown
                        users       names of the rows of `posterior`
    router.safetensors  b (K,), W (K,D), mean (D,), scale (D,), V (H,D), c (H,), E (1+rows,K), posterior (users,K)

    log w = log softmax(b + W g + E[row])    g = (f - mean) / scale; with V and c: gelu(V g + c)       M9, M10
    a user of `users` is served by its posterior instead, log q                                        M11

A tensor that a gate does not have is not in the file; b always is. All are float32; posterior is log q.
Users of a private run (--epsilon) are left out: their responsibilities are computed without noise.
"""

import math
from pathlib import Path

import torch

from mixdpo.config import to_json, write_text
from mixdpo.files.atomic import replacing, save_tensors
from mixdpo.gates import READS_PROMPT, READS_USER
from mixdpo.runs.gate_inputs import domains_of, known_pairs
from mixdpo.runs.load_run import Run


def write_router(run: Run, out: Path, ports: list[int], start: int) -> dict:
    """Writes both files into the folder `out`; returns the facts of router.json. ports: of the K servers; start: number
    of tokens that begin every prompt. Raises: OSError."""
    facts, tensors = router_of(run)
    facts |= {"ports": ports, "prompt": {"tokens": run.config.max_prompt, "start": start}}
    with replacing(out / "router.safetensors") as part:
        save_tensors(part, {name: t.float().contiguous() for name, t in tensors.items()}, {"format": "pt"})
    write_text(out / "router.json", to_json(facts, indent=1, ensure_ascii=False) + "\n")
    return facts


@torch.no_grad()
def router_of(run: Run) -> tuple[dict, dict[str, torch.Tensor]]:
    """The facts, less ports and prompt, and the tensors."""
    gate, K = run.gate, run.config.experts
    tensors = {name: t.detach() for name, t in gate.state_dict().items() if name != "log_w"}
    if gate.kind == "fixed":
        tensors["b"] = gate.log_w
    tensors.setdefault("b", torch.zeros(K))
    rows: list[str] = []
    if gate.kind in READS_USER:
        rows = list(dict.fromkeys(p.user for p in known_pairs(run.plan) if p.user is not None))    # as gate_inputs
    if gate.kind == "domain":
        rows = domains_of(known_pairs(run.plan))
        tensors["E"] = torch.cat([torch.zeros(1, K), torch.eye(K).log()])
    users = known_users(run)
    if users:
        tensors["posterior"] = torch.stack(list(users.values()))
    facts = {"experts": [f"expert-{k}" for k in range(K)], "gate": gate.kind,
             "features": run.config.gate_features if gate.kind in READS_PROMPT else None,
             "unit_rows": gate.unit_rows, "rows": rows, "users": list(users)}
    return facts, tensors


def known_users(run: Run) -> dict[str, torch.Tensor]:
    """User -> log q (K,) of each training user (M11); {} if users are not the latent or the run is private. A user that
    no training step drew has a row of NaN in the table, and is not known."""
    if run.config.latent != "user" or run.config.experts == 1 or run.config.epsilon < math.inf:
        return {}
    return {run.plan.pairs[unit[0]].user or "": log_q.float().cpu()
            for unit, log_q in zip(run.plan.units, run.table) if not log_q.isnan().any()}
