"""The loss is that of the targets that count, however they are padded and batched; training lowers it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from appendix_e import count_parameters
from ch04 import GPTModel
from fast_path.memory import peak_of_allocations
from instructions.collate import IGNORED, collate, places_of
from instructions.training import (
    InstructionSettings,
    answer_loss,
    check_encoded,
    entry_batches,
    fit_instructions,
    load_batch,
)
from language_model.training import backward_mean
from lora.layers import apply_lora
from models import same_state, state, train_a_little

CPU = torch.device("cpu")
QUICK = InstructionSettings(epochs=2, batch_size=4, learning_rate=1e-2, weight_decay=0.0, progress=False)
GPT2_MEDIUM = {
    "vocab_size": 50257, "context_length": 1024, "emb_dim": 1024, "n_heads": 16, "n_layers": 24,
    "drop_rate": 0.0, "qkv_bias": True,
}


@pytest.fixture
def encoded():
    """Ten entries of 5 to 14 tokens, each with a prompt of 2 to 4."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 15, (10,), generator=generator).tolist()
    return [
        (torch.randint(0, 90, (length,), generator=generator).tolist(), 2 + length % 3) for length in lengths
    ]


def make_model(config, lora=True):
    """Return a random GPT with a tied head, with LoRA everywhere that is not zero if asked for."""
    torch.manual_seed(123)
    model = GPTModel(config)
    model.out_head.weight = model.tok_emb.weight
    return train_a_little(apply_lora(model, 4, 4, "all")) if lora else model


def plain_loss(model, inputs, targets):
    """The loss as chapter 7 computes it: all logits, and -100 left to cross_entropy."""
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_loss_and_gradients_are_those_of_the_plain_loop(lora, mask_prompt, encoded, tiny_config):
    ours = make_model(tiny_config, lora)
    theirs = copy.deepcopy(ours)
    expected = plain_loss(theirs, *collate(encoded, mask_prompt))
    expected.backward()
    loss = backward_mean(ours, *load_batch(encoded, ours, CPU, mask_prompt), rows=7)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_only_the_logits_of_targets_that_count_are_computed(tiny_config):
    model = make_model(tiny_config)
    long_prompts = [([1] * 40 + [2, 3], 40)] * 4
    rows = []
    model.out_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    batch = load_batch(long_prompts, model, CPU, mask_prompt=True)
    peak = peak_of_allocations(lambda: backward_mean(model, *batch))
    assert sum(rows) == 4 * 3  # two tokens and the end
    everything = load_batch(long_prompts, model, CPU, mask_prompt=False)
    assert peak < peak_of_allocations(lambda: backward_mean(model, *everything)) / 3


def test_other_tokens_in_the_prompts_targets_change_nothing(encoded, tiny_config):
    model = make_model(tiny_config)
    inputs, targets = collate(encoded, mask_prompt=True)
    loss = backward_mean(model, inputs, targets, places_of(targets))
    shuffled = targets.clone()
    hidden = targets == IGNORED
    shuffled[hidden] = torch.randint(0, 90, (int(hidden.sum()),))
    assert torch.equal(backward_mean(model, inputs, shuffled, places_of(targets)), loss)


def test_padding_changes_nothing(encoded, tiny_config):
    model = make_model(tiny_config)
    inputs, targets, places = load_batch(encoded, model, CPU, True)
    loss = backward_mean(model, inputs, targets, places)
    ids = inputs.masked_fill(inputs == 50256, 7)
    torch.testing.assert_close(backward_mean(model, ids, targets, places), loss, atol=1e-6, rtol=0)
    one_by_one = [backward_mean(model, *load_batch([entry], model, CPU, True)) for entry in encoded]
    counts = [len(ids) - prompt + 1 for ids, prompt in encoded]
    mean = sum(n * each for n, each in zip(counts, one_by_one, strict=True)) / sum(counts)
    torch.testing.assert_close(mean, loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_the_measured_loss_is_the_mean_over_all_targets(batch_size, mask_prompt, encoded, tiny_config):
    model = make_model(tiny_config)
    with torch.no_grad():
        expected = plain_loss(model, *collate(encoded, mask_prompt)).item()
    for mode in (True, False):
        model.train(mode)
        loss = answer_loss(model, encoded, CPU, mask_prompt, batch_size)
        assert loss == pytest.approx(expected, abs=1e-5) and model.training is mode


def test_the_losses_with_and_without_the_prompt_are_of_different_tokens(encoded, tiny_config):
    model = make_model(tiny_config)
    assert answer_loss(model, encoded, CPU, True) != pytest.approx(answer_loss(model, encoded, CPU, False))


@pytest.mark.parametrize("lora", [True, False])
def test_training_lowers_the_loss_and_changes_only_what_trains(lora, encoded, tiny_config):
    model = make_model(tiny_config, lora)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before = state(model)
    settings = replace(QUICK, epochs=5, mask_prompt=True)
    history = fit_instructions(model, encoded, settings, CPU, validation=encoded)
    after = model.state_dict()
    changed = {name for name, old in before.items() if not torch.equal(old, after[name])}
    assert changed and not changed & frozen
    assert [*history.validation] == [0, 3, 6, 9, 12, 15] and len(history.losses) == 15
    assert history.validation[15] < history.validation[0] and history.seconds > 0
    assert history.validation[15] == answer_loss(model, encoded, CPU)


def test_a_step_is_the_plain_loops(encoded, tiny_config):
    ours = make_model(tiny_config)
    theirs = copy.deepcopy(ours)
    settings = replace(QUICK, epochs=1, decay=False, weight_decay=0.1)
    history = fit_instructions(ours, encoded, settings, CPU)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for indices, loss in zip(entry_batches(encoded, settings, 0), history.losses, strict=True):
        optimizer.zero_grad()
        expected = plain_loss(theirs, *collate([encoded[n] for n in indices]))
        expected.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        assert loss == pytest.approx(expected.item(), abs=1e-4)


def test_every_epoch_has_each_entry_once_in_another_order(encoded):
    epochs = [entry_batches(encoded, QUICK, epoch) for epoch in range(2)]
    orders = [[int(n) for batch in batches for n in batch] for batches in epochs]
    assert [sorted(order) for order in orders] == [[*range(10)]] * 2 and orders[0] != orders[1]


def test_the_same_seed_gives_the_same_weights_and_another_one_others(encoded, tiny_config):
    models = [make_model(tiny_config) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        fit_instructions(model, encoded, replace(QUICK, seed=seed), CPU)
    first = state(models[0])
    assert same_state(models[1], first) and not same_state(models[2], first)


def test_a_prompt_that_fills_the_context_is_refused_before_the_training(encoded, tiny_config):
    model = make_model(tiny_config)
    before = state(model)
    bad = [*encoded, ([1] * 70, 65)]
    for call in (
        lambda: fit_instructions(model, bad, QUICK, CPU), lambda: answer_loss(model, bad, CPU),
        lambda: fit_instructions(model, encoded, QUICK, CPU, validation=bad),
    ):
        with pytest.raises(ValueError, match="the first is number 10, fill the context of 64"):
            call()
    with pytest.raises(ValueError, match="no entries"):
        fit_instructions(model, [], QUICK, CPU)
    assert same_state(model, before)
    check_encoded(model, [([1] * 70, 64)])


def test_an_answer_that_exceeds_the_context_is_cut(tiny_config):
    model = make_model(tiny_config)
    long = [([1] * 100, 60)]
    assert load_batch(long, model, CPU, True)[0].shape == (1, 64)
    assert answer_loss(model, long, CPU) > 0


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("batch_size", 0), ("learning_rate", 2), ("weight_decay", -1), ("bucket", 0),
])
def test_settings_out_of_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        InstructionSettings(**{name: value})


def test_a_clip_norm_out_of_range_is_refused_before_the_training(encoded, tiny_config):
    with pytest.raises(ValueError, match="clip_norm must be positive"):
        fit_instructions(make_model(tiny_config), encoded, replace(QUICK, clip_norm=0), CPU)


def test_lora_in_all_layers_trains_the_books_number_of_parameters():
    with torch.device("meta"):
        model = GPTModel(GPT2_MEDIUM)
        assert count_parameters(model)[1] == 406_286_336
        trained, total = count_parameters(apply_lora(model, 16, 16, "all"))
    assert trained == 7_898_384 and total == 406_286_336 + trained
