"""A weighted sum of adapters is another model than the mixture: `python -m mixdpo.evaluation.adapter_sum RUN [FILE]`.

    mixture     log sum_k w_k pi_k(y|x)                             one expert per response (M1, M14)
    sum         log pi(y|x) with W + 2 sum_k w_k B_k A_k            one model, as servers that add adapters make

Both of every response in FILE (default: heldout.jsonl in the folder of the run), under the fixed weights of the run, or
equal ones. The sum moves with all experts at once, and log pi is not linear in the weights of the model.
"""

import math
from pathlib import Path

import torch

from mixdpo.config import InputError, command
from mixdpo.evaluation.statistics import mean_se
from mixdpo.experts import Adapters, Heads
from mixdpo.mixture import mixture_logp
from mixdpo.models.lora import frozen_twin
from mixdpo.preferences import read_preferences
from mixdpo.runs.load_run import load_run
from mixdpo.runs.parallel import logp_in_parts
from mixdpo.text.tokenizer import load_tokenizer
from mixdpo.variants.rankings import as_pairs


@torch.no_grad()
def summed(experts: Adapters, w: torch.Tensor) -> Heads:
    """The model whose adapter is sum_k w_k times expert k's, as one policy. w (K,) sums to 1."""
    model = frozen_twin(experts.trunk)
    for path in experts.targets:
        parts = [experts.adapted(path).merged(k) for k in range(experts.K)]
        parts[0].weight.copy_(torch.stack([w[k] * part.weight for k, part in enumerate(parts)]).sum(0))
        model.set_submodule(path, parts[0])
    return Heads(model, 1, dtype=experts.dtype)


def compare(path: Path, file: str) -> dict:
    """Mean log-probs of the mixture and of the sum, nats a response, and the mean, standard error (clustered by
    prompt) and largest size of their difference. Raises: InputError."""
    run = load_run(path, "cpu", "")
    if not isinstance(run.experts, Adapters) or run.config.experts == 1:
        raise InputError("has no adapters to add; wanted a run with --sharing lora and two experts or more", file=path)
    K, config = run.config.experts, run.config
    log_w = run.gate.log_w if run.gate.kind == "fixed" else torch.full((K,), -math.log(K))
    pairs = as_pairs(read_preferences(file, load_tokenizer(config.models[0]), config.max_prompt, config.max_response,
                                      config.drop, columns=config.columns))
    logp = logp_in_parts(run.experts, pairs, "experts")                     # (P,K,2)
    mixture = mixture_logp(log_w, logp.mT.flatten(0, 1))                    # (2P,)  M14
    alone = logp_in_parts(summed(run.experts, log_w.exp()), pairs, "sum of adapters")[:, 0].flatten()
    prompt = [tuple(pair.prompt) for pair in pairs for _ in range(2)]
    gap = alone - mixture
    return {"responses": len(gap), "weights": log_w.exp().tolist(), "mixture": float(mixture.mean()),
            "sum": float(alone.mean()), "difference": mean_se(gap, prompt), "largest": float(gap.abs().max()),
            "experts apart": float((logp.amax(1) - logp.amin(1)).mean())}


def main(argv: list[str]) -> None:
    """The command."""
    if not 1 <= len(argv) <= 2:
        raise InputError(f"got {len(argv)} words, wanted a run and, optionally, a file of preferences")
    path = Path(argv[0]).resolve()
    found = compare(path, argv[1] if len(argv) > 1 else str(path.parent / "heldout.jsonl"))
    gap = found["difference"]
    print(f"{found['responses']} responses, weights {', '.join(f'{w:.3f}' for w in found['weights'])}\n"
          f"experts apart     {found['experts apart']:9.4f} nats a response\n"
          f"mixture           {found['mixture']:9.4f}\n"
          f"sum of adapters   {found['sum']:9.4f}\n"
          f"sum - mixture     {gap['mean']:+9.4f} ± {gap['se']:.4f}, at most {found['largest']:.4f}")


if __name__ == "__main__":
    command(main)
