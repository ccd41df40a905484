"""The pictures of README and docs, of the demo's own models: `make images` (a Chromium is driven, nothing is fetched)."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tsdkd.cli import main
from tsdkd.demo.problems import held_out
from tsdkd.demo.run import HELD_OUT_SEED, LEVELS, shipped

HERE = Path(__file__).parent


def shoot(browser, page: Path, to: Path, height: int, script: str | None = None) -> None:
    view = browser.new_page(viewport={"width": 1240, "height": height}, device_scale_factor=1.5)
    view.goto(page.as_uri())
    if script:
        view.evaluate(script)
    view.screenshot(path=to)
    view.close()
    print(f"{to.relative_to(HERE.parents[1])}: {to.stat().st_size / 1e3:.0f} kB")


def pictures(folder: Path) -> None:
    """Run the demo, look at two of its completions, and photograph both pages."""
    assert main(["demo", "--output_dir", str(folder / "demo-run"), "--steps", "60", "--problems", "200"]) == 0
    student, teacher = folder / "student", folder / "teacher"
    for to in (student, teacher):
        shutil.copytree(shipped(to.name), to)
    problem = max(held_out(50, HELD_OUT_SEED, set(), LEVELS), key=lambda each: len(each.question))
    words = ["inspect", "--student", str(student), "--teacher", str(teacher), "--prompt", problem.question]
    assert main([*words, "--num_candidates", "6", "--max_completion_length", "100", "--out", str(folder / "tokens.html")]) == 0
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        surest = "const s = [...document.querySelectorAll('.token.top')]; s[s.length - 1].click(); window.scrollTo(0, 0)"
        shoot(browser, folder / "tokens.html", HERE / "token-page.png", 780, surest)
        shoot(browser, folder / "demo-run" / "report.html", HERE / "run-page.png", 900)
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        pictures(Path(made))
    sys.exit(0)
