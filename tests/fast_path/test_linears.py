"""The hand-written adapted layers equal `LinearWithLoRA`, forward and backward."""

import pytest
import torch
from torch import nn

from appendix_e import LinearWithLoRA
from fast_path.linears import AdaptedLinears, adapted_linears
from lora.quantized import QuantizedLinear
from lora.variants import link_projections
from lora.wrappers import BRANCHES, with_lora
from models import train_a_little


def adapted(out_features, rank, **options):
    layer = LinearWithLoRA(nn.Linear(6, out_features), rank, alpha=3, **options)
    layer.linear.requires_grad_(False)
    nn.init.normal_(layer.lora.B)
    return layer


def gradients(outputs, tensors):
    loss = sum((output**2).sum() for output in outputs)
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("ranks", [(1,), (4,), (2, 2, 2), (1, 3)])
def test_outputs_and_gradients_are_the_layers_own(ranks):
    torch.manual_seed(123)
    layers = [adapted(5 + number, rank) for number, rank in enumerate(ranks)]
    x = torch.randn(7, 6, requires_grad=True)
    trained = [x, *(parameter for layer in layers for parameter in layer.lora.parameters())]
    slow, fast = [layer(x) for layer in layers], adapted_linears(layers, x)
    torch.testing.assert_close(list(fast), slow)
    torch.testing.assert_close(gradients(fast, trained), gradients(slow, trained), atol=1e-4, rtol=1e-4)


def test_an_input_without_gradient_costs_none_and_changes_nothing():
    torch.manual_seed(123)
    layer, x = adapted(4, 2), torch.randn(3, 6)
    factors = list(layer.lora.parameters())
    torch.testing.assert_close(
        gradients(adapted_linears([layer], x), factors), gradients([layer(x)], factors)
    )


def test_the_gradient_agrees_with_finite_differences():
    torch.manual_seed(123)
    layer = adapted(4, 2).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    inner, lora = layer.linear, layer.lora

    def product(x, A, B):
        return AdaptedLinears.apply(x, [inner.weight], [inner.bias], [lora.scale], A, B)

    assert torch.autograd.gradcheck(product, (x, lora.A, lora.B))


def test_the_frozen_weight_gets_no_gradient():
    layer = adapted(4, 2)
    adapted_linears([layer], torch.randn(3, 6))[0].sum().backward()
    assert layer.linear.weight.grad is None and layer.lora.A.grad is not None


@pytest.mark.parametrize("other", ["plain", "trained weight", "dropout"])
def test_other_layers_are_called_as_they_are(other):
    layer = nn.Linear(6, 4) if other == "plain" else adapted(4, 2, dropout=0.5 if other == "dropout" else 0.0)
    if other == "trained weight":
        layer.linear.requires_grad_(True)
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    result = adapted_linears([layer], x)[0]
    assert torch.equal(result, expected) and "AdaptedLinears" not in type(result.grad_fn).__name__


# Quantized layers


def quantized(out_features, rank, kind):
    layer = adapted(out_features, rank)
    layer.linear = layer.linear if kind is None else QuantizedLinear(layer.linear, kind)
    return layer


@pytest.mark.parametrize("kinds", [("nf4",), ("int8",), ("nf4", "nf4", "nf4"), ("nf4", None), (None, "int8")])
def test_outputs_and_gradients_of_quantized_layers_are_the_layers_own(kinds):
    torch.manual_seed(123)
    layers = [quantized(4 + number, 2 + number, kind) for number, kind in enumerate(kinds)]
    x = torch.randn(7, 6, requires_grad=True)
    trained = [x, *(parameter for layer in layers for parameter in layer.lora.parameters())]
    slow, fast = [layer(x) for layer in layers], adapted_linears(layers, x)
    assert all("AdaptedLinears" in type(y.grad_fn).__name__ for y in fast)
    torch.testing.assert_close(list(fast), slow)
    torch.testing.assert_close(gradients(fast, trained), gradients(slow, trained), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_under_autocast_quantized_layers_give_their_own_result(kind):
    layer, x = quantized(4, 2, kind), torch.randn(7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        slow, fast = layer(x), adapted_linears([layer], x)[0]
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast.float(), slow.float(), atol=0.1, rtol=0.1)


def test_of_a_quantized_weight_nothing_is_kept():
    layer, x = quantized(40, 2, "nf4"), torch.randn(50, 6)
    kept = saved_for_backward([layer], x)
    assert all(t.shape != (40, 6) for t in kept) and sum(t.shape[0] == 50 for t in kept) == 2  # x, x A


# LoRA's relatives


def relative(variant, out_features=4, rank=2):
    torch.manual_seed(rank)
    layer = with_lora(nn.Linear(6, out_features).requires_grad_(False), rank, 2.0, variant=variant)
    link_projections([layer.lora])
    layer.lora.attached = True  # as the optimizer of a training does
    return train_a_little(layer)


def trained_parts(layers):
    return [p for layer in layers for p in layer.parameters() if p.requires_grad]


@pytest.mark.parametrize("variants", [
    *([variant] for variant in BRANCHES), ["lora-fa", "lora-fa"], ["lora", "lora-fa", "lora"],
    ["lora", "dora", "vera"],
])
def test_outputs_and_gradients_of_every_variant_are_the_layers_own(variants):
    layers = [relative(variant, 4 + n, 2 + n) for n, variant in enumerate(variants)]
    x = torch.randn(7, 6, requires_grad=True)
    slow, fast = [layer(x) for layer in layers], adapted_linears(layers, x)
    torch.testing.assert_close(list(fast), slow)
    tensors = [x, *trained_parts(layers)]
    torch.testing.assert_close(gradients(fast, tensors), gradients(slow, tensors), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", BRANCHES)
def test_under_autocast_every_variant_gives_the_layers_own_result(variant):
    layer, x = relative(variant), torch.randn(7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        slow, fast = [layer(x).float()], [adapted_linears([layer], x)[0].float()]
    tensors = trained_parts([layer])
    torch.testing.assert_close(fast[0], slow[0], atol=0.1, rtol=0.1)
    torch.testing.assert_close(gradients(fast, tensors), gradients(slow, tensors), atol=0.3, rtol=0.1)


def saved_for_backward(layers, x):
    """Return the tensors that autograd keeps of `adapted_linears`."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted_linears(layers, x)
    return kept


@pytest.mark.parametrize(("variants", "keeps_x"), [
    (["lora-fa"], False), (["lora-fa", "lora-fa"], False), (["lora"], True), (["lora-fa", "lora"], True),
])
def test_the_input_is_kept_only_if_an_a_is_trained(variants, keeps_x):
    x = torch.randn(50, 6)
    kept = saved_for_backward([relative(variant) for variant in variants], x)
    of_tokens = [t for t in kept if t.shape[0] == 50]
    assert any(t.data_ptr() == x.data_ptr() for t in of_tokens) == keeps_x
    assert sum(t.shape[1] for t in of_tokens) == 2 * len(variants) + 6 * keeps_x  # x A, and x


def test_the_gradient_of_lora_fa_agrees_with_finite_differences():
    layer = relative("lora-fa").double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def product(x, B):
        inner, lora = layer.linear, layer.lora
        return AdaptedLinears.apply(x, [inner.weight], [inner.bias], [lora.scale], lora.A, B)

    assert torch.autograd.gradcheck(product, (x, layer.lora.B))
