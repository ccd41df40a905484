"""The notebook is executed, with two steps in place of sixty."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of zmq's event loops
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("STEPS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(path, 4)
    assert not any(cell.get("outputs") for cell in book.cells)  # none is kept: they name this machine
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=400, kernel_name="python3", resources=place).execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", []) if "data" in output]
    pages = [output["data"]["text/html"] for output in shown if "text/html" in output["data"]]
    assert sum("<iframe srcdoc=" in page for page in pages) == 2  # the token table, before and after
    assert (tmp_path / "notebook-run" / "report.html").is_file()
