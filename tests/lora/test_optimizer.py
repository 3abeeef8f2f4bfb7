"""`lora_adamw`: its groups, AdaLoRA's and Delta-LoRA's steps beside it, and what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn

from lora.layers import adapted_layers, apply_lora
from lora.optimizer import lora_adamw
from lora.wrappers import BRANCHES
from models import IDS, small_gpt, state, train_a_little

LABELS = torch.tensor([0, 1, 1])


def adapt(variant="lora", **options):
    return apply_lora(small_gpt(), 3, 2.0, variant=variant, **options).train()


def loss(model):
    return nn.functional.cross_entropy(model(IDS)[:, -1], LABELS)


def take_steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def kept_ranks(model):
    return [int((layer.lora.E != 0).sum()) for layer in adapted_layers(model).values()]


def is_finite(model):
    return all(p.isfinite().all() for p in model.parameters())


# Groups


@pytest.mark.parametrize(("variant", "ratio", "rates"), [
    ("lora", None, {0.01}), ("lora", 1, {0.01}), ("lora", 4.0, {0.01, 0.04}), ("lora+", None, {0.01, 0.16}),
    ("lora+", 1.0, {0.01}), (("dora", "lora+"), None, {0.01, 0.16}), ("vera", None, {0.01}),
    ("lora-fa", 1.0, {0.01}),
])
def test_every_trained_parameter_has_one_rate(variant, ratio, rates):
    model = adapt(variant, train_in_full="head")
    optimizer = lora_adamw(model, 0.01, ratio=ratio)
    assert {group["lr"] for group in optimizer.param_groups} == rates
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({*grouped})
    assert {*grouped} == {p for p in model.parameters() if p.requires_grad}
    fast = {p for group in optimizer.param_groups if group["lr"] > 0.01 for p in group["params"]}
    assert fast == ({x.lora.B for x in adapted_layers(model).values()} if len(rates) > 1 else set())


def test_the_variants_own_ratio_holds_unless_another_is_given():
    model = adapt("lora+", ratio=8.0)
    for given, fastest in ((None, 0.08), (2.0, 0.02), (1.0, 0.01)):
        groups = lora_adamw(model, 0.01, ratio=given).param_groups
        assert max(group["lr"] for group in groups) == pytest.approx(fastest)


def test_of_an_embedding_a_has_the_raised_rate_because_it_starts_at_zero():
    model = apply_lora(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), 2, 2.0, ("embedding", "all"))
    groups = lora_adamw(model, 1e-3, ratio=8).param_groups
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    embedding, linear = (layer.lora for layer in model)
    assert rates[embedding.A] == rates[linear.B] == 8e-3 and rates[embedding.B] == rates[linear.A] == 1e-3
    assert not embedding.A.any() and not linear.B.any()


def test_a_schedule_scales_both_rates():
    optimizer = lora_adamw(adapt("lora+"), 0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / 10)
    optimizer.step()
    schedule.step()
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.009, 0.144])


def test_layers_that_are_frozen_altogether_do_not_stop_the_others():
    model = adapt("lora+")
    frozen = adapted_layers(model)["out_head"].requires_grad_(False)
    optimizer = lora_adamw(model, 0.01)
    before = state(frozen)
    take_steps(model, optimizer, 2)
    assert all(torch.equal(value, before[name]) for name, value in state(frozen).items())


@pytest.mark.parametrize("options", [
    {"fused": True}, {"foreach": True}, {"amsgrad": True}, {"weight_decay": 0.0}, {"betas": (0.5, 0.9)},
])
@pytest.mark.parametrize("variant", [*BRANCHES, ("dora", "lora+")])
def test_adamws_options_are_kept(variant, options):
    model = adapt(variant)
    optimizer = lora_adamw(model, 0.01, total_steps=9, **options)
    take_steps(model, optimizer, 3)
    assert is_finite(model)
    for name, value in options.items():
        assert all(group[name] == value for group in optimizer.param_groups)


@pytest.mark.parametrize(("variant", "options", "message"), [
    ("lora", {"learning_rate": -1.0}, "learning_rate must be a number from 0, not -1.0"),
    ("lora", {"learning_rate": math.nan}, "learning_rate must be a number from 0, not nan"),
    ("lora", {"learning_rate": "1e-3"}, "learning_rate must be a number from 0, not '1e-3'"),
    ("lora", {"ratio": "4"}, "ratio must be a positive number, not '4'"),
    ("lora", {"ratio": True}, "ratio must be a positive number, not True"),
    ("lora", {"ratio": math.inf}, "ratio must be a positive number"),
    ("lora", {"weight_decay": -1}, "Invalid weight_decay"),
    ("adalora", {"total_steps": 1.5}, "give total_steps"),
    ("adalora", {"total_steps": 0}, "give total_steps"),
    ("adalora", {"allocation": {"warmup": 10}}, "cannot lower its ranks in 10 steps with 10 before"),
    ("adalora", {"allocation": {"every": 0}}, "cannot lower its ranks"),
    ("adalora", {"allocation": {"every": 1.5}}, "must be of whole numbers of steps"),
    ("adalora", {"allocation": {"warmup": "1"}}, "must be of whole numbers of steps"),
    ("adalora", {"allocation": {"smoothing": 3}}, "smoothing must be two numbers in .0, 1., not 3"),
    ("adalora", {"allocation": {"smoothing": (2, 2)}}, "smoothing must be two numbers"),
    ("adalora", {"allocation": {"smoothing": (0.5,)}}, "smoothing must be two numbers"),
    ("adalora", {"allocation": {"orthogonality": math.nan}}, "orthogonality must be a number from 0"),
    ("adalora", {"allocation": {"orthogonality": -1}}, "orthogonality must be a number from 0, not -1"),
])
def test_options_out_of_range_are_refused(variant, options, message):
    with pytest.raises(ValueError, match=message):
        lora_adamw(adapt(variant), **{"learning_rate": 0.01, "total_steps": 10, **options})


def test_a_ratio_needs_a_trained_pair():
    model = adapt("lora+")
    for layer in adapted_layers(model).values():
        layer.lora.B.requires_grad_(False)
    with pytest.raises(ValueError, match="does not train both A and B"):
        lora_adamw(model, 0.01)
    with pytest.raises(ValueError, match="there is no LoRA for a ratio"):
        lora_adamw(small_gpt(), 0.01, ratio=16)


def test_a_rate_of_zero_changes_nothing():
    for variant in BRANCHES:
        model = adapt(variant)
        before = state(model)
        take_steps(model, lora_adamw(model, 0.0, total_steps=10), 2)
        assert all(torch.equal(value, before[name]) for name, value in state(model).items()), variant


# AdaLoRA's steps


def test_after_the_last_step_the_ranks_stay_as_they_are():
    model = adapt("adalora")
    optimizer = lora_adamw(model, 0.01, total_steps=6)
    take_steps(model, optimizer, 6)
    kept = kept_ranks(model)
    take_steps(model, optimizer, 5)
    assert kept_ranks(model) == kept and sum(kept) == 2 * len(kept)


def test_a_second_training_begins_with_all_ranks_and_ends_with_the_budget():
    model = adapt("adalora")
    take_steps(model, lora_adamw(model, 0.01, total_steps=6), 6)
    optimizer = lora_adamw(model, 0.01, total_steps=20)
    take_steps(model, optimizer, 2)
    assert sum(kept_ranks(model)) == 3 * len(kept_ranks(model))
    take_steps(model, optimizer, 18)
    assert sum(kept_ranks(model)) == 2 * len(kept_ranks(model))


def test_frozen_layers_keep_their_ranks_and_do_not_count():
    model = train_a_little(adapt("adalora"))
    layers = [*adapted_layers(model).values()]
    for layer in layers[:4]:
        layer.requires_grad_(False)
    take_steps(model, lora_adamw(model, 0.01, total_steps=10), 10)
    kept = kept_ranks(model)
    assert kept[:4] == [3] * 4 and sum(kept[4:]) == 2 * len(kept[4:])


@pytest.mark.parametrize("variant", ["adalora", "delta-lora"])
def test_a_step_without_gradients_is_a_step(variant):
    model = adapt(variant)
    optimizer = lora_adamw(model, 0.01, total_steps=6)
    optimizer.step()
    take_steps(model, optimizer, 5)
    assert is_finite(model)


def test_a_closure_and_accumulated_gradients_end_with_the_budget():
    model = adapt("adalora")
    optimizer = lora_adamw(model, 0.01, total_steps=6)

    def closure():
        optimizer.zero_grad()
        for _ in range(3):
            (loss(model) / 3).backward()

    for _ in range(6):
        optimizer.step(closure)
    assert sum(kept_ranks(model)) == 2 * len(kept_ranks(model))


# Half precision


@pytest.mark.parametrize("variant", BRANCHES)
@pytest.mark.parametrize("fused", [True, False])
def test_a_scaled_loss_in_fp16_gives_the_steps_of_the_loss_itself(variant, fused):
    scaled = adapt(variant)
    plain = copy.deepcopy(scaled)
    optimizers = [lora_adamw(model, 0.01, total_steps=8, fused=fused) for model in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(8):
        optimizers[0].zero_grad()
        scaler.scale(loss(scaled)).backward()
        scaler.step(optimizers[0])
        scaler.update()
    take_steps(plain, optimizers[1], 8)
    for one, two in zip(scaled.parameters(), plain.parameters()):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("variant", "options"), [("adalora", {}), ("delta-lora", {"start_step": 3})])
def test_a_step_that_overflows_is_left_out_and_not_counted(variant, options, fused):
    model = adapt(variant, **options)
    clean = copy.deepcopy(model)
    optimizers = [lora_adamw(each, 0.01, total_steps=6, fused=fused) for each in (model, clean)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for overflows in (True, False, False, False, True, True, False, False, False):
        optimizers[0].zero_grad()
        scaler.scale(loss(model) * (math.inf if overflows else 1)).backward()
        scaler.step(optimizers[0])
        scaler.update()
    take_steps(clean, optimizers[1], 6)
    assert is_finite(model)
    for one, two in zip(model.parameters(), clean.parameters()):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", BRANCHES)
def test_training_under_autocast_lowers_the_loss(variant):
    model, losses = adapt(variant), []
    optimizer = lora_adamw(model, 0.02, total_steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss(model))
        losses[-1].backward()
        optimizer.step()
    assert is_finite(model) and losses[-1] < losses[0]
