"""GPT-2's weights from both sources: parity with Hugging Face's model, and clear errors for bad files."""

import copy
import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import gpt_download
from book_assets.table import ASSETS
from ch04 import GPTModel
from ch05 import config_from_settings, generate, load_weights_into_gpt
from gpt2_files import (
    SHAPES,
    assert_same,
    hugging_faces_model,
    leaves,
    openai_variables,
    served_table,
    write_hparams,
    write_safetensors,
    write_tensorflow,
)
from gpt_download import (
    CHECKPOINT_FILES,
    SAFETENSORS_FILE,
    download_and_load_gpt2,
    load_gpt2,
)


@pytest.fixture(scope="module", params=SHAPES)
def sources(request, tmp_path_factory):
    """Hugging Face's model of one shape, and the folders of both sources with its weights."""
    settings, folder = SHAPES[request.param], tmp_path_factory.mktemp(request.param)
    model = hugging_faces_model(settings)
    return model, settings, {
        "tensorflow": write_tensorflow(folder / "tf", model, settings),
        "safetensors": write_safetensors(folder / "st", model, settings),
    }


@pytest.fixture(scope="module")
def toy():
    return hugging_faces_model(SHAPES["toy"]), SHAPES["toy"]


@pytest.fixture
def toy_folder(toy, tmp_path):
    return write_safetensors(tmp_path / "toy", *toy)


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)


# Parity


@pytest.mark.parametrize("source", ["tensorflow", "safetensors"])
def test_logits_and_greedy_tokens_equal_hugging_faces(sources, source):
    reference, settings, folders = sources
    settings, params = load_gpt2(folders[source])
    model = GPTModel(config_from_settings(settings)).eval()
    load_weights_into_gpt(model, params)
    ids = torch.randint(settings["n_vocab"], (2, 11), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        difference = (model(ids) - reference(ids).logits).abs().max().item()
    assert difference < 1e-4
    theirs = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )
    assert torch.equal(generate(model, ids, 20, settings["n_ctx"], use_cache=True), theirs)


def test_both_sources_give_the_same_settings_and_params(sources):
    _, settings, folders = sources
    (settings_1, params_1), (settings_2, params_2) = (load_gpt2(folder) for folder in folders.values())
    assert settings_1 == settings_2 == settings
    assert params_1.keys() == {"blocks", "b", "g", "wpe", "wte"}
    assert_same(params_1, params_2)


@pytest.mark.parametrize(("prefix", "masks"), [("", True), ("transformer.", False), ("transformer.", True)])
def test_prefix_masks_and_tied_head_in_a_file_change_nothing(toy, toy_folder, tmp_path, prefix, masks):
    folder = write_safetensors(tmp_path / "other", *toy, prefix=prefix, masks=masks)
    assert_same(load_gpt2(folder)[1], load_gpt2(toy_folder)[1])


def test_half_precision_on_disk_is_float32_in_memory(toy_folder):
    file = toy_folder / SAFETENSORS_FILE
    save_file({name: array.astype(np.float16) for name, array in load_file(file).items()}, file)
    arrays = leaves(load_gpt2(toy_folder)[1])
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}


def test_an_optimizers_variables_in_a_checkpoint_are_passed_over(toy, tmp_path):
    import tensorflow as tf

    model, settings = toy
    variables = dict(openai_variables(model)) | {"Adam/model/wte/m": np.zeros(3), "global_step": np.array(7)}
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "model.ckpt"), tensor_names=list(variables),
        shape_and_slices=[""] * len(variables), tensors=[tf.constant(array) for array in variables.values()],
    )
    params = gpt_download.load_gpt2_params_from_tf_ckpt(str(tmp_path / "model.ckpt"), settings)
    assert_same(params, load_gpt2(write_safetensors(tmp_path / "st", model, settings))[1])


# Bad files


def test_a_weight_of_another_shape_is_named_and_the_model_stays_as_it_was(toy_folder):
    file = toy_folder / SAFETENSORS_FILE
    tensors = load_file(file)
    tensors["h.2.mlp.c_fc.weight"] = tensors["h.2.mlp.c_fc.weight"][:, :-1].copy()
    save_file(tensors, file)
    settings, params = load_gpt2(toy_folder)
    model = GPTModel(config_from_settings(settings))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"h2\.mlp\.c_fc\.w: the model's shape is \(96, 24\), .* \(95, 24\)"):
        load_weights_into_gpt(model, params)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("layers", "message"),
    [(2, "h2/.*hparams.json promises 2 layers"), (5, r"lacks h3\.ln_1\.g, .* and 19 more\): delete it")],
)
def test_another_number_of_layers_than_hparams_promises_is_an_error(toy, toy_folder, layers, message):
    write_hparams(toy_folder, toy[1] | {"n_layer": layers})
    with pytest.raises(ValueError, match=message):
        load_gpt2(toy_folder)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("wpe.weight", "wpe"), ("ln_f.bias", "b"), ("h.1.attn.c_attn.bias", r"h1\.attn\.c_attn\.b")],
)
def test_a_missing_tensor_is_named(toy_folder, name, missing):
    file = toy_folder / SAFETENSORS_FILE
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"it lacks {missing}\): delete it and fetch it again"):
        load_gpt2(toy_folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 20_000, -1])
def test_a_truncated_safetensors_file_is_said_to_be_damaged(toy_folder, keep):
    file = toy_folder / SAFETENSORS_FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{SAFETENSORS_FILE} is damaged .* fetch it again"):
        load_gpt2(toy_folder)


@pytest.mark.parametrize("content", [b"<html>Please log in</html>" * 40, bytes(1000)])
def test_another_file_under_the_weights_name_is_said_to_be_damaged(toy_folder, content):
    (toy_folder / SAFETENSORS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or not GPT-2's"):
        load_gpt2(toy_folder)


def test_another_models_safetensors_file_is_not_gpt2s(toy_folder):
    tensors = {"bert.embeddings.weight": np.zeros((3, 2), np.float32), "foo": np.zeros(1, np.float32)}
    save_file(tensors, toy_folder / SAFETENSORS_FILE)
    with pytest.raises(ValueError, match="lacks wte, wpe, g, b"):
        load_gpt2(toy_folder)


@pytest.mark.parametrize("error, message", [
    (KeyError("F8_E4M3"), "this torch cannot read 'F8_E4M3': take the file in float32"),
    (SafetensorError("header"), "is damaged or not GPT-2's"),
])
def test_a_file_that_cannot_be_read_is_a_clear_error(toy_folder, monkeypatch, error, message):
    def fail(path):
        raise error

    monkeypatch.setattr("safetensors.torch.load_file", fail)
    with pytest.raises(ValueError, match=message):
        load_gpt2(toy_folder)


@pytest.mark.parametrize("file", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_tensorflow_checkpoint_is_said_to_be_damaged(toy, tmp_path, file, damage):
    folder = write_tensorflow(tmp_path, *toy)
    content = (folder / file).read_bytes()
    if damage == "truncate":
        (folder / file).write_bytes(content[: len(content) // 2])
    else:
        (folder / file).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"is damaged|no TensorFlow checkpoint"):
        load_gpt2(folder, source="tensorflow")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"n_layer": 3}', "<html>"])
def test_unreadable_settings_are_said_to_be_damaged(toy_folder, text):
    (toy_folder / "hparams.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"hparams\.json is damaged .* fetch it again"):
        load_gpt2(toy_folder)


def test_a_folder_without_a_model_is_an_error_that_says_what_is_missing(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no hparams.json"):
        load_gpt2(tmp_path)
    write_hparams(tmp_path, toy[1])
    with pytest.raises(FileNotFoundError, match=r"no TensorFlow checkpoint and no model.safetensors"):
        load_gpt2(tmp_path, source="tensorflow")
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        load_gpt2(tmp_path, source="safetensors")


# What is needed when


def test_importing_the_module_imports_neither_tensorflow_nor_torch():
    code = "import sys, gpt_download; print({'tensorflow', 'torch'} & sys.modules.keys())"
    path = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )
    assert result.stdout.strip() == "set()"


def test_without_tensorflow_its_checkpoint_is_refused_with_the_remedies(toy, tmp_path, no_tensorflow):
    write_hparams(tmp_path, toy[1])
    (tmp_path / CHECKPOINT_FILES[1]).write_bytes(b"")
    for call in (
        lambda: load_gpt2(tmp_path),
        lambda: download_and_load_gpt2("124M", tmp_path / "gpt2", source="tensorflow"),
    ):
        with pytest.raises(ImportError, match=r'pip install tensorflow".* source="safetensors"'):
            call()


def test_without_tensorflow_the_safetensors_file_is_used(toy_folder, tmp_path, no_tensorflow):
    assert gpt_download.preferred_source(tmp_path / "nothing there yet") == "safetensors"
    assert load_gpt2(toy_folder)[0] == SHAPES["toy"]


@pytest.mark.parametrize("size", ["124m", "gpt2", "", None])
def test_an_unknown_size_is_refused_with_the_known_ones(tmp_path, size):
    with pytest.raises(ValueError, match="'124M', '355M', '774M', '1558M', 'tiny'"):
        download_and_load_gpt2(model_size=size, models_dir=tmp_path)


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match='must be "tensorflow", "safetensors" or None'):
        download_and_load_gpt2("124M", tmp_path, source="pickle")


def test_tiny_comes_with_the_repository(tmp_path, monkeypatch, tokenizer, no_tensorflow):
    monkeypatch.setattr(gpt_download, "fetch", None)  # whoever calls it fails
    settings, params = download_and_load_gpt2(model_size="tiny", models_dir=tmp_path)
    assert settings["n_vocab"] == 50257 and settings["n_ctx"] >= 256
    model = GPTModel(config_from_settings(settings)).eval()
    load_weights_into_gpt(model, params)
    ids = torch.tensor([tokenizer.encode("The boy looked at his mother and said that he did not know.")])
    with torch.no_grad():  # guessing gives ln 50257 = 10.8
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()
    assert loss < 7
    assert list(tmp_path.iterdir()) == []


# Downloading


@pytest.fixture
def server(tmp_path):
    """A folder served on 127.0.0.1: (folder, address, list of requested paths)."""
    folder, requested = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requested.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}", requested
        httpd.shutdown()


@pytest.mark.parametrize("source", ["tensorflow", "safetensors"])
def test_a_model_is_downloaded_once_then_used_offline(toy, tmp_path, monkeypatch, server, source):
    folder, address, requested = server
    write_tensorflow(folder, *toy)
    write_safetensors(folder, *toy)
    monkeypatch.setattr(gpt_download, "ASSETS", served_table(folder, address))
    monkeypatch.setitem(gpt_download.MODEL_SIZES, "124M", (24, 3, 3))
    monkeypatch.delenv("LLM_CACHE_DIR", raising=False)
    if source == "safetensors":  # its hparams.json is written from the table of sizes, for GPT-2's context
        write_hparams(tmp_path / "gpt2" / "124M", toy[1])
    settings, params = download_and_load_gpt2("124M", tmp_path / "gpt2", source=source)
    assert settings == toy[1]
    assert_same(params, load_gpt2(folder)[1])
    assert len(requested) >= 1
    requested.clear()
    again = download_and_load_gpt2(model_size="124M", models_dir=str(tmp_path / "gpt2"))
    assert_same(again[1], params)
    assert requested == []


def test_settings_and_vocabulary_are_put_beside_a_downloaded_safetensors_file(tmp_path):
    for size, (width, layers, heads) in gpt_download.MODEL_SIZES.items():
        folder = tmp_path / size
        folder.mkdir()
        gpt_download.add_small_files(folder, size)
        settings = json.loads((folder / "hparams.json").read_text(encoding="utf-8"))
        assert settings == SHAPES["small"] | {"n_embd": width, "n_head": heads, "n_layer": layers}
        for file in ("encoder.json", "vocab.bpe"):
            content = (folder / file).read_bytes()
            assert hashlib.sha256(content).hexdigest() == ASSETS[f"gpt2/124M/{file}"].sha256


def test_the_model_folder_alone_gives_the_tokenizer(tmp_path, tokenizer):
    from book_assets import get_tokenizer

    gpt_download.add_small_files(tmp_path, "124M")
    text = "Every effort moves you <|endoftext|> für 😀"
    encodings = [each.encode(text, allowed_special="all") for each in (get_tokenizer(tmp_path), tokenizer)]
    assert encodings[0] == encodings[1]


def test_a_relative_folder_is_looked_for_in_the_cache(tmp_path, monkeypatch):
    asked = []

    def record(asset, folder):
        asked.append(folder)
        raise LookupError

    monkeypatch.setattr(gpt_download, "fetch", record)
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path))
    for models_dir in ("gpt2", tmp_path / "elsewhere"):
        with pytest.raises(LookupError):
            download_and_load_gpt2("355M", models_dir)
    assert asked == [tmp_path / "gpt2" / "355M", tmp_path / "elsewhere" / "355M"]
