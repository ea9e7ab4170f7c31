"""Does the form of the texts give the choices away? A check before training: `python -m mixdpo.evaluation.leaks FILE`.

A file can be made so that chosen and rejected responses differ in form: one is always cut off, has the remains of a
template, or begins in another way. Any training then learns the form. Here a probe, a Bradley-Terry model of the
features below, is fitted to some prompts and predicts the choices on the others. What it finds is not always a fault:
people may prefer longer texts. The report therefore names the features, and the reader decides.

    length        log of the number of tokens                   cut off     no end token: longer than --max-response
    starts with   a space, capital, small letter, digit, other  ends with   . ! ?   a letter or digit   a space   other
    list          share of lines that begin a list              code        ``` in the text
    template      remains such as <|im_end|>, [INST], Human:    line break  any in the text
"""

import math
import re
from dataclasses import dataclass

import torch

from mixdpo.config import command, parse
from mixdpo.dpo import accuracy
from mixdpo.evaluation.statistics import mean_se
from mixdpo.linear import newton_step
from mixdpo.preferences import Pair, read_preferences
from mixdpo.text.chat import ends
from mixdpo.variants.rankings import as_pairs

TEMPLATE = re.compile(r"<\|\w+\|>|\[/?INST\]|<s>|</s>|<<SYS>>|\b(?:Human|Assistant|User|System):|###\s*(?:Instr|Resp)")
LISTED = re.compile(r"\s*(?:[-*•]|\d+[.)])\s")
STARTS = {"a space": str.isspace, "a capital": str.isupper, "a small letter": str.islower, "a digit": str.isdigit}
ENDS = {"a space": str.isspace, "a letter or digit": str.isalnum, "a full stop": ".".__eq__,
        "! or ?": "!?".__contains__}
FOLDS, RIDGE, STEPS = 5, 1.0, 8     # of the probe: folds of prompts, penalty, Newton steps
SMALLEST = 20       # pairs that differ in a feature that is named
SURE = 4.0          # standard errors above chance that are reported
LARGEST = 4000      # pairs that are looked at


@dataclass(frozen=True)
class Leak:
    """How well form predicts held-out choices."""

    accuracy: dict              # mean, se, n: of the probe with all features
    alone: dict[str, dict]      # feature -> the same for the sign of this feature, where the two responses differ

    @property
    def sure(self) -> bool:
        """Whether the probe is better than chance."""
        return self.accuracy["mean"] - 0.5 > SURE * self.accuracy["se"]

    def strongest(self) -> list[str]:
        """The three features that predict most choices, of those that are better than chance alone."""
        gain = {name: figure["n"] * (abs(figure["mean"] - 0.5) - SURE * figure["se"]) for name, figure in
                self.alone.items() if figure["n"] >= SMALLEST}
        return sorted((name for name in gain if gain[name] > 0), key=gain.__getitem__, reverse=True)[:3]


def features_of(text: str, tokens: int, cut: bool) -> dict[str, float]:
    """The form of a response."""
    first, last, rows = text[:1], text[-1:], text.split("\n")
    found = {"length": math.log(max(1, tokens)), "cut off": float(cut), "line break": float(len(rows) > 1),
             "list": sum(bool(LISTED.match(row)) for row in rows) / len(rows), "code": float("```" in text),
             "template": float(bool(TEMPLATE.search(text)))}
    found |= {f"starts with {name}": float(bool(first) and test(first)) for name, test in STARTS.items()}
    return found | {f"ends with {name}": float(bool(last) and test(last)) for name, test in ENDS.items()}


def find_leak(pairs: list[Pair], tokenizer) -> Leak | None:
    """The probe on these pairs; None if there are too few prompts."""
    pairs, end_ids = as_pairs(pairs, report=lambda line: None)[:LARGEST], ends(tokenizer)
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(tuple(pair.prompt) for pair in pairs))}
    prompt = torch.tensor([number[tuple(pair.prompt)] for pair in pairs])
    if len(number) < 2 * FOLDS:
        return None

    def form(ids: list[int]) -> dict[str, float]:
        cut = ids[-1] not in end_ids
        return features_of(tokenizer.decode(ids if cut else ids[:-1]), len(ids), cut)

    rows = [(form(pair.chosen), form(pair.rejected)) for pair in pairs]
    names = list(rows[0][0])
    x = torch.tensor([[a[name] - b[name] for name in names] for a, b in rows], dtype=torch.float64)     # (P,F)
    alone = {name: mean_se((column[column != 0] > 0).double(), prompt[column != 0].tolist())
             for name, column in zip(names, x.T) if (column != 0).any()}
    x = x / x.square().mean(0).sqrt().clamp_min(1e-9)
    fold_of = torch.randperm(len(number), generator=torch.Generator().manual_seed(0)) % FOLDS
    guess, even = x.new_empty(len(x)), x.new_ones(len(x))
    for fold in range(FOLDS):
        out, theta = fold_of[prompt] == fold, x.new_zeros(x.shape[1])
        for _ in range(STEPS):
            theta = newton_step(x[~out], even[~out], theta, RIDGE)
        guess[out] = x[out] @ theta
    return Leak(mean_se(accuracy(guess), prompt.tolist()), alone)


def describe_leak(pairs: list[Pair], tokenizer) -> list[str]:
    """A warning if the form predicts choices beyond chance; else nothing."""
    leak = find_leak(pairs, tokenizer)
    if leak is None or not leak.sure:
        return []
    found, named = leak.accuracy, [describe_feature(name, leak.alone[name]) for name in leak.strongest()]
    return [f"warning: the form of the responses alone predicts {found['mean']:.2f} ± {found['se']:.2f} of held-out "
            f"choices ({'; '.join(named) or 'no feature does alone'}). If people prefer it, nothing is wrong. If the "
            "file was made so, training learns this form: make both responses of a pair alike in it"]


def describe_feature(name: str, figure: dict) -> str:
    """A feature and how often it goes with the choice."""
    which, share = ("chosen", figure["mean"]) if figure["mean"] > 0.5 else ("rejected", 1 - figure["mean"])
    return f"{name}: more of it in the {which} response of {share:.2f} of {figure['n']} pairs that differ in it"


@dataclass(frozen=True)
class LeakConfig:
    """Tells how well the form of responses predicts which one was chosen."""

    data: str                   # preferences, as train.py --data; its flag may be omitted
    columns: str = ""           # which columns are which fields, as train.py --columns
    model: str = "smollm2"      # the model whose tokenizer is used, as train.py --model
    max_prompt: int = 256       # tokens of a prompt, as for train.py
    max_response: int = 256     # tokens of a response, as for train.py
    drop: bool = False          # skip faulty lines and list them
    data_folder: str = ""       # folder of local files that is searched before anything is downloaded


def main(argv: list[str]) -> None:
    """The command: prints the probe's accuracy, and that of each feature alone."""
    from mixdpo.text.tokenizer import load_tokenizer  # here, because only this command needs it

    flags = argv if argv and argv[0].startswith("-") else ["--data", *argv]
    config = parse(LeakConfig, flags, "python -m mixdpo.evaluation.leaks FILE")
    tokenizer = load_tokenizer(config.model, config.data_folder or None)
    pairs = read_preferences(config.data, tokenizer, config.max_prompt, config.max_response, config.drop,
                             columns=config.columns)
    leak = find_leak(pairs, tokenizer)
    if leak is None:
        print(f"fewer than {2 * FOLDS} prompts: too few to tell")
        return
    found = leak.accuracy
    print(f"form alone predicts {found['mean']:.3f} ± {found['se']:.3f} of held-out choices (chance 0.5)")
    print("\n".join(describe_feature(name, figure) for name, figure in leak.alone.items()))


if __name__ == "__main__":
    command(main)
