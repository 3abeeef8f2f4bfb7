"""Adapted linear layers that read the same input, as one hand-written step of autograd.

`LinearWithLoRA` computes x Wᵀ + b + scale · (x A) B as five operations, each with its own result in
memory. Here they are one operation: the low-rank part is added in place, backward computes no gradient
of the frozen weight, and only x (N, in) and x A (N, rank) are kept for it; with LoRA-FA, whose A is frozen
too, x A alone. For layers that share x (query, key and value) the thin products x A are one product, and so
are their gradients. The parameters stay in the layers. A quantized weight is unpacked for each product.
"""

import torch
from torch.nn.functional import linear


class AdaptedLinears(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i + s_i · (x A_i) B_i with frozen W_i (out, in) and b_i: x (N, in), y_i (N, out).

    `factors` are all A_i (in, rank_i), then all B_i (rank_i, out); `out` may differ between layers. For a
    quantized W_i, `weights` has the layer that stores it.

    Backward, with g_i = ∂loss/∂y_i and l_i = s_i · g_i B_iᵀ: ∂x = Σ g_i W_i + l_i A_iᵀ, ∂A_i = xᵀ l_i,
    ∂B_i = s_i · (x A_i)ᵀ g_i. x, W and b have one dtype, in which the products run; the gradients of
    A and B come back in theirs. If no A_i requires a gradient, x is not kept.
    """

    @staticmethod
    def forward(ctx, x, weights, biases, scales, *factors):
        As, Bs = factors[: len(weights)], factors[len(weights) :]
        A = torch.cat(As, dim=1).to(x.dtype)  # (in, sum of ranks)
        low = x @ A  # (N, sum of ranks)
        lows = low.split([a.shape[1] for a in As], dim=1)
        ctx.trains_A = any(a.requires_grad for a in As)
        matrices = [None if is_quantized(weight) else weight for weight in weights]
        ctx.save_for_backward(x if ctx.trains_A else None, low, A, *matrices, *factors)
        ctx.scales, ctx.quantized = scales, [weight if is_quantized(weight) else None for weight in weights]
        return tuple(
            linear(x, as_matrix(weight, x.dtype), bias).addmm_(part, b.to(x.dtype), alpha=scale)
            for weight, bias, scale, part, b in zip(weights, biases, scales, lows, Bs)
        )

    @staticmethod
    def backward(ctx, *grads):
        x, low, A, *tensors = ctx.saved_tensors
        count = len(grads)
        weights, As, Bs = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        ranks = [a.shape[1] for a in As]
        scaled = [(g @ b.to(g.dtype).t()).mul_(s) for g, b, s in zip(grads, Bs, ctx.scales)]
        grad_low = torch.cat(scaled, dim=1)  # (N, sum of ranks)
        parts = zip(low.split(ranks, dim=1), grads, ctx.scales, Bs)
        grad_As = [None] * count
        if ctx.trains_A:
            grad_As = [g.to(a.dtype) for g, a in zip((x.t() @ grad_low).split(ranks, dim=1), As)]
        grad_Bs = [(part.t() @ g).mul_(s).to(b.dtype) for part, g, s, b in parts]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ A.t()
            for grad, weight, layer in zip(grads, weights, ctx.quantized):
                grad_x.addmm_(grad, as_matrix(layer or weight, grad.dtype))
        return grad_x, None, None, None, *grad_As, *grad_Bs


def is_quantized(weight):
    """Return whether a frozen linear layer, or its entry in `weights`, stores codes instead of a matrix."""
    return hasattr(weight, "unpacked")


def as_matrix(weight, dtype):
    """Return a weight (out, in): a tensor as it is, a quantized layer's unpacked to `dtype`."""
    return weight.unpacked(dtype) if is_quantized(weight) else weight


def is_plain(layer):
    """Return whether `layer` is a `LinearWithLoRA` with a frozen linear layer and no active dropout.

    Its branch must have A and B alone: LoRA's relatives with more are called as they are.
    """
    inner, lora = getattr(layer, "linear", None), getattr(layer, "lora", None)
    stored = isinstance(inner, torch.nn.Linear) and ("weight" in inner._parameters or is_quantized(inner))
    if not stored or not hasattr(lora, "scale"):
        return False
    if [name for name, _ in lora.named_parameters()] != ["A", "B"]:
        return False
    drops = layer.training and getattr(lora, "dropout", 0.0) > 0
    return not drops and not any(parameter.requires_grad for parameter in inner.parameters())


def adapted_linears(layers, x):
    """Return [layer(x) for layer in layers], x (N, in), each (N, out), as one operation if all are plain.

    The products run in autocast's dtype where that is enabled, else in the frozen weights' dtype.
    """
    if not all(is_plain(layer) for layer in layers):
        return [layer(x) for layer in layers]
    linears = [layer.linear for layer in layers]
    adapters = [layer.lora for layer in layers]
    dtype = x.dtype if is_quantized(linears[0]) else linears[0].weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return AdaptedLinears.apply(
        x.to(dtype),
        [inner if is_quantized(inner) else inner.weight.to(dtype) for inner in linears],
        [None if inner.bias is None else inner.bias.to(dtype) for inner in linears],
        [lora.scale for lora in adapters],
        *(lora.A for lora in adapters),
        *(lora.B for lora in adapters),
    )
