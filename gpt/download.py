"""Files from the Hugging Face hub: each arrives whole and checked, or not at all."""

import hashlib
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow
import pyarrow.parquet as pq
import requests
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from autoresearch.files import UserError, one_line

PARALLEL = 8
TIMEOUT = (10.0, 30.0)  # seconds to connect, and of silence between two pieces of an answer
ATTEMPTS = 6  # in a row that brought no byte further
REDIRECTS = 10  # on the hub itself
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the next attempt: doubled each time, with jitter


class Faulty(Exception):
    """Something went wrong that may go right the next time. `pause` is what the server asks for, in
    seconds."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class Refused(Exception):
    """The server will say the same the next time."""


@dataclass(frozen=True)
class Remote:
    """A file of a dataset as the hub describes it. An unknown size or hash is None."""

    name: str
    url: str
    size: int | None
    sha256: str | None


def find_endpoint() -> str:
    """The hub, or the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def download(dataset: str, names: list[str], folder: Path, grow: float = 0.0) -> None:
    """Have these parquet files of a dataset in a folder: those that are missing are fetched,
    several at a time.

    HF_ENDPOINT names a mirror, HF_TOKEN is sent to it. What was interrupted is resumed from its
    `.part` file. `grow` is the room that whatever is made of the files will need, as a multiple of
    their size. UserError lists what could not be had; everything else is there by then.
    """
    wanted = [name for name in names if not (folder / name).exists()]
    if not wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    endpoint = find_endpoint()
    base = f"{endpoint}/datasets/{dataset}/resolve/main"
    missing: dict[str, list[str]] = {}  # by reason
    given_up = threading.Event()

    def tried(name: str, what: Callable[[], Remote | None]) -> Remote | None:
        try:
            return what()
        except (Refused, Faulty, requests.RequestException) as error:
            missing.setdefault(told(error), []).append(name)
        return None

    speed, left = TransferSpeedColumn(), TimeRemainingColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), speed, left)
    pool = ThreadPoolExecutor(PARALLEL)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"download {len(wanted)} files", total=None)
        try:
            asked = pool.map(
                lambda name: tried(name, lambda: describe(name, f"{base}/{name}")), wanted
            )
            remotes = [remote for remote in asked if remote]
            there = sum(size_of(partial(folder / remote.name)) for remote in remotes)
            total = sum(remote.size or 0 for remote in remotes)
            check_room(folder, total - there, total * grow)
            progress.update(task, total=total or None, completed=there)

            def get(remote: Remote) -> Remote | None:
                advance = lambda count: progress.advance(task, count)  # noqa: E731
                return tried(
                    remote.name, lambda: fetch(remote, folder / remote.name, advance, given_up)
                )

            list(pool.map(get, remotes))
        finally:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
    for reason, lost in missing.items():
        print(f"missing: {', '.join(sorted(lost))}: {reason}", file=sys.stderr)
    if missing:
        count = sum(map(len, missing.values()))
        where = f"from {endpoint}; HF_ENDPOINT names a mirror"
        raise UserError(
            f"{count} of {len(names)} files of {dataset} are missing ({where}); the same command "
            "again goes on where this one ended"
        )


def told(error: Exception) -> str:
    """What went wrong, in a line: of a connection that was not made, what lies under what requests
    wraps around it."""
    reason = error.args[0] if error.args else error
    return one_line(str(getattr(reason, "reason", reason)).partition("): ")[2] or str(reason))


def partial(target: Path) -> Path:
    """The file that a download grows in."""
    return target.with_name(target.name + ".part")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check_room(folder: Path, download: float, grow: float) -> None:
    free = shutil.disk_usage(folder).free
    if download + grow > free:
        needed = f"{folder} needs about {(download + grow) / 1e9:.1f} GB"
        cure = "make room, or move the cache with AUTORESEARCH_CACHE"
        raise UserError(f"{needed} and has {free / 1e9:.1f} GB free: {cure}")


def describe(name: str, url: str) -> Remote:
    """Ask for size and hash. The hub gives those of a large file with the redirect to where it is
    stored."""

    def ask() -> Remote:
        at = url
        for _ in range(REDIRECTS):
            answer = requests.head(at, headers=headers(), timeout=TIMEOUT, allow_redirects=False)
            at = (answer.next and answer.next.url) or ""
            if not at.startswith(origin(url)):
                break
        if answer.status_code in (405, 501):  # a mirror that knows only GET
            return Remote(name, url, None, None)
        refuse(answer)
        size = (
            answer.headers.get("X-Linked-Size")
            or (answer.ok and answer.headers.get("Content-Length"))
            or ""
        )
        etag = (answer.headers.get("X-Linked-Etag") or "").removeprefix("W/").strip('"').lower()
        known = len(etag) == 64 and all(digit in "0123456789abcdef" for digit in etag)
        return Remote(
            name,
            url,
            int(size) if size.isdecimal() and int(size) else None,
            etag if known else None,
        )

    return persist(ask, lambda: 0)


def fetch(
    remote: Remote, target: Path, advance: Callable[[int], None], given_up: threading.Event
) -> None:
    """Download one file into its place by way of `.part`, however often it takes."""
    part = partial(target)

    def attempt() -> None:
        stream(remote, part, advance, given_up)
        if wrong := fault(remote, part):
            start_over(part, advance)
            raise Faulty(wrong)

    persist(attempt, lambda: size_of(part))
    part.replace(target)


T = TypeVar("T")


def persist(action: Callable[[], T], reached: Callable[[], int]) -> T:
    """Try until it works, or until ATTEMPTS in a row have not got further. The last error is
    raised."""
    furthest, attempt = reached(), 0
    while True:
        try:
            return action()
        except (Faulty, requests.RequestException) as error:
            attempt = 1 if reached() > furthest else attempt + 1
            furthest = max(furthest, reached())
            if attempt >= ATTEMPTS:
                raise
            asked = error.pause if isinstance(error, Faulty) else 0.0
            pause = max(PAUSE * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5), asked)
            time.sleep(min(pause, LONGEST_PAUSE))


def stream(
    remote: Remote, part: Path, advance: Callable[[int], None], given_up: threading.Event
) -> None:
    """Append to the `.part` file what it lacks, or write it anew where the server does not
    resume."""
    have = size_of(part)
    if have and have == remote.size:
        return
    resume = {"Range": f"bytes={have}-"} if have else {}
    with requests.get(
        remote.url, headers=headers() | resume, timeout=TIMEOUT, stream=True
    ) as answer:
        begin = (
            answer.headers.get("Content-Range", f"bytes {have}-")
            .removeprefix("bytes ")
            .partition("-")[0]
        )
        if answer.status_code == 416 or (answer.status_code == 206 and begin != str(have)):
            start_over(part, advance)
            raise Faulty(f"the server has no byte {have}, or gave others")
        refuse(answer)
        if have and answer.status_code != 206:
            start_over(part, advance)
        with part.open("ab") as file:
            for chunk in answer.iter_content(2**16):
                if given_up.is_set():
                    raise Refused("interrupted")
                file.write(chunk)
                advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())


def start_over(part: Path, advance: Callable[[int], None]) -> None:
    advance(-size_of(part))
    part.unlink(missing_ok=True)


def fault(remote: Remote, part: Path) -> str:
    """What is wrong with a download that no further bytes can mend: length, hash, parquet footer.
    Empty: nothing."""
    size = size_of(part)
    if remote.size is not None and size < remote.size:
        raise Faulty(f"it ended after {size} of {remote.size} bytes")
    if remote.size is not None and size > remote.size:
        return f"it has {size} bytes and should have {remote.size}"
    if remote.sha256 and sha256_of(part) != remote.sha256:
        return "its hash is not the one that the hub gives"
    return "" if is_parquet(part) else "it is not a whole parquet file"


def is_parquet(path: Path) -> bool:
    try:
        pq.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        return False
    return True


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def headers() -> dict[str, str]:
    """A compressed answer could not be resumed by its bytes."""
    token = os.environ.get("HF_TOKEN", "").strip()
    return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})


def origin(url: str) -> str:
    return "/".join(url.split("/")[:3]) + "/"


def refuse(answer: requests.Response) -> None:
    """Tell what can be tried again from what cannot."""
    code = answer.status_code
    if code in (401, 403):
        raise Refused(f"{code}: the server wants a login, or another: set HF_TOKEN")
    if code == 429 or code >= 500:
        asked = answer.headers.get("Retry-After", "")
        raise Faulty(f"{code} {answer.reason}", float(asked) if asked.isdecimal() else 0.0)
    if code >= 400:
        raise Refused(f"{code} {answer.reason}")
