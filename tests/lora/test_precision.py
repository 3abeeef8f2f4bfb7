"""What trains is in float32, whatever the base is in, and merging survives every change of dtype."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from lora.layers import apply_lora, merge_lora, unmerge_lora
from lora.precision import keep_in_float32
from models import IDS, foreign, same_state, small_gpt, state, train_a_little

LOW = (torch.float16, torch.bfloat16)
FULL = ((), "head", ("head", "final_norm"), "trf_blocks.1")


def train_three_steps(model, ids=IDS, autocast=None):
    """Train with fused AdamW on the sum of squared logits; return the parameters trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            result = model(input_ids=ids).logits if hasattr(model, "config") else model(ids)
        result.float().square().mean().backward()
        optimizer.step()
    return trained


@pytest.mark.parametrize("autocast", [None, *LOW])
@pytest.mark.parametrize("full", FULL)
@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_every_base_trains_in_float32_or_wider_without_nan(dtype, full, autocast):
    model = apply_lora(small_gpt().to(dtype), 2, 2, train_in_full=full)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    trained = train_three_steps(model, autocast=autocast)
    assert {p.dtype for p in trained} == {torch.promote_types(dtype, torch.float32)}
    assert all(p.isfinite().all() for p in trained)
    assert not any(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert {p.dtype for p in frozen.values()} == {dtype} == {model(IDS).dtype}


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("full", ["head", "*.[1]"], ids=["head", "a block"])
def test_foreign_models_in_bfloat16_train_and_answer(kind, full):
    model = apply_lora(foreign(kind).bfloat16(), 2, 2, train_in_full=full)
    trained = train_three_steps(model)
    assert {p.dtype for p in trained} == {torch.float32} and all(p.isfinite().all() for p in trained)
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["out_head", "final_norm", "trf_blocks.1"])
def test_a_module_kept_in_float32_answers_as_before_in_the_dtype_around_it(dtype, name):
    model = small_gpt().to(dtype)
    before = model(IDS)
    assert keep_in_float32(model.get_submodule(name)) is model.get_submodule(name)
    torch.testing.assert_close(model(IDS), before, atol=0.05, rtol=0.05)
    assert model(IDS).dtype == dtype


def test_a_module_kept_in_float32_follows_later_moves_and_copies():
    model = small_gpt().half()
    keep_in_float32(model.out_head)
    twin = copy.deepcopy(model)
    twin.out_head.weight.data.zero_()
    assert model(IDS).any() and not (twin(IDS) - twin.out_head.bias).any()
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        assert model.to(dtype)(IDS).dtype == dtype
    keep_in_float32(model.out_head)
    assert model(IDS).dtype == torch.float16 and model.out_head.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_in_float32_or_wider_is_left_alone(dtype):
    module = nn.Linear(3, 3, dtype=dtype)
    keep_in_float32(module)
    assert module.weight.dtype == dtype and not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("model, name", [
    (small_gpt(), "tok_emb"),
    (nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 3)), "0"),
    (nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4)), "out_proj"),
])
def test_what_cannot_compute_in_another_dtype_is_trained_in_full_in_float32_alone(model, name):
    half = copy.deepcopy(model).half()
    targets = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    with pytest.raises(ValueError, match=rf"{name} is in half precision.* model\.float\(\)"):
        apply_lora(half, 2, 2, targets, train_in_full=name)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert apply_lora(half.float(), 2, 2, targets, train_in_full=name)


# Merging and moving


@pytest.mark.parametrize("moves", [*product([torch.float16, torch.bfloat16, torch.float64], repeat=2)])
@pytest.mark.parametrize("first", [0, 1])
def test_a_model_may_be_merged_moved_and_unmerged_in_any_order(moves, first):
    model = train_a_little(apply_lora(small_gpt(), 2, 2, train_in_full="head"))
    adapted = model(IDS)
    for number, dtype in enumerate(moves):
        if number == first:
            merge_lora(model)
        model.to(dtype)
        results = [model(IDS)]
        if number == first:
            results.append(unmerge_lora(model)(IDS))
        for result in results:
            assert result.dtype == dtype
            torch.testing.assert_close(result.float(), adapted, atol=0.05, rtol=0.05)


def test_kept_weights_follow_the_model_and_lora_stays_in_float32():
    model = train_a_little(apply_lora(small_gpt(), 2, 2))
    before = state(model)
    unmerge_lora(merge_lora(model).half())
    wanted = {name: value if ".lora." in name else value.half() for name, value in before.items()}
    assert same_state(model, wanted)
    assert {p.dtype for n, p in model.named_parameters() if ".lora." in n} == {torch.float32}


def test_a_merged_model_that_went_to_half_and_back_unmerges_to_the_original_weights():
    model = train_a_little(apply_lora(small_gpt(), 2, 2))
    before = {name: value for name, value in state(model).items() if "linear.weight" in name}
    unmerge_lora(merge_lora(model).half().float())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_merging_sums_in_the_wider_of_the_two_dtypes():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64))
    weight = model[0].weight.clone()
    apply_lora(model, 2, 2)[0].lora.to(torch.bfloat16)
    assert torch.equal(merge_lora(model)[0].weight, weight)  # B is zero
