"""LoRA's relatives on the fast path: packed as padded, prepared, restored, trained with their optimizer."""

import copy

import numpy as np
import pytest
import torch

from fast_path.batches import pad_batch
from fast_path.packed_model import last_token_logits
from fast_path.settings import TrainingSettings
from fast_path.training import fit, predict, prepare, restore
from lora.layers import adapted_layers, apply_lora
from lora.optimizer import lora_adamw
from lora.wrappers import BRANCHES, VARIANTS
from models import same_state, small_gpt, state, train_a_little

CPU = torch.device("cpu")
BRANCH = pytest.mark.parametrize("variant", BRANCHES)


@pytest.fixture
def messages():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 60, length).astype(np.int32) for length in (1, 5, 9, 9, 16, 2)]


def adapted(variant, **options):
    model = train_a_little(apply_lora(small_gpt(), 3, 2.0, variant=variant, **options))
    for layer in adapted_layers(model).values():
        layer.lora.attached = True  # as the optimizer of a training does
    return model


def packed_logits(model, messages):
    return last_token_logits(model, *pad_batch(messages, np.arange(len(messages)), CPU))


def single_logits(model, messages):
    """Each message alone, through chapter 4's own forward."""
    return torch.cat([model(torch.tensor(ids[None].astype(np.int64)))[:, -1] for ids in messages])


def gradients(model, logits):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(logits.float().square().sum(), trained, allow_unused=True)


@BRANCH
@pytest.mark.parametrize("training", [False, True])
def test_packed_logits_and_gradients_are_those_of_the_message_alone(variant, training, messages):
    model = adapted(variant).train(training)
    expected, result = single_logits(model, messages), packed_logits(model, messages)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients(model, result), gradients(model, expected), atol=1e-4, rtol=1e-4)


@BRANCH
def test_under_autocast_packed_logits_are_those_of_the_message_alone(variant, messages):
    model = adapted(variant)
    with torch.autocast("cpu", torch.bfloat16):
        expected, result = single_logits(model, messages), packed_logits(model, messages)
    torch.testing.assert_close(result.float(), expected.float(), atol=0.1, rtol=0.1)
    for one, two in zip(gradients(model, result), gradients(model, expected)):
        assert one.isfinite().all() and torch.linalg.norm(one - two) <= 0.1 * torch.linalg.norm(two) + 0.1


@BRANCH
def test_gradient_checkpointing_changes_no_gradient(variant, messages):
    model = adapted(variant).train()
    batch = pad_batch(messages, np.arange(len(messages)), CPU)
    expected, result = (gradients(model, last_token_logits(model, *batch, flag)) for flag in (False, True))
    torch.testing.assert_close(result, expected)


@BRANCH
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_preparing_and_restoring_leaves_what_trains_as_it_was(variant, precision, messages):
    model = adapted(variant)
    expected, before = predict(model, messages, CPU), state(model)
    trained = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    prepare(model, TrainingSettings(precision=precision), CPU)
    torch.testing.assert_close(predict(model, messages, CPU), expected, atol=0.1, rtol=0.1)
    restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters() if name in trained)
    torch.testing.assert_close(predict(model, messages, CPU), expected, atol=0.1, rtol=0.1)
    assert precision != "float32" or same_state(model, before)


def fitted(model, messages, make_optimizer=lora_adamw, **changes):
    settings = TrainingSettings(epochs=5, batch_size=3, learning_rate=0.02, progress=False, **changes)
    model = prepare(model, settings, CPU)
    return fit(model, (messages, [0, 1] * 3), settings, CPU, make_optimizer=make_optimizer).losses


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_plain_lora_trains_bit_for_bit_as_with_torchs_adamw(precision, messages):
    one, two = adapted("lora"), adapted("lora")
    losses = fitted(one, messages, precision=precision), fitted(two, messages, None, precision=precision)
    assert losses[0] == losses[1] and same_state(one, state(two))


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_in_every_precision(variant, precision, messages):
    model = apply_lora(small_gpt(), 4, 8.0, variant=variant, train_in_full="head")
    losses = fitted(model, messages, precision=precision)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_adalora_ends_a_training_with_its_budget_of_ranks(messages):
    model = apply_lora(small_gpt(), 4, 8.0, variant="adalora", target_rank=2)
    fitted(model, messages, precision="float32")
    kept = [int((layer.lora.E != 0).sum()) for layer in adapted_layers(model).values()]
    assert sum(kept) == 2 * len(kept)


def test_a_variant_that_needs_its_optimizer_is_not_trained_without_it(messages):
    model = apply_lora(small_gpt(), 4, 8.0, variant="adalora")
    with pytest.raises(ValueError, match="make the optimizer with"):
        fitted(model, messages, None, precision="float32")


def test_a_copy_of_a_prepared_model_predicts_the_same(messages):
    for variant in BRANCHES:
        model = prepare(adapted(variant), TrainingSettings(precision="bf16"), CPU)
        assert torch.equal(predict(copy.deepcopy(model), messages, CPU), predict(model, messages, CPU))
