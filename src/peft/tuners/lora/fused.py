"""LoRA on a plain linear layer as one autograd function, and beside any other layer its delta as one.

`y = x W^T + b + s (x' A^T) B^T`, with x' the input after dropout (often x itself). Against the same thing module by
module it keeps no output-sized temporary, adds the delta into the base product in place, and saves only x', or less
(`recompute.keep`). Adapters that are active together are one of the sum of their ranks; in a mixed batch each has its
own rows. Letters: N rows, n of them, I in, O out, r rank.

Products with r are kept with r as the rows, (r, N): BLAS takes a half to a quarter of the time that it takes for
(N, r) where r is small (float32, one thread, N = 512, r = 8, I = O = 576: all six thin products 0.37 instead of
0.77 ms, beside 6.8 ms for the two of the base layer), and is no slower elsewhere.

Left out: A and B that are not plain `nn.Linear` leaves; see `ops.is_plain`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...utils.autocast import no_autocast
from ..ops import is_plain, linear, no_global_hooks
from ..recompute import keep

Way = tuple[int, int, float]  # the first of the N rows that go through some A and B, the one after them, the scaling
Adapter = tuple[nn.Linear, nn.Linear, float]  # A, B, scaling


def _rows(t: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return t if stop - start == len(t) else t[start:stop]


class FusedLora(torch.autograd.Function):
    """`apply(x, xd, y, W, b, ways, A, B, bB, A, B, bB, ...)`: of every way (r, I), (O, r), (O) or None.

    x is (..., I), xd too, or None for x; W is (O, I), b (O) or None. Where W is None, the deltas are added to a copy of
    y (..., O), or, if that is None too, to nothing. All tensors have one dtype.
    """

    @staticmethod
    def forward(ctx, x, xd, y, W, b, ways, *factors):
        dropped = (x if xd is None else xd).reshape(-1, x.shape[-1])  # (N, I)
        if W is not None:
            out = linear(x, W, b)  # (..., O)
        else:
            out = x.new_zeros(*x.shape[:-1], len(factors[1])) if y is None else y.contiguous().clone()
        flat, hiddens = out.view(-1, out.shape[-1]), []
        for i, (start, stop, s) in enumerate(ways):
            A, B, bB = factors[3 * i : 3 * i + 3]
            hiddens.append(A @ _rows(dropped, start, stop).T)  # (r, n)
            _rows(flat, start, stop).addmm_(hiddens[i].T, B.T, alpha=s)
            if bB is not None:
                _rows(flat, start, stop).add_(bB, alpha=s)
        needs = ctx.needs_input_grad
        ctx.ways, ctx.shared_input, ctx.width = ways, xd is None, x.shape[-1]
        train = any(needs[6:])
        # The inputs themselves, not views made here: to a second derivative those would be constants.
        parts, ctx.recipe = keep(x if xd is None else xd) if train else ([], None)
        saved = [W, x if needs[3] else None, *factors, *(hiddens if train else [None] * len(ways)), *parts]
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx, gy):
        W, x, *saved = ctx.saved_tensors
        need_x, need_xd, need_y, need_W, need_b, _, *needs = ctx.needs_input_grad
        count = len(ctx.ways)
        factors, hiddens, parts = saved[: 3 * count], saved[3 * count : 4 * count], saved[4 * count :]
        create_graph = torch.is_grad_enabled()
        with no_autocast(gy.device.type):
            dropped = None if ctx.recipe is None else ctx.recipe(parts).reshape(-1, ctx.width)  # (N, I)
            g = gy.reshape(-1, gy.shape[-1])  # (N, O)
            gx = g @ W if need_x and W is not None else None
            gd = gx if ctx.shared_input else None  # of what the adapters take, (N, I)
            own = []
            for i, (start, stop, s) in enumerate(ctx.ways):
                A, B, _ = factors[3 * i : 3 * i + 3]
                need_A, need_B, need_bB = needs[3 * i : 3 * i + 3]
                gi = _rows(g, start, stop)
                gh = (B.T @ gi.T).mul_(s)  # (r, n)
                if need_x if ctx.shared_input else need_xd:
                    gd = _added(gd, (start, stop), gh.T, A, g)
                some = _rows(dropped, start, stop) if need_A or need_B else None
                # create_graph: the saved product is no longer a function of A to autograd
                hidden = A @ some.T if create_graph and need_B else hiddens[i]
                own += [
                    gh @ some if need_A else None,  # (r, I)
                    (hidden @ gi).mul_(s).T if need_B else None,  # (O, r)
                    gi.sum(0) * s if need_bB else None,
                ]
            gxd = None if ctx.shared_input else gd
            gx = gd if ctx.shared_input else gx
            gx, gxd = (None if t is None else t.view(*gy.shape[:-1], ctx.width) for t in (gx, gxd))
            gW = g.T @ x.reshape(-1, ctx.width) if need_W else None
            return gx, gxd, gy if need_y else None, gW, g.sum(0) if need_b else None, None, *own


def _added(
    total: torch.Tensor | None, rows: tuple[int, int], left: torch.Tensor, right: torch.Tensor, like: torch.Tensor
):
    """`total` (N, I), or None for zeros, plus a product in some rows; `like` has N rows."""
    if rows[1] - rows[0] == len(like):
        if total is None:
            return left @ right
        return torch.addmm(total, left, right) if torch.is_grad_enabled() else total.addmm_(left, right)
    total = like.new_zeros(len(like), right.shape[1]) if total is None else total
    total[slice(*rows)].addmm_(left, right)
    return total


def _together(
    adapters: Sequence[Adapter], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]:
    """A, B, the bias of B and the scaling of the one adapter that does what several do together."""
    s = adapters[0][2]
    if len(adapters) == 1:
        A, B, s = adapters[0]
        return A.weight, B.weight, B.bias, s
    wide = torch.promote_types(dtype, torch.float32)  # rounded once, with the scaling in it
    s = s if all(each == s for _, _, each in adapters) else 1.0
    A = torch.cat([A.weight.to(dtype) for A, _, _ in adapters])
    B = torch.cat([B.weight.to(wide) if each == s else B.weight.to(wide) * each for _, B, each in adapters], 1)
    biases = [B.bias if each == s else B.bias.to(wide) * each for _, B, each in adapters if B.bias is not None]
    return A, B, sum(biases[1:], biases[0]) if biases else None, s


def fused_lora(
    x: torch.Tensor,
    xd: torch.Tensor | None,
    base: nn.Linear | torch.Tensor | None,
    ways: Sequence[tuple[int, int, Sequence[Adapter]]],
) -> torch.Tensor:
    """`base(x) + sum s B(A(xd))` for plain leaves; `xd` None stands for `x`. `base`: or its result, or None for 0.

    The adapters' factors are cast to the dtype of the base product (they are small), never the input to theirs; under
    autocast everything is cast to autocast's dtype, as for the modules.

    Args:
        ways: `(start, stop, adapters)`: what the rows `x.flatten(0, -2)[start:stop]` go through.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype

    def cast(t):
        return None if t is None else t.to(dtype)

    with no_autocast(device):
        stacked = [(start, stop, *_together(adapters, dtype)) for start, stop, adapters in ways]
        W, b = (base.weight, base.bias) if isinstance(base, nn.Linear) else (None, None)
        y = base if torch.is_tensor(base) else None
        factors = [cast(t) for _, _, *own, _ in stacked for t in own]
        ways = tuple((start, stop, s) for start, stop, *_, s in stacked)
        return FusedLora.apply(cast(x), cast(xd), cast(y), cast(W), cast(b), ways, *factors)


def lora_delta(
    xd: torch.Tensor, A: nn.Module, B: nn.Module, s: float, cast_input: bool = True, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """`s * B(A(xd))`, the factors cast to the input's dtype where they are plain, called as modules where not.

    Modules get the input in their own dtype, if `cast_input`. Given a result `onto`, the delta is added to it.
    """
    if is_plain(A) and is_plain(B) and no_global_hooks() and isinstance(s, float):
        fits = onto is not None and onto.dtype == xd.dtype and not torch.is_autocast_enabled(xd.device.type)
        delta = fused_lora(xd, None, onto if fits else None, [(0, xd.shape[:-1].numel(), [(A, B, s)])])
        if fits:
            return delta
    else:
        delta = B(A(xd.to(A.weight.dtype) if cast_input else xd)).to(xd.dtype) * s
    return delta if onto is None else onto + delta.to(onto.dtype)
