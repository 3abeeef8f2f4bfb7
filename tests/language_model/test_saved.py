"""A fine-tuned GPT comes back from its folder as it was, with LoRA or whole, and damage is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from book_assets import Choice
from language_model import saved
from language_model.saved import FULL_FILE, load_finetuned, save_finetuned
from language_model.training import load_language_model
from lora.adapters import save_adapter
from lora.files import WEIGHTS_FILE
from lora.layers import adapted_layers, apply_lora, merge_lora
from models import same_state, state, train_a_little

CPU = torch.device("cpu")
NOTES = {"assets": vars(Choice("embedded", "embedded"))}
IDS = torch.arange(20)[None]


def trained(lora):
    model, config = load_language_model("tiny")
    if lora:
        apply_lora(model, 4, 32, ("query", "value"), "alpha/rank")
    return train_a_little(model).eval(), config


@pytest.fixture(scope="module", params=[True, False], ids=["LoRA", "in full"])
def folder(request, tmp_path_factory):
    """A folder with a saved model, and the model."""
    model, config = trained(request.param)
    path = tmp_path_factory.mktemp("saved")
    assert save_finetuned(model, path, "tiny", config, NOTES) == path
    return path, model


def test_what_was_saved_comes_back_bit_for_bit_with_its_notes(folder):
    path, model = folder
    again, notes = load_finetuned(path, CPU)
    assert same_state(again, state(model)) and not again.training
    assert torch.equal(again(IDS), model(IDS))
    assert notes["assets"] == NOTES["assets"] and notes["model_size"] == "tiny"
    assert again.out_head.weight is again.tok_emb.weight


def test_the_folder_has_one_file_an_adapter_or_all_weights_with_the_tied_head_once(folder):
    path, model = folder
    lora = bool(adapted_layers(model))
    assert [file.name for file in path.iterdir()] == [WEIGHTS_FILE if lora else FULL_FILE]
    size = sum(file.stat().st_size for file in path.iterdir())
    counted = [p for p in model.parameters() if p.requires_grad]  # tied ones once
    assert size == pytest.approx(4 * sum(p.numel() for p in counted), rel=0.15)


def test_merged_lora_is_saved_whole(tmp_path):
    model, config = trained(True)
    before = merge_lora(model)(IDS)
    save_finetuned(model, tmp_path, "tiny", config, NOTES)
    assert torch.equal(load_finetuned(tmp_path, CPU)[0](IDS), before)


def test_a_folder_of_the_other_kind_is_refused_and_nothing_is_written(folder, tmp_path):
    _, model = folder
    other = FULL_FILE if adapted_layers(model) else WEIGHTS_FILE
    (tmp_path / other).write_bytes(b"earlier")
    with pytest.raises(ValueError, match="choose another folder"):
        save_finetuned(model, tmp_path, "tiny", {}, NOTES)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(other, b"earlier")]


def test_a_diverged_model_is_not_saved_over_an_earlier_one(folder, tmp_path):
    path, _ = folder
    earlier = {file.name: file.read_bytes() for file in path.iterdir()}
    model, config = trained(WEIGHTS_FILE in earlier)
    next(p for p in model.parameters() if p.requires_grad).data[0] = torch.nan
    with pytest.raises(ValueError, match="diverged"):
        save_finetuned(model, path, "tiny", config, NOTES)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == earlier


def test_an_interruption_while_writing_leaves_the_earlier_file(folder, tmp_path, monkeypatch):
    path, _ = folder
    earlier = {file.name: file.read_bytes() for file in path.iterdir()}
    model, config = trained(WEIGHTS_FILE in earlier)
    monkeypatch.setattr("lora.files.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_finetuned(model, path, "tiny", config, NOTES)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == earlier


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=WEIGHTS_FILE):
        load_finetuned(tmp_path, CPU)


def test_an_adapter_of_something_else_is_refused(tmp_path):
    save_adapter(trained(True)[0], tmp_path, {"model_size": "tiny"})
    with pytest.raises(ValueError, match="does not say which GPT"):
        load_finetuned(tmp_path, CPU)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{name: tensor} and the metadata of a small model's file."""
    config = {"vocab_size": 60, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 1,
              "drop_rate": 0.0, "qkv_bias": True}
    model = saved.GPTModel(config)
    model.out_head.weight = model.tok_emb.weight
    path = save_finetuned(model, tmp_path_factory.mktemp("whole"), "small", config, {})
    return load_file(path / FULL_FILE), {"notes": json.dumps({"model_size": "small", "config": config})}


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-7])


def change(path, tensors=(), **metadata):
    stored = load_file(path)
    save_file({n: t for n, t in {**stored, **dict(tensors)}.items() if t is not None}, path, metadata)


DAMAGES = {
    "cut off": cut_off,
    "no notes": lambda path: change(path),
    "notes that are no JSON": lambda path: change(path, notes="{"),
    "no configuration": lambda path: change(path, notes="{}"),
    "a configuration without sizes": lambda path: change(path, notes='{"config": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(whole, tmp_path, damage):
    path = Path(tmp_path, FULL_FILE)
    save_file(whole[0], path, whole[1])
    damage(path)
    with pytest.raises(ValueError, match=FULL_FILE):
        load_finetuned(tmp_path, CPU)


@pytest.mark.parametrize("tensors", [
    {"final_norm.scale": None}, {"final_norm.scale": torch.ones(5)}, {"another": torch.ones(2)},
    {"final_norm.scale": torch.full((24,), torch.nan)},
])
def test_weights_that_do_not_fit_are_refused(whole, tmp_path, tensors):
    path = Path(tmp_path, FULL_FILE)
    save_file(whole[0], path, whole[1])
    change(path, tensors, **whole[1])
    with pytest.raises(ValueError, match=FULL_FILE):
        load_finetuned(tmp_path, CPU)
