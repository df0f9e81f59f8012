"""A worker made of FastChat's own base class, which echoes: `python fschat_worker.py CONTROLLER PORT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastchat.serve.base_model_worker import BaseModelWorker, app


class EchoWorker(BaseModelWorker):
    """Answers with the last word of the prompt, letter by letter."""

    def generate_stream_gate(self, params: dict[str, Any]) -> Iterator[bytes]:
        word = params["prompt"].split()[-1]
        for end in range(1, len(word) + 1):
            yield json.dumps({"text": word[:end], "error_code": 0}).encode() + b"\0"


if __name__ == "__main__":
    controller, port = sys.argv[1], int(sys.argv[2])
    worker = EchoWorker(controller, f"http://localhost:{port}", "echo", "echo", ["echo"], 5, conv_template="one_shot")
    worker.init_heart_beat()
    uvicorn.run(app, host="localhost", port=port, log_level="info")
