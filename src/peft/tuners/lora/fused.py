"""LoRA on a plain linear layer as one autograd function, and beside any other layer its delta as one.

`y = x W^T + b + s (x' A^T) B^T`, with x' the input after dropout (often x itself). Against the same thing module by
module it keeps no output-sized temporary, adds the delta into the base product in place, and saves only x', or less
(`recompute.keep`). Letters: N rows, I in, O out, r rank.

Products with r are kept with r as the rows, (r, N): BLAS takes a half to a quarter of the time that it takes for
(N, r) where r is small (float32, one thread, N = 512, r = 8, I = O = 576: all six thin products 0.37 instead of
0.77 ms, beside 6.8 ms for the two of the base layer), and is no slower elsewhere.

Left out: A and B that are not plain `nn.Linear` leaves; see `ops.is_plain`.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from ..ops import is_plain, linear, no_global_hooks
from ..recompute import keep


class FusedLora(torch.autograd.Function):
    """`apply(x, xd, W, b, A, B, bB, s)`: (..., I), (..., I) or None, (O, I), (O) or None, (r, I), (O, r), (O) or None.

    `xd` None stands for `x`, `W` None for no base layer. All tensors have one dtype.
    """

    @staticmethod
    def forward(ctx, x, xd, W, b, A, B, bB, s):
        rows = x.reshape(-1, x.shape[-1])  # (N, I)
        dropped = rows if xd is None else xd.reshape(rows.shape)
        hidden = A @ dropped.T  # (r, N)
        if W is None:
            y = torch.addmm(rows.new_empty(()), hidden.T, B.T, beta=0, alpha=s).reshape(*x.shape[:-1], B.shape[0])
        else:
            y = linear(x, W, b)  # (..., O)
            y.view(-1, y.shape[-1]).addmm_(hidden.T, B.T, alpha=s)
        if bB is not None:
            y.add_(bB, alpha=s)
        ctx.s, ctx.shared_input = s, xd is None
        needs = ctx.needs_input_grad
        train = needs[4] or needs[5]
        # The inputs themselves, not views made here: to a second derivative those would be constants.
        parts, ctx.recipe = keep(x if xd is None else xd) if train else ([], None)
        ctx.save_for_backward(hidden if train else None, W, A, B, x if needs[2] else None, *parts)
        return y

    @staticmethod
    def backward(ctx, gy):
        hidden, W, A, B, rows, *parts = ctx.saved_tensors
        need_x, need_xd, need_W, need_b, need_A, need_B, need_bB, _ = ctx.needs_input_grad
        shape = (*gy.shape[:-1], A.shape[1])
        with torch.autocast(gy.device.type, enabled=False):
            dropped = None if ctx.recipe is None else ctx.recipe(parts)
            dropped, rows = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (dropped, rows))  # (N, I)
            g = gy.reshape(-1, gy.shape[-1])  # (N, O)
            if torch.is_grad_enabled() and dropped is not None:
                hidden = A @ dropped.T  # create_graph: the saved product is no longer a function of A to autograd
            gh = (B.T @ g.T).mul_(ctx.s)  # (r, N)
            gx = gxd = None
            if need_x and W is None:
                gx = (gh.T @ A).view(shape)
            elif need_x:
                gx = g @ W
                if ctx.shared_input:
                    gx = gx.addmm_(gh.T, A) if not torch.is_grad_enabled() else torch.addmm(gx, gh.T, A)
                gx = gx.view(shape)
            if need_xd:
                gxd = (gh.T @ A).view(shape)
            gA = gh @ dropped if need_A else None  # (r, I)
            gB = (hidden @ g).mul_(ctx.s).T if need_B else None  # (O, r)
            total = g.sum(0) if need_b or need_bB else None
            gW = g.T @ rows if need_W else None
        return gx, gxd, gW, total if need_b else None, gA, gB, total * ctx.s if need_bB else None, None


def fused_lora(x, xd, base: nn.Linear | None, A: nn.Linear, B: nn.Linear, s: float) -> torch.Tensor:
    """`base(x) + s * B(A(xd))` for plain leaves; `xd` None stands for `x`, `base` None for none.

    The adapter's factors are cast to the dtype of the base product (they are small), never the input to theirs; under
    autocast everything is cast to autocast's dtype, as for the modules.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype

    def cast(t):
        return None if t is None else t.to(dtype)

    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        return FusedLora.apply(
            cast(x), cast(xd), *((None, None) if base is None else (cast(base.weight), cast(base.bias))),
            cast(A.weight), cast(B.weight), cast(B.bias), s,
        )  # fmt: skip


def lora_delta(xd: torch.Tensor, A: nn.Module, B: nn.Module, s: float, cast_input: bool = True) -> torch.Tensor:
    """`s * B(A(xd))`, the factors cast to the input's dtype where they are plain, called as modules where not.

    Modules get the input in their own dtype, if `cast_input`.
    """
    if is_plain(A) and is_plain(B) and no_global_hooks() and isinstance(s, float):
        return fused_lora(xd, None, None, A, B, s)
    return B(A(xd.to(A.weight.dtype) if cast_input else xd)).to(xd.dtype) * s
