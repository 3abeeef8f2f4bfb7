"""Run notebooks from top to bottom and store their outputs, after a change to one.

    python setup/execute_notebooks.py --assets model=embedded,data=book ch06/ch06.ipynb

A notebook runs in its own folder, as in Jupyter, with its full training runs. It is written only if every
cell ran without an error.
"""

import argparse
import os
import time
from pathlib import Path

from book_assets.command_line import add_assets_flag, command

# isort: split
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from book_assets import choose_assets
from book_assets.files import check_outputs, replacing

DEFAULT = "model=embedded,data=book"


def read_notebook(path):
    """Return the notebook at `path`. Raises OSError if it cannot be read, ValueError if it is none."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except OSError:
        raise
    except Exception as error:  # JSON of any kind may be in the file
        raise ValueError(f"{path} is not a notebook ({type(error).__name__}): name an .ipynb file") from error
    return notebook


def execute(path, **variables):
    """Run the notebook at `path` with these environment variables and write it back.

    Its only metadata are then the kernel and the cells' tags.
    Raises ValueError if a cell fails; the file then is as before.
    """
    notebook = read_notebook(path)
    folder = {"metadata": {"path": str(path.parent)}}
    try:
        NotebookClient(
            notebook, timeout=None, kernel_name="python3", coalesce_streams=True, resources=folder
        ).execute(env=os.environ | variables)
    except (CellExecutionError, DeadKernelError) as error:
        raise ValueError(f"{path}: {describe_failure(notebook, error)}; it was not changed") from error
    except AssertionError as error:  # nbclient's, after Ctrl-C has ended the kernel
        raise KeyboardInterrupt from error
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    with replacing(path) as partial:
        nbformat.write(notebook, partial)


def describe_failure(notebook, error):
    """Return the number of the cell that failed, counted as Jupyter does, with the last line of its error."""
    if isinstance(error, DeadKernelError):
        return "Python ended; the memory may not have been enough"
    count = max(cell.execution_count or 0 for cell in notebook.cells if cell.cell_type == "code")
    last_line = (error.evalue.strip().splitlines() or [""])[-1]
    return f"cell [{count}]: {error.ename}: {last_line}"


@command
def main(arguments=None):
    """Run the command, see --help."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    add_assets_flag(parser, default=DEFAULT)
    args = parser.parse_args(arguments)
    choice = args.assets or choose_assets(DEFAULT)
    for path in args.notebooks:
        read_notebook(path)
    check_outputs(*args.notebooks)
    assets = f"model={choice.model},data={choice.data}"
    for path in args.notebooks:
        start = time.perf_counter()
        execute(path.resolve(), LLM_ASSETS=assets, NOTEBOOK_QUICK="", TQDM_DISABLE="1")
        print(f"{path}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
