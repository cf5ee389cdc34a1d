"""A scripted model on loopback: as much of the Anthropic Messages API and the OpenAI Responses API, both streaming, as
Claude Code and Codex need to work as they would with a real one."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Say:
    """Answer and end the turn."""

    text: str


@dataclass(frozen=True)
class Change:
    """Replace a string in a file by the client's own editing tool."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Shell:
    command: str


@dataclass(frozen=True)
class Fail:
    """An HTTP error as the API words it."""

    status: int
    kind: str
    message: str
    extra: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stall:
    """Begin to stream and go silent."""


@dataclass(frozen=True)
class Truncate:
    """Begin to stream, then hang up."""


Move = Say | Change | Shell | Fail | Stall | Truncate
Script = Callable[
    [str, int], Move
]  # the prompt of a conversation, the answers it already has -> the next one


class ModelServer(ThreadingHTTPServer):
    """Plays a script; `requests` counts what was asked of the model, `models` are the names it was called by.

    Every answer costs 20 tokens out, and 100 in with 30 of a cache: on top with Anthropic, among them with OpenAI.
    """

    daemon_threads = True

    def __init__(self, script: Script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.requests = 0
        self.models: set[str] = set()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "ModelServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: ModelServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.reply(200, b"")

    def do_GET(self) -> None:
        self.reply(200, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        api = {"/v1/messages": Anthropic, "/v1/responses": OpenAI}.get(self.path.partition("?")[0])
        if api is None:
            self.reply(404, b"{}")
            return
        self.server.requests += 1
        self.server.models.add(body["model"])
        prompt, turn = api.read(body)
        match self.server.script(prompt, turn):
            case Fail() as fail:
                self.reply(fail.status, json.dumps(api.error(fail)).encode(), fail.headers)
            case Stall():
                self.stream(api.opening(body))
                self.server.closing.wait(60)
            case Truncate():
                self.stream(api.opening(body))
            case move:
                self.stream([*api.opening(body), *api.answer(move, turn, body)])

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self, events: list[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()  # without a length: the end of the connection is the end
        for event in events:
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()


class Anthropic:
    """https://docs.anthropic.com/en/api/messages-streaming"""

    @staticmethod
    def read(body: dict[str, Any]) -> tuple[str, int]:
        said = [message["content"] for message in body["messages"] if message["role"] == "user"]
        parts = [
            part
            for content in said
            for part in (
                [{"type": "text", "text": content}] if isinstance(content, str) else content
            )
        ]
        prompt = "\n".join(part["text"] for part in parts if part["type"] == "text")
        return prompt, sum(message["role"] == "assistant" for message in body["messages"])

    @staticmethod
    def error(fail: Fail) -> dict[str, Any]:
        return {
            "type": "error",
            "error": {"type": fail.kind, "message": fail.message, **fail.extra},
        }

    @staticmethod
    def opening(body: dict[str, Any]) -> list[dict[str, Any]]:
        usage = {
            "input_tokens": 100,
            "cache_read_input_tokens": 30,
            "cache_creation_input_tokens": 0,
            "output_tokens": 1,
        }
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": [],
                   "stop_reason": None, "stop_sequence": None, "usage": usage}  # fmt: skip
        return [{"type": "message_start", "message": message}]

    @staticmethod
    def answer(move: Move, turn: int, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        cwd = re.search(r"working directory: ([^\n]+)", json.dumps(body).replace("\\n", "\n"))
        root = cwd[1] if cwd else ""
        calls: list[tuple[str, dict[str, str]]] = []
        match move:
            case Change(path, old, new):  # its editing tool wants the file read first
                file = {"file_path": f"{root}/{path}"}
                calls = [("Read", file), ("Edit", {**file, "old_string": old, "new_string": new})]
            case Shell(command):
                calls = [("Bash", {"command": command, "description": "a command"})]
            case Say(text):
                yield from block(
                    0, {"type": "text", "text": ""}, {"type": "text_delta", "text": text}
                )
        for i, (name, given) in enumerate(calls):
            start = {"type": "tool_use", "id": f"toolu_{turn}_{i}", "name": name, "input": {}}
            yield from block(
                i, start, {"type": "input_json_delta", "partial_json": json.dumps(given)}
            )
        stop = {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}
        yield {"type": "message_delta", "delta": stop, "usage": {"output_tokens": 20}}
        yield {"type": "message_stop"}


def block(index: int, start: dict[str, Any], delta: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"type": "content_block_start", "index": index, "content_block": start}
    yield {"type": "content_block_delta", "index": index, "delta": delta}
    yield {"type": "content_block_stop", "index": index}


class OpenAI:
    """https://platform.openai.com/docs/api-reference/responses-streaming"""

    @staticmethod
    def read(body: dict[str, Any]) -> tuple[str, int]:
        said = [item["content"] for item in body["input"] if item.get("role") == "user"]
        prompt = "\n".join(part["text"] for content in said for part in content)
        return prompt, sum(item["type"].endswith("_output") for item in body["input"])

    @staticmethod
    def error(fail: Fail) -> dict[str, Any]:
        return {
            "error": {"type": fail.kind, "code": fail.kind, "message": fail.message, **fail.extra}
        }

    @staticmethod
    def opening(body: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"type": "response.created", "response": {"id": "resp_1"}}]

    @staticmethod
    def answer(move: Move, turn: int, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        item: dict[str, Any] = {
            "id": f"item_{turn}",
            "status": "completed",
            "call_id": f"call_{turn}",
        }
        match move:
            case Change(path, old, new):
                patch = (
                    f"*** Begin Patch\n*** Update File: {path}\n@@\n-{old}\n+{new}\n*** End Patch\n"
                )
                item |= {"type": "custom_tool_call", "name": "apply_patch", "input": patch}
            case Shell(command):
                script = f"text(JSON.stringify(await tools.exec_command({{cmd: {json.dumps(command)}}})))"
                item |= {"type": "custom_tool_call", "name": "exec", "input": script}
            case Say(text):
                content = [{"type": "output_text", "text": text, "annotations": []}]
                item = {
                    "id": "msg_1",
                    "type": "message",
                    "role": "assistant",
                    "status": "completed",
                    "content": content,
                }
        yield {"type": "response.output_item.added", "output_index": 0, "item": item}
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        usage = {"input_tokens": 100, "input_tokens_details": {"cached_tokens": 30}, "output_tokens": 20,
                 "output_tokens_details": {"reasoning_tokens": 5}, "total_tokens": 120}  # fmt: skip
        yield {"type": "response.completed", "response": {"id": "resp_1", "usage": usage}}
