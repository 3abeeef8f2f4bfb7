"""Adapters: saved ones come back exactly, unsuitable ones are refused, two add up."""

import copy
import errno
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from appendix_e import count_parameters
from lora.adapters import (
    WEIGHTS_FILE,
    combine_adapters,
    fingerprint,
    load_adapter,
    read_adapter,
    save_adapter,
    set_adapter,
    take_adapter,
)
from lora.files import checksum
from lora.layers import adapted_layers, apply_lora, merge_lora, merged_weight, remove_lora
from models import (
    ANY_TARGETS,
    FULL,
    IDS,
    SCALING,
    TARGETS,
    foreign,
    same_state,
    small_gpt,
    state,
    train_a_little,
    trained,
)

# Saving and loading


@settings(max_examples=15, deadline=None)
@given(targets=ANY_TARGETS, rank=st.integers(1, 20), scaling=SCALING, full=FULL,
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_a_loaded_adapter_is_the_saved_one(folder, targets, rank, scaling, full, dtype):
    model = apply_lora(small_gpt().to(dtype), rank, 2.0, targets, scaling, 0.1, train_in_full=full)
    train_a_little(model)
    fresh = load_adapter(small_gpt().to(dtype), save_adapter(model, folder / "round"))
    assert same_state(fresh, state(model))
    assert count_parameters(fresh) == count_parameters(model)
    assert torch.equal(fresh.eval()(IDS), model.eval()(IDS))
    assert [(m.lora.scaling, m.lora.dropout) for m in adapted_layers(fresh).values()] == [
        (scaling, 0.1)] * len(adapted_layers(model))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_adapters_of_foreign_models_come_back(kind, tmp_path):
    model = train_a_little(apply_lora(foreign(kind), 3, 2, ("query", "mlp"), train_in_full="head"))
    fresh = load_adapter(foreign(kind), save_adapter(model, tmp_path))
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_only_what_was_trained_is_on_disk(tmp_path):
    model = trained(targets=("query", "value"), train_in_full="head")
    save_adapter(model, tmp_path, notes={"data": "SMS"})
    numbers = count_parameters(model)[0]
    size = (tmp_path / WEIGHTS_FILE).stat().st_size
    assert 4 * numbers < size < 4 * numbers + 2500
    assert read_adapter(tmp_path).notes == {"data": "SMS"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS_FILE]


def test_loading_draws_no_random_numbers(tmp_path):
    save_adapter(trained(), tmp_path)
    fresh = small_gpt()
    before = torch.get_rng_state()
    load_adapter(fresh, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_depends_on_the_values_of_the_base_not_on_its_precision():
    model = small_gpt()
    known = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).bfloat16()) == known
    assert fingerprint(apply_lora(copy.deepcopy(model), 2, 2)) == known
    model.trf_blocks[0].ff.layers[0].weight.data[0, 0] += 0.1
    assert fingerprint(model) != known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_trained_on_a_base_in_half_precision_comes_back_on_the_base_itself(dtype, tmp_path):
    model = trained(train_in_full="head")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    save_adapter(model, tmp_path)
    back = load_adapter(small_gpt(), tmp_path)
    assert torch.equal(back.out_head.weight, model.out_head.weight)


@pytest.mark.parametrize("trained_in, loaded_in", [
    (torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
])
@pytest.mark.parametrize("full", [(), "head"])
def test_an_adapter_fits_its_base_in_other_precisions_and_trains_in_float32(
    trained_in, loaded_in, full, tmp_path
):
    model = train_a_little(apply_lora(small_gpt().to(trained_in), 3, 2.0, train_in_full=full))
    save_adapter(model, tmp_path)
    back = load_adapter(small_gpt().to(loaded_in), tmp_path)
    torch.testing.assert_close(back(IDS).float(), model(IDS).float(), atol=0.05, rtol=0.05)
    parameters = [p for p in back.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(2):
        back(IDS).float().pow(2).mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in back.parameters()) and back(IDS).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_file_has_in_half_precision_trains_in_float32(dtype, tmp_path):
    model = trained(train_in_full="head")
    save_adapter(model, tmp_path)
    rewrite(tmp_path, tensors=lambda t: t.update({name: t[name].to(dtype) for name in t}))
    assert {t.dtype for t in read_adapter(tmp_path).tensors.values()} == {dtype}
    back = load_adapter(small_gpt(), tmp_path)
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    torch.testing.assert_close(back(IDS), model(IDS), atol=0.02, rtol=0.02)


def compile_block(model):
    model.trf_blocks[0] = torch.compile(model.trf_blocks[0], backend="eager")
    return model


WRAPPERS = [lambda model: torch.compile(model, backend="eager"), nn.DataParallel, compile_block]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_names_are_those_of_the_model_without_wrappers(wrap, tmp_path):
    model = trained(train_in_full="head")
    expected, plain = model(IDS), take_adapter(model)
    save_adapter(wrap(model), tmp_path)
    saved = read_adapter(tmp_path)
    assert saved.layers == plain.layers and saved.base == plain.base
    assert saved.tensors.keys() == plain.tensors.keys()
    assert torch.equal(load_adapter(small_gpt(), tmp_path)(IDS), expected)
    torch.testing.assert_close(load_adapter(wrap(small_gpt()), tmp_path)(IDS), expected)


# The file


def rewrite(folder, settings=lambda content: None, tensors=lambda content: None):
    """Change settings and tensors in the file and record the new checksum, as another program would."""
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        values = {name: file.get_tensor(name) for name in sorted(file.keys())}
        content = json.loads(file.metadata()["settings"])
    tensors(values)
    content["sha256"] = checksum(values)
    settings(content)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / WEIGHTS_FILE).write_bytes(save(values, {"settings": text}))


def save_in_format_1(model, folder, change=lambda content: None):
    """Write an adapter as version 1.0 did, its settings in a file of their own."""
    adapter = take_adapter(model, {"data": "SMS"})
    weights = save(adapter.tensors)
    content = {
        "format": "lora-in-practice/1", "sha256": hashlib.sha256(weights).hexdigest(),
        "base_model": adapter.base[0], "notes": adapter.notes, "layers": adapter.layers,
    }
    change(content)
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    (folder / "lora.json").write_text(json.dumps(content), encoding="utf-8")


def test_adapters_of_format_1_are_read_and_replaced_by_one_file(tmp_path):
    model = trained(train_in_full="head")
    save_in_format_1(model, tmp_path)
    assert read_adapter(tmp_path).notes == {"data": "SMS"}
    assert torch.equal(load_adapter(small_gpt(), tmp_path)(IDS), model(IDS))
    assert load_adapter(small_gpt().bfloat16(), tmp_path).out_head.weight.dtype == torch.float32
    save_adapter(trained(2), tmp_path, {"data": "other"})
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]
    assert read_adapter(tmp_path).notes == {"data": "other"}


def test_the_checksum_depends_on_names_types_shapes_and_values():
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    others = [
        {"a": torch.arange(4.0), "c": torch.zeros(2)},
        {"a": torch.arange(4.0).reshape(2, 2), "b": torch.zeros(2)},
        {"a": torch.arange(4.0).view(torch.int32), "b": torch.zeros(2)},
        {"a": torch.arange(4.0), "b": -torch.zeros(2)},
        {"a": torch.arange(4.0)},
    ]
    assert checksum(dict(reversed(tensors.items()))) == checksum(tensors)
    assert len({checksum(x) for x in (tensors, *others)}) == 6


def start(code, *arguments):
    """Start Python with `code` and the modules of the tests; return the process."""
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    code = "import sys\nfrom lora.adapters import *\nfrom models import trained\n" + code
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ | path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


WRITER = """
model = trained(int(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    save_adapter(model, sys.argv[1], {"seed": int(sys.argv[2])})
    print("saved", flush=True)
"""
READER = """
values = [trained(seed).out_head.lora.B for seed in range(4)]
for _ in range(200):
    adapter = read_adapter(sys.argv[1])
    assert torch.equal(adapter.tensors["out_head.lora.B"], values[adapter.notes["seed"]])
"""


def test_four_writers_and_two_readers_of_one_folder_do_not_disturb_each_other(tmp_path):
    save_adapter(trained(0), tmp_path, {"seed": 0})
    processes = [start(WRITER, tmp_path, seed, 50) for seed in range(4)]
    processes += [start(READER, tmp_path) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]


def test_a_killed_writer_leaves_a_whole_adapter(tmp_path):
    process = start(WRITER, tmp_path, 1, 10**9)
    for _ in range(20):
        assert process.stdout.readline() == "saved\n", process.stderr.read()
    process.kill()
    process.communicate()
    assert read_adapter(tmp_path).notes == {"seed": 1}


def stop(*_, **__):
    raise KeyboardInterrupt


def fill_the_disk(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place, fault, error", [
    ("lora.files.Path.write_bytes", fill_the_disk, OSError),
    ("lora.files.Path.write_bytes", stop, KeyboardInterrupt),
    ("lora.files.os.replace", stop, KeyboardInterrupt),
])
@pytest.mark.parametrize("old", [save_adapter, save_in_format_1])
def test_wherever_saving_stops_the_earlier_adapter_is_there(place, fault, error, old, tmp_path, monkeypatch):
    old(trained(1), tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(place, fault)
    with pytest.raises(error) as raised:
        save_adapter(trained(2), tmp_path)
    assert error is KeyboardInterrupt or f"{tmp_path / WEIGHTS_FILE} cannot be" in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before
    expected = trained(1).out_head.lora.B
    assert torch.equal(read_adapter(tmp_path).tensors["out_head.lora.B"], expected)


@pytest.mark.parametrize("make", [
    lambda folder: folder.write_text("", encoding="utf-8"),
    lambda folder: (folder / WEIGHTS_FILE).mkdir(parents=True),
])
def test_a_place_that_cannot_be_written_is_named(make, tmp_path):
    make(tmp_path / "adapter")
    with pytest.raises(OSError, match=r"lora\.safetensors cannot be written .*: choose another place"):
        save_adapter(trained(), tmp_path / "adapter")


@pytest.mark.parametrize("notes", [["SMS"], "SMS", {"model": nn.Linear(1, 1)}, {1: {2, 3}}])
def test_notes_that_could_not_be_read_back_are_not_saved(notes, tmp_path):
    with pytest.raises(ValueError, match="could not be read back"):
        save_adapter(trained(), tmp_path / "none", notes)
    assert not (tmp_path / "none").exists()


# What is refused


def put(*path_and_value):
    """Return a function that sets a value in nested dictionaries; without a value, that deletes it."""
    *path, key, value = path_and_value

    def change(content):
        for part in path:
            content = content[part]
        if value is MISSING:
            del content[key]
        else:
            content[key] = value

    return change


MISSING = object()
DAMAGED_SETTINGS = [
    *(put(key, MISSING) for key in ("format", "sha256", "base_model", "notes", "layers")),
    *(put("format", value) for value in (None, [], 2, "lora-in-practice/3")),
    *(put("sha256", value) for value in (None, 5, "")),
    *(put("base_model", value) for value in (None, 5, {}, "x", [5], [None], [])),
    *(put("notes", value) for value in (None, [], "x", 1)),
    *(put("layers", value) for value in (None, [], {}, 5, "x", [1], {"out_head": None}, {"out_head": {}})),
    *(put("layers", "out_head", key, MISSING) for key in ("rank", "alpha", "scaling", "dropout")),
    *(put("layers", "out_head", "rank", value) for value in (None, "3", 2.5, 3.0, True, 0, -1, 2, 10**9, [])),
    *(put("layers", "out_head", "alpha", value) for value in (None, "2", math.nan, math.inf, [], 10**400)),
    *(put("layers", "out_head", "scaling", value) for value in (None, "beta", [], {}, 1)),
    *(put("layers", "out_head", "dropout", value) for value in (None, "0", 1.0, -0.1, math.nan, [])),
    put("layers", "out_head", "bias", True),
    put("layers", "other", {"rank": 3, "alpha": 2.0, "scaling": "alpha", "dropout": 0.0}),
]


def spoil(value):
    def change(tensors):
        tensors["out_head.lora.B"][0, 0] = value
    return change


DAMAGED_TENSORS = [
    lambda tensors: tensors.pop("out_head.lora.A"),
    put("out_head.lora.A", torch.ones(())),
    put("out_head.lora.B", torch.ones(3)),
    put("out_head.lora.B", torch.ones(3, 2, dtype=torch.int64)),
    put("out_head.lora.B", torch.ones(3, 2).to(torch.float8_e4m3fn)),
    put("out_head.lora.B", torch.ones(3, 2, dtype=torch.complex64)),
    spoil(math.nan), spoil(-math.inf),
]


def replace_file(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncate(folder):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


def make_folder(folder):
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()


def settings_text(text):
    return replace_file(WEIGHTS_FILE, save({"a": torch.ones(1)}, {"settings": text}))


DAMAGED_FILES = [
    truncate, make_folder,
    *(replace_file(WEIGHTS_FILE, data) for data in (
        b"", b"{}", b"PK\x03\x04", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 9 * 10**7) + b"{}",
        struct.pack("<Q", 2) + b"\xff\xff", b"\x00" * 100,
    )),
    *map(settings_text, ("", "{", "[]", "null", "5", '"x"', "[" * 100_000, "{}")),
]


def assert_refused(folder, named, error=ValueError):
    """Assert that loading names the file and leaves the model as it was."""
    model = small_gpt()
    before = state(model)
    with pytest.raises(error, match=re.escape(str(folder / named))):
        load_adapter(model, folder)
    assert same_state(model, before) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("change", DAMAGED_SETTINGS)
def test_damaged_settings_are_refused_in_both_formats_and_the_model_unchanged(change, tmp_path):
    save_adapter(trained(), tmp_path / "new")
    rewrite(tmp_path / "new", settings=change)
    assert_refused(tmp_path / "new", WEIGHTS_FILE)
    save_in_format_1(trained(), tmp_path / "old", change)
    assert_refused(tmp_path / "old", "lora.json")


@pytest.mark.parametrize("change", DAMAGED_TENSORS)
def test_damaged_tensors_are_refused_and_the_model_unchanged(change, tmp_path):
    save_adapter(trained(), tmp_path)
    rewrite(tmp_path, tensors=change)
    assert_refused(tmp_path, WEIGHTS_FILE)


@pytest.mark.parametrize("damage", DAMAGED_FILES)
def test_damaged_files_are_refused_and_the_model_unchanged(damage, tmp_path):
    save_adapter(trained(), tmp_path)
    damage(tmp_path)
    assert_refused(tmp_path, WEIGHTS_FILE, (ValueError, OSError))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b"{}"])
def test_damaged_settings_files_of_format_1_are_refused(data, tmp_path):
    save_in_format_1(trained(), tmp_path)
    replace_file("lora.json", data)(tmp_path)
    assert_refused(tmp_path, "lora.json")


def test_other_tensors_than_the_settings_belong_to_are_refused(tmp_path):
    for name, save_to in (("new", save_adapter), ("old", save_in_format_1)):
        save_to(trained(1), tmp_path / name)
    rewrite(tmp_path / "new", settings=put("sha256", "0" * 64))
    (tmp_path / "old" / WEIGHTS_FILE).write_bytes(save(take_adapter(trained(2)).tensors))
    for name in ("new", "old"):
        with pytest.raises(ValueError, match="belong to other tensors"):
            read_adapter(tmp_path / name)


def test_a_file_without_settings_is_no_adapter(tmp_path):
    (tmp_path / WEIGHTS_FILE).write_bytes(save({"x": torch.ones(1)}))
    with pytest.raises(FileNotFoundError, match=r"no lora\.json .* has no settings"):
        read_adapter(tmp_path)


def test_a_checkpoint_is_no_adapter_and_the_message_says_what_reads_it(tmp_path):
    torch.save(small_gpt().state_dict(), tmp_path / "model.pth")
    with pytest.raises(OSError, match=r"model\.pth is a file.*load_checkpoint"):
        load_adapter(small_gpt(), tmp_path / "model.pth")


def test_a_parameter_that_the_model_lacks_is_named(tmp_path):
    save_adapter(trained(), tmp_path)
    rewrite(tmp_path, tensors=put("x", torch.ones(1)))
    with pytest.raises(ValueError, match="no parameter x"):
        load_adapter(small_gpt(), tmp_path)


def test_a_missing_folder_says_where_adapters_come_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_adapter"):
        load_adapter(small_gpt(), tmp_path / "nowhere")


def test_another_base_model_is_refused(tmp_path):
    save_adapter(trained(), tmp_path)
    other = small_gpt(seed=9)
    before = state(other)
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(other, tmp_path)
    assert same_state(other, before)


def test_other_shapes_and_missing_layers_are_named(tmp_path):
    save_adapter(trained(train_in_full="head"), tmp_path)
    with pytest.raises(ValueError, match=r"out_head\.bias is \(2,\) in the adapter, \(5,\) by"):
        load_adapter(small_gpt(classes=5), tmp_path)
    with pytest.raises(ValueError, match=r"trf_blocks\.0\.att\.W_query"):
        load_adapter(nn.Sequential(nn.Linear(3, 3)), tmp_path)


def test_an_adapted_model_takes_only_the_same_layers_and_ranks(tmp_path):
    save_adapter(trained(rank=3), tmp_path)
    model = trained(rank=2)
    before = state(model)
    with pytest.raises(ValueError, match=r"ranks \[2\].*ranks \[3\]"):
        load_adapter(model, tmp_path)
    assert same_state(model, before)
    again = trained(seed=7, rank=3)
    assert same_state(load_adapter(again, tmp_path), state(trained(rank=3)))


def test_a_merged_or_plain_model_has_no_adapter_to_save(tmp_path):
    for model in (small_gpt(), merge_lora(trained())):
        with pytest.raises(ValueError, match=r"to save|unmerge_lora"):
            save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_diverged_adapter_is_not_saved(tmp_path):
    model = trained()
    model.out_head.lora.A.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="diverged"):
        save_adapter(model, tmp_path / "none")


# Several adapters


def test_adapters_are_switched_in_memory():
    first, second = trained(1, rank=3), trained(2, rank=5, targets="mlp")
    values = [model(IDS) for model in (first, second)]
    adapters = [take_adapter(model) for model in (first, second)]
    model = small_gpt()
    for number in (0, 1, 0):
        assert torch.equal(set_adapter(model, adapters[number])(IDS), values[number])
    assert same_state(remove_lora(model), state(small_gpt()))


def test_switching_from_an_adapter_with_a_trained_head_gives_the_base_its_head_back():
    with_head, without = trained(1, train_in_full="head"), trained(2, targets="mlp")
    first, second = take_adapter(with_head), take_adapter(without)
    model = small_gpt()
    for _ in range(2):
        assert torch.equal(set_adapter(model, first)(IDS), with_head(IDS))
        assert torch.equal(set_adapter(train_a_little(model, 5), second)(IDS), without(IDS))
        assert not model.out_head.weight.requires_grad
    assert same_state(remove_lora(model), state(small_gpt()))


def test_the_base_of_an_adapter_taken_after_switching_is_the_base_itself():
    first, second = take_adapter(trained(1, train_in_full="head")), take_adapter(trained(2))
    assert take_adapter(set_adapter(set_adapter(small_gpt(), first), second)).base == second.base
    assert take_adapter(set_adapter(set_adapter(small_gpt(), second), first)).base == first.base


def test_a_base_loaded_after_switching_is_the_one_that_counts():
    model = set_adapter(small_gpt(), take_adapter(trained(1, train_in_full="head")))
    remove_lora(model).load_state_dict(small_gpt(seed=9).state_dict())
    other = train_a_little(apply_lora(small_gpt(seed=9), 3, 2.0))
    assert torch.equal(set_adapter(model, take_adapter(other))(IDS), other(IDS))


def test_a_head_trained_in_place_is_said_to_be_the_reason():
    model = trained(1, train_in_full="head")
    before = state(model)
    with pytest.raises(ValueError, match=r"another base model, or before out_head\.weight was trained here"):
        set_adapter(model, take_adapter(trained(2)))
    assert same_state(model, before)


@settings(max_examples=15, deadline=None)
@given(ranks=st.tuples(st.integers(1, 8), st.integers(1, 8)), scaling=SCALING,
       targets=st.tuples(st.sampled_from(TARGETS), st.sampled_from(TARGETS)),
       weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_combining_adds_the_weighted_updates_exactly(ranks, scaling, targets, weights):
    models = [trained(i, rank, targets=t, scaling=scaling) for i, (rank, t) in
              enumerate(zip(ranks, targets, strict=True))]
    joint = combine_adapters(*(take_adapter(model) for model in models), weights)
    model = set_adapter(small_gpt(), joint)
    for name, layer in adapted_layers(model).items():
        base = layer.linear.weight
        expected = base.clone()
        for other, weight in zip(models, weights, strict=True):
            if name in adapted_layers(other):
                expected += weight * (merged_weight(adapted_layers(other)[name]) - base)
        torch.testing.assert_close(merged_weight(layer), expected, atol=1e-5, rtol=1e-4)


def test_averaging_A_and_B_gives_another_model():
    first, second = trained(1), trained(2)
    a, b = (take_adapter(model) for model in (first, second))
    half = set_adapter(small_gpt(), combine_adapters(a, b, (0.5, 0.5)))
    mean = {name: (a.tensors[name] + b.tensors[name]) / 2 for name in a.tensors}
    averaged = set_adapter(small_gpt(), type(a)(a.layers, mean, a.base))
    assert not torch.allclose(half(IDS), averaged(IDS), atol=1e-2)


def test_two_trained_heads_are_not_combined_silently():
    first, second = (take_adapter(trained(i, train_in_full="head")) for i in (1, 2))
    with pytest.raises(ValueError, match="full_from"):
        combine_adapters(first, second)
    joint = combine_adapters(first, second, full_from=1)
    assert torch.equal(joint.tensors["out_head.weight"], second.tensors["out_head.weight"])


def test_adapters_of_one_base_in_two_precisions_are_combined():
    first = take_adapter(trained(1))
    second = take_adapter(train_a_little(apply_lora(small_gpt().half(), 3, 2.0)))
    joint = combine_adapters(first, second)
    assert set_adapter(small_gpt(), joint)(IDS).isfinite().all()
    assert set_adapter(small_gpt().half(), joint)(IDS).isfinite().all()


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite weights"):
        combine_adapters(take_adapter(trained(1)), take_adapter(trained(2)), (math.nan, 1.0))


def test_adapters_of_different_bases_are_not_combined():
    first = take_adapter(trained())
    other = take_adapter(train_a_little(apply_lora(small_gpt(seed=4), 3, 2.0)))
    with pytest.raises(ValueError, match="different base models"):
        combine_adapters(first, other)
