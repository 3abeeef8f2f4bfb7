"""The memory of a real training step, to compare `lora.memory_estimate` with."""

import torch

from appendix_e import freeze
from ch04 import GPTModel, use_fused_attention
from ch06 import add_classification_head, calc_loss_batch, unfreeze_last_block
from fast_path.memory import peak_memory, peak_of_allocations
from lora.layers import apply_lora
from lora.memory_estimate import BODY, BYTES

CPU = torch.device("cpu")


def build_random_classifier(
    shape, method="lora", rank=16, targets=BODY, base_dtype="float32", fused_attention=False
):
    """Return chapter 4's model of a `Shape`, random, with a head of two classes, ready for `measure_step`.

    The other arguments are those of `estimate_memory`. Raises ValueError for a dtype that torch has not.
    """
    if BYTES[base_dtype] < 2:
        raise ValueError(f"a model in {base_dtype} cannot be built here: measure bfloat16 or float32")
    model = add_classification_head(GPTModel({
        "vocab_size": shape.vocabulary, "context_length": shape.context, "emb_dim": shape.width,
        "n_heads": shape.heads, "n_layers": shape.layers, "drop_rate": 0.0, "qkv_bias": True,
    }))
    freeze(model)
    if method == "lora":
        model.to(getattr(torch, base_dtype))
        apply_lora(model, rank, rank, targets, train_in_full="head")
    elif method == "last-block":
        unfreeze_last_block(model)
    else:
        model.requires_grad_(True)
    use_fused_attention(model, fused_attention)
    return model.train()


def measure_step(model, batch_size=8, tokens=120):
    """Return the peaks of a step of chapter 6's loop in bytes: of all tensors, and of the whole process.

    A first step allocates the optimizer's state. The process's peak includes Python and torch.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.1)
    inputs = torch.randint(model.tok_emb.num_embeddings, (batch_size, tokens))
    targets = torch.arange(batch_size) % 2

    def step():
        optimizer.zero_grad()
        calc_loss_batch(inputs, targets, model, CPU).backward()
        optimizer.step()

    step()
    whole = peak_memory(step, CPU)
    optimizer.zero_grad()
    states = [s for state in optimizer.state.values() for s in state.values()]
    resident = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers(), *states])
    return resident + peak_of_allocations(step), whole
