"""A frozen projection with low-rank adapters, in the least number of passes over the rows.

    y = x W^T + b + (s x A^T) B^T           groups of rows, each with its own A and B

Autograd's own form makes each product a batched one, of which the gradient of B is slow on a CPU, and adds the two
terms in a pass of its own. Here all products are two-dimensional, and the adapter's are added to the output in place.
The frozen W is cast to the compute dtype once, and not in every forward pass. Left out: second derivatives.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mixdpo.fast.casts import cast_once


def low_rank_linear_reference(x, W, bias, A, B, scale):
    """x (...,in), W (out,in), bias (out,) or None, A (G,R,in), B (G,out,R) -> (...,out). The rows of x are G groups,
    one after another. scale: a number; or (K,R), for each Kth of the rows of a group."""
    y, rows = F.linear(x, W, bias), x.reshape(len(A), -1, x.shape[-1])      # (G,n,in)
    return y + (scaled(rows @ A.mT, scale) @ B.mT).view(y.shape)


def scaled(u, scale):
    """scale * u, u (...,n,R), in the dtype of u; scale is multiplied with in its own, since 2/3 is no bfloat16."""
    if not isinstance(scale, torch.Tensor):
        return scale * u
    return (u.unflatten(-2, (len(scale), -1)) * scale[:, None]).flatten(-3, -2).to(u.dtype)


def low_rank_linear(x, W, bias, A, B, scale):
    """Equals low_rank_linear_reference, but the sum is rounded once; W and bias are frozen: they get no gradient."""
    if torch.compiler.is_compiling():                                       # the compiler joins the passes by its rules
        return low_rank_linear_reference(x, W, bias, A, B, scale)
    assert not W.requires_grad and (bias is None or not bias.requires_grad), "W or its bias learns, want both frozen"
    dtype, rows = compute_dtype_of(x), x.reshape(len(A), -1, x.shape[-1])   # (G,n,in)
    W, bias = cast_once(W, dtype), None if bias is None else cast_once(bias, dtype)
    return LowRankLinear.apply(rows.to(dtype), W, bias, A.to(dtype), B.to(dtype), scale).view(*x.shape[:-1], len(W))


def compute_dtype_of(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies x: autocast's, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class LowRankLinear(torch.autograd.Function):
    """low_rank_linear of rows (G,n,in), all in one dtype but for the scale: -> (G,n,out)."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale):
        y = F.linear(x, W, bias)                                            # (G,n,out)
        u = torch.stack([scaled(rows @ a.T, scale) for rows, a in zip(x, A)])              # (G,n,R)
        for out, rows, b in zip(y, u, B):
            out.addmm_(rows, b.T)
        ctx.save_for_backward(x, W, A, B, u)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):                                                # (G,n,out)
        x, W, A, B, u = ctx.saved_tensors
        grad = grad.contiguous()
        d_x = grad @ W if ctx.needs_input_grad[0] else None                 # no input of the first block needs it
        d_A, d_B = torch.empty_like(A), torch.empty_like(B)
        for k, (g, rows) in enumerate(zip(grad, x)):
            d_u = scaled(g @ B[k], ctx.scale)                               # (n,R)
            torch.mm(d_u.T, rows, out=d_A[k])
            torch.mm(g.T, u[k], out=d_B[k])
            if d_x is not None:
                d_x[k].addmm_(d_u, A[k])
        return d_x, None, None, d_A, d_B, None
