"""Time the book's loop, this repository's fast path, and transformers + PEFT, side by side.

    python appendix-E/benchmark/run.py [--quick] [--json FILE] [--plot FILE] [--device cuda] [--data-dir DIR]
    python appendix-E/benchmark/run.py --parts accuracy          # five seeds of either way, half an hour

Every side runs in a process of its own; they take turns, round after round, and medians are reported.
The messages have the real length distribution: the SMS Spam Collection's in DIR (or BOOK_DATA), else the
embedded messages'. The model has GPT-2 small's shape. About a quarter of an hour on two cores, three
minutes with --quick. A value with ~ is extrapolated: the book's loop, where it would take too long, at n
times the token halfway, which flatters it: its cost a token grows faster than its length.
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
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

import benchmark.report as benchmark_report
from benchmark.sides import CONFIG, TINY, serve, synchronise
from fast_path.training import PRECISIONS, choose_precision, length_batches

BATCH, PROMPT = 8, 4
MEASURED = ("training", "generation", "memory", "loading", "accuracy")


class SideError(RuntimeError):
    """A side's process failed or ended."""


class Side:
    """A process that runs one side; `do(method, …)` returns its (seconds, result)."""

    def __init__(self, name, args, width):
        context = multiprocessing.get_context("spawn")
        self.name, (self.connection, theirs) = name, context.Pipe()
        config = TINY if args.tiny else CONFIG
        self.process = context.Process(
            target=serve, args=(theirs, name, args.device, config, width, args.threads), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def do(self, method, *arguments):
        try:
            self.connection.send((method, arguments))
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise SideError(f"{self.name} ended in {method}, perhaps for lack of memory") from None
        if isinstance(answer, Exception):
            raise SideError(f"{self.name} failed in {method}: {answer!r}") from answer
        return answer

    def seconds(self, method, *arguments):
        return self.do(method, *arguments)[0]

    def close(self):
        if self.process.is_alive():
            self.connection.send(None)
        self.process.join()


def find_messages(data_dir):
    """Return `encode_split`'s training, validation and test part, and the data's name."""
    from book_assets import get_tokenizer
    from book_assets.table import EMBEDDED_MESSAGES
    from ch06 import read_messages
    from spam_classifier.classifier import balanced, book_split, encode_split

    named = data_dir or os.environ.get("BOOK_DATA")
    folder = Path(named or ".")
    names = ("SMSSpamCollection.tsv", "SMSSpamCollection")
    found = [path for name in names for path in sorted(folder.glob(f"sms_spam_collection/{name}"))]
    found += [folder / name for name in names if (folder / name).is_file()]
    if named and not found:
        raise SystemExit(f"no {names[0]} in {folder}: name another folder, or none for the embedded messages")
    messages = balanced(read_messages(found[0] if found else EMBEDDED_MESSAGES))
    split = encode_split(book_split(messages), get_tokenizer(), 256)  # gpt2-tiny's context
    return split, "SMS Spam Collection" if found else "embedded messages"


def strata(items, count, key):
    """Return `count` items that stand in the middles of equal strata by `key`."""
    items = sorted(items, key=key)
    return [items[int((number + 0.5) * len(items) / count)] for number in range(count)]


def measure_machine(device, side):
    """Return the best matrix products (FLOP/s) and memory reading (bytes/s) of several tries.

    "flops" is in the precision that ours and transformers train in, "float32_flops" in the book's.
    """
    square, precision = torch.randn(side, side, device=device), choose_precision(device)
    low = square.to(PRECISIONS[precision])
    long, vector = torch.randn(65536, 1024, device=device), torch.randn(65536, device=device)

    def best(work):
        times = []
        for _ in range(6):
            began = time.perf_counter()
            work()
            synchronise(device)
            times.append(time.perf_counter() - began)
        return min(times)

    float32 = best(lambda: square @ square)
    return {
        "float32_flops": 2 * side**3 / float32,
        "flops": 2 * side**3 / (float32 if precision == "float32" else best(lambda: low @ low)),
        "bytes_per_second": 4 * long.numel() / min(best(lambda: vector @ long), best(long.sum)),
    }


class Benchmark:
    """The messages and what was measured on them: rows (what, side, values, …), shares, accuracies."""

    def __init__(self, args):
        self.args, self.rows, self.shares, self.accuracies = args, [], {}, []
        self.split, self.data = find_messages(args.data_dir)
        self.train, self.validation = self.split["train"][0], self.split["validation"][0]
        self.lengths = [len(ids) for ids in self.train]
        batches = length_batches(self.lengths, BATCH, seed=123)
        self.batches = [[self.train[index] for index in indices] for indices in batches]
        self.names = [name for name in args.sides if name != "hf" or has_hugging_face()]
        self.rounds = 2 if args.quick else 5

    def row(self, what, side, values, unit, **more):
        self.rows.append({"what": what, "side": side, "value": statistics.median(values), "unit": unit,
                          "rounds": [float(f"{value:.5g}") for value in values], **more})

    @contextmanager
    def started(self, method, *arguments, names=None):
        """Give the sides by name, each in its process and after `method`; end them afterwards."""
        sides = {name: Side(name, self.args, max(self.lengths)) for name in names or self.names}
        try:
            for side in sides.values():
                side.do(method, *arguments)
            yield sides
        finally:
            for side in sides.values():
                side.close()

    def training(self):
        """Examples a second over an epoch of training steps and the evaluations that belong to it."""
        chosen = strata(self.batches, 3 if self.args.quick else 6, key=count_tokens)
        held_out = strata(self.validation, 16 if self.args.quick else 48, key=len)[::-1]  # the longest first
        names = [*self.names, *(["compiled"] if self.args.compile else [])]
        steps, evaluations = {name: [] for name in names}, {name: [] for name in names}
        with self.started("start_training", names=names) as sides:
            for name, side in sides.items():
                first = sum(side.seconds("step", batch) for batch in (chosen[0], chosen[-1]))
                if name == "compiled":
                    self.row("warm-up of torch.compile", name, [first], "s")
            for _ in range(self.rounds):
                for name, side in sides.items():
                    alike = name == "book"  # padded, every batch costs it the same
                    batches, messages = (chosen[:1], held_out[:BATCH]) if alike else (chosen, held_out)
                    steps[name].append(statistics.mean([side.seconds("step", batch) for batch in batches]))
                    evaluations[name].append(side.seconds("evaluate", messages) / len(messages))
            if "ours" in sides:
                self.profile(sides["ours"], chosen)
        one = benchmark_report.message_flops(self.config, held_out) / len(held_out)
        epoch = 2 * benchmark_report.message_flops(self.config, self.train) / len(self.train)
        epoch += benchmark_report.message_flops(self.config, self.validation) / len(self.train)
        step = 2 * statistics.mean(benchmark_report.message_flops(self.config, batch) for batch in chosen)
        for name in names:
            self.row("training step", name, steps[name], "s", flops=step)
        for name in names:
            rates = [self.epoch_rate(name, *pair) for pair in zip(steps[name], evaluations[name])]
            self.row("training, whole epoch", name, rates, "examples/s", flops=epoch)
        for name in names:
            rates = [1 / seconds for seconds in evaluations[name]]
            self.row("evaluation", name, rates, "examples/s", flops=one)

    def profile(self, side, batches):
        """Where the time of our training steps goes."""
        before = side.do("data_seconds")[1]
        seconds = sum(side.seconds("step", batch) for batch in batches)
        data = side.do("data_seconds")[1] - before
        self.shares = side.do("profile", batches)[1] | {"of the step waiting for data": 100 * data / seconds}

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
        with self.started("start_generating") as sides:
            for side in sides.values():  # warm-up
                side.do("generate", 1, PROMPT, 2)
            for batch in (1, BATCH):
                for count in self.token_counts(batch):
                    for name, values, extrapolated in self.generation_rates(sides, batch, count):
                        self.row(f"generation, {count} tokens, batch {batch}", name, values, "tokens/s",
                                 extrapolated=extrapolated, tokens=batch)

    def token_counts(self, batch):
        if self.args.quick:
            return (20, 200) if batch == 1 else (20,)
        return (20, 200, 800)

    def generation_rates(self, sides, batch, count):
        """Return (side, tokens a second in each round, is that extrapolated?) for each side."""
        rates, extrapolated = {name: [] for name in sides}, {"book"} if count > 20 else set()
        for _ in range(1 if self.args.quick else 2):
            for name, side in sides.items():
                if name in extrapolated:
                    seconds = count * side.seconds("generate", batch, PROMPT + count // 2, 1)
                else:
                    seconds = side.seconds("generate", batch, PROMPT, count)
                rates[name].append(batch * count / seconds)
        return [(name, values, name in extrapolated) for name, values in rates.items()]

    def memory(self):
        """Peak of a step on the batch with the most tokens, each side in a fresh process."""
        largest = max(self.batches, key=count_tokens)
        for name in self.names:
            with self.started("start_training", names=[name]) as sides:
                result = sides[name].do("memory", largest)[1]
            if result:
                self.row("peak memory of a step", name, [result / 2**20], "MiB")

    def loading(self):
        """Seconds from GPT-2 small's safetensors file, in the system's cache, to a first token."""
        with tempfile.TemporaryDirectory() as folder:
            benchmark_report.write_weights(Path(folder), self.config)
            with self.started("load", folder) as sides:  # the first load, which imports, is not counted
                times = {name: [] for name in sides}
                for _ in range(2 if self.args.quick else 5):
                    for name, side in sides.items():
                        times[name].append(side.seconds("load", folder))
        for name, values in times.items():
            self.row("loading the weights, to a token", name, values, "s",
                     bytes=benchmark_report.weight_bytes(self.config))

    def accuracy(self):
        """Test accuracies of the printed loop and of ours on gpt2-tiny, a pair a seed."""
        from benchmark.accuracy import compare_accuracy

        epochs, report = (1 if self.args.quick else 5), partial(print, file=sys.stderr, flush=True)
        self.accuracies = compare_accuracy(
            self.split, torch.device(self.args.device), self.args.seeds, epochs, report=report
        )


def count_tokens(messages):
    return sum(len(ids) for ids in messages)


def has_hugging_face():
    return all(importlib.util.find_spec(name) for name in ("transformers", "peft"))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about three minutes, fewer rounds and lengths")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", metavar="FILE", help="write a figure of the speed-ups")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or mps")
    parser.add_argument("--data-dir", help="folder with sms_spam_collection/SMSSpamCollection")
    parser.add_argument("--threads", type=int, help="torch's threads in every process")
    parser.add_argument("--sides", nargs="+", choices=("book", "ours", "hf"), default=("book", "ours", "hf"))
    parser.add_argument("--compile", action="store_true", help="time our step under torch.compile, too")
    parser.add_argument("--parts", nargs="+", default=MEASURED[:-1], choices=MEASURED,
                        help="what to measure; accuracy takes half an hour and is only run if named")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of --parts accuracy")
    parser.add_argument("--tiny", action="store_true", help="a toy model: tries the script, measures nothing")
    args = parser.parse_args(argv)
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch's answers where there is no such device
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.threads is not None and args.threads < 1:
        parser.error("--threads must be at least 1")
    for path in filter(None, (args.json, args.plot)):
        if not Path(path).absolute().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    began, device = time.perf_counter(), torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = measure_machine(device, 256 if args.tiny else 8192 if device.type == "cuda" else 2048)
    benchmark = Benchmark(args)
    for part in args.parts:
        print(f"{time.perf_counter() - began:.0f} s: {part}", file=sys.stderr, flush=True)
        try:
            getattr(benchmark, part)()
        except SideError as error:  # what has been measured is kept
            print(f"{part} was given up: {error}", file=sys.stderr)
    report = {
        "machine": {**machine, "processor": platform.processor() or platform.machine(), "device": args.device,
                    "threads": torch.get_num_threads(), "torch": torch.__version__},
        "messages": {"data": benchmark.data, "count": len(benchmark.train), "padding": padding(benchmark),
                     "mean_tokens": float(np.mean(benchmark.lengths)), "longest": max(benchmark.lengths)},
        "precision": choose_precision(device), "quick": args.quick, "tiny": args.tiny,
        "rows": benchmark.rows, "shares": benchmark.shares, "accuracies": benchmark.accuracies,
        "seconds": time.perf_counter() - began,
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
