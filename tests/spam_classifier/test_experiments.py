"""The comparison: what each method trains, resuming."""

import pandas as pd
import pytest
import torch

from appendix_e import count_parameters
from book_assets import Choice
from spam_classifier.classifier import build_classifier
from spam_classifier.experiments import (
    METHODS,
    choose_parameters,
    compare,
    read_runs,
    summary,
)

CPU = torch.device("cpu")
EMBEDDED = Choice("embedded", "embedded")


@pytest.mark.usefixtures("stand_ins")
def test_each_method_trains_what_it_says():
    counts = {}
    for method in METHODS:
        model, _ = build_classifier("tiny")
        choose_parameters(model, method)
        counts[method.title] = count_parameters(model)[0]
    head, model = 16 * 2 + 2, build_classifier("tiny")[0]
    total = count_parameters(model)[1]
    ranks = [counts[f"LoRA, all layers, rank {rank}"] - head for rank in (1, 2, 4, 8, 16, 32)]
    assert ranks == [ranks[0] * rank for rank in (1, 2, 4, 8, 16, 32)]
    assert ranks[0] == 2 * (4 * (16 + 16) + 2 * (16 + 64))
    assert counts["last layer"] == head and counts["all weights"] == total
    assert head < counts["last block"] < total
    assert counts["LoRA, query and value, rank 16"] == 2 * 2 * 16 * 32 + head


@pytest.mark.usefixtures("stand_ins")
def test_a_comparison_is_resumed_not_repeated(tmp_path, bf16_processor):
    file, lines = tmp_path / "results" / "runs.jsonl", []
    methods = METHODS[1:3]
    first = compare(EMBEDDED, file, methods[:1], (1,), epochs=1, device=CPU, report=lines.append)
    both = compare(EMBEDDED, file, methods, (1, 2), epochs=1, device=CPU, report=lines.append)
    again = compare(EMBEDDED, file, methods, (1, 2), epochs=1, device=CPU, report=lines.append)
    assert len(first) == 1 and len(both) == len(lines) == len(read_runs(file)) == 4
    pd.testing.assert_frame_equal(both, again)
    assert first["test"][0] == both["test"][0]
    table = summary(both)
    assert table.index.tolist() == [method.title for method in methods]
    embedding_bytes = (2 if bf16_processor else 4) * 50257 * 16
    assert "±" in table["test (%)"].iloc[0] and (both["step_memory_bytes"] > embedding_bytes).all()


def test_the_summary_is_in_percent_with_the_standard_deviation_of_the_seeds():
    run = {
        "title": "one", "trained_parameters": 1000, "checkpoint_bytes": 4e6, "seconds_per_step": 0.1,
        "step_memory_bytes": None, "train": 1.0, "validation": 0.9, "test": 0.95,
    }
    alone = summary(pd.DataFrame([run]))
    assert alone.loc["one", "test (%)"] == "95.0" and alone.loc["one", "step memory (MB)"] == ""
    both = summary(pd.DataFrame([run, {**run, "test": 0.97}]))
    assert both.loc["one", "test (%)"].replace("\xa0", " ") == "96.0 ± 1.4"  # n - 1 in the denominator
