"""`tsdkd table`: rows of results as the paper's tables, beside the paper's own numbers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tsdkd.checks import check_writable


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd table",
        allow_abbrev=False,
        description="Lay the rows of tsdkd evaluate out as the paper's Tables 1 to 9, as far as they reach, with the paper's "
        "own numbers as a second block. A row belongs to a method by its label (--label tsd_kd, gkd, …, teacher, student).",
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSONL files of tsdkd evaluate")
    parser.add_argument(
        "--table",
        help="numbers of the paper's tables, comma-separated, or all (default: by the models that the rows name)",
    )
    parser.add_argument("--teacher", metavar="LABEL", help="the label of the teacher's rows (default: teacher)")
    parser.add_argument("--student", metavar="LABEL", help="the label of the untrained student's rows (default: student)")
    parser.add_argument("--format", choices=["markdown", "csv", "latex"], default="markdown", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write there in place of the terminal")
    parser.add_argument("--png", type=Path, help="draw the scores into this file, too (.png or .pdf)")
    parser.add_argument(
        "--item",
        nargs=2,
        metavar=("TASK", "NUMBER"),
        help="several models' answers to one item, side by side; RESULTS are then files of --log_samples",
    )
    own = parser.parse_args(arguments)
    for path in own.results:
        if not path.is_file():
            raise ValueError(f"there is no file {path}: pass what tsdkd evaluate --out wrote.")

    check_writable("out", own.out)
    check_writable("png", own.png)

    from tsdkd.data.rows import lines_of, read_scores
    from tsdkd.evaluation import layout, tables

    if own.item:
        if not own.item[1].isdigit():
            raise ValueError(f"--item {own.item[0]} {own.item[1]}: the second is the item's number, 0 or more.")
        samples = [json.loads(line) for path in own.results for _, line in lines_of(path)]
        if any("item" not in row for row in samples):
            raise ValueError("--item reads what --log_samples kept, OUT.samples.jsonl; a file of scores was given.")
        text = layout.side_by_side(samples, own.item[0], int(own.item[1]))
    else:
        rows = [row for path in own.results for row in read_scores(path)]
        if not rows:
            raise ValueError(f"no rows are in {', '.join(map(str, own.results))}.")
        numbers = None if own.table is None else list(tables.paper()) if own.table == "all" else own.table.split(",")
        made = tables.tables_of(rows, numbers, teacher=own.teacher, student=own.student)
        if own.format == "csv":
            text = layout.as_csv(made)
        elif own.format == "latex":
            text = "\n".join(f"% Scored {name}\n" + "\n".join(map(layout.latex, several)) for name, several in made.items())
        else:
            parts = [f"## Scored {name}\n\n" + "\n".join(map(layout.markdown, several)) for name, several in made.items()]
            text = "\n".join(parts)
        if own.png:
            layout.draw(made, own.png)
    if own.png and not own.item:
        print(f"The picture is in {own.png}", file=sys.stderr)
    if own.out:
        own.out.parent.mkdir(parents=True, exist_ok=True)
        own.out.write_text(text)
        print(f"Written to {own.out}")
    else:
        print(text, end="")
    return 0
