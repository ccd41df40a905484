"""Completion of the commands in a shell: what bash offers, and that the others can read theirs."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tsdkd.cli import COMMANDS, main
from tsdkd.cli.completion import flags_of
from tsdkd.methods import METHODS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            assert main(["completion", shell]) == 0
        (folder / shell).write_text(told.getvalue())
    return folder


def offered(script, *words):
    named = " ".join(f"'{word}'" for word in words)
    code = f"source {script}; COMP_WORDS=({named}); COMP_CWORD={len(words) - 1}; _tsdkd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    run = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True, timeout=60)
    return run.stdout.split()


def test_bash_offers_commands_flags_and_methods(scripts):
    bash = scripts / "bash"
    assert offered(bash, "tsdkd", "") == list(COMMANDS)
    assert offered(bash, "tsdkd", "tra") == ["train"]
    assert offered(bash, "tsdkd", "train", "--learning_r") == ["--learning_rate"]
    assert (
        offered(bash, "tsdkd", "compare", "--see") == ["--seed", "--seeds"] and offered(bash, "tsdkd", "report", "--lea") == []
    )
    assert offered(bash, "tsdkd", "plan", "--max_comp") == ["--max_completion_length"]
    assert offered(bash, "tsdkd", "train", "--method", "") == list(METHODS)
    assert offered(bash, "tsdkd", "completion", "z") == ["zsh"]
    assert offered(bash, "tsdkd", "train", "recipe") == []  # files are the shell's own


def test_every_command_has_its_flags():
    assert {"--method", "--teacher_placement", "--student", "--lora_r"} <= set(flags_of("train"))
    assert {"--prompt", "--out", "--help"} <= set(flags_of("inspect"))
    for command in set(COMMANDS) - {"completion", "train"}:
        assert "--help" in flags_of(command)


def test_the_other_shells_can_read_theirs(scripts):
    fish = (scripts / "fish").read_text()
    assert "complete -c tsdkd -n '__fish_seen_subcommand_from train' -l learning_rate" in fish
    for shell in ("zsh", "fish"):
        if shutil.which(shell):
            subprocess.run([shell, "-n", str(scripts / shell)], check=True, timeout=60)


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["completion", "tcsh"])
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
