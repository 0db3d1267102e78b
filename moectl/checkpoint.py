"""Open a DBRX checkpoint: a directory or a Hub repository at one commit, checked by its headers.

It reads no weights and writes nothing but what it downloads. huggingface_hub does all HTTP. A Hub file's
header comes by range request and is validated over a hollow copy (header plus hole), so every error is found
before any weight is downloaded. What the tensors are called is `layouts`' business.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from moectl.errors import CheckpointError, IntegrityError, MoectlError, StateError, Unreachable
from moectl.geometry import Geometry, read_geometry
from moectl.layouts import SourceTensor as SourceTensor
from moectl.layouts import (
    StoredTensor,
    header_length,
    name_tensors,
    quantization_of,
    read_header,
    read_quantization,
)
from moectl.manifest import Quantization

OnBytes = Callable[[str, int, int], None]  # weight file, bytes done, bytes in all; from another thread

MIRRORS = (
    "alpindale/dbrx-instruct",
    "SinclairSchneider/dbrx-instruct-quantization-fixed",
    "mlx-community/dbrx-instruct-4bit",
)
_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SIDECARS = (
    _CONFIG,
    "generation_config.json",
    "tokenizer*",
    "*.tiktoken",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_NEVER = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.safetensors")
_SIDECAR_LIMIT_BYTES = 64 << 20
_FIRST_READ_BYTES = 64 << 10
_RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint whose headers have been found good. Close it, or use it as a context manager."""

    source: str  # repo id, or the directory's name
    revision: str | None  # commit hash on the Hub, None for a directory
    config: dict[str, Any]
    geometry: Geometry
    quantization: Quantization | None  # of an already quantised (MLX) checkpoint
    tensors: dict[str, SourceTensor]  # by canonical name; quantised: ….scales (and ….biases) beside ….weight
    sizes: dict[str, int]  # weight file → bytes
    sidecars: tuple[str, ...]  # small files to carry along: config, tokenizer, licence
    _store: _Store = field(repr=False, compare=False)

    def quantization_of(self, name: str) -> Quantization | None:
        """Return how a canonical `….weight` is quantised in this checkpoint, None when it is not."""
        scales = name.removesuffix("weight") + "scales"
        return quantization_of(self.config, name) if scales in self.tensors else None

    def path(self, file: str) -> Path:
        """Return a file's local path; download it first when it is absent: resumed, size and hash verified.

        Raises Unreachable, IntegrityError, CheckpointError, or StateError when the disk is full.
        """
        return self._store.path(file)

    def prefetch(self, file: str) -> None:
        """Start to download a file in the background, one at a time; `path` waits and raises its errors."""
        self._store.prefetch(file)

    def release(self, file: str) -> None:
        """Delete a file that was downloaded to the work directory; anything else stays."""
        self._store.release(file)

    def close(self) -> None:
        """Stop downloads; what has come of a file stays for the next run to resume."""
        self._store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    work_dir: Path | None = None,
    keep_source: bool = False,
    on_bytes: OnBytes | None = None,
) -> Checkpoint:
    """Open a directory, or a Hub repository at one commit, and check it by its headers.

    Weights of a repository are used in place when the user's Hugging Face cache has them; else `path`
    downloads them to `work_dir`, or to that cache when `keep_source` is set or there is no `work_dir`.
    Without network, with HF_HUB_OFFLINE, or when the repository is gone, that cache has to have all. Raises
    CheckpointError (no model that moectl runs, or not to be had), IntegrityError (damaged), Unreachable
    (network), StateError (disk).
    """
    directory = _find_directory(source)
    if directory is not None:
        return _read_checkpoint(_Directory(directory))
    try:
        hub = _Hub(source, revision, None if keep_source else work_dir, on_bytes)
    except (Unreachable, CheckpointError) as error:
        return _open_cached(source, revision, error)
    try:
        return _read_checkpoint(hub)
    except BaseException:
        hub.close()
        raise


def pull(source: str, *, revision: str | None = None, on_bytes: OnBytes | None = None) -> Path:
    """Download what moectl needs of a repository into the Hugging Face cache; return its directory there.

    A directory is only checked. Files that are there are kept. Raises what `open_checkpoint` raises.
    """
    with open_checkpoint(source, revision=revision, keep_source=True, on_bytes=on_bytes) as checkpoint:
        for file in (*checkpoint.sidecars, *checkpoint.sizes):
            checkpoint.path(file)
        if checkpoint.revision is not None and _INDEX in checkpoint._store.files:
            checkpoint.path(_INDEX)
        return checkpoint.path(_CONFIG).parent


def _read_checkpoint(store: _Store) -> Checkpoint:
    if _CONFIG not in store.files:
        hint = "this is a shard set: moectl run --shards DIR" if "moectl.json" in store.files else None
        raise CheckpointError(f"{store.name} is not a checkpoint: it has no {_CONFIG}", hint=hint)
    config = _read_json(store.path(_CONFIG), f"{store.name}: {_CONFIG}")
    geometry = read_geometry(config)
    quantization = read_quantization(config)
    stored = _read_headers(store)
    tensors = {t.name: t for t in name_tensors(stored, geometry, config)}
    needed = sorted({t.file for t in tensors.values()})
    return Checkpoint(
        source=store.name,
        revision=store.revision,
        config=config,
        geometry=geometry,
        quantization=quantization,
        tensors=tensors,
        sizes={file: store.files[file] for file in needed},
        sidecars=tuple(sorted(f for f, size in store.files.items() if _is_sidecar(f, size))),
        _store=store,
    )


def _is_sidecar(file: str, size: int) -> bool:
    name = file.lower()
    wanted = any(fnmatch(name, p.lower()) for p in _SIDECARS) and not any(fnmatch(name, p) for p in _NEVER)
    return wanted and size <= _SIDECAR_LIMIT_BYTES


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{what} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value


def _read_headers(store: _Store) -> dict[str, StoredTensor]:
    """Read the headers of all weight files: raw tensor name → place."""
    index = _read_index(store)
    files = sorted(set(index.values())) if index else _weight_files(store)
    stored: dict[str, StoredTensor] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        headers = list(pool.map(store.header, files))
    for header in headers:
        for name, place in header.items():
            if index and index.get(name, place.file) != place.file:
                continue  # the index says which of two copies counts
            if name in stored:
                raise CheckpointError(f"{store.name}: {name} is in both {stored[name].file} and {place.file}")
            stored[name] = place
    return stored


def _read_index(store: _Store) -> dict[str, str]:
    if _INDEX not in store.files or _SINGLE in store.files:
        return {}
    weight_map = _read_json(store.path(_INDEX), f"{store.name}: {_INDEX}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{store.name}: {_INDEX} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or file not in store.files:
            raise CheckpointError(
                f"{store.name}: {_INDEX} says that {name} is in {file!r}, and there is no such file",
                hint="complete the download of this checkpoint",
            )
    return weight_map


def _weight_files(store: _Store) -> list[str]:
    files = [_SINGLE] if _SINGLE in store.files else sorted(f for f in store.files if f.endswith(".safetensors"))
    if not files:
        raise CheckpointError(
            f"{store.name} has no safetensors weights",
            hint="pickled (.bin, .pt) and GGUF weights are not read; try " + " or ".join(MIRRORS),
        )
    return files


# Where the files are: a directory, or a repository on the Hub.


class _Store(Protocol):
    name: str
    files: dict[str, int]  # top-level file → bytes

    @property
    def revision(self) -> str | None: ...
    def header(self, file: str) -> dict[str, StoredTensor]: ...
    def path(self, file: str) -> Path: ...
    def prefetch(self, file: str) -> None: ...
    def release(self, file: str) -> None: ...
    def close(self) -> None: ...


def _find_directory(source: str) -> Path | None:
    """Return the directory that `source` names, None when it can only be a repository's name."""
    try:
        directory = Path(source).expanduser()
        if source and directory.is_dir():
            return directory
        if source and directory.exists():
            raise CheckpointError(f"{source} is a file; give the directory of the checkpoint")
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source!r} cannot be opened: {error}") from None
    if not source or source[0] in "./~" or source.count("/") > 1:
        raise CheckpointError(f"there is no directory {source!r}")
    return None


def _open_cached(repo: str, revision: str | None, why: MoectlError) -> Checkpoint:
    """Open the Hugging Face cache's copy of a repository out of reach; raise `why` when it is not whole."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(repo, _CONFIG, revision=revision)
    except (OSError, ValueError):
        config = None
    if not isinstance(config, str):
        raise why
    snapshot = Path(config).parent
    try:
        return _read_checkpoint(_Directory(snapshot, name=repo, revision=snapshot.name))
    except CheckpointError as error:
        message = f"{why.message}; its cached copy cannot be used: {error.message}"
        raise type(why)(message, hint=why.hint) from None


class _Directory:
    """A checkpoint on this machine's disk: never written to."""

    def __init__(self, root: Path, *, name: str | None = None, revision: str | None = None) -> None:
        self.name = name or root.resolve().name
        self.revision = revision
        self._root = root
        try:
            self.files = {p.name: p.stat().st_size for p in root.iterdir() if p.is_file()}
        except OSError as error:
            raise CheckpointError(f"{root} cannot be read: {error.strerror or error}") from None

    def header(self, file: str) -> dict[str, StoredTensor]:
        return read_header(self._root / file, file)

    def path(self, file: str) -> Path:
        path = self._root / file
        if not path.is_file() or path.stat().st_size != self.files.get(file):
            raise IntegrityError(f"{path} has changed or gone since the checkpoint was opened")
        return path

    def prefetch(self, file: str) -> None:
        pass

    def release(self, file: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Stopped(Exception):
    """The download is no longer wanted; leaves a partial file for the next run."""


class _Hub:
    """One commit of a Hub repository. Small files go to the Hugging Face cache, weights there or not."""

    def __init__(self, repo: str, revision: str | None, work_dir: Path | None, on_bytes: OnBytes | None) -> None:
        self.name = repo
        self._asked = revision or "main"
        self._on_bytes = on_bytes or (lambda *_: None)
        self._closing = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._guard = threading.Lock()  # of _downloads
        self._downloads: dict[str, Future[Path]] = {}
        info = self._ask(f"revision {self._asked}", lambda: _repo_info(repo, revision))
        self.revision: str = info.sha
        self.files: dict[str, int] = {}
        self._hashes: dict[str, tuple[str, str]] = {}
        for sibling in info.siblings or []:
            if "/" not in sibling.rfilename and sibling.size is not None:
                self.files[sibling.rfilename] = sibling.size
                self._hashes[sibling.rfilename] = _promised_hash(sibling)
        self._root = work_dir and work_dir / f"{repo.replace('/', '--')}-{self.revision[:12]}"

    def header(self, file: str) -> dict[str, StoredTensor]:
        """Read a header with one or two range requests, and no weights."""
        local = self._cached(file)
        if local is not None:
            return read_header(local, file)
        size = self.files[file]
        start = self._range(file, 0, min(size, _FIRST_READ_BYTES))
        stop = 8 + header_length(start[:8], file, size)
        if stop > len(start):
            start += self._range(file, len(start), stop)
        try:
            return _read_hollow(start[:stop], file, size)
        except OSError as error:
            raise _disk_error(error, Path(tempfile.gettempdir())) from None

    def path(self, file: str) -> Path:
        try:
            return self._start(file).result()
        except MoectlError:
            with self._guard:
                self._downloads.pop(file, None)  # a later call tries again
            raise
        except _Stopped:
            raise StateError(f"{self.name} was closed while {file} was on its way") from None

    def prefetch(self, file: str) -> None:
        self._start(file)

    def _start(self, file: str) -> Future[Path]:
        with self._guard:
            future = self._downloads.get(file)
            if future is None:
                future = self._downloads[file] = Future[Path]()
                # A daemon: a stalled connection must not keep the program from leaving.
                threading.Thread(target=self._fill, args=(future, file), daemon=True).start()
        return future

    def release(self, file: str) -> None:
        with self._guard:
            future = self._downloads.get(file)
            if future is not None and not future.done():
                return
            self._downloads.pop(file, None)
        if self._root is not None and file in self.files:
            # An earlier run may have left it: what is released is not needed any more.
            with contextlib.suppress(OSError):
                (self._root / file).unlink(missing_ok=True)

    def close(self) -> None:
        self._closing.set()
        if self._root is not None:
            with contextlib.suppress(OSError):  # absent, or it holds what the next run can use
                self._root.rmdir()

    def _fill(self, future: Future[Path], file: str) -> None:
        try:
            with self._one_at_a_time:
                future.set_result(self._fetch(file))
        except (MoectlError, _Stopped) as error:
            future.set_exception(error)
        except BaseException as error:
            future.set_exception(_hub_error(error, self.name, file))

    def _fetch(self, file: str) -> Path:
        if self._closing.is_set():
            raise _Stopped
        if file not in self.files:
            raise CheckpointError(f"{self.name} has no file {file}")
        cached = self._cached(file)
        if cached is not None:
            return cached
        if self._root is None or not file.endswith(".safetensors"):
            return self._ask(file, lambda: self._fetch_to_cache(file))
        path = self._root / file
        if path.is_file() and self._is_intact(path, file):
            return path
        self._fetch_to_work_dir(file, path)
        return path

    def _cached(self, file: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, file, revision=self.revision)
        if not isinstance(found, str) or not Path(found).is_file():
            return None
        return Path(found) if Path(found).stat().st_size == self.files[file] else None

    def _fetch_to_cache(self, file: str) -> Path:
        from huggingface_hub import constants, hf_hub_download

        _require_space(Path(constants.HF_HUB_CACHE), self.files[file], file)
        bar = self._make_bar(file)
        # The branch's name, not its commit, makes the cache remember the branch: offline runs look for it.
        asked = self._asked if file == _CONFIG else self.revision
        path = Path(hf_hub_download(self.name, file, revision=asked, tqdm_class=bar))
        if path.parent.name != self.revision:  # the branch has moved on since it was opened
            path = Path(hf_hub_download(self.name, file, revision=self.revision, tqdm_class=bar))
        if not self._is_intact(path, file):
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise self._wrong_bytes(file)
        return path

    def _fetch_to_work_dir(self, file: str, path: Path) -> None:
        """Download to `path`.partial, resuming what is there, and rename when size and hash are right.

        Not hf_hub_download: its newer versions start a file afresh once the process has died.
        """
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            kept = self._complete(file, partial)
            if kept and not self._is_intact(partial, file):
                partial.unlink()  # what an earlier run left was not what it seemed
                self._complete(file, partial)
            if not self._is_intact(partial, file):
                partial.unlink()
                raise self._wrong_bytes(file)
            partial.replace(path)
        except OSError as error:
            raise _disk_error(error, path) from None

    def _complete(self, file: str, partial: Path) -> int:
        """Download what a partial file lacks; return how many bytes were there."""
        with partial.open("ab") as f:
            self._lock(f, partial.parent)
            if f.tell() > self.files[file]:
                f.truncate(0)
            kept = f.seek(0, 2)
            _require_space(partial.parent, self.files[file] - kept, file)
            self._ask(file, lambda: self._append(file, f))
        return kept

    def _append(self, file: str, f: IO[bytes]) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        f.flush()
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
        f.flush()

    def _lock(self, f: IO[bytes], root: Path) -> None:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"another moectl is downloading to {root}", hint="wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks

    def _range(self, file: str, start: int, stop: int) -> bytes:
        return self._ask(file, lambda: _read_range(self.name, file, self.revision, start, stop))

    def _is_intact(self, path: Path, file: str) -> bool:
        algorithm, promised = self._hashes[file]
        size = path.stat().st_size
        if size != self.files[file]:
            return False
        if not promised:
            return True
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
        return IntegrityError(
            f"{file} of {self.name} came with the wrong size or hash, and was deleted",
            hint="run the same command again",
        )

    def _make_bar(self, file: str) -> Any:
        """Return a silent tqdm class that tells `on_bytes` instead of a terminal."""
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        hub = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.done = int(kwargs.get("initial") or 0)
                # hf_xet has a second bar for what crosses the network: only what is on disk counts.
                self.counts = file.endswith(".safetensors") and ".transfer" not in str(kwargs.get("name"))
                kwargs["disable"] = True
                super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                if hub._closing.is_set():
                    raise _Stopped
                self.done += int(n or 0)
                if self.counts:
                    hub._on_bytes(file, self.done, hub.files[file])

        return Bar

    def _ask(self, what: str, call: Callable[[], _T]) -> _T:
        """Do one thing with the Hub: retry what may pass, turn what does not into our errors."""
        _silence()
        waits = iter(_RETRY_WAITS_S)
        while True:
            try:
                return call()
            except (MoectlError, _Stopped):
                raise
            except Exception as error:  # httpx, huggingface_hub, hf_xet: each has its own tree
                wait_s = next(waits, None) if _may_pass(error) else None
                if wait_s is None:
                    raise _hub_error(error, self.name, what) from None
                if self._closing.wait(max(wait_s, _retry_after_s(error))):
                    raise _Stopped from None


def _silence() -> None:
    """Keep huggingface_hub's warnings off the terminal: what matters comes back as our errors."""
    from huggingface_hub.utils import logging

    logging.set_verbosity(logging.log_levels["critical"])


def _repo_info(repo: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)


def _promised_hash(sibling: Any) -> tuple[str, str]:
    if sibling.lfs is not None:
        return "sha256", sibling.lfs.sha256
    return "sha1", sibling.blob_id or ""


def _read_range(repo: str, file: str, revision: str, start: int, stop: int) -> bytes:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(repo, file, revision=revision)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    data = b""
    with get_session().stream("GET", url, headers=headers, timeout=30) as response:
        hf_raise_for_status(response)
        first = start if response.status_code == 206 else 0
        for chunk in response.iter_bytes():
            data += chunk
            if first + len(data) >= stop:  # a server that ignores Range would send the whole file
                break
    data = data[start - first : stop - first]
    if len(data) < stop - start:
        raise OSError(f"{len(data)} bytes came instead of {stop - start}")
    return data


def _read_hollow(header: bytes, file: str, size: int) -> dict[str, StoredTensor]:
    """Validate a header against its file's length: the safetensors library gets the header and a hole."""
    with tempfile.TemporaryDirectory(prefix="moectl-") as directory:
        hollow = Path(directory) / "hollow.safetensors"
        with hollow.open("wb") as f:
            f.write(header)
            f.truncate(size)
        return read_header(hollow, file)


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return _status(error) in (408, 429, 500, 502, 503, 504) and _retry_after_s(error) <= 60
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # httpx has no public home here: its errors are what HfHubHTTPError is derived from.
    cut_short = isinstance(error, OSError) and error.errno is None and not isinstance(error, FileNotFoundError)
    return cut_short or isinstance(error, HfHubHTTPError.__bases__[0])


def _retry_after_s(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0


def _hub_error(error: BaseException, repo: str, what: str) -> MoectlError:
    """Turn an error of huggingface_hub or of the disk into ours, saying what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HFValidationError):
        return CheckpointError(
            f"{repo!r} is neither a directory nor a repository's name", hint="use OWNER/NAME or a path"
        )
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return Unreachable(
            f"{what} of {repo} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE, or give a directory",
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{repo} has no {what}", hint=f"see https://huggingface.co/{repo}/commits/main")
    if isinstance(error, EntryNotFoundError):
        return CheckpointError(f"{repo} has no file {what}")
    if _status(error):
        return _status_error(error, repo, what)
    if isinstance(error, OSError) and error.errno is not None:
        return _disk_error(error, Path(error.filename or what))
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Unreachable(f"{what} of {repo} did not come: {reason}", hint="run the same command again: it resumes")


def _status_error(error: BaseException, repo: str, what: str) -> MoectlError:
    from huggingface_hub.errors import GatedRepoError

    status = _status(error)
    page = f"https://huggingface.co/{repo}"
    mirrors = ", ".join(m for m in MIRRORS if m != repo)
    if status == 403 or isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{repo} may not be downloaded with this account (HTTP {status})",
            hint=f"accept its licence at {page} and set HF_TOKEN; or use a mirror: {mirrors}",
        )
    if status == 401:
        return CheckpointError(
            f"{repo} does not exist, or is closed to you (HTTP 401)",
            hint=f"accept its licence at {page} and set a valid HF_TOKEN; or use a mirror: {mirrors}",
        )
    if status in (404, 410):
        return CheckpointError(f"the Hub has no repository {repo} (HTTP {status})", hint=f"try a mirror: {mirrors}")
    wait_s = _retry_after_s(error) if isinstance(error, Exception) else 0
    when = f" in {wait_s:.0f} s" if wait_s else ""
    return Unreachable(
        f"{what} of {repo} did not come: the Hub answered HTTP {status}",
        hint=f"run the same command again{when}: it resumes",
    )


def _require_space(directory: Path, nbytes: int, file: str) -> None:
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise StateError(
            f"{file} needs {nbytes / 1e9:.1f} GB, and {directory} has {free / 1e9:.1f} GB free",
            hint="free some space and run the same command again: it resumes",
        )


def _disk_error(error: OSError, path: Path) -> MoectlError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StateError(
            f"the disk is full: {path} cannot be written",
            hint="free some space and run the same command again: it resumes",
        )
    return StateError(f"{path} cannot be written: {error.strerror or error}")
