"""Modules trained in full inside a model in half precision: they are stored, and compute, in float32."""

import torch
from torch.utils._pytree import tree_leaves, tree_map


def keep_in_float32(module):
    """Store a low-precision `module` in float32, in place, so that it can be trained, and return it.

    Its floating-point inputs are cast to the dtype of its weights, its results back to that of its
    inputs, so the modules around it may stay in half precision. Hooks do this; a module in float32 or
    float64 is left as it is.
    """
    if not all(is_wide(p) for p in module.parameters()):
        module.float()
        if cast_inputs not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(cast_inputs, with_kwargs=True)
            module.register_forward_hook(cast_result)
    return module


def is_wide(parameter):
    """Return whether `parameter` has float32's precision at least, or is not floating-point."""
    return not parameter.is_floating_point() or parameter.dtype.itemsize >= 4


def is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def cast_floating(values, dtype):
    """Return `values`, nested in any way, with their floating-point tensors in `dtype`."""
    return tree_map(lambda v: v.to(dtype) if is_floating(v) else v, values)


def cast_inputs(module, args, kwargs):
    """Forward pre-hook: cast the inputs to the dtype of the module's weights, and remember theirs."""
    floating = filter(is_floating, tree_leaves((args, kwargs)))
    module._dtype_outside = next((x.dtype for x in floating), None)
    return cast_floating((args, kwargs), next(module.parameters()).dtype)


def cast_result(module, args, result):
    """Forward hook: cast the result to the dtype that the inputs of `module` had."""
    return cast_floating(result, module._dtype_outside)
