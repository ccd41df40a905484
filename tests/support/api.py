"""An OpenAI-compatible stub: replies by a function of the request, each request counted."""

from __future__ import annotations

import json
import threading
from collections import Counter

from werkzeug import Response


def reply(text: str, **more) -> dict:
    """The body of a good reply."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "finish_reason": more.pop("finish", "stop"), "message": {"role": "assistant", "content": text}}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{**choice, **more}], "usage": usage}


class Stub:
    """Behind `pytest_httpserver`: `answer(request body, how often it was asked)` gives a body, a status or a Response."""

    def __init__(self, server, answer):
        self.answer, self.asked, self.keys = answer, Counter(), []
        self.order: list[str] = []
        self._lock = threading.Lock()
        server.expect_request("/v1/chat/completions", method="POST").respond_with_handler(self._handle)
        self.url = server.url_for("/v1")

    def _handle(self, request):
        body = json.loads(request.data)
        said = body["messages"][-1]["content"]
        with self._lock:
            self.asked[said] += 1
            self.order.append(said)
            self.keys.append(request.headers.get("Authorization", ""))
            times = self.asked[said]
        made = self.answer(body, times)
        if isinstance(made, int):
            made = (made, {"error": {"message": f"status {made}"}})
        if isinstance(made, tuple):
            return Response(json.dumps(made[1]), status=made[0], content_type="application/json", headers=dict(made[2:]))
        return made if isinstance(made, Response) else Response(json.dumps(made), content_type="application/json")

    @property
    def calls(self) -> int:
        return sum(self.asked.values())
