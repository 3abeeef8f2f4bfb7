"""What a notebook shows is what its modules contain, and nothing is defined twice."""

import difflib
import re
from itertools import pairwise

import pytest

from book_assets.table import REPOSITORY
from notebooks import ABRIDGED, FRAME, all_cells, cells, definitions, source

LORA = tuple(
    f"appendix-E/lora/{name}"
    for name in ("targets", "layers", "wrappers", "adapters", "files", "peft_format", "peft_tensors")
)
SPAM = ("appendix-E/spam_classifier/evaluation", "appendix-E/spam_classifier/experiments")
REVIEWS = ("appendix-E/film_reviews/encoder", "appendix-E/comparison/reviews")
INSTRUCTIONS = tuple(f"appendix-E/instructions/{name}" for name in ("data", "collate", "training", "scores"))
STYLES = (
    "appendix-E/comparison/styles", "appendix-E/language_model/generation",
    "appendix-E/language_model/training",
)
MIRRORS = {  # notebook: the modules whose definitions it shows
    "ch04/ch04": ("ch04/ch04",),
    "ch05/ch05": ("ch05/ch05", "ch05/gpt_checkpoint"),
    "ch06/ch06": ("ch06/ch06", "ch05/gpt_checkpoint"),
    "appendix-E/appendix-E": ("appendix-E/appendix_e",),
    "appendix-E/topics/inside-lora": ("appendix-E/topics/inside_lora", *LORA),
    "appendix-E/topics/what-lora-buys": ("appendix-E/topics/what_lora_buys", *SPAM),
    "appendix-E/topics/lora-variants": ("appendix-E/topics/lora_variants",),
    "appendix-E/topics/instruction-finetuning": (
        "appendix-E/topics/instruction_finetuning", *INSTRUCTIONS,
    ),
    "appendix-E/topics/lora-embedding-conv": (
        "appendix-E/topics/lora_embedding_conv", "appendix-E/comparison/new_words",
        "appendix-E/comparison/digits",
    ),
    "appendix-E/topics/encoder-reviews": ("appendix-E/topics/encoder_reviews", *REVIEWS),
    "appendix-E/topics/text-generation": ("appendix-E/topics/text_generation", *STYLES),
    "appendix-E/topics/qlora": (
        "appendix-E/topics/qlora", "appendix-E/lora/codes", "appendix-E/lora/quantized",
    ),
}

# What is in a notebook alone, and why.
DRAWING = "draws or measures something in the notebook alone"
TRY_OUT = "tries a definition out, in the notebook alone"
NOTEBOOK_ONLY = {
    "count": TRY_OUT, "relative_change": DRAWING, "accuracy_by_loader": DRAWING, "versus": TRY_OUT,
    "LastRealToken": TRY_OUT, "distilbert": TRY_OUT, "spam_probability": DRAWING, "new_model": TRY_OUT,
    "report": TRY_OUT, "show_neighbours": TRY_OUT, "ordinary": TRY_OUT, "crossing": DRAWING,
}

BOOK_NAMES = {
    "ch04/ch04": """GPT_CONFIG_124M DummyGPTModel DummyTransformerBlock DummyLayerNorm LayerNorm GELU
        FeedForward MultiHeadAttention TransformerBlock GPTModel ExampleDeepNeuralNetwork print_gradients
        generate_text_simple""",
    "ch05/ch05": """GPTDatasetV1 create_dataloader_v1 text_to_token_ids token_ids_to_text calc_loss_batch
        calc_loss_loader train_model_simple evaluate_model generate_and_print_sample plot_losses generate
        assign load_weights_into_gpt""",
    "ch06/ch06": """download_and_unzip_spam_data create_balanced_dataset random_split SpamDataset
        calc_accuracy_loader calc_loss_batch calc_loss_loader evaluate_model train_classifier_simple
        plot_values classify_review""",
    "appendix-E/appendix-E": "LoRALayer LinearWithLoRA replace_linear_with_lora",
    "appendix-E/topics/inside-lora": """apply_lora merge_lora unmerge_lora take_adapter set_adapter
        export_peft""",
}
SHARED_NAMES = {  # a chapter's own version under a name that an earlier chapter has, and why
    "calc_loss_batch": "chapter 6's loss reads the last token only",
    "calc_loss_loader": "binds chapter 6's calc_loss_batch to chapter 5's body",
    "evaluate_model": "binds chapter 6's calc_loss_batch to chapter 5's body",
    "main": "every script has one",
    "write_whole": "lora/ is copied into other projects without the assets' module",
    "REPOSITORY": "the set-up scripts run before anything is installed, on any Python",
    "VARIANTS": "LoRA's relatives; chapter 6's are other ways to train its classifier",
    "SEEDS": "chapter 6's comparison has three, appendix E's five",
}


def module_source(notebook):
    return "\n\n".join((REPOSITORY / f"{m}.py").read_text(encoding="utf-8") for m in MIRRORS[notebook])


def notebook_source(notebook, without=()):
    """Return the notebook's own code, but for cells with one of the tags `without`."""
    code = [
        source(cell) for cell in cells(REPOSITORY / f"{notebook}.ipynb")
        if not {FRAME, *without} & {*cell["metadata"].get("tags", [])}
    ]
    return re.sub(r"^[%!].*$", "", "\n\n".join(code), flags=re.MULTILINE)


@pytest.mark.parametrize("notebook", MIRRORS)
def test_what_is_in_both_is_the_same_text(notebook):
    ours = definitions(module_source(notebook))
    theirs = definitions(notebook_source(notebook, without=(ABRIDGED,)))
    assert ours.keys() & theirs.keys(), f"{notebook} shares no definition with its modules"
    differences = [
        "\n".join(difflib.unified_diff(
            ours[name].splitlines(), theirs[name].splitlines(), f"{name}, module", "notebook", lineterm=""
        ))
        for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]
    ]
    assert not differences, "\n\n".join(["differs (docstrings apart):", *differences])


def test_what_only_notebooks_define_is_allowed_with_a_reason():
    alone = set()
    for notebook in MIRRORS:
        ours, theirs = definitions(module_source(notebook)), definitions(notebook_source(notebook))
        alone |= {name for name in theirs.keys() - ours.keys() if not name.isupper()}
    assert alone == NOTEBOOK_ONLY.keys()
    assert all(len(reason.split()) > 2 for reason in NOTEBOOK_ONLY.values())


@pytest.mark.parametrize("notebook", BOOK_NAMES)
def test_every_printed_name_is_defined_in_the_notebook_and_in_the_module(notebook):
    names = set(BOOK_NAMES[notebook].split())
    for text in (module_source(notebook), notebook_source(notebook)):
        assert names - definitions(text).keys() == set()


def test_an_abridged_cell_says_what_the_module_adds():
    for notebook, modules in MIRRORS.items():
        found = all_cells(REPOSITORY / f"{notebook}.ipynb")
        for cell, following in pairwise(found):
            if ABRIDGED in cell["metadata"].get("tags", []):
                names = [module.rpartition("/")[2] for module in modules]
                assert following["cell_type"] == "markdown"
                assert any(f"{name}.py" in source(following) for name in names), source(cell)[:80]


def test_nothing_is_defined_in_two_modules():
    seen = {}
    for path in sorted(REPOSITORY.glob("[acs]*/**/*.py")):
        if not path.stem.startswith("listing"):
            for name in definitions(path.read_text(encoding="utf-8")):
                seen.setdefault(name, []).append(path.name)
    twice = {name: files for name, files in seen.items() if len(files) > 1}
    assert twice.keys() <= SHARED_NAMES.keys(), {n: f for n, f in twice.items() if n not in SHARED_NAMES}


def test_a_notebook_does_not_redefine_what_another_defines():
    earlier = {}
    for notebook in MIRRORS:
        for name in definitions(notebook_source(notebook)):
            if not name.isupper():
                assert name in SHARED_NAMES or name not in earlier, f"{name}: {earlier[name]} and {notebook}"
                earlier[name] = notebook


def test_the_comparison_sees_a_changed_line_but_not_a_docstring():
    one = definitions('def f(x):\n    """Say."""\n\n    return x + 1')
    assert one == definitions("def f(x):\n    return x + 1")
    assert one != definitions("def f(x):\n    return x + 2")
