"""What a finished run offers: its policies by name, ids of a prompt, weights, margins and scores.

    weights     w(x) of the gate for a new user (M9); log q of a training user (M11)
    margins     h of a choice, with --label-noise as in training (M4)
    scores      of one completion: log-probs of each token under every policy, and the posterior over experts given each
                prefix, log w_k + sum_{s<t} log pi_k(y_s), normalised (M14)

Prompts are tokenised and truncated as in training: a text keeps its last max_prompt ids, a conversation its last turns.
All functions compute with torch, so a server calls them on the engine's thread (Engine.call); `encode`, `known_user`
and the fields can be used anywhere. `margins` takes the prompt as `encode` does: a text or messages, not ids.
"""

import codecs
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo import config as configs
from mixdpo.config import InputError
from mixdpo.dpo import margins
from mixdpo.evaluation.heldout import weights
from mixdpo.experts import Adapters, Heads, Transformer, pair_logp
from mixdpo.fast.packing import compact_rows
from mixdpo.gates import READS_PROMPT
from mixdpo.logprob import token_logps
from mixdpo.mixture import prefix_log_weights
from mixdpo.preferences import Pair, collate, encode_prompt, read_pair
from mixdpo.runs.load_run import Run, Unfinished, find_runs, load_run
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.reference import compute_reference, load_references, prompt_features
from mixdpo.serving.trunks import Policy, Trunk, policies_of, turned, without_adapters
from mixdpo.text.chat import template_of
from mixdpo.text.records import check_messages, check_record, check_string, without_empty_system
from mixdpo.text.tokenizer import Tokenizer, load_tokenizer
from mixdpo.variants.label_noise import flipped_margins


@dataclass(frozen=True)
class Scores:
    """Of one completion of T tokens, under every policy."""

    tokens: list[str]               # T texts; joined they are the completion. Bytes that are no character: U+FFFD
    logps: dict[str, list[float]]   # policy -> T log-probs at temperature 1, nats
    posterior: list[list[float]]    # (T+1) x K: of the experts given each prefix, the empty one first (M14)


class ServedRun:
    """A finished run, in memory on its device. names: its policies: reference, expert-0, ..., and dpo, if a DPO run
    lies beside it. chat: a prompt may be messages."""

    def __init__(self, run: Run, references: list[Transformer], tokenizer: Tokenizer, dpo: Run | None = None):
        """references: the model that the experts began as, or that of each."""
        self.run, self.dpo, self.references, self.tokenizer = run, dpo, references, tokenizer
        self.name, self.K = run.name, run.config.experts
        self.policies: dict[str, Policy] = policies_of(run, references[0], dpo)
        self.names = list(self.policies)
        self.trunks: list[Trunk] = list(dict.fromkeys(policy.trunk for policy in self.policies.values()))
        self.context = min(trunk.model.config.context for trunk in self.trunks)
        self.max_prompt, self.max_response = run.config.max_prompt, run.config.max_response
        self.users = {run.plan.pairs[unit[0]].user: n for n, unit in enumerate(run.plan.units)}
        try:
            self.chat = bool(template_of(tokenizer))
        except InputError:
            self.chat = False

    @classmethod
    def load(cls, path, data_folder: str = "") -> "ServedRun":
        """A run, or the mixture of a folder of runs, with the DPO run beside it. On a CPU products are in float32: in
        bfloat16 their rounding, and so some texts, would depend on the rows beside. Raises: InputError."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        run = load_first(choices(Path(path).resolve()), device, data_folder)
        tokenizer = load_tokenizer(run.config.models[0], data_folder or None)
        dpo = load_dpo(dpo_beside(run), device, data_folder)
        for each in [run] if dpo is None else [run, dpo]:
            each.experts.dtype = torch.float32 if device == "cpu" else each.experts.dtype
        return cls(run, references_of(run, device), tokenizer, dpo)

    def encode(self, prompt: str | list[dict]) -> tuple[list[int], int]:
        """A prompt's ids, at most max_prompt, and the id that ends its answer. Raises: InputError if it cannot be used,
        for example an empty text, or messages without a chat template."""
        if isinstance(prompt, list):
            check_messages("prompt", prompt := without_empty_system(prompt))
        else:
            check_string("prompt", prompt)
        ids, _ = encode_prompt(prompt, self.tokenizer, self.max_prompt)
        if not ids:
            raise InputError("the prompt has no token; write at least one character")
        return ids, template_of(self.tokenizer).end if isinstance(prompt, list) else self.tokenizer.eos

    @torch.no_grad()
    def log_w(self, prompt: list[int]) -> torch.Tensor:
        """The gate's weights for a new user, log w(x): (K,) float32. A domain gate knows no domain: uniform."""
        states = torch.zeros(1, 2, 0)
        if self.run.config.gate in READS_PROMPT:
            states = prompt_features(self.references[0], [prompt], self.run.experts.dtype)  # (1,2,C)
        return weights(self.run, [Pair(prompt, [], [])], states)[0].float()

    def known_user(self, name: str) -> torch.Tensor | None:
        """log q (K,) of a user that the run was trained on, if types belong to users; else None. A private run knows
        none: responsibilities are computed without noise, and would disclose who was trained on."""
        config = self.run.config
        if config.latent != "user" or config.epsilon < math.inf or name not in self.users:
            return None
        log_q = self.run.table[self.users[name]].cpu()
        return None if log_q.isnan().any() else log_q                       # NaN: no training step drew this user

    @torch.no_grad()
    def margins(self, prompt: str | list[dict], chosen: str, rejected: str) -> torch.Tensor:
        """h of a choice under each expert (M4): (K,) float32, as evaluation/heldout.py has it. The prompt is a text, or
        messages. Raises: InputError, for example if both responses have the same ids."""
        as_response = (lambda text: [{"role": "assistant", "content": text}]) if isinstance(prompt, list) else str
        record = check_record({"prompt": prompt, "chosen": as_response(chosen), "rejected": as_response(rejected)})
        pair, _ = read_pair(record, "", 0, self.tokenizer, self.max_prompt, self.max_response)
        if pair.longest() > self.context:
            raise InputError(f"prompt and response have {pair.longest()} tokens, the model's context is {self.context};"
                             " shorten them")
        dtype, config = self.run.experts.dtype, self.run.config
        logp = pair_logp(self.run.experts, collate([pair], [0]), compact_rows).cpu()        # (1,K,2)
        ref = torch.cat([compute_reference(model, [pair], dtype, most=0).logp for model in self.references], dim=1)
        return flipped_margins(margins(logp, ref, config.beta), config.label_noise)[0]      # (K,)  M4

    @torch.no_grad()
    def scores(self, prompt: list[int], completion: list[int], log_w: torch.Tensor) -> Scores:
        """Scores of a completion, from one pass of each trunk. log_w (K,): weights before its first token.
        Raises: ValueError if prompt and completion do not fit the context."""
        if not prompt or len(prompt) + len(completion) > self.context:
            raise ValueError(f"got a prompt of {len(prompt)} and a completion of {len(completion)} tokens; wanted a "
                             f"prompt, and at most {self.context} tokens together")
        logps = {}
        for trunk in self.trunks:
            logps.update(self.logps_on(trunk, prompt, completion))
        of_experts = torch.stack([logps[f"expert-{k}"] for k in range(self.K)], dim=1)      # (T,K)
        after = torch.cat([of_experts, of_experts.new_zeros(1, self.K)])                    # (T+1,K)
        posterior = prefix_log_weights(log_w.float().cpu(), after).exp().tolist()           # M14
        return Scores(token_texts(self.tokenizer, completion), {name: logps[name].tolist() for name in self.names},
                      posterior)

    def logps_on(self, trunk: Trunk, prompt: list[int], completion: list[int]) -> dict[str, torch.Tensor]:
        """policy -> log-probs (T,) of the completion's tokens, of the policies on this trunk, on the CPU."""
        here = {name: policy for name, policy in self.policies.items() if policy.trunk is trunk}
        adapters = list(dict.fromkeys(policy.adapter for policy in here.values()))
        device, T = trunk.model.unembedding.device, len(completion)
        ids = torch.tensor(prompt + completion, device=device).expand(len(adapters), -1)
        states = trunk(ids, adapters)[:, len(prompt) - 1 : len(prompt) + T - 1]             # (adapters,T,C)
        targets = ids[0, len(prompt) :]
        return {name: token_logps(turned(states[adapters.index(policy.adapter)], policy), policy.head, targets).cpu()
                for name, policy in here.items()}


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each id; joined they are tokenizer.decode(ids). A character of several tokens belongs to the last of
    them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = [decoder.decode(tokenizer.vocabulary.names.get(i, b"\xef\xbf\xbd")) for i in ids]
    rest = decoder.decode(b"", final=True)
    return pieces if not pieces else [*pieces[:-1], pieces[-1] + rest]


# --- which runs -------------------------------------------------------------------------------------------------------


def choices(path: Path) -> list[Path]:
    """The runs that could be served, the best one first: the run `path`; or of a folder the mixtures by name, or else
    the runs with one expert, `dpo` first. Raises: InputError if there is no run."""
    found = find_runs(path)
    mixtures = [each for each in found if (config := config_of(each)) and config.experts > 1]
    return mixtures or sorted(found, key=lambda each: each.name != "dpo")   # found is sorted by name


def load_first(paths: list[Path], device: str, data_folder: str) -> Run:
    """The first of these runs that is finished; the others are printed. Raises: InputError."""
    for n, path in enumerate(paths):
        try:
            run = load_run(path, device, data_folder)
        except Unfinished as error:
            if path == paths[-1]:
                raise
            print(f"warning: {error}. It is skipped")
            continue
        if others := [each.name for each in paths[n + 1 :]]:
            print(f"serving {run.name}; give the folder of another run to serve it: {', '.join(others)}")
        return run
    raise AssertionError("got no runs")


def config_of(path: Path) -> TrainConfig | None:
    """A run's options; None if they cannot be read."""
    try:
        return configs.load(TrainConfig, path / "config.json", report=lambda line: None)
    except (InputError, OSError):
        return None


def dpo_beside(run: Run) -> Path | None:
    """The run with one expert in the same folder that was trained on the same pairs, from the same model, with the same
    lengths and dtype; `dpo` before others. None if there is none, or if the run has one expert itself."""
    same, found = ("data", "columns", "model", "max_prompt", "max_response", "dtype"), []
    for path in find_runs(run.path.parent) if run.config.experts > 1 else []:
        config = config_of(path)
        if config and config.experts == 1 and all(getattr(config, n) == getattr(run.config, n) for n in same):
            found.append(path)
    return min(found, key=lambda path: (path.name != "dpo", path.name), default=None)


def load_dpo(path: Path | None, device: str, data_folder: str) -> Run | None:
    """The DPO run beside a mixture. One that cannot be used is reported and left out."""
    try:
        return load_run(path, device, data_folder) if path is not None else None
    except InputError as error:
        print(f"warning: {error}. The run is served without it")
        return None


def references_of(run: Run, device: str) -> list[Transformer]:
    """What the experts began as: one model, or that of each; from memory where the run keeps it frozen."""
    if isinstance(run.experts, Adapters):
        return [without_adapters(run.experts)]
    if isinstance(run.experts, Heads) and not run.config.train_trunk:
        return [run.experts.trunk]
    return [model.requires_grad_(False) for model in load_references(run.config, device)[0]]
