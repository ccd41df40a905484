"""A run that pushes, to a hub of this machine's own: what arrives there, and with which token."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load

SCRIPT = Path(__file__).parents[1] / "support" / "pushing.py"
TOKEN = "hf_" + "x" * 34


class Hub(ThreadingHTTPServer):
    """As much of the hub's API as a push of small files asks; every file is taken as text in the commit."""

    def __init__(self):
        self.commits, self.tokens, self.made = [], set(), []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, found):
                content = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                hub.tokens.add(self.headers.get("Authorization"))
                self.answer({"name": "me", "id": "me/student", "sha": "0" * 40, "siblings": [], "type": "user", "orgs": []})

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else b"".join(self.chunks())
                hub.tokens.add(self.headers.get("Authorization"))
                if self.path == "/api/repos/create":
                    hub.made.append(json.loads(body)["name"])
                    return self.answer({"url": f"{hub.address}/me/student", "name": "me/student"})
                if "/preupload/" in self.path:
                    files = [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                    return self.answer({"files": files})
                if "/commit/" in self.path:
                    lines = [json.loads(line) for line in body.splitlines()]
                    files = {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}
                    hub.commits.append((lines[0]["value"]["summary"], files))
                    url = f"{hub.address}/me/student/commit/{'0' * 40}"
                    return self.answer({"commitUrl": url, "commitOid": "0" * 40, "hookOutput": "", "pullRequestUrl": None})
                return self.answer({"errors": [], "warnings": []})

            def chunks(self):
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.shutdown()
    made.server_close()


def test_checkpoints_and_the_student_arrive(hub, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-3000:]
    assert "student" in hub.made[0] and {token for token in hub.tokens if token} == {f"Bearer {TOKEN}"}
    summary, files = hub.commits[-1]
    assert {"README.md", "config.json", "model.safetensors"} <= files.keys(), (summary, sorted(files))
    card = base64.b64decode(files["README.md"]["content"]).decode()
    assert "tsdkd" in card and "TSD-KD" in card
    student = load(base64.b64decode(files["model.safetensors"]["content"]))
    assert any("embed_tokens" in name for name in student)
    assert len(hub.commits) >= 2 and not any(TOKEN in json.dumps(commit) for commit in hub.commits)
