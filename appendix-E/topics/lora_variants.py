"""LoRA's relatives compared: the contenders, the command that trains them, and the notebook's figures.

    python appendix-E/topics/lora_variants.py --task spam --assets model=embedded,data=book
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

try:
    from book_assets.command_line import add_assets_flag, command
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: start with python setup/run_main.py, which installs everything")

from book_assets import choose_assets
from ch04 import pick_device
from comparison.grid import RATES, SEEDS, run_grid
from comparison.tasks import TASKS
from lora.layers import apply_lora

ROWS = Path(__file__).with_name("lora-variants.jsonl")


@dataclass(frozen=True)
class Relative:
    """One relative of LoRA and its settings; the scale is alpha / rank."""

    title: str
    variant: str
    rank: int = 8
    alpha: float = 16.0
    options: dict = field(default_factory=dict)

    def adapt(self, model, targets, train_in_full):
        """Freeze `model`, put the branches into it, and return it."""
        scaling = "alpha" if self.variant in ("rslora", "vera") else "alpha/rank"
        return apply_lora(
            model, self.rank, self.alpha, targets, scaling, train_in_full=train_in_full,
            variant=self.variant, **self.options,
        )


CONTENDERS = (
    Relative("LoRA", "lora"),
    Relative("rsLoRA", "rslora"),
    Relative("LoRA+", "lora+"),
    Relative("LoRA-FA", "lora-fa"),
    Relative("DoRA", "dora"),
    Relative("PiSSA", "pissa"),
    Relative("OLoRA", "olora"),
    Relative("Delta-LoRA", "delta-lora", options={"start_step": 20}),
    Relative("AdaLoRA", "adalora", rank=12, alpha=24.0, options={"target_rank": 8}),
    Relative("VeRA", "vera", rank=256, alpha=1.0),
)


@command
def main(arguments=None):
    """Train every contender on one task, see --help."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_assets_flag(parser)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--output", type=Path, default=ROWS, help="file of finished runs")
    titles = [each.title for each in CONTENDERS]
    parser.add_argument("--only", nargs="+", choices=titles, help="these alone")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="grid of learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the comparison")
    parser.add_argument("--quick", action="store_true", help="a few messages or reviews")
    args = parser.parse_args(arguments)
    task = TASKS[args.task](args.assets or choose_assets("embedded"), pick_device(), quick=args.quick)
    chosen = [each for each in CONTENDERS if not args.only or each.title in args.only]
    run_grid(task, chosen, args.output, args.rates, seeds=args.seeds)


if __name__ == "__main__":
    main()
