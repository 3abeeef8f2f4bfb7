"""Files of LoRA's relatives: plain adapters as before, damaged ones refused, odd settings of PEFT."""

import json
import re

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from lora.adapters import combine_adapters, load_adapter, save_adapter, set_adapter, take_adapter
from lora.files import WEIGHTS_FILE, checksum
from lora.layers import adapted_layers, apply_lora
from lora.peft_format import export_peft, import_peft
from lora.wrappers import BRANCHES
from models import IDS, same_state, small_gpt, state, train_a_little

LAYER = "trf_blocks.0.att.W_query"
BRANCH = pytest.mark.parametrize("variant", BRANCHES)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def trained(variant, **options):
    return train_a_little(apply_lora(small_gpt(), 3, 2.0, "query", variant=variant, **options))


def close(one, two, tolerance=1e-5):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


# Plain LoRA


def test_a_plain_adapters_file_is_what_it_was_before_there_were_variants(tmp_path):
    """The same bytes: the same keys in the same order, and no variant."""
    model = trained("lora", dropout=0.1)
    save_adapter(model, tmp_path, {"data": "SMS"})
    adapter = take_adapter(model)
    layer = {"rank": 3, "alpha": 2.0, "scaling": "alpha", "dropout": 0.1}
    settings = {
        "format": "lora-in-practice/2", "sha256": checksum(adapter.tensors),
        "base_model": list(adapter.base), "notes": {"data": "SMS"},
        "layers": {f"trf_blocks.{number}.att.W_query": layer for number in (0, 1)},
    }
    expected = save(adapter.tensors, metadata={"settings": json.dumps(settings)})
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == expected
    assert torch.equal(load_adapter(small_gpt(), tmp_path)(IDS), model(IDS))


@pytest.mark.parametrize("variant", ["rslora", "lora"])
def test_what_is_plain_lora_is_saved_as_plain_lora(variant):
    settings = take_adapter(trained(variant)).layers[LAYER]
    assert [*settings] == ["rank", "alpha", "scaling", "dropout"]


def test_lora_plus_adds_its_ratio_alone():
    settings = take_adapter(trained("lora+")).layers[LAYER]
    assert settings.pop("ratio") == 16 and [*settings] == ["rank", "alpha", "scaling", "dropout"]


# Damaged files


def change_file(folder, settings=lambda layer: None, tensors=lambda parts: None):
    """Change the settings and the tensors of one layer, and record the new checksum, as a program might."""
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        values = {name: file.get_tensor(name) for name in sorted(file.keys())}
        content = json.loads(file.metadata()["settings"])
    prefix = f"{LAYER}.lora."
    parts = {n.removeprefix(prefix): values.pop(n) for n in [*values] if n.startswith(prefix)}
    tensors(parts)
    values |= {prefix + name: tensor for name, tensor in parts.items()}
    settings(content["layers"][LAYER])
    content["sha256"] = checksum(values)
    (folder / WEIGHTS_FILE).write_bytes(save(values, {"settings": json.dumps(content)}))


def check_refused(folder, message):
    model = small_gpt()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert same_state(model, before) and not adapted_layers(model)


@BRANCH
def test_a_tensor_that_is_missing_too_many_or_of_another_shape_is_named(variant, tmp_path):
    parts = [name for name, _ in adapted_layers(trained(variant))[LAYER].lora.named_parameters()]
    for part in parts:
        save_adapter(trained(variant), tmp_path)
        change_file(tmp_path, tensors=lambda parts, part=part: parts.pop(part))
        check_refused(tmp_path, f"it lacks '{LAYER}.lora.{part}'")
        save_adapter(trained(variant), tmp_path)
        wrong = torch.zeros(7, 2, 5)
        change_file(tmp_path, tensors=lambda parts, part=part, wrong=wrong: parts.update({part: wrong}))
        check_refused(tmp_path, rf"{part} is \(7, 2, 5\), by its settings|lambda_d is|A is|B is")
    save_adapter(trained(variant), tmp_path)
    change_file(tmp_path, tensors=lambda parts: parts.update(surplus=torch.zeros(3)))
    check_refused(tmp_path, f"{variant} has no surplus")


@BRANCH
@pytest.mark.parametrize(("change", "message"), [
    ({"variant": "rslora"}, "its variant must be one of lora, .*, not 'rslora'"),
    ({"variant": None}, "its variant must be one of .*, not None"),
    ({"variant": ["dora"]}, r"its variant must be one of .*, not \['dora'\]"),
    ({"ratio": "x"}, "must be a positive number, not 'x'"),
    ({"nonsense": 1}, "has no option nonsense"), ({"device": "cuda"}, "has no option device"),
    ({"rank": 2}, r"by its settings \(.*2.*\)"), ({"rank": 10**12}, "by its settings"),
    ({"alpha": "1"}, "alpha must be a finite number"),
])
def test_impossible_settings_are_refused_by_name(variant, change, message, tmp_path):
    save_adapter(trained(variant), tmp_path)
    change_file(tmp_path, settings=lambda layer: layer.update(change))
    check_refused(tmp_path, message)


@pytest.mark.parametrize(("variant", "change", "message"), [
    ("vera", {"key": 5}, "other random numbers than this VeRA's"),
    ("vera", {"key": -1}, "must be a whole number from 0, not -1"),
    ("vera", {"largest": [1, 1]}, "largest must be two sizes from 24 and 24 on"),
    ("vera", {"largest": [10**13, 10**13]}, "largest must be two sizes"),
    ("vera", {"largest": "ab"}, "largest must be two sizes"),
    ("vera", {"largest": [30, 30]}, "other random numbers"),
    ("vera", {"digest": 5}, "other random numbers"),
    ("vera", {"in_features": -1}, "in_features must be a number of inputs, not -1"),
    ("vera", {"in_features": "24"}, "in_features must be a number of inputs, not '24'"),
    ("vera", {"in_features": 5}, "for 5 inputs, not 24"),
    ("adalora", {"target_rank": 9}, "from 1 to the rank 3, not 9"),
    ("delta-lora", {"factor": None}, "must be at least 0, not None"),
    ("delta-lora", {"start_step": -2}, "a number of steps, not -2"),
    ("delta-lora", {"dropout": 0.1}, "Delta-LoRA has no dropout"),
    ("dora", {"variant": "lora"}, "lora has no magnitude"),
    ("lora", {"variant": "dora"}, f"it lacks '{LAYER}.lora.magnitude'"),
    ("pissa", {"variant": "lora"}, "lora has no A_start"),
])
def test_a_variants_own_settings_are_checked(variant, change, message, tmp_path):
    save_adapter(trained(variant), tmp_path)
    change_file(tmp_path, settings=lambda layer: layer.update(change))
    check_refused(tmp_path, message)


def test_two_pairs_of_random_numbers_in_one_vera_adapter_are_kept_apart():
    model = trained("vera", key=1)
    layer = apply_lora(nn.Sequential(small_gpt().trf_blocks[1].att.W_query), 3, 2.0, variant="vera", key=2)[0]
    model.trf_blocks[1].att.W_query = train_a_little(layer)
    adapter = take_adapter(model)
    assert torch.equal(set_adapter(small_gpt(), adapter)(IDS), model(IDS))
    doubled = set_adapter(small_gpt(), combine_adapters(adapter, adapter))
    for name, layer in adapted_layers(doubled).items():
        close(layer.update(), 2 * adapted_layers(model)[name].update())


# Files of PEFT

CONFIGS = {
    "dora": lambda **more: peft.LoraConfig(**{"r": 3, "use_dora": True, **more}),
    "vera": lambda **more: peft.VeraConfig(**{"r": 3, **more}),
    "adalora": lambda **more: peft.AdaLoraConfig(
        **{"init_r": 3, "target_r": 1, "lora_alpha": 8, "total_step": 9, **more}),
    "pissa": lambda **more: peft.LoraConfig(**{"r": 3, "init_lora_weights": "pissa", **more}),
    "olora": lambda **more: peft.LoraConfig(**{"r": 3, "init_lora_weights": "olora", **more}),
}


def with_peft(variant, folder, **more):
    """Save a trained model of PEFT to `folder` and return it."""
    config = CONFIGS[variant](target_modules=["W_query", "layers.0"], **more)
    model = train_a_little(peft.get_peft_model(small_gpt(), config)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("variant", ["dora", "pissa", "olora"])
@pytest.mark.parametrize("more", [
    {"rank_pattern": {"W_query": 2}}, {"alpha_pattern": {"layers.0": 1}}, {"use_rslora": True},
    {"modules_to_save": ["out_head"]}, {"lora_dropout": 0.2},
], ids=lambda more: next(iter(more)))
def test_pefts_settings_that_differ_between_layers_are_read(variant, more, tmp_path):
    theirs = with_peft(variant, tmp_path, **more)
    close(import_peft(small_gpt(), tmp_path)(IDS), theirs(IDS))


PREFIX = f"base_model.model.{LAYER}."


def replaced(name, make):
    """Return a change of {name: tensor}: the tensor `name` becomes make(tensor), or is left out."""
    def change(tensors):
        tensor = tensors.pop(name, torch.ones(3))
        if make is not None:
            tensors[name] = make(tensor)
    return change


def nothing(_):
    """Change neither settings nor tensors."""


RANKS = "other ranks than init_r and rank_pattern"


@pytest.mark.parametrize(("variant", "config", "tensors", "message"), [
    ("adalora", {"rank_pattern": {f"{LAYER}.lora_E": [True, False]}}, nothing, RANKS),
    ("adalora", {"rank_pattern": {f"{LAYER}.lora_E": [True, False, True]}}, nothing, RANKS),
    ("adalora", {"rank_pattern": {f"{LAYER}.lora_E": [False] * 3}}, nothing, RANKS),
    ("adalora", {"rank_pattern": {f"{LAYER}.lora_E": 3}}, nothing, "is damaged"),
    ("adalora", {"rank_pattern": [1]}, nothing, "is damaged"),
    ("adalora", {"init_r": 4}, nothing, RANKS), ("adalora", {"init_r": -1}, nothing, RANKS),
    ("adalora", {"init_r": 10**13}, nothing, RANKS), ("adalora", {"init_r": None}, nothing, RANKS),
    ("adalora", {"target_r": 0}, nothing, "from 1 to the rank 3, not 0"),
    ("adalora", {"lora_alpha": "8"}, nothing, "is damaged"),
    ("adalora", {"init_lora_weights": "pissa"}, nothing, "PEFT's pissa cannot be read here"),
    ("adalora", {}, replaced(PREFIX + "lora_E", None), "it lacks 'E'"),
    ("adalora", {}, replaced(PREFIX + "lora_E", lambda E: E[:1]), RANKS),
    ("adalora", {}, replaced(PREFIX + "lora_A", lambda A: A[:1]), RANKS),
    ("adalora", {}, replaced(PREFIX + "lora_A", lambda A: A[..., None]), RANKS),
    ("adalora", {}, replaced(PREFIX + "lora_magnitude_vector", lambda m: m), "is no tensor of ADALORA"),
    ("vera", {}, replaced("base_model.vera_A", lambda A: A[:, :20]), "largest must be two sizes"),
    ("vera", {}, replaced("base_model.vera_A", lambda A: A[0]), "is damaged"),
    ("vera", {}, replaced("base_model.vera_B", lambda B: B + 1), "other random numbers"),
    ("vera", {"projection_prng_key": None}, nothing, "must be a whole number from 0, not None"),
    ("vera", {"projection_prng_key": 3}, nothing, "other random numbers"),
    ("vera", {"r": 4}, nothing, r"lambda_d is \(3,\), by its settings \(4,\)"),
    ("vera", {"vera_dropout": 2}, nothing, "dropout must be in"),
    ("vera", {}, replaced(PREFIX + "vera_lambda_b", lambda b: b[:4]), r"lambda_b is \(4,\)"),
    ("vera", {}, replaced(PREFIX + "vera_lambda_d", None), "it lacks .*lambda_d"),
    ("vera", {"peft_type": "LORA", "lora_alpha": 1}, nothing, "PEFT's d_initial=0.1 cannot be read"),
    ("dora", {}, replaced(PREFIX + "lora_magnitude_vector", None), "it lacks .*magnitude"),
    ("dora", {}, replaced(PREFIX + "lora_magnitude_vector", lambda m: m[None]), r"magnitude is \(1, 24\)"),
    ("dora", {"use_dora": False}, nothing, "lora has no magnitude"),
    ("dora", {"peft_type": ["LORA"]}, nothing, r"PEFT's \['LORA'\] adapter: only ADALORA, LORA, VERA"),
    ("pissa", {"lora_alpha": 0}, nothing, "not with alpha 0"),
    ("pissa", {"rank_pattern": {"W_query": 2}}, nothing, r"A is \(24, 3\), by its settings \(24, 2\)"),
])
def test_a_file_of_peft_that_does_not_fit_together_is_refused(variant, config, tensors, message, tmp_path):
    with_peft(variant, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config), encoding="utf-8")
    values = load_file(tmp_path / "adapter_model.safetensors")
    tensors(values)
    save_file({n: t.contiguous() for n, t in values.items()}, tmp_path / "adapter_model.safetensors")
    model = small_gpt()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        import_peft(model, tmp_path)
    assert same_state(model, before) and not adapted_layers(model)


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 3.0])
def test_adaloras_alpha_of_any_sign_comes_out_right_in_peft(alpha, tmp_path):
    model = train_a_little(apply_lora(small_gpt(), 3, alpha, "query", variant="adalora"))
    export_peft(model, tmp_path)
    close(peft.PeftModel.from_pretrained(small_gpt(), tmp_path).eval()(IDS), model(IDS))
    close(import_peft(small_gpt(), tmp_path)(IDS), model(IDS))


@pytest.mark.parametrize(("variant", "options", "message"), [
    ("vera", ({}, {"key": 1}), "one key for all layers with vera, this adapter 0 and 1"),
    ("vera", ({}, {"rank": 4}), "one rank for all layers with vera, this adapter 3 and 4"),
    ("vera", ({}, {}), "one largest for all layers with vera, this adapter [24, 24] and [24, 96]"),
    ("adalora", ({}, {"rank": 4}), "one rank for all layers with adalora, this adapter 3 and 4"),
    ("adalora", ({}, {"alpha": 9.0}), "one alpha for all layers with adalora, this adapter 2.0 and 9.0"),
])
def test_what_peft_has_once_for_all_layers_must_be_alike(variant, options, message, tmp_path):
    model = small_gpt().requires_grad_(False)
    for name, more in zip((LAYER, "trf_blocks.0.ff.layers.0"), options):
        place = model.get_submodule(name.rpartition(".")[0])
        settings = {"rank": 3, "alpha": 2.0, "variant": variant, **more}
        last = name.rpartition(".")[2]
        setattr(place, last, apply_lora(nn.Sequential(getattr(place, last)), **settings)[0])
    with pytest.raises(ValueError, match=re.escape(message)):
        export_peft(train_a_little(model), tmp_path / "none")
    assert not (tmp_path / "none").exists()
