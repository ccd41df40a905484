"""The shape of the house: how long files are, how much shares one self, and who imports whom among the tests."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import config

import tsdkd
from tsdkd import TokenDistillConfig, TokenDistillTrainer, TSDKDTrainer
from tsdkd.trainers import host, setup, setup_checks
from tsdkd.trainers.trl_seams import TRLTrainer

PACKAGE = Path(tsdkd.__file__).parent
TESTS = Path(__file__).parents[1]
SEAM = {"trl_seams.py", "processors.py", "engines.py", "loading.py", "token_level.py"}


@pytest.mark.parametrize("folder,most", [("trainers", 250), ("", 420)])
def test_no_file_needs_a_table_of_contents(folder, most):
    long = {path.name: n for path in (PACKAGE / folder).rglob("*.py") if (n := len(path.read_text().splitlines())) > most}
    assert not long


def test_no_test_file_is_long_but_oracles_and_none_imports_another():
    for path in TESTS.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 400 or path.name.startswith("oracles"), path.name
        imported = {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert not [name for name in imported if name.startswith("test_")], path.name


def test_three_classes_of_ours_and_sixty_methods_share_one_self():
    ours = [cls for cls in TSDKDTrainer.__mro__ if cls.__module__.startswith("tsdkd")]
    methods = {name for cls in ours for name, value in vars(cls).items() if callable(value) or isinstance(value, property)}
    assert len(ours) <= 3 and len(methods) <= 60


def test_collaborators_know_the_host_and_not_the_trainer():
    """They ask through `Host`, which the trainer meets; only the two trainer files know the class."""
    members = {name for name in vars(host.Host) if not name.startswith("_")}
    attributes = {"args", "accelerator", "model", "tools", "max_completion_length", "vocab_size"}
    assert not [name for name in members - attributes if not hasattr(TRLTrainer, name)]
    for path in (PACKAGE / "trainers").glob("*.py"):
        if path.name in ("__init__.py", *SEAM):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If):  # under TYPE_CHECKING
                node.body = []
        imported = {n.module for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom)}
        assert not imported & {"tsdkd.trainers.trl_seams", "tsdkd.trainers.token_level", "trl"} - {"trl"}, path.name


def test_old_names_that_users_import_are_forwarded_with_a_warning():
    import tsdkd.rollouts
    import tsdkd.types

    for module, old, new in ((tsdkd.types, "Answers", "RolloutSpec"), (tsdkd.rollouts, "AnswerSource", "RolloutSource")):
        with pytest.warns(DeprecationWarning, match=f"{old} is now .*{new}; the old name goes in 0.2"):
            assert getattr(module, old) is getattr(module, new)
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            _ = module.Nothing


def test_all_that_is_wrong_with_a_set_up_can_be_told_at_once(tmp_path):
    """The trainer raises the first; whoever asks gets every one, each with what was received and what to do."""
    args = config(tmp_path, TokenDistillConfig, method="minillm", method_options={"pretraining_weight": 1.0})
    rows = Dataset.from_dict({"prompt": ["a", "", "b"]})
    found = list(setup_checks.problems(setup.Setup(args, args.build_method(), "student", None, None, rows)))
    told = [str(problem) for problem in found]
    for part in (
        "no teacher was given",
        "takes a pretraining_dataset",
        "3 rows but one generation batch",
        "1 prompts that are empty",
        "the student 'student' cannot be read",
    ):
        assert any(part in text for text in told), part
    assert len(found) == 5 and all(problem.what and problem.do for problem in found)
    with pytest.raises(ValueError, match="no teacher was given"):
        TokenDistillTrainer("student", args=args, train_dataset=rows)


def test_every_check_is_a_function_of_a_setup_that_yields_problems():
    for check in setup_checks.CHECKS:
        assert inspect.isgeneratorfunction(check) and check.__doc__, check.__name__
