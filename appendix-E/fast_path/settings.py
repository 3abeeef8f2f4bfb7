"""Settings as frozen dataclasses whose fields carry their help text, and command-line flags made from them."""

from dataclasses import dataclass, field, fields, replace

import torch

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def setting(default, help, **flag):
    """Return a dataclass field with its help text and further arguments for its command-line flag."""
    return field(default=default, metadata={"help": help, **flag})


@dataclass(frozen=True)
class TrainingSettings:
    """How `training.fit` and `training.predict` run. Raises ValueError for a count below 1."""

    epochs: int = setting(5, "times through the training messages")
    batch_size: int = setting(8, "messages per step")
    learning_rate: float = setting(1e-4, "AdamW's")
    weight_decay: float = setting(0.1, "AdamW's")
    seed: int = setting(123, "of the head, LoRA's A and the order of messages")
    decay: bool = True  # let the learning rate fall linearly to zero
    bucket: int = 4  # batches within which messages are sorted by length, see length_batches
    precision: str = setting("auto", "of products and frozen weights", choices=("auto", *PRECISIONS))
    fused_attention: bool = True
    gradient_accumulation_steps: int = setting(1, "batches per optimizer step")
    gradient_checkpointing: bool = setting(False, "less memory, a third more time")
    compile: bool = setting(False, "torch.compile: a minute of warm-up; on a CPU it needs a C++ compiler")
    eval_batch_size: int = 64
    max_tokens: int | None = None  # computed at once; None on a CPU: 512 in training, else 1024
    progress: bool = True  # show a bar

    def __post_init__(self):
        for name in (
            "epochs", "batch_size", "bucket", "gradient_accumulation_steps", "eval_batch_size", "max_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


def add_flags(parser, settings, names=None):
    """Give the argparse `parser` a flag for each field of `settings` that has a help text.

    The field's value is the default. `names` chooses some of the fields.
    """
    for each in fields(settings):
        if "help" in each.metadata and (names is None or each.name in names):
            value = getattr(settings, each.name)
            kind = {"action": "store_true"} if value is False else {"type": type(value)}
            kind = {} if "nargs" in each.metadata else kind
            flag = f"--{each.name.replace('_', '-')}"
            parser.add_argument(flag, default=value, **kind, **each.metadata)


def take_flags(settings, options):
    """Return `settings` with the values that the dictionary `options` has, which are taken out of it."""
    names = [each.name for each in fields(settings) if each.name in options]
    values = {name: options.pop(name) for name in names}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return replace(settings, **{**values, **lists})
