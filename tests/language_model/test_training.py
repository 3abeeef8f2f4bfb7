"""Windows lose no token, losses and gradients are the plain ones, and a training can be repeated."""

import argparse
import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import ch05
from ch04 import GPTModel, MultiHeadAttention
from fast_path.memory import peak_of_allocations
from fast_path.settings import add_flags, take_flags
from language_model import training
from language_model.training import (
    TextSettings,
    adamw_on_matrices,
    backward_mean,
    draw_batches,
    encode_windows,
    fit_text,
    load_language_model,
    mean_loss,
    perplexity,
)
from lora.layers import apply_lora
from models import same_state, state, train_a_little

CPU = torch.device("cpu")
WORDS = ["the film", "was", "good", "<|endoftext|>", "\n\n", "Élan", "a " * 9]
KINDS = {"in full": None, "LoRA": ("query", "mlp"), "LoRA in the head too": "all", "the head alone": "head"}
QUICK = TextSettings(steps=6, batch_size=3, learning_rate=1e-2, precision="float32", progress=False)


def make_model(config, targets=None, vocabulary=90):
    """Return a random GPT with a tied head; with `targets`, with LoRA there that is not zero."""
    torch.manual_seed(123)
    model = GPTModel({**config, "vocab_size": vocabulary})
    model.out_head.weight = model.tok_emb.weight
    return model if targets is None else train_a_little(apply_lora(model, 4, 4, targets))


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request, tiny_config):
    return make_model(tiny_config, request.param)


@pytest.fixture
def windows():
    return torch.randint(0, 90, (10, 33), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def plain_loss(model, windows):
    """The mean loss of all windows as chapter 5 computes it."""
    ids = windows.long()
    return ch05.calc_loss_batch(ids[:, :-1], ids[:, 1:], model, CPU)


def poison(model, learning_rate, **_):
    """Return an optimizer whose step makes a weight infinite."""

    class Poison(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["params"][0].data.fill_(torch.inf)

    return Poison(model.parameters(), lr=learning_rate)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# Windows


@examples(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), st.integers(1, 12))
def test_windows_and_dropped_tokens_are_the_joined_texts(tokenizer, texts, length):
    ids = [token for text in texts for token in (50256, *tokenizer.encode_ordinary(text))][1:]
    if len(ids) <= length:
        with pytest.raises(ValueError, match=f"{len(ids)} tokens make no window of {length + 1}"):
            encode_windows(texts, tokenizer, length)
        return
    windows, dropped = encode_windows(texts, tokenizer, length)
    assert windows.dtype == torch.int32 and windows.shape[1] == length + 1 and 0 <= dropped < length
    assert [ids[0], *windows[:, 1:].flatten().tolist()] == ids[: len(ids) - dropped]
    assert windows[1:, 0].tolist() == windows[:-1, -1].tolist()


def test_the_name_of_the_end_in_a_text_is_no_end(tokenizer):
    windows, _ = encode_windows(["a <|endoftext|>", "b"], tokenizer, 1)
    assert (windows[:, 1] == 50256).sum() == 1


@pytest.mark.parametrize("texts, length, says", [
    ("one text", 1, "list of texts"), (["some", ""], 1, "none of them empty"), ([None], 1, "list of texts"),
    ([], 1, "0 tokens make no window of 2"), (["two words"], 0, "length must be at least 1"),
])
def test_what_makes_no_windows_is_refused(texts, length, says, tokenizer):
    with pytest.raises(ValueError, match=says):
        encode_windows(texts, tokenizer, length)


@pytest.mark.parametrize("change, says", [
    (lambda windows: windows[:0], "use encode_windows"), (lambda windows: windows[0], "must be"),
    (lambda windows: windows[:, :1], "T from 1 to 64"), (lambda windows: windows.repeat(1, 2), "T from 1 to"),
    (lambda windows: windows + 1, "ids from 0 to 89"), (lambda windows: windows - 1, "ids from 0 to 89"),
    (lambda windows: windows.float(), "ids from 0 to 89"),
])
def test_windows_that_do_not_fit_the_model_are_refused(change, says, windows, tiny_config):
    model, (windows[0, 0], windows[0, 1]) = make_model(tiny_config), (0, 89)
    before = state(model)
    for call in (
        lambda bad: mean_loss(model, bad, CPU), lambda bad: fit_text(model, bad, QUICK, CPU),
        lambda bad: fit_text(model, windows, QUICK, CPU, validation=bad),
    ):
        with pytest.raises(ValueError, match=says):
            call(change(windows))
    assert same_state(model, before)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.integers(0, 5))
def test_every_window_is_drawn_once_before_any_is_drawn_again(count, batch_size, steps, seed):
    settings = TextSettings(steps=steps, batch_size=batch_size, seed=seed)
    batches = draw_batches(count, settings)
    assert batches.shape == (steps, batch_size)
    order = batches.flatten()
    for start in range(0, len(order), count):
        epoch = order[start : start + count]
        assert len({*epoch}) == len(epoch) and {*epoch} <= {*range(count)}
    assert (draw_batches(count, settings) == batches).all()


# Losses and gradients


@pytest.mark.parametrize("rows", [1, 7, 32, 1000])
def test_loss_and_gradients_are_those_of_all_logits_at_once(model, windows, rows):
    whole = copy.deepcopy(model)
    expected = plain_loss(whole, windows)
    expected.backward()
    ids = windows.long()
    loss = backward_mean(model, ids[:, :-1], ids[:, 1:], rows=rows)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=0)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(model)[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_the_logits_of_few_tokens_are_in_memory_at_once(tiny_config):
    model = make_model(tiny_config, "query", vocabulary=20_000)
    ids = torch.randint(0, 20_000, (8, 64))
    logits = 4 * ids.numel() * 20_000  # bytes
    assert peak_of_allocations(lambda: backward_mean(model, ids, ids, rows=32)) < logits / 2
    assert peak_of_allocations(lambda: plain_loss(model, ids).backward()) > logits


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_mean_loss_is_that_of_all_windows_and_the_mode_stays(model, windows, batch_size):
    with torch.no_grad():
        expected = plain_loss(model, windows).item()
    for mode in (True, False):
        model.train(mode)
        loss = mean_loss(model, windows, CPU, batch_size)
        assert loss == pytest.approx(expected, abs=1e-5) and model.training is mode


def test_the_mean_loss_is_measured_without_dropout(windows, tiny_config):
    model = make_model({**tiny_config, "drop_rate": 0.5})
    assert mean_loss(model, windows, CPU) == mean_loss(model, windows, CPU)


def test_equally_likely_tokens_have_their_number_as_perplexity(windows, tiny_config):
    model = make_model(tiny_config)
    torch.nn.init.zeros_(model.out_head.weight)
    assert perplexity(mean_loss(model, windows, CPU)) == pytest.approx(90, rel=1e-5)


# Training


def test_training_lowers_the_loss_and_changes_what_requires_a_gradient_alone(model, windows):
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before, first = state(model), mean_loss(model, windows, CPU)
    history = fit_text(model, windows, replace(QUICK, steps=20), CPU, validation=windows)
    assert mean_loss(model, windows, CPU) < first
    after = model.state_dict()
    changed = {name for name, old in before.items() if not torch.equal(old, after[name])}
    assert changed and not changed & frozen
    assert len(history.losses) == 20 and history.seconds > 0


def test_a_step_is_chapter_5s_step(windows, tiny_config):
    ours = make_model(tiny_config)
    theirs = copy.deepcopy(ours)
    settings = replace(QUICK, steps=3, decay=False, clip_norm=math.inf)
    history = fit_text(ours, windows, settings, CPU)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.01)
    for indices, loss in zip(draw_batches(10, settings), history.losses, strict=True):
        optimizer.zero_grad()
        expected = plain_loss(theirs, windows[indices])
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), abs=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_one_others(windows, tiny_config):
    config = {**tiny_config, "drop_rate": 0.1}
    models = [make_model(config) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        fit_text(model, windows, replace(QUICK, seed=seed), CPU)
    first = state(models[0])
    assert same_state(models[1], first) and not same_state(models[2], first)


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_is_restored(windows, tiny_config, mode):
    model = make_model(tiny_config).train(mode)
    fit_text(model, windows, QUICK, CPU, validation=windows)
    assert model.training is mode
    with pytest.raises(ValueError, match="lower the learning rate"):
        fit_text(model, windows, QUICK, CPU, make_optimizer=poison)
    assert model.training is mode


@pytest.mark.parametrize("steps, every, measured", [
    (6, 2, [0, 2, 4, 6]), (6, 4, [0, 4, 6]), (6, 6, [0, 6]), (6, 100, [0, 6]), (1, 1, [0, 1]),
])
def test_the_validation_loss_is_measured_at_the_ends_and_in_between(
    steps, every, measured, windows, tiny_config
):
    model = make_model(tiny_config)
    first = mean_loss(model, windows, CPU)
    settings = replace(QUICK, steps=steps, eval_every=every)
    history = fit_text(model, windows, settings, CPU, validation=windows)
    assert [*history.validation] == measured
    assert history.validation[0] == first and history.validation[steps] == mean_loss(model, windows, CPU)


def test_measuring_does_not_change_the_training(windows, tiny_config):
    models = [make_model({**tiny_config, "drop_rate": 0.1}) for _ in range(2)]
    fit_text(models[0], windows, QUICK, CPU)
    fit_text(models[1], windows, replace(QUICK, eval_every=1), CPU, validation=windows)
    assert same_state(models[1], state(models[0]))


def test_the_callers_optimizer_is_used_with_a_rate_for_each_group(windows, tiny_config):
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def make(model, learning_rate, total_steps, **_):
        first, *others = model.parameters()
        groups = [(first, 16 * learning_rate), (others, learning_rate / total_steps)]
        return Recorder([{"params": params, "lr": rate} for params, rate in groups])

    fit_text(make_model(tiny_config), windows, replace(QUICK, steps=4), CPU, make_optimizer=make)
    expected = [[0.16 * left, 0.0025 * left] for left in (1, 0.75, 0.5, 0.25)]
    assert seen == [pytest.approx(rates) for rates in expected]


def test_no_gradient_is_longer_than_the_clip_norm(windows, tiny_config):
    norms = []

    class Norms(torch.optim.SGD):
        def step(self, closure=None):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.nn.utils.get_total_norm(gradients).item())
            return super().step(closure)

    settings = replace(QUICK, clip_norm=0.01)

    def make(model, learning_rate, **_):
        return Norms(model.parameters(), lr=learning_rate)

    fit_text(make_model(tiny_config), windows, settings, CPU, make_optimizer=make)
    assert norms == pytest.approx([0.01] * settings.steps, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_gives_nearly_the_same_losses(precision, windows, tiny_config):
    histories = [
        fit_text(make_model(tiny_config, "all"), windows, replace(QUICK, precision=each), CPU)
        for each in ("float32", precision)
    ]
    expected, losses = (history.losses for history in histories)
    assert losses == pytest.approx(expected, abs=0.1) and losses != expected


@pytest.mark.parametrize("poisoned", ["loss", "weight"])
def test_a_training_that_diverges_is_an_error(poisoned, windows, tiny_config):
    steps = 3 if poisoned == "loss" else 1  # after one step there is no loss that shows it
    with pytest.raises(ValueError, match="lower the learning rate"):
        fit_text(make_model(tiny_config), windows, replace(QUICK, steps=steps), CPU, make_optimizer=poison)


def test_a_model_in_which_nothing_can_be_trained_is_refused(windows, tiny_config):
    model = make_model(tiny_config)
    for change in (lambda: model.requires_grad_(False), lambda: model.requires_grad_(True).bfloat16()):
        change()
        with pytest.raises(ValueError, match="some parameters in float32"):
            fit_text(model, windows, QUICK, CPU)


# Settings


def test_the_rate_rises_and_falls_linearly():
    settings = TextSettings(steps=10, warmup=4)
    rates = [settings.rate(done) for done in range(11)]
    assert rates[:5] == pytest.approx([0.2, 0.4 * 0.9, 0.6 * 0.8, 0.8 * 0.7, 0.6]) and rates[10] == 0
    assert [TextSettings(decay=False, warmup=1).rate(done) for done in range(3)] == [0.5, 1, 1]


@pytest.mark.parametrize("name, value", [
    ("steps", 0), ("batch_size", 1.5), ("eval_every", 0), ("warmup", -1), ("warmup", 201), ("warmup", 0.5),
    ("clip_norm", 0), ("clip_norm", math.nan), ("learning_rate", 0), ("weight_decay", -1), ("seed", -1),
    ("precision", "int3"),
])
def test_settings_out_of_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, not .?{value}"):
        TextSettings(**{name: value})


def test_every_setting_with_a_help_text_becomes_a_flag():
    parser = argparse.ArgumentParser()
    add_flags(parser, TextSettings())
    options = vars(parser.parse_args(["--steps", "7", "--batch-size", "2", "--learning-rate", "0.5"]))
    settings = take_flags(TextSettings(), options)
    assert settings == TextSettings(steps=7, batch_size=2, learning_rate=0.5) and not options


# The embedded model


def test_the_embedded_model_has_one_embedding_and_fused_attention():
    model, config = load_language_model("tiny")
    assert model.out_head.weight is model.tok_emb.weight and config["vocab_size"] == 50257
    assert all(module.fused for module in model.modules() if isinstance(module, MultiHeadAttention))


def test_the_embedded_model_predicts_english_far_better_than_a_uniform_guess(tokenizer):
    model, _ = load_language_model("tiny")
    windows, _ = encode_windows([training.__doc__ * 3], tokenizer, 64)
    assert mean_loss(model, windows[:4], CPU) < 0.7 * math.log(50257)
    ids = windows[:1].long()
    logits = model(ids[:, :-1])
    expected = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert mean_loss(model, windows[:1], CPU) == pytest.approx(expected, abs=1e-5)


# Weight decay


def test_without_a_gradient_matrices_shrink_and_biases_gains_and_shifts_stay(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw_on_matrices(model, 0.1, total_steps=1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.requires_grad and parameter.dim() > 1 else 1
        torch.testing.assert_close(parameter, factor * before[name], msg=name)


def test_every_trained_parameter_is_in_one_group_and_fit_text_takes_the_optimizer(model, windows):
    made = []

    def make(*arguments, **options):
        made.append(adamw_on_matrices(*arguments, **options))
        return made[-1]

    fit_text(model, windows, QUICK, CPU, make_optimizer=make)
    grouped = [p for group in made[0].param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {*map(id, grouped)} == {*map(id, trained)} and len(grouped) == len(trained)
    assert {group["weight_decay"] for group in made[0].param_groups} <= {QUICK.weight_decay, 0.0}
