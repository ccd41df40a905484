"""Run by `test_hub.py`, with HF_ENDPOINT at a stub: a run that pushes its checkpoints and its student."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from running import by_prompt, make


def main(folder: str) -> None:
    trainer = make(
        Path(folder) / "student",
        rollouts=by_prompt,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="me/student",
        hub_token="hf_" + "x" * 34,
        hub_strategy="every_save",
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1])
