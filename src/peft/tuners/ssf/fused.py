"""Scaling and shifting as autograd functions that keep less.

The gradient of a scale needs the base layer's output y0, which nobody else keeps: `y = s y0 + t`, `ds = sum_n g y0`.

- `ScaleShift`, for any layer, keeps y0 in its own type. Written in torch's operations the step keeps a float32 copy of
  a half-precision output.
- `ScaledLinear`, for plain linear layers in full precision, keeps y and takes `y0 = (y - t) / s` from it. What comes
  next often keeps y too (an activation its input, a product its factors, attention its values, the next linear layer's
  adapter its input), and the two share the memory. Channels whose scale is too small to divide by are computed again
  from the layer's input, and so is the whole of y0 if y was changed in place; the input is kept as `recompute.keep`
  does it, mostly for nothing. Half precision has too few digits for the subtraction.

Letters: N rows, I in, O out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...utils.autocast import no_autocast
from ..ops import linear
from ..recompute import keep

# With |s| >= MIN_SCALE and |t| <= |s| / MIN_SCALE the division loses at most a factor 1 / (MIN_SCALE |y0|) of
# precision: 4 of float32's 7 digits remain for outputs of size 0.1.
MIN_SCALE = 2.0**-6


class ScaleShift(torch.autograd.Function):
    """`apply(y, s, t)`: an output, scale and shift in shapes that multiply it. The result has the type of `y`.

    It computes in the wider of the two types: bfloat16 would round a scale of 1.003 to 1.
    """

    @staticmethod
    def forward(ctx, y, s, t):
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, s)
        ctx.shapes = s.shape, t.shape
        return scale_shift(y, s, t)

    @staticmethod
    def backward(ctx, g):
        y, s = ctx.saved_tensors
        need_y, need_s, need_t = ctx.needs_input_grad
        wide = g.to(torch.promote_types(g.dtype, s.dtype))
        gy = (wide * s).to(g.dtype) if need_y else None
        gs = (wide * y).sum_to_size(ctx.shapes[0]).to(s.dtype) if need_s else None
        gt = wide.sum_to_size(ctx.shapes[1]).to(s.dtype) if need_t else None
        return gy, gs, gt


def scale_shift(y: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The same in torch's operations."""
    return torch.addcmul(t, y.to(torch.promote_types(y.dtype, s.dtype)), s).to(y.dtype)


class ScaledLinear(torch.autograd.Function):
    """`apply(x, W, b, s, t)`: (..., I), (O, I), (O) or None, (O), (O), of one type; `W` gets no gradient."""

    @staticmethod
    def forward(ctx, x, W, b, s, t):
        y = linear(x, W, b).mul_(s).add_(t)
        if y.is_inference():  # there will be no backward pass
            return y
        parts, ctx.recipe = keep(x, counted=False) if ctx.needs_input_grad[3] else ([], None)
        # Under a version counter of its own: to autograd a change of y in place would be an error, here it costs a
        # product. `watched` has y's counter and none of its memory.
        kept, ctx.watched = y.data, y.detach()
        ctx.watched.data = y.new_empty(0)
        ctx.version = y._version
        ctx.save_for_backward(W, b, s, t, kept if parts else None, *parts)
        return y

    @staticmethod
    def backward(ctx, g):
        W, b, s, t, y, *parts = ctx.saved_tensors
        need_x, _, need_b, need_s, need_t = ctx.needs_input_grad
        with no_autocast(g.device.type):
            rows = g.reshape(-1, g.shape[-1])  # (N, O)
            total = rows.sum(0) if need_b or need_t else None
            gs = None
            if need_s and (torch.is_grad_enabled() or ctx.watched._version != ctx.version):
                y0 = F.linear(ctx.recipe(parts), W, b)
                gs = (rows * y0.reshape(rows.shape)).sum(0)
            elif need_s:
                gs = torch.sub(y.reshape(rows.shape), t).mul_(rows).sum(0).div_(s)
                small = ((s.abs() < MIN_SCALE) | (s.abs() < MIN_SCALE * t.abs())).nonzero().squeeze(1)
                if len(small):
                    y0 = F.linear(ctx.recipe(parts), W[small], None if b is None else b[small])
                    gs[small] = (rows[:, small] * y0.reshape(-1, len(small))).sum(0)
            gx = (g * s) @ W if need_x else None
        return gx, None, total * s if need_b else None, gs, total if need_t else None
