"""Fine-tune chapter 4's model on instructions with their answers, with or without LoRA.

As in `language_model.training`, from which losses and steps come; batches are made of entries of similar
length, and logits are computed only for targets that count.
Shapes in comments: B entries, T tokens in the longest one, K targets that count, N entries in all.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fast_path.batches import length_batches
from fast_path.settings import PRECISIONS, OptimizerSettings, setting
from fast_path.training import autocast
from instructions.collate import collate, places_of
from language_model.training import TextRun, TextSettings, restoring_mode, summed_loss
from lora.optimizer import lora_adamw


@dataclass(frozen=True)
class InstructionSettings(OptimizerSettings):
    """How `fit_instructions` trains. Raises ValueError for a value out of its range."""

    COUNTS = ("epochs", "batch_size", "bucket")

    epochs: int = setting(2, "passes over the training entries")
    batch_size: int = setting(8, "entries per step")
    learning_rate: float = setting(5e-5, "AdamW's learning rate")
    seed: int = setting(123, "random seed of LoRA's A, dropout and the order of entries")
    precision: str = setting("float32", "of products", choices=("auto", *PRECISIONS))
    mask_prompt: bool = setting(False, "learn the answers alone, not the prompts")
    clip_norm: float = setting(1.0, "largest norm of the gradient; a longer one is scaled down to it")
    bucket: int = 4  # batches within which entries are sorted by length, see length_batches

    def for_steps(self, steps):
        """Return the `TextSettings` of a training of so many `steps`."""
        return TextSettings(
            steps=steps, batch_size=self.batch_size, learning_rate=self.learning_rate,
            weight_decay=self.weight_decay, seed=self.seed, decay=self.decay, precision=self.precision,
            progress=self.progress, clip_norm=self.clip_norm,
        )


def fit_instructions(model, train, settings, device, validation=None, make_optimizer=lora_adamw):
    """Train what requires a gradient on `train`, entries that `encode_entry` has encoded; return the history.

    An entry that is longer than the model's context is cut. The `answer_loss` of `validation`, entries
    likewise, is measured before the first step and after every epoch. `model` is on `device`; its mode is
    restored. Returns a `TextHistory`. Raises ValueError for entries that `check_encoded` refuses, if nothing
    requires a gradient or it is not in float32, and if the training diverges.
    """
    for entries in (train, *([] if validation is None else [validation])):
        check_encoded(model, entries)
    epochs = [entry_batches(train, settings, epoch) for epoch in range(settings.epochs)]
    steps = sum(map(len, epochs))
    run = TextRun(model, settings.for_steps(steps), device, make_optimizer)

    def load(indices):
        return load_batch([train[n] for n in indices], model, device, settings.mask_prompt)

    def measure():
        return answer_loss(model, validation, device, precision=run.precision)

    return run.fit(epochs, load, None if validation is None else measure)


def check_encoded(model, encoded):
    """Raise ValueError unless there are entries, and each prompt leaves room for an answer in the context."""
    context = model.pos_emb.num_embeddings
    if not encoded:
        raise ValueError("there are no entries: give some, encoded with encode_entry")
    if full := [number for number, (_, prompt) in enumerate(encoded) if prompt > context]:
        raise ValueError(
            f"the prompts of {len(full)} entries, the first is number {full[0]}, fill the context of "
            f"{context} tokens: leave them out or take a model with a longer context"
        )


def entry_batches(encoded, settings, epoch):
    """Return the batches of an epoch, index arrays (B,), each of entries of similar length."""
    lengths = [len(ids) for ids, _ in encoded]
    return length_batches(lengths, settings.batch_size, (settings.seed, epoch), settings.bucket)


def load_batch(encoded, model, device, mask_prompt):
    """Return inputs and targets (B, T) of the entries on `device`, and the places (K,) that count."""
    inputs, targets = collate(encoded, mask_prompt, model.pos_emb.num_embeddings)
    return inputs.to(device), targets.to(device), places_of(targets).to(device)


def answer_loss(model, encoded, device, mask_prompt=True, batch_size=16, precision="float32"):
    """Return the mean loss of the targets of all entries, in nats per token.

    By default these are the answers' tokens, whatever the model was trained on; with `mask_prompt=False` the
    prompts' too, and the two numbers cannot be compared: prompts consist of repeated phrases, which are
    easily learned. Measured without dropout; the model's mode is restored. Raises ValueError as
    `check_encoded`.
    """
    check_encoded(model, encoded)
    order = np.argsort([len(ids) for ids, _ in encoded], kind="stable")
    total, count = 0.0, 0
    with restoring_mode(model), torch.inference_mode(), autocast(device, precision):
        model.eval()
        for indices in np.split(order, range(batch_size, len(order), batch_size)):
            batch = load_batch([encoded[n] for n in indices], model, device, mask_prompt)
            total += summed_loss(model, *batch).item()
            count += len(batch[-1])
    return total / count
