"""Adapters: saved ones come back exactly, unsuitable ones are refused, two add up."""

import copy
import hashlib
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from appendix_e import count_parameters
from lora.adapters import (
    SETTINGS_FILE,
    WEIGHTS_FILE,
    combine_adapters,
    fingerprint,
    load_adapter,
    read_adapter,
    save_adapter,
    set_adapter,
    take_adapter,
)
from lora.layers import adapted_layers, apply_lora, merge_lora, merged_weight, remove_lora
from models import (
    ANY_TARGETS,
    FULL,
    IDS,
    SCALING,
    TARGETS,
    foreign,
    same_state,
    small_gpt,
    state,
    train_a_little,
    trained,
)

# Saving and loading


@settings(max_examples=15, deadline=None)
@given(targets=ANY_TARGETS, rank=st.integers(1, 20), scaling=SCALING, full=FULL,
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_a_loaded_adapter_is_the_saved_one(folder, targets, rank, scaling, full, dtype):
    model = apply_lora(small_gpt().to(dtype), rank, 2.0, targets, scaling, 0.1, train_in_full=full)
    train_a_little(model)
    fresh = load_adapter(small_gpt().to(dtype), save_adapter(model, folder / "round"))
    assert same_state(fresh, state(model))
    assert count_parameters(fresh) == count_parameters(model)
    assert torch.equal(fresh.eval()(IDS), model.eval()(IDS))
    assert [(m.lora.scaling, m.lora.dropout) for m in adapted_layers(fresh).values()] == [
        (scaling, 0.1)] * len(adapted_layers(model))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_adapters_of_foreign_models_come_back(kind, tmp_path):
    model = train_a_little(apply_lora(foreign(kind), 3, 2, ("query", "mlp"), train_in_full="head"))
    fresh = load_adapter(foreign(kind), save_adapter(model, tmp_path))
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_only_what_was_trained_is_on_disk(tmp_path):
    model = trained(targets=("query", "value"), train_in_full="head")
    save_adapter(model, tmp_path, notes={"data": "SMS"})
    numbers = count_parameters(model)[0]
    size = (tmp_path / WEIGHTS_FILE).stat().st_size
    assert 4 * numbers < size < 4 * numbers + 1500
    assert read_adapter(tmp_path).notes == {"data": "SMS"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([SETTINGS_FILE, WEIGHTS_FILE])


def test_loading_draws_no_random_numbers(tmp_path):
    save_adapter(trained(), tmp_path)
    fresh = small_gpt()
    before = torch.get_rng_state()
    load_adapter(fresh, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_depends_on_the_values_of_the_base_not_on_its_precision():
    model = small_gpt()
    known = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).bfloat16()) == known
    assert fingerprint(apply_lora(copy.deepcopy(model), 2, 2)) == known
    model.trf_blocks[0].ff.layers[0].weight.data[0, 0] += 0.1
    assert fingerprint(model) != known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_trained_on_a_base_in_half_precision_comes_back_on_the_base_itself(dtype, tmp_path):
    model = trained(train_in_full="head")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    save_adapter(model, tmp_path)
    back = load_adapter(small_gpt(), tmp_path)
    assert torch.equal(back.out_head.weight, model.out_head.weight)


# What is refused


def damage_settings(folder, change):
    path = folder / SETTINGS_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def rewrite_tensors(folder, change):
    """Change the tensors and record the new checksum, as another program would."""
    tensors = load((folder / WEIGHTS_FILE).read_bytes())
    change(tensors)
    (folder / WEIGHTS_FILE).write_bytes(save(tensors))
    digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    damage_settings(folder, lambda content: content.update(sha256=digest))


def truncate(folder):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


def spoil(value):
    def change(tensors):
        tensors["out_head.lora.B"][0, 0] = value
    return change


def other_rank(content):
    content["layers"]["out_head"]["rank"] = 2


def no_rank(content):
    del content["layers"]["out_head"]["rank"]


@pytest.mark.parametrize("damage, message", [
    (truncate, "cut off"),
    (lambda folder: (folder / WEIGHTS_FILE).unlink(), "missing"),
    (lambda folder: (folder / SETTINGS_FILE).write_text("{", encoding="utf-8"), "damaged"),
    (lambda folder: (folder / SETTINGS_FILE).write_text("[]", encoding="utf-8"), "no settings"),
    (lambda folder: damage_settings(folder, lambda c: c.update(format="2")), "format"),
    (lambda folder: damage_settings(folder, lambda c: c.pop("layers")), "layers"),
    (lambda folder: damage_settings(folder, lambda c: c.update(layers={})), "settings"),
    (lambda folder: damage_settings(folder, no_rank), "out_head"),
    (lambda folder: damage_settings(folder, other_rank), r"out_head\.lora\.A is \(24, 3\)"),
    (lambda folder: rewrite_tensors(folder, lambda t: t.pop("out_head.lora.A")), "lacks out_head"),
    (lambda folder: rewrite_tensors(folder, lambda t: t.update(x=torch.ones(1))), "no parameter x"),
    (lambda folder: rewrite_tensors(folder, spoil(math.nan)), "out_head.lora.B has infinite or missing"),
    (lambda folder: rewrite_tensors(folder, spoil(-math.inf)), "out_head.lora.B has infinite or missing"),
])
def test_a_bad_folder_is_refused_and_the_model_unchanged(damage, message, tmp_path):
    save_adapter(trained(), tmp_path)
    damage(tmp_path)
    model = small_gpt()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert same_state(model, before) and all(p.requires_grad for p in model.parameters())


def test_a_missing_folder_says_where_adapters_come_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_adapter"):
        load_adapter(small_gpt(), tmp_path / "nowhere")


def test_another_base_model_is_refused(tmp_path):
    save_adapter(trained(), tmp_path)
    other = small_gpt(seed=9)
    before = state(other)
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(other, tmp_path)
    assert same_state(other, before)


def test_other_shapes_and_missing_layers_are_named(tmp_path):
    save_adapter(trained(train_in_full="head"), tmp_path)
    with pytest.raises(ValueError, match=r"out_head\.bias is \(2,\) in the adapter, \(5,\) by"):
        load_adapter(small_gpt(classes=5), tmp_path)
    with pytest.raises(ValueError, match=r"trf_blocks\.0\.att\.W_query"):
        load_adapter(nn.Sequential(nn.Linear(3, 3)), tmp_path)


def test_an_adapted_model_takes_only_the_same_layers_and_ranks(tmp_path):
    save_adapter(trained(rank=3), tmp_path)
    model = trained(rank=2)
    before = state(model)
    with pytest.raises(ValueError, match=r"ranks \[2\].*ranks \[3\]"):
        load_adapter(model, tmp_path)
    assert same_state(model, before)
    again = trained(seed=7, rank=3)
    assert same_state(load_adapter(again, tmp_path), state(trained(rank=3)))


def test_a_merged_or_plain_model_has_no_adapter_to_save(tmp_path):
    for model in (small_gpt(), merge_lora(trained())):
        with pytest.raises(ValueError, match=r"to save|unmerge_lora"):
            save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_diverged_adapter_is_not_saved(tmp_path):
    model = trained()
    model.out_head.lora.A.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="diverged"):
        save_adapter(model, tmp_path / "none")


# Several adapters


def test_adapters_are_switched_in_memory():
    first, second = trained(1, rank=3), trained(2, rank=5, targets="mlp")
    values = [model(IDS) for model in (first, second)]
    adapters = [take_adapter(model) for model in (first, second)]
    model = small_gpt()
    for number in (0, 1, 0):
        assert torch.equal(set_adapter(model, adapters[number])(IDS), values[number])
    assert same_state(remove_lora(model), state(small_gpt()))


@settings(max_examples=15, deadline=None)
@given(ranks=st.tuples(st.integers(1, 8), st.integers(1, 8)), scaling=SCALING,
       targets=st.tuples(st.sampled_from(TARGETS), st.sampled_from(TARGETS)),
       weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_combining_adds_the_weighted_updates_exactly(ranks, scaling, targets, weights):
    models = [trained(i, rank, targets=t, scaling=scaling) for i, (rank, t) in
              enumerate(zip(ranks, targets, strict=True))]
    joint = combine_adapters(*(take_adapter(model) for model in models), weights)
    model = set_adapter(small_gpt(), joint)
    for name, layer in adapted_layers(model).items():
        base = layer.linear.weight
        expected = base.clone()
        for other, weight in zip(models, weights, strict=True):
            if name in adapted_layers(other):
                expected += weight * (merged_weight(adapted_layers(other)[name]) - base)
        torch.testing.assert_close(merged_weight(layer), expected, atol=1e-5, rtol=1e-4)


def test_averaging_A_and_B_gives_another_model():
    first, second = trained(1), trained(2)
    a, b = (take_adapter(model) for model in (first, second))
    half = set_adapter(small_gpt(), combine_adapters(a, b, (0.5, 0.5)))
    mean = {name: (a.tensors[name] + b.tensors[name]) / 2 for name in a.tensors}
    averaged = set_adapter(small_gpt(), type(a)(a.layers, mean, a.base))
    assert not torch.allclose(half(IDS), averaged(IDS), atol=1e-2)


def test_two_trained_heads_are_not_combined_silently():
    first, second = (take_adapter(trained(i, train_in_full="head")) for i in (1, 2))
    with pytest.raises(ValueError, match="full_from"):
        combine_adapters(first, second)
    joint = combine_adapters(first, second, full_from=1)
    assert torch.equal(joint.tensors["out_head.weight"], second.tensors["out_head.weight"])


def test_adapters_of_different_bases_are_not_combined():
    first = take_adapter(trained())
    other = take_adapter(train_a_little(apply_lora(small_gpt(seed=4), 3, 2.0)))
    with pytest.raises(ValueError, match="different base models"):
        combine_adapters(first, other)
