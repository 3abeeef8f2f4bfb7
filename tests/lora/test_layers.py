"""LoRA layers: targets choose them, merging and removing undo them, in our models and in others."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_in_practice
from appendix_e import LinearWithLoRA, LoRALayer, count_parameters, replace_linear_with_lora
from lora.layers import adapted_layers, apply_lora, merge_lora, print_parameters, remove_lora, unmerge_lora
from lora.targets import ROLES, matches
from lora.wrappers import with_lora
from models import IDS, TARGETS, same_state, small_gpt, state, train_a_little

PUBLIC = ("apply_lora", "merge_lora", "unmerge_lora", "save_adapter", "load_adapter", "export_peft",
          "import_peft", "count_parameters")


def test_the_public_names_are_importable_from_the_module_of_the_notebook():
    assert all(callable(getattr(lora_in_practice, name)) for name in PUBLIC)


# Targets


@pytest.mark.parametrize("targets, adapted", [
    ("all", 2 * 6 + 1),
    ("query", 2),
    (("query", "value"), 4),
    ("mlp", 4),
    (("projection", "head"), 3),
    ("trf_blocks.1.*", 6),
    ("W_key", 2),
    ("*.ff.layers.0", 2),
])
def test_targets_choose_layers_by_role_or_name(targets, adapted):
    model = apply_lora(small_gpt(), 2, 4, targets)
    assert len(adapted_layers(model)) == adapted
    assert all(type(layer.lora) is LoRALayer for layer in adapted_layers(model).values())


@pytest.mark.parametrize("name, roles", [
    ("blocks.0.fc1", {"mlp"}),
    ("blocks.0.myfc1", set()),
    ("blocks.0.fc1.inner", set()),
    ("blocks.10.pre_query", set()),
    ("h.10.attn.c_attn", {"query", "key", "value"}),
    ("h.10.attn.c_proj", {"projection"}),
    ("h.10.mlp.c_proj", {"mlp"}),
    ("h.10.c_proj", set()),
    ("encoder.layer.10.attention.output.dense", {"projection"}),  # BERT's
    ("encoder.layer.10.output.dense", {"mlp"}),
    ("classifier", {"head"}),
])
def test_roles_match_whole_components_of_a_path(name, roles):
    assert {role for role in ROLES if matches(name, role)} == roles


def test_adapting_everything_is_what_the_listing_does():
    ours, listing = small_gpt(), small_gpt()
    torch.manual_seed(5)
    apply_lora(ours, rank=4, alpha=8)
    torch.manual_seed(5)
    replace_linear_with_lora(listing.requires_grad_(False), rank=4, alpha=8)
    assert str(ours) == str(listing)
    assert count_parameters(ours) == count_parameters(listing)
    assert same_state(ours, state(listing))


def test_only_lora_and_what_is_trained_in_full_gets_gradients():
    model = apply_lora(small_gpt(), 2, 4, "query", train_in_full=("head", "final_norm"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    lora = {f"trf_blocks.{i}.att.W_query.lora.{part}" for i in (0, 1) for part in "AB"}
    assert trained == lora | {"out_head.weight", "out_head.bias", "final_norm.scale", "final_norm.shift"}


def test_a_head_trained_in_full_is_not_adapted():
    model = apply_lora(small_gpt(), 2, 4, "all", train_in_full="head")
    assert type(model.out_head) is nn.Linear and len(adapted_layers(model)) == 12


def test_new_layers_change_no_output():
    model = small_gpt()
    before = model(IDS)
    assert torch.equal(apply_lora(model, 4, 8)(IDS), before)


def test_trainable_total_and_percentage_are_printed(capsys):
    model = nn.Sequential(nn.Linear(90, 10, bias=False))
    print_parameters(apply_lora(model, 1, 1))
    assert capsys.readouterr().out == "trainable: 100 of 1,000 parameters (10.00%)\n"


def test_dropout_acts_on_the_branch_in_training_alone():
    model = nn.Sequential(nn.Linear(50, 50))
    train_a_little(apply_lora(model, 4, 1, dropout=0.5))
    x = torch.randn(2, 50)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("scaling, scale", [("alpha", 6), ("alpha/rank", 1.5), ("alpha/sqrt(rank)", 3)])
def test_the_scale_is_the_chosen_one(scaling, scale):
    layer = apply_lora(nn.Sequential(nn.Linear(8, 8)), 4, 6, scaling=scaling)[0]
    assert layer.lora.scale == pytest.approx(scale)


def test_the_papers_initialisation_is_narrower_by_the_root_of_width_over_rank():
    spreads = []
    for init in ("printed", "paper"):
        layer = apply_lora(nn.Sequential(nn.Linear(768, 768)), 16, 16, init=init)[0]
        spreads.append(layer.lora.A.std().item())
    assert spreads[0] / spreads[1] == pytest.approx(math.sqrt(768 / 16), rel=0.05)


@pytest.mark.parametrize("call, message", [
    ({"targets": "querry"}, "querry"),
    ({"targets": ("query", "nothing.*")}, "nothing"),
    ({"targets": ()}, "nothing is left"),
    ({"targets": None}, "targets are strings"),
    ({"targets": ("query", 3)}, "targets are strings"),
    ({"targets": b"query"}, "targets are strings"),
    ({"targets": "ALL"}, "give all, query"),
    ({"rank": 0}, "rank must be at least 1"),
    ({"rank": 10**9}, "use at most 96"),
    ({"rank": 25, "targets": "query"}, "use at most 24"),
    ({"scaling": "rank"}, "scaling"),
    ({"dropout": 1.0}, "dropout"),
    ({"init": "zeros"}, "init"),
    ({"train_in_full": "tail"}, "tail"),
    ({"train_in_full": None}, "targets are strings"),
    ({"train_in_full": "all"}, "no part of GPTModel"),
    ({"targets": "head", "train_in_full": "head"}, "nothing is left"),
    ({"train_in_full": "*"}, "nothing is left"),
])
def test_a_bad_request_is_refused_and_the_model_unchanged(call, message):
    model = small_gpt()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, **{"rank": 2, "alpha": 2, **call})
    assert same_state(model, before) and all(p.requires_grad for p in model.parameters())


def test_a_model_without_linear_layers_is_refused():
    for model in (nn.Sequential(nn.ReLU()), nn.Linear(3, 3)):
        with pytest.raises(ValueError, match="no layer of"):
            apply_lora(model, 2, 2)


@pytest.mark.parametrize("act", [merge_lora, remove_lora, adapted_layers, lambda x: apply_lora(x, 2, 2)])
def test_a_layer_with_lora_is_no_model(act):
    layer = train_a_little(with_lora(nn.Linear(3, 3), 2, 2))
    before = state(layer)
    with pytest.raises(ValueError, match="Sequential"):
        act(layer)
    assert same_state(layer, before)


def test_a_lazy_layer_is_adapted_once_its_size_is_known():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="run the model once"):
        apply_lora(model, 2, 2)
    model(torch.randn(2, 5))
    assert apply_lora(model, 2, 2)[0].lora.A.shape == (5, 2)


def test_adapting_twice_is_an_error():
    model = apply_lora(small_gpt(), 2, 2)
    with pytest.raises(ValueError, match="has LoRA already"):
        apply_lora(model, 4, 4)


def test_removing_restores_the_modules_and_weights():
    model = small_gpt()
    before, tree = state(model), str(model)
    remove_lora(train_a_little(apply_lora(model, 2, 2)))
    assert same_state(model, before) and str(model) == tree


# Updates and merging


@pytest.mark.parametrize("base", [nn.Linear(5, 7), Conv1D(7, 5)], ids=["Linear", "Conv1D"])
def test_the_update_is_what_lora_adds_to_the_weight_in_its_orientation(base):
    layer = train_a_little(with_lora(base, 2, 3.0))
    assert layer.sizes() == (5, 7)
    assert layer.update().shape == base.weight.shape
    torch.testing.assert_close(layer.update(), layer.weight - layer.linear.weight)
    x = torch.randn(4, 5)
    update = layer.update(torch.float64)
    added = x.double() @ (update if isinstance(base, Conv1D) else update.T)
    torch.testing.assert_close(added.float(), layer(x) - base(x), atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    targets=st.sampled_from(TARGETS), rank=st.integers(1, 24), alpha=st.floats(0.1, 4),
    scaling=st.sampled_from(["alpha", "alpha/rank", "alpha/sqrt(rank)"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_unmerge_undoes_merge_exactly(targets, rank, alpha, scaling, dtype):
    model = small_gpt().to(dtype)
    tree = str(model)
    train_a_little(apply_lora(model, rank, alpha, targets, scaling))
    before, adapted = state(model), model(IDS)
    merge_lora(model)
    assert str(model) == tree
    if dtype != torch.bfloat16:
        torch.testing.assert_close(model(IDS), adapted, atol=1e-5, rtol=1e-5)
    unmerge_lora(model)
    assert same_state(model, before)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=4), rank=st.integers(1, 8),
    bias=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_merged_layers_of_any_shape_give_the_same_output(widths, rank, bias, dtype):
    layers = [nn.Linear(i, o, bias=bias) for i, o in pairwise(widths)]
    model = nn.Sequential(*layers).to(dtype)
    train_a_little(apply_lora(model, min(rank, max(widths)), 2.0))
    x = torch.randn(5, widths[0], dtype=dtype)
    adapted = model(x)
    torch.testing.assert_close(merge_lora(model)(x), adapted, atol=1e-5, rtol=1e-4)


def test_merging_twice_is_an_error_and_changes_nothing():
    model = merge_lora(train_a_little(apply_lora(small_gpt(), 2, 2)))
    before = state(model)
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)
    assert same_state(model, before)


def test_eval_and_train_never_merge():
    model = train_a_little(apply_lora(small_gpt(), 2, 2))
    before = state(model)
    model.train().eval()
    assert same_state(model, before) and adapted_layers(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_layer_is_not_merged(value):
    model = train_a_little(apply_lora(small_gpt(), 2, 2))
    model.trf_blocks[1].ff.layers[2].lora.B.data[0, 0] = value
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"trf_blocks\.1\.ff\.layers\.2"):
        merge_lora(model)
    assert str(model) == str(before)
    assert torch.equal(model.trf_blocks[0].att.W_query.linear.weight,
                       before.trf_blocks[0].att.W_query.linear.weight)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_lora_is_not_merged_into_a_weight_that_is_computed(norm):
    model = nn.Sequential(norm(nn.Linear(4, 4))).eval()
    train_a_little(apply_lora(model, 2, 2))
    x = torch.randn(2, 4)
    before = model(x)
    with pytest.raises(ValueError, match="remove the parametrization"):
        merge_lora(model)
    assert torch.equal(model(x), before)


def test_a_quantized_weight_and_one_without_values_are_not_merged():
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="load it unquantized"):
        merge_lora(apply_lora(nn.Sequential(packed), 2, 2))
    with torch.device("meta"):
        model = apply_lora(nn.Sequential(nn.Linear(4, 4)), 2, 2)
    with pytest.raises(ValueError, match="meta device: load its values"):
        merge_lora(model)


def test_without_lora_there_is_nothing_to_merge_or_unmerge():
    for act in (merge_lora, unmerge_lora):
        with pytest.raises(ValueError, match=r"to (merge|undo)"):
            act(small_gpt())


def test_a_merged_model_is_adapted_or_stripped_only_after_unmerging():
    model = merge_lora(apply_lora(small_gpt(), 2, 2))
    for act in (lambda: apply_lora(model, 2, 2), lambda: remove_lora(model)):
        with pytest.raises(ValueError, match="unmerge_lora"):
            act()


def test_a_tied_weight_is_merged_into_a_copy_and_tied_again():
    model = nn.ModuleDict({"emb": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)})
    model["head"].weight = model["emb"].weight
    train_a_little(apply_lora(model, 2, 2))
    embedding = model["emb"].weight.clone()
    merge_lora(model)
    assert torch.equal(model["emb"].weight, embedding)
    assert not torch.equal(model["head"].weight, embedding)
    assert unmerge_lora(model)["head"].linear.weight is model["emb"].weight


def test_a_layer_used_twice_is_adapted_once_and_stays_shared():
    shared = nn.Linear(4, 4)
    model = apply_lora(nn.Sequential(shared, nn.ReLU(), shared), 2, 2)
    assert model[0] is model[2] and isinstance(model[0], LinearWithLoRA)
    assert merge_lora(model)[0] is model[2] is shared


def test_a_copy_of_a_merged_model_unmerges_on_its_own():
    model = train_a_little(apply_lora(small_gpt(), 2, 2))
    before = state(model)
    twin = copy.deepcopy(merge_lora(model))
    assert same_state(unmerge_lora(twin), before) and not adapted_layers(model)
