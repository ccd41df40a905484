"""Tables as Markdown, CSV and pictures, and answers side by side."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tsdkd.costs import PARTS
from tsdkd.data.spent import COSTS, costs_of
from tsdkd.evaluation.tables import LEVEL, TEACHER, Cell, Table
from tsdkd.reporting.figures import MARKS, PALETTE, pyplot, save

_SCORED = (
    "table chat_template label benchmark score stderr n partial best above_teacher runner_up p_against_student paired paper "
    "difference p_against_paper low high"
).split()
_COLUMNS = [*_SCORED, "trained_tokens", *(f"tflop_{part}" for part in PARTS), "seconds"]


def markdown(table: Table) -> str:
    """A table as Markdown: our scores, then the paper's with the differences, then the notes."""
    name = f"Table {table.number}: {table.title}" if table.number else table.title
    averages = table.averages
    more = ["average"] if averages else []
    heads = [_in_markdown(column) for column in table.columns]
    lines = [f"### {name}", "", _line(["", *heads, *more]), _line(["---"] * (len(table.columns) + 1 + len(more)))]
    ranks = {column: table.ranked(column) for column in table.columns}
    for label in table.labels:
        texts = []
        for column in table.columns:
            texts.append(_our_text(table, label, column, *ranks[column]))
        texts += [averages[label]] if averages else []
        lines.append(_line([_in_markdown(label), *texts]))
    lines += ["", "95 % intervals (of shares Wilson's) and items:", ""]
    lines += [_line(["", *heads]), _line(["---"] * (len(heads) + 1))]
    lines += [
        _line([_in_markdown(label), *(_interval_text(table, label, column) for column in table.columns)])
        for label in table.labels
    ]
    legend = "**best**, <u>runner-up</u> (the teacher left out), \\* above the teacher, † differs from the untrained student"
    lines += [
        "",
        f"{legend} (p < {LEVEL}; paired where the items are the same), ~ some items only, § other shots "
        "or response limits than the column's: neither is ranked or compared.",
    ]
    if table.spent:
        lines += ["", "What each student took (its whole training, over all processes):", "", _line(["", *COSTS])]
        lines.append(_line(["---"] * (len(COSTS) + 1)))
        lines += [_line([_in_markdown(label), *costs_of(spent).values()]) for label, spent in table.spent.items()]
    if table.published:
        lines += [
            "",
            "The paper's own, and in brackets ours less the paper's (‡ beyond what chance allows both):",
            "",
        ]
        lines += [_line(["", *table.columns]), _line(["---"] * (len(table.columns) + 1))]
        for label in dict.fromkeys(label for label, _ in table.published):
            lines.append(_line([label, *(_paper_text(table, label, column) for column in table.columns)]))
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _in_markdown(text: str) -> str:
    """A label or a task's name, whoever gave it, as a cell's text."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _in_csv(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _interval_text(table: Table, label: str, column: str) -> str:
    cell = table.cells.get((label, column))
    if cell is None:
        return ""
    low, high = cell.interval
    shown = f"{100 * low:.1f}-{100 * high:.1f}" if cell.is_share else f"{low:.4g}-{high:.4g}"
    return f"{shown}, n = {cell.n}"


def latex(table: Table) -> str:
    """A table as LaTeX for `booktabs`: the best bold, runners-up underlined, items and average beside them."""
    averages = table.averages
    more = ["Average"] if averages else []
    heads = " & ".join(["", *map(_escaped, table.columns), *more])
    ranks = {column: table.ranked(column) for column in table.columns}
    name = f"Table {table.number}: {table.title}" if table.number else table.title
    lines = [f"% {name}", f"\\begin{{tabular}}{{l{'r' * (len(table.columns) + len(more))}}}", "\\toprule", f"{heads} \\\\"]
    counts = []
    for column in table.columns:
        found = sorted({cell.n for (_, benchmark), cell in table.cells.items() if benchmark == column})
        counts.append("-".join(dict.fromkeys(str(n) for n in (found[0], found[-1]))))
    lines += [" & ".join(["items", *counts, *([""] if more else [])]) + " \\\\", "\\midrule"]
    for label in table.labels:
        cells = [_escaped(label)]
        for column in table.columns:
            cell = table.cells.get((label, column))
            best, second = ranks[column]
            text = "" if cell is None else str(cell)
            if text and (label in best or label in second):
                text = f"\\textbf{{{text}}}" if label in best else f"\\underline{{{text}}}"
            cells.append(text)
        cells += [averages[label]] if averages else []
        lines.append(" & ".join(cells) + " \\\\")
    took = [f"% {label} took: {_told(costs_of(spent))}" for label, spent in table.spent.items()]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", *took]) + "\n"


def _told(costs: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {text}" for name, text in costs.items() if text)


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in "&%$#_{}" else character for character in text)


def _our_text(table: Table, label: str, column: str, best: set[str], second: set[str]) -> str:
    cell = table.cells.get((label, column))
    if cell is None:
        return ""
    text = str(cell)
    if label in best:
        text = f"**{text}**"
    elif label in second:
        text = f"<u>{text}</u>"
    if table.above_teacher(label, column):
        text += "\\*"
    test = table.against_student(label, column)
    if test is not None and test[0] < LEVEL:
        text += "†"
    if cell.partial:
        return text + "~"
    return text if table.comparable(label, column) else text + "§"


def _paper_text(table: Table, label: str, column: str) -> str:
    text = f"{table.published[label, column]:.1f}" + ("\\*" if (label, column) in table.starred else "")
    compared = table.against_paper(label, column)
    if compared is None:
        return text
    return f"{text} ({compared[0]:+.1f}{'‡' if compared[1] < LEVEL else ''})"


def as_csv(tables: dict[str, list[Table]]) -> str:
    """Every cell of every table as a line of CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for setting, several in tables.items():
        for table in several:
            for label in table.labels:
                for column in table.columns:
                    cell = table.cells.get((label, column))
                    if cell is not None:
                        where = [table.number or "", setting == "with chat template", _in_csv(label), _in_csv(column)]
                        writer.writerow([*where, *_values(table, label, column, cell)])
    return out.getvalue()


def _values(table: Table, label: str, column: str, cell: Cell) -> list[Any]:
    student, printed = table.against_student(label, column), table.against_paper(label, column)
    return [
        f"{100 * cell.score if cell.is_share else cell.score:.4f}",
        f"{100 * cell.stderr if cell.is_share else cell.stderr:.4f}",
        cell.n,
        cell.partial,
        label in table.ranked(column)[0],
        table.above_teacher(label, column),
        label in table.ranked(column)[1],
        *(("", "") if student is None else (f"{student[0]:.3g}", student[1])),
        table.published.get((label, column), ""),
        *(("", "") if printed is None else (f"{printed[0]:.4f}", f"{printed[1]:.3g}")),
        *(f"{100 * end if cell.is_share else end:.4f}" for end in cell.interval),
        *_took(cell.spent),
    ]


def _took(spent: Mapping[str, Any] | None) -> list[Any]:
    """Of a student's training the cells of tokens, FLOPs and seconds."""
    if spent is None:
        return [""] * (len(PARTS) + 2)
    flops = spent["flops"]
    return [
        spent["trained_tokens"],
        *(f"{flops[part] / 1e12:.6g}" if part in flops else "" for part in PARTS),
        spent["seconds"],
    ]


def draw(tables: dict[str, list[Table]], path: Path) -> None:
    """The scores with their 95 % intervals, a panel a benchmark: with a chat template filled, without one white where both
    are there, the paper's numbers as grey strokes.

    Raises:
        ValueError: matplotlib is missing, or nothing is there to draw.
    """
    plt = pyplot()
    panels: dict[str, list[tuple[str, Table]]] = {}
    for setting, several in tables.items():
        for table in several:
            for column in table.columns:
                if all(cell.is_share for (_, name), cell in table.cells.items() if name == column):
                    panels.setdefault(column, []).append((setting, table))
    if not panels:
        raise ValueError("there is nothing to draw: no row belongs to a table that was asked for.")
    settings = list(dict.fromkeys(setting for shown in panels.values() for setting, _ in shown))
    labels = list(dict.fromkeys(label for shown in panels.values() for _, table in shown for label in table.labels))
    across = min(4, len(panels))
    down = math.ceil(len(panels) / across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(1.6 + 2.7 * across, 1.0 + down * (0.7 + 0.28 * len(labels) * (1 + 0.4 * (len(settings) - 1)))),
        squeeze=False,
        sharey=True,
        constrained_layout=True,
    )
    for axis, (column, shown) in zip(axes.flat, panels.items(), strict=False):
        for setting, table in shown:
            _marks(axis, table, column, labels, settings.index(setting), len(settings))
        axis.set_title(column, fontsize=9)
        axis.set_yticks(range(len(labels)), labels)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", linewidth=0.3)
    axes.flat[0].set_ylim(len(labels) - 0.5, -0.5)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    said = ["bars: 95 %, Wilson", *(["dashed: the teacher"] if TEACHER in labels else [])]
    said += [f"white: {settings[0]}, filled: {settings[1]}"] if len(settings) > 1 else [f"scored {settings[0]}"]
    if any(column in (name for _, name in table.published) for column, shown in panels.items() for _, table in shown):
        said.append("grey stroke: the paper's")
    figure.supxlabel(f"score, % ({'; '.join(said)})", fontsize=9)
    save(figure, path)


def _marks(axis: Any, table: Table, column: str, labels: list[str], number: int, of: int) -> None:
    """A table's scores of one column, a line a label; of several settings each a little below the one before."""
    white = of > 1 and number == 0
    shift = 0.0 if of == 1 else 0.32 * (number - (of - 1) / 2)
    for place, label in enumerate(labels):
        cell, printed = table.cells.get((label, column)), table.published.get((label, column))
        if cell is not None:
            low, high = cell.interval
            bars = [[100 * max(0.0, cell.score - low)], [100 * max(0.0, high - cell.score)]]
            color, mark = PALETTE[place % len(PALETTE)], MARKS[place // len(PALETTE) % len(MARKS)]
            face = "white" if white else color
            axis.errorbar(
                100 * cell.score, place + shift, xerr=bars, fmt=mark, color=color, mfc=face, capsize=3, markersize=5, zorder=3
            )
        if printed is not None and number == 0:
            axis.plot(printed, place, marker="|", color="0.4", linestyle="none", markersize=14, markeredgewidth=2)
    teacher = table.cells.get((TEACHER, column))
    if teacher is not None:
        axis.axvline(100 * teacher.score, color="0.4", linestyle=":" if white else "--", linewidth=0.8)


def side_by_side(samples: Iterable[dict[str, Any]], task: str, item: int) -> str:
    """Several models' answers to one prompt (as in the paper's Figures 8 and 9).

    Raises:
        ValueError: no such item.
    """
    found = [row for row in samples if row["task"] == task and row["item"] == item]
    if not found:
        raise ValueError(f"no answers to item {item} of {task} were kept: score it with --log_samples.")
    lines = [f"### {task}, item {item}", "", *(f"> {line}" for line in str(found[0]["prompt"]).splitlines()), ""]
    lines += [f"Target: {found[0]['target']}", ""]
    seen = set()
    for row in found:
        setting = "" if not row["chat_template"] else ", with chat template"
        if (row["model"], setting) in seen:  # another filter of the same answer
            continue
        seen.add((row["model"], setting))
        scores = {
            key: value
            for key, value in row.items()
            if key not in ("model", "task", "item", "filter", "chat_template", "prompt", "target", "answer", "taken")
        }
        told = ", ".join(f"{name} {value:g}" for name, value in scores.items() if isinstance(value, (int, float)))
        answer = str(row["answer"])
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", answer)), default=0))
        lines += [f"**{_in_markdown(str(row['model']))}**{setting}" + (f" ({told})" if told else ""), fence, answer, fence, ""]
    return "\n".join(lines)
