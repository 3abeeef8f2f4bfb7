"""LoRA's relatives in unusual models: copied, pickled, compiled, without memory, with odd layers."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora.adapters import set_adapter, take_adapter
from lora.layers import adapted_layers, apply_lora, merge_lora, unmerge_lora
from lora.optimizer import lora_adamw
from lora.wrappers import BRANCHES, with_lora
from models import IDS, language_model, same_state, small_gpt, state, train_a_little

BRANCH = pytest.mark.parametrize("variant", BRANCHES)


def close(one, two, tolerance=1e-5):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def trained(variant, model=None, seed=1, **options):
    return train_a_little(apply_lora(model or small_gpt(), 3, 2.0, variant=variant, **options), seed)


def in_training(model):
    """Put `model` into training mode, as if an optimizer of `lora_adamw` stepped it."""
    for layer in adapted_layers(model).values():
        layer.lora.attached = True
    return model.train()


def through_a_file(whole):
    file = io.BytesIO()
    torch.save(whole, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Copies and files of whole models


@BRANCH
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file], ids=["copy", "file"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_duplicate_is_a_model_of_its_own_with_the_same_outputs(variant, duplicate, merged):
    model = trained(variant)
    output = model(IDS)
    other = duplicate(merge_lora(model) if merged else model)
    if merged:
        unmerge_lora(model)
        unmerge_lora(other)
    assert torch.equal(other(IDS), output)
    train_a_little(other, seed=5)
    assert torch.equal(model(IDS), output) and not torch.equal(other(IDS), output)
    set_adapter(model, take_adapter(other))
    assert torch.equal(model(IDS), other(IDS))


@pytest.mark.parametrize(("variant", "options"), [("adalora", {}), ("delta-lora", {"start_step": 2})])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file], ids=["copy", "file"])
def test_a_duplicate_has_no_optimizer_that_follows_its_steps(variant, options, duplicate):
    model = apply_lora(small_gpt(), 3, 2.0, variant=variant, **options).train()
    optimizer = lora_adamw(model, 0.01, total_steps=9)
    other, _ = duplicate((model, optimizer))
    with pytest.raises(ValueError, match="make the optimizer with"):
        other(IDS)
    assert model(IDS).requires_grad
    lora_adamw(other, 0.01, total_steps=9)
    assert other(IDS).requires_grad


@BRANCH
def test_the_state_of_one_model_is_that_of_another(variant):
    model, other = trained(variant), apply_lora(small_gpt(), 3, 2.0, variant=variant)
    other.load_state_dict(state(model))
    assert torch.equal(other(IDS), model(IDS))


@BRANCH
def test_a_model_without_memory_gets_its_values_later(variant):
    model = trained(variant)
    with torch.device("meta"):
        other = small_gpt()
    apply_lora(other, 3, 2.0, variant=variant)
    assert {p.device.type for p in other.parameters()} == {"meta"}
    other.load_state_dict(state(model), assign=True)
    for part, like in zip(other.modules(), model.modules()):  # the masks of attention, which are not saved
        for name, buffer in like.named_buffers(recurse=False):
            setattr(part, name, buffer)
    assert torch.equal(other(IDS), model(IDS))


# Dtypes


@BRANCH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_merged_model_may_change_its_dtype_and_come_back(variant, dtype):
    model = trained(variant)
    expected = model(IDS)
    merge_lora(model).to(dtype)
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    close(model(IDS).float(), expected, tolerance)
    unmerge_lora(model.float())
    close(model.float()(IDS), expected, tolerance)


@BRANCH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_replaces_one_of_another_variant_in_a_base_in_half_precision(variant, dtype):
    for other in ("dora", "vera", "pissa"):
        adapter = take_adapter(trained(variant, small_gpt().to(dtype)))
        model = set_adapter(trained(other, small_gpt().to(dtype)), adapter)
        expected = set_adapter(small_gpt().to(dtype), adapter)
        assert torch.equal(model(IDS), expected(IDS)) and model(IDS).dtype == dtype
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# Layers


@BRANCH
def test_a_layer_used_twice_has_one_branch(variant):
    layer = nn.Linear(8, 8)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(2, 8)
    before = model(x)
    apply_lora(model, 3, 2.0, variant=variant).eval()
    assert model[0] is model[2] and torch.equal(model(x), before)
    expected = train_a_little(model)(x)
    close(merge_lora(model)(x), expected)


@BRANCH
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_tied_head_is_merged_into_a_copy_and_tied_again(variant, kind):
    model = trained(variant, language_model(kind))
    expected, embedding = model(IDS).logits, model.get_input_embeddings().weight
    merge_lora(model)
    close(model(IDS).logits, expected, 1e-4)
    assert model.get_input_embeddings().weight is embedding
    unmerge_lora(model)
    assert model.lm_head.linear.weight is embedding and torch.equal(model(IDS).logits, expected)


@BRANCH
def test_torchs_attention_which_reads_the_weight_of_out_proj_trains_it_too(variant):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    before = model.eval()(x)
    apply_lora(model, 3, 2.0, "*", variant=variant)
    close(model(x), before)
    expected = in_training(train_a_little(model))(x)
    expected.square().sum().backward()
    assert all(p.grad.any() for p in model.self_attn.out_proj.lora.parameters() if p.requires_grad)
    close(merge_lora(model)(x), expected)


@settings(max_examples=30, deadline=None)
@given(variant=st.sampled_from([*BRANCHES]), rows=st.integers(1, 6), columns=st.integers(1, 6),
       rank=st.integers(1, 6), bias=st.booleans(), zero=st.booleans())
def test_one_layer_of_any_size_also_of_zeros_starts_trains_and_merges(
    variant, rows, columns, rank, bias, zero
):
    model, x = nn.Sequential(nn.Linear(rows, columns, bias=bias)), torch.randn(2, rows)
    model[0].weight.data *= not zero
    before = model(x)
    if rank > max(rows, columns) and variant != "vera":
        with pytest.raises(ValueError, match=f"rank {rank} is above all sizes here"):
            apply_lora(model, rank, 2.0, variant=variant)
        return
    in_training(apply_lora(model, rank, 2.0, variant=variant))
    assert torch.equal(model(x), before)
    train_a_little(model)(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    expected = model(x)
    close(merge_lora(model)(x), expected, 1e-4)


@pytest.mark.parametrize("variant", ["pissa", "olora"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_start_from_a_weight_that_is_not_finite_is_refused_with_the_model_as_it_was(variant, value):
    model = small_gpt()
    model.trf_blocks[1].ff.layers[0].weight.data[0, 0] = value
    before = str(model)
    with pytest.raises(ValueError, match="infinite or missing values: load the model again"):
        apply_lora(model, 3, 2.0, variant=variant)
    assert str(model) == before and all(p.requires_grad for p in model.parameters())


# Wrapped models


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(("variant", "wrap"), [
    *((variant, nn.DataParallel) for variant in BRANCHES), ("dora", compiled), ("vera", compiled),
    ("adalora", lambda model: nn.ModuleDict({"model": model})),
])
def test_a_wrapped_model_gives_and_takes_the_same_adapter(variant, wrap):
    model = trained(variant)
    wrapped, fresh = wrap(model), wrap(small_gpt())
    set_adapter(fresh, take_adapter(wrapped))
    inner = fresh["model"] if isinstance(fresh, nn.ModuleDict) else fresh
    close(inner(IDS), model(IDS))


@BRANCH
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(variant, reentrant):
    block = in_training(trained(variant)).trf_blocks[0]
    x = torch.randn(2, 9, 24, requires_grad=True)
    gradients = []
    for y in (block(x), checkpoint(block, x, use_reentrant=reentrant)):
        block.zero_grad()
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters() if p.requires_grad])
    close(*gradients)


@BRANCH
def test_a_frozen_branch_in_training_mode_needs_no_optimizer(variant):
    model = trained(variant).requires_grad_(False)
    assert torch.equal(model.train()(IDS), model.eval()(IDS))


@BRANCH
def test_a_layer_takes_any_number_of_inputs(variant):
    layer = in_training(apply_lora(nn.Sequential(nn.Linear(6, 4)), 2, 2.0, variant=variant))
    for shape in ((0, 6), (6,), (2, 1, 3, 6)):
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 4)


@pytest.mark.parametrize("largest", [[3, 9], [9, 3], [4], [4, 4, 4], "ab", [4.0, 4.0], [4, 2**40], {4: 4}])
def test_veras_random_numbers_must_be_large_enough_for_the_layer(largest):
    layer = with_lora(nn.Linear(4, 4), 2, 1.0, variant="vera", largest=[4, 9])
    assert layer.lora.largest == [4, 9]
    with pytest.raises(ValueError, match="largest must be two sizes from 4 and 4 on, not"):
        with_lora(nn.Linear(4, 4), 2, 1.0, variant="vera", largest=largest)


@BRANCH
def test_a_failed_call_changes_nothing(variant):
    model = small_gpt()
    before = state(model)
    with pytest.raises(ValueError):
        apply_lora(model, 3, 2.0, variant=variant, nonsense=1)
    assert same_state(model, before) and not adapted_layers(model)
