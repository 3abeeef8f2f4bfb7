"""LoRA's relatives: start, what trains, invariants, parity with PEFT and with the published rules."""

import copy
import math

import peft.optimizers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from appendix_e import count_parameters
from ch04 import GPT_CONFIG_124M, GPTModel
from lora.adapters import combine_adapters, load_adapter, save_adapter, set_adapter, take_adapter
from lora.layers import adapted_layers, apply_lora, merge_lora, remove_lora, unmerge_lora
from lora.optimizer import lora_adamw
from lora.wrappers import BRANCHES, VARIANTS
from models import IDS, foreign, same_state, small_gpt, state, train_a_little
from topics.lora_variants import first_update

BRANCH = pytest.mark.parametrize("variant", BRANCHES)
ANY = st.sampled_from(VARIANTS)
KINDS = ("gpt2", "llama", "bert")


def adapt(model, variant, rank=3, alpha=2.0, targets="all", **options):
    if variant == "vera" or (isinstance(variant, tuple) and "vera" in variant):
        alpha = options.pop("vera_alpha", 1.0)
    return apply_lora(model, rank, alpha, targets, variant=variant, **options)


def trained(variant, seed=1, model=None, **options):
    return train_a_little(adapt(model or small_gpt(), variant, **options), seed)


def steps(model, count, **options):
    """Train `model` for `count` real steps and return its losses."""
    optimizer = lora_adamw(model, 0.02, total_steps=count, **options)
    labels, losses = torch.tensor([0, 1, 1]), []
    for _ in range(count):
        loss = nn.functional.cross_entropy(model(IDS)[:, -1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def close(one, two, tolerance=1e-5):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


# At the start


@settings(max_examples=25, deadline=None)
@given(variant=ANY, rank=st.integers(1, 12), dropout=st.sampled_from([0.0, 0.5]))
def test_nothing_changes_before_the_first_step_bit_for_bit(variant, rank, dropout):
    dropout = 0.0 if variant == "delta-lora" else dropout
    model = adapt(small_gpt(), variant, rank, targets=("query", "mlp"), dropout=dropout)
    assert torch.equal(model(IDS), small_gpt()(IDS))


COUNTS = {  # ../shared has no part in this: r(Σin + Σout) and so on, for GPT-2 small
    ("lora", 16): (2_666_528, 589_824), ("rslora", 8): (1_333_264, 294_912), ("lora+", 4): (666_632, 147_456),
    ("pissa", 1): (166_658, 36_864), ("olora", 1): (166_658, 36_864), ("delta-lora", 4): (666_632, 147_456),
    ("lora-fa", 1): (82_946, 18_432), ("lora-fa", 16): (1_327_136, 294_912),
    ("dora", 1): (249_604, 55_296), ("dora", 16): (2_749_474, 608_256),
    ("vera", 1): (83_019, 18_456), ("vera", 16): (84_114, 18_816), ("vera", 256): (101_634, 24_576),
    ("adalora", 12): (2_000_772, 442_656), ("adalora", 16): (2_667_696, 590_208),
}


@pytest.fixture(scope="module")
def gpt2_small():
    with torch.device("meta"):
        model = GPTModel({**GPT_CONFIG_124M, "qkv_bias": True})
        model.out_head = nn.Linear(768, 2)
    return model


@pytest.mark.parametrize(("variant", "rank"), COUNTS)
def test_gpt2_small_trains_the_published_numbers_of_parameters(gpt2_small, variant, rank):
    for targets, expected in zip(("all", ("query", "value")), COUNTS[variant, rank]):
        model = adapt(copy.deepcopy(gpt2_small), variant, rank, targets=targets)
        assert count_parameters(model)[0] == expected


@pytest.mark.parametrize(("width", "layers", "rank", "published"), [
    (768, 12, 1024, 0.043), (1024, 24, 256, 0.061), (1024, 24, 1024, 0.098),
])
def test_veras_counts_are_the_papers_in_millions(width, layers, rank, published):
    model = nn.Sequential(*(nn.Linear(width, width, device="meta") for _ in range(2 * layers)))
    assert round(count_parameters(adapt(model, "vera", rank))[0] / 1e6, 3) == published


TRAINS = {
    "lora-fa": {"B"}, "dora": {"A", "B", "magnitude"}, "vera": {"lambda_d", "lambda_b"},
    "adalora": {"A", "B", "E"},
}


@BRANCH
def test_what_trains_is_what_the_method_trains_also_after_loading(variant, tmp_path):
    model = trained(variant)
    save_adapter(model, tmp_path)
    for each in (model, load_adapter(small_gpt(), tmp_path)):
        names = {name.rpartition(".lora.")[2] for name, p in each.named_parameters() if p.requires_grad}
        assert names == TRAINS.get(variant, {"A", "B"})


def test_veras_first_gradient_reaches_the_outputs_alone():
    model = adapt(small_gpt(), "vera", 4)
    model(IDS).sum().backward()
    for layer in adapted_layers(model).values():
        assert not layer.lora.lambda_d.grad.any() and layer.lora.lambda_b.grad.any()


# Whatever works for LoRA works for each


@settings(max_examples=25, deadline=None)
@given(variant=ANY, rank=st.integers(1, 12), scaling=st.sampled_from(["alpha", "alpha/rank"]),
       kind=st.sampled_from([None, *KINDS]))
def test_merging_changes_no_output_and_unmerging_no_bit(variant, rank, scaling, kind):
    if variant in ("rslora", "vera"):
        scaling = "alpha"
    base = foreign(kind) if kind else small_gpt()
    model = trained(variant, model=base, rank=rank, scaling=scaling)
    run = (lambda: model(IDS).logits) if kind else (lambda: model(IDS))
    before, expected = state(model), run()
    merge_lora(model)
    close(run(), expected)
    assert same_state(unmerge_lora(model), before)
    assert torch.equal(run(), expected)


@settings(max_examples=25, deadline=None)
@given(variant=ANY, rank=st.integers(1, 12), full=st.sampled_from([(), "head"]))
def test_saving_and_loading_without_naming_the_variant_changes_nothing(folder, variant, rank, full):
    model = trained(variant, rank=rank, train_in_full=full)
    save_adapter(model, folder / "variants")
    loaded = load_adapter(small_gpt(), folder / "variants")
    assert torch.equal(loaded(IDS), model(IDS))
    assert take_adapter(loaded).layers == take_adapter(model).layers


@settings(max_examples=15, deadline=None)
@given(one=ANY, two=ANY)
def test_adapters_of_any_two_variants_are_exchanged_in_one_model(one, two):
    first, second = trained(one, seed=1), trained(two, seed=2)
    adapters, outputs = [take_adapter(m) for m in (first, second)], [m(IDS) for m in (first, second)]
    model = small_gpt()
    for adapter, output in (*zip(adapters, outputs), *zip(adapters, outputs)):
        assert torch.equal(set_adapter(model, adapter)(IDS), output)
    assert torch.equal(remove_lora(model)(IDS), small_gpt()(IDS))


@settings(max_examples=15, deadline=None)
@given(one=ANY, two=ANY, weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_combined_adapters_add_their_updates(one, two, weights):
    adapters = [take_adapter(trained(variant, seed=seed)) for seed, variant in enumerate((one, two), 1)]
    if "dora" in (one, two):
        with pytest.raises(ValueError, match="DoRA, which is not of low rank"):
            combine_adapters(*adapters, weights)
        return
    both = set_adapter(small_gpt(), combine_adapters(*adapters, weights))
    updates = [adapted_layers(set_adapter(small_gpt(), adapter)) for adapter in adapters]
    for name, layer in adapted_layers(both).items():
        close(layer.update(), sum(w * update[name].update() for w, update in zip(weights, updates)))


@BRANCH
def test_what_trains_is_in_float32_beside_a_base_in_half_precision(variant):
    model = adapt(small_gpt().bfloat16(), variant)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = steps(model, 20)
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss(variant):
    losses = steps(adapt(small_gpt(), variant, alpha=8.0), 30)
    assert losses[-1] < 0.9 * losses[0]


# Refusals


@pytest.mark.parametrize(("options", "message"), [
    ({"variant": "lorafa"}, "variant must be one or several of lora, lora-fa"),
    ({"variant": None}, "variant must be one or several of .*, not None"),
    ({"variant": b"dora"}, "variant must be one or several of .*, not b'dora'"),
    ({"variant": [["dora"]]}, r"variant must be one or several of .*, not \['dora'\]"),
    ({"variant": ("adalora", "dora")}, "adalora and dora are two branches for one layer: choose one"),
    ({"variant": ("vera", "pissa")}, "two branches"),
    ({"variant": ("lora+", "lora-fa")}, "LoRA-FA trains B alone"),
    ({"variant": ("vera", "lora+")}, "VeRA trains neither A nor B"),
    ({"variant": ("adalora", "lora+")}, "AdaLoRA's does not"),
    ({"variant": ("vera", "rslora")}, "scaled by what it trains"),
    ({"variant": "rslora", "scaling": "alpha/rank"}, "rslora means scaling='alpha/sqrt"),
    ({"variant": "pissa", "init": "paper"}, "pissa has a start of its own"),
    ({"variant": "pissa", "alpha": -1.0}, "not with alpha -1.0"),
    ({"variant": "delta-lora", "dropout": 0.1}, "Delta-LoRA has no dropout"),
    ({"variant": "delta-lora", "factor": math.nan}, "λ, must be at least 0"),
    ({"variant": "delta-lora", "start_step": 1.5}, "a number of steps"),
    ({"variant": "adalora", "target_rank": 4}, "from 1 to the rank 3"),
    ({"variant": "vera", "key": -1}, "VeRA's seed"),
    ({"variant": "lora+", "ratio": 0.0}, "a positive number, not 0.0"),
    ({"variant": "lora+", "ratio": True}, "a positive number, not True"),
    ({"variant": "pissa", "alpha": 1e-30}, "not with alpha 1e-30"),
    ({"variant": "vera", "largest": [1, 1]}, "largest must be two sizes"),
    ({"variant": "dora", "target_rank": 2}, "dora has no option target_rank"),
    ({"target_rank": 2}, "lora has no option target_rank"),
])
def test_what_makes_no_sense_is_refused_with_the_reason_and_the_model_as_it_was(options, message):
    model = small_gpt()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, **{"rank": 3, "alpha": 2.0, **options})
    assert same_state(model, before) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", ["lora-fa", "vera", "adalora"])
def test_the_optimizer_refuses_two_rates_where_there_is_one(variant):
    with pytest.raises(ValueError, match="LoRA\\+"):
        lora_adamw(adapt(small_gpt(), variant), 0.01, ratio=16, total_steps=10)


@pytest.mark.parametrize(("variant", "options"), [("adalora", {}), ("delta-lora", {"start_step": 3})])
def test_a_training_without_the_optimizer_that_follows_the_steps_is_refused(variant, options):
    model = adapt(small_gpt(), variant, **options).train()
    with pytest.raises(ValueError, match="make the optimizer with"):
        model(IDS)
    assert model.eval()(IDS).isfinite().all()
    lora_adamw(model, 0.01, total_steps=9)
    assert model.train()(IDS).requires_grad


def test_adalora_needs_to_know_the_training_and_room_in_it():
    model = adapt(small_gpt(), "adalora")
    with pytest.raises(ValueError, match="give total_steps"):
        lora_adamw(model, 0.01)
    with pytest.raises(ValueError, match="cannot lower its ranks in 9 steps with 5 before and 4 after"):
        lora_adamw(model, 0.01, total_steps=9, allocation={"warmup": 5, "final": 4})


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="call apply_lora first"):
        lora_adamw(small_gpt().requires_grad_(False), 0.01)


# LoRA-FA


def test_lora_fas_update_stays_in_the_span_of_a_which_stays_as_it_was():
    model = adapt(small_gpt(), "lora-fa")
    before = {name: layer.lora.A.clone() for name, layer in adapted_layers(model).items()}
    steps(model, 10)
    for name, layer in adapted_layers(model).items():
        A, update = layer.lora.A, layer.lora.product()
        assert torch.equal(A, before[name]) and update.any()
        close(A @ torch.linalg.pinv(A) @ update, update)


def test_lora_fa_trains_b_as_lora_would_with_a_held():
    ours, lora = adapt(small_gpt(), "lora-fa"), adapt(small_gpt(), "lora")
    lora.load_state_dict(ours.state_dict())
    for layer in adapted_layers(lora).values():
        layer.lora.A.requires_grad_(False)
    assert steps(ours, 10) == steps(lora, 10)
    assert same_state(ours, state(lora))


@pytest.mark.parametrize("variant", ["lora", "lora-fa"])
def test_lora_fa_keeps_rank_numbers_per_token_for_the_gradient_instead_of_the_input(variant):
    layer = adapt(nn.Sequential(nn.Linear(512, 64)), variant, rank=4)
    x, kept = torch.randn(100, 512, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    of_tokens = [t for t in kept if t.shape[0] == 100]
    assert max(t.shape[1] for t in of_tokens) == {"lora": 512, "lora-fa": 4}[variant]


# LoRA+


def test_a_ratio_of_one_gives_adamws_steps_exactly():
    plus, plain = adapt(small_gpt(), "lora"), adapt(small_gpt(), "lora")
    plain.load_state_dict(plus.state_dict())
    assert steps(plus, 10, ratio=1.0) == steps(plain, 10)
    assert same_state(plus, state(plain))


def test_lora_pluss_first_step_moves_b_ratio_times_as_far_and_a_not_at_all():
    moves = {}
    for ratio in (1.0, 16.0):
        model = adapt(small_gpt(), "lora")
        start = state(model)
        steps(model, 1, ratio=ratio, weight_decay=0.0)
        moves[ratio] = {name: value - start[name] for name, value in state(model).items()}
    for name, move in moves[1.0].items():
        if name.endswith("lora.B"):
            close(moves[16.0][name], 16 * move)
        else:
            assert not move.any() and not moves[16.0][name].any()


def test_lora_pluss_rates_are_pefts():
    ours = adapt(small_gpt(), "lora+", ratio=8.0)
    theirs = peft.get_peft_model(small_gpt(), peft.LoraConfig(r=3, target_modules="all-linear"))
    optimizers = lora_adamw(ours, 0.01), peft.optimizers.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8.0)
    rates = [
        sorted((group["lr"], tuple(p.shape if i else p.shape[::-1])) for group in o.param_groups
               for p in group["params"]) for i, o in enumerate(optimizers)
    ]
    assert rates[0] == rates[1] and {rate for rate, _ in rates[0]} == {0.01, 0.08}


# rsLoRA and the printed scale


@pytest.mark.parametrize(("scaling", "expected"), [
    ("alpha/rank", (1, 0.5, 0.25, 0.13)), ("alpha/sqrt(rank)", (1, 1, 1.02, 1.08)),
    ("alpha", (1, 1.01, 1.02, 1.08)),
])
def test_adams_first_update_does_not_depend_on_the_rank_under_rslora_and_as_printed(scaling, expected):
    sizes = [first_update(rank, scaling) for rank in (1, 4, 16, 64)]
    assert [round(size / sizes[0], 2) for size in sizes] == pytest.approx(expected, abs=0.12)
