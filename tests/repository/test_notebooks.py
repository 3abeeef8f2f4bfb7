"""Every notebook runs from top to bottom with the embedded model and data, and is committed executed."""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from notebooks import ABRIDGED, CHECK, FRAME, NOTEBOOKS, SKIP, all_cells, cells, source, tagged

MIN_COMPARED = 5
MOST_CELLS, MOST_CELLS_OF_A_CHAPTER = 60, 90
LONGER = {"lora-variants": 70}  # teaches nine methods
MOST_CODE_CELLS_IN_A_ROW = 3
CHAPTERS = ("ch04", "ch05", "ch06", "appendix-E")
ids = [path.name for path in NOTEBOOKS]


def test_every_chapter_has_its_notebook():
    expected = {
        "ch04.ipynb", "ch05.ipynb", "ch06.ipynb", "appendix-E.ipynb", "lora-in-practice.ipynb",
        "inside-lora.ipynb", "what-lora-buys.ipynb", "lora-variants.ipynb",
        "lora-embedding-conv.ipynb", "text-generation.ipynb", "instruction-finetuning.ipynb", "qlora.ipynb",
    }
    assert expected <= set(ids)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_executes_offline_and_its_checked_outputs_come_out(path, tmp_path, record_property):
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
    compared, skipped = len(tagged(path, CHECK)), len(tagged(path, SKIP))
    line = f"{path.name}: {executed} cells executed, {compared} of them compared, {skipped} skipped"
    record_property("notebook", line)
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
def test_checked_cells_have_outputs_and_tags_are_known(path):
    for cell in tagged(path, CHECK):
        assert cell["outputs"], "nothing to compare: " + source(cell)[:80]
    used = {tag for cell in cells(path) for tag in cell["metadata"].get("tags", [])}
    assert used <= {CHECK, SKIP, ABRIDGED, FRAME}
    assert not any("NBVAL" in source(cell) for cell in cells(path)), "use a tag"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_code_is_interrupted_by_sentences(path):
    kinds = [cell["cell_type"] for cell in all_cells(path) if FRAME not in cell["metadata"].get("tags", [])]
    most = MOST_CELLS_OF_A_CHAPTER if path.stem in CHAPTERS else LONGER.get(path.stem, MOST_CELLS)
    assert len(kinds) <= most
    runs = "".join("c" if kind == "code" else " " for kind in kinds).split()
    assert max(map(len, runs)) <= MOST_CODE_CELLS_IN_A_ROW


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_pictures_have_alternative_text_and_code_lines_fit(path):
    for cell in cells(path):
        for line in source(cell).splitlines():
            assert len(line) <= 88, line
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                html, alt = output["data"].get("text/html", ""), output["metadata"].get("image/png", {})
                assert 'alt="' in html or alt.get("alt"), source(cell)[:80]
