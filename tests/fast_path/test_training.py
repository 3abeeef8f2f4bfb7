"""The fast path computes what the printed path computes, in every option."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from appendix_e import freeze, replace_linear_with_lora
from ch04 import GPTModel
from fast_path import training
from fast_path.batches import length_batches, pad_batch, split_batch, tokens_at_once
from fast_path.packed_model import Packing, last_token_logits
from fast_path.settings import TrainingSettings
from fast_path.training import (
    choose_precision,
    fit,
    predict,
    prepare,
    restore,
)

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("bf16_processor")


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(123)
    model = GPTModel({**tiny_config, "vocab_size": 100})
    model.out_head = nn.Linear(32, 2)
    freeze(model)
    replace_linear_with_lora(model, rank=4, alpha=4)
    for module in model.modules():
        if hasattr(module, "lora"):
            nn.init.normal_(module.lora.B, std=0.1)
    return model.eval()


@pytest.fixture
def messages():
    rng = np.random.default_rng(123)
    return [rng.integers(0, 100, length).astype(np.int32) for length in (1, 5, 9, 9, 17, 30, 64, 2)]


@pytest.fixture(params=[True, False], ids=["message by message", "one padded batch"])
def per_message(request):
    """How attention gets the messages: the first is the CPU's way, the second the GPU's."""
    return request.param


def packed_logits(model, messages, per_message, checkpointing=False):
    ids, lengths = pad_batch(messages, np.arange(len(messages)), CPU)
    return last_token_logits(model, ids, lengths, checkpointing, per_message)


def printed_logits(model, messages):
    """Each message alone, without padding, through chapter 4's own forward."""
    return torch.cat([model(torch.tensor(ids[None].astype(np.int64)))[:, -1] for ids in messages])


def gradients(model, loss):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("fused", [True, False])
def test_logits_are_those_of_the_message_alone(model, messages, fused, per_message):
    expected = printed_logits(model, messages).detach()
    prepare(model, TrainingSettings(precision="float32", fused_attention=fused), CPU)
    result = predict(model, messages, CPU, TrainingSettings(precision="float32"))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    result = packed_logits(model, messages, per_message)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, bound", [(1, None), (3, None), (8, None), (8, 40), (8, 1)])
def test_other_messages_in_the_batch_change_nothing(model, messages, size, bound, per_message):
    alone = predict(model, messages, CPU, TrainingSettings(precision="float32", eval_batch_size=1))
    settings = TrainingSettings(precision="float32", eval_batch_size=size, max_tokens=bound)
    torch.testing.assert_close(predict(model, messages, CPU, settings), alone, atol=1e-5, rtol=0)
    batches = [messages[start : start + size] for start in range(0, 8, size)]
    together = torch.cat([packed_logits(model, batch, per_message) for batch in batches])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_tokens_in_the_padding_change_nothing(model, messages, per_message):
    ids, lengths = pad_batch(messages, np.arange(8), CPU)
    noise = torch.randint(100, ids.shape).where(torch.arange(64) >= lengths[:, None], ids)
    results = [last_token_logits(model, x, lengths, per_message=per_message) for x in (noise, ids)]
    assert torch.equal(*results)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_of_the_printed_path(model, messages, checkpointing, fused, per_message):
    expected = gradients(model, (printed_logits(model, messages) ** 2).sum())
    prepare(model, TrainingSettings(precision="float32", fused_attention=fused), CPU)
    logits = packed_logits(model, messages, per_message, checkpointing)
    torch.testing.assert_close(gradients(model, (logits**2).sum()), expected, atol=1e-4, rtol=1e-4)


def test_gradients_without_adapters_are_those_of_the_printed_path(tiny_config, messages, per_message):
    torch.manual_seed(123)
    model = GPTModel({**tiny_config, "vocab_size": 100})
    expected = gradients(model, (printed_logits(model, messages) ** 2).mean())
    logits = packed_logits(model, messages, per_message)
    torch.testing.assert_close(gradients(model, (logits**2).mean()), expected, atol=1e-4, rtol=1e-4)


def weights_after_training(model, messages, **changes):
    settings = TrainingSettings(precision="float32", epochs=2, learning_rate=1e-3, progress=False, **changes)
    labels = np.arange(len(messages)) % 2
    fit(training.prepare(model, settings, CPU), (messages, labels), settings, CPU)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "changes", [
        {"max_tokens": 20}, {"gradient_checkpointing": True},
        {"batch_size": 4, "gradient_accumulation_steps": 2},
    ],
)
def test_saving_memory_does_not_change_training(model, messages, changes):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected = weights_after_training(model, messages)
    model.load_state_dict(start)
    result = weights_after_training(model, messages, **changes)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


def test_training_learns_and_leaves_frozen_weights_alone(model):
    rng = np.random.default_rng(1)
    labels = np.arange(48) % 2
    messages = [rng.integers(50 * label, 50 * label + 50, rng.integers(3, 12)) for label in labels]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    settings = TrainingSettings(epochs=6, learning_rate=1e-2, precision="float32", progress=False)
    history = fit(prepare(model, settings, CPU), (messages, labels), settings, CPU, (messages, labels))
    assert len(history.losses) == 36 and len(history.accuracies) == 6
    assert history.accuracies[-1] > 0.9 and history.seconds > 0
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("decay, expected", [(True, [1, 0.75, 0.5, 0.25]), (False, [1, 1, 1, 1])])
def test_the_learning_rate_falls_linearly_to_zero_if_asked(model, messages, decay, expected):
    settings = TrainingSettings(epochs=2, batch_size=4, learning_rate=1.0, decay=decay)
    run = training.TrainingRun(model, settings, CPU, training.total_steps(8, settings))
    rates = []
    run.optimizer.step = lambda *_: rates.append(run.optimizer.param_groups[0]["lr"])
    for seed in (1, 2):
        run.epoch(messages, torch.tensor([0, 1] * 4), seed)
    assert rates == expected


def test_the_seed_decides_the_run(model, messages):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    runs = []
    for seed in (1, 1, 2):
        model.load_state_dict(start)
        runs.append(weights_after_training(model, messages * 4, seed=seed)["out_head.lora.A"])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_low_precision_stores_frozen_weights_once_and_stays_close(model, messages):
    expected = predict(model, messages, CPU, TrainingSettings(precision="float32"))
    settings = TrainingSettings(precision="bf16")
    prepare(model, settings, CPU)
    assert model.trf_blocks[0].att.W_query.linear.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(predict(model, messages, CPU, settings), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_adapters_in_float32(model, messages, precision):
    settings = TrainingSettings(precision=precision, epochs=1, progress=False)
    labels = np.arange(8) % 2
    A = model.out_head.lora.A
    before = A.clone()
    history = fit(prepare(model, settings, CPU), (messages, labels), settings, CPU, (messages, labels))
    assert np.isfinite(history.losses).all()
    assert A is model.out_head.lora.A and A.dtype == torch.float32 and not torch.equal(A, before)
    assert all(p.grad is None for p in model.parameters())  # freed after the step


def test_whatever_the_base_is_stored_in_what_trains_is_float32(model, messages, tiny_config):
    for dtype in (torch.float16, torch.bfloat16):
        for precision in ("auto", "float32", "bf16", "fp16"):
            settings = TrainingSettings(precision=precision, epochs=1, progress=False)
            prepare(model.to(dtype), settings, CPU)
            pair = messages, [0, 1] * 4
            assert np.isfinite(fit(model, pair, settings, CPU, pair).losses).all()
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
            assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("prepared, trained", [("bf16", "float32"), ("float32", "bf16"), ("fp16", "bf16")])
def test_a_model_prepared_in_another_precision_trains_too(model, messages, prepared, trained):
    model.trf_blocks[0].ff.layers[0] = model.trf_blocks[0].ff.layers[0].linear  # frozen, without LoRA
    prepare(model, TrainingSettings(precision=prepared), CPU)
    settings = TrainingSettings(precision=trained, epochs=1, progress=False)
    assert np.isfinite(fit(model, (messages, [0, 1] * 4), settings, CPU).losses).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapted", [True, False], ids=["with LoRA", "without LoRA"])
def test_a_model_in_half_precision_is_evaluated_without_preparing_it(model, messages, dtype, adapted):
    expected = predict(model, messages, CPU)
    if not adapted:
        for module in [*model.modules()]:
            for name, child in module.named_children():
                setattr(module, name, getattr(child, "linear", child))
        expected = predict(model, messages, CPU)
    torch.testing.assert_close(predict(model.to(dtype), messages, CPU), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_model_prepared_in_low_precision_refuses_the_calls_of_other_code(model, messages, precision):
    expected = printed_logits(model, messages).detach()
    for first in ("fp16", precision):
        prepare(model, TrainingSettings(precision=first), CPU)
    for prepared in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=f"in {precision}: call fast_path.training.restore"):
            printed_logits(prepared, messages)
        torch.testing.assert_close(predict(prepared, messages, CPU), expected, atol=0.1, rtol=0.1)
        again = printed_logits(restore(restore(prepared)), messages)
        torch.testing.assert_close(again.detach(), expected, atol=0.1, rtol=0.1)
    prepare(model, TrainingSettings(precision=precision), CPU)
    prepare(model, TrainingSettings(precision="float32"), CPU)
    torch.testing.assert_close(printed_logits(model, messages).detach(), expected, atol=0.1, rtol=0.1)
    assert printed_logits(model.bfloat16(), messages).dtype == torch.bfloat16


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(model, messages):
    settings = TrainingSettings(precision="fp16", progress=False)
    run = training.TrainingRun(prepare(model, settings, CPU), settings, CPU, steps=1)
    assert run.scaler.is_enabled()
    before, scale = model.out_head.lora.A.clone(), run.scaler.get_scale()
    model.out_head.lora.B.register_hook(lambda grad: grad * torch.inf)
    run.step(messages, torch.zeros(8, dtype=torch.long), [np.arange(8)])
    assert torch.equal(model.out_head.lora.A, before) and run.scaler.get_scale() < scale


def test_preparing_keeps_every_value(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = prepare(model, TrainingSettings(precision="float32"), CPU).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_prediction_keeps_order_and_mode(model, messages):
    forward = predict(model.train(), messages, CPU)
    assert model.training and forward.dtype == torch.float32
    torch.testing.assert_close(predict(model, messages[::-1], CPU), forward.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count, size", [(1, 8), (8, 8), (50, 8), (501, 16)])
def test_batches_cover_every_message_once(count, size):
    lengths = np.random.default_rng(0).integers(1, 120, count)
    batches = length_batches(lengths, size, seed=123)
    assert sorted(np.concatenate(batches)) == list(range(count))
    assert max(map(len, batches)) <= size


def test_batches_group_similar_lengths_and_change_with_the_seed():
    lengths = np.random.default_rng(0).integers(1, 120, 800)
    first, same, other = (length_batches(lengths, 8, seed, bucket=16) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, same))
    assert {tuple(sorted(b)) for b in first}.isdisjoint({tuple(sorted(b)) for b in other})
    assert np.mean([np.ptp(lengths[batch]) for batch in first]) < 20
    means = [lengths[batch].mean() for batch in first]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3  # long ones come at any time


def test_joining_split_messages_returns_them(per_message):
    packing = Packing(torch.tensor([2, 4, 1]), 4, per_message)
    x = torch.randn(7, 3)
    assert torch.equal(packing.pack(packing.unpack(x)), x)
    assert torch.equal(packing.join_messages(packing.split_messages(x)), x)
    assert len(packing.split_messages(x)) == len(packing.masks()) == (3 if per_message else 1)
    assert packing.positions.tolist() == [0, 1, 0, 1, 2, 3, 0] and packing.last.tolist() == [1, 5, 6]


@pytest.mark.parametrize("bound, parts", [(None, 1), (60, 3), (1, 8)])
def test_a_batch_is_cut_into_few_parts_in_order(messages, bound, parts):
    indices = np.arange(8)
    bound = tokens_at_once(TrainingSettings(max_tokens=bound), CPU, training=True)
    cut = split_batch(messages, indices, bound)
    assert len(cut) == parts and np.concatenate(cut).tolist() == indices.tolist()


def test_invalid_input_is_refused_with_the_remedy(model, messages):
    settings, labels = TrainingSettings(epochs=1, progress=False), [0, 1] * 4
    bad = [([], "8 messages and labels"), ([labels], "need one label for each")]
    bad += [([wrong] * 8, "integers from 0 to 1") for wrong in (2, -1, 0.5, float("nan"), "spam")]
    for wrong, message in bad:
        with pytest.raises(ValueError, match=message):
            fit(model, (messages, wrong), settings, CPU)
        with pytest.raises(ValueError, match=message):
            fit(model, (messages, labels), settings, CPU, (messages, wrong))
        with pytest.raises(ValueError, match=message):
            training.accuracy(model, messages, wrong, CPU)
    with pytest.raises(ValueError, match="no messages"):
        fit(model, (messages, labels), settings, CPU, ([], []))
    with pytest.raises(ValueError, match="no messages"):
        predict(model, [], CPU)
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        predict(model.train(), [np.zeros(65, dtype=np.int32)], CPU)
    assert model.training  # as it was


@pytest.mark.parametrize("message", [[], [100], [-1], [0.5], [[1, 2]], ["you"], 7])
def test_messages_that_are_no_token_ids_are_refused_by_number(model, messages, message):
    for call in (
        lambda encoded: predict(model, encoded, CPU),
        lambda encoded: fit(model, (encoded, [0, 1]), TrainingSettings(progress=False), CPU),
    ):
        with pytest.raises(ValueError, match="message 1 must be token ids, at least one, from 0 to 99"):
            call([messages[0], message])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda labels: np.array(labels, dtype=bool)])
def test_labels_may_be_any_sequence_of_integers(model, messages, kind):
    settings, part = TrainingSettings(epochs=1, progress=False), (messages, kind([0, 1] * 4))
    assert np.isfinite(fit(prepare(model, settings, CPU), part, settings, CPU, part).losses).all()


def test_a_prepared_model_is_evaluated_in_its_own_precision(model, messages):
    model.trf_blocks[0].ff.layers[0] = model.trf_blocks[0].ff.layers[0].linear  # frozen, without LoRA
    prepare(model, TrainingSettings(precision="bf16"), CPU)
    expected = predict(model, messages, CPU, TrainingSettings(precision="bf16"))
    assert torch.equal(predict(model, messages, CPU), expected)


@pytest.mark.parametrize("value", [0, 1.5, float("nan"), "8"])
@pytest.mark.parametrize(
    "name", ["epochs", "batch_size", "bucket", "gradient_accumulation_steps", "eval_batch_size", "max_tokens"]
)
def test_counts_that_are_no_positive_integers_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, an integer, not {value}"):
        TrainingSettings(**{name: value})


@pytest.mark.parametrize("name, value", [
    ("learning_rate", 0), ("learning_rate", 1.5), ("learning_rate", float("nan")), ("weight_decay", -1),
    ("weight_decay", float("inf")), ("seed", -1), ("seed", 0.5), ("seed", 2**63), ("precision", "int3"),
])
def test_settings_out_of_their_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, not .?{value}"):
        TrainingSettings(**{name: value})


def poison(model, value):
    """Let the training's first step change a weight of the head to `value`."""
    model.out_head.lora.B.register_hook(lambda grad: torch.full_like(grad, value))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_training_that_diverges_ends_with_the_step(model, messages, precision):
    settings = TrainingSettings(precision=precision, epochs=1, batch_size=4, progress=False)
    poison(prepare(model, settings, CPU), float("nan"))
    with pytest.raises(ValueError, match="the loss of step 2 is nan: lower the learning rate"):
        fit(model, (messages, [0, 1] * 4), settings, CPU)


def test_a_training_that_diverges_in_its_last_step_has_no_accuracy(model, messages):
    settings = TrainingSettings(precision="float32", epochs=1, progress=False)
    poison(prepare(model, settings, CPU), float("nan"))
    pair = messages, [0, 1] * 4
    with pytest.raises(ValueError, match="the logits are not finite"):
        fit(model, pair, settings, CPU, validation=pair)


def test_a_model_without_anything_to_train_is_refused(model, messages):
    settings = TrainingSettings(progress=False)
    with pytest.raises(ValueError, match="call prepare"):
        fit(model.half(), (messages, [0, 1] * 4), settings, CPU)
    with pytest.raises(ValueError, match="call prepare"):
        fit(model.float().requires_grad_(False), (messages, [0, 1] * 4), settings, CPU)


def test_precision_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert choose_precision(CPU) == "float32" and choose_precision(torch.device("mps")) == "float32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert choose_precision(CPU) == "bf16" and choose_precision(CPU, "float32") == "float32"
    with pytest.raises(ValueError, match="precision must be"):
        choose_precision(CPU, "int3")


def test_restoring_gives_a_model_that_all_other_code_can_use(model, messages):
    expected = printed_logits(model, messages).detach()
    prepare(model, TrainingSettings(precision="bf16"), CPU)
    restore(model)
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())
    torch.testing.assert_close(printed_logits(model, messages).detach(), expected, atol=0.1, rtol=0.1)


@pytest.mark.slow
def test_compiling_does_not_change_training(model, messages):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected = weights_after_training(model, messages)
    model.load_state_dict(start)
    torch.testing.assert_close(
        weights_after_training(model, messages, compile=True), expected, atol=1e-5, rtol=1e-4
    )
