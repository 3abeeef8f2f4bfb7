"""LoRA's invariants and its parity with PEFT."""

import ast
import math
import shutil
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from appendix_e import (
    SCALINGS,
    LinearWithLoRA,
    LoRALayer,
    count_parameters,
    freeze,
    replace_linear_with_lora,
)
from book_assets.table import REPOSITORY
from ch04 import GPT_CONFIG_124M, GPTModel

RANKS = (1, 4, 16)


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return GPTModel(tiny_config | {"vocab_size": 50}).eval()


@pytest.fixture
def tokens():
    return torch.arange(14).view(2, 7)


def train_b(model):
    """Give every B random values, as if it had been trained."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            nn.init.normal_(module.B, std=0.1)


def lora_names(model):
    return {name for name, _ in model.named_parameters() if name.endswith(("lora.A", "lora.B"))}


# The layer


@pytest.mark.parametrize("rank", RANKS)
def test_the_layer_adds_alpha_times_x_a_b(rank):
    layer = LoRALayer(6, 5, rank, alpha=3)
    nn.init.normal_(layer.B)
    x = torch.randn(2, 4, 6)
    assert layer.A.shape == (6, rank) and layer.B.shape == (rank, 5)
    torch.testing.assert_close(layer(x), 3 * (x @ layer.A @ layer.B))


def test_b_starts_at_zero_and_a_as_kaiming_uniform_draws_it():
    torch.manual_seed(123)
    layer = LoRALayer(768, 5, rank=16, alpha=1)
    torch.manual_seed(123)
    expected = nn.init.kaiming_uniform_(torch.empty(768, 16), a=math.sqrt(5))
    assert torch.equal(layer.A, expected)
    assert not layer.B.any()


def test_printed_initialisation_is_the_papers_scaled_by_the_root_of_width_over_rank():
    bounds = {kind: LoRALayer(768, 5, 16, 1, init=kind).A.abs().max().item() for kind in ("printed", "paper")}
    assert bounds["printed"] == pytest.approx(1 / math.sqrt(16), rel=1e-3)
    assert bounds["paper"] == pytest.approx(1 / math.sqrt(768), rel=1e-3)
    assert bounds["printed"] / bounds["paper"] == pytest.approx(6.93, abs=0.02)


@pytest.mark.parametrize("scaling, scale", [("alpha", 8), ("alpha/rank", 2), ("alpha/sqrt(rank)", 4)])
def test_scaling_is_alpha_as_printed_unless_another_one_is_named(scaling, scale):
    layer = LoRALayer(3, 3, rank=4, alpha=8, scaling=scaling)
    nn.init.ones_(layer.B)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), scale * (x @ layer.A @ layer.B))
    assert LoRALayer(3, 3, rank=4, alpha=8).scale == 8
    assert scaling in SCALINGS


def test_dropout_acts_on_the_input_in_training_only():
    layer = LoRALayer(50, 50, rank=2, alpha=1, dropout=0.5)
    nn.init.normal_(layer.B)
    x = torch.ones(1, 50)
    torch.manual_seed(0)
    expected = nn.functional.dropout(x, 0.5) @ layer.A @ layer.B
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), x @ layer.A @ layer.B)
    assert list(layer.children()) == []


BAD = {
    "rank": [0, -1, 1.5, 2.0, "8", True, None, math.nan, torch.tensor(2)],
    "alpha": [math.nan, math.inf, -math.inf, "16", True, None, 10**400, 1e39, torch.tensor(2.0)],
    "scaling": ["rank", None, []],
    "init": ["xavier", None, []],
    "dropout": [1.0, -0.1, math.nan, "0.1", True, None],
}


@pytest.mark.parametrize("options", [{name: value} for name in BAD for value in BAD[name]], ids=str)
def test_impossible_options_are_clear_errors(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        LoRALayer(3, 3, **{"rank": 2, "alpha": 2} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_and_b_are_on_the_layers_device_in_float32_or_wider(dtype):
    layer = LinearWithLoRA(nn.Linear(4, 4, dtype=dtype), rank=2, alpha=2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora.A.dtype == layer.lora.B.dtype == wide and layer.weight.dtype == dtype
    assert LinearWithLoRA(nn.Linear(4, 4, device="meta"), 2, 2).lora.A.device.type == "meta"
    assert LinearWithLoRA(nn.Linear(4, 4), 2, 2, dtype=dtype).lora.A.dtype == dtype


def test_float32_lora_beside_a_half_precision_layer_keeps_the_layers_dtype():
    layer = LinearWithLoRA(nn.Linear(4, 4, dtype=torch.bfloat16), 2, 2)
    assert layer(torch.randn(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_weight_read_directly_is_the_one_that_the_layer_applies(bias):
    layer = LinearWithLoRA(nn.Linear(6, 4, bias=bias), rank=2, alpha=3)
    train_b(layer)
    x = torch.randn(5, 6)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))


def test_update_is_what_lora_adds_to_the_weight_in_the_precision_asked_for():
    layer = LinearWithLoRA(nn.Linear(6, 4, dtype=torch.bfloat16), rank=2, alpha=3)
    train_b(layer)
    A, B = layer.lora.A.double(), layer.lora.B.double()
    assert layer.sizes() == (6, 4) and layer.update().dtype == torch.float32
    torch.testing.assert_close(layer.update(torch.float64), 3 * (A @ B).T)


# Replacing


def printed_replacement(model, rank, alpha):
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            setattr(model, name, LinearWithLoRA(module, rank, alpha))
        else:
            printed_replacement(module, rank, alpha)


def test_layers_are_replaced_in_the_recursive_order_so_that_a_seed_gives_the_same_a(model):
    twin = deepcopy(model)
    torch.manual_seed(5)
    replace_linear_with_lora(model, rank=4, alpha=4)
    torch.manual_seed(5)
    printed_replacement(twin, 4, 4)
    assert str(model) == str(twin)
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("rank", RANKS)
def test_output_is_unchanged_while_b_is_zero(model, tokens, rank):
    before = model(tokens)
    replace_linear_with_lora(model, rank, alpha=16)
    assert torch.equal(model(tokens), before)
    train_b(model)
    assert not torch.allclose(model(tokens), before)


def test_only_a_and_b_receive_gradients_and_training_leaves_the_rest_alone(model, tokens):
    before = deepcopy(model.state_dict())
    freeze(model)
    replace_linear_with_lora(model, rank=2, alpha=2)
    train_b(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(tokens).square().mean().backward()
    with_gradient = {name for name, param in model.named_parameters() if param.grad is not None}
    assert with_gradient == lora_names(model)
    assert all(param.grad.any() for name, param in model.named_parameters() if name in with_gradient)
    optimizer.step()
    for name, value in model.state_dict().items():
        if name not in with_gradient:
            assert torch.equal(value, before[name.replace(".linear.", ".")]), name


def test_the_print_shows_the_layer_as_it_was_and_lora_without_children(model):
    replace_linear_with_lora(model, rank=2, alpha=2, dropout=0.1, scaling="alpha/rank")
    assert (
        "(W_query): LinearWithLoRA(\n"
        "          (linear): Linear(in_features=32, out_features=32, bias=True)\n"
        "          (lora): LoRALayer()\n"
        "        )"
    ) in str(model)
    assert not any(type(module) is nn.Linear for module in model.children())


def test_replacing_twice_does_not_wrap_twice(model):
    replace_linear_with_lora(model, rank=2, alpha=2)
    once, layers = str(model), [module for module in model.modules() if isinstance(module, LoRALayer)]
    replace_linear_with_lora(model, rank=4, alpha=2)
    assert str(model) == once
    assert all(a is b for a, b in zip(
        layers, [module for module in model.modules() if isinstance(module, LoRALayer)], strict=True
    ))
    replace_linear_with_lora(model.out_head, rank=2, alpha=2)  # from inside, too
    assert str(model) == once


def test_a_shared_layer_stays_one_layer():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.Linear(3, 3)))
    replace_linear_with_lora(model, rank=2, alpha=2)
    assert model[0] is model[1][0] and model[0].linear is shared
    assert isinstance(model[1][1], LinearWithLoRA)


def test_select_narrows_the_choice_to_paths(model):
    replace_linear_with_lora(model, 2, 2, select=lambda path, module: path.endswith(("W_query", "W_value")))
    assert {name.rsplit(".", 3)[1] for name in lora_names(model)} == {"W_query", "W_value"}
    assert len(lora_names(model)) == 2 * 2 * 2  # blocks, layers, A and B


def test_a_model_without_linear_layers_and_a_linear_itself_are_clear_errors():
    with pytest.raises(ValueError, match="no Linear layer to adapt in Sequential"):
        replace_linear_with_lora(nn.Sequential(nn.Embedding(3, 3), nn.GELU()), 2, 2)
    with pytest.raises(ValueError, match=r"LinearWithLoRA\(model"):
        replace_linear_with_lora(nn.Linear(3, 3), 2, 2)


@pytest.mark.parametrize("rank, message", [
    (0, "rank must be at least 1"), ("8", "rank must be at least 1"), (129, "at most 128"),
    (10**9, "at most 128"),
])
def test_an_impossible_rank_leaves_the_model_unchanged(model, rank, message):
    model.out_head = nn.Linear(32, 2)
    before = str(model)
    with pytest.raises(ValueError, match=message):
        replace_linear_with_lora(model, rank=rank, alpha=2)
    assert str(model) == before


def test_a_lazy_linear_is_refused_until_it_has_its_size():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="run the model once"):
        replace_linear_with_lora(model, 2, 2)


def test_new_layers_take_over_train_and_eval_mode(model):
    replace_linear_with_lora(model.eval(), 2, 2, dropout=0.5)
    assert not any(module.training for module in model.modules())


# Counts


def test_gpt2_small_has_the_books_numbers_of_trainable_parameters():
    with torch.device("meta"):  # shapes without memory
        model = GPTModel(GPT_CONFIG_124M | {"drop_rate": 0.0, "qkv_bias": True})
        model.out_head = nn.Linear(768, 2)
    assert count_parameters(model) == (124_441_346, 124_441_346)
    freeze(model)
    assert count_parameters(model) == (0, 124_441_346)
    replace_linear_with_lora(model, rank=16, alpha=16)
    assert count_parameters(model) == (2_666_528, 124_441_346 + 2_666_528)


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    assert count_parameters(model) == (40, 40)


# Parity with PEFT


def peft_twin(model, rank, scaling, alpha):
    """The same model adapted by PEFT on every Linear layer, with our A, B and scale copied into it."""
    from peft import LoraConfig, get_peft_model

    adapted = deepcopy(model)
    replace_linear_with_lora(adapted, rank, alpha, scaling=scaling)
    train_b(adapted)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    scale = adapted.get_submodule(names[0]).lora.scale
    twin = get_peft_model(deepcopy(model), LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=names))
    for name in names:
        ours, theirs = adapted.get_submodule(name).lora, twin.base_model.model.get_submodule(name)
        theirs.lora_A["default"].weight.data.copy_(ours.A.T)
        theirs.lora_B["default"].weight.data.copy_(ours.B.T)
    return adapted, twin, names


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_outputs_and_gradients_equal_pefts_for_the_same_a_b_and_scale(model, tokens, rank, scaling):
    freeze(model)
    adapted, twin, names = peft_twin(model, rank, scaling, alpha=2)
    ours, theirs = adapted(tokens), twin(tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for logits in (ours, theirs):
        logits.softmax(-1)[..., 0].sum().backward()
    for name in names:
        lora, peft = adapted.get_submodule(name).lora, twin.base_model.model.get_submodule(name)
        torch.testing.assert_close(lora.A.grad.T, peft.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lora.B.grad.T, peft.lora_B["default"].weight.grad, atol=1e-5, rtol=1e-5)


# The file alone

FOREIGN = """
import os, sys
sys.path = [os.getcwd()] + [path for path in sys.path if path not in sys.argv[1:]]  # without our folders
import appendix_e, torch
assert os.path.dirname(os.path.abspath(appendix_e.__file__)) == os.getcwd()

class Foreign(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.ModuleDict({"encoder": torch.nn.Sequential(torch.nn.Linear(4, 8))})
        self.head = torch.nn.Bilinear(8, 8, 2)

    def forward(self, x):
        h = self.inner["encoder"](x).relu()
        return self.head(h, h)

model, x = Foreign(), torch.randn(3, 4)
before = model(x)
appendix_e.freeze(model)
appendix_e.replace_linear_with_lora(model, rank=2, alpha=2)
assert torch.equal(model(x), before)
model(x).sum().backward()
print([name for name, param in model.named_parameters() if param.grad is not None])
"""


def test_the_file_alone_in_an_empty_folder_adapts_a_foreign_model(tmp_path):
    shutil.copy(REPOSITORY / "appendix-E" / "appendix_e.py", tmp_path)
    (tmp_path / "foreign.py").write_text(FOREIGN, encoding="utf-8")
    folders = [str(REPOSITORY / name) for name in ("ch04", "ch05", "ch06", "appendix-E", "setup")]
    result = subprocess.run(
        [sys.executable, "-I", "foreign.py", *folders],
        cwd=tmp_path, capture_output=True, text=True, encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['inner.encoder.0.lora.A', 'inner.encoder.0.lora.B']"


def test_importing_the_file_needs_only_torch():
    source = (REPOSITORY / "appendix-E" / "appendix_e.py").read_text(encoding="utf-8")
    imports = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports for alias in node.names if isinstance(node, ast.Import)}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"torch"}
