"""Run notebooks from top to bottom and store their outputs, after a change to one.

    python setup/execute_notebooks.py --assets model=embedded,data=book ch06/ch06.ipynb

A notebook runs in its own folder, as in Jupyter. It is written only if every cell ran without an error.
"""

import argparse
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from book_assets.files import replacing


def execute(path):
    """Run the notebook at `path` and write it back, with no metadata but the kernel and the cells' tags."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", coalesce_streams=True, resources=folder
    ).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    with replacing(path) as partial:
        nbformat.write(notebook, partial)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--assets", default="model=embedded,data=book", help="see DOWNLOADS.md")
    args = parser.parse_args()
    os.environ |= {"LLM_ASSETS": args.assets, "TQDM_DISABLE": "1"}
    for path in args.notebooks:
        start = time.perf_counter()
        execute(path.resolve())
        print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
