"""The command line: parse, build, call. A command's module is imported only when it is called."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from typing import Any

COMMANDS = {
    "train": "distil a student from a YAML recipe and flags",
    "compare": "train several methods from the same start and score each",
    "evaluate": "score a model on the paper's benchmarks or your own tasks",
    "plan": "does it fit, what does it cost, how is it started? from configurations alone",
    "doctor": "is this set-up sound, and is it worth its GPU hours?",
    "inspect": "a page that shows what a method decides of every token",
    "report": "a page of what a run or several did",
    "methods": "list the methods, their options and papers",
    "table": "lay scores out as the paper's tables, beside its own numbers",
    "pipeline": "systems of several stages: twt, qr-distill",
    "completion": "print what completes these commands in bash, zsh or fish",
    "demo": "distil two shipped tiny models on this machine and show what changed",
}

_USAGE = "usage: tsdkd COMMAND [options]\n\nOn-policy, token-level distillation of language models (TSD-KD).\n\ncommands:\n"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0 on success, 2 for what the caller must change, 1 for what failed, 130 after SIGINT,
    143 after SIGTERM (a run's step is made and saved first)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "--version":
        from tsdkd import __version__

        print(f"tsdkd {__version__}")
        return 0
    usage = _USAGE + "".join(f"  {name:<12}{what}\n" for name, what in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage + "\n`tsdkd COMMAND --help` lists a command's options.")
        return 0
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        print(f"tsdkd: unknown command {arguments[0]!r}; the commands are: {', '.join(COMMANDS)}.{meant}", file=sys.stderr)
        return 2
    before = _terminable()
    try:
        return importlib.import_module(f"tsdkd.cli.{arguments[0]}").main(arguments[1:])
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        text = str(stop) or f"interrupted. {_AGAIN.get(arguments[0], 'Start it again.')}"
        print(f"\ntsdkd {arguments[0]}: {text}", file=sys.stderr)
        return 128 + number
    except Exception as error:
        if os.environ.get("TSDKD_TRACEBACK"):
            raise
        text, status = told(error)
        print(f"tsdkd {arguments[0]}: {text}", file=sys.stderr)
        return status
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, outside of a training run."""

    number = signal.SIGTERM


def _terminable() -> Any:
    """Have SIGTERM end a command as Ctrl-C does, in a line; what it did before, or None where it cannot be asked."""

    def come(number: int, frame: Any) -> None:
        raise _Terminated

    try:
        return signal.signal(signal.SIGTERM, come)
    except ValueError:  # not in the main thread
        return None


_GOES_ON = "The same command goes on where it stopped."
_AGAIN = {
    "compare": _GOES_ON,
    "evaluate": _GOES_ON,
    "pipeline": _GOES_ON,
    "train": "What was saved or recorded stays, and is gone on with.",
}


def told(error: Exception) -> tuple[str, int]:
    """What is said of an error in place of its traceback, and the exit status: 2 for what the caller must change, 1 else."""
    if isinstance(error, (ValueError, OSError)):  # OSError: a model, data set or file that is not there
        return str(error) or type(error).__name__, 2
    if isinstance(error, FloatingPointError):
        return str(error), 1
    cause = error.__cause__ or error.__context__
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = str(cause).strip() if cause is not None else ""
    because = f" ({type(cause).__name__}: {reason.splitlines()[0]})" if reason else ""
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, packages in _EXTRAS.items() if package in packages), None)
        how = f" pip install 'tsdkd[{extra}]'." if extra else f" pip install {package}." if package else ""
        return f"a package is missing: {first.rstrip('.')}.{how}", 2
    # Of other libraries: damaged files, broken templates, data that cannot be made, memory.
    kind = type(error).__name__
    return f"{kind}: {first}{because} (TSDKD_TRACEBACK=1 shows where)", 2 if kind in _USERS else 1


# Which extra brings a package.
_EXTRAS = {
    "vllm": ("vllm",),
    "deepspeed": ("deepspeed",),
    "peft": ("peft",),
    "qlora": ("bitsandbytes",),
    "eval": ("lm_eval",),
    "report": ("matplotlib",),
    "pipelines": ("openai", "tenacity", "sentence_transformers"),
}
# Errors of other libraries that a user's file or option makes.
_USERS = (
    "SafetensorError",
    "DatasetGenerationError",
    "UndefinedError",
    "TemplateError",
    "TemplateSyntaxError",
    "TypeError",
    "KeyError",
    "JSONDecodeError",
    "RuntimeError",
)
