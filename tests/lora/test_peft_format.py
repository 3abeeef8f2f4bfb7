"""PEFT's adapter format: the installed PEFT reads ours, we read its plain LoRA, the rest is refused."""

import dataclasses
import json

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lora.adapters import set_adapter, take_adapter
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

LORA_VARIANTS = [
    setting.name for setting in dataclasses.fields(peft.LoraConfig)
    if setting.metadata.get("is_lora_variant")
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
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
])
def test_settings_that_leave_the_meaning_of_the_tensors_are_read(settings, tmp_path):
    assert_import_agrees(train_with_peft(**settings), tmp_path)


def test_an_initialisation_that_changes_the_base_is_read_once_peft_has_converted_it(tmp_path):
    theirs = train_with_peft(init_lora_weights="pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
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


def test_layers_that_no_suffix_separates_are_exported_as_a_regular_expression(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(4, 4)
            self.b = nn.ModuleDict({"a": nn.Linear(4, 4)})

        def forward(self, x):
            return self.b["a"](self.a(x))

    model = Nested()
    torch.manual_seed(1)
    train_a_little(apply_lora(model, 2, 2))
    adapter = take_adapter(model)
    for part in "AB":
        del adapter.tensors[f"b.a.lora.{part}"]
    del adapter.layers["b.a"]
    export_peft(set_adapter(model, adapter), tmp_path)
    theirs = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    x = torch.randn(2, 4)
    torch.testing.assert_close(theirs(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"peft_type": "IA3"}, "IA3"),
    *(({name: True}, name) for name in LORA_VARIANTS),
    ({"use_next_years_idea": True}, "use_next_years_idea"),
    ({"bias": "all"}, "bias"),
    ({"r": 7}, r"is \(24, 3\)"),
])
def test_adapters_that_are_not_plain_lora_are_refused(change, message, tmp_path):
    export_peft(trained(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
    model = small_gpt()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        import_peft(model, tmp_path)
    assert same_state(model, before)


def test_damaged_or_pickled_peft_files_are_refused(tmp_path):
    export_peft(trained(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        import_peft(small_gpt(), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickles"):
        import_peft(small_gpt(), tmp_path)
