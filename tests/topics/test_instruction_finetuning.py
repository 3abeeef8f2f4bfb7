"""Fine-tuning on instructions from the command line, asking the result, tables and figures."""

import json
from dataclasses import asdict

import pandas as pd
import pytest

import comparison.instructions
from appendix_e import count_parameters
from comparison.grid import at_the_edge, finished_runs, read_rows
from figures import find_faults
from instructions.data import load_short_instructions
from instructions.training import InstructionSettings
from language_model.training import TextHistory
from models import small_gpt
from topics.instruction_finetuning import (
    BASE,
    INSTRUCTION_APPROACHES,
    INSTRUCTION_RUNS,
    InstructionApproach,
    main,
    pair_answers,
    plot_answer_loss,
    plot_tasks,
    show_answers,
    tabulate_comparison,
    tabulate_scores,
    tabulate_tasks,
)

ENTRIES = [
    {"task": task, "instruction": f"Do {n}.", "input": "", "output": f"It is {n}."}
    for n, task in enumerate(("plural", "plural", "past", "past"))
]
RIGHT = [entry["output"] for entry in ENTRIES]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Take four entries of each part, and short answers."""
    load = comparison.instructions.load_instructions
    monkeypatch.setattr(
        comparison.instructions, "load_instructions",
        lambda choice: {name: part[:4] for name, part in load(choice).items()},
    )
    monkeypatch.setitem(comparison.instructions.ANSWER_TOKENS, "embedded", 3)


def run(capsys, *arguments):
    """Return (exit code or None, output) of the command."""
    code = None
    try:
        main([str(each) for each in arguments])
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().out


def test_what_an_approach_trains():
    pairs = 2 * (2 * (4 * 48 + 2 * 120) + 24 + 2)
    for approach, count in ((BASE, 0), (InstructionApproach("", rank=2), pairs)):
        assert count_parameters(approach.adapt(small_gpt()))[0] == count
    model = InstructionApproach("", method="full").adapt(small_gpt())
    assert count_parameters(model)[0] == count_parameters(model)[1]
    assert len({each.title for each in (*INSTRUCTION_APPROACHES, BASE)}) == 5


@pytest.mark.parametrize("method, file", [("lora", "lora.safetensors"), ("full", "finetuned.safetensors")])
def test_finetuning_writes_model_results_and_answers_that_can_be_asked(method, file, tmp_path, capsys):
    folder = tmp_path / "tuned"
    code, out = run(
        capsys, "finetune", "--assets", "embedded", "--method", method, "--rank", 2, "--epochs", 1,
        "--learning-rate", 1e-3, "--mask-prompt", "--output", folder,
    )
    assert code is None and "validation loss of the answers" in out
    assert {path.name for path in folder.iterdir()} == {file, "results.json", "answers.json"}
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["mask_prompt"] and results["approach"]["method"] == method
    assert results["scores"]["all"]["entries"] == 4 and len(results["losses"]) == 1
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    entry = answers[0]
    arguments = ("--input", entry["input"], "--adapter", folder, "--max-new-tokens", 3)
    code, out = run(capsys, "ask", entry["instruction"], *arguments)
    assert code is None and out.strip() == entry["answer"].strip()


def test_comparing_runs_the_base_model_once_and_goes_on_where_it_stopped(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    arguments = ("compare", "--assets", "embedded", "--only", "LoRA", "--epochs", 1, "--rates", 1e-3,
                 "--seeds", 1, "--output", file)
    code, out = run(capsys, *arguments)
    assert code is None and "base model" in out and "LoRA" in out
    rows = read_rows(file)
    assert [(row["title"], row["tuning"]) for row in rows] == [
        ("base model", False), ("LoRA", True), ("LoRA", False)
    ]
    before = file.read_bytes()
    assert run(capsys, *arguments)[0] is None and file.read_bytes() == before


@pytest.mark.parametrize("arguments, words", [
    (("finetune", "--rank", 0), "rank must be at least 1"),
    (("finetune", "--epochs", 0), "epochs must be at least 1"),
    (("finetune", "--size", "355M"), "one size, tiny"),
    (("finetune", "--learning-rate", 0), "learning_rate"),
    (("ask", "--adapter", "nothing", "Say hello."), "nothing"),
    (("ask", "--adapter", "nothing", " "), "must not be empty"),
    (("compare", "--output", "."), "folder"),
])
def test_a_users_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_ASSETS", "embedded")
    code, _ = run(capsys, *arguments)
    assert isinstance(code, str) and code.startswith("error: ") and words in code and "\n" not in code


# Tables and figures


def test_answers_stand_beside_the_entries():
    assert pair_answers(ENTRIES[:1], ["a"]) == [{**ENTRIES[0], "answer": "a"}]
    table = show_answers(ENTRIES, {"base": [*"abcd"]}, count=2)
    assert table.index.tolist() == ["past", "plural"] and table["base"].tolist() == ["c", "b"]
    assert [*table.columns] == ["instruction", "input", "right", "base"]


def test_the_scores_of_several_models_stand_side_by_side():
    table = tabulate_scores(ENTRIES, {"base": [""] * 4, "ours": [*RIGHT[:3], "no"]})
    assert table["ours"].to_dict() == {"past": 50.0, "plural": 100.0, "all": 75.0, "F1, all": 75.0}
    assert not table["base"].any()


def made_up(**changes):
    return {"title": "LoRA", "tuning": False, "rate": 1e-3, "trained": 1000, "validation_loss": 1.0,
            "test": 0.5, "test_f1": 0.75, "test_loss": 1.0, **changes}


def test_the_comparison_has_means_and_spreads_of_the_seeds():
    rows = [made_up(title="base model"), made_up(), made_up(test=0.7), made_up(tuning=True, test=0.0)]
    table = tabulate_comparison(rows)
    assert table.index.tolist() == ["base model", "LoRA"]
    assert table.loc["LoRA", "exact (%)"] == "60.0 ± 14.1" and table.loc["LoRA", "runs"] == "2"
    assert table.loc["base model", "exact (%)"] == "50.0"
    assert tabulate_comparison([]).empty


def test_the_tasks_have_the_means_of_the_seeds():
    some = {"exact_last": 0.5, "exact_new_wording": 0.2, "f1_last": 0.9}
    rows = [made_up(**some), made_up(**some | {"exact_last": 1.0}), made_up(tuning=True)]
    table = tabulate_tasks([*rows, made_up(title="base model", **some)])
    assert table["LoRA"].to_dict() == {"last": 75.0, "new wordings": 20.0}
    assert table["base model"].to_dict() == {"last": 50.0, "new wordings": 20.0}
    assert tabulate_tasks(rows, "f1")["LoRA"].to_dict() == {"last": 90.0}


def test_every_stored_run_is_one_of_a_contender_on_the_short_instructions():
    rows = read_rows(INSTRUCTION_RUNS)
    contenders = {each.title: each for each in (*INSTRUCTION_APPROACHES, BASE)}
    counts = {name: len(part) for name, part in load_short_instructions().items()}
    assert {row["title"] for row in rows} <= contenders.keys()
    for row in rows:
        assert asdict(contenders[row["title"]]).items() <= row.items()
        assert (row["data"], row["model"], row["counts"]) == ("embedded", "tiny", counts)
        assert row["epochs"] == InstructionSettings().epochs


def test_the_stored_comparison_is_finished():
    runs = finished_runs(read_rows(INSTRUCTION_RUNS))
    assert {*runs["title"]} == {each.title for each in INSTRUCTION_APPROACHES}
    assert at_the_edge(runs) == []


def test_a_figure_has_a_curve_per_training_and_a_bar_per_task():
    histories = {"LoRA": TextHistory(validation={0: 5.0, 10: 2.0}), "all": TextHistory(validation={0: 5.0})}
    figure = plot_answer_loss(histories)
    assert [[*line.get_ydata()] for line in figure.axes[0].lines] == [[5, 2], [5]]
    assert find_faults(figure) == []
    exact = pd.DataFrame({"base": [0.0, 10, 5, 20], "LoRA": [50.0, 60, 55, 70]},
                         index=["past", "plural", "all", "F1, all"])
    figure = plot_tasks(exact)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0, 10, 50, 60]
    assert find_faults(figure) == []
