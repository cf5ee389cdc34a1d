"""Downloads from a hub that misbehaves: a real server on loopback, real parquet, real sockets."""

import hashlib
import io
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, clean_environment

from autoresearch.files import UserError
from gpt import arena as arenas
from gpt import download, make, text
from gpt import tokenizer as tokens
from gpt.tokenizer import Tokenizer

DATASET = "someone/some-text"


def parquet(rows: int, seed: int = 0) -> bytes:
    """A table of random words, some 200 kB for 1,000 rows."""
    rng = random.Random(seed)
    words = [f"{rng.getrandbits(40):x}" for _ in range(2000)]
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(rows)]
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file, row_group_size=200)
    return file.getvalue()


class Hub(ThreadingHTTPServer):
    """Serves files as the hub does: a redirect with size and hash, then the bytes, ranges included. `faults` names for
    each file what goes wrong with its next requests, one after the other."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.describes = True  # whether the redirect gives size and hash
        self.log: list[tuple[str, str, str]] = []  # method, file, range
        self.tokens: set[tuple[str, str]] = set()  # where a token was seen
        self.sent = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that this server itself breaks are no news."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        where = "store" if self.path.startswith("/store/") else "hub"
        if "Authorization" in self.headers:
            hub.tokens.add((where, self.headers["Authorization"]))
        if name not in hub.files:
            return self.say(404)
        content = hub.files[name]
        if where == "hub":
            faults = hub.faults.get(name, [])
            if faults and faults[0].startswith("hub-"):
                code, _, after = faults.pop(0).removeprefix("hub-").partition("/")
                return self.say(int(code), {"Retry-After": after} if after else {})
            facts = {
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            }
            store = hub.url.replace("127.0.0.1", "localhost")  # another host
            return self.say(
                302, {"Location": f"{store}/store/{name}"} | (facts if hub.describes else {})
            )
        hub.log.append((self.command, name, self.headers.get("Range", "")))
        fault = hub.faults[name].pop(0) if hub.faults.get(name) else ""
        return self.serve(content, fault)

    def serve(self, content: bytes, fault: str) -> None:
        if fault == "corrupt":
            content = bytes(len(content))
        if fault == "bad footer":
            content = content[:-100] + bytes(100)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if fault == "whole":
            start = 0
        if fault == "500" or start >= len(content):
            self.say(500 if fault else 416)
            return
        part = content[start:]
        status = 206 if start else 200
        if fault == "wrong range":
            start, part = start // 2, content[start // 2 :]
        if fault == "long":
            part += b"more"
        length = len(part) // 2 if fault == "short" else len(part)
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if status == 206 and fault != "no header":
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        sent = part[: length // 2] if fault in ("reset", "stall") else part[:length]
        self.wfile.write(sent)
        self.wfile.flush()
        self.server.sent += len(sent)
        if fault == "stall":
            time.sleep(3)
        if fault in ("reset", "stall"):
            self.close_connection = True

    def say(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", (5.0, 0.7))
    yield server
    server.shutdown()
    server.server_close()


def get(server: Hub, folder: Path) -> None:
    download.download(DATASET, list(server.files), folder)


def test_many_files_arrive(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.files = {f"{i}.parquet": parquet(500, i) for i in range(12)}
    get(server, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == server.files
    assert "download 12 files" in capsys.readouterr().err
    requests = len(server.log)
    get(server, tmp_path)
    assert len(server.log) == requests  # nothing is asked when all are there


@pytest.mark.parametrize("describes", [True, False])
@pytest.mark.parametrize(
    "faults",
    [
        ["500", "500"],
        ["hub-503", "hub-429/0"],
        ["reset"],
        [
            "500",
            "500",
            "500",
            "reset",
            "500",
            "500",
            "500",
            "reset",
            "500",
        ],  # more than it tries, but it gets further
        ["stall"],
        ["reset", "wrong range"],
        ["reset", "whole"],
        ["reset", "no header"],
        ["bad footer"],
        ["reset", "bad footer"],
        ["reset", "reset", "bad footer", "reset"],
    ],
)
def test_faults_that_pass(server: Hub, tmp_path: Path, faults: list[str], describes: bool) -> None:
    content = parquet(5000)
    server.files, server.faults, server.describes = (
        {"a.parquet": content},
        {"a.parquet": list(faults)},
        describes,
    )
    get(server, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert (tmp_path / "a.parquet").read_bytes() == content
    assert not server.faults["a.parquet"]


@pytest.mark.parametrize("fault", ["short", "long", "corrupt"])
def test_lengths_and_hashes_that_the_hub_gives_are_held(
    server: Hub, tmp_path: Path, fault: str
) -> None:
    content = parquet(1000)
    server.files, server.faults = {"a.parquet": content}, {"a.parquet": [fault, fault]}
    get(server, tmp_path)
    assert (tmp_path / "a.parquet").read_bytes() == content


def test_what_was_received_is_not_asked_for_again(server: Hub, tmp_path: Path) -> None:
    content = parquet(5000)
    server.files, server.faults = {"a.parquet": content}, {"a.parquet": ["reset"]}
    get(server, tmp_path)
    ranges = [wanted for _, _, wanted in server.log]
    assert ranges[0] == "" and int(ranges[1].strip("bytes=-")) > len(content) // 3
    assert server.sent < 1.2 * len(content)


def test_a_part_of_an_earlier_call_is_resumed(server: Hub, tmp_path: Path) -> None:
    content = parquet(1000)
    server.files = {"a.parquet": content}
    (tmp_path / "a.parquet.part").write_bytes(content[:100_000])
    get(server, tmp_path)
    assert (tmp_path / "a.parquet").read_bytes() == content and server.sent == len(
        content
    ) - 100_000


@pytest.mark.parametrize(
    "part", [b"x" * 1000, parquet(1000) + b"too long", parquet(1000)[:-1] + b"x"]
)
def test_a_part_that_is_rubbish(server: Hub, tmp_path: Path, part: bytes) -> None:
    content = parquet(1000)
    server.files = {"a.parquet": content}
    (tmp_path / "a.parquet.part").write_bytes(part)
    get(server, tmp_path)
    assert (tmp_path / "a.parquet").read_bytes() == content


def test_what_cannot_be_had_is_listed(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is not there, one never comes right, one is forbidden: the others arrive, and the next call goes on."""
    server.files = {f"{name}.parquet": parquet(300, i) for i, name in enumerate("abc")}
    server.faults = {"b.parquet": ["corrupt"] * 6, "c.parquet": ["hub-403"]}
    names = ["a.parquet", "b.parquet", "c.parquet", "d.parquet"]
    with pytest.raises(UserError, match="3 of 4 files of someone/some-text are missing"):
        download.download(DATASET, names, tmp_path)
    said = capsys.readouterr().err
    assert "missing: b.parquet: its hash is not the one that the hub gives" in said
    assert "missing: c.parquet: 403: the server wants a login, or another: set HF_TOKEN" in said
    assert "missing: d.parquet: 404 Not Found" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    server.files["d.parquet"] = parquet(10)
    asked = len(server.log)
    download.download(DATASET, names, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert all(name != "a.parquet" for _, name, _ in server.log[asked:])


def test_nobody_there(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError,
        match=r"2 of 2 files of someone/some-text are missing .* HF_ENDPOINT names a mirror",
    ):
        download.download(DATASET, ["b.parquet", "a.parquet"], tmp_path)
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("missing: a.parquet, b.parquet: Failed to establish a new connection")


def test_the_token_goes_to_the_hub_alone(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files = {"a.parquet": parquet(10)}
    get(server, tmp_path)
    assert server.tokens == {("hub", "Bearer hf_secret")}


def test_too_little_room(server: Hub, tmp_path: Path) -> None:
    server.files = {"a.parquet": parquet(10)}
    with pytest.raises(
        UserError, match=r"needs about .* GB and has .* GB free: make room, or move the cache"
    ):
        download.download(DATASET, ["a.parquet"], tmp_path, grow=1e15)
    assert not server.log and not list(tmp_path.iterdir())


def stories(rows: int) -> bytes:
    rng = np.random.default_rng(0)
    words = np.array(
        ["".join(word) for word in rng.choice(list("abcdefghijklmnopqrstuvwxyz"), (20_000, 6))]
    )
    file = io.BytesIO()
    with pq.ParquetWriter(file, pa.schema([("text", pa.string())])) as writer:
        for start in range(0, rows, 5000):
            texts = [
                f"{start + i} {' '.join(line)}."
                for i, line in enumerate(rng.choice(words, (5000, 60)))
            ]
            writer.write_table(pa.table({"text": texts}))
    return file.getvalue()


def test_tinystories_by_the_command_line(server: Hub, tmp_path: Path) -> None:
    """`prepare.py` alone makes the arena from what the hub serves, faults included, and splits it by rows."""
    content = stories(30_000)
    server.files = {"tinystories_gpt4_clean.parquet": content}
    server.faults = {"tinystories_gpt4_clean.parquet": ["reset"]}
    env = clean_environment(tmp_path) | {
        "HF_ENDPOINT": server.url,
        "AUTORESEARCH_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, ROOT / "prepare.py", "--arena", "tinystories"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"name": "tinystories", "budget": 300.0' in done.stdout.splitlines()[-1]
    check = """
import numpy as np
from gpt.arena import ARENAS, load_manifest
from gpt.pack import Documents
from gpt.tokenizer import Tokenizer
arena = ARENAS["tinystories"]
manifest = load_manifest(arena)
tokenizer = Tokenizer.load(arena.folder / manifest["tokenizer"])
for split, first in (("sealed", 0), ("val", 10_000)):
    rows = np.load(arena.folder / manifest[split])
    assert rows.shape == (2048, 513) and (rows[:, 0] == arena.bos).all()
    numbers = {int(tokenizer.encoding.decode(row[1:9].tolist()).split()[0]) for row in rows}
    assert all(first <= n < first + 10_000 for n in numbers) and len(numbers) > 1000, sorted(numbers)[:5]
documents = Documents(arena.folder, manifest["train"])
assert len(documents.file) == 10_000
"""
    env |= {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", check], env=env, check=True)


def test_climbmix_grows_by_shards(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another shard adds its tokens; validation, tokenizer and all that was made before stay as they were."""
    server.files = {f"shard_{i:05d}.parquet": parquet(500, seed=i) for i in (0, 1, 2, 6541, 6542)}
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(text, "PIECE", 100_000)
    for module in (make, tokens):
        monkeypatch.setattr(module, "TRAIN_CHARACTERS", 100_000)
    arena = replace(arenas.ARENAS["climbmix"], sequence_len=16, vocab_size=300, val_tokens=2**12)
    one = make.prepare(arena, shards=1)
    assert {name for _, name, _ in server.log} == {
        f"shard_{i:05d}.parquet" for i in (0, 6541, 6542)
    }
    three = make.prepare(arena, shards=3)
    assert one["files"].items() < three["files"].items() and one["data"] != three["data"]
    assert three["tokens"]["train"] > 2.5 * one["tokens"]["train"]
    assert make.prepare(arena) == three  # what is there, unless said
    tokenizer = Tokenizer.load(arena.folder / three["tokenizer"])
    for split, shard in (("val", 6542), ("sealed", 6541)):
        there = " ".join(
            pq.read_table(io.BytesIO(server.files[f"shard_{shard:05d}.parquet"]))[
                "text"
            ].to_pylist()
        )
        row = np.load(arena.folder / three[split])[0]
        assert (
            row[0] == arena.bos
            and tokenizer.encoding.decode(row[1:].tolist()).split("<|bos|>")[0] in there
        )


def test_interrupted(server: Hub, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a download ends it at once, and what has arrived stays."""
    content = stories(5000)
    server.files = {"tinystories_gpt4_clean.parquet": content}
    server.faults = {"tinystories_gpt4_clean.parquet": ["stall"]}
    env = clean_environment(tmp_path) | {
        "HF_ENDPOINT": server.url,
        "AUTORESEARCH_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, ROOT / "prepare.py", "--arena", "tinystories"]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while not server.sent:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(2)
    start = time.monotonic()
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "Traceback" not in said and time.monotonic() - start < 10
    (part,) = (tmp_path / "cache/downloads/tinystories-gpt4-clean").iterdir()
    assert part.name.endswith(".part") and 0 < part.stat().st_size < len(content)
