"""A matrix in 4 or 8 bits: QLoRA's NF4 with double quantization, and int8, in plain torch.

For NF4 a matrix W is cut into blocks of 64 numbers. Each block is divided by its largest absolute value,
absmax, and each quotient replaced by the nearest of 16 levels, whose number, 4 bits, is all that is stored:
4 + 32/64 = 4.5 bits per weight with absmax in float32. Double quantization stores the absmax in 8 bits, too:
4 + 8/64 + 32/(64 · 256) = 4.127 bits. Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.
"""

import torch
from torch import nn
from torch.nn.functional import embedding, pad

GROUP = 256  # absmax values that double quantization scales together


def nf4_levels():
    """Return the 16 levels of NormalFloat (16,), ascending from −1 to 1.

    They are quantiles of the normal distribution, divided by the largest: 7 below zero, zero itself, 8 above.
    """
    tail = 1 - (1 / 32 + 1 / 30) / 2
    steps = (torch.linspace(tail, 0.5, n + 1, dtype=torch.float64)[:-1] for n in (7, 8))
    below, above = map(torch.special.ndtri, steps)
    levels = torch.cat([-below, below.new_zeros(1), above.flip(0)])
    return (levels / levels[-1]).float()


NF4 = nf4_levels()


class QuantizedWeight(nn.Module):
    """The codes of a matrix of `shape`, as buffers: they are saved and move with a model.

    `.to(dtype)`, `.half()` and the like leave them as they are. `dequantize` returns the matrix.
    """

    def __init__(self, shape, **buffers):
        super().__init__()
        self.shape = shape
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Int8Weight(QuantizedWeight):
    """One byte per number and one absmax per row."""

    kind = "int8"

    def __init__(self, weight):
        codes, absmax = to_int8(weight)
        super().__init__(weight.shape, packed=codes, absmax=absmax)

    def values(self):
        return from_int8(self.packed, self.absmax)


class NF4Weight(QuantizedWeight):
    """Two numbers per byte, one absmax per block of the rows laid end to end; zeros fill the last block."""

    kind = "nf4"

    def __init__(self, weight, double, block):
        rows = in_rows(weight.flatten(), block)
        absmax = rows.abs().amax(1)
        levels = NF4.clone().to(weight.device)  # safetensors saves no shared memory
        middles = (levels[1:] + levels[:-1]) / 2  # a number that is one takes the lower level
        codes = torch.bucketize(rows / divisor(absmax), middles, out_int32=True)
        first, second = codes.view(-1, 2).unbind(1)
        packed = (16 * first + second).to(torch.uint8)
        scales = doubly(absmax) if double else {"absmax": absmax}
        super().__init__(weight.shape, packed=packed, levels=levels, **scales)

    def scales(self):
        """Return the absmax of each block (blocks,)."""
        if self.absmax.is_floating_point():
            return self.absmax
        centred = from_int8(in_rows(self.absmax, GROUP), self.largest).flatten()
        return (centred[: len(self.absmax)] + self.offset).clamp_min(0)

    def values(self):
        absmax = self.scales()
        pairs = torch.cartesian_prod(self.levels, self.levels)  # (256, 2): of a byte
        numbers = embedding(self.packed.int(), pairs).view(len(absmax), -1)
        return numbers.mul_(absmax[:, None]).flatten()[: self.shape.numel()].view(self.shape)


def in_rows(values, width):
    """Return values (n,) as rows (⌈n / width⌉, width), the last one filled up with zeros."""
    return pad(values, (0, -len(values) % width)).view(-1, width)


def divisor(absmax):
    """Return absmax (n, 1), with 1 for rows of zeros."""
    return torch.where(absmax > 0, absmax, 1.0)[:, None]


def to_int8(rows):
    """Return the codes of rows (n, m), from −127 to 127 in int8, and the absmax (n,) for which 127 stands."""
    absmax = rows.abs().amax(1)
    return (rows / divisor(absmax) * 127).round().to(torch.int8), absmax


def from_int8(codes, absmax):
    return codes.float() / 127 * absmax[:, None]


def doubly(absmax):
    """Return the buffers that store absmax (blocks,): less its mean in 8 bits, with a scale for each 256."""
    offset = absmax.double().mean().float()
    codes, largest = to_int8(in_rows(absmax - offset, GROUP))
    return {"absmax": codes.flatten()[: len(absmax)].clone(), "largest": largest, "offset": offset}


@torch.no_grad()
def quantize(weight, kind="nf4", double=True, block=64):
    """Return the `QuantizedWeight` of a matrix W (out, in).

    - `kind`: "nf4", 4 bits per number, or "int8", 8 bits with one absmax for each row
    - `double`: NF4's absmax values in 8 bits as well
    - `block`: how many numbers share an absmax in NF4, even

    A number changes by at most 0.152 absmax in NF4, absmax / 254 in int8; zeros stay zeros. With `double`,
    add the error of absmax, at most 1/254 of the largest distance from the mean among 256 of them.
    Raises ValueError for another kind or block and for a weight that is no matrix of finite numbers.
    """
    if kind not in ("nf4", "int8"):
        raise ValueError(f"a base is quantized to nf4 or int8, not {kind!r}")
    if type(block) is not int or block < 2 or block % 2:
        raise ValueError(f"block must be an even number of weights, not {block!r}")
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        shape = tuple(weight.shape)
        raise ValueError(f"only a matrix of numbers can be quantized, not {weight.dtype} {shape}")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device: load its values first")
    values = weight.detach().float()
    if not torch.isfinite(values).all():
        raise ValueError("the weight has infinite or missing values: load the model again")
    return NF4Weight(values, double, block) if kind == "nf4" else Int8Weight(values)


def dequantize(codes, dtype=torch.float32):
    """Return the matrix (out, in) of `codes`, computed in float32, in `dtype`."""
    return codes.values().to(dtype)
