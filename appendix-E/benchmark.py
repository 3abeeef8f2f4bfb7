"""Time the book's loop, this repository's fast path, and transformers + PEFT, side by side.

    python appendix-E/benchmark.py [--quick] [--json FILE] [--plot FILE] [--device cuda] [--data-dir DIR]

Every side runs in a process of its own; they take turns, round after round, and medians are reported.
The messages have the real length distribution: the SMS Spam Collection's in DIR (or BOOK_DATA), else the
embedded messages'. The model has GPT-2 small's shape. About ten minutes on two cores, two with --quick.
A value with ~ is extrapolated: n tokens cost n times the token halfway, which flatters the book's loop,
whose cost a token grows faster than its length.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import benchmark_report
from benchmark_sides import CONFIG, SIDES, TINY, serve
from fast_training import PRECISIONS, choose_precision, length_batches

BATCH, PROMPT = 8, 4


class Side:
    """A process that runs one side; `do(method, …)` returns its (seconds, result)."""

    def __init__(self, name, args):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        config = TINY if args.tiny else CONFIG
        self.process = context.Process(
            target=serve, args=(theirs, name, args.device, config, args.threads), daemon=True
        )
        self.process.start()

    def do(self, method, *arguments):
        self.connection.send((method, arguments))
        while not self.connection.poll(1):
            if not self.process.is_alive():
                raise RuntimeError(f"a side ended in {method}, perhaps for lack of memory")
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def seconds(self, method, *arguments):
        return self.do(method, *arguments)[0]

    def close(self):
        self.connection.send(None)
        self.process.join()


def find_messages(data_dir):
    """Return (training messages, validation messages, name): token ids, balanced and split as printed."""
    from book_assets import EMBEDDED_MESSAGES, get_tokenizer
    from ch06 import create_balanced_dataset, random_split, read_messages
    from fast_training import encode_messages

    folder = Path(data_dir or os.environ.get("BOOK_DATA", "."))
    names = ("SMSSpamCollection.tsv", "SMSSpamCollection")
    found = [path for name in names for path in sorted(folder.glob(f"sms_spam_collection/{name}"))]
    found += [folder / name for name in names if (folder / name).is_file()]
    path = found[0] if found else EMBEDDED_MESSAGES
    split = random_split(create_balanced_dataset(read_messages(path)), 0.7, 0.1)
    train, validation = (encode_messages(part["Text"], get_tokenizer(), 1024) for part in split[:2])
    return train, validation, "SMS Spam Collection" if found else "embedded messages"


def strata(items, count, key):
    """Return `count` items that stand in the middles of equal strata by `key`."""
    items = sorted(items, key=key)
    return [items[int((number + 0.5) * len(items) / count)] for number in range(count)]


def measure_machine(device, side):
    """Return the best matrix products (FLOP/s) and memory reading (bytes/s) of several tries.

    "flops" is in the precision that ours and transformers train in, "float32_flops" in the book's.
    """
    square = torch.randn(side, side, device=device)
    low = square.to(PRECISIONS[choose_precision(device)])
    long, vector = torch.randn(65536, 1024, device=device), torch.randn(65536, device=device)

    def best(work):
        times = []
        for _ in range(6):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    return {
        "float32_flops": 2 * side**3 / best(lambda: square @ square),
        "flops": 2 * side**3 / best(lambda: low @ low),
        "bytes_per_second": 4 * long.numel() / min(best(lambda: vector @ long), best(long.sum)),
    }


class Benchmark:
    """The sides, the messages and what was measured: a list of rows (what, side, values, …)."""

    def __init__(self, args):
        self.args, self.rows = args, []
        self.train, self.validation, self.data = find_messages(args.data_dir)
        self.lengths = [len(ids) for ids in self.train]
        batches = length_batches(self.lengths, BATCH, seed=123)
        self.batches = [[self.train[index] for index in indices] for indices in batches]
        self.names = [name for name in args.sides if name != "hf" or has_hugging_face()]
        self.sides = {name: Side(name, args) for name in self.names}
        self.rounds = 2 if args.quick else 5

    def all(self, method, *arguments):
        for side in self.sides.values():
            side.do(method, *arguments)

    def row(self, what, side, values, unit, **more):
        self.rows.append({"what": what, "side": side, "value": statistics.median(values), "unit": unit,
                          "rounds": [float(f"{value:.5g}") for value in values], **more})

    def training(self):
        """Examples a second over an epoch of training steps and the evaluations that belong to it."""
        chosen = strata(self.batches, 3 if self.args.quick else 6, key=count_tokens)
        held_out = strata(self.validation, 16 if self.args.quick else 48, key=len)[::-1]  # the longest first
        self.all("start_training")
        for side in self.sides.values():  # warm-up
            side.do("step", chosen[0])
        times = {name: [] for name in self.names}
        for _ in range(self.rounds):
            for name, side in self.sides.items():
                batches, messages = (chosen[:1], held_out[:BATCH]) if name == "book" else (chosen, held_out)
                step = statistics.mean([side.seconds("step", batch) for batch in batches])
                times[name].append((step, side.seconds("evaluate", messages) / len(messages)))
        for name, pairs in times.items():
            self.row("evaluation", name, [1 / evaluate for _, evaluate in pairs], "examples/s",
                     floor=benchmark_report.message_flops(self.config, held_out) / len(held_out))
            rates = [self.epoch_rate(name, *pair) for pair in pairs]
            self.row("training, whole epoch", name, rates, "examples/s",
                     floor=2 * benchmark_report.message_flops(self.config, self.train) / len(self.train))
            self.row("training step", name, [step * 1e3 for step, _ in pairs], "ms")

    @property
    def config(self):
        return TINY if self.args.tiny else CONFIG

    def epoch_rate(self, name, step, evaluate):
        """Examples a second from the seconds of a step and of one evaluated message."""
        if name == "book":  # losses of 5 + 5 batches every 50 steps, accuracies of 5 + 5 at the end
            steps = len(self.train) // BATCH
            messages = BATCH * (10 * steps / 50 + 10)
            return steps * BATCH / (steps * step + messages * evaluate)
        seconds = len(self.batches) * step + len(self.validation) * evaluate  # all of the validation set
        return len(self.train) / seconds

    def generation(self):
        """Tokens a second, greedy, from prompts of 4 tokens."""
        self.all("start_generating")
        for side in self.sides.values():  # warm-up
            side.do("generate", 1, PROMPT, 2)
        for batch in (1, BATCH):
            for count in (20, 200) if self.args.quick else (20, 200, 800):
                for name, values, extrapolated in self.generation_rates(batch, count):
                    self.row(f"generation, {count} tokens, batch {batch}", name, values, "tokens/s",
                             extrapolated=extrapolated, token_floor=batch)

    def generation_rates(self, batch, count):
        rates = {name: [] for name in self.names}
        patience, run = (5 if self.args.quick else 15), {}
        for _ in range(1 if self.args.quick else 2):
            for name, side in self.sides.items():
                if name not in run or not run[name]:
                    seconds = count * self.token_seconds(side, name, batch, PROMPT + count // 2)
                    run.setdefault(name, seconds <= patience)
                if run[name]:
                    seconds = side.seconds("generate", batch, PROMPT, count)
                rates[name].append(batch * count / seconds)
        return [(name, values, not run[name]) for name, values in rates.items()]

    def token_seconds(self, side, name, batch, length):
        """Seconds of the token after `length` tokens; a cached side reads those first, untimed."""
        if name == "book":
            return side.seconds("generate", batch, length, 1)
        first = side.seconds("generate", batch, length, 1)
        return (side.seconds("generate", batch, length, 7) - first) / 6

    def memory(self):
        """Peak of a step on the batch with the most tokens, each side in a fresh process."""
        largest = max(self.batches, key=count_tokens)
        for name in self.names:
            side = Side(name, self.args)
            result = side.do("memory", largest)[1]
            side.close()
            if result:
                self.row("peak memory of a step", name, [result / 2**20], "MiB")

    def loading(self):
        """Seconds from GPT-2 small's safetensors file, in the system's cache, to a model."""
        with tempfile.TemporaryDirectory() as folder:
            benchmark_report.write_weights(Path(folder), self.config)
            times = {name: [] for name in self.names}
            for _ in range(2):
                for name, side in self.sides.items():
                    times[name].append(side.seconds("load", folder))
        for name, values in times.items():
            self.row("loading the weights", name, values, "s")


def count_tokens(messages):
    return sum(len(ids) for ids in messages)


def has_hugging_face():
    return all(importlib.util.find_spec(name) for name in ("transformers", "peft"))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about two minutes, fewer rounds and lengths")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", metavar="FILE", help="write a figure of the speed-ups")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or mps")
    parser.add_argument("--data-dir", help="folder with sms_spam_collection/SMSSpamCollection")
    parser.add_argument("--threads", type=int, help="torch's threads in every process")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--parts", nargs="+", default=["training", "generation", "memory", "loading"],
                        choices=["training", "generation", "memory", "loading"])
    parser.add_argument("--tiny", action="store_true", help="a toy model: tries the script, measures nothing")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    began, device = time.perf_counter(), torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = measure_machine(device, 256 if args.tiny else 8192 if device.type == "cuda" else 2048)
    benchmark = Benchmark(args)
    for part in args.parts:
        print(f"{time.perf_counter() - began:.0f} s: {part}", file=sys.stderr)
        getattr(benchmark, part)()
    for side in benchmark.sides.values():
        side.close()
    report = {
        "machine": {**machine, "processor": platform.processor() or platform.machine(), "device": args.device,
                    "threads": torch.get_num_threads(), "torch": torch.__version__},
        "messages": {"data": benchmark.data, "count": len(benchmark.train), "padding": padding(benchmark),
                     "mean_tokens": float(np.mean(benchmark.lengths)), "longest": max(benchmark.lengths)},
        "precision": choose_precision(device), "quick": args.quick, "tiny": args.tiny,
        "rows": benchmark.rows, "seconds": time.perf_counter() - began,
    }
    benchmark_report.finish(report, benchmark.config)
    print(benchmark_report.table(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        benchmark_report.plot(report, args.plot)
    return report


def padding(benchmark):
    """Share of padding in the grouped batches, which transformers computes and we do not."""
    tokens = sum(len(batch) * max(map(len, batch)) for batch in benchmark.batches)
    return 1 - sum(benchmark.lengths) / tokens


if __name__ == "__main__":
    main()
