"""What a private run must end as, computed a second time: the slow twin of train.py --epsilon.

Written from the specification, not from the code. It imports the model, the experts' initial parameters and the
accountant; every draw, sum, gradient bound and step is made here, one example after another, from whole logits, in
float64. It must never import privacy, budget, plan, start, mixture, keys, latent, gates or optimizer.

    example     a pair, or a user with all of their pairs; in step t if its own uniform number t is below the rate
    loss        sum over its units of sum over trained pairs of sum_k q_k (-log sigmoid h_k) + KL(q||w) - bonus * H(w)
    step        (sum_i g_i min(1, clip / (|g_i| + 1e-6)) + sigma clip z) / (rate N), then AdamW
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tinyjob
import torch
import torch.nn.functional as F

from mixdpo.experts import make_experts
from mixdpo.models.weights import load_model
from mixdpo.private.accountant import noise_multiplier


def public_secret(n: int) -> bytes:
    return hashlib.sha256(f"public {n}".encode()).digest()


@dataclass(frozen=True)
class Pair:
    """One line of the data."""

    user: str | None
    domain: str | None
    context: bool | None
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass
class Unit:
    """Pairs that share one latent expert."""

    trained: list[Pair]
    evidence: list[Pair]            # what the posterior is computed from
    log_start: torch.Tensor         # (K,) responsibilities of the first steps


def read(path) -> list[Pair]:
    """The tiny tokenizer has one token a byte, and the end of a text."""
    records, ids = map(json.loads, Path(path).read_text().splitlines()), lambda text: [*text.encode()]
    return [Pair(r.get("user"), r.get("domain"), r.get("context"), ids(r["prompt"]), ids(r["chosen"]) + [tinyjob.EOS],
                 ids(r["rejected"]) + [tinyjob.EOS]) for r in records]


def identities(pairs: list[Pair]) -> list[str]:
    """Of each pair: the hash of its content, and how many earlier lines have the same content."""
    names, seen = [], Counter()
    for p in pairs:
        content = repr((p.user, p.domain, p.context, p.prompt, p.chosen, p.rejected))
        names.append(f"{hashlib.sha256(content.encode()).hexdigest()}:{seen[content]}")
        seen[content] += 1
    return names


class Twin:
    """One run, beside train.py."""

    def __init__(self, config, secret: bytes):
        self.config, self.secret = config, secret
        self.reference = load_model(config.model).double()
        self.experts = make_experts([load_model(config.model)], config, torch.float32).double()
        self.examples = self.read_examples()
        self.gate = self.initial_gate()
        self.take_over()
        self.known = {}                                                     # the reference's log-probs
        self.count = config.examples or len(self.examples)
        self.rate = min(1.0, config.batch / self.count)
        self.steps = -(-config.epochs * self.count // min(config.batch, self.count))        # epochs / rate, rounded up

    def generator(self, purpose: str, *about) -> np.random.Generator:
        digest = hashlib.blake2b(repr((purpose, *about)).encode(), key=self.secret, digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    # --- the data ---

    def read_examples(self) -> dict[str, list[Unit]]:
        """The units of each example, by the example's identity."""
        config, pairs = self.config, read(self.config.data)
        by_user = defaultdict(list)
        for i, p in enumerate(pairs):
            by_user[p.user].append(i)
        if config.estep == "context":
            for user, own in by_user.items():
                drawn = self.generator("context", user).permutation(own)[: config.context].tolist()
                if all(pairs[i].context is None for i in own):              # else the file decides
                    for i in own:
                        pairs[i] = replace(pairs[i], context=i in drawn)
        names, examples = identities(pairs), defaultdict(list)
        groups = by_user.values() if config.latent == "user" else [[i] for i in range(len(pairs))]
        for group in groups:
            reads = config.estep == "context"                               # else they are pairs like all others
            trained = [pairs[i] for i in group if not (reads and pairs[i].context)]
            context = [pairs[i] for i in group if pairs[i].context]
            first = group[0]
            about = pairs[first].user if config.latent == "user" else names[first]
            q = self.generator("start", config.latent, about).dirichlet(np.ones(config.experts))
            log_q = torch.from_numpy(np.log(q)).float().double()
            evidence = context if reads else trained
            examples[pairs[first].user if config.privacy_unit == "user" else names[first]].append(
                Unit(trained, evidence, log_q))
        return examples

    # --- the model ---

    def initial_gate(self) -> dict[str, torch.Tensor]:
        """Uniform weights; the mlp's first layer is random by --seed."""
        C, K, kind, made = self.reference.config.width, self.config.experts, self.config.gate, {}
        if kind in ("linear", "mlp"):
            made = {"W": torch.zeros(K, 64 if kind == "mlp" else C), "b": torch.zeros(K)}
        if kind == "mlp":
            random = torch.randn(64, C, generator=torch.Generator().manual_seed(self.config.seed))
            made |= {"V": random, "c": torch.zeros(64)}
        return {name: value.double().requires_grad_() for name, value in made.items()}

    @torch.no_grad()
    def take_over(self) -> None:
        """Low-rank factors of the runs that --init-experts names."""
        for k, entry in enumerate(filter(None, self.config.init_experts.split(","))):
            if entry != "fresh":
                folder, _, j = entry.rpartition(":")
                source = tinyjob.tensors(Path(folder))
                for name, p in self.experts.named_parameters():
                    if name[-1] in "AB":
                        p[k] = source[f"experts.{name}"][int(j)]

    def hidden(self, k: int, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert k's states of a text (T,C), and its unembedding (V,C)."""
        experts, sharing, text = self.experts, self.config.sharing, torch.tensor([ids])
        if sharing == "lora":
            weights = dict(self.reference.named_parameters())
            for path in experts.targets:
                layer = experts.trunk.get_submodule(path)
                weights[f"{path}.weight"] = weights[f"{path}.weight"] + 2 * layer.B[k] @ layer.A[k]
            return torch.func.functional_call(self.reference, weights, (text,))[0], self.reference.unembedding
        if sharing == "models":
            return experts.models[k](text)[0], experts.models[k].unembedding
        W = experts.trunk.unembedding
        if self.config.experts > 1 or not self.config.train_trunk:
            W = experts.W_k[k] if self.config.rank == 0 else W + W @ experts.A[k] @ experts.B[k]
        return experts.trunk(text)[0], W

    def margin(self, k: int, p: Pair) -> torch.Tensor:
        h = 0.0
        for sign, response in ((1, p.chosen), (-1, p.rejected)):
            ids = p.prompt + response
            own = log_prob(*self.hidden(k, ids), ids, len(p.prompt))
            if str(ids) not in self.known:
                with torch.no_grad():
                    states, W = self.reference(torch.tensor([ids]))[0], self.reference.unembedding
                    self.known[str(ids)] = log_prob(states, W, ids, len(p.prompt))
            h = h + sign * (own - self.known[str(ids)])
        return self.config.beta * h

    def margins(self, p: Pair) -> torch.Tensor:
        """(K,)"""
        return torch.stack([self.margin(k, p) for k in range(self.config.experts)])

    def log_weights(self, p: Pair) -> torch.Tensor:
        """log w (K,) of the unit whose first pair this is."""
        if self.config.gate == "fixed":
            w = [1.0] * self.config.experts if self.config.weights == "uniform" else map(
                float, self.config.weights.split(","))
            return torch.log_softmax(torch.tensor([*w], dtype=torch.float64).log(), 0)
        with torch.no_grad():
            x = F.normalize(self.reference(torch.tensor([p.prompt]))[0, -1], dim=0)         # the prompt's last state
        if self.config.gate == "mlp":
            x = F.gelu(self.gate["V"] @ x + self.gate["c"])
        return torch.log_softmax(self.gate["W"] @ x + self.gate["b"], 0)

    def loss(self, units: list[Unit], t: int) -> torch.Tensor:
        """Of one example in step t."""
        config, total = self.config, 0.0
        for unit in units:
            log_w, h = self.log_weights(unit.trained[0]), [self.margins(p) for p in unit.trained]
            if config.experts > 1 and config.start == "dirichlet" and t < config.start_steps:
                log_q = unit.log_start
            else:
                seen = h if unit.evidence is unit.trained else [self.margins(p) for p in unit.evidence]
                log_q = torch.log_softmax(log_w + sum(F.logsigmoid(x) for x in seen), 0).detach()
            q = log_q.exp()
            total = total - sum((q * F.logsigmoid(x)).sum() for x in h)
            if self.gate:
                total = total + (q * (log_q - log_w)).sum() + config.gate_entropy * (log_w.exp() * log_w).sum()
        return total

    # --- training ---

    def parameter_groups(self) -> list[dict]:
        """In the order in which noise is drawn."""
        named = [(name, p) for name, p in self.experts.named_parameters() if p.requires_grad]
        low = [p for name, p in named if name.rpartition(".")[2] in ("A", "B")]
        rest = [p for name, p in named if name.rpartition(".")[2] not in ("A", "B")]
        groups = [(rest, self.config.lr), (low, self.config.head_lr), ([*self.gate.values()], self.config.gate_lr)]
        return [{"params": part, "lr": rate, "peak": rate} for part, rate in groups if part]

    def kept(self, p: torch.Tensor) -> torch.Tensor:
        """1 where a parameter learns, 0 in the rows of frozen experts."""
        mask = torch.ones_like(p)
        if p.ndim == 3:                                                     # one row an expert
            mask[self.config.frozen] = 0
        return mask

    def draws(self) -> np.ndarray:
        """Who takes part: (examples, steps) bool."""
        return np.array([self.generator("sampling", name).random(self.steps) < self.rate for name in self.examples])

    def train(self) -> dict[str, torch.Tensor]:
        """All steps; the parameters at the end, by their names in the checkpoint."""
        config, steps, takes = self.config, self.steps, self.draws()
        sigma = noise_multiplier(config.epsilon, config.delta, self.rate, steps)
        groups = self.parameter_groups()
        params = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        self.norms, self.sizes = [], takes.sum(0).tolist()
        for t in range(steps):
            total = [torch.zeros_like(p) for p in params]
            for units in (units for units, drawn in zip(self.examples.values(), takes) if drawn[t]):
                grads = torch.autograd.grad(self.loss(units, t), params, materialize_grads=True, allow_unused=True)
                grads = [g * self.kept(p) for g, p in zip(grads, params)]
                self.norms.append(math.sqrt(sum(float((g * g).sum()) for g in grads)))
                total = [s + g * min(1.0, config.clip / (self.norms[-1] + 1e-6)) for s, g in zip(total, grads)]
            noise = self.generator("noise", t)
            for p, s in zip(params, total):
                z = torch.from_numpy(noise.standard_normal(tuple(p.shape)))
                p.grad = (s + sigma * config.clip * z) / (self.rate * self.count) * self.kept(p)
            warm = t < config.warmup
            scale = (t + 1) / config.warmup if warm else 1 - 0.9 * (t - config.warmup + 1) / (steps - config.warmup)
            for group in groups:
                group["lr"] = group["peak"] * scale
            optimizer.step()
        named = {f"experts.{n}": p for n, p in self.experts.named_parameters() if p.requires_grad}
        return {n: p.detach() for n, p in (named | {f"gate.{n}": p for n, p in self.gate.items()}).items()}


def log_prob(states: torch.Tensor, W: torch.Tensor, ids: list[int], start: int) -> torch.Tensor:
    """Of the tokens from `start` on: states (T,C), W (V,C) -> ()."""
    logps = torch.log_softmax(states[start - 1 : -1] @ W.T, 1)
    return logps.gather(1, torch.tensor(ids[start:])[:, None]).sum()
