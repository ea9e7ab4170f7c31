"""A whole job small enough for seconds: a random model of width 16, a tokenizer of one token a byte,
preferences of a few letters."""

import json

import numpy as np
import torch

import train
from mixdpo.config import compute_dtype
from mixdpo.models.llama import Llama, LlamaConfig
from mixdpo.models.weights import save_model
from mixdpo.runs import setup
from mixdpo.runs.checkpoint import Stop, load_checkpoint
from mixdpo.text import bpe

EOS = 256
SMALL = dict(dtype="float32", rank=2, batch=8, micro=4, head_rows=12, lr=1e-3, head_lr=1e-2, warmup=1, start_steps=2,
             save_minutes=1e9)


def make_model(folder, seed=0, tied=True, context=64, scale=5.0, special=("<end>",), layers=2):
    """A Hugging Face directory: a Llama with 256 bytes and special tokens, the first of which ends a text, weights
    `scale` times those of a fresh one."""
    torch.manual_seed(seed)
    sizes = dict(width=16, inner=24, layers=layers, heads=2, kv_heads=1)
    model = Llama(LlamaConfig(vocab=EOS + len(special), context=context, tied=tied, eos=EOS, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.ndim > 1 else 1.0)  # at the usual 0.02 all texts are alike to so narrow a model
    save_model(model, folder)
    vocab = {bpe.to_name(bytes([b])): b for b in range(256)} | {name: EOS + n for n, name in enumerate(special)}
    (folder / "tokenizer.json").write_text(json.dumps(bpe.document(vocab, [*special], bpe.BYTE_LEVEL, [], False)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[0]}))
    return folder


def word(rng, letters, least=2, most=6):
    return "".join(rng.choice(list(letters), rng.integers(least, most + 1)))


def make_records(users=6, each=3, seed=0, letters=("abcd", "wxyz")):
    """Users of two kinds by turns: kind 0 chooses words of the first letters, kind 1 of the second. Lengths vary."""
    rng, records = np.random.default_rng(seed), []
    for n in range(users * each):
        user = n % users  # a user's lines do not stand together
        kind = user % 2
        texts = [word(rng, letters[kind]), word(rng, letters[1 - kind])]
        scores = {"first": [1.0 - kind, float(kind)], "second": [float(kind), 1.0 - kind]}
        records.append({"prompt": word(rng, "mnop", 1, 5), "chosen": texts[0], "rejected": texts[1], "user": f"u{user}",
                        "annotator": ("first", "second")[kind], "scores": scores})
    return records


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def small(**options):
    """SMALL and `options`, less what would have no effect beside them."""
    several, lora = options.get("experts", 2) > 1, options.get("sharing") == "lora"
    heads = lora or options.get("sharing", "heads") == "heads" and (several or not options.get("train_trunk", True))
    used = {"rank": heads, "head_lr": heads and options.get("rank", 2) > 0,
            "lr": not lora and (options.get("train_trunk", True) or options.get("rank", 2) == 0),
            "start_steps": several and options.get("start") != "none"
            and (options.get("start"), options.get("estep")) != ("linear", "context")}
    return {name: value for name, value in SMALL.items() if used.get(name, True)} | options


def run(folder, model, records, name="run", key=None, **options):
    """train.run on `records` in folder/NAME; returns the run's directory. key: of a private run."""
    data = folder / f"{name}.jsonl"
    if "data" not in options and not data.exists():
        write(data, records)
    paths = dict(data=str(data), model=str(model), out=str(folder / name))
    return train.run(train.TrainConfig(**paths | small(**options)), key)


def read(config):
    """The experts, the plan, the reference and the keys of a run that is not begun."""
    with Stop(config.out) as stop:
        found = setup.read(setup.Job(config, {}, stop, None), compute_dtype(config.dtype, "cpu")[0], "cpu")
    return *found[:3], found[4]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensors(folder):
    """The tensors of a run's checkpoint."""
    return load_checkpoint(folder, {})[0]


def equal(a, b, slack=0.0, only=""):
    """Whether two checkpoints hold the same tensors within `slack`; NaN is like NaN."""
    a, b = ({n: t for n, t in tensors(x).items() if n.startswith(only)} for x in (a, b))
    assert a and a.keys() == b.keys(), f"{sorted(a)} and {sorted(b)}"
    return all(torch.allclose(a[n], b[n], rtol=0, atol=slack, equal_nan=True) for n in a)
