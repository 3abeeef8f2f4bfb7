"""Inside LoRA: the small model that `inside-lora.ipynb` tries everything on.

What the notebook explains is in `lora/layers.py`, `lora/adapters.py` and `lora/peft_format.py`.
"""

import torch
from torch import nn

from ch04 import GPTModel
from lora.adapters import set_adapter
from lora.layers import adapted_layers

SMALL_CONFIG = {
    "vocab_size": 100, "context_length": 32, "emb_dim": 48, "n_heads": 4,
    "n_layers": 2, "drop_rate": 0.0, "qkv_bias": True,
}


def small_model():
    """Return a random GPT of SMALL_CONFIG with a head for two classes, the same one at every call."""
    torch.manual_seed(123)
    model = GPTModel(SMALL_CONFIG)
    model.out_head = nn.Linear(SMALL_CONFIG["emb_dim"], 2)
    return model.eval()


class Conv1D(nn.Module):
    """Hugging Face's Conv1D without its first values: x (…, nx) to (…, nf), the weight stored as (nx, nf)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))  # (in, out)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def pretend_training(model, seed=123):
    """Add noise to every trainable parameter of `model`, in place, and return it; B is no longer zero."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def compute_update(adapter, name="out_head"):
    """Return what `adapter` adds to the weight of the small model's layer `name`, (out, in)."""
    model = set_adapter(small_model(), adapter)
    return adapted_layers(model)[name].update().detach()
