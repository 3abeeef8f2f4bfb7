"""PEFT's adapter format: the installed PEFT reads ours, we read its plain LoRA, the rest is refused."""

import dataclasses
import json
import math
import re

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lora.adapters import set_adapter, take_adapter
from lora.files import write_whole
from lora.layers import apply_lora
from lora.peft_format import export_peft, import_peft
from models import (
    ANY_TARGETS,
    FULL,
    IDS,
    SCALING,
    foreign,
    same_state,
    small_gpt,
    state,
    train_a_little,
    trained,
)

LORA_VARIANTS = [  # but for use_dora, which is read
    setting.name for setting in dataclasses.fields(peft.LoraConfig)
    if setting.metadata.get("is_lora_variant") and setting.name != "use_dora"
]


def train_with_peft(**settings):
    config = peft.LoraConfig(**{"target_modules": ["W_query", "out_proj"], **settings})
    return train_a_little(peft.get_peft_model(small_gpt(), config)).eval()


def assert_import_agrees(theirs, folder, **options):
    theirs.save_pretrained(folder, **options)
    ours = import_peft(small_gpt(), folder).eval()
    torch.testing.assert_close(ours(IDS), theirs(IDS), atol=1e-5, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(targets=ANY_TARGETS, rank=st.integers(1, 12), alpha=st.sampled_from([1.0, 2.5, 16.0]),
       scaling=SCALING, full=FULL)
def test_peft_reads_our_export_with_the_same_logits(folder, targets, rank, alpha, scaling, full):
    model = trained(rank=rank, alpha=alpha, targets=targets, scaling=scaling, train_in_full=full)
    export_peft(model, folder / "export")
    theirs = peft.PeftModel.from_pretrained(small_gpt(), folder / "export").eval()
    torch.testing.assert_close(theirs(IDS), model(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@settings(max_examples=10, deadline=None)
@given(rank=st.integers(1, 12), alpha=st.sampled_from([1, 4, 8]), rslora=st.booleans(),
       modules=st.sampled_from([["W_query", "W_value"], ["ff.layers.0", "out_proj"], "all-linear"]),
       head=st.booleans(), pattern=st.booleans())
def test_we_read_what_peft_trained_with_the_same_logits(folder, rank, alpha, rslora, modules, head, pattern):
    patterns = {"rank_pattern": {"out_proj": 2}, "alpha_pattern": {"trf_blocks.1.att.W_query": 5}}
    theirs = train_with_peft(
        r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=modules,
        modules_to_save=["out_head"] if head and modules != "all-linear" else None,
        **patterns if pattern else {},
    )
    assert_import_agrees(theirs, folder / "import")


@pytest.mark.parametrize("settings", [
    {},
    {"rank_pattern": {"out_proj": 2}},
    {"alpha_pattern": {"out_proj": 5}},
    {"use_rslora": True},
    {"modules_to_save": ["out_head"]},
    {"exclude_modules": ["trf_blocks.0.att.W_query"]},
    {"layers_to_transform": [0], "layers_pattern": "trf_blocks"},
    {"init_lora_weights": False},
])
def test_settings_that_leave_the_meaning_of_the_tensors_are_read(settings, tmp_path):
    assert_import_agrees(train_with_peft(**settings), tmp_path)


INITIALISATIONS = (
    True, False, "gaussian", "eva", "olora", "pissa", "pissa_niter_4", "corda", "lora_ga", "loftq",
    "orthogonal", "mica",
)


def test_every_initialisation_of_the_installed_peft_is_tried():
    (setting,) = (s for s in dataclasses.fields(peft.LoraConfig) if s.name == "init_lora_weights")
    named = {*re.findall("'([^']*)'", setting.type)}  # bool | Literal['gaussian', …]
    assert len(named) > 5 and named - {"pissa_niter_[number of iters]"} <= {*INITIALISATIONS}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", INITIALISATIONS)
def test_an_initialisation_is_read_exactly_or_refused(value, tmp_path):
    try:
        theirs = train_with_peft(init_lora_weights=value)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError):  # needs data, or another package
        theirs = train_with_peft()
        theirs.peft_config["default"].init_lora_weights = value
    theirs.save_pretrained(tmp_path)
    try:
        ours = import_peft(small_gpt(), tmp_path)
    except ValueError as error:
        assert f"init_lora_weights={value!r}" in str(error)
        assert value in ("pissa_niter_4", "corda", "lora_ga", "loftq")
    else:
        torch.testing.assert_close(ours(IDS), theirs(IDS), atol=1e-5, rtol=1e-5)


def test_an_initialisation_that_changes_the_base_is_read_before_and_after_peft_has_converted_it(tmp_path):
    theirs = train_with_peft(init_lora_weights="pissa")
    assert_import_agrees(theirs, tmp_path / "unconverted")
    config = peft.LoraConfig(target_modules=["W_query", "out_proj"], init_lora_weights="pissa")
    start = peft.get_peft_model(small_gpt(), config)
    start.peft_config["default"].init_lora_weights = True  # as PEFT asks for before training
    start.save_pretrained(tmp_path / "start")
    assert_import_agrees(
        theirs, tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_foreign_models_go_to_peft_and_back(kind, tmp_path):
    model = train_a_little(apply_lora(foreign(kind), 3, 2, ("query", "mlp"), train_in_full="head"))
    export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(foreign(kind), tmp_path).eval()
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(theirs(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-5)
    again = import_peft(foreign(kind), tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-5)


def test_the_export_is_what_peft_itself_writes(tmp_path):
    model = trained(rank=3, alpha=2, targets=("query", "value"), train_in_full="head")
    export_peft(model, tmp_path / "ours")
    peft.PeftModel.from_pretrained(small_gpt(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert ours["base_model.model.trf_blocks.0.att.W_query.lora_A.weight"].shape == (3, 24)
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text(encoding="utf-8"))
                    for who in ("ours", "theirs"))
    theirs["target_modules"].sort()  # a set in PEFT
    assert {key: theirs[key] for key in ours} == ours
    assert (ours["r"], ours["lora_alpha"]) == (3, 6)  # the printed scale alpha is alpha · rank / rank
    assert ours["target_modules"] == ["W_query", "W_value"] and ours["modules_to_save"] == ["out_head"]


class Parts(nn.Module):
    """Four linear layers, two of them under names that end alike, a norm and a parameter of its own."""

    def __init__(self, shared=False, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4)
        self.b = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.again = self.a if shared else nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.zeros(4))
        if tied:
            self.again.weight = self.b["a"].weight
        self.eval()

    def forward(self, x):
        x = self.again(self.b["norm"](self.b["a"](self.a(x))))
        return self.last(self.norm(self.batch_norm(x))) + self.shift


def adapt(targets, full=(), rank=2, **options):
    """Return a function that gives a `Parts` LoRA and trains it, with the parameters `full` in full."""

    def adapted():
        torch.manual_seed(1)
        model = apply_lora(Parts(**options), rank, 2.0, targets)
        for name in full:
            model.get_parameter(name).requires_grad_(True)
        return train_a_little(model)

    return adapted


def assert_peft_agrees(model, folder, base):
    export_peft(model, folder)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(theirs(x), model(x), atol=1e-5, rtol=1e-5)


def without(model, layer):
    """Return `model` with LoRA in all of its layers but one."""
    adapter = take_adapter(model)
    for part in "AB":
        del adapter.tensors[f"{layer}.lora.{part}"]
    del adapter.layers[layer]
    return set_adapter(model, adapter)


@pytest.mark.parametrize("make", [
    adapt("all"),
    lambda: without(adapt("all")(), "b.a"),  # no suffix separates a from b.a
    adapt("again", ["b.norm.weight"]),
    adapt("again", ["norm.weight", "b.norm.weight", "batch_norm.weight"]),  # all that ends in norm
    adapt("all", ["b.norm.weight", "b.norm.bias", "batch_norm.weight"]),
])
def test_peft_reads_what_we_export(make, tmp_path):
    assert_peft_agrees(make(), tmp_path, Parts())


@pytest.mark.parametrize("special", ["a", "b.a"])
def test_another_rank_and_alpha_are_those_of_one_layer_where_names_end_alike(special, tmp_path):
    model = adapt("all")()
    other = take_adapter(apply_lora(Parts(), 3, 5.0, "all"))
    mixed = take_adapter(model)
    mixed.layers[special] = other.layers[special]
    for part in "AB":
        mixed.tensors[f"{special}.lora.{part}"] = other.tensors[f"{special}.lora.{part}"] + 0.1
    model = set_adapter(model, mixed)
    assert_peft_agrees(model, tmp_path, Parts())
    x = torch.randn(3, 4)
    torch.testing.assert_close(import_peft(Parts(), tmp_path)(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make, message", [
    (adapt("all", ["shift"]), "parameter of the model itself"),
    (adapt("again", ["a.bias"]), r"b\.a for a"),
    (adapt("again", ["norm.weight"]), r"b\.norm for norm"),
    (adapt("all", ["again.linear.bias"]), r"again is trained beside LoRA in again"),
    (adapt("a", shared=True), "a is also again"),
    (adapt("last", ["b.a.weight"], tied=True), r"b\.a\.weight is also again\.weight"),
])
def test_what_peft_would_misread_is_not_exported(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_peft(make(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("options, settings, message", [
    ({"shared": True}, {"target_modules": ["a"]}, "is also"),
    ({"tied": True}, {"target_modules": ["a"], "modules_to_save": ["again"]}, "again"),
])
def test_what_peft_changes_in_one_place_is_not_changed_in_two(options, settings, message, tmp_path):
    theirs = peft.get_peft_model(Parts(**options), peft.LoraConfig(**settings))
    train_a_little(theirs).save_pretrained(tmp_path)
    model = Parts(**options)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        import_peft(model, tmp_path)
    assert same_state(model, before)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_wrapped_models_are_exported_and_imported_under_plain_names(wrap, tmp_path):
    model = trained(train_in_full="head")
    expected = model(IDS)
    export_peft(wrap(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_gpt(), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(import_peft(wrap(small_gpt()), tmp_path)(IDS), expected, atol=1e-5, rtol=1e-5)


def test_a_stopped_export_is_refused_not_read_mixed(tmp_path, monkeypatch):
    export_peft(trained(1), tmp_path)

    def stop(path, data):
        if path.name == "adapter_config.json":
            raise KeyboardInterrupt
        write_whole(path, data)

    monkeypatch.setattr("lora.peft_format.write_whole", stop)
    with pytest.raises(KeyboardInterrupt):
        export_peft(trained(2), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        import_peft(small_gpt(), tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"peft_type": "IA3"}, "IA3"),
    *(({name: True}, name) for name in LORA_VARIANTS),
    ({"use_next_years_idea": True}, "use_next_years_idea"),
    ({"bias": "all"}, "bias"),
    ({"bias": "lora_only"}, "bias"),
    ({"target_parameters": ["out_head.weight"]}, "target_parameters"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"lora_bias": True}, "lora_bias"),
    ({"r": 7}, r"is \(24, 3\)"),
])
def test_what_cannot_be_read_is_refused_by_name(change, message, tmp_path):
    export_peft(trained(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
    model = small_gpt()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        import_peft(model, tmp_path)
    assert same_state(model, before)


DAMAGED = [
    *({"r": value} for value in (None, 0, -1, "8", 2.5, [], 7)),
    *({"lora_alpha": value} for value in (None, "8", math.nan, [], 10**400)),
    *({"lora_dropout": value} for value in (None, "0.1", 1.5, [])),
    *({key: value} for key in ("rank_pattern", "alpha_pattern") for value in (["a"], "a", 5, {"(": 2})),
    {"rank_pattern": {"W_query": "3"}}, {"alpha_pattern": {"W_query": None}},
    {"use_rslora": "false"}, {"use_rslora": [1]},
]


@pytest.mark.parametrize("change", DAMAGED)
def test_damaged_peft_settings_are_refused_and_the_model_unchanged(change, tmp_path):
    export_peft(trained(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
    model = small_gpt()
    before = state(model)
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
        import_peft(model, tmp_path)
    assert same_state(model, before)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_missing_peft_settings_are_named(key, tmp_path):
    export_peft(trained(), tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"adapter_config.*it lacks '{key}'"):
        import_peft(small_gpt(), tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_peft_files_with_other_content_are_named(name, data, tmp_path):
    export_peft(trained(), tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        import_peft(small_gpt(), tmp_path)


def test_damaged_or_pickled_peft_files_are_refused(tmp_path):
    export_peft(trained(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        import_peft(small_gpt(), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickles"):
        import_peft(small_gpt(), tmp_path)
