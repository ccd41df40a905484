"""QR-Distill with a stub teacher and judge, and tiny students."""

from __future__ import annotations

import json

from twt import QUESTIONS, solved

from tsdkd.pipelines.qr_distill import QRConfig, pipeline


def mapping_of(stub, folder, students, encoder):
    """What makes a configuration's mapping: six problems, three tests."""
    for name, some in (("problems", QUESTIONS[:6]), ("test", QUESTIONS[6:9])):
        lines = (json.dumps({"question": q, "answer": str(solved(q)[2])}) for q in some)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def mapping(**more):
        api = {"base_url": stub.url, "tries": 2}
        recipe = {
            "students": students, "problems": str(folder / "problems.jsonl"), "test": str(folder / "test.jsonl"),
            "teacher": {"name": "t", "model": "teacher", **api}, "judge": {"name": "j", "model": "judge", **api},
            "encoder": encoder, "output_dir": str(folder / "out"),
            "training": {
                "learning_rates": [1e-3, 1e-3], "epochs": 2, "batch_size": 6, "lora_r": 0, "shared": 8, "max_length": 200
            },
            "inference": {"max_tokens": 8},
        }  # fmt: skip
        return {**recipe, **more}

    return mapping


def run(recipe, **how):
    """The pipeline, and what it said."""
    said: list[str] = []
    line = pipeline(QRConfig.of(recipe), said.append)
    line.run(**how)
    return line, said
