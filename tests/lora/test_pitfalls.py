"""YOUR-PROJECT.md's table of pitfalls, as far as no other test shows them."""

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from lora.adapters import load_adapter, save_adapter
from lora.layers import adapted_layers, apply_lora, merge_lora, swap
from lora.optimizer import lora_adamw
from lora.peft_format import export_peft, import_peft
from lora.targets import find_layers
from models import IDS, foreign, same_state, small_gpt, state, train_a_little


def test_an_optimizer_made_before_lora_trains_nothing():
    model = foreign("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    apply_lora(model, 2, 2, "query")
    before = state(model)
    model(input_ids=IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    assert same_state(model, before)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("variant", ["adalora", "lora+"])
def test_the_trainer_takes_the_optimizer_of_a_variant(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = apply_lora(foreign("bert"), 3, 2, "query", variant=variant)
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, (0, 1, 0))]
    settings = hf.TrainingArguments(
        str(tmp_path), num_train_epochs=10, per_device_train_batch_size=3, report_to="none",
        save_strategy="no", use_cpu=True,
    )
    optimizer = lora_adamw(model, 0.01, total_steps=10)
    hf.Trainer(model, settings, train_dataset=rows, optimizers=(optimizer, None)).train()
    if variant == "adalora":
        assert sum(int((layer.lora.E != 0).sum()) for layer in adapted_layers(model).values()) == 4
        with pytest.raises(ValueError, match="make the optimizer with"):
            other = apply_lora(foreign("bert"), 3, 2, "query", variant=variant)
            hf.Trainer(other, settings, train_dataset=rows).train()
    assert all(layer.lora.B.any() for layer in adapted_layers(model).values())
    assert len(optimizer.param_groups) == (2 if variant == "lora+" else 1)


def test_a_model_saved_before_merging_comes_back_with_random_layers(tmp_path):
    model = train_a_little(apply_lora(foreign("llama"), 2, 2, "query"))
    model.save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    back = type(model).from_pretrained(tmp_path).get_submodule(name).weight
    assert not torch.allclose(back, model.get_submodule(name).linear.weight, atol=1e-3)
    assert f"{name}.linear.weight" in load_file(tmp_path / "model.safetensors")


class PackedLinear(nn.Linear):
    """Stands for bitsandbytes' Linear4bit: the weight is packed, (in · out / 2, 1) bytes."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.dense = linear.weight.detach().clone()
        self.bias = linear.bias
        packed = torch.zeros(self.dense.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.dense, self.bias)


def packed_gpt():
    model = small_gpt()
    layers = find_layers(model, "mlp").values()
    swap(model, {layer: PackedLinear(layer) for layer in layers})
    return model


def test_a_4_bit_model_trains_comes_back_and_its_adapter_moves_to_the_unquantized_one(tmp_path):
    model = train_a_little(apply_lora(packed_gpt(), 2, 2, "mlp", train_in_full="head"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    fresh = load_adapter(packed_gpt(), save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(fresh(IDS), model(IDS))
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(small_gpt(), tmp_path / "adapter")
    whole = import_peft(small_gpt(), export_peft(model, tmp_path / "peft"))
    torch.testing.assert_close(merge_lora(whole)(IDS), model(IDS), atol=1e-5, rtol=1e-5)
