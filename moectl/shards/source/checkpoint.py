"""Open a checkpoint: a directory or a Hub repository at one commit, by its headers.

It reads no weights: `blueprint` finds every error of a checkpoint in the headers, before any weight is read or
downloaded. `hub` downloads files, `tensors` reads headers.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from moectl.errors import CheckpointError, IntegrityError, MoectlError, Unreachable
from moectl.model.config_keys import CONFIG, GENERATION, check_generation, list_ignored
from moectl.model.parameters import read_defaults
from moectl.shards.source.cache_layout import find_snapshot, name_snapshot, refuse_pointers
from moectl.shards.source.hub import OnBytes, Repository, find_cached
from moectl.shards.source.tensors import StoredTensor, read_header

_MODELOPT = "hf_quant_config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATES = "chat_template*"
TOKENIZERS = (
    *("tokenizer*", "*.tiktoken", "tiktoken.model", "vocab*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", TEMPLATES),
)
_SIDECARS = (CONFIG, GENERATION, *TOKENIZERS, "LICENSE*", "NOTICE*", "USE_POLICY*")
# Code, and files that Python unpickles, under all their names.
_NEVER = (
    *("*.py", "*.pyc", "*.so", "*.dylib", "*.sh", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.p"),
    *("*.joblib", "*.dill", "*.npy", "*.npz", "*.h5", "*.msgpack", "*.gguf", "*.safetensors"),
)
_SIDECAR_LIMIT_BYTES = 64 << 20
_HEADER_THREADS = 8


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint with valid headers. Close it, or use it as a context manager."""

    source: str  # repo id, or the directory's name
    revision: str | None  # commit hash on the Hub, None for a directory
    config: dict[str, Any]
    stored: dict[str, StoredTensor]  # by the names in its files
    sizes: dict[str, int]  # weight file → bytes
    sidecars: tuple[str, ...]  # small files to copy: config, tokenizer, licence
    notes: tuple[str, ...]  # settings of its files that moectl leaves to each request
    _store: _Store = field(repr=False, compare=False)
    added: Mapping[str, Path] = field(default_factory=dict)  # sidecars from another place: name → path

    @property
    def files(self) -> Mapping[str, int]:
        """All files at the top of the checkpoint, and their bytes."""
        return self._store.files

    def path(self, file: str) -> Path:
        """Return a file's local path; download it first when it is absent: resumed, size and hash verified.

        Raises Unreachable, IntegrityError, CheckpointError, or StateError when the disk is full.
        """
        return self.added[file] if file in self.added else self._store.path(file)

    def with_files(self, kept: tuple[str, ...], added: Mapping[str, Path]) -> Checkpoint:
        """Return this checkpoint with only these of its small files, and with added ones."""
        return replace(self, sidecars=tuple(sorted({*kept, *added})), added=dict(added))

    def prefetch(self, file: str) -> None:
        """Start to download a file in the background, one at a time; `path` waits and raises its errors."""
        self._store.prefetch(file)

    def release(self, file: str) -> None:
        """Delete a file that was downloaded to the work directory; other files stay."""
        self._store.release(file)

    def close(self) -> None:
        """Stop downloads; the next run resumes their partial files."""
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

    Weights of a repository are used in place when the user's Hugging Face cache has them; otherwise `path` downloads
    them to `work_dir`, or to that cache when `keep_source` is set or there is no `work_dir`. Without network, with
    HF_HUB_OFFLINE, or when the repository is gone, the cache has to hold all files. Raises CheckpointError (it cannot
    be found, or moectl cannot run it), IntegrityError (damaged), Unreachable (network), StateError (disk).
    """
    directory = _find_directory(source)
    if directory is not None:
        return _read_checkpoint(_open_directory(directory, revision))
    try:
        repository = Repository(source, revision, None if keep_source else work_dir, on_bytes)
    except (Unreachable, CheckpointError) as error:
        return _open_cached(source, revision, error)
    try:
        return _read_checkpoint(repository)
    except BaseException:
        repository.close()
        raise


def open_store(source: str) -> _Store:
    """Open a directory or a Hub repository that need not be a checkpoint. Raises CheckpointError, Unreachable."""
    directory = _find_directory(source)
    return Repository(source, None, None, None) if directory is None else _open_directory(directory, None)


def _open_directory(directory: Path, revision: str | None) -> _Directory:
    """Open a directory; a snapshot of the Hugging Face cache gets its repository's name."""
    directory = find_snapshot(directory, revision)
    name, commit = name_snapshot(directory) or (None, None)
    return _Directory(directory, name=name, revision=commit)


def pull(source: str, *, revision: str | None = None, on_bytes: OnBytes | None = None) -> Path:
    """Download the files of a repository that moectl needs into the Hugging Face cache; return its directory there.

    A directory is only checked. Files that are there already are kept. Raises what `open_checkpoint` raises.
    """
    with open_checkpoint(source, revision=revision, keep_source=True, on_bytes=on_bytes) as checkpoint:
        for file in (*checkpoint.sidecars, *checkpoint.sizes):
            checkpoint.path(file)
        return checkpoint.path(CONFIG).parent


def _read_checkpoint(store: _Store) -> Checkpoint:
    if CONFIG not in store.files:
        is_set = "moectl.json" in store.files
        hint = "this is a shard set: moectl run --shards DIR" if is_set else f"name what holds {CONFIG} and the weights"
        raise CheckpointError(f"{store.name} is not a checkpoint: it has no {CONFIG}", hint=hint)
    store.refuse_pointers(
        [f for f, size in store.files.items() if f.endswith(".safetensors") or is_plain_data(f, size)]
    )
    config = read_json(store.path(CONFIG), f"{store.name}: {CONFIG}")
    config = _add_modelopt(store, config)
    generation = _read_generation(store)
    stored = _read_headers(store)
    needed = sorted({t.file for t in stored.values()})
    return Checkpoint(
        source=store.name,
        revision=store.revision,
        config=config,
        stored=stored,
        sizes={file: store.files[file] for file in needed},
        sidecars=tuple(sorted(f for f, size in store.files.items() if _is_sidecar(f, size))),
        notes=list_ignored(config, generation),
        _store=store,
    )


def _add_modelopt(store: _Store, config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with what NVIDIA's modelopt writes beside it: how the weights are quantised."""
    if _MODELOPT not in store.files or config.get("quantization_config"):
        return config
    told = read_json(store.path(_MODELOPT), f"{store.name}: {_MODELOPT}")
    return {**config, "quantization_config": {"quant_method": "modelopt", **told}}


def _read_generation(store: _Store) -> dict[str, Any]:
    """Return generation_config.json, empty where there is none. Raises CheckpointError."""
    if GENERATION not in store.files:
        return {}
    generation = read_json(store.path(GENERATION), f"{store.name}: {GENERATION}")
    check_generation(generation)
    return generation


def read_sampling(directory: Path) -> dict[str, int | float]:
    """Return the model's defaults for requests, from a shard set or a checkpoint. Raises CheckpointError."""
    path = directory / GENERATION
    return read_defaults(read_json(path, str(path))) if path.is_file() else {}


def _is_sidecar(file: str, size: int) -> bool:
    return any(fnmatch(file.lower(), p.lower()) for p in _SIDECARS) and is_plain_data(file, size)


def is_plain_data(file: str, size: int) -> bool:
    """Whether a file is small, is not code, and is not read by running code."""
    return size <= _SIDECAR_LIMIT_BYTES and not any(fnmatch(file.lower(), p) for p in _NEVER)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object of a file that errors call `what`. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except OSError as error:
        raise CheckpointError(f"{what} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}", hint="download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object", hint="download it again")
    return value


def _read_headers(store: _Store) -> dict[str, StoredTensor]:
    """Read the headers of all weight files: raw tensor name → place."""
    index = _read_index(store)
    files = sorted(set(index.values())) if index else _weight_files(store)
    headers = _read_in_parallel(store.header, files)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, place in headers[file].items():
            if index and index.get(name, place.file) != place.file:
                continue  # the index names the copy that counts
            if name in stored:
                raise CheckpointError(f"{store.name}: {name} is in both {stored[name].file} and {place.file}")
            stored[name] = place
    return stored


def _read_in_parallel(
    read: Callable[[str], dict[str, StoredTensor]], files: Sequence[str]
) -> dict[str, dict[str, StoredTensor]]:
    """Return read(file) of each file; raise the first error at once.

    Its threads are daemons, unlike those of a pool: a stalled connection must not keep the program from ending.
    """
    todo = deque(files)
    done: SimpleQueue[tuple[str, dict[str, StoredTensor] | BaseException]] = SimpleQueue()

    def work() -> None:
        while True:
            try:
                file = todo.popleft()
            except IndexError:
                return
            try:
                done.put((file, read(file)))
            except BaseException as error:
                done.put((file, error))

    for _ in range(min(_HEADER_THREADS, len(files))):
        threading.Thread(target=work, daemon=True).start()
    headers: dict[str, dict[str, StoredTensor]] = {}
    try:
        while len(headers) < len(files):
            file, header = done.get()
            if isinstance(header, BaseException):
                raise header
            headers[file] = header
    finally:
        todo.clear()
    return headers


def _read_index(store: _Store) -> dict[str, str]:
    if _INDEX not in store.files or _SINGLE in store.files:
        return {}
    weight_map = read_json(store.path(_INDEX), f"{store.name}: {_INDEX}").get("weight_map")
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
    files = [f for f in files if f.startswith("model")] or files  # beside them may be copies in another layout
    if not files:
        raise CheckpointError(
            f"{store.name} has no safetensors weights",
            hint="pickled (.bin, .pt) and GGUF weights are not read; take a copy of the model with .safetensors files",
        )
    return files


class _Store(Protocol):
    name: str
    files: dict[str, int]  # top-level file → bytes

    @property
    def revision(self) -> str | None: ...
    def header(self, file: str) -> dict[str, StoredTensor]: ...
    def path(self, file: str) -> Path: ...
    def prefetch(self, file: str) -> None: ...
    def release(self, file: str) -> None: ...
    def refuse_pointers(self, files: Sequence[str]) -> None: ...
    def close(self) -> None: ...


def _find_directory(source: str) -> Path | None:
    """Return the directory that `source` names, None when it can only be the name of a repository."""
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
    """Open the Hugging Face cache's copy of a repository that cannot be reached; raise `why` when it is incomplete."""
    config = find_cached(repo, CONFIG, revision)
    if config is None:
        raise why
    snapshot = config.parent
    try:
        return _read_checkpoint(_Directory(snapshot, name=repo, revision=snapshot.name))
    except CheckpointError as error:
        message = f"{why.message}; its cached copy cannot be used: {error.message}"
        raise type(why)(message, hint=why.hint) from None


class _Directory:
    """A checkpoint in a directory of this machine, which is only read."""

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
            raise IntegrityError(f"{path} was changed or removed after the checkpoint was opened")
        return path

    def refuse_pointers(self, files: Sequence[str]) -> None:
        refuse_pointers(self._root, files)

    def prefetch(self, file: str) -> None:
        pass

    def release(self, file: str) -> None:
        pass

    def close(self) -> None:
        pass
