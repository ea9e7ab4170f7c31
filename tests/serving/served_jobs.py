"""Folders of tiny finished runs, to be served: each kind of experts, and DPO beside them. Tests import the fixtures
`made`, `mixture` and `served`."""

import pytest
import tinyjob

import train
from mixdpo.serving.policies import ServedRun

SPECIAL = ("<end>", "<|im_start|>", "<|im_end|>")                           # the tokenizer then has a chat template
MIXTURES = {                                                                # each in a folder of its own, beside `dpo`
    "heads": dict(rank=2),
    "full": dict(rank=0),
    "frozen": dict(rank=2, train_trunk=False),
    "lora": dict(sharing="lora", rank=2, shared_rank=1),
    "models": dict(sharing="models"),
}
DPO = {"lora": dict(sharing="lora"), "frozen": dict(train_trunk=False)}     # others: all parameters


def make_folder(folder, kind, special=SPECIAL, model=None, records=None, **options):
    """A folder with a mixture of this kind, whose name is the kind's, and a DPO run; returns the mixture's path."""
    model = model or tinyjob.make_model(folder / "model", special=special, scale=8.0)
    data = tinyjob.write(folder / "train.jsonl", records or tinyjob.make_records(users=6, each=4))
    common = dict(model=str(model), data=data, beta=0.5, epochs=3, max_prompt=12, max_response=10)
    for name, own in ((kind, dict(latent="user") | MIXTURES[kind] | options),
                      ("dpo", dict(experts=1) | DPO.get(kind, {}))):
        used = tinyjob.small(**common | own)
        rates = {rate: value for rate, value in dict(lr=0.02, head_lr=0.1).items() if rate in used}
        train.run(train.TrainConfig(out=str(folder / name), **used | rates))
    return folder / kind


class Made:
    """The folder of each kind, made once for all tests; nothing may be written into it."""

    folders, loaded = {}, {}

    def __init__(self, factory):
        self.factory = factory

    def path(self, kind):
        """Of the mixture."""
        if kind not in self.folders:
            self.folders[kind] = make_folder(self.factory.mktemp(kind), kind)
        return self.folders[kind]

    def served(self, kind):
        if kind not in self.loaded:
            self.loaded[kind] = ServedRun.load(self.path(kind))
        return self.loaded[kind]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return Made(tmp_path_factory)


@pytest.fixture(params=MIXTURES)
def mixture(request, made):
    """The path of a mixture of each kind."""
    return made.path(request.param)


@pytest.fixture(params=MIXTURES)
def served(request, made):
    """A served run of each kind."""
    return made.served(request.param)
