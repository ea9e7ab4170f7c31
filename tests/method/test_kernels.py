"""mixdpo/fast/kernels.py: on a CUDA device as they are, elsewhere in Triton's interpreter (float32 and float16: its
bf16 is wrong). Compiled for the H100 without one. Skipped where there is no Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"                     # there conftest.py asks for the interpreter
pytest.importorskip("triton", reason="Triton is not installed")

from mixdpo.fast import kernels  # noqa: E402
from mixdpo.logprob import token_logps, token_logps_reference  # noqa: E402

SHAPES = [(1, 7, 37), (5, 24, 131), (70, 70, 257)]                          # N, C, V: multiples of nothing
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def draw(N, C, V, K=0, R=3, dtype=torch.float32, seed=0):
    """hidden, weight, low_rank or None, targets and coefficients of the log-probs; logits of deviation 2 or so."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)

    hidden, weight = normal(N, C), normal(V, C, scale=2 / C**0.5)
    low_rank = (normal(K, V, R, scale=0.5), normal(K, R, C, scale=1 / C**0.5)) if K else None
    targets = torch.randint(V, (N,), generator=generator).to(DEVICE)
    return hidden, weight, low_rank, targets, normal(max(K, 1), N).float()


def fused(hidden, weight, targets, low_rank):
    return kernels.FusedLogps.apply(hidden, weight, *(low_rank or (None, None)), targets)


def kept(hidden, weight, targets, low_rank):
    return kernels.KeptLogps.apply(hidden, weight, targets)


def run(function, hidden, weight, low_rank, targets, coefficients):
    """Log-probs (K,N) and the gradients of all inputs for sum(coefficients * log-probs)."""
    inputs = [x.detach().requires_grad_() for x in (hidden, weight, *(low_rank or ()))]
    logps = function(*inputs[:2], targets, tuple(inputs[2:]) or None)
    logps = logps.view(coefficients.shape)
    (logps * coefficients.to(logps)).sum().backward()
    return [logps.detach(), *(x.grad for x in inputs)]


def plain(hidden, weight, targets, low_rank):
    return token_logps_reference(hidden, weight, targets, low_rank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("function", "K"), [(fused, 0), (kept, 0), (fused, 1), (fused, 3)])
def test_numbers_and_gradients_are_those_of_the_plain_form(function, K, shape, dtype):
    """Error budget: no further from the truth (float64) than plain PyTorch in the same precision, but for rounding.
    Catches: padding of the vocabulary that counts, rows of the last block dropped, a part of the vocabulary left out of
    the sum, expert k's factors with expert j's, gradients of the factors overwritten instead of added."""
    drawn = draw(*shape, K, dtype=dtype)
    hidden, weight, low_rank, targets, coefficients = drawn
    exact = [x.double() if x is not None else None for x in (hidden, weight)]
    truth = run(plain, *exact, low_rank and tuple(x.double() for x in low_rank), targets, coefficients.double())
    got, same = run(function, *drawn), run(plain, *drawn)
    for name, want, ours, theirs in zip(("logps", "hidden", "weight", "A", "B"), truth, got, same):
        assert ours.dtype == (torch.float32 if name == "logps" else dtype)
        far, near = ((x.double() - want).norm() / want.norm() for x in (ours, theirs))
        assert far <= near + 4 * torch.finfo(dtype).eps, (name, float(far), float(near))


@pytest.mark.parametrize("K", [0, 2])
def test_the_vocabulary_may_be_cut_anywhere(K, monkeypatch):
    """Many parts and one, many chunks and one: the same. Catches: a part that begins inside another; a chunk's gradient
    in another's place; a buffer that still holds the chunk before."""
    drawn, found = draw(9, 16, 700, K), []
    for splits, chunk in ((1, 2**20), (1000, 2**20), (4, 1), (3, 9 * 4 * 256)):
        monkeypatch.setattr(kernels, "SPLITS", splits)
        monkeypatch.setattr(kernels, "CHUNK", chunk)
        found.append(run(fused, *drawn))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("K", [0, 2])
@pytest.mark.parametrize("splits", [1, 5])
def test_skipped_tiles_change_gradients_by_no_more_than_their_bound(K, splits, monkeypatch):
    """A vocabulary with few likely tokens: most tiles are skipped, and what is lost is within the bound, row by row and
    token by token; a threshold below every probability skips nothing and changes nothing. Catches: a tile with a target
    left out, a peak of other rows or another part, a bound on the part's own sum, one expert's peak for all, memory of
    a skipped tile that is read as it was."""
    monkeypatch.setattr(kernels, "SPLITS", splits)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(
        shape if isinstance(shape[0], int) else shape[0], torch.nan, **options))
    hidden, weight, low_rank, targets, coefficients = draw(70, 16, 700, K, dtype=torch.float32)
    hidden[:, 0], weight[:, 0] = 3.0, torch.linspace(2.0, -3.0, 700, device=DEVICE)        # likely ones first
    targets = targets % 100
    targets[0] = 690                                                        # in a tile that is skipped but for it
    if K:
        A, B = 0.1 * low_rank[0], low_rank[1]
        A[0, 650:660, 0], B[0, 0] = 5.0, torch.eye(16, device=DEVICE)[0]    # what one expert finds likely, at the end
        low_rank = A, B
    truth = run(fused, hidden, weight, low_rank, targets, coefficients)

    def skipping(skip):
        def function(hidden, weight, targets, low_rank):
            logps = kernels.FusedLogps.apply(hidden, weight, *(low_rank or (None, None)), targets, skip)
            wanted.append(logps.grad_fn.saved_tensors[-1])
            return logps

        return run(function, hidden, weight, low_rank, targets, coefficients)

    for skip in (1e-30, 1e-3):
        wanted = []
        got = skipping(skip)
        share = wanted[0].float().mean()
        assert share == 1 if skip < 1e-20 else share < 1 or K and splits > 1            # parts loosen the bound
        assert torch.equal(got[0], truth[0]) and all(x.isfinite().all() for x in got)
        g = coefficients.abs().sum(0)                                       # (N,)
        slack, lost = 1e-5, [(a - b).abs() for a, b in zip(got, truth)]
        of_rows, of_tokens = g[:, None] * weight.abs().sum(0), (g[:, None] * hidden.abs()).sum(0)
        if not K:                                                           # with factors, what these lose comes on top
            assert (lost[1] <= skip * of_rows + slack).all()
        assert (lost[2] <= skip * of_tokens + slack).all()
        assert skip > 1e-20 or all((x <= slack).all() for x in lost)


@pytest.mark.parametrize("function", [fused, kept])
def test_targets_outside_the_vocabulary_and_no_rows(function):
    """nan for the one, nothing for the other. Catches: a read out of bounds, a grid of 0 programs."""
    hidden, weight, _, targets, _ = draw(3, 8, 37)
    targets[0], targets[1] = -1, 37
    logps = function(hidden, weight, targets, None)
    assert logps[0].isnan().tolist() == [True, True, False]
    assert function(hidden[:0], weight, targets[:0], None).shape == (1, 0)


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_logits_of_any_size(scale):
    """Catches: exponentials that overflow, a largest logit that starts at 0."""
    hidden, weight, _, targets, _ = draw(6, 16, 300)
    for sign in (scale, -scale):
        want = plain((hidden * sign).double(), weight.double(), targets, None)
        for function in (fused, kept):
            torch.testing.assert_close(function(hidden * sign, weight, targets, None)[0].double(), want, rtol=1e-5,
                                       atol=1e-5)


def test_every_kernel_compiles_for_the_h100_without_spills():
    """In float32, bf16 and float16, at widths 768 and 2048, with and without four low-rank experts, skipping tiles or
    not; and no sum in the order in which programs end, so the same inputs give the same bits. In a process of its own:
    this one's kernels are interpreted."""
    code = Path(__file__).parents[1] / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(code.parents[1])
    done = subprocess.run([sys.executable, str(code)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = [dict(zip(*[iter(line.split()[-10:])] * 2)) for line in done.stdout.splitlines()]
    assert len(rows) == 42
    assert all(int(row["spilled"]) == 0 and int(row["shared"]) <= 227 * 1024 for row in rows), done.stdout
    assert all(int(row["atomics"]) == 0 for row in rows), done.stdout


@pytest.mark.parametrize(("tile", "K"), [(4096, 0), (None, 0), (4096, 3), (None, 3)])
def test_the_kernels_are_what_a_gpu_uses(tile, K, monkeypatch):
    """By the one function that everybody calls, 16-bit inputs on a GPU go through Triton, and get the same numbers.
    Catches: a route that is never taken, or taken where its dtype or device is not."""
    used = []
    for name in ("FusedLogps", "KeptLogps"):
        apply = getattr(kernels, name).apply
        monkeypatch.setattr(getattr(kernels, name), "apply",
                            lambda *inputs, apply=apply, name=name: used.append(name) or apply(*inputs))
    hidden, weight, low_rank, targets, _ = draw(5, 24, 131, K, dtype=torch.float16)
    want = token_logps_reference(hidden.double(), weight.double(), targets,
                                 low_rank and tuple(x.double() for x in low_rank))
    got = token_logps(hidden, weight, targets, low_rank, tile)
    torch.testing.assert_close(got.double(), want, rtol=5e-3, atol=5e-3)
    token_logps(hidden.float(), weight.float(), targets, low_rank and tuple(x.float() for x in low_rank), tile)
    assert used == ([] if DEVICE == "cpu" else ["KeptLogps" if tile is None and not K else "FusedLogps"])
