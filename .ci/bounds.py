"""Constraints of the oldest, or the newest, versions that setup.py allows: `python .ci/bounds.py lowest|newest`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

REQUIREMENT = re.compile(r'^\s*"([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?>=([0-9.]+)(?:,<=?[0-9.]+)?"', re.MULTILINE)


def bounds(text: str) -> dict[str, str]:
    """Each requirement of `install_requires` with its lowest version."""
    required = re.search(r"install_requires=\[(.*?)\n    \]", text, re.DOTALL)
    assert required is not None, "setup.py has no install_requires"
    return dict(REQUIREMENT.findall(required[1]))


def main() -> None:
    found = bounds((Path(__file__).parents[1] / "setup.py").read_text())
    if sys.argv[1:] == ["lowest"]:
        print("\n".join(f"{name}=={version}" for name, version in found.items()))
    elif sys.argv[1:] != ["newest"]:  # nothing holds the newest back but setup.py itself
        raise SystemExit("usage: python .ci/bounds.py lowest|newest")


if __name__ == "__main__":
    main()
