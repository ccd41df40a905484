"""The wheel, built and installed elsewhere: everything it needs is in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wheel_and_sdist_work_outside_of_the_checkout(tmp_path):
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".git", ".venv*", "*.egg-info", "build", "dist", "__pycache__", ".*_cache", "demo-run")
    shutil.copytree(ROOT, source, ignore=skipped)
    dist = tmp_path / "dist"
    build = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", str(dist), str(source)]
    run = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "py.typed",
        "CHANGELOG.md",
        "methods/README.md",
        "demo/models/teacher/model.safetensors",
        "cli/__main__.py",
        "evaluation/paper.json",
        "reporting/templates/token_page.html",
        "reporting/templates/token_page.js",
        "__main__.py",
        "demo/eval_tasks/word_problems.yaml",
    ):
        assert f"tsdkd/{needed}" in names, needed
    assert not [name for name in names if name.startswith("tests")]
    (about,) = [name for name in names if name.endswith(".dist-info/METADATA")]
    page = zipfile.ZipFile(wheel).read(about).decode()
    links = re.findall(r"\]\(([^)]*)\)", page)  # on a package's page those within the repository lead nowhere
    assert links and all(link.startswith("https://") for link in links)
    models = sum(i.file_size for i in zipfile.ZipFile(wheel).infolist() if i.filename.startswith("tsdkd/demo/models/"))
    assert models <= 8 * 2**20
    assert any(name.endswith("tsdkd/selection/masks.py") for name in tarfile.open(sdist).getnames())

    # A fresh environment that sees the packages of this one, but not this checkout.
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    packages = Path(next(p for p in sys.path if p.endswith("site-packages")))
    for entry in packages.iterdir():  # links, not a .pth: the editable install's finder must stay behind
        if "tsdkd" not in entry.name and not (Path(site) / entry.name).exists() and not entry.name.endswith(".pth"):
            (Path(site) / entry.name).symlink_to(entry)
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = (
        "import tsdkd, torch; print(tsdkd.__file__); "
        "from tsdkd.demo.run import shipped; from pathlib import Path; "
        "assert Path(shipped('student'), 'config.json').exists(); "
        "t = tsdkd.tsd_kd_loss(torch.randn(1, 3, 16, requires_grad=True), torch.randn(1, 3, 16), torch.ones(1, 3)); "
        "t.loss.backward(); print('loss', t.loss.item())"
    )
    out = subprocess.check_output([python, "-c", code], cwd=tmp_path, env=environment, text=True, timeout=300)
    assert out.splitlines()[0].startswith(str(folder)) and "loss" in out
    script = folder / "bin" / "tsdkd"
    out = subprocess.check_output([script, "demo", "--help"], cwd=tmp_path, env=environment, text=True, timeout=120)
    assert "--weights {demo,paper,gkd}" in out


def test_there_is_one_source_of_the_version():
    import tsdkd

    version = tsdkd.__version__
    assert subprocess.check_output([sys.executable, "setup.py", "--version"], cwd=ROOT, text=True).strip().endswith(version)
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "tsdkd" / "CHANGELOG.md").read_text()


def test_every_module_imports_but_for_kernels_where_triton_is_missing():
    """Doctests of a module that cannot be imported are passed over, so this is where one is found."""
    code = """
import importlib, pkgutil, tsdkd
for module in pkgutil.walk_packages(tsdkd.__path__, "tsdkd."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        print(module.name, error.name)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    missing = [line.split() for line in run.stdout.splitlines()]
    assert all(module == "tsdkd.fused.tiles_triton" and package == "triton" for module, package in missing), missing


def test_the_lowest_versions_are_those_of_setup():
    made = subprocess.check_output([sys.executable, ".ci/bounds.py", "lowest"], cwd=ROOT, text=True).split()
    assert {line.partition("==")[0] for line in made} >= {"torch", "transformers", "trl", "accelerate", "datasets"}
    text = (ROOT / "setup.py").read_text()
    assert all(f'"{line.replace("==", ">=")}' in text for line in made)
    assert subprocess.check_output([sys.executable, ".ci/bounds.py", "newest"], cwd=ROOT, text=True) == ""
