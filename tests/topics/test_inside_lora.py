"""What inside-lora.ipynb tries things on: the small model, the noise in place of training."""

import torch

from lora.adapters import take_adapter
from lora.layers import apply_lora
from lora.targets import find_layers
from lora.wrappers import is_conv1d
from topics.inside_lora import Conv1D, compute_update, pretend_training, small_model


def test_every_call_returns_the_same_model():
    one, two = small_model().state_dict(), small_model().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(find_layers(small_model())) == 2 * 6 + 1


def test_pretended_training_changes_what_is_trainable_and_nothing_else():
    model = pretend_training(apply_lora(small_model(), 2, 2, "query"))
    base = small_model()
    assert torch.equal(model.out_head.weight, base.out_head.weight)
    layer = model.trf_blocks[0].att.W_query
    assert torch.equal(layer.linear.weight, base.trf_blocks[0].att.W_query.weight)
    assert layer.lora.B.abs().sum() > 0


def test_an_adapters_update_is_what_it_adds_to_the_weight():
    model = pretend_training(apply_lora(small_model(), 2, 2))
    update = compute_update(take_adapter(model))
    added = model.out_head.weight - model.out_head.linear.weight
    torch.testing.assert_close(update, added, atol=1e-6, rtol=0)


def test_the_stand_in_is_recognised_and_computes_what_transformers_computes():
    from transformers.pytorch_utils import Conv1D as Original

    ours, theirs = Conv1D(nf=3, nx=5), Original(nf=3, nx=5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5)
    assert is_conv1d(ours) and torch.allclose(ours(x), theirs(x))
