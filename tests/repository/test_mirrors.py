"""A notebook and its module hold the same definitions, and nothing is defined twice."""

import ast
import difflib
import json
import re

import pytest

from book_assets.table import REPOSITORY

PAIRS = {
    "ch04": "ch04/ch04",
    "ch05": "ch05/ch05",
    "ch06": "ch06/ch06",
    "appendix_e": "appendix-E/appendix-E",
    "lora_in_practice": "appendix-E/lora-in-practice",
}

# What stands in one of the two only, and why.
STEP = "a step of the command line's job, which the notebook does cell by cell"
DRAWING = "draws or measures something in the notebook alone"
TRY_OUT = "tries a definition out, in the notebook alone"
ALLOWED = {
    "ch04": {
        "KVCache": "bookkeeping, imported in 4.7 and explained there",
        "LayerCache": "bookkeeping, the part of KVCache for one layer",
        "count": TRY_OUT,
    },
    "appendix_e": {
        "load_pretrained": STEP, "prepare_datasets": STEP, "make_loaders": STEP, "accuracy_by_part": STEP,
        "put_lora_in": STEP, "train_with_lora": STEP, "save_plots": STEP, "accuracy_table": STEP,
        "describe_machine": STEP, "run_main_job": STEP, "main_job_arguments": STEP, "main": STEP,
        "matrix_box": DRAWING, "path_arrow": DRAWING, "relative_change": DRAWING,
        "accuracy_by_loader": DRAWING,
    },
    "lora_in_practice": {
        "small_model": TRY_OUT, "pretend_training": TRY_OUT, "update": TRY_OUT, "seconds": TRY_OUT,
        "versus": TRY_OUT,
    },
}

# A notebook whose module only gathers others (and a command line) mirrors those that it teaches.
PARTS = {"lora_in_practice": ("lora_layers", "lora_adapters", "lora_peft", "lora_evaluation")}

BOOK_NAMES = {
    "ch04": """GPT_CONFIG_124M DummyGPTModel DummyTransformerBlock DummyLayerNorm LayerNorm GELU FeedForward
        MultiHeadAttention TransformerBlock GPTModel ExampleDeepNeuralNetwork print_gradients
        generate_text_simple""",
    "ch05": """GPTDatasetV1 create_dataloader_v1 text_to_token_ids token_ids_to_text calc_loss_batch
        calc_loss_loader train_model_simple evaluate_model generate_and_print_sample plot_losses generate
        assign load_weights_into_gpt""",
    "ch06": """download_and_unzip_spam_data create_balanced_dataset random_split SpamDataset
        calc_accuracy_loader calc_loss_batch calc_loss_loader evaluate_model train_classifier_simple
        plot_values classify_review""",
    "appendix_e": "LoRALayer LinearWithLoRA replace_linear_with_lora",
    "lora_in_practice": """apply_lora merge_lora unmerge_lora save_adapter load_adapter export_peft
        import_peft""",  # count_parameters is appendix E's
}
SHARED_NAMES = {  # a chapter's own version under a name that an earlier chapter has, and why
    "calc_loss_batch": "chapter 6's loss reads the last token only",
    "calc_loss_loader": "binds chapter 6's calc_loss_batch to chapter 5's body",
    "evaluate_model": "binds chapter 6's calc_loss_batch to chapter 5's body",
    "main": "every script has one",
    "REPOSITORY": "the set-up scripts run before anything is installed, on any Python",
}


def module_source(module):
    folder = REPOSITORY / PAIRS[module].split("/")[0]
    files = [folder / f"{name}.py" for name in PARTS.get(module, (module,))]
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def notebook_source(module):
    notebook = json.loads((REPOSITORY / f"{PAIRS[module]}.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return re.sub(r"^[%!].*$", "", "\n\n".join(cells), flags=re.MULTILINE)


def without_docstrings(node):
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return node


def definitions(source):
    """Name → source text, without docstrings and comments, of top-level functions, classes and constants."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.unparse(without_docstrings(node))
        elif isinstance(node, ast.Assign) and (name := getattr(node.targets[0], "id", "")).isupper():
            found[name] = ast.unparse(node)
    return found


def difference(module, name):
    ours, theirs = definitions(module_source(module))[name], definitions(notebook_source(module))[name]
    lines = difflib.unified_diff(
        ours.splitlines(), theirs.splitlines(), f"{module}.py", f"{PAIRS[module]}.ipynb", lineterm=""
    )
    return "\n".join(lines)


@pytest.mark.parametrize("module", PAIRS)
def test_what_stands_in_both_is_the_same(module):
    both = definitions(module_source(module)).keys() & definitions(notebook_source(module)).keys()
    assert both, f"{module}.py and its notebook share no definition at all"
    differences = [text for name in sorted(both) if (text := difference(module, name))]
    assert not differences, "\n\n".join(["differs (docstrings apart):", *differences])


@pytest.mark.parametrize("module", PAIRS)
def test_what_stands_in_one_only_is_allowed_with_a_reason(module):
    ours, theirs = definitions(module_source(module)), definitions(notebook_source(module))
    one_only = {name for name in ours.keys() ^ theirs.keys() if name in ours or not name.isupper()}
    allowed = ALLOWED.get(module, {})
    assert one_only - allowed.keys() == set(), "mirror it, or put it on ALLOWED with a reason"
    assert allowed.keys() - one_only == set(), "no longer needed in ALLOWED"
    assert all(len(reason.split()) > 2 for reason in allowed.values())


@pytest.mark.parametrize("module", BOOK_NAMES)
def test_every_printed_name_is_defined_in_the_notebook_and_in_the_module(module):
    names = set(BOOK_NAMES[module].split())
    assert names & ALLOWED.get(module, {}).keys() == set()
    for source in (module_source(module), notebook_source(module)):
        assert names - definitions(source).keys() == set()


def test_nothing_is_defined_in_two_modules():
    seen = {}
    for path in sorted(REPOSITORY.glob("*/*.py")):
        if path.parent.name == "tests" or path.stem.startswith("listing"):
            continue
        for name in definitions(path.read_text(encoding="utf-8")):
            seen.setdefault(name, []).append(path.name)
    twice = {name: files for name, files in seen.items() if len(files) > 1}
    assert twice.keys() <= SHARED_NAMES.keys(), {n: f for n, f in twice.items() if n not in SHARED_NAMES}


def test_a_notebook_does_not_redefine_what_an_earlier_chapter_defines():
    earlier = {}
    for module in PAIRS:
        for name in definitions(notebook_source(module)):
            if not name.isupper():
                assert name in SHARED_NAMES or name not in earlier, f"{name}: {earlier[name]} and {module}"
                earlier[name] = module


def test_the_comparison_sees_a_changed_line_but_not_a_docstring():
    one = definitions('def f(x):\n    """Say."""\n    return x + 1')
    assert one == definitions("def f(x):\n    return x + 1  # a comment")
    assert one != definitions("def f(x):\n    return x + 2")
