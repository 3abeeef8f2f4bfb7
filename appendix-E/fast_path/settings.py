"""Settings as frozen dataclasses whose fields contain their help texts, and command-line flags from them."""

import argparse
from dataclasses import dataclass, field, fields, replace

import torch

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def setting(default, help, **flag):
    """Return a dataclass field with its `help` text and further arguments of its command-line flag."""
    return field(default=default, metadata={"help": help, **flag})


@dataclass(frozen=True)
class OptimizerSettings:
    """What every training needs. Raises ValueError for a value out of its range."""

    COUNTS = ("batch_size",)  # fields that are integers from 1 on

    batch_size: int = setting(8, "examples per batch")
    learning_rate: float = setting(1e-4, "AdamW's learning rate")
    weight_decay: float = setting(0.1, "AdamW's weight decay")
    seed: int = setting(123, "random seed")
    decay: bool = True  # let the learning rate fall linearly to zero
    precision: str = setting("auto", "of products and frozen weights", choices=("auto", *PRECISIONS))
    progress: bool = True  # show a progress bar

    def __post_init__(self):
        for name in self.COUNTS:
            check_count(name, getattr(self, name))
        if self.precision not in ("auto", *PRECISIONS):
            raise ValueError(f"precision must be auto, {', '.join(PRECISIONS)}, not {self.precision!r}")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate must be in (0, 1], not {self.learning_rate}: try 1e-4")
        if not 0 <= self.weight_decay <= 1 / self.learning_rate:  # beyond, a step would turn a weight's sign
            raise ValueError(f"weight_decay must be in [0, 1 / learning_rate], not {self.weight_decay}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63), not {self.seed}")


@dataclass(frozen=True)
class TrainingSettings(OptimizerSettings):
    """How `training.fit` and `training.predict` run. Raises ValueError for a value out of its range."""

    COUNTS = ("epochs", "batch_size", "bucket", "gradient_accumulation_steps", "eval_batch_size")

    epochs: int = setting(5, "passes over the training messages")
    batch_size: int = setting(8, "messages per batch")
    seed: int = setting(123, "random seed of the head, LoRA's A and the order of messages")
    bucket: int = 4  # batches within which messages are sorted by length, see length_batches
    fused_attention: bool = True
    gradient_accumulation_steps: int = setting(1, "batches per optimizer step")
    gradient_checkpointing: bool = setting(False, "use less memory and a third more time")
    compile: bool = setting(False, "use torch.compile: a minute of warm-up; a CPU needs a C++ compiler")
    eval_batch_size: int = 64
    max_tokens: int | None = None  # computed at once; None on a CPU: 512 in training, else 1024

    def __post_init__(self):
        super().__post_init__()
        if self.max_tokens is not None:
            check_count("max_tokens", self.max_tokens)


def check_count(name, value):
    """Raise ValueError, naming the setting, unless `value` is an integer from 1 on."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be at least 1, an integer, not {value}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show each flag's default, and the description with its own line breaks."""


def add_flags(parser, settings, names=None):
    """Give the argparse `parser` a flag for each field of the dataclass `settings` that has a help text.

    The field's value is the flag's default. `names` restricts the flags to these fields.
    """
    for each in fields(settings):
        if "help" not in each.metadata or (names is not None and each.name not in names):
            continue
        options = {"default": getattr(settings, each.name), **each.metadata}
        if options["default"] is False:
            options["action"] = "store_true"
        elif "nargs" not in options:
            options["type"] = type(options["default"])
        parser.add_argument(f"--{each.name.replace('_', '-')}", **options)


def take_flags(settings, options):
    """Return `settings` with its fields' values from the dictionary `options`, which loses those entries."""
    names = [each.name for each in fields(settings) if each.name in options]
    values = {name: options.pop(name) for name in names}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return replace(settings, **values | lists)
