"""The paper's run, Qwen2.5 14B → 1.5B on UltraInteract: `accelerate launch examples/03_tsd_kd_qwen.py`.

The same from the command line: `accelerate launch -m tsdkd.cli train --config examples/recipes/qwen2.5-14b-to-1.5b.yaml`.
The recipe beside it holds the paper's hyperparameters (A.9) and the table of batch sizes.
"""

import sys
from pathlib import Path

from tsdkd.cli.train import main

RECIPE = Path(__file__).parent / "recipes" / "qwen2.5-14b-to-1.5b.yaml"

if __name__ == "__main__":
    sys.exit(main(["--config", str(RECIPE), *sys.argv[1:]]))
