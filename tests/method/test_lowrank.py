"""A frozen projection with low-rank adapters in one function, and frozen weights that are cast once."""

import pytest
import small
import torch
from torch import nn

from mixdpo.fast.casts import cast_linears, cast_once
from mixdpo.fast.lowrank import low_rank_linear, low_rank_linear_reference, scaled


def tensors(groups, bias, dtype=torch.float64, learns=True):
    """x (2*groups,3,5), W (4,5), a bias or None, A (groups,2,5), B (groups,4,2)."""
    generator = torch.Generator().manual_seed(groups)
    x, W, b, A, B = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (
        (2 * groups, 3, 5), (4, 5), (4,), (groups, 2, 5), (groups, 4, 2)))
    return x.requires_grad_(learns), nn.Parameter(W, False), nn.Parameter(b, False) if bias else None, *(
        p.requires_grad_() for p in (A, B))


def scales(groups):
    """A number; and one for each rank, of each half of the rows."""
    return [2.0, torch.tensor([[2.0, 1.0], [-2 / 3, 0.5]], dtype=torch.float64)]


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_values_and_gradients(groups, bias, learns):
    """In float64, against the plain form and autograd; and against finite differences.
    Catches: the adapter of another group, a scale left out of one gradient, a gradient of x that lacks the adapter's
    part, a view that is written to twice."""
    for scale in scales(groups):
        given = tensors(groups, bias, learns=learns)
        wanted = [x for x in given if x is not None and x.requires_grad]
        got, want = (f(*given, scale) for f in (low_rank_linear, low_rank_linear_reference))
        assert torch.allclose(got, want, atol=1e-13) and got.shape == (2 * groups, 3, 4)
        out = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
        for g, w in zip(*(torch.autograd.grad(y, wanted, out) for y in (got, want)), strict=True):
            assert torch.allclose(g, w, atol=1e-13) and w.abs().max() > 0.1
        assert torch.autograd.gradcheck(lambda *_: low_rank_linear(*given, scale), wanted)      # noqa: B023


def test_rounding_in_bfloat16():
    """Under autocast, errors against float64 are no larger than those of the plain form, and a scale is not rounded.
    Catches: a scale of 2/3 that is rounded to bfloat16; an output in float32."""
    scale = torch.tensor([[2.0, 2 / 3], [-2 / 3, 0.5]])
    u = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    each = torch.stack([u[:, n].double() * scale[n // 2].double() for n in range(4)], dim=1)
    assert torch.equal(scaled(u, scale), each.bfloat16())
    errors = []
    for form in (low_rank_linear, low_rank_linear_reference):
        total = 0.0
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            x, W, A, B = (torch.randn(shape, generator=generator) for shape in (
                (4, 8, 64), (48, 64), (1, 2, 64), (1, 48, 2)))
            truth = low_rank_linear_reference(*(t.double() for t in (x, W)), None, A.double(), B.double(),
                                              scale.double())
            with torch.autocast("cpu", torch.bfloat16):
                got = form(x, nn.Parameter(W, False), None, A, B, scale)
            assert got.dtype == torch.bfloat16
            total += float((got.double() - truth).pow(2).mean())
        errors.append(total)
    assert errors[0] <= errors[1]


def test_a_learning_projection_is_refused():
    """Catches: a W or a bias that silently gets no gradient."""
    x, W, b, A, B = tensors(1, True)
    for p in (W, b):
        p.requires_grad_()
        with pytest.raises(AssertionError, match="want both frozen"):
            low_rank_linear(x, W, b, A, B, 2.0)
        p.requires_grad_(False)


# --- casts ------------------------------------------------------------------------------------------------------------


def test_a_frozen_weight_is_cast_once():
    """Catches: a cast at every call, or one that is kept although the weight has changed, learns, or is none."""
    weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
    first = cast_once(weight, torch.bfloat16)
    assert cast_once(weight, torch.bfloat16) is first and torch.equal(first, weight.bfloat16())
    assert cast_once(weight, torch.float32) is weight
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(cast_once(weight, torch.bfloat16), weight.bfloat16())
    weight.data = torch.randn(3, 3)
    assert torch.equal(cast_once(weight, torch.bfloat16), weight.bfloat16())
    assert torch.equal(cast_once(weight, torch.float16), weight.half())
    weight.requires_grad_()
    assert cast_once(weight, torch.bfloat16).requires_grad
    plain = torch.randn(3, 3)
    cast_once(plain, torch.bfloat16)
    assert not hasattr(plain, "kept_cast")


@pytest.mark.parametrize("family", small.FAMILIES)
def test_a_twin_in_bfloat16_equals_the_model_to_the_bit(family):
    """Catches: an embedding or norm that is rounded too, a linear layer that is not, a copy of what is not cast, a
    tied unembedding that comes apart."""
    model, ids = small.model(family), torch.arange(1, 13).view(2, 6)
    twin = cast_linears(model, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(twin(ids), model(ids))
    assert torch.equal(twin.unembedding.bfloat16(), model.unembedding.bfloat16())
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for (name, p), own in zip(twin.named_parameters(), model.parameters(), strict=True):
        if own.ndim == 1 and p.dtype == own.dtype or name not in linear and own.ndim > 1:
            assert p.data_ptr() == own.data_ptr()
        else:
            assert p.dtype == torch.bfloat16 and own.dtype == torch.float32
    same = cast_linears(model, torch.float32)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(same.parameters(), model.parameters()))
