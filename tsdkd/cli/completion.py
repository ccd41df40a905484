"""`tsdkd completion bash`: what completes the commands and their flags in a shell, made of their own help."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re

from tsdkd.cli.options import ALIASES

SHELLS = ("bash", "zsh", "fish")
_AS_TRAIN = ("plan", "doctor", "compare", "inspect")  # take its flags, too
_FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*)")

_BASH = """_tsdkd() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" flags=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case "$before" in
    --method) COMPREPLY=($(compgen -W "{methods}" -- "$word")); return ;;
  esac
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;
    *) COMPREPLY=() ;;
  esac
}}
complete -o default -F _tsdkd tsdkd
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd completion",
        description="Print what completes tsdkd's commands and flags; it takes some seconds, so keep it in a file. bash: tsdkd "
        "completion bash > ~/.local/share/bash-completion/completions/tsdkd; fish: tsdkd completion fish > "
        "~/.config/fish/completions/tsdkd.fish; zsh: tsdkd completion zsh > ~/.tsdkd.zsh, and source ~/.tsdkd.zsh in ~/.zshrc. "
        "Print it again after an update.",
    )
    parser.add_argument("shell", choices=SHELLS)
    print(script(parser.parse_args(arguments).shell), end="")
    return 0


def flags_of(command: str) -> list[str]:
    """A command's flags, as its help has them."""
    told = io.StringIO()
    asked = "--help_all" if command == "train" else "--help"
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        importlib.import_module(f"tsdkd.cli.{command}").main([asked])
    names = {name.rstrip(".") for name in _FLAG.findall(told.getvalue())} | {"help"}
    return sorted(f"--{name}" for name in (names | set(ALIASES) if command == "train" else names))


def script(shell: str) -> str:
    """The text that a shell is to read."""
    from tsdkd.cli import COMMANDS
    from tsdkd.methods import METHODS

    flags = {command: flags_of(command) if command != "completion" else list(SHELLS) for command in COMMANDS}
    flags |= {command: sorted({*flags[command], *flags["train"]}) for command in _AS_TRAIN}
    if shell == "fish":
        lines = ["complete -c tsdkd -f -n __fish_use_subcommand"]
        for command, what in COMMANDS.items():
            lines.append(f"complete -c tsdkd -n __fish_use_subcommand -a {command} -d {_quoted(what)}")
            seen = f"-n '__fish_seen_subcommand_from {command}'"
            if command == "completion":
                lines.append(f"complete -c tsdkd -f {seen} -a {_quoted(' '.join(SHELLS))}")
                continue
            for flag in flags[command]:
                values = f" -x -a {_quoted(' '.join(METHODS))}" if flag == "--method" else ""
                lines.append(f"complete -c tsdkd {seen} -l {flag[2:]}{values}")
        return "\n".join(lines) + "\n"
    cases = [f'    {command}) flags="{" ".join(found)}" ;;' for command, found in flags.items() if command != "completion"]
    cases.append(f'    completion) COMPREPLY=($(compgen -W "{" ".join(SHELLS)}" -- "$word")); return ;;')
    made = _BASH.format(commands=" ".join(COMMANDS), methods=" ".join(METHODS), cases="\n".join(cases))
    return (
        made if shell == "bash" else f"autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n{made}"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
