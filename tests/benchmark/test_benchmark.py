"""The benchmark's arithmetic: floors, ratios, epochs and the table. No timing is asserted."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import benchmark.accuracy as benchmark_accuracy
import benchmark.report as benchmark_report
import benchmark.run as benchmark_run
from benchmark.sides import RANK, SIDES, TINY, Book, Fast, peak_memory
from ch06 import SpamDataset
from gpt_download import load_gpt2
from spam_classifier.classifier import encode_split

MACHINE = {"float32_flops": 1e9, "flops": 2e9, "bytes_per_second": 4e9}
SMALL = {**TINY, "vocab_size": 300, "context_length": 64}


def report(*rows):
    machine = {**MACHINE, "processor": "cpu", "device": "cpu", "threads": 2, "torch": "2"}
    messages = {"count": 10, "data": "some", "mean_tokens": 30, "longest": 120, "padding": 0.1}
    rows = [{"unit": "examples/s", **row} for row in rows]
    return {"machine": machine, "messages": messages, "precision": "float32", "seconds": 60.0, "rows": rows}


def test_the_floor_counts_the_last_block_once_a_message():
    config = {"emb_dim": 10, "n_layers": 2}
    one_token = benchmark_report.message_flops(config, [[1]])
    assert one_token == 2 * 2 * 1200  # every block whole: the token is the last one too
    assert benchmark_report.message_flops(config, [[1] * 3]) == 2 * 1200 * 3 + 2 * (3 * 200 + 1000)


def test_a_token_costs_reading_the_weights_or_the_products():
    config = {"emb_dim": 10, "n_layers": 2, "vocab_size": 60}
    weights = 2 * 1200 + 600
    assert benchmark_report.token_seconds(config, MACHINE, 1) == pytest.approx(2 * weights / 1e9)
    slow_memory = {**MACHINE, "bytes_per_second": 1e9}
    assert benchmark_report.token_seconds(config, slow_memory, 1) == pytest.approx(4 * weights / 1e9)
    assert benchmark_report.token_seconds(config, slow_memory, 8) == pytest.approx(16 * weights / 1e9)


def test_ratios_are_above_one_for_the_better_side():
    result = report(
        {"what": "training", "side": "book", "value": 2.0, "flops": 1e8},
        {"what": "training", "side": "ours", "value": 8.0, "flops": 1e8},
        {"what": "memory", "side": "book", "value": 400.0, "unit": "MiB"},
        {"what": "memory", "side": "ours", "value": 100.0, "unit": "MiB"},
    )
    benchmark_report.finish(result, TINY)
    rows = result["rows"]
    assert [row.get("times_book") for row in rows] == [None, 4.0, None, 4.0]
    assert [row.get("floor_share") for row in rows] == [0.2, 0.4, None, None]
    assert [row.get("times_book_at_floor") for row in rows] == [None, 10.0, None, None]


@pytest.mark.parametrize("need, floor", [({"flops": 1e9}, 0.5), ({"bytes": 8e9}, 2.0)])
def test_seconds_are_compared_with_the_floors_seconds(need, floor):
    result = report({"what": "a step", "side": "ours", "value": 4.0, "unit": "s", **need})
    benchmark_report.finish(result, TINY)
    assert result["rows"][0]["floor_share"] == floor / 4.0


def test_means_and_spreads_are_over_seeds_and_the_difference_is_paired():
    runs = [{"seed": seed, "book": book, "ours": book + 0.02, "book_seconds": 60.0, "ours_seconds": 6.0}
            for seed, book in ((1, 0.90), (2, 0.94))]
    text = "\n".join(benchmark_report.accuracy_lines(runs))
    assert "| 2 | 94.00 % | 96.00 % | +2.00 | 60 | 6 |" in text
    assert "| 92.00 ± 2.83 | 94.00 ± 2.83 | 2.00 ± 0.00 | 60 | 6 |" in text
    assert benchmark_report.accuracy_lines([]) == []


@pytest.fixture
def few_messages():
    rows = [(n % 2, f"{('see you', 'win a prize now')[n % 2]} {n} {'really ' * (n % 5)}") for n in range(40)]
    part = pd.DataFrame(rows, columns=["Label", "Text"])
    return {"train": part[:24], "validation": part[24:32], "test": part[32:]}


def test_the_printed_loop_gets_the_batches_of_the_printed_dataset(few_messages, tokenizer, tmp_path):
    split = encode_split(few_messages, tokenizer, 256)
    settings = benchmark_accuracy.METHOD.settings(seed=5)
    few_messages["train"].to_csv(tmp_path / "train.csv", index=None)
    dataset = SpamDataset(tmp_path / "train.csv", tokenizer)
    torch.manual_seed(5)
    printed = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True)
    ours = benchmark_accuracy.padded_loaders(split, settings)["train"]
    torch.manual_seed(6)
    expected = list(printed)
    torch.manual_seed(6)
    for batch, (ids, labels) in zip(ours, expected, strict=True):
        assert torch.equal(batch[0], ids) and torch.equal(batch[1], labels)


def test_both_ways_are_trained_with_every_seed(few_messages, tokenizer):
    split, lines = encode_split(few_messages, tokenizer, 256), []
    runs = benchmark_accuracy.compare_accuracy(
        split, torch.device("cpu"), seeds=(1, 2), epochs=1, report=lines.append
    )
    assert [run["seed"] for run in runs] == [1, 2] and len(lines) == 2
    for run in runs:
        assert 0 <= run["book"] <= 1 and 0 <= run["ours"] <= 1
        assert run["book_seconds"] > 0 and run["ours_seconds"] > 0


def test_the_table_marks_extrapolations_and_a_missing_side():
    row = {"what": "generation", "side": "book", "value": 2.0, "extrapolated": True}
    text = benchmark_report.table(report(row))
    assert "~2 examples/s" in text and "pip install transformers peft" in text


def test_the_plot_is_written(tmp_path):
    result = report(*({"what": "training", "side": side, "value": 2.0} for side in ("book", "ours")))
    benchmark_report.finish(result, TINY)
    benchmark_report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_an_epoch_contains_its_evaluations():
    messages = SimpleNamespace(train=range(80), validation=range(20), batches=range(10))
    rate = benchmark_run.Benchmark.epoch_rate
    assert rate(messages, "ours", 1.0, 0.5) == pytest.approx(80 / (10 * 1.0 + 20 * 0.5))
    assert rate(messages, "book", 1.0, 0.5) == pytest.approx(80 / (10 * 1.0 + 8 * 12 * 0.5))


def test_strata_are_spread_evenly():
    assert benchmark_run.strata(range(100), 4, key=int) == [12, 37, 62, 87]


def test_random_weights_are_a_readable_gpt2(tmp_path):
    benchmark_report.write_weights(tmp_path, SMALL)
    settings, params = load_gpt2(tmp_path, "safetensors")
    assert settings["n_embd"] == 32 and len(params["blocks"]) == 2
    assert params["wte"].shape == (300, 32)


def test_book_and_ours_train_the_same_number_of_parameters():
    counts = []
    for kind in (Book, Fast):
        side = kind(torch.device("cpu"), SMALL, width=20)
        side.start_training()
        loss = side.step([np.arange(5, dtype=np.int32), np.arange(9, dtype=np.int32)])
        assert np.isfinite(loss)
        counts.append(sum(p.numel() for p in side.model.parameters() if p.requires_grad))
    assert counts[0] == counts[1] == RANK * (2 * (4 * 64 + 2 * 160) + 34)


def test_the_profile_shares_out_the_whole_step():
    side = Fast(torch.device("cpu"), SMALL, width=20)
    side.start_training()
    shares = side.profile([[np.arange(5, dtype=np.int32), np.arange(9, dtype=np.int32)]])
    assert sum(shares.values()) == pytest.approx(100) and min(shares.values()) > 0
    text = benchmark_report.table(report() | {"shares": shares})
    assert "Our training step's time:" in text and "% attention" in text


def test_every_side_has_what_the_benchmark_calls():
    for side in SIDES.values():
        assert all(hasattr(side, name) for name in ("step", "evaluate", "generate", "load", "start_training"))


def test_memory_is_plausible():
    peak = peak_memory()
    assert peak is None or 10**7 < peak < 10**12


def test_the_messages_are_split_as_printed(book_data):
    split, name = benchmark_run.find_messages(book_data)
    assert [len(split[part][0]) for part in ("train", "validation", "test")] == [1045, 149, 300]
    assert max(map(len, split["train"][0])) == 120 and name == "SMS Spam Collection"


def test_a_side_that_ends_is_named():
    class Broken:
        def __init__(self, name, *_):
            self.name, self.connection, self.process = name, self, self

        def send(self, job):
            pass

        def recv(self):
            raise EOFError

        do = benchmark_run.Side.do

    with pytest.raises(benchmark_run.SideError, match="hf ended in step, perhaps for lack of memory"):
        Broken("hf").do("step")


@pytest.mark.parametrize("arguments, message", [
    (["--device", "abacus"], "--device abacus"),
    (["--threads", "0"], "--threads must be at least 1"),
    (["--json", "nowhere/speed.json"], "there is no such folder"),
])
def test_arguments_are_checked_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark_run.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_a_named_folder_without_messages_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no SMSSpamCollection"):
        benchmark_run.find_messages(tmp_path)
