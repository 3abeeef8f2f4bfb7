"""torch's MultiheadAttention, whose query, key and value are one parameter, as layers that can have LoRA.

`nn.MultiheadAttention` has no layer for them: it reads `in_proj_weight` (3 · dim, dim). While it has LoRA,
that is the weight of a layer of its own, `in_proj`, so whatever serves linear layers serves it too. It is
read, not called, as `out_proj` is: `LinearWithLoRA.weight` is W + update.
"""

from contextlib import contextmanager

from torch import nn

from appendix_e import LinearWithLoRA

PARAMETERS = {"weight": "in_proj_weight", "bias": "in_proj_bias"}  # of in_proj: of MultiheadAttention


class AttentionWithLayer(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that reads the weight and bias of the layer `in_proj`."""

    @property
    def in_proj_weight(self):
        return self.in_proj.weight

    @property
    def in_proj_bias(self):
        return self.in_proj.bias


def give_layer(attention):
    """Move the packed weight and bias of an nn.MultiheadAttention, in place, into a layer `in_proj`."""
    dim, packed = attention.embed_dim, attention._parameters
    layer = nn.modules.linear.NonDynamicallyQuantizableLinear(dim, 3 * dim, bias=False, device="meta")
    for name, theirs in PARAMETERS.items():
        layer.register_parameter(name, packed[theirs])
        packed[theirs] = None
    attention.__class__ = AttentionWithLayer
    attention.in_proj = layer.train(attention.training)
    attention._names_hooks = (
        attention.register_state_dict_post_hook(keep_names),
        attention.register_load_state_dict_pre_hook(take_names),
    )


def keep_names(attention, state, prefix, _):
    """Hook: give in_proj's weight and bias, if it has no LoRA, the names that torch has for them."""
    for name, theirs in PARAMETERS.items():
        if f"{prefix}in_proj.{name}" in state:
            state[f"{prefix}{theirs}"] = state.pop(f"{prefix}in_proj.{name}")


def take_names(attention, state, prefix, *_):
    """Hook: the reverse of `keep_names`, for a state_dict that is loaded."""
    for name, theirs in PARAMETERS.items():
        if f"{prefix}{theirs}" in state:
            state[f"{prefix}in_proj.{name}"] = state.pop(f"{prefix}{theirs}")


def take_layer(attention):
    """Undo `give_layer`, in place."""
    layer = attention.in_proj
    for hook in attention._names_hooks:
        hook.remove()
    del attention.in_proj, attention._names_hooks
    attention.__class__ = nn.MultiheadAttention
    for name, theirs in PARAMETERS.items():
        attention._parameters[theirs] = layer._parameters[name]


@contextmanager
def attention_layers(model):
    """Give every nn.MultiheadAttention of `model` a layer `in_proj`; at the end those with LoRA keep it.

    After an error, only those keep it that had it before.
    """
    new = [
        part for part in model.modules()
        if type(part) is nn.MultiheadAttention and part.in_proj_weight is not None
    ]
    before = {part for part in model.modules() if isinstance(part, AttentionWithLayer)}
    for attention in new:
        give_layer(attention)
    failed = True
    try:
        yield
        failed = False
    finally:
        for attention in (part for part in model.modules() if isinstance(part, AttentionWithLayer)):
            kept = attention in before if failed else has_lora(attention.in_proj)
            if not kept:
                take_layer(attention)


def has_lora(layer):
    """Return whether `layer` has LoRA, merged or not."""
    return isinstance(layer, LinearWithLoRA) or hasattr(layer, "_merged_lora")


def packed_names(parts):
    """Return {name of a parameter of in_proj: the name that torch has for it} of {name: module}."""
    return {
        f"{path}.in_proj.{name}".lstrip("."): f"{path}.{theirs}".lstrip(".")
        for path, part in parts.items() if isinstance(part, AttentionWithLayer)
        for name, theirs in PARAMETERS.items()
    }
