"""Chapter 5, weights: checkpoints and how GPT-2's arrays are put in place."""

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

import ch05
import gpt_checkpoint
from ch04 import GPT_CONFIG_124M, GPTModel
from ch05 import (
    assign,
    calc_loss_batch,
    config_from_settings,
    load_checkpoint,
    load_weights_into_gpt,
    read_checkpoint,
    save_checkpoint,
)
from gpt2_files import random_params
from gpt_download import CONFIG_NAMES

CPU = torch.device("cpu")


# Checkpoints


def test_a_checkpoint_brings_back_model_optimizer_and_settings(tmp_path, tiny_gpt, tiny_config):
    path, x, y = tmp_path / "model.pth", torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
    optimizer = torch.optim.AdamW(tiny_gpt.parameters(), lr=1e-2)

    def step(model, optimizer):
        optimizer.zero_grad()
        calc_loss_batch(x, y, model, CPU).backward()
        optimizer.step()

    step(tiny_gpt, optimizer)
    save_checkpoint(path, tiny_gpt, tiny_config, optimizer, epoch=3, text="book")
    model, checkpoint = load_checkpoint(path)
    assert not model.training
    assert (checkpoint["config"], checkpoint["epoch"], checkpoint["text"]) == (tiny_config, 3, "book")
    again = torch.optim.AdamW(model.parameters(), lr=1.0)
    again.load_state_dict(checkpoint["optimizer"])
    step(tiny_gpt, optimizer)
    step(model, again)  # the next step is the same, so that the optimizer's state is
    for ours, theirs in zip(model.parameters(), tiny_gpt.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_needs_no_pickled_code(tmp_path, tiny_gpt, tiny_config):
    save_checkpoint(tmp_path / "model.pth", tiny_gpt, tiny_config)
    assert torch.load(tmp_path / "model.pth", weights_only=True)["config"] == tiny_config
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_a_missing_checkpoint_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*absent\.pth: train first"):
        load_checkpoint(tmp_path / "absent.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pth cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "model.pth")


def test_a_truncated_checkpoint_is_refused(tmp_path, tiny_gpt, tiny_config):
    path = tmp_path / "model.pth"
    save_checkpoint(path, tiny_gpt, tiny_config)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)


def test_weights_without_a_configuration_are_refused(tmp_path, tiny_gpt):
    for name, content in (("state.pth", tiny_gpt.state_dict()), ("list.pth", [1, 2])):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match="is not from save_checkpoint: it has no config"):
            load_checkpoint(tmp_path / name)


def test_a_pickle_is_never_executed(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (tmp_path / "model.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"format": gpt_checkpoint.CHECKPOINT_FORMAT, "evil": Evil()}, tmp_path / "zip.pth")
    for name in ("model.pth", "zip.pth"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, tiny_gpt, tiny_config, monkeypatch):
    path = tmp_path / "model.pth"
    save_checkpoint(path, tiny_gpt, tiny_config, epoch=1)

    def full_disk(checkpoint, partial):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(ch05.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, tiny_gpt, tiny_config, epoch=2)
    assert load_checkpoint(path)[1]["epoch"] == 1


# OpenAI's weights


@pytest.fixture
def small(tiny_config):
    cfg = tiny_config | {"vocab_size": 50, "context_length": 8}
    return GPTModel(cfg), random_params({theirs: cfg[ours] for theirs, ours in CONFIG_NAMES.items()}), cfg


def test_every_parameter_is_replaced_and_keeps_a_plain_layout(small):
    model, params, _ = small
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    load_weights_into_gpt(model, params)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.is_contiguous() and parameter.dtype == torch.float32, name
    assert torch.equal(model.out_head.weight, model.tok_emb.weight)
    query = params["blocks"][1]["attn"]["c_attn"]["w"][:, :32].T
    assert np.array_equal(model.trf_blocks[1].att.W_query.weight.detach().numpy(), query)


def test_the_model_does_not_share_memory_with_the_arrays(small):
    model, params, _ = small
    load_weights_into_gpt(model, params)
    before = model.tok_emb.weight.detach().clone()
    params["wte"] += 1
    assert torch.equal(model.tok_emb.weight, before)


def changed(params, path, array):
    result = copy.deepcopy(params)
    target = result
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = array(target[path[-1]])
    return result


@pytest.mark.parametrize(
    ("path", "array", "named"),
    [
        (("wte",), lambda a: a[:-1], r"wte: .*\(50, 32\).*\(49, 32\)"),
        (("wpe",), lambda a: a[:4], "wpe"),
        (("g",), lambda a: a[:1], r"ln_f\.g"),
        (("blocks", 1, "attn", "c_attn", "w"), lambda a: a[:, :-3], r"h1\.attn\.c_attn\[q\]\.w"),
        (("blocks", 1, "attn", "c_attn", "b"), lambda a: a[:-1], r"h1\.attn\.c_attn\[v\]\.b"),
        (("blocks", 0, "attn", "c_proj", "w"), lambda a: a[:-1], r"h0\.attn\.c_proj\.w"),
        (("blocks", 0, "mlp", "c_fc", "w"), lambda a: a.T, r"h0\.mlp\.c_fc\.w"),
        (("blocks", 1, "ln_2", "b"), lambda a: a[None], r"h1\.ln_2\.b"),
    ],
)
def test_a_wrong_shape_is_named_and_leaves_the_model_unchanged(small, path, array, named):
    model, params, _ = small
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=named):
        load_weights_into_gpt(model, changed(params, path, array))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_number_of_layers_is_refused(small):
    model, params, _ = small
    params["blocks"].append(params["blocks"][0])
    with pytest.raises(ValueError, match="the model has 2 blocks, the weights 3"):
        load_weights_into_gpt(model, params)


def test_a_model_without_query_key_value_biases_is_refused_with_the_remedy(small):
    _, params, cfg = small
    with pytest.raises(ValueError, match=r"h0\.attn\.c_attn\[q\]\.b: .* set qkv_bias=True"):
        load_weights_into_gpt(GPTModel(cfg | {"qkv_bias": False}), params)


def test_assign_keeps_dtype_and_refuses_another_shape():
    left = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    assigned = assign(left, np.arange(6.0).reshape(3, 2).T)
    assert isinstance(assigned, nn.Parameter) and assigned.dtype == torch.bfloat16
    assert assigned.tolist() == [[0, 2, 4], [1, 3, 5]] and assigned.is_contiguous()
    with pytest.raises(ValueError, match=r"\(2, 3\), the weights' \(3, 2\)"):
        assign(left, np.zeros((3, 2)))


def test_the_configuration_is_read_from_gpt2s_settings():
    settings = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    assert config_from_settings(settings) == GPT_CONFIG_124M | {"qkv_bias": True, "drop_rate": 0.0}
    assert config_from_settings(settings, drop_rate=0.1)["drop_rate"] == 0.1
