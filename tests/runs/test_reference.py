"""The cached reference: right, computed once, and never that of other weights, other data or a half-written file."""

import json
from pathlib import Path

import pytest
import small
import tinyjob
import torch

import train
from mixdpo.dpo import margins
from mixdpo.experts import pair_logp
from mixdpo.fast.packing import compact_rows
from mixdpo.preferences import collate
from mixdpo.runs import reference
from mixdpo.runs.reference import Reference, cached_reference, compute_reference

COUNT = 7


@pytest.mark.parametrize("family", small.FAMILIES)
def test_log_probs_and_features_text_by_text(family):
    """Each text alone, without padding, against the sum of its log-probs and the mean of the states
    that have read its response.
    Catches: features of the states that predict (one too early), of prompt or padding, a mean over the row,
    pairs in another order, the last incomplete batch lost."""
    model, pairs = small.model(family), small.pairs(COUNT)
    for size in (1, 3, 16):
        found = compute_reference(model, pairs, torch.float32, size=size)
        assert found.logp.shape == (COUNT, 1, 2) and found.features.shape == (COUNT, 2, 12)
        for n, pair in enumerate(pairs):
            for side, response in enumerate((pair.chosen, pair.rejected)):
                with torch.no_grad():
                    states = model(torch.tensor([pair.prompt + response]))[0]              # (T,C)
                logps = torch.log_softmax(states @ model.unembedding.detach().T, -1)
                start = len(pair.prompt)
                want = sum(float(logps[start + t - 1, id]) for t, id in enumerate(response))
                assert abs(float(found.logp[n, 0, side]) - want) < 1e-4
                assert torch.allclose(found.features[n, side], states[start:].mean(0), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    dict(experts=1), dict(experts=2, rank=0), dict(experts=2), dict(experts=2, sharing="models"),
    dict(experts=2, sharing="lora"),
], ids=str)
def test_the_same_call_as_the_policys(options, dtype):
    """On the same batch the policy's first margins are 0 to the bit, in either precision, and are float32; those
    of adapters, whose products have K times the rows, are 0 to rounding.
    Catches: a reference in another dtype, from other code, or in another order of sums."""
    pairs = small.pairs(COUNT)
    found = compute_reference(small.model(), pairs, dtype)
    assert found.logp.dtype == found.features.dtype == torch.float32 and not found.logp.requires_grad
    with torch.no_grad():
        logp = pair_logp(small.experts(moved=False, dtype=dtype, **options), collate(pairs, range(COUNT)), compact_rows)
    slack = 0.0 if options.get("sharing") != "lora" else 1e-5 if dtype == torch.float32 else 0.1
    assert margins(logp, found.logp, 0.5).abs().max() <= slack


def test_progress_and_parameters():
    """Catches: a pass that leaves gradients or marks on the model it reads; progress that does not end."""
    model, calls = small.model(), []
    before = [(p.clone(), p.requires_grad) for p in model.parameters()]
    compute_reference(model, small.pairs(COUNT), torch.float32, size=3, progress=lambda *call: calls.append(call))
    assert calls == [(3, COUNT), (6, COUNT), (7, COUNT)]
    for p, (b, r) in zip(model.parameters(), before):
        assert torch.equal(p, b) and p.requires_grad == r and p.grad is None


# --- the cache --------------------------------------------------------------------------------------------------------


def equal(a: Reference, b: Reference) -> bool:
    return torch.equal(a.logp, b.logp) and torch.equal(a.features, b.features)


def never():
    raise AssertionError("computed although it is in the cache")


def test_with_and_without_the_cache(tmp_path):
    """Bit for bit, and computed once.
    Catches: a cache that rounds, one that is never read, or one that is read for any key."""
    made = [compute_reference(small.model(seed=s), small.pairs(COUNT), torch.float32) for s in (0, 1)]
    for s in (0, 1):
        assert equal(cached_reference(tmp_path / "new" / "folder", ("weights", s), lambda s=s: made[s]), made[s])
    for s in (0, 1):
        assert equal(cached_reference(tmp_path / "new" / "folder", ("weights", s), never), made[s])
    assert cached_reference(tmp_path, ("a", "b"), lambda: made[0])
    assert equal(cached_reference(tmp_path, ("ab", ""), lambda: made[1]), made[1])


@pytest.mark.parametrize("moment", ["compute", "save", "rename"])
def test_a_half_written_file_is_never_used(moment, tmp_path, monkeypatch):
    """Killed at any moment, the next call computes afresh and gets it right.
    Catches: the file written under its own name, a leftover read back, a leftover in the way."""
    made = compute_reference(small.model(), small.pairs(COUNT), torch.float32)

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        if moment == "save":
            Path(args[1]).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment != "compute":
            patch.setattr("mixdpo.files.atomic." + ("save_file" if moment == "save" else "os.replace"), die)
        cached_reference(tmp_path, ("key",), die if moment == "compute" else lambda: made)
    assert not list(tmp_path.glob("*.safetensors"))
    assert equal(cached_reference(tmp_path, ("key",), lambda: made), made)
    assert equal(cached_reference(tmp_path, ("key",), never), made)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


# --- the key, as train.py makes it ------------------------------------------------------------------------------------


def prepared(folder, model, data, **options):
    """(reference, files in the cache) after train.py's preparation."""
    paths = dict(data=str(data), model=str(model), out=str(folder / "run"))
    config = train.TrainConfig(**paths | tinyjob.small(**options))
    reference = tinyjob.read(config)[2]
    return reference, len(list((folder / "cache").glob("*.safetensors")))


def test_whatever_changes_the_numbers_changes_the_key(tmp_path, model_dir, capsys):
    """One change at a time: weights, data, lengths, dropping, dtype, tokenizer each make a new entry;
    what cannot matter (experts, beta, seed, micro-batch) and the first one again find the old.
    Catches: any of them left out of the key; a key of file names."""
    data = tmp_path / "prefs.jsonl"
    records = tinyjob.make_records()
    tinyjob.write(data, records)
    first, count = prepared(tmp_path, model_dir, data)
    assert count == 1
    for options in (dict(experts=1), dict(beta=0.7, seed=3), dict(micro=1, head_rows=0), {}):
        again, count = prepared(tmp_path, model_dir, data, **options)
        assert count == 1 and equal(first, again)
    for n, options in enumerate([dict(max_prompt=2), dict(max_response=4), dict(drop=True), dict(dtype="bfloat16")]):
        assert prepared(tmp_path, model_dir, data, **options)[1] == 2 + n, options
    other, count = prepared(tmp_path, tinyjob.make_model(tmp_path / "other", seed=1), data)
    assert count == 6 and not equal(other, first)
    renamed = tinyjob.make_model(tmp_path / "renamed")                       # the same weights, two letters exchanged
    document = json.loads((renamed / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["w"] = vocab["w"], vocab["a"]
    (renamed / "tokenizer.json").write_text(json.dumps(document))
    spelt, count = prepared(tmp_path, renamed, data)
    assert count == 7 and not equal(spelt, first)
    tinyjob.write(data, records[::-1])                                       # under the same file name
    turned, count = prepared(tmp_path, model_dir, data)
    assert count == 8 and not torch.equal(turned.logp, first.logp)
    assert torch.allclose(turned.logp, first.logp.flip(0), atol=1e-4)
    copy = tinyjob.make_model(tmp_path / "copy")                             # the same bytes in another directory
    assert prepared(tmp_path, copy, data)[1] == 8


def test_states_of_a_frozen_trunk_stand_for_a_pass_through_it(monkeypatch):
    """Whatever pairs a batch holds, in any order, shared prompts or not: the same log-probs, and no pass. Catches:
    states of another pair, chosen and rejected exchanged, states that are kept however many they are, or never used."""
    pairs, experts = small.pairs(COUNT), small.experts(experts=2, train_trunk=False)
    model = small.model()
    found = compute_reference(model, pairs, torch.float32, size=3)
    known = found.with_states(pairs)
    assert known == pairs and all(p.states.shape == (len(p.chosen) + len(p.rejected), 12) for p in known)
    for index in (range(COUNT), [4, 1], [COUNT - 1]):
        want = pair_logp(experts, collate(pairs, list(index)))
        with monkeypatch.context() as patch:
            patch.setattr(type(experts), "hidden", never)
            got = pair_logp(experts, collate(known, list(index)))
        assert torch.allclose(got, want, atol=1e-5)
    some = [known[0], pairs[1]]
    assert collate(some, [0, 1]).states is None
    monkeypatch.setattr("mixdpo.runs.reference.STATES", 0)
    few = compute_reference(model, pairs, torch.float32)
    assert few.states.shape == (0, 12) and few.with_states(pairs) is pairs and torch.allclose(few.logp, found.logp)


# --- texts of earlier files -------------------------------------------------------------------------------------------


def counted_texts(monkeypatch):
    """A list to which each pass adds the number of its texts."""
    passes, real = [], reference.numbers_of

    def counted(policy, batch, texts, keep):
        passes.append(len(texts))
        return real(policy, batch, texts, keep)

    monkeypatch.setattr(reference, "numbers_of", counted)
    return passes


def test_texts_of_earlier_files_are_not_computed_again(tmp_path, model_dir, monkeypatch):
    """A file that repeats most texts of another: only the new ones pass, and the numbers equal those of a fresh pass.
    Catches: a text looked up by its place or without its prompt; states of another text; the earlier file's own entry
    replaced."""
    passes, records = counted_texts(monkeypatch), tinyjob.make_records()
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    tinyjob.write(first, records)
    swapped = [record | {"chosen": record["rejected"], "rejected": record["chosen"]} for record in records[::-2]]
    new = [record | {"prompt": "new" + record["prompt"]} for record in records[:1]]
    tinyjob.write(second, swapped + new)
    prepared(tmp_path, model_dir, first)
    assert sum(passes) == len({(r["prompt"], r[side]) for r in records for side in ("chosen", "rejected")})
    passes.clear()
    found, count = prepared(tmp_path, model_dir, second)
    assert passes == [2] and count == 2
    alone, _ = prepared(tmp_path / "alone", model_dir, second)
    for name, x in vars(found).items():
        assert x.shape == vars(alone)[name].shape and torch.allclose(x, vars(alone)[name], atol=1e-4), name


@pytest.mark.parametrize("options", [dict(dtype="bfloat16"), dict(max_response=4), dict(max_prompt=2)], ids=str)
def test_texts_of_another_context_are(options, tmp_path, model_dir, monkeypatch):
    """Catches: log-probs in another dtype, or of texts that were truncated to another length, taken for these."""
    passes, records = counted_texts(monkeypatch), tinyjob.make_records()
    data = tmp_path / "prefs.jsonl"
    tinyjob.write(data, records)
    prepared(tmp_path, model_dir, data)
    before = sum(passes)
    prepared(tmp_path, model_dir, data, **options)
    assert sum(passes) - before > 0.5 * before


def test_texts_of_other_weights_are(tmp_path, model_dir, monkeypatch):
    """Catches: log-probs of another model."""
    passes, data = counted_texts(monkeypatch), tmp_path / "prefs.jsonl"
    tinyjob.write(data, tinyjob.make_records())
    first, _ = prepared(tmp_path, model_dir, data)
    before = sum(passes)
    other, _ = prepared(tmp_path, tinyjob.make_model(tmp_path / "other", seed=1), data)
    assert sum(passes) == 2 * before and not torch.allclose(first.logp, other.logp, atol=0.1)


def test_a_damaged_file_of_texts_is_passed_over(tmp_path, model_dir, monkeypatch):
    """Catches: a run that ends at another run's damaged file, which it does not need."""
    passes, data = counted_texts(monkeypatch), tmp_path / "prefs.jsonl"
    tinyjob.write(data, tinyjob.make_records())
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / f"{'0' * 64}.safetensors").write_bytes(b"half a file")
    assert prepared(tmp_path, model_dir, data)[1] == 2 and passes
