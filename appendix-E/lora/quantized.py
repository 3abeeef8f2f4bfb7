"""QLoRA's frozen base: linear layers that store their weights in 4 or 8 bits, and LoftQ's start for LoRA.

`lora.layers.apply_lora(…, base="nf4")` puts them in. Sources: QLoRA, Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314; LoftQ, Li et al. 2023, https://arxiv.org/abs/2310.08659.
"""

import copy
from collections import Counter
from functools import cache
from importlib import import_module

import torch
from torch import nn
from torch.nn.functional import linear

from appendix_e import LoRALayer
from lora.codes import dequantize, quantize
from lora.targets import matches, named_parts
from lora.wrappers import is_conv1d

LOFTQ_STEPS = 5
KERNEL_DEVICES = ("cuda",)  # on a CPU, bitsandbytes is no faster than torch
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)


# bitsandbytes


@cache
def find_bitsandbytes():
    """Return the module bitsandbytes.functional, None if it isn't installed or can't be loaded."""
    try:
        return import_module("bitsandbytes.functional")
    except (ImportError, OSError, RuntimeError):
        return None


def unpack(codes, dtype):
    """Return W (out, in) of `codes`, as `dequantize` does, for a product: on CUDA by bitsandbytes, if there.

    Its kernel is faster and reads the same codes, with levels that differ by 2e-7 at most. `dequantize`
    itself stays in torch, so merged weights and fingerprints are the same with and without bitsandbytes.
    """
    if not has_kernel(codes, dtype):
        return dequantize(codes, dtype)
    kernels, absmax, block = find_bitsandbytes(), codes.scales(), block_of(codes)
    state = kernels.QuantState(
        absmax, (len(absmax), block), codes.levels, blocksize=block, quant_type="nf4", dtype=dtype
    )
    values = kernels.dequantize_4bit(codes.packed.view(-1, 1), state)
    return values.flatten()[: codes.shape.numel()].view(codes.shape)


def has_kernel(codes, dtype):
    """Return whether bitsandbytes is installed and can unpack `codes` to `dtype` on their device."""
    known = codes.kind == "nf4" and dtype in KERNEL_DTYPES and block_of(codes) in KERNEL_BLOCKS
    return known and codes.packed.device.type in KERNEL_DEVICES and find_bitsandbytes() is not None


def block_of(codes):
    """Return how many numbers share an absmax in the NF4 `codes`: each is half a byte."""
    return 2 * len(codes.packed) // len(codes.absmax)


# A layer


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ for x (…, in): W is computed from the codes, used and dropped, in backward once more."""

    @staticmethod
    def forward(x, codes):
        return linear(x, unpack(codes, x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.codes = inputs

    @staticmethod
    def backward(ctx, grad):
        return grad @ unpack(ctx.codes, grad.dtype), None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that stores `codes`, of `quantize`, instead of its weight; the bias stays.

    `layer`, an nn.Linear or Hugging Face's Conv1D, gives it its attributes, hooks and bias; `plain` makes
    such a layer again. Products run in the dtype of the input, or autocast's. `weight` is computed anew
    whenever it is read, in the dtype that the model is in; it cannot be assigned.
    """

    def __init__(self, layer, kind="nf4", **options):
        adopt(self, layer)
        weight = self._parameters.pop("weight").detach()
        self.source, self.turned = type(layer), is_conv1d(layer)
        self.codes = quantize(weight.T if self.turned else weight, kind, **options)
        self.out_features, self.in_features = self.codes.shape
        self.register_buffer("like", weight[:0].clone(), persistent=False)  # the model's dtype and device

    @property
    def weight(self):
        weight = dequantize(self.codes, self.like.dtype)
        return weight.T.contiguous() if self.turned else weight

    def forward(self, x):
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        y = FrozenProduct.apply(x.to(dtype), self.codes)
        return y if self.bias is None else y + self.bias.to(dtype)

    def unpacked(self, dtype):
        """Return the weight (out, in) for one product in `dtype`."""
        return unpack(self.codes, dtype)

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.codes.kind}"

    def plain(self, weight=None):
        """Return the layer as it was before, with the parameter `weight`, or what the codes say."""
        layer = adopt(self.source.__new__(self.source), self)
        del layer.codes, layer.like, layer.source, layer.turned
        layer.weight = nn.Parameter(self.weight if weight is None else weight, requires_grad=False)
        return layer


def adopt(new, layer):
    """Give the empty module `new` the attributes, hooks and tensors of `layer`, and return it."""
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    vars(new).update(vars(layer) | {name: copy.copy(vars(layer)[name]) for name in own})
    return new


# A model


def can_be_quantized(layer):
    """Return whether `layer` is a linear layer with a weight of its own that nobody reads or computes."""
    weight = layer._parameters.get("weight")
    read = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)  # of torch's attention
    plain = type(layer).forward is nn.Linear.forward or is_conv1d(layer)
    return plain and not read and weight is not None and weight.is_floating_point() and weight.numel() > 0


def quantized_layers(model, kind, without=(), **options):
    """Return {layer: QuantizedLinear} of the linear layers of `model`, or {} if `kind` is None.

    As in QLoRA these are all but the head. Those in `without`, modules, stay as well, and those that share
    their weight. Raises ValueError, naming the layer, for what `quantize` raises, and if there is none.
    """
    if kind is None:
        return {}
    parts = named_parts(model)
    heads = {part for name, head in parts.items() if matches(name, "head") for part in head.modules()}
    uses = Counter(p for part in parts.values() for p in part._parameters.values() if p is not None)
    new = {}
    for name, layer in parts.items():
        stays = not name or layer in heads or layer in without or not can_be_quantized(layer)
        if not stays and uses[layer.weight] == 1:
            try:
                new[layer] = QuantizedLinear(layer, kind, **options)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    if not new:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize, the head apart")
    return new


def quantized_weights(layers):
    """Return {name of the weight: layer} of the quantized layers of {name: layer}."""
    return {f"{name}.weight": old for name, old in layers.items() if isinstance(old, QuantizedLinear)}


# LoftQ


@torch.no_grad()
def loftq(weight, rank, kind="nf4", steps=LOFTQ_STEPS, **options):
    """Return codes of a matrix Q (out, in), A (in, r) and B (r, out), with Q + (A B)ᵀ as near to W as found.

    In turn, Q is W − (A B)ᵀ quantized, and A B the r largest singular vectors of W − Q, until a step brings
    W no nearer. After the first, ‖W − Q − (A B)ᵀ‖ is at most the error of `quantize` alone.
    """
    weight, update, best = weight.detach().float(), 0.0, None
    for _ in range(steps):
        codes = quantize(weight - update, kind, **options)
        U, S, Vh = torch.linalg.svd(weight - dequantize(codes), full_matrices=False)
        error = torch.linalg.norm(S[rank:])
        if best is not None and not error < best[0]:
            break
        root = S[:rank].sqrt()
        A, B = Vh[:rank].T * root, root[:, None] * U[:, :rank].T
        best, update = (error, codes, A, B), (A @ B).T
    return best[1:]


def start_loftq(new):
    """Give the layers with LoRA in `new`, {layer: LinearWithLoRA}, LoftQ's codes, A and B.

    Raises ValueError if none is quantized, or for relatives of LoRA, also part by part.
    """
    pairs = [(old, layer) for old, layer in new.items() if isinstance(layer.linear, QuantizedLinear)]
    if not pairs or any(isinstance(old, QuantizedLinear) for old, _ in pairs):
        raise ValueError("LoftQ starts from unquantized weights: give base='nf4' and the model as it was")
    for old, layer in pairs:
        lora, kind = layer.lora, layer.linear.codes.kind
        if type(lora) is not LoRALayer or not lora.scale > 1e-6:
            raise ValueError("LoftQ is a start for plain LoRA with a positive alpha, without split_qkv")
        codes, A, B = loftq(layer.turn(old.weight).T, lora.rank, kind)
        lora.A.data[:, : A.shape[1]], lora.B.data[: len(B)] = A / lora.scale**0.5, B / lora.scale**0.5
        layer.linear.codes = codes
