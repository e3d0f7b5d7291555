"""Published weights, fetched into the user's cache and resumed after a break."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cmkit.errors import DownloadError, ResourceError
from cmkit.files import atomic_write, lock
from cmkit.weights.files import Weights

_BLOCK = 1 << 20
_TIMEOUT = 20


@dataclass(frozen=True)
class Downloaded:
    """Bytes of a file that are here, of `total` (0 = the server does not say)."""

    name: str
    done: int
    total: int


def download(weights: Weights) -> Iterator[Downloaded]:
    """Fetch published weights into the user's cache, from where an earlier attempt stopped.

    The file gets its name only once it is whole. DownloadError says where to put it by hand;
    ResourceError when the disk has no room.
    """
    url, part = weights.url, weights.path.with_name(f"{weights.path.name}.part")
    assert url is not None
    with lock(weights.path.parent):
        try:
            yield from _fetch(weights.name, url, part)
        except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
            raise DownloadError(
                f"{weights.name}: {url}: {getattr(error, 'reason', error)}; go online and"
                f" run again, or download it elsewhere to {weights.path}"
            ) from error
        except OSError as error:
            raise ResourceError(
                f"{part}: {error.strerror}; free some space or set XDG_CACHE_HOME"
            ) from error
        os.replace(part, weights.path)


def _fetch(name: str, url: str, part: Path) -> Iterator[Downloaded]:
    """Append to `part` until it is whole; a server whose file has changed starts it anew."""
    version = part.with_name(f"{part.name}.etag")
    have = part.stat().st_size if part.exists() and version.exists() else 0
    request = urllib.request.Request(url)  # noqa: S310 - the plugin's own address
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", version.read_text("utf-8"))
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send: the part is whole, or of another file
            raise
        part.unlink()
        raise ValueError("the part that was here does not continue; it is removed") from error
    with response:
        if response.status != 206:
            have = 0
        length = int(response.headers.get("Content-Length") or 0)
        total = have + length if length else 0
        free = shutil.disk_usage(part.parent).free
        if length > free:
            raise ResourceError(
                f"{part.parent}: {name} needs {length} bytes, {free} are free; free some"
                " space or set XDG_CACHE_HOME"
            )
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if have == 0 and tag:
            atomic_write(version, tag)
        with part.open("ab" if have else "wb") as file:
            yield Downloaded(name, have, total)
            while block := response.read(_BLOCK):
                file.write(block)
                have += len(block)
                yield Downloaded(name, have, total)
            file.flush()
            os.fsync(file.fileno())
        if total and have != total:
            raise ConnectionError(f"{have} of {total} bytes came")
        version.unlink(missing_ok=True)
