"""Embeddings, convolutions, and query, key and value in one weight: with LoRA, merged, saved, refused."""

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora.adapters import combine_adapters, load_adapter, save_adapter, set_adapter, take_adapter
from lora.layers import adapted_layers, apply_lora, merge_lora, remove_lora, unmerge_lora
from lora.peft_format import export_peft, import_peft
from lora.targets import find_layers
from models import foreign, same_state, state, train_a_little

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
IMAGES = {1: (11,), 2: (11, 10), 3: (7, 8, 6)}


def close(one, two, tolerance=1e-4):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def classifier():
    """A small image classifier: two convolutions and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 3 * 3, 5),
    ).eval()


def tagger(**options):
    """An embedding and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(30, 6, **options), nn.Linear(6, 4)).eval()


class Encoder(nn.Module):
    """An embedding and two of torch's encoder layers."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 8)
        self.blocks = nn.ModuleList([
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, bias=bias) for _ in range(2)
        ])

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


IDS = torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(1))
PICTURES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
MODELS = {  # name: model, input, targets
    "embedding": (tagger, IDS, "embedding"),
    "conv": (classifier, PICTURES, ("conv", "all")),
    "attention": (Encoder, IDS, "all"),
    "query and value": (Encoder, IDS, ("query", "value")),
}
EACH = pytest.mark.parametrize("kind", MODELS)


def make(kind, adapt=True, rank=4, **options):
    build, inputs, targets = MODELS[kind]
    model = build().eval()
    if adapt:
        options = {"split_qkv": True, **options} if kind == "query and value" else options
        train_a_little(apply_lora(model, rank, 2.0, targets, **options))
    return model, inputs


# The rules


@settings(max_examples=60, deadline=None)
@given(dim=st.sampled_from([1, 2, 3]), groups=st.sampled_from([1, 2, 4]), stride=st.integers(1, 2),
       dilation=st.integers(1, 2), padding=st.sampled_from([0, 1, "same"]), rank=st.sampled_from([4, 8]),
       mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]), bias=st.booleans())
def test_a_convolution_with_lora_is_the_convolution_with_the_merged_weight(
    dim, groups, stride, dilation, padding, rank, mode, bias
):
    stride = 1 if padding == "same" else stride
    model = nn.Sequential(CONVOLUTIONS[dim](
        8, 12, (3, 2, 3)[:dim], stride, padding, dilation, groups, bias, padding_mode=mode))
    x, before = torch.randn(2, 8, *IMAGES[dim]), copy.deepcopy(model)
    apply_lora(model, rank, 3.0, "conv")
    assert torch.equal(model(x), before(x))
    train_a_little(model)
    y, layer = model(x), model[0]
    assert not torch.allclose(y, before(x))
    weight = layer.linear.weight + layer.update()
    close(y, layer.linear._conv_forward(x, weight, layer.linear.bias))


def test_a_convolutions_update_is_the_einsum_of_a_and_b():
    layer = train_a_little(apply_lora(nn.Sequential(nn.Conv2d(3, 5, (2, 3))), 4, 2.0, "conv"))[0]
    A, B = layer.lora.A.T.reshape(4, 3, 2, 3), layer.lora.B
    close(layer.update(), 2.0 * torch.einsum("ro,rihw->oihw", B, A), 1e-6)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_an_embedding_looks_the_rows_of_a_up(padding_idx):
    model = train_a_little(apply_lora(tagger(padding_idx=padding_idx), 3, 2.0, "embedding"))
    layer = model[0]
    close(layer(IDS), layer.weight[IDS], 1e-6)
    assert layer.lora.A.shape == (30, 3) and layer.lora.B.shape == (3, 6)


def test_an_embeddings_a_starts_at_zero_and_b_normal():
    torch.manual_seed(0)
    layer = apply_lora(nn.Sequential(nn.Embedding(10, 2000)), 4, 2.0, "embedding")[0]
    assert not layer.lora.A.any() and layer.lora.B.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("vocabulary", "dim", "expected"), [
    (50257, 768, (204_100, 408_200, 816_400)), (1024, 768, (7_168, 14_336, 28_672)),
])
def test_gpt2s_embeddings_train_the_published_numbers_of_parameters(vocabulary, dim, expected):
    for rank, count in zip((4, 8, 16), expected):
        with torch.device("meta"):
            model = apply_lora(nn.Sequential(nn.Embedding(vocabulary, dim)), rank, 1.0, "embedding")
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_padding_tokens_row_is_not_trained():
    model = apply_lora(tagger(padding_idx=3), 3, 2.0, "embedding")
    model(IDS).sum().backward()
    assert not model[0].lora.A.grad[3].any() and model[0].lora.A.grad[IDS[IDS != 3]].any()


# Query, key and value


def test_the_key_that_is_switched_off_gets_no_update_at_all():
    model, _ = make("query and value")
    update = adapted_layers(model)["blocks.0.self_attn.in_proj"].update()
    query, key, value = update.chunk(3)
    assert query.any() and not key.any() and value.any()


def test_parts_of_one_weight_are_separate_loras():
    torch.manual_seed(0)
    model = foreign("gpt2")
    train_a_little(apply_lora(model, 3, 2.0, ("query", "value"), split_qkv=True))
    layer = adapted_layers(model)["transformer.h.0.attn.c_attn"]
    x, A, B = torch.randn(5, 16), layer.lora.A, layer.lora.B
    expected = torch.zeros(5, 48)
    expected[:, :16] = 2.0 * (x @ A[:, :3] @ B[:3])
    expected[:, 32:] = 2.0 * (x @ A[:, 3:] @ B[3:])
    close(layer(x), layer.linear(x) + expected, 1e-5)


@pytest.mark.parametrize(("targets", "parts"), [
    ("query", (True, False, False)), (("key", "value"), (False, True, True)), ("all", (True, True, True)),
    ("c_attn", (True, True, True)),
])
def test_the_targets_say_which_parts_have_lora(targets, parts):
    model = apply_lora(foreign("gpt2"), 3, 2.0, targets, split_qkv=True)
    assert adapted_layers(model)["transformer.h.1.attn.c_attn"].lora.parts == parts


def test_torchs_attention_has_its_own_results_gradients_and_names_with_lora():
    plain, model = Encoder(), Encoder()
    names = [*state(plain)]
    apply_lora(model, 3, 2.0, ("query", "key", "value"))
    close(model.train()(IDS), plain.train()(IDS), 1e-6)
    train_a_little(model)
    expected = model(IDS)
    model(IDS).sum().backward()
    assert adapted_layers(model)["blocks.1.self_attn.in_proj"].lora.B.grad.any()
    close(model.eval()(IDS), expected, 1e-5)  # torch's fast path reads the same weight
    merge_lora(model)
    close(model(IDS), expected, 1e-5)
    assert [*sorted(state(model))] == sorted(names)
    plain.load_state_dict(model.state_dict())
    close(plain.eval()(IDS), expected, 1e-5)
    remove_lora(unmerge_lora(model))
    assert type(model.blocks[0].self_attn) is nn.MultiheadAttention and [*state(model)] == names
    assert same_state(model, state(Encoder()))


def test_refusals_leave_torchs_attention_as_it_was():
    model = Encoder()
    with pytest.raises(ValueError, match="dropout cannot act"):
        apply_lora(model, 3, 2.0, "query", dropout=0.1)
    assert type(model.blocks[0].self_attn) is nn.MultiheadAttention
    assert same_state(model, state(Encoder())) and [*state(model)] == [*state(Encoder())]


# Whatever works for linear layers


@EACH
def test_merging_changes_no_output_and_unmerging_no_bit(kind):
    model, x = make(kind)
    before, expected = state(model), model(x)
    merge_lora(model)
    close(model(x), expected)
    assert same_state(unmerge_lora(model), before) and torch.equal(model(x), expected)


@EACH
def test_an_adapter_is_saved_and_loaded_into_the_plain_model(kind, tmp_path):
    model, x = make(kind)
    save_adapter(model, tmp_path)
    plain, _ = make(kind, adapt=False)
    assert torch.equal(load_adapter(plain, tmp_path)(x), model(x))
    assert take_adapter(plain).base == take_adapter(model).base


@EACH
def test_adapters_are_exchanged_and_taken_out(kind):
    model, x = make(kind)
    adapter, expected = take_adapter(model), model(x)
    plain, _ = make(kind, adapt=False)
    before, base = state(plain), plain(x)
    set_adapter(plain, adapter)
    set_adapter(plain, adapter)
    assert torch.equal(plain(x), expected)
    remove_lora(plain)
    close(plain(x), base, 1e-5)  # frozen, torch's encoder takes another path
    assert same_state(plain, before)


@EACH
def test_two_adapters_add_up(kind):
    one, _ = make(kind)
    two, _ = make(kind)
    train_a_little(two, seed=5)
    both, _ = make(kind, adapt=False)
    set_adapter(both, combine_adapters(take_adapter(one), take_adapter(two), (0.5, 2.0)))
    updates = [adapted_layers(model) for model in (one, two)]
    for name, layer in adapted_layers(both).items():
        close(layer.update(), 0.5 * updates[0][name].update() + 2 * updates[1][name].update(), 1e-5)


# Targets and refusals


def test_targets_reach_embeddings_and_convolutions_and_all_means_linear_layers():
    model = classifier()
    assert [*find_layers(model)] == ["5"]
    assert [*find_layers(model, "conv")] == ["0", "2"]
    assert [*find_layers(model, ("0", "all"))] == ["0", "5"]
    assert [*find_layers(tagger(), "embedding")] == ["0"]


@pytest.mark.parametrize(("build", "options", "message"), [
    (classifier, {"targets": "conv", "variant": "dora"}, "no branch 'dora' for Conv2d: only linear"),
    (tagger, {"targets": "embedding", "variant": "vera"}, "no branch 'vera' for Embedding: only linear"),
    (classifier, {"targets": "conv", "rank": 3}, "a convolution with 2 groups needs a rank that they divide"),
    (lambda: tagger(max_norm=1.0), {"targets": "embedding"}, "max_norm"),
    (lambda: tagger(sparse=True), {"targets": "embedding"}, "sparse"),
    (Encoder, {"targets": "query", "split_qkv": True, "variant": "dora"}, "split_qkv is for plain LoRA"),
    (classifier, {"targets": ()}, "nothing is left for LoRA: give other"),
    (classifier, {"targets": "embedding"}, "no layer of Sequential for LoRA matches 'embedding'"),
])
def test_what_cannot_be_is_refused_with_the_model_as_it_was(build, options, message):
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, **{"rank": 4, "alpha": 2.0, **options})
    assert same_state(model, before) and all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_another_kind_of_layer_is_refused():
    adapter = take_adapter(train_a_little(apply_lora(nn.Sequential(nn.Embedding(6, 4)), 2, 1.0, "embedding")))
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="no branch 'embedding' for Linear: that is for other layers"):
        set_adapter(model, adapter)


# PEFT


def test_pefts_convolution_is_wrong_where_ours_is_the_merged_one():
    """What README and notebook say about PEFT: circular padding is silently zeros, dilation fails."""
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    theirs = peft.get_peft_model(nn.Sequential(conv), peft.LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(2, 3, 6, 6)
    unmerged = train_a_little(theirs).eval()(x)
    assert (theirs.merge_and_unload()(x) - unmerged).abs().max() > 1e-3


@pytest.mark.parametrize("dim", CONVOLUTIONS)
@settings(max_examples=8, deadline=None)
@given(stride=st.integers(1, 2), padding=st.sampled_from([0, 1]), rank=st.integers(1, 4),
       size=st.sampled_from([1, 3]))
def test_convolutions_are_exchanged_with_peft(folder, dim, stride, padding, rank, size):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(CONVOLUTIONS[dim](3, 5, size, stride, padding)).eval()

    x = torch.randn(2, 3, *IMAGES[dim])
    ours = train_a_little(apply_lora(build(), rank, 3.0, "conv"))
    export_peft(ours, folder / "conv")
    close(peft.PeftModel.from_pretrained(build(), folder / "conv").eval()(x), ours(x), 1e-5)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=rank, lora_alpha=5, target_modules=["0"]))
    train_a_little(theirs).eval().save_pretrained(folder / "conv")
    ours = import_peft(build(), folder / "conv")
    close(ours(x), theirs(x), 1e-5)
    if size > 1:  # PEFT cannot merge a Conv3d of size 1
        close(merge_lora(ours)[0].weight, theirs.merge_and_unload()[0].weight, 1e-5)


@settings(max_examples=8, deadline=None)
@given(rank=st.integers(1, 6), rslora=st.booleans())
def test_embeddings_are_exchanged_with_peft(folder, rank, rslora):
    ours = apply_lora(tagger(), rank, 3.0, ("embedding", "all"))
    export_peft(train_a_little(ours), folder / "embedding")
    close(peft.PeftModel.from_pretrained(tagger(), folder / "embedding").eval()(IDS), ours(IDS), 1e-5)
    config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=["0", "1"], use_rslora=rslora)
    theirs = train_a_little(peft.get_peft_model(tagger(), config)).eval()
    theirs.save_pretrained(folder / "embedding")
    close(import_peft(tagger(), folder / "embedding")(IDS), theirs(IDS), 1e-5)


def test_query_and_value_of_one_weight_are_exported_as_lora_of_twice_the_rank(tmp_path):
    ours = train_a_little(apply_lora(foreign("gpt2"), 3, 2.0, ("query", "value"), split_qkv=True))
    export_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(foreign("gpt2"), tmp_path).eval()
    close(theirs(IDS).logits, ours(IDS).logits, 1e-5)
    assert theirs.peft_config["default"].r == 6


@pytest.mark.parametrize("options", [
    {"dilation": 2}, {"padding": 1, "padding_mode": "circular"}, {"groups": 2},
])
def test_what_peft_computes_otherwise_is_neither_exported_nor_imported(options, tmp_path):
    model = apply_lora(nn.Sequential(nn.Conv2d(4, 4, 3, **options)), 2, 2.0, "conv")
    with pytest.raises(ValueError, match="PEFT's LoRA ignores the dilation and padding mode of 0"):
        export_peft(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    plain = train_a_little(apply_lora(nn.Sequential(nn.Conv2d(4, 4, 3)), 2, 2.0, "conv"))
    export_peft(plain, tmp_path)
    with pytest.raises(ValueError, match="PEFT's LoRA ignores"):
        import_peft(nn.Sequential(nn.Conv2d(4, 4, 3, **options)), tmp_path)


def test_torchs_attention_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match=r"another form for torch's attention, blocks\.0\.self_attn"):
        export_peft(make("attention")[0], tmp_path / "none")
