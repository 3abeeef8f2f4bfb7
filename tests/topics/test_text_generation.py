"""The commands that fine-tune a GPT on a text and let it write, and the figures of the notebook."""

import io
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from appendix_e import count_parameters
from ch06 import SPLITS
from comparison.grid import read_rows
from comparison.styles import APPROACHES, STYLE_SETTINGS
from figures import find_faults
from language_model.generation import stream_text
from language_model.saved import FULL_FILE, load_finetuned
from language_model.training import TextHistory, load_language_model
from lora.adapters import read_adapter
from lora.files import WEIGHTS_FILE
from lora.layers import adapted_layers, is_merged
from topics import text_generation
from topics.text_generation import (
    OWN_RATES,
    STYLE_RESULTS,
    build_command_line,
    load_writer,
    main,
    plot_decoding,
    plot_style_rates,
    plot_training,
    read_text_parts,
)

CPU = torch.device("cpu")
LETTER = "Dear Emma, the film of last night was long, and so is this letter. " * 9
LETTERS = "\n\n".join(f"{number}. {LETTER}".strip() for number in range(10))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text(LETTERS, encoding="utf-8")
    return path


def run(capsys, *arguments):
    """Run a command; return (exit code, standard output, standard error)."""
    code = 0
    try:
        main([*map(str, arguments)])
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


FEW_STEPS = ("--steps", 3, "--batch-size", 1, "--assets", "embedded")


@pytest.fixture(scope="module", params=["lora", "full"])
def saved(request, letters, tmp_path_factory):
    """(method, folder, what was printed) of a short fine-tuning."""
    folder = tmp_path_factory.mktemp(request.param) / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        main([*map(str, ("finetune", "--text", letters, "--method", request.param, "--output", folder,
                         *FEW_STEPS))])
        printed = sys.stdout.getvalue()
    return request.param, folder, printed


# finetune


def test_finetune_saves_one_file_of_what_has_changed_with_its_settings(saved):
    method, folder, printed = saved
    assert [file.name for file in folder.iterdir()] == [WEIGHTS_FILE if method == "lora" else FULL_FILE]
    model, notes = load_finetuned(folder, CPU)
    assert (notes["method"], notes["settings"]["learning_rate"]) == (method, OWN_RATES[method])
    assert notes["assets"] == {"model": "embedded", "data": "embedded"} and notes["settings"]["steps"] == 3
    assert len(adapted_layers(model)) == (12 if method == "lora" else 0)
    base, _ = load_language_model("tiny")
    if method == "lora":
        adapter = read_adapter(folder)
        settings = {(s["rank"], s["alpha"], s["scaling"]) for s in adapter.layers.values()}
        assert settings == {(4, 32.0, "alpha/rank")}
        assert any(tensor.any() for name, tensor in adapter.tensors.items() if name.endswith(".B"))
    else:
        assert count_parameters(model)[1] == count_parameters(base)[1]
        assert not torch.equal(model.final_norm.scale, base.final_norm.scale)
    assert "after    0 steps" in printed and "after    3 steps" in printed and "test loss" in printed


def test_the_text_is_cut_between_paragraphs_and_none_is_in_two_parts(letters):
    parts = read_text_parts(letters)
    paragraphs = [parts[name][0].split("\n\n") for name in SPLITS]
    assert [len(part) for part in paragraphs] == [8, 1, 1]
    assert [text for part in paragraphs for text in part] == LETTERS.split("\n\n")


@pytest.mark.parametrize("line_end, gap", [("\n", 2), ("\r\n", 2), ("\n", 4), ("\n \t", 3)])
def test_line_ends_and_wider_gaps_between_paragraphs_make_no_difference(tmp_path, line_end, gap):
    path = tmp_path / "text.txt"
    path.write_bytes((line_end * gap).join(f"{n}. One{line_end}two" for n in range(10)).encode("utf-8-sig"))
    parts = read_text_parts(path)
    assert parts["test"][0].split() == ["9.", "One", "two"] and len(parts["train"][0].split("\n\n")) == 8


@pytest.mark.parametrize("content, words", [
    (b"\xff\xfe\x00", "not UTF-8"), (b"", "1 paragraphs"), (b"one\n\ntwo", "at least 10"),
    (b"\n\n".join([b"short"] * 10), "the train part: 22 tokens make no window of 129: take more text"),
])
def test_a_text_that_cannot_be_used_is_one_line(tmp_path, capsys, content, words):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    code, _, _ = run(capsys, "finetune", "--text", path, "--output", tmp_path / "out", *FEW_STEPS)
    assert code.startswith("error: ") and words in code and "\n" not in code
    assert not [*tmp_path.glob("out/*")]


@pytest.mark.parametrize("arguments, words", [
    (("--rank", 0), "rank"), (("--learning-rate", 0), "learning_rate"), (("--steps", 0), "steps"),
    (("--text", "missing.txt"), "missing.txt"), (("--output", "text"), "text"),
])
def test_a_users_mistake_is_one_line_and_trains_nothing(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(LETTERS)
    monkeypatch.setattr(text_generation.StyleTask, "train", lambda *a, **o: pytest.fail("trained"))
    code, _, _ = run(capsys, "finetune", *FEW_STEPS, "--text", "text", "--output", "out", *arguments)
    assert code.startswith("error: ") and words in code and "\n" not in code


def test_a_folder_with_another_kind_of_training_is_refused_before_training(saved, letters, capsys):
    method, folder, _ = saved
    other = "full" if method == "lora" else "lora"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    code, _, _ = run(capsys, "finetune", "--text", letters, "--method", other, "--output", folder, *FEW_STEPS)
    assert "choose another folder" in code
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# generate


def test_generate_continues_each_prompt_as_the_unmerged_model_does(saved, capsys, tokenizer):
    _, folder, _ = saved
    prompts = ("Dear Emma, the", "The film 🎬")
    code, printed, _ = run(
        capsys, "generate", "--adapter", folder, "--max-new-tokens", 6, "--prompt", *prompts, "--seed", 7)
    model, _ = load_finetuned(folder, CPU)  # LoRA not merged
    wanted = [
        prompt + "".join(stream_text(model, tokenizer, prompt, 6, temperature=0.8, top_p=0.95, seed=7))
        for prompt in prompts
    ]
    assert code == 0 and printed == f"{wanted[0]}\n\n{wanted[1]}\n"


def test_lora_is_merged_for_writing(saved):
    method, folder, _ = saved
    model = load_writer(folder, None, CPU)
    assert is_merged(model) == (method == "lora") and not adapted_layers(model) and not model.training


def test_without_an_adapter_the_base_model_writes_and_lines_of_standard_input_are_prompts(
    capsys, monkeypatch, tokenizer,
):
    monkeypatch.setattr("sys.stdin", io.StringIO("One day\n\nTwo\n"))
    code, printed, _ = run(
        capsys, "generate", "--assets", "embedded", "--max-new-tokens", 3, "--temperature", 0)
    model, _ = load_language_model("tiny")
    wanted = [p + "".join(stream_text(model, tokenizer, p, 3, temperature=0)) for p in ("One day", "Two")]
    assert code == 0 and printed == "\n\n".join(wanted) + "\n"


def test_the_text_is_printed_as_it_comes(monkeypatch, capsys):
    pieces, seen = ["a", "b", "c"], []

    def stream(*arguments, **options):
        for piece in pieces:
            seen.append(capsys.readouterr().out)
            yield piece

    monkeypatch.setattr(text_generation, "stream_text", stream)
    monkeypatch.setattr(text_generation, "load_writer", lambda *a: None)
    assert run(capsys, "generate", "--prompt", "P")[0] == 0
    assert seen == ["P", "a", "b"]


def test_a_closed_pipe_is_no_error():
    process = subprocess.Popen(
        [sys.executable, text_generation.__file__, "generate", "--assets", "embedded", "--prompt", "The",
         "--max-new-tokens", "20"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    assert process.stdout.read(1) == b"T"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


@pytest.mark.parametrize("arguments, words", [
    (("--temperature", -1), "temperature"), (("--top-p", 0), "top_p"), (("--top-k", 0), "top_k"),
    (("--seed", -1), "seed"), (("--max-new-tokens", -1), "max_new_tokens"),
    (("--adapter", "nowhere"), "nowhere"), ((), "no prompt"),
])
def test_an_impossible_wish_is_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    prompt = ("--prompt", "a") if arguments else ()
    code, printed, _ = run(capsys, "generate", "--assets", "embedded", *prompt, *arguments)
    assert code.startswith("error: ") and words in code and "\n" not in code and not printed


# compare and costs


def test_compare_passes_its_flags_on(tmp_path, capsys, monkeypatch):
    seen = []

    def pretend(task, output, rates, seeds, report):
        seen.append((task.about["steps"], task.about["quick"], output, rates, seeds))
        return pd.DataFrame({
            "title": "full", "rate": [0.1, 0.2], "tuning": True, "validation_loss": [3.0, 2.9]})

    monkeypatch.setattr(text_generation, "tabulate_styles", lambda runs: runs)
    monkeypatch.setattr(text_generation, "compare_approaches", pretend)
    output = tmp_path / "runs.jsonl"
    code, printed, _ = run(capsys, "compare", "--steps", 2, "--rates", 0.1, 0.2, "--seeds", 4, "--quick",
                           "--output", output)
    assert code == 0 and seen == [(2, True, output, [0.1, 0.2], [4])] and str(output) in printed
    assert "full: the best rate is at the edge" in printed


def test_the_defaults_are_the_comparisons():
    options = build_command_line().parse_args(["compare"])
    assert (options.steps, options.batch_size) == (STYLE_SETTINGS.steps, STYLE_SETTINGS.batch_size)
    assert set(OWN_RATES) == {each.method for each in APPROACHES}


def test_speed_is_in_tokens_per_second(monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 24.0])
    monkeypatch.setattr(text_generation.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(text_generation, "stream_tokens", lambda model, ids, count, **o: range(count))
    assert text_generation.measure_speed(None, count=8, repeats=2) == 2


# Figures


def test_losses_of_both_are_in_one_figure():
    histories = {
        title: TextHistory([4.0 - step / 10 + shift for step in range(20)], {0: 4.0, 20: 3.0}, 1.0)
        for title, shift in (("full", 0.0), ("LoRA", 0.3))
    }
    figure = plot_training(histories, window=2)
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == [
        f"{title}, {part}" for title in histories for part in ("training", "validation")]
    assert lines[0].get_ydata()[:2] == pytest.approx([4.0, 3.95]) and find_faults(figure) == []


def test_the_chosen_rate_has_a_ring_and_a_diverged_one_no_point():
    losses = {"full": [3.2, 3.1, None], "LoRA": [3.6, 3.4, 3.3]}
    runs = pd.DataFrame([
        {"title": title, "rate": rate, "tuning": True, "validation_loss": loss}
        for title, values in losses.items() for rate, loss in zip((1e-4, 1e-3, 1e-2), values)
    ])
    figure = plot_style_rates(runs)
    curves = [line for line in figure.axes[0].lines if line.get_markersize() < 10]
    rings = [line for line in figure.axes[0].lines if line.get_markersize() > 10]
    assert [len(curve.get_xdata()) for curve in curves] == [2, 3]
    assert [ring.get_xdata()[0] for ring in rings] == [1e-3, 1e-2] and find_faults(figure) == []


def test_tokens_that_cannot_be_drawn_are_grey_and_the_others_share_the_probability(tokenizer):
    logits = torch.full((50257,), -50.0)
    logits[100:104] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    figure = plot_decoding(logits, tokenizer, {"all": {}, "top-p 0.8": {"top_p": 0.79}}, count=4)
    everything, nucleus = (
        {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in ax.patches}
        for ax in figure.axes
    )
    np.testing.assert_allclose([everything[row] for row in range(4)], [0.5, 0.3, 0.15, 0.05], rtol=1e-5)
    np.testing.assert_allclose([nucleus[row] for row in range(4)], [0.625, 0.375, 0.15, 0.05], rtol=1e-5)
    assert len({bar.get_facecolor() for bar in figure.axes[1].patches}) == 2 and find_faults(figure) == []
    assert [ax.get_title().split("\n")[1] for ax in figure.axes] == ["50,257 tokens", "2 tokens"]


# The stored results


def test_every_stored_run_is_an_approach_of_the_module():
    known = {(each.method, each.rank, each.alpha) for each in APPROACHES}
    for row in read_rows(STYLE_RESULTS):
        assert (row["method"], row["rank"], row["alpha"]) in known and row["task"].startswith("style")
