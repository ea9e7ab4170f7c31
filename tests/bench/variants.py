"""The optimizer steps that are compared; parts.py has parts of steps. Each builder returns a step on the same pairs and
from the same weights.

Equal for all: a randomly initialised GPT-2 (float32), the pairs, beta, AdamW with one learning rate and no weight
decay, gradients clipped at norm 1 and freed (set to None) at the end of a step. The batch is made before the clock
starts. What differs, and is compared, is the computation. Every step returns its loss. The first loss must be ln 2,
because policy and reference are equal at the start.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from mixdpo.experts import make_experts, trunks
from mixdpo.fast.optimizer import make_optimizer
from mixdpo.fast.packing import compact_rows
from mixdpo.gates import Gate, Inputs, first_weights
from mixdpo.models.gpt2 import GPT2, GPT2Config
from mixdpo.models.llama import Llama, LlamaConfig
from mixdpo.models.weights import load_model, save_model
from mixdpo.plan import make_plan, micro_batches
from mixdpo.preferences import Batch, Pair, collate
from mixdpo.runs import parallel
from mixdpo.runs.distributed import world
from mixdpo.runs.reference import compute_reference
from mixdpo.variants.choose import Variants

BETA, LR, CLIP = 0.1, 1e-6, 1.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, the pairs and the experts."""

    family: str = "gpt2"
    layers: int = 12
    heads: int = 12
    kv_heads: int = 12          # for Llama only
    width: int = 768
    inner: int = 3072
    vocab: int = 50257
    context: int = 1024
    pairs: int = 4
    prompt: int = 32
    response: int = 96          # with EOS
    experts: int = 4
    rank: int = 16
    rows: int = 1024            # rows of the parts that measure the head alone
    long_prompt: int = 256      # prompt length of the parts that measure shared prompts
    short_response: int = 64    # response length of those
    prompts: int = 64           # prompts of the parts that measure sampling
    new: int = 64               # sampled tokens for each prompt


GPT2_4 = Sizes()            # GPT-2 124M
GPT2_64 = Sizes(pairs=64, prompt=128, response=128, rows=8192)
LLAMA_1B = Sizes(family="llama", layers=16, heads=32, kv_heads=8, width=2048, inner=8192, vocab=128256, pairs=16,
                 prompt=256, response=256, rows=8192)
QUICK = Sizes(layers=2, heads=2, kv_heads=2, width=32, inner=64, vocab=503, context=64, pairs=3, prompt=7, response=13,
              rank=2, rows=9, long_prompt=20, short_response=4, prompts=3, new=5)
SIZES = {"gpt2-4": GPT2_4, "gpt2-64": GPT2_64, "llama-1b": LLAMA_1B, "quick": QUICK}


@dataclass(frozen=True)
class Stepper:
    """An optimizer step, or a part of one, as a function that returns the loss; and the parameters that it trains."""

    step: Callable[[], torch.Tensor | float | None]
    parameters: list[torch.nn.Parameter]
    first: float | None = None              # the loss of a first step, if building made one
    gradient: int = 0                       # bytes of gradient that the step returns; not counted as its memory
    flops: float = 0.0                      # FLOPs that the step needs at least; 0: not counted
    bytes: float = 0.0                      # bytes that it reads and writes at least
    dtype: torch.dtype | None = None        # dtype of its matrix products


@dataclass(frozen=True)
class Setting:
    """Inputs of all variants: sizes, pairs, a folder with the model in Hugging Face layout, the device."""

    sizes: Sizes
    pairs: list[Pair]
    directory: Path
    device: str


def make_setting(sizes: Sizes, directory: Path, device: str = "cpu", seed: int = 0) -> Setting:
    """Random pairs of exactly the given lengths, and random weights. The same seed gives the same on every system."""
    torch.manual_seed(seed)
    if not (directory / "model.safetensors").exists():
        common = dict(vocab=sizes.vocab, context=sizes.context, width=sizes.width, layers=sizes.layers,
                      heads=sizes.heads, inner=sizes.inner, eos=sizes.vocab - 1)
        made = GPT2(GPT2Config(**common)) if sizes.family == "gpt2" else Llama(LlamaConfig(kv_heads=sizes.kv_heads,
                                                                                           **common))
        save_model(made, directory)
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(sizes.vocab - 1, (count,), generator=generator).tolist()

    def response():
        return ids(sizes.response - 1) + [sizes.vocab - 1]                  # EOS is the last id

    pairs = [Pair(ids(sizes.prompt), response(), response()) for _ in range(sizes.pairs)]
    return Setting(sizes, pairs, directory, device)


# --- this project's step --------------------------------------------------------------------------------------------


def ours(setting: Setting, experts: int, rank: int = 0, dtype: torch.dtype | None = None, **options) -> Stepper:
    """train.step, its optimizer and its batches, with one micro-batch. The experts stay equal, which costs the same."""
    dtype = dtype or products_in(setting)
    config = train.TrainConfig(data="", model="", out="", experts=experts, rank=rank, beta=BETA, lr=LR, head_lr=LR,
                               batch=len(setting.pairs), micro=len(setting.pairs), **{"clip": CLIP} | options)
    model = load_model(setting.directory, device=setting.device)
    model.checkpointing = config.checkpointing
    ref_logp = compute_reference(model, setting.pairs, dtype).logp.to(setting.device)
    policies = make_experts([model], config, dtype)
    optimizer, _ = make_optimizer(policies, config.lr, config.head_lr, moments=config.moments)
    plan, G = make_plan(setting.pairs, config), len(setting.pairs)
    plan = replace(plan, steps=[(0, list(range(G)))], parts=parallel.divider(plan))  # the same step, again and again
    inputs = Inputs(torch.zeros(G, 0), torch.zeros(G, dtype=torch.int64)).to(setting.device)
    gate = Gate("fixed", experts, inputs, first_weights(config)).to(setting.device)
    rows_of = partial(compact_rows, packed=config.packing)
    problem = train.Problem(config, plan, ref_logp, inputs, None, *torch.zeros(2, G, experts), rows_of)
    state = train.EMState(policies, gate, optimizer, torch.zeros(G, experts))
    learning = [p for p in policies.parameters() if p.requires_grad]
    variants = Variants(config, plan, inputs.user, None, learning, parallel if world() > 1 else None)
    em = train.EM(**variants.functions(0, None))

    def step():
        state.t = 0
        return train.step(state, problem, em)[0]["loss"]

    micro, = micro_batches(replace(plan, parts=lambda ids: [0] * len(ids)), list(range(G)), config)
    return Stepper(step, learning, **counted(policies, rows_of(micro.train)))


def products_in(setting: Setting) -> torch.dtype:
    """The default dtype of matrix products: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if setting.device == "cpu" else torch.bfloat16


def counted(policies, text) -> dict:
    """FLOPs and bytes of a step. FLOPs of matrix products: 6 per weight and token in the trunks; 6 C per response token
    and vocabulary token in each head; attention, of which only the half below the diagonal counts. Bytes: a float32
    weight is read in forward and in backward, its gradient is written, and AdamW reads four numbers and writes
    three."""
    models, heads, (N, T) = trunks(policies), policies.heads(), text.ids.shape
    blocks = models[0].h if hasattr(models[0], "h") else models[0].layers
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    of_trunk = 6.0 * weights * N * T + 6.0 * len(blocks) * N * T * T * models[0].config.width
    of_head = 6.0 * len(text.targets) * heads[0].shape[:-2].numel() * heads[0].shape[-2] * heads[0].shape[-1]
    trained = sum(p.numel() for p in policies.parameters() if p.requires_grad)
    return {"flops": len(models) * (of_trunk + of_head), "bytes": 4.0 * trained * (2 + 1 + 7), "dtype": policies.dtype}


# --- a plain PyTorch step: all logits, log_softmax, gather ----------------------------------------------------------


def response_logp(logits_of, batch: Batch) -> torch.Tensor:
    """(B,2) response log-probs from the logits of every position."""
    ids = batch.ids.flatten(0, 1)                                           # (2B,T)
    logps = F.log_softmax(logits_of(ids)[:, :-1], dim=-1)                   # (2B,T-1,V)
    logps = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)                  # (2B,T-1)
    position = torch.arange(1, ids.shape[1], device=ids.device)
    response = (position >= batch.start[:, None, None]) & (position < batch.length[..., None])      # (B,2,T-1)
    return logps.view(response.shape).masked_fill(~response, 0.0).sum(-1)


def plain(setting: Setting, model: torch.nn.Module, logits_of) -> Stepper:
    """Full logits, reference log-probs cached, fused AdamW."""
    batch = collate(setting.pairs, list(range(len(setting.pairs))))
    batch = replace(batch, **{name: getattr(batch, name).to(setting.device) for name in ("ids", "start", "length")})
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    with torch.no_grad(), torch.autocast(setting.device, torch.bfloat16, enabled=setting.device != "cpu"):
        ref_logp = response_logp(logits_of, batch)                          # (B,2)

    def step():
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.device != "cpu"):
            log_ratio = response_logp(logits_of, batch) - ref_logp
        loss = -F.logsigmoid(BETA * (log_ratio[:, 0] - log_ratio[:, 1])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Stepper(step, parameters)


def plain_ours(setting: Setting) -> Stepper:
    """The plain step on this project's model, so that only the step differs."""
    model = load_model(setting.directory, device=setting.device)
    return plain(setting, model, lambda ids: model(ids) @ model.unembedding.T)


def plain_transformers(setting: Setting) -> Stepper:
    """The plain step on transformers' GPT2LMHeadModel, dropout off."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = GPT2LMHeadModel.from_pretrained(setting.directory, dtype=torch.float32).to(setting.device).eval()
    return plain(setting, model, lambda ids: model(ids, use_cache=False).logits)


# --- TRL ------------------------------------------------------------------------------------------------------------


def trl(setting: Setting, **changes) -> Stepper:
    """TRL's DPOTrainer; trl_peer.py lists which of its defaults are changed."""
    from tests.bench import trl_peer

    work = Path(tempfile.mkdtemp(dir=setting.directory))
    settings = {"beta": BETA, "learning_rate": LR, "use_cpu": setting.device == "cpu"} | changes
    trainer = trl_peer.dpo_trainer(setting.directory, setting.pairs, setting.sizes.vocab, work, **settings)
    step, first = trl_peer.stepper(trainer)
    return Stepper(step, list(trainer.model.parameters()), first)


def trl_precomputed(setting: Setting) -> Stepper:
    """TRL with its fastest settings: reference log-probs computed before training, activations kept."""
    return trl(setting, precompute_ref_log_probs=True, activation_checkpointing=False)


# --- the rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    title: str
    build: Callable[[Setting], Stepper]
    needs: tuple[str, ...] = ()  # packages beyond this project's own; "CUDA": a GPU


PEERS = ("transformers", "trl", "datasets")
VARIANTS = {
    "k1": Variant("mixdpo, K=1 (DPO)", lambda s: ours(s, experts=1)),
    "k4-low-rank": Variant("mixdpo, K=4, low-rank heads", lambda s: ours(s, s.sizes.experts, s.sizes.rank)),
    "k4-full": Variant("mixdpo, K=4, full heads", lambda s: ours(s, s.sizes.experts)),
    "k4-models": Variant("mixdpo, K=4, models", lambda s: ours(s, s.sizes.experts, sharing="models")),
    "k4-models-lean": Variant(
        "mixdpo, K=4, models, checkpointing, bfloat16 moments",
        lambda s: ours(s, s.sizes.experts, sharing="models", checkpointing=True, moments="bfloat16")),
    "k1-bf16": Variant("mixdpo, K=1, products in bf16", lambda s: ours(s, 1, dtype=torch.bfloat16)),
    "plain": Variant("plain PyTorch, full logits, our GPT-2", plain_ours),
    "plain-transformers": Variant("plain PyTorch, full logits, transformers' GPT-2", plain_transformers, PEERS[:1]),
    "trl": Variant("TRL DPOTrainer, default", trl, PEERS),
    "trl-precomputed": Variant("TRL DPOTrainer, precomputed reference, no checkpointing", trl_precomputed, PEERS),
}
