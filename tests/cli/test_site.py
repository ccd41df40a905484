"""The site of the documentation: it builds strictly, says what is so, fetches nothing, and is there as plain Markdown."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "site"))
hooks = pytest.importorskip("hooks", reason="mkdocs is not installed")


def build(config: Path, into: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(into)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    made = build(ROOT / "mkdocs.yml", folder)
    assert made.returncode == 0, made.stderr[-3000:]
    return folder


def test_pages_fetch_nothing_and_every_link_leads_somewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        outside = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(https?:[^\"]*)", text)
        assert not outside, (page, outside)
        if page.name == "404.html":
            continue
        for target in re.findall(r"href=\"(?!https?:|mailto:|#|data:)([^\"#]+)", text):
            assert (page.parent / target).exists(), (page, target)


def test_every_page_is_there_as_markdown_with_a_list(site):
    listed = re.findall(r"\]\(([\w.-]+\.md)\)", (site / "llms.txt").read_text())
    assert len(listed) >= 25 and all((site / name).read_text().strip() for name in listed)
    assert all((site / name).with_suffix(".html").exists() for name in listed)


def test_a_broken_link_and_a_missing_reference_stop_the_build(tmp_path):
    for wrong in ("[there](nowhere.md)", "[there](losses.md#no-such-heading)", "::: tsdkd.no_such_thing"):
        copy = tmp_path / "docs"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(ROOT / "docs", copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "losses.md").write_text((copy / "losses.md").read_text() + f"\n{wrong}\n")
        text = (ROOT / "mkdocs.yml").read_text().replace("docs/site/hooks.py", str(ROOT / "docs/site/hooks.py"))
        (tmp_path / "mkdocs.yml").write_text(text.replace("paths: [.]", f"paths: [{ROOT}]"))
        made = build(tmp_path / "mkdocs.yml", tmp_path / "out")
        assert made.returncode != 0, wrong


def test_what_the_page_of_troubles_quotes_is_said_by_the_code():
    said = " ".join(path.read_text() for path in sorted((ROOT / "tsdkd").rglob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", said)  # texts over several lines
    quoted = re.findall(r"^###.*$", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    texts = [text for line in quoted for text in re.findall(r'"([^"]+)"', line)]
    assert len(texts) >= 12
    assert not [text for text in texts if text not in said]


def test_every_refusal_is_listed():
    listed = [text for texts in hooks.messages().values() for text in texts]
    assert len(listed) > 400
    assert any(text.startswith("the tokenizers disagree: id … is … for the student") for text in listed)


def test_the_metrics_that_the_page_names_are_logged():
    text = (ROOT / "docs/metrics.md").read_text()
    said = " ".join(path.read_text() for path in sorted((ROOT / "tsdkd").rglob("*.py")))
    for name in set(re.findall(r"`([a-z_]+/[a-z_0-9]+)`", text)):
        stem = name.rpartition("/")[0]
        assert f'"{name}"' in said or f'f"{stem}/{{' in said, name


def test_the_first_pages_code_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/index.md").read_text(), re.DOTALL | re.MULTILINE)
    student = save_tiny(tmp_path / "s", seed=1, positions=2048, closes_soon=True)
    teacher = save_tiny(tmp_path / "t", seed=2, hidden=48, positions=2048)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(code.replace('"STUDENT"', repr(student)).replace('"TEACHER"', repr(teacher)), "index.md", "exec"), scope)
    assert scope["trainer"].state.global_step == 1
