"""data/experiment/finetune.py on a tiny corpus. Docstrings name the faults that each test was seen to fail on."""

import json
import math
import os
import signal

import pytest
import tinyjob
import torch
from raising import raises_at

from data.experiment import finetune as module
from data.experiment.finetune import FinetuneConfig, finetune, read_blocks
from mixdpo.config import Stopped
from mixdpo.models.weights import load_model
from mixdpo.text.tokenizer import load_tokenizer

TEXTS = [{"text": f"the {animal} sat on the {place}. " * 3}
         for animal in ("cat", "dog", "cow") for place in ("mat", "sofa", "roof")]


def tune(folder, model, texts=TEXTS, **options):
    sizes = dict(steps=12, batch=4, tokens=24, held=4, lr=1e-2, dtype="float32")
    paths = dict(data=tinyjob.write(folder / "reviews.jsonl", texts), model=str(model), out=str(folder / "tuned"))
    return finetune(FinetuneConfig(**paths | sizes | options))


def slow_perplexity(model, blocks):
    """From full logits: exp of the mean negative log-prob of all tokens but the first of each block."""
    with torch.no_grad():
        logps = torch.log_softmax(model(blocks) @ model.unembedding.T, -1)[:, :-1]
    return math.exp(-logps.gather(2, blocks[:, 1:, None]).mean().item())


def test_perplexity_falls_on_held_out_blocks_and_both_figures_are_true(tmp_path, model_dir):
    """Faults: the loss's sign; the model saved before training; perplexity on trained blocks; a sum for the mean;
    the shift by one left out."""
    out = tune(tmp_path, model_dir)
    report, tokenizer = json.loads((out / "finetune.json").read_text()), load_tokenizer(out)
    held = read_blocks(tmp_path / "reviews.jsonl", tokenizer, 24)[-4:]
    assert report["perplexity_before"] == pytest.approx(slow_perplexity(load_model(model_dir), held), rel=1e-4)
    assert report["perplexity_after"] == pytest.approx(slow_perplexity(load_model(out), held), rel=1e-4)
    assert report["perplexity_after"] < 0.2 * report["perplexity_before"]
    assert tokenizer.key == load_tokenizer(model_dir).key and tokenizer.eos == tinyjob.EOS


def test_held_out_blocks_are_never_trained_on(tmp_path, model_dir, monkeypatch):
    """Fault: batches drawn from all blocks. And every other block is: none twice before all once."""
    seen, real = [], module.block_logps

    def watched(policy, ids):
        if torch.is_grad_enabled():
            seen.extend(map(tuple, ids.tolist()))
        return real(policy, ids)

    monkeypatch.setattr(module, "block_logps", watched)
    texts = [{"text": "".join(chr(33 + (n * 7 + i * (n + 1)) % 90) for i in range(24 * 2 - 1))} for n in range(10)]
    tune(tmp_path, model_dir, texts, steps=4)
    blocks = list(map(tuple, read_blocks(tmp_path / "reviews.jsonl", load_tokenizer(model_dir), 24).tolist()))
    assert len(set(blocks)) == 20 and set(seen) == set(blocks[:-4]) and len(seen) == 16


def test_texts_are_joined_with_an_end_token_behind_each(tmp_path, model_dir):
    """Faults: no end token; the last, shorter block padded."""
    path = tinyjob.write(tmp_path / "t.jsonl", [{"text": "abc"}, {"text": "de"}, {"text": "fghi"}])
    want = [[97, 98, 99, tinyjob.EOS, 100], [101, tinyjob.EOS, 102, 103, 104]]
    assert read_blocks(path, load_tokenizer(model_dir), 5).tolist() == want


def test_an_unchanged_result_is_used_again_and_a_changed_one_is_made_anew(tmp_path, model_dir, monkeypatch):
    """Faults: always tuned again; other data or steps under the same name taken for the same;
    a report that outlives its model."""
    out = tune(tmp_path, model_dir)
    written = (out / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(module, "minimise", lambda *_, **__: pytest.fail("tuned again"))
    assert tune(tmp_path, model_dir) == out and (out / "model.safetensors").stat().st_mtime_ns == written
    monkeypatch.undo()
    tune(tmp_path, model_dir, TEXTS[::-1])
    again = (out / "model.safetensors").stat().st_mtime_ns
    assert again > written
    monkeypatch.setattr(module, "save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, model_dir, TEXTS[::-1], steps=2)
    assert not (out / "finetune.json").exists()                 # or the next call would take what lies there for whole


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, model_dir, monkeypatch, capsys):
    """Faults: moments or the order of blocks lost; the schedule begun anew; another configuration's checkpoint used;
    a checkpoint left behind."""
    folders = {name: tmp_path / name for name in ("whole", "cut")}
    for folder in folders.values():
        folder.mkdir()
    whole = load_model(tune(folders["whole"], model_dir, steps=9)).state_dict()
    real, steps = module.minimise, []

    def stops(*args, **options):
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(None)
        return real(*args, **options)

    for options in ({"lr": 3e-3}, {}):                                      # the first is another configuration's
        steps.clear()
        monkeypatch.setattr(module, "minimise", stops)
        with pytest.raises(KeyboardInterrupt):
            tune(folders["cut"], model_dir, save_minutes=0.0, **{"steps": 9} | options)
        assert "resumed" not in capsys.readouterr().out and not (folders["cut"] / "tuned").exists()
    monkeypatch.undo()
    out = tune(folders["cut"], model_dir, steps=9)
    assert "resumed at step 5 of 9" in capsys.readouterr().out
    for name, value in load_model(out).state_dict().items():
        assert torch.equal(value, whole[name]), name
    assert sorted(path.name for path in folders["cut"].iterdir()) == ["reviews.jsonl", "tuned"]


def test_a_stop_saves_after_the_step(tmp_path, model_dir, monkeypatch):
    """Caught: a signal that waits for the end; nothing saved; another result."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = load_model(tune(tmp_path / "whole", model_dir, steps=6)).state_dict()
    real, steps = module.minimise, []

    def signalled(*args, **options):
        steps.append(None)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(module, "minimise", signalled)
    with pytest.raises(Stopped, match="tuned: stopped and saved after step 3 of 6"):
        tune(tmp_path / "cut", model_dir, steps=6)
    found = load_model(tune(tmp_path / "cut", model_dir, steps=6)).state_dict()
    assert len(steps) == 6 and all(torch.equal(whole[name], value) for name, value in found.items())


def test_a_stopped_tuning_does_not_go_on_in_another_dtype(tmp_path, model_dir, monkeypatch, capsys):
    """--dtype auto on two machines: it begins anew. Catches: the word compared and not what it stands for."""
    real, calls = module.minimise, []

    def stopped(*args, **options):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(module, "minimise", stopped)
    monkeypatch.setattr(module, "compute_dtype", lambda *_: (torch.float32, "so it is here"))
    with pytest.raises(Stopped):
        tune(tmp_path, model_dir, steps=6, dtype="auto")
    monkeypatch.setattr(module, "compute_dtype", lambda *_: (torch.bfloat16, "so it is here"))
    tune(tmp_path, model_dir, steps=6, dtype="auto")
    assert len(calls) == 3 + 6 and "resumed" not in capsys.readouterr().out


def test_other_weights_under_the_same_name_are_tuned_anew(tmp_path):
    """Fault: a model known by its name alone."""
    model = tinyjob.make_model(tmp_path / "model", seed=0)
    before = json.loads((tune(tmp_path, model, steps=1) / "finetune.json").read_text())
    tinyjob.make_model(tmp_path / "model", seed=1)
    after = json.loads((tune(tmp_path, model, steps=1) / "finetune.json").read_text())
    assert before["settings"]["model"] == after["settings"]["model"]
    assert before["perplexity_before"] != after["perplexity_before"]


@pytest.mark.parametrize("line", ['{"text": 3}', '{"review": "x"}', '["x"]', '{"text": "x"'])
def test_lines_that_hold_no_text_are_refused(line, tmp_path, model_dir):
    """Faults: a line skipped in silence; a traceback for what is no JSON."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "abc"}\n' + line + "\n")
    with raises_at(line, file=path, line=2):
        read_blocks(path, load_tokenizer(model_dir), 5)


def test_too_few_texts_and_nan_are_refused_and_nothing_is_saved(tmp_path, model_dir):
    """Faults: an endless loop over too few blocks; a NaN model saved."""
    with raises_at("3 blocks of 24", 8, file=tmp_path / "reviews.jsonl"):
        tune(tmp_path, model_dir, TEXTS[:1])
    with raises_at("step 1", "nan", "--lr", file=tmp_path / "reviews.jsonl"):
        tune(tmp_path, model_dir, lr=1e30, steps=3)
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("option, values", [
    ("steps", [0, -1]), ("batch", [0, -2]), ("held", [0, -1]), ("tokens", [0, 1]), ("seed", [-1, 2**32]),
    ("lr", [0.0, -1.0, math.nan, math.inf]), ("save_minutes", [-1.0, math.nan]), ("dtype", ["float64"]),
])
def test_options_out_of_range_are_refused(option, values, tmp_path, model_dir):
    """Faults: no block held out, read as all held out; blocks of one token, which predict nothing; a traceback."""
    for value in values:
        with raises_at(option=option):
            tune(tmp_path, model_dir, **{option: value})
        assert not (tmp_path / "tuned").exists()


def test_a_model_is_not_tuned_over_another(tmp_path, model_dir, monkeypatch):
    """Faults: a model written over by the one that is tuned from it, or by one of other texts; a folder that was begun
    and not finished refused afterwards."""
    other = tinyjob.make_model(tmp_path / "model")
    texts = tinyjob.write(tmp_path / "reviews.jsonl", [{"text": text} for text in TEXTS])
    before = {path: path.read_bytes() for path in other.iterdir()}
    for model, out in ((other, other), (model_dir, other), (other, tmp_path)):
        with raises_at(option="out"):
            module.finetune(FinetuneConfig(texts, str(model), str(out)))
    assert {path: path.read_bytes() for path in other.iterdir()} == before
    save = module.save_model
    monkeypatch.setattr(module, "save_model", lambda *at: (save(*at), (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, model_dir)
    monkeypatch.undo()
    assert not (tune(tmp_path, model_dir) / "unfinished.json").exists()
