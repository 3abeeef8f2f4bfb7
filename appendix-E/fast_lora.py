"""The adapted linear layer as one hand-written step of autograd.

`LinearWithLoRA` computes x Wᵀ + b + scale · (x A) B as five operations, each with a result of its own.
Here they are one: the low-rank part is added in place, backward computes no gradient of the frozen
weight, and between the two only x (N, in) and x A (N, rank) are kept. The parameters stay where they are.
"""

import torch
from torch.nn.functional import linear


class AdaptedLinear(torch.autograd.Function):
    """y = x Wᵀ + b + scale · (x A) B with W (out, in) and b frozen; x is (N, in), y (N, out).

    Backward, with g = ∂loss/∂y and gB = scale · g Bᵀ: ∂x = g W + gB Aᵀ, ∂A = xᵀ gB, ∂B = scale · (x A)ᵀ g.
    Products run in W's dtype, the gradients of A and B come back in theirs.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        low = x @ A.to(x.dtype)  # (N, rank)
        ctx.save_for_backward(x, low, weight, A, B)
        ctx.scale = scale
        return linear(x, weight, bias).addmm_(low, B.to(x.dtype), alpha=scale)

    @staticmethod
    def backward(ctx, grad):
        x, low, weight, A, B = ctx.saved_tensors
        grad_low = (grad @ B.to(grad.dtype).t()).mul_(ctx.scale)  # (N, rank)
        grad_A = (x.t() @ grad_low).to(A.dtype)
        grad_B = (low.t() @ grad).mul_(ctx.scale).to(B.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, A.to(grad.dtype).t())
        return grad_x, None, None, grad_A, grad_B, None


def lora_parts(layer):
    """Return (linear, A, B, scale) of a `LinearWithLoRA` with a frozen weight, None for anything else."""
    lora, inner = getattr(layer, "lora", None), getattr(layer, "linear", None)
    if not (hasattr(lora, "A") and isinstance(inner, torch.nn.Linear)):
        return None
    if any(parameter.requires_grad for parameter in inner.parameters()) or any(True for _ in lora.children()):
        return None
    return inner, lora.A, lora.B, getattr(lora, "scale", getattr(lora, "alpha", None))


def adapted_linear(layer, x):
    """Return layer(x), x (N, in) to (N, out): in one step for an adapted layer, as it is for others."""
    parts = lora_parts(layer)
    if parts is None or parts[3] is None:
        return layer(x)
    inner, A, B, scale = parts
    return AdaptedLinear.apply(x.to(inner.weight.dtype), inner.weight, inner.bias, A, B, scale)
