"""Checkpoint files: what cannot be loaded again is never written, and each foreign file has its remedy."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ch06
import gpt_checkpoint
from appendix_e import replace_linear_with_lora
from ch04 import GPTModel
from ch05 import load_checkpoint, read_checkpoint, save_checkpoint
from gpt_checkpoint import write_checkpoint


@pytest.fixture
def good(tmp_path, tiny_gpt, tiny_config):
    """A checkpoint that was written before something goes wrong."""
    save_checkpoint(tmp_path / "model.pth", tiny_gpt, tiny_config, epoch=1)
    return tmp_path / "model.pth"


@pytest.mark.parametrize(("value", "reason"), [
    (np.float64(0.5), r"numpy\S*scalar.*\.item\(\)"),
    (np.arange(3), "numpy"),
    (Path("a"), r"pathlib\S*Path"),
    (lambda: 1, "lambda"),
    ({"deep": [np.int64(3)]}, "numpy"),
])
def test_a_value_that_cannot_be_loaded_again_is_refused_and_the_old_file_stays(
    good, tiny_gpt, tiny_config, value, reason
):
    with pytest.raises(ValueError, match=rf"model\.pth is not written .*{reason}"):
        save_checkpoint(good, tiny_gpt, tiny_config, epoch=value)
    assert load_checkpoint(good)[1]["epoch"] == 1
    assert list(good.parent.iterdir()) == [good]


def test_an_optimizer_with_a_numpy_learning_rate_is_refused(good, tiny_gpt, tiny_config):
    optimizer = torch.optim.SGD(tiny_gpt.parameters(), lr=np.float64(0.1))
    with pytest.raises(ValueError, match="not written"):
        save_checkpoint(good, tiny_gpt, tiny_config, optimizer)
    assert load_checkpoint(good)[1]["epoch"] == 1


def test_a_classifier_with_a_numpy_max_length_is_refused(tmp_path, tiny_gpt, tiny_config):
    model = ch06.add_classification_head(tiny_gpt)
    with pytest.raises(ValueError, match="numpy"):
        ch06.save_classifier(tmp_path / "spam.pth", model, tiny_config, np.int64(48))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"n_layers": 3}, {"emb_dim": 8}, {"qkv_bias": False}, {"vocab_size": 9}])
def test_a_config_of_another_model_is_refused(good, tiny_gpt, tiny_config, changes):
    with pytest.raises(ValueError, match="weights and config do not fit .* with the config that it was made"):
        save_checkpoint(good, tiny_gpt, tiny_config | changes)
    assert load_checkpoint(good)[1]["epoch"] == 1


@pytest.mark.parametrize("config", [None, {}, {"emb_dim": 32}, "tiny"])
def test_what_is_no_config_is_refused(good, tiny_gpt, config):
    with pytest.raises(ValueError, match="weights and config do not fit"):
        save_checkpoint(good, tiny_gpt, config)


def test_a_model_with_lora_layers_is_refused_with_the_remedy(good, tiny_gpt, tiny_config):
    replace_linear_with_lora(tiny_gpt, rank=2, alpha=2)
    with pytest.raises(ValueError, match="LoRA layers: merge_lora first, or use save_adapter"):
        save_checkpoint(good, tiny_gpt, tiny_config)


def test_a_model_without_values_is_refused(good, tiny_config):
    with torch.device("meta"):
        model = GPTModel(tiny_config)
    with pytest.raises(ValueError, match="meta device, without values"):
        save_checkpoint(good, model, tiny_config)


def test_saving_draws_no_random_numbers_and_leaves_the_model_alone(tmp_path, tiny_gpt, tiny_config):
    before, state = copy.deepcopy(tiny_gpt.state_dict()), torch.get_rng_state()
    save_checkpoint(tmp_path / "model.pth", tiny_gpt, tiny_config)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_gpt.state_dict().items())
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in tiny_gpt.parameters())


def test_a_full_disk_is_said_to_be_one_and_the_old_file_stays(good, monkeypatch):
    def fail(checkpoint, partial):
        partial.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(gpt_checkpoint.torch, "save", fail)
    with pytest.raises(OSError, match="is the disk full"):
        write_checkpoint(good, {})
    assert list(good.parent.iterdir()) == [good] and load_checkpoint(good)[1]["epoch"] == 1


def test_a_missing_folder_is_made_and_a_folder_is_no_file(tmp_path, tiny_gpt, tiny_config):
    save_checkpoint(tmp_path / "new" / "model.pth", tiny_gpt, tiny_config)
    assert load_checkpoint(tmp_path / "new" / "model.pth")[1]["config"] == tiny_config
    with pytest.raises(ValueError, match=r"new cannot be written \(a folder"):
        save_checkpoint(tmp_path / "new", tiny_gpt, tiny_config)


# Other files


def test_a_folder_is_refused_with_what_it_may_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder may be an adapter: use load_adapter"):
        load_checkpoint(tmp_path)


def test_weights_alone_are_refused_with_the_call_that_reads_them(tmp_path, tiny_gpt, tiny_config):
    torch.save(tiny_gpt.state_dict(), tmp_path / "state.pth")
    for load in (load_checkpoint, ch06.load_classifier):
        with pytest.raises(ValueError, match=re.escape("GPTModel(cfg).load_state_dict(torch.load(path))")):
            load(tmp_path / "state.pth")


def test_a_classifiers_file_names_its_own_function(tmp_path, tiny_gpt, tiny_config):
    ch06.save_classifier(tmp_path / "spam.pth", ch06.add_classification_head(tiny_gpt), tiny_config, None)
    with pytest.raises(ValueError, match=r"is a classifier's: use ch06\.load_classifier"):
        load_checkpoint(tmp_path / "spam.pth")


@pytest.mark.parametrize("load", [load_checkpoint, ch06.load_classifier])
def test_an_adapted_model_in_an_older_file_is_one_sentence(tmp_path, tiny_gpt, tiny_config, load):
    replace_linear_with_lora(tiny_gpt, rank=2, alpha=2)
    torch.save({
        "format": gpt_checkpoint.CHECKPOINT_FORMAT, "config": tiny_config, "max_length": 9,
        "model": tiny_gpt.state_dict(),
    }, tmp_path / "old.pth")
    with pytest.raises(ValueError, match="old.pth: the model has LoRA layers") as error:
        load(tmp_path / "old.pth")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("lost", ["emb_dim", "n_heads", "qkv_bias", "vocab_size"])
def test_a_config_that_lacks_a_key_names_it(tmp_path, good, lost):
    checkpoint = read_checkpoint(good)
    del checkpoint["config"][lost]
    torch.save(checkpoint, good)
    with pytest.raises(ValueError, match=rf"model\.pth: weights and config do not fit \(no '{lost}'\)"):
        load_checkpoint(good)


@pytest.mark.parametrize("lost", ["config", "model"])
def test_a_checkpoint_without_config_or_model_is_none(good, lost):
    checkpoint = read_checkpoint(good)
    del checkpoint[lost]
    torch.save(checkpoint, good)
    with pytest.raises(ValueError, match="is not from save_checkpoint"):
        load_checkpoint(good)


# The book's own files


def test_a_state_dict_of_the_printed_model_with_its_masks_is_loaded(tmp_path, tiny_gpt, tiny_config):
    masks = {f"trf_blocks.{n}.att.mask": torch.ones(64, 64).triu(1) for n in range(2)}
    torch.save(tiny_gpt.state_dict() | masks, tmp_path / "model.pth")
    model = GPTModel(tiny_config).eval()
    model.load_state_dict(torch.load(tmp_path / "model.pth"))
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids), tiny_gpt(ids))


@pytest.mark.parametrize("name", [
    "mask", "trf_blocks.0.mask", "trf_blocks.0.att.masks", "trf_blocks.9.att.mask",
])
def test_other_names_are_still_refused(tiny_gpt, name):
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*{re.escape(name)}"):
        tiny_gpt.load_state_dict(tiny_gpt.state_dict() | {name: torch.ones(64, 64)})
