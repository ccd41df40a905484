"""The command line: parse, build, call. A command's module is imported only when it is called."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": "distil a student from a YAML recipe and flags",
    "compare": "train several methods from the same start and score each",
    "evaluate": "score a model on the paper's benchmarks or your own tasks",
    "table": "lay scores out as the paper's tables, beside its own numbers",
    "demo": "distil two shipped tiny models on this machine and show what changed",
}

_USAGE = "usage: tsdkd COMMAND [options]\n\nOn-policy, token-level distillation of language models (TSD-KD).\n\ncommands:\n"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0 on success, 2 for what the caller must change."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "--version":
        from tsdkd import __version__

        print(f"tsdkd {__version__}")
        return 0
    usage = _USAGE + "".join(f"  {name:<8}{what}\n" for name, what in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage + "\n`tsdkd COMMAND --help` lists a command's options.")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"tsdkd: unknown command {arguments[0]!r}; the commands are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command = importlib.import_module(f"tsdkd.cli.{arguments[0]}")
    try:
        return command.main(arguments[1:])
    except (ValueError, OSError, FloatingPointError) as error:  # OSError: a model, data set or file that is not there
        print(f"tsdkd {arguments[0]}: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
