"""A server on this machine that speaks OpenAI's protocol and remembers what it was asked."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

__all__ = ["ChatServer"]


class ChatServer:
    """Answers every conversation with what the last demonstration was answered with, at `url`.

    Args:
        seconds: that an answer takes.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.asked: list[str] = []
        """The digest of each conversation, in the order in which they came."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                messages = json.loads(body)["messages"]
                outer.asked.append(hashlib.sha256(json.dumps(messages).encode()).hexdigest())
                time.sleep(seconds)
                told = json.dumps(_completion(messages)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _completion(messages: list[dict[str, Any]]) -> dict[str, Any]:
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    message = {"role": "assistant", "content": said[-1] if said else "nothing"}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "copies",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": len(messages), "completion_tokens": 1, "total_tokens": len(messages) + 1},
    }
