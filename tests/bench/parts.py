"""Parts of a step and their baselines: the head alone, long prompts, the cost of EM, sampling."""

from functools import partial

import torch

from mixdpo.evaluation.generate import Sampling, generate
from mixdpo.experts import Heads, pair_logp
from mixdpo.fast.packing import compact_rows
from mixdpo.logprob import token_logps, token_logps_reference
from mixdpo.metrics import bound_summary, chosen_and_rejected, step_summary
from mixdpo.mixture import e_step, elbo, expert_loss
from mixdpo.models.weights import load_model
from mixdpo.preferences import Pair, collate
from tests.bench.variants import VARIANTS, Setting, Stepper, Variant, products_in


def drawn(setting: Setting, *shape: int) -> torch.Tensor:
    """Normal random numbers, equal in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(setting.device)


def head(setting: Setting, logps) -> Stepper:
    """Log-probs by logps(hidden, weight, targets), and the gradients of their sum for hidden and weight."""
    N, V = setting.sizes.rows, setting.sizes.vocab
    hidden, weight = (x.requires_grad_() for x in inputs_of_head(setting))
    targets = torch.arange(N, device=setting.device) % V

    def step():
        torch.autograd.grad(logps(hidden, weight, targets).sum(), (hidden, weight))

    return Stepper(step, [], **counted_head(hidden, weight))


def inputs_of_head(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (N,C), weight (V,C), in the dtype of products."""
    N, C, V = setting.sizes.rows, setting.sizes.width, setting.sizes.vocab
    return drawn(setting, N, C).to(products_in(setting)), (drawn(setting, V, C) / C**0.5).to(products_in(setting))


def counted_head(hidden: torch.Tensor, weight: torch.Tensor) -> dict:
    """FLOPs of three matrix products; bytes of both inputs, read in each pass, and of their gradients, written. The
    gradients are the result of the step."""
    (N, C), V = hidden.shape, len(weight)
    size = hidden.element_size() * (N + V) * C
    return {"gradient": size, "flops": 6.0 * N * V * C, "bytes": 3.0 * size, "dtype": weight.dtype}


def products(setting: Setting) -> Stepper:
    """The three matrix products of a head, and nothing else."""
    hidden, weight = inputs_of_head(setting)

    def step():
        logits = hidden @ weight.T
        return (logits @ weight, logits.T @ hidden)[0][0, 0]

    return Stepper(step, [], **counted_head(hidden, weight))


# The head of other libraries: log-probs, summed or per token; hidden (N,C), weight (V,C), targets (N,).


def head_trl(hidden, weight, targets):
    """TRL's kernel, with its default tile size; in plain torch on a CPU."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]


def head_liger(hidden, weight, targets):
    """Liger's kernel, which computes the gradients of the sum over tokens in forward."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")


def head_cut(hidden, weight, targets):
    """Apple's cut cross-entropy, a loss for each token; it skips gradients below bfloat16's precision."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


def long_prompts(setting: Setting, shared: bool) -> Stepper:
    """Forward and backward of pairs whose prompts are long."""
    sizes, generator = setting.sizes, torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(sizes.vocab - 1, (count,), generator=generator).tolist()

    pairs = [Pair(ids(sizes.long_prompt), ids(sizes.short_response), ids(sizes.short_response))
             for _ in range(sizes.pairs)]
    policy = Heads(load_model(setting.directory, device=setting.device), 1, dtype=products_in(setting))
    batch, parameters = collate(pairs, list(range(len(pairs)))), list(policy.parameters())

    def step():
        pair_logp(policy, batch, partial(compact_rows, shared=shared)).sum().backward()
        policy.zero_grad(set_to_none=True)

    return Stepper(step, parameters)


def bookkeeping(setting: Setting) -> Stepper:
    """The additional work of a mixture: all of EM over K, from margins to the logged figures."""
    B, K = setting.sizes.pairs, setting.sizes.experts
    h, log_w = drawn(setting, B, K), torch.full((B, K), 1 / K, device=setting.device).log()
    logp, each = drawn(setting, B, K, 2), torch.arange(B, device=setting.device)

    def step():
        margins = h.detach().requires_grad_()
        log_q = e_step(log_w, margins.detach())[1]
        expert_loss(log_q, margins).sum().backward()
        texts = chosen_and_rejected(log_q, logp, logp[:, :1], 0.1)
        bound_summary(elbo(log_q, log_w, margins.detach(), each), log_w, margins.detach(), each)
        return step_summary(log_q, log_w, margins.detach(), texts)["loss"]

    return Stepper(step, [])


def prompts_of(setting: Setting) -> list[list[int]]:
    """Random prompts, equal in every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.sizes.prompts, setting.sizes.prompt)
    return torch.randint(setting.sizes.vocab - 1, shape, generator=generator).tolist()


def sampling(setting: Setting) -> Stepper:
    """Completions of a fixed length."""
    model = load_model(setting.directory, dtype=products_in(setting), device=setting.device).eval()
    prompts = prompts_of(setting)
    return Stepper(lambda: len(generate(model, prompts, Sampling(setting.sizes.new, eos=-1, batch=len(prompts)))), [])


def sampling_transformers(setting: Setting) -> Stepper:
    """The same with transformers' generate, without top-k."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = GPT2LMHeadModel.from_pretrained(setting.directory, dtype=products_in(setting)).to(setting.device).eval()
    ids, new = torch.tensor(prompts_of(setting), device=setting.device), setting.sizes.new
    options = dict(do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)

    @torch.no_grad()
    def step():
        return len(model.generate(ids, attention_mask=torch.ones_like(ids), **options))

    return Stepper(step, [])


PARTS = {
    "head-tiled": Variant("head, tiles of the vocabulary", lambda s: head(s, token_logps)),
    "head-full": Variant("head, full logits", lambda s: head(s, token_logps_reference)),
    "head-kept": Variant("head, products kept", lambda s: head(s, lambda *inputs: token_logps(*inputs, tile=None))),
    "head-products": Variant("head, its three matrix products alone", products),
    "head-trl": Variant("head, TRL's kernel", lambda s: head(s, head_trl), ("trl",)),
    "head-liger": Variant("head, Liger's kernel", lambda s: head(s, head_liger), ("liger_kernel", "CUDA")),
    "head-cut": Variant("head, cut cross-entropy", lambda s: head(s, head_cut), ("cut_cross_entropy", "CUDA")),
    "long-shared": Variant("pairs with long prompts, shared", lambda s: long_prompts(s, True)),
    "long-plain": Variant("pairs with long prompts, twice each", lambda s: long_prompts(s, False)),
    "em": Variant("EM over K, without the experts", bookkeeping),
    "generate": Variant("mixdpo, sampling", sampling),
    "generate-transformers": Variant("transformers, sampling", sampling_transformers, ("transformers",)),
}
ROWS = VARIANTS | PARTS
