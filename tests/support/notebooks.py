"""What the tests of notebooks share: their cells, and the source of definitions without docstrings."""

import ast
import json

from book_assets.table import REPOSITORY

NOTEBOOKS = sorted(
    path
    for pattern in ("*/*.ipynb", "*/*/*.ipynb")
    for path in REPOSITORY.glob(pattern)
    if not any(part.startswith((".", "build")) for part in path.relative_to(REPOSITORY).parts)
)
CHECK, SKIP, ABRIDGED, FRAME = "nbval-check-output", "nbval-skip", "abridged", "frame"


def all_cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def cells(path):
    """Return the notebook's code cells that are not empty."""
    return [cell for cell in all_cells(path) if cell["cell_type"] == "code" and source(cell).strip()]


def source(cell):
    return "".join(cell["source"])


def tagged(path, tag):
    return [cell for cell in cells(path) if tag in cell["metadata"].get("tags", [])]


def definitions(text):
    """Return {name: source} of the top-level functions, classes and constants, without docstrings."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = without_docstrings(node, lines)
        elif isinstance(node, ast.Assign) and (name := getattr(node.targets[0], "id", "")).isupper():
            found[name] = without_docstrings(node, lines)
    return found


def without_docstrings(node, lines):
    """Return the lines of `node`, decorators included, without docstrings and blank lines."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    kept = dict(enumerate(lines[first - 1 : node.end_lineno], start=first))
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            docstring = inner.body[0]
            for number in range(docstring.lineno, docstring.end_lineno + 1):
                del kept[number]
    return "\n".join(line.rstrip() for line in kept.values() if line.strip())
