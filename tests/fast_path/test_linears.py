"""The hand-written adapted layers equal `LinearWithLoRA`, forward and backward."""

import pytest
import torch
from torch import nn

from appendix_e import LinearWithLoRA
from fast_path.linears import AdaptedLinears, adapted_linears


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
