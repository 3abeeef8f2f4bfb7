"""Imports point downward through the layers of the table, without circles, at the top of each file.

The tests read the modules' syntax trees; they import nothing.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath

import pytest

from book_assets.table import REPOSITORY

CHAPTERS = {"ch06", "ch05", "ch04"}
SHARED = {"book_assets", "book_figures"}
BELOW_SPAM_CLASSIFIER = {"lora", "fast_path", "appendix_e"} | CHAPTERS | SHARED
BELOW_APPLICATIONS = {"spam_classifier"} | BELOW_SPAM_CLASSIFIER
BELOW_COMPARISON = {"film_reviews", "instructions", "language_model"} | BELOW_APPLICATIONS
LAYERS = {  # from the top: each folder, or file of appendix-E or setup, and what it may import besides itself
    "topics": {"comparison"} | BELOW_COMPARISON,
    "comparison": BELOW_COMPARISON,
    "benchmark": BELOW_APPLICATIONS | {"finetune_spam"},  # measures it; nobody imports benchmark
    "lora_in_practice": BELOW_APPLICATIONS,
    "finetune_spam": BELOW_APPLICATIONS,
    "listings": CHAPTERS,
    "spam_classifier": BELOW_SPAM_CLASSIFIER,
    "instructions": {"language_model", "lora", "fast_path", "appendix_e"} | CHAPTERS | SHARED,
    "language_model": {"lora", "fast_path", "appendix_e"} | CHAPTERS | SHARED,
    "film_reviews": {"lora"} | CHAPTERS | SHARED,
    "lora": {"appendix_e"},  # a project copies these two
    "fast_path": {"appendix_e", "ch04"},
    "appendix_e": set(),  # only PyTorch: see the test
    "sample_messages": {"ch06"} | SHARED,
    "ch06": {"ch05", "ch04"} | SHARED,
    "ch05": {"ch04"} | SHARED,  # ch05, gpt_download and pretrain_tiny
    "ch04": SHARED,
    "setup": {"make_environment"} | SHARED,  # the commands
    "make_environment": set(),  # runs before anything is installed
    "book_assets": set(),
    "book_figures": set(),
}
SEPARATE = {"topics": 2, "setup": 1}  # topics, and commands, never import each other; their place in a path

# Imports inside functions: never of our own modules, of others only with a reason.
PLOTS = "slow to import, and only plots need it"
CONTENDER = "slow to import, and only this contender of the benchmark may have it in memory"
LATE = {  # file: {package: reason}
    "appendix-E/benchmark/report.py": {"matplotlib": PLOTS},
    "appendix-E/benchmark/sides.py": {"transformers": CONTENDER, "peft": CONTENDER},
    "appendix-E/fast_path/memory.py": {"resource": "missing on Windows"},
    "ch05/ch05.py": {"matplotlib": PLOTS},
    "ch05/gpt_download.py": {
        "tensorflow": "slow to import, optional, and only OpenAI's checkpoints need it",
        "safetensors": "only Hugging Face's weights need it",
    },
    "setup/book_assets/__init__.py": {
        "tiktoken": "the downloads need only the table",
    },
    "setup/book_figures/display.py": {"IPython": "only notebooks need it, and the main requirements lack it"},
}


PRINTED = "appendix-E/appendix_e.py"
BEFORE_INSTALLATION = (
    "setup/run_main.py", "setup/run_tests.py", "setup/run_notebooks.py", "setup/make_environment.py",
    "setup/book_assets/__init__.py", "setup/book_assets/command_line.py", "setup/book_assets/table.py",
)


def read_sources():
    """Return {path in the repository: text} of every module of ours."""
    paths = sorted(REPOSITORY.glob("[acs]*/**/*.py"))
    return {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def find_part(path):
    """Return the entry of LAYERS for a file: ch05 for ch05/gpt_download.py."""
    folder, name, *_ = PurePosixPath(path).with_suffix("").parts
    return name if name in LAYERS else folder


def find_member(path):
    """Return the topic or the command that a file belongs to, None elsewhere."""
    place = SEPARATE.get(find_part(path))
    return place and PurePosixPath(path).with_suffix("").parts[place]


def module_name(path):
    """Return the name that imports a file: lora.layers, ch04, book_assets."""
    return ".".join(PurePosixPath(path).with_suffix("").parts[1:]).removesuffix(".__init__")


def find_imports(path, text):
    """Yield (name, whether it is in a function) for each import; the name for `from a import b` is a.b."""
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    late = {inner for function in functions for inner in ast.walk(function)}
    package = PurePosixPath(path).parent.parts[1:]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*base, *filter(None, [node.module])))
            yield from ((f"{start}.{alias.name}", node in late) for alias in node.names)


def find_file(name, files):
    """Return the file of the module `name`, or of the module that defines `name`; None if it is not ours."""
    return files.get(name) or files.get(name.rpartition(".")[0])


def find_faults(sources):
    """Return one sentence per import that breaks a rule, with both files."""
    files, graph, faults = {module_name(path): path for path in sources}, {}, []
    for path, text in sources.items():
        for name, late in find_imports(path, text):
            if target := find_file(name, files):
                graph.setdefault(path, set()).add(target)
                faults += check_import(path, target, late)
            elif late and top_package(name) not in LATE.get(path, {}):
                faults.append(f"{path} imports {name} in a function, without a reason in LATE")
    return [*dict.fromkeys(faults), *find_circle(graph)]


def check_import(path, target, late):
    """Yield what is wrong with the import of one file of ours by another."""
    if late:
        yield f"{path} imports {target} in a function"
    part, other = find_part(path), find_part(target)
    if other not in {part, *LAYERS.get(part, ())}:
        yield f"{path} imports {target}, which is not below it"
    if part == other and find_member(target) not in ("__init__", find_member(path)):
        yield f"{path} imports {target}, which is beside it"


def find_circle(graph):
    """Yield one circle in {file: files that it imports}, if there is any."""
    graph = {path: targets - {path} for path, targets in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "a circle: " + " imports ".join(reversed(error.args[1]))


def top_package(name):
    return name.split(".")[0]


def test_imports_point_downward_without_circles_and_at_the_top_of_the_file():
    faults = find_faults(read_sources())
    assert not faults, "\n".join(faults)


def test_every_part_of_the_repository_is_in_the_table_and_the_table_has_no_circle():
    assert {find_part(path) for path in read_sources()} <= LAYERS.keys()
    TopologicalSorter(LAYERS).prepare()


def test_every_late_import_on_the_list_is_still_there():
    sources = read_sources()
    for path, packages in LATE.items():
        late = {top_package(name) for name, late in find_imports(path, sources[path]) if late}
        assert packages.keys() <= late, f"{path}: no longer late: {packages.keys() - late}"


def test_the_printed_appendix_imports_nothing_but_pytorch():
    names = {top_package(name) for name, _ in find_imports(PRINTED, read_sources()[PRINTED])}
    assert names - {*sys.stdlib_module_names} == {"torch"}


def test_what_a_project_copies_imports_nothing_but_pytorch_and_safetensors():
    ours = {"lora", "appendix_e"}
    for path, text in read_sources().items():
        if find_part(path) == "lora":
            names = {top_package(name) for name, _ in find_imports(path, text)}
            assert names - {*sys.stdlib_module_names} - ours <= {"torch", "safetensors"}, path


@pytest.mark.parametrize("path", BEFORE_INSTALLATION)
def test_what_runs_before_anything_is_installed_needs_only_the_standard_library(path):
    imports = find_imports(path, read_sources()[path])
    names = {name for name, late in imports if not late and top_package(name) not in sys.stdlib_module_names}
    ours = {f"setup/{top_package(name)}" for name in names}
    assert ours <= {"setup/book_assets", "setup/make_environment"}
    files = {module_name(file): file for file in read_sources()}
    assert {find_file(name, files) for name in names} <= {*BEFORE_INSTALLATION}


@pytest.mark.parametrize("path", BEFORE_INSTALLATION)
def test_what_says_which_python_is_needed_runs_on_older_ones(path):
    ast.parse(read_sources()[path], feature_version=(3, 8))


def test_no_test_imports_a_test_and_each_says_what_it_tests():
    for path in (REPOSITORY / "tests").glob("**/*.py"):
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        names = [name for name, _ in find_imports(path.name, text) if "test_" in name]
        assert not names, f"{path} imports {names}"


# Made-up repositories that break one rule each

UP = {
    "appendix-E/lora/layers.py": "from spam_classifier.classifier import CLASSES",
    "appendix-E/spam_classifier/classifier.py": "",
}
SIDEWAYS = {"appendix-E/lora/layers.py": "import fast_path.linears", "appendix-E/fast_path/linears.py": ""}
CIRCLE = {
    "appendix-E/lora/layers.py": "from . import adapters",
    "appendix-E/lora/adapters.py": "from .peft_format import export_peft",
    "appendix-E/lora/peft_format.py": "from lora.layers import merge_lora",
}
TOPICS = {"appendix-E/topics/qlora.py": "from topics.dora import DoRA", "appendix-E/topics/dora.py": ""}
COMMANDS = {"setup/run_main.py": "import fetch_assets", "setup/fetch_assets.py": ""}
FUNCTION = {"ch05/ch05.py": "def load():\n    from ch04 import GPTModel", "ch04/ch04.py": ""}
METHOD = {
    "setup/fetch_assets.py": "class A:\n  def b(self):\n    if self:\n      import book_assets.table",
    "setup/book_assets/table.py": "",
}


@pytest.mark.parametrize("sources, fault", [
    (UP, "lora/layers.py imports appendix-E/spam_classifier/classifier.py, which is not below it"),
    (SIDEWAYS, "lora/layers.py imports appendix-E/fast_path/linears.py, which is not below it"),
    (TOPICS, "topics/qlora.py imports appendix-E/topics/dora.py, which is beside it"),
    (COMMANDS, "setup/run_main.py imports setup/fetch_assets.py, which is beside it"),
    (FUNCTION, "ch05/ch05.py imports ch04/ch04.py in a function"),
    (METHOD, "setup/fetch_assets.py imports setup/book_assets/table.py in a function"),
    ({"ch04/ch04.py": "def f():\n    import pandas as pd"}, "ch04/ch04.py imports pandas in a function"),
])
def test_an_import_that_breaks_a_rule_is_found_with_both_files(sources, fault):
    (found,) = find_faults(sources)
    assert fault in found


def test_a_circle_is_found_with_its_files_in_order():
    (found,) = find_faults(CIRCLE)
    assert found.startswith("a circle: ") and found.count(" imports ") == 3
    for one, other in (("layers", "adapters"), ("adapters", "peft_format"), ("peft_format", "layers")):
        assert f"lora/{one}.py imports appendix-E/lora/{other}.py" in found


def test_imports_that_the_table_allows_are_no_faults():
    assert find_faults({
        "appendix-E/topics/qlora.py": "import torch\nfrom lora.layers import merge_lora\nimport book_assets",
        "appendix-E/topics/page/draw.py": "from topics.page import data",
        "appendix-E/topics/page/data.py": "",
        "appendix-E/lora/layers.py": "import appendix_e\nfrom . import __doc__",
        "appendix-E/lora/__init__.py": "",
        "appendix-E/appendix_e.py": "if True:\n    import torch",
        "ch05/ch05.py": "from gpt_download import load",
        "ch05/gpt_download.py": "from book_assets.table import A\ndef f():\n    import tensorflow as tf",
        "setup/book_assets/__init__.py": "from book_assets.table import ASSETS",
        "setup/book_assets/table.py": "",
        "setup/run_main.py": "import make_environment",
        "setup/make_environment.py": "",
    }) == []
