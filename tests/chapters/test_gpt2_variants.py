"""GPT-2's weights as other people have them: half precision, a head of their own, odd folders."""

import copy
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gpt_download
from appendix_e import replace_linear_with_lora
from ch04 import GPTModel
from ch05 import config_from_settings, load_weights_into_gpt
from ch06 import add_classification_head
from gpt2_files import (
    SHAPES,
    assert_same,
    hugging_faces_model,
    write_hparams,
    write_safetensors,
    write_tensorflow,
)
from gpt_download import CHECKPOINT_FILES, SAFETENSORS_FILE, download_and_load_gpt2, load_gpt2

SETTINGS = SHAPES["toy"]
CONFIG = config_from_settings(SETTINGS)


@pytest.fixture(scope="module")
def reference():
    """Hugging Face's model of the toy shape, in eval mode."""
    return hugging_faces_model(SETTINGS)


@pytest.fixture
def folder(reference, tmp_path):
    return write_safetensors(tmp_path / "toy", reference, SETTINGS)


def rewrite(folder, change):
    """Write the folder's tensors again, after `change`, {name: tensor} to the same."""
    file = folder / SAFETENSORS_FILE
    save_file({name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file)


def logits_of(params):
    model = GPTModel(CONFIG).eval()
    load_weights_into_gpt(model, params)
    with torch.no_grad():
        return model(torch.arange(20)[None]), model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_point_files_are_read_as_their_values_in_float32(folder, dtype):
    expected = copy.deepcopy(load_file(folder / SAFETENSORS_FILE))
    rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    params = load_gpt2(folder)[1]
    assert params["wte"].dtype == np.float32
    assert np.array_equal(params["wte"], expected["wte.weight"].to(dtype).float().numpy())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_quantised_weights_are_not_called_damaged(folder, dtype):
    rewrite(folder, lambda tensors: tensors | {"wpe.weight": tensors["wpe.weight"].to(dtype)})
    with pytest.raises(ValueError, match=r"holds wpe.weight as \w+, .*: take the file in float32") as error:
        load_gpt2(folder)
    assert "damaged" not in str(error.value)


def test_the_arrays_outlive_the_file(folder):
    params = load_gpt2(folder)[1]
    before = copy.deepcopy(params["wte"])
    (folder / SAFETENSORS_FILE).write_bytes(b"")
    assert np.array_equal(params["wte"], before)


@pytest.mark.parametrize(("prefix", "head"), [
    ("", "lm_head.weight"), ("transformer.", "lm_head.weight"),
    ("transformer.", "transformer.lm_head.weight"),
])
def test_a_head_of_its_own_is_the_output_head(reference, tmp_path, prefix, head):
    model = copy.deepcopy(reference)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(SETTINGS["n_vocab"], SETTINGS["n_embd"]))
    folder = write_safetensors(tmp_path, model, SETTINGS, prefix=prefix)
    rewrite(folder, lambda tensors: {
        name: tensor for name, tensor in tensors.items() if "lm_head" not in name
    } | {head: model.lm_head.weight.detach()})
    logits, loaded = logits_of(load_gpt2(folder)[1])
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.arange(20)[None]).logits, atol=1e-4, rtol=0)
    assert not torch.equal(loaded.out_head.weight, loaded.tok_emb.weight)


def test_a_head_that_is_the_embedding_is_left_out(reference, tmp_path):
    folder = write_safetensors(tmp_path, reference, SETTINGS, prefix="transformer.")
    assert "lm_head.weight" in load_file(folder / SAFETENSORS_FILE)
    params = load_gpt2(folder)[1]
    assert "lm_head" not in params
    loaded = logits_of(params)[1]
    assert torch.equal(loaded.out_head.weight, loaded.tok_emb.weight)


# Folders, TensorFlow


@pytest.mark.parametrize("name", ["models [new]", "a*b?", "{x,y}", "mit Leerzeichen"])
@pytest.mark.parametrize("write", [write_tensorflow, write_safetensors])
def test_any_characters_may_be_in_the_folders_name(reference, tmp_path, name, write):
    plain = load_gpt2(write_safetensors(tmp_path / "plain", reference, SETTINGS))[1]
    assert_same(load_gpt2(write(tmp_path / name, reference, SETTINGS))[1], plain)


@pytest.fixture(params=[ImportError("DLL load failed"), AttributeError("_ARRAY_API"), TypeError("proto")])
def broken_tensorflow(request, monkeypatch):
    """An installed TensorFlow whose import raises what broken installations raise."""
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "tensorflow":
                raise request.param

    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    return str(request.param)


def test_a_broken_tensorflow_is_not_chosen(broken_tensorflow, tmp_path):
    assert gpt_download.preferred_source(tmp_path) == "safetensors"


def test_a_broken_tensorflow_is_found_out_before_the_download(broken_tensorflow, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt_download, "fetch", None)  # whoever calls it fails
    with pytest.raises(ImportError, match=rf'imported \({broken_tensorflow}\).* source="safetensors"'):
        download_and_load_gpt2("124M", tmp_path, source="tensorflow")
    write_hparams(tmp_path, SETTINGS)
    (tmp_path / CHECKPOINT_FILES[1]).write_bytes(b"")
    with pytest.raises(ImportError, match="cannot be imported"):
        load_gpt2(tmp_path)


# Models that are no place for the weights


@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda model: replace_linear_with_lora(model, 2, 2), "no plain layer: load the weights first, then"),
    (add_classification_head, r"output head: the model's shape is \(2, 24\)"),
    (lambda model: model.to("meta"), "on the meta device: build it on the CPU first"),
])
def test_a_model_that_cannot_take_the_weights_is_refused_unchanged(folder, spoil, sentence):
    model = GPTModel(CONFIG)
    spoil(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=sentence):
        load_weights_into_gpt(model, load_gpt2(folder)[1])
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("params", [SETTINGS, {}, {"blocks": []}])
def test_params_that_are_none_are_refused_with_what_to_pass(params):
    with pytest.raises(ValueError, match="pass the second value that download_and_load_gpt2 returns"):
        load_weights_into_gpt(GPTModel(CONFIG), params)
