"""Files of one commit of a Hugging Face Hub repository: headers by range request, downloads that resume and verify.

huggingface_hub does all HTTP. It is slow to import, so only this module and `hub_errors` import it, when a repository
is opened. `checkpoint` decides which files a model needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, TypeVar

from moectl.errors import CheckpointError, IntegrityError, MoectlError, StateError
from moectl.files import explain_refusal, free_bytes
from moectl.shards.source.hub_environment import check_environment
from moectl.shards.source.hub_errors import AGAIN, hub_error, may_pass, retry_after_s
from moectl.shards.source.tensors import StoredTensor, header_length, read_header
from moectl.text import format_gb

OnBytes = Callable[[str, int, int], None]  # weight file, bytes done, bytes in all; called on another thread

_FIRST_READ_BYTES = 64 << 10
_RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0)
_TIMEOUT_S = 30
# A file at the top whose name is harmless on a disk, in a terminal and as an argument.
_PLAIN_NAME = re.compile(r"[\w(][\w()+=@, .~-]*")
_T = TypeVar("_T")


class _Stopped(Exception):
    """The download was stopped; the partial file stays for the next run."""


class Repository:
    """One commit of a repository. Small files go to the Hugging Face cache, weights there or to `work_dir`."""

    def __init__(self, repo: str, revision: str | None, work_dir: Path | None, on_bytes: OnBytes | None) -> None:
        """Ask the Hub for the files of the commit. Raises CheckpointError, Unreachable, or UsageError (environment)."""
        check_environment()
        from huggingface_hub import HfApi
        from huggingface_hub.utils import logging

        logging.set_verbosity(logging.log_levels["critical"])  # failures become our errors
        self.name = repo
        self._asked = revision or "main"
        self._on_bytes = on_bytes or (lambda *_: None)
        self._closing = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._guard = threading.Lock()  # of _downloads
        self._downloads: dict[str, Future[Path]] = {}
        info = self._ask(
            f"revision {self._asked}",
            lambda: HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S),
        )
        self.files: dict[str, int] = {}
        self._hashes: dict[str, tuple[str, str]] = {}  # file → algorithm, digest
        self.revision = str(info.sha or self._find_commit(info.siblings or []))
        if not re.fullmatch("[0-9a-f]{40}", self.revision):  # it becomes a part of a directory's name
            raise CheckpointError(f"the Hub says that {repo} is at {self.revision[:60]!r}, which is not a commit")
        for entry in info.siblings or []:
            if not _PLAIN_NAME.fullmatch(entry.rfilename):
                continue
            if entry.size is None:
                self._ask_size(entry.rfilename)
                continue
            self.files[entry.rfilename] = entry.size
            promised = ("sha256", entry.lfs.sha256) if entry.lfs else ("sha1", entry.blob_id or "")
            self._hashes[entry.rfilename] = promised
        self._root = work_dir and work_dir / f"{repo.replace('/', '--')}-{self.revision[:12]}"

    def _find_commit(self, entries: Sequence[Any]) -> str:
        """Return the commit from the headers of a file: the listing of a mirror may not name it."""
        names = [entry.rfilename for entry in entries if _PLAIN_NAME.fullmatch(entry.rfilename)]
        found = self._head(min(names, key=lambda name: name != "config.json"), self._asked) if names else None
        if found is None or not found.commit_hash:
            raise self._lacks(f"at which commit {self.name} is")
        return str(found.commit_hash)

    def _ask_size(self, file: str) -> None:
        """Take a file's size and hash from its own headers: the listing may not have them."""
        found = self._head(file, self.revision)
        if found.size is None:
            raise self._lacks(f"how large {file} of {self.name} is")
        etag = found.etag or ""
        self.files[file] = found.size
        self._hashes[file] = ("sha256", etag) if re.fullmatch("[0-9a-f]{64}", etag) else ("sha1", _git_hash(etag))

    def _head(self, file: str, revision: str) -> Any:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.name, file, revision=revision)
        return self._ask(file, lambda: get_hf_file_metadata(url, timeout=_TIMEOUT_S))

    def _lacks(self, what: str) -> CheckpointError:
        from huggingface_hub import constants

        hint = "use another mirror, or unset HF_ENDPOINT" if "HF_ENDPOINT" in os.environ else AGAIN
        return CheckpointError(f"the server at {constants.ENDPOINT} does not say {what}", hint=hint)

    def header(self, file: str) -> dict[str, StoredTensor]:
        """Read a header with one or two range requests, and no weights."""
        local = self._cached(file)
        if local is not None:
            with contextlib.suppress(MoectlError):  # a power cut may have emptied it: then it is fetched again
                return read_header(local, file)
        size = self.files[file]
        start = self._range(file, 0, min(size, _FIRST_READ_BYTES))
        stop = 8 + header_length(start[:8], file, size)
        if stop > len(start):
            start += self._range(file, len(start), stop)
        try:
            return _read_hollow(start[:stop], file, size)
        except OSError as error:
            raise explain_refusal(error, Path(tempfile.gettempdir())) from None

    def path(self, file: str) -> Path:
        """Return a file's local path once it is there."""
        try:
            return self._start(file).result()
        except MoectlError:
            with self._guard:
                self._downloads.pop(file, None)  # a later call tries again
            raise
        except _Stopped:
            raise StateError(f"{self.name} was closed while {file} was being downloaded") from None

    def prefetch(self, file: str) -> None:
        """Start to download a file in the background, after those that were started before."""
        self._start(file)

    def release(self, file: str) -> None:
        """Delete a file from the work directory, unless its download is not finished."""
        with self._guard:
            future = self._downloads.get(file)
            if future is not None and not future.done():
                return
            self._downloads.pop(file, None)
        if self._root is not None and file in self.files:
            # Also a file of an earlier run: a released file is no longer needed.
            with contextlib.suppress(OSError):
                (self._root / file).unlink(missing_ok=True)

    def refuse_pointers(self, files: Sequence[str]) -> None:
        """Do nothing: the Hub sends the files that Git LFS keeps."""

    def close(self) -> None:
        """Stop downloads when their next bytes arrive, without waiting for them."""
        self._closing.set()
        if self._root is not None:
            with contextlib.suppress(OSError):  # it does not exist, or holds files for the next run
                self._root.rmdir()
                self._root.parent.rmdir()

    def _start(self, file: str) -> Future[Path]:
        with self._guard:
            future = self._downloads.get(file)
            if future is None:
                future = self._downloads[file] = Future[Path]()
                # A daemon: a stalled connection must not keep the program from ending.
                threading.Thread(target=self._fill, args=(future, file), daemon=True).start()
        return future

    def _fill(self, future: Future[Path], file: str) -> None:
        try:
            with self._one_at_a_time:
                future.set_result(self._fetch(file))
        except (MoectlError, _Stopped) as error:
            future.set_exception(error)
        except BaseException as error:
            future.set_exception(hub_error(error, self.name, file))

    def _fetch(self, file: str) -> Path:
        if self._closing.is_set():
            raise _Stopped
        if file not in self.files:
            raise CheckpointError(f"{self.name} has no file {file}")
        cached = self._cached(file)
        if cached is not None:
            # The cache does not make files durable before they get their names: one of the right size may hold zeros.
            if self._is_intact(cached, file):
                return cached
            _drop(cached)
        if self._root is None or not file.endswith(".safetensors"):
            return self._ask(file, lambda: self._fetch_to_cache(file))
        path = self._root / file
        if not (path.is_file() and self._is_intact(path, file)):
            self._fetch_to_work_dir(file, path)
        return path

    def _cached(self, file: str) -> Path | None:
        found = find_cached(self.name, file, self.revision)
        return found if found is not None and found.stat().st_size == self.files[file] else None

    def _fetch_to_cache(self, file: str) -> Path:
        from huggingface_hub import constants

        _require_space(Path(constants.HF_HUB_CACHE), self.files[file], file)
        path = self._download_to_cache(file)
        if not self._is_intact(path, file):
            _drop(path)  # its bytes may come from an earlier run: download it once more
            path = self._download_to_cache(file)
        if not self._is_intact(path, file):
            _drop(path)
            raise self._wrong_bytes(file)
        return path

    def _download_to_cache(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        bar = self._make_bar(file)
        # With the branch's name, not its commit, the cache records the branch: offline runs look for it.
        asked = self._asked if file == "config.json" else self.revision
        path = Path(hf_hub_download(self.name, file, revision=asked, tqdm_class=bar))
        if path.parent.name != self.revision:  # the branch has a new commit since then
            path = Path(hf_hub_download(self.name, file, revision=self.revision, tqdm_class=bar))
        return path

    def _fetch_to_work_dir(self, file: str, path: Path) -> None:
        """Download to `path`.partial, which is resumed, and rename it when size and hash are right.

        Not by hf_hub_download: its newer versions start a file afresh after the process has died.
        """
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            resumed = self._complete(file, partial)
            while not self._is_intact(partial, file):
                partial.unlink()
                if not resumed:
                    raise self._wrong_bytes(file)
                resumed = self._complete(file, partial)  # the bytes of an earlier run were wrong
            partial.replace(path)
        except OSError as error:
            raise explain_refusal(error, path) from None

    def _complete(self, file: str, partial: Path) -> bool:
        """Download the rest of a partial file; return whether it had some bytes."""
        with partial.open("ab") as f:
            _lock(f, partial.parent)
            if f.tell() > self.files[file]:
                f.truncate(0)
            kept = f.seek(0, 2)
            _require_space(partial.parent, self.files[file] - kept, file)
            self._ask(file, lambda: self._append(file, f))
        return kept > 0

    def _append(self, file: str, f: IO[bytes]) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        done = f.seek(0, 2)
        self._on_bytes(file, done, self.files[file])
        http_get(
            hf_hub_url(self.name, file, revision=self.revision),
            f,  # type: ignore[arg-type]
            resume_size=done,
            headers={**build_hf_headers(), "Accept-Encoding": "identity"},
            expected_size=self.files[file],
            tqdm_class=self._make_bar(file),
        )

    def _range(self, file: str, start: int, stop: int) -> bytes:
        return self._ask(file, lambda: _read_range(self.name, file, self.revision, start, stop))

    def _is_intact(self, path: Path, file: str) -> bool:
        algorithm, promised = self._hashes[file]
        size = path.stat().st_size
        if size != self.files[file] or not promised:
            return size == self.files[file]
        digest = hashlib.new(algorithm)
        if algorithm == "sha1":  # git hashes a blob with its length in front
            digest.update(f"blob {size}\0".encode())
        with path.open("rb") as f:
            while chunk := f.read(1 << 20):
                if self._closing.is_set():
                    raise _Stopped
                digest.update(chunk)
        return digest.hexdigest() == promised

    def _wrong_bytes(self, file: str) -> IntegrityError:
        return IntegrityError(f"{file} of {self.name} arrived with a wrong size or hash, and was deleted", hint=AGAIN)

    def _make_bar(self, file: str) -> Any:
        """Return a tqdm class that prints nothing and calls `on_bytes`."""
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        repository = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.done = int(kwargs.get("initial") or 0)
                # hf_xet has a second bar for the bytes on the network: only bytes on the disk count.
                self.counts = file.endswith(".safetensors") and ".transfer" not in str(kwargs.get("name"))
                kwargs["disable"] = True
                super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                if repository._closing.is_set():
                    raise _Stopped
                self.done += int(n or 0)
                if self.counts:
                    repository._on_bytes(file, self.done, repository.files[file])

        return Bar

    def _ask(self, what: str, call: Callable[[], _T]) -> _T:
        """Make one request to the Hub: retry after passing failures, turn the others into our errors."""
        waits = iter(_RETRY_WAITS_S)
        while True:
            try:
                return call()
            except (MoectlError, _Stopped):
                raise
            except Exception as error:  # httpx, huggingface_hub, hf_xet: each has its own classes
                wait_s = next(waits, None) if may_pass(error) else None
                if wait_s is None:
                    raise hub_error(error, self.name, what) from None
                if self._closing.wait(max(wait_s, retry_after_s(error))):
                    raise _Stopped from None


def find_cached(repo: str, file: str, revision: str | None) -> Path | None:
    """Return the Hugging Face cache's copy of a file without asking the Hub, None when there is none."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, file, revision=revision)
    except (OSError, ValueError):  # it cannot be read, or is not the name of a repository
        return None
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def _git_hash(etag: str) -> str:
    return etag if re.fullmatch("[0-9a-f]{40}", etag) else ""


def _drop(cached: Path) -> None:
    """Delete a file of the cache, with its name in the snapshot."""
    cached.resolve().unlink(missing_ok=True)
    cached.unlink(missing_ok=True)


def _read_range(repo: str, file: str, revision: str, start: int, stop: int) -> bytes:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(repo, file, revision=revision)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    data = b""
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        first = start if response.status_code == 206 else 0
        for chunk in response.iter_bytes():
            data += chunk
            if first + len(data) >= stop:  # a server that ignores Range would send the whole file
                break
    data = data[start - first : stop - first]
    if len(data) < stop - start:
        raise OSError(f"{len(data)} bytes arrived instead of {stop - start}")
    return data


def _read_hollow(header: bytes, file: str, size: int) -> dict[str, StoredTensor]:
    """Check a header against its file's size: the safetensors library reads a file with that header and no data."""
    with tempfile.TemporaryDirectory(prefix="moectl-") as directory:
        hollow = Path(directory) / "hollow.safetensors"
        with hollow.open("wb") as f:
            f.write(header)
            f.truncate(size)
        return read_header(hollow, file)


def _lock(f: IO[bytes], root: Path) -> None:
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StateError(f"another moectl is downloading to {root}", hint="wait for it, or end it") from None
    except OSError:
        pass  # a file system without locks


def _require_space(directory: Path, nbytes: int, file: str) -> None:
    free = free_bytes(directory)
    if free < nbytes:
        raise StateError(
            f"{file} needs {format_gb(nbytes)}, and {directory} has {format_gb(free)} free",
            hint=f"free some space and {AGAIN}: it resumes",
        )
