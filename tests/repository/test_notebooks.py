"""Every notebook runs from top to bottom with the embedded model and data, and is committed executed."""

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from book_assets.table import REPOSITORY
from notebooks import NOTEBOOK_LINES

NOTEBOOKS = sorted(
    path for path in REPOSITORY.glob("*/*.ipynb") if not path.parent.name.startswith((".", "build"))
)
MIN_COMPARED = 5
CHECK, SKIP = "NBVAL_CHECK_OUTPUT", "NBVAL_SKIP"
ids = [path.name for path in NOTEBOOKS]


def cells(path, kind="code"):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind and "".join(cell["source"]).strip()]


def marked(path, marker):
    return [cell for cell in cells(path) if f"# {marker}" in "".join(cell["source"])]


def test_every_chapter_has_its_notebook():
    expected = {"ch04.ipynb", "ch05.ipynb", "ch06.ipynb", "appendix-E.ipynb", "lora-in-practice.ipynb"}
    assert expected <= set(ids)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_executes_offline_and_its_checked_outputs_come_out(path, tmp_path, request):
    copy = shutil.copy(path, tmp_path)  # what it writes goes to the temporary folder
    report = tmp_path / "report.xml"
    environment = os.environ | {
        "LLM_ASSETS": "embedded", "NOTEBOOK_QUICK": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "",
    }
    environment = {name: value for name, value in environment.items() if value}
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=240",
            "-p", "no:cacheprovider", "--rootdir", str(tmp_path), f"--junit-xml={report}", "-q", str(copy),
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    suite = ET.parse(report).getroot().find("testsuite")
    executed = int(suite.get("tests")) - int(suite.get("skipped"))
    compared, skipped = len(marked(path, CHECK)), len(marked(path, SKIP))
    request.config.stash[NOTEBOOK_LINES].append(
        f"{path.name}: {executed} cells executed, {compared} of them compared, {skipped} skipped"
    )
    assert executed == len(cells(path)) - skipped
    if path.name != "check_environment.ipynb":
        assert compared >= MIN_COMPARED


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_is_committed_run_from_top_to_bottom(path):
    code = cells(path)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_skipped_cells_say_why_and_checked_cells_have_outputs(path):
    for cell in marked(path, SKIP):
        line = next(line for line in cell["source"] if SKIP in line)
        assert len(line.split(SKIP)[1].split()) > 2, f"no reason: {line}"
    for cell in marked(path, CHECK):
        assert cell["outputs"], "nothing to compare: " + "".join(cell["source"])[:80]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_pictures_have_alternative_text_and_code_lines_fit(path):
    for cell in cells(path):
        for line in "".join(cell["source"]).splitlines():
            assert len(line) <= 78, line
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                html, alt = output["data"].get("text/html", ""), output["metadata"].get("image/png", {})
                assert 'alt="' in html or alt.get("alt"), "".join(cell["source"])[:80]
