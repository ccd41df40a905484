"""`tsdkd report`: what a run or several did, as a page and as figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from tsdkd.checks import check_writable
from tsdkd.data.runs import REPORT, runs_in


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd report",
        allow_abbrev=False,
        description="Write a page of a run's losses, entropies, lengths, scores, times, completions, or of several runs, one "
        "over the other. tsdkd train, demo and compare write one by themselves; a broken or unfinished run gives a page that "
        "says what is missing.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR", help="a run's output_dir, or a folder of such")
    parser.add_argument("--out", type=Path, help=f"the page (default: {REPORT}, in the folder of a single run)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="draw each panel as a PNG into this folder, too")
    parser.add_argument("--pdf", type=Path, metavar="DIR", help="draw each panel as a PDF into this folder, too")
    own = parser.parse_args(arguments)
    runs = runs_in(own.folders)
    alone = len(own.folders) == 1
    out = own.out or (own.folders[0] / REPORT if alone else Path(REPORT))
    check_writable("out", out)
    for name in ("png", "pdf"):
        folder = getattr(own, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"--{name} {folder} is a file: name a folder, the panels' figures go into it.")

    from tsdkd.reporting.figures import draw_runs
    from tsdkd.reporting.pages import as_bytes
    from tsdkd.reporting.run_page import run_page

    text = run_page(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(as_bytes(text))
    print(f"{len(runs)} run{'s' if len(runs) > 1 else ''}: the page is {out}")
    for run in runs:
        for told in run.missing:
            print(f"{run.folder}: {told}")
    for folder, suffix in ((own.png, ".png"), (own.pdf, ".pdf")):
        if folder is not None:
            print(f"{len(draw_runs(runs, folder, suffix))} figures are in {folder}")
    return 0
