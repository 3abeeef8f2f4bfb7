"""Embeddings, convolutions and merged projections beside PEFT's layers, loralib's rule and plain autograd."""

import itertools

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import layer as theirs
from torch import nn

from lora.adapters import load_adapter, save_adapter, take_adapter
from lora.layers import adapted_layers, apply_lora, merge_lora, unmerge_lora
from lora.optimizer import lora_adamw
from lora.peft_format import export_peft, import_peft
from lora.wrappers import Conv1DWithLoRA, with_lora
from models import SCALING, foreign, same_state, state, train_a_little

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CLASSES = {1: theirs.Conv1d, 2: theirs.Conv2d, 3: theirs.Conv3d}
IMAGES = {1: (12,), 2: (12, 11), 3: (8, 9, 7)}
IDS = torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(1))
PARTS = [parts for n in (2, 3) for parts in itertools.product((True, False), repeat=n) if any(parts)]


def close(one, two, tolerance=1e-4):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def with_gradients(forward, x, *leaves):
    """Return the output for `x` and the gradients of a fixed weighted sum of it by the `leaves`."""
    y = forward(x)
    loss = (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum()
    return y, *torch.autograd.grad(loss, leaves)


# PEFT


def pefts_layer(base, rank, scaling, alpha):
    """Return PEFT's layer around `base`, with the scale that ours has with `scaling` and `alpha`."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha * rank if scaling == "alpha" else alpha, target_modules=["0"],
        use_rslora=scaling == "alpha/sqrt(rank)",
    )
    return train_a_little(peft.get_peft_model(nn.Sequential(base), config)).base_model.model[0]


@settings(max_examples=40, deadline=None)
@given(dim=st.sampled_from([1, 2, 3]), stride=st.integers(1, 3), padding=st.integers(0, 2),
       rank=st.integers(1, 4), kernel=st.tuples(*[st.integers(2, 4)] * 3), scaling=SCALING,
       bias=st.booleans())
def test_a_convolution_is_pefts(dim, stride, padding, rank, kernel, scaling, bias):
    base = CONVOLUTIONS[dim](3, 5, kernel[:dim], stride, padding, bias=bias)
    other = pefts_layer(base, rank, scaling, 3.0)
    assert type(other) is CLASSES[dim]
    ours = with_lora(base, rank, 3.0, scaling=scaling)
    A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
    ours.lora.A.data, ours.lora.B.data = A.detach().flatten(1).T, B.detach().flatten(1).T
    x = torch.randn(2, 3, *IMAGES[dim])
    y, by_A, by_B = with_gradients(ours, x, ours.lora.A, ours.lora.B)
    expected, by_their_A, by_their_B = with_gradients(other, x, A, B)
    close(y, expected)
    close(ours.update(), other.get_delta_weight("default"))
    close(by_A, by_their_A.flatten(1).T, 1e-3)
    close(by_B, by_their_B.flatten(1).T, 1e-3)


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 6), scaling=SCALING, padding_idx=st.sampled_from([None, 4]))
def test_an_embedding_is_pefts(rank, scaling, padding_idx):
    base = nn.Embedding(30, 6, padding_idx=padding_idx)
    other = pefts_layer(base, rank, scaling, 3.0)
    assert type(other) is theirs.Embedding
    ours = with_lora(base, rank, 3.0, scaling=scaling)
    A, B = other.lora_embedding_A["default"], other.lora_embedding_B["default"]
    ours.lora.A.data, ours.lora.B.data = A.detach().T.clone(), B.detach().T.clone()
    y, by_A, by_B = with_gradients(ours, IDS, ours.lora.A, ours.lora.B)
    expected, by_their_A, by_their_B = with_gradients(other, IDS, A, B)
    close(y, expected)
    close(ours.update(), other.get_delta_weight("default"))
    close(by_A, by_their_A.T, 1e-3)
    close(by_B, by_their_B.T, 1e-3)


# Where PEFT has other results, or none


@settings(max_examples=40, deadline=None)
@given(dim=st.sampled_from([1, 2, 3]), groups=st.sampled_from([1, 2, 4]), dilation=st.integers(1, 2),
       mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
def test_other_convolutions_have_the_gradients_of_the_merged_weight(dim, groups, dilation, mode):
    conv = CONVOLUTIONS[dim](8, 12, (3, 2, 3)[:dim], 1, 1, dilation, groups, padding_mode=mode)
    layer = train_a_little(with_lora(conv, 4, 3.0))
    A, B = layer.lora.A, layer.lora.B

    def merged(x):
        kernels = A.T.unflatten(0, (groups, -1)), B.T.unflatten(0, (groups, -1))  # (g, r, …), (g, out, r)
        update = 3.0 * torch.einsum("gri,gor->goi", *kernels).reshape(conv.weight.shape)
        return conv._conv_forward(x, conv.weight + update, conv.bias)

    x = torch.randn(2, 8, *IMAGES[dim])
    for ours, expected in zip(with_gradients(layer, x, A, B), with_gradients(merged, x, A, B)):
        close(ours, expected, 1e-3)


# loralib's MergedLinear


def loralib_update(A, B, parts):
    """The update (out, in) by loralib's rule: rows of A (n r, in), grouped, mixed by B (n out / len, r)."""
    rows = nn.functional.conv1d(A[None], B[..., None], groups=sum(parts))[0]
    update = rows.new_zeros(len(parts), len(rows) // sum(parts), A.shape[1])
    update[torch.tensor(parts)] = rows.unflatten(0, (sum(parts), -1))
    return update.flatten(0, 1)


def to_loralib(lora):
    """Return A and B of a `MergedLoRALayer` as loralib has them."""
    return lora.A.T, lora.B.unflatten(0, (sum(lora.parts), -1)).mT.flatten(0, 1)


class Conv1D(nn.Module):
    """Stands for Hugging Face's, whose weight is (in, out = nf)."""

    def __init__(self, nx, nf):
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_merged_projection_is_loralibs(kind, parts):
    torch.manual_seed(0)
    layer = train_a_little(with_lora(kind(5, 4 * len(parts)), 3, 6.0, variant="merged", parts=parts,
                                     scaling="alpha/rank"))
    lora, x = layer.lora, torch.randn(7, 5)
    base = layer.linear(x).detach()

    def loralib(x):
        return base + 2.0 * x @ loralib_update(*to_loralib(lora), parts).T

    expected = with_gradients(loralib, x, lora.A, lora.B)
    for ours, other in zip(with_gradients(layer, x, lora.A, lora.B), expected):
        close(ours, other, 1e-5)
    assert isinstance(layer, Conv1DWithLoRA) == (kind is Conv1D)
    update = layer.update() if kind is Conv1D else layer.update().T
    for part, columns in zip(parts, update.chunk(len(parts), dim=1)):
        assert bool(columns.any()) == part


def test_a_merged_projection_is_two_separate_loras():
    torch.manual_seed(0)
    joint = train_a_little(with_lora(nn.Linear(6, 18), 2, 3.0, variant="merged", parts=(True, False, True)))
    x, outputs = torch.randn(4, 6), []
    for place, weight in enumerate(joint.linear.weight.chunk(3)):
        alone = nn.Linear(6, 6)
        alone.weight.data, alone.bias.data = weight.data, joint.linear.bias.data.chunk(3)[place]
        if place != 1:
            alone, rows = with_lora(alone, 2, 3.0), slice(place, place + 2)  # 0 and 1, 2 and 3
            alone.lora.A.data, alone.lora.B.data = joint.lora.A.data[:, rows], joint.lora.B.data[rows]
        outputs.append(alone(x))
    close(joint(x), torch.cat(outputs, dim=1), 1e-5)


def test_peft_reads_a_merged_projection_as_loralibs_update(tmp_path):
    ours = apply_lora(foreign("gpt2"), 3, 6.0, ("query", "value"), "alpha/rank", split_qkv=True)
    export_peft(train_a_little(ours), tmp_path)
    other = peft.PeftModel.from_pretrained(foreign("gpt2"), tmp_path).base_model.model
    for name, layer in adapted_layers(ours).items():
        expected = 2.0 * loralib_update(*to_loralib(layer.lora), layer.lora.parts)
        close(other.get_submodule(name).get_delta_weight("default"), expected.T, 1e-6)


# Round trips


@st.composite
def small_models(draw):
    """Return (embedding or convolution and a linear layer, input, whether PEFT computes the same)."""
    torch.manual_seed(draw(st.integers(0, 99)))
    dim = draw(st.sampled_from([0, 1, 2, 3]))
    if dim == 0:
        width = draw(st.integers(2, 9))
        layer = nn.Embedding(30, width, padding_idx=draw(st.sampled_from([None, 0])))
        return nn.Sequential(layer, nn.Linear(width, 4)), IDS, True
    groups, dilation = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 2]))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect"]))
    stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
    conv = CONVOLUTIONS[dim](4, 6, (3, 2, 2)[:dim], stride, padding, dilation, groups, padding_mode=mode)
    x = torch.randn(2, 4, *IMAGES[dim])
    plain = groups == 1 and dilation == 1 and mode == "zeros"
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(conv(x)[0].numel(), 4)), x, plain


@settings(max_examples=30, deadline=None)
@given(made=small_models(), rank=st.sampled_from([2, 4]), scaling=SCALING)
def test_what_a_training_step_has_changed_comes_back_from_every_file(folder, made, rank, scaling):
    model, x, plain = made
    base = state(model)
    apply_lora(model, rank, 3.0, ("embedding" if x is IDS else "conv", "all"), scaling)
    optimizer = lora_adamw(model, 0.1)
    for _ in range(2):  # in the first step, half of the factors have no gradient
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(layer.update().any() for layer in adapted_layers(model).values())

    def fresh():
        again = torch.nn.Sequential(*[getattr(layer, "linear", layer) for layer in model])
        assert same_state(again, base)
        return again

    expected = model(x)
    assert torch.equal(load_adapter(fresh(), save_adapter(model, folder / "own"))(x), expected)
    if plain:
        close(import_peft(fresh(), export_peft(model, folder / "peft"))(x), expected)
    else:
        with pytest.raises(ValueError, match="PEFT's LoRA ignores"):
            export_peft(model, folder / "peft")
    before = state(model)
    close(merge_lora(model)(x), expected, 1e-3)
    assert same_state(unmerge_lora(model), before)


# What loralib does on the way, and here is a call


class Everything(nn.Module):
    """An embedding, a grouped convolution and a projection for query, key and value."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2, padding_mode="circular")
        self.c_attn = nn.Linear(8, 24)

    def forward(self, ids):
        return self.c_attn(self.conv(self.embedding(ids).mT).mT)


def everything():
    targets = ("embedding", "conv", "query", "value")
    return train_a_little(apply_lora(Everything(), 2, 3.0, targets, split_qkv=True))


def test_train_and_eval_change_no_weight():
    model = everything()
    before, expected = state(model), model(IDS)
    for mode in (False, False, True, True, False):
        model.train(mode)
        assert torch.equal(model(IDS), expected) and same_state(model, before)


def test_merging_ten_times_leaves_every_bit_as_it_was():
    model = everything().bfloat16()
    before = state(model)
    for _ in range(10):
        unmerge_lora(merge_lora(model))
    assert same_state(model, before)


def test_neither_merging_nor_saving_happens_twice(tmp_path):
    model = merge_lora(everything())
    before = state(model)
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(model)
    with pytest.raises(ValueError, match="call unmerge_lora first"):
        save_adapter(model, tmp_path / "none")
    assert same_state(model, before) and not (tmp_path / "none").exists()


def test_an_adapter_contains_the_tensors_of_lora_alone():
    names = {name.removesuffix(".A").removesuffix(".B") for name in take_adapter(everything()).tensors}
    assert names == {"embedding.lora", "conv.lora", "c_attn.lora"}
