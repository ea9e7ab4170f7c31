"""The bench's own arithmetic: what it calls reached and peak memory, and that it runs. Its results are no test."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixdpo.config import InputError
from mixdpo.text.tokenizer import load_tokenizer
from tests.bench import exchange, gpu, llama, memory, parts, step, variants


def row(cpu, wall, used=None):
    return {"cpu": cpu, "wall": wall, "memory": used and {"step": used}}


def test_a_target_is_reached_by_every_clock_or_missed():
    """Seen to fail with: base / row instead of row / base, the better of two clocks deciding, `<` for `at most`."""
    rows = {"k1": row(1.0, 1.25, 100.0), "trl": row(4.0, 3.125), "k4-low-rank": row(1.5, 1.0),
            "plain": row(9, 9, 160.0)}
    found = {(t["row"], t["base"], t["figure"]): (t["ratio"], t["reached"]) for t in step.ratios(rows)}
    assert found["k1", "trl", "time"] == ({"cpu": 0.25, "wall": 0.4}, True)
    assert found["k4-low-rank", "k1", "time"] == ({"cpu": 1.5, "wall": 0.8}, False)
    assert found["k1", "plain", "memory"] == ({"step": 0.625}, False)
    assert len(found) == 4, "a target is judged only where both of its rows were measured"


@pytest.mark.skipif(not memory.measurable("cpu"), reason="peak memory of a CPU process is read from Linux's /proc")
def test_peak_memory_is_that_of_the_step():
    """Seen to fail with: the high-water mark not reset (200 MB came before), memory in use in place of its peak."""
    torch.full((50_000_000,), 1.0)
    level = memory.now("cpu")
    assert memory.peak_of(lambda: torch.full((25_000_000,), 1.0), "cpu") - level == pytest.approx(100, abs=10)


def test_a_quick_run_prints_a_table_and_writes_every_sample(tmp_path, monkeypatch, capsys):
    """Seen to fail with: a missing package that stops the run, samples of one variant only, a step that is not DPO."""
    lacking = dataclasses.replace(variants.VARIANTS["trl"], needs=("no_such_package",))
    monkeypatch.setitem(parts.ROWS, "trl", lacking)
    out = tmp_path / "runs" / "bench.json"
    words = "--sizes quick --rounds 2 --variants k1,k4-full,plain,em,head-kept,trl --memory false --exchange false"
    step.main([*words.split(), "--out", str(out)])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert list(result["rows"]) == ["k1", "k4-full", "plain", "em", "head-kept"]
    assert result["skipped"] == {"trl": ["no_such_package"]}
    assert "TRL DPOTrainer, default" in printed and "no_such_package not installed" in printed
    for figures in result["rows"].values():
        assert len(figures["samples"]["cpu"]) == len(figures["samples"]["wall"]) == 2 and figures["cpu"] > 0
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert set(result["roofline"]["rows"]) == {"k1", "k4-full", "head-kept"} and "GFLOP" in printed


def test_counted_flops_are_those_that_torch_counts(tmp_path):
    """A step's, but for causal attention's half and what the shared prompt saves nothing on; a head's, to the digit.
    Seen to fail with: response tokens of one side, one head of four, 2 for 6."""
    setting = variants.make_setting(variants.QUICK, tmp_path)
    for name, slack in (("head-products", 0.0), ("head-kept", 0.0), ("k1", 0.12), ("k4-full", 0.12),
                        ("k4-models", 0.12)):
        made = parts.ROWS[name].build(setting)
        with FlopCounterMode(display=False) as counter:
            made.step()
        assert abs(made.flops / counter.get_total_flops() - 1) <= slack, name


@pytest.mark.skipif(not memory.measurable("cpu"), reason="peak memory of a CPU process is read from Linux's /proc")
def test_memory_of_a_variant_is_measured_in_its_own_process(tmp_path):
    """Seen to fail with: state counted without the optimizer's moments."""
    setting = variants.make_setting(variants.QUICK, tmp_path)
    used = memory.measure("k1", tmp_path, variants.QUICK, "cpu")
    model = variants.load_model(setting.directory)
    assert used["state"] * 1e6 == 16 * sum(p.numel() for p in model.parameters()) and 0 < used["step"] < used["level"]


def test_exchanges_are_counted_and_timed_in_processes_of_their_own(tmp_path):
    """Seen to fail with: the bytes of all steps."""
    variants.make_setting(variants.QUICK, tmp_path)
    found = exchange.measure(tmp_path, variants.QUICK, 2)
    trained = {"k1": sum(p.numel() for p in variants.load_model(tmp_path).parameters()),
               "k4-adapters": 2 * 4 * 2 * (32 + 96)}                        # layers, K, rank, the sides of c_attn
    for (name, (alone, two)), K in zip(found.items(), (1, 4)):
        assert (alone["bytes"], alone["floor"], alone["cpu_share"], alone["wall_share"]) == (0, 0, 0.0, 0.0)
        assert two["floor"] == 4 * trained[name] + 8 * K * 1.5              # 3 pairs: one process has 2, the other 1
        assert two["bytes"] == 4 * trained[name] + (8 * K + 16) * 2         # each sends the rows of 2
        assert 0 < two["cpu_share"] < 1 and 0 < two["wall_share"] < 1 and two["processes"] == 2
    assert "K=4, adapters" in (text := exchange.table(found)) and len(text.splitlines()) == 5


def test_waiting_is_no_exchange(monkeypatch):
    """Seen to fail with: waiting that counts as exchange."""
    import torch.distributed as dist

    now = iter([(0.0, 0.0), (1.0, 10.0), (3.0, 15.0)])
    for operation in ("all_reduce", "all_gather"):
        monkeypatch.setattr(dist, operation, lambda *_: None)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(exchange, "clocks", lambda: next(now))
    found = exchange.Exchanges()
    dist.all_gather([], torch.zeros(3, 2))
    assert (found.bytes, found.waited, found.taken) == (24, [1.0, 10.0], [2.0, 5.0])


def test_everything_for_a_gpu_runs_on_a_cpu_in_tiny_sizes(tmp_path, monkeypatch):
    """The command that a GPU is lent for must not fail there for want of a run. Seen to fail with: a row that is named
    but not built, a figure of another row."""
    monkeypatch.setattr(gpu.step, "missing", lambda name: ["none"] if parts.ROWS[name].needs else [])
    out, figures = tmp_path / "h100.md", tmp_path / "h100.json"
    gpu.main(f"--device cpu --quick true --rounds 1 --out {out} --figures {figures}".split())
    found, text = json.loads(figures.read_text()), out.read_text()
    assert list(found["parts"]) == ["gpt2-64", "gpt2-4", "llama-1b"] and "Skipped: TRL DPOTrainer" in text
    for part in found["parts"].values():
        assert all(f"| {parts.ROWS[row].title} |" in text for row in part["rows"])
    assert found["parts"]["llama-1b"]["memory"]["k4-models-lean"]["step"] > 0 and "at its peak" in text


def test_a_step_on_a_model_of_another_shape_by_the_program_itself(capsys):
    """Seen to fail with: an option of train.py that is no more, a figure of another line."""
    try:
        load_tokenizer("llama-3.2-1b")
    except InputError as error:
        pytest.skip(f"its vocabulary is not at hand: {error}")
    llama.main(["--quick", "true"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [name for name, *_ in rows] == list(llama.RUNS)
    for _, estimate, highest, seconds, loss in rows:
        assert float(estimate) > 0 and float(highest) > 0.1 and float(seconds) > 0 and loss == "0.6931"
