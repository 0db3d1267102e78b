"""Cut a checkpoint into a shard set, in a stream, and check one that is there.

Carries out a `recipe`: reads rows, has them quantised by a callable that is passed in, writes at offsets
known beforehand, hashes, and writes the manifest last. Memory does not grow with the model, an interrupted
cut goes on where it was, a file gets its final name only when it is whole. It knows no array library.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from moectl import journal as journals
from moectl.errors import CheckpointError, IntegrityError, MoectlError, NotSharded, ShardsDiffer, StateError, UsageError
from moectl.manifest import NAME as MANIFEST_NAME
from moectl.manifest import FileEntry, Manifest, Quantization, read_manifest, write_manifest
from moectl.plan import Placement
from moectl.recipe import OutputFile, Piece, Quantise, Source, describe, item_bytes
from moectl.recipe import check_quantization as check_quantization
from moectl.recipe import plan_files as plan_files

MAX_JOBS = 16
_MEMORY_BYTES = 96 << 20  # for results under construction, shared by all jobs
_COPY_BYTES = 4 << 20
_HASH_BYTES = 1 << 20
_FLUSH_BYTES = 64 << 20
_MAX_VECTORS = 1024  # IOV_MAX of Linux and macOS

OnBytes = Callable[[int], None]
OpenQuantise = Callable[[int], AbstractContextManager[Quantise]]  # (memory in bytes) → one thread's quantiser


class Checkpoint(Source, Protocol):
    """What `cut` needs of `checkpoint.Checkpoint`."""

    @property
    def source(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def sidecars(self) -> Sequence[str]: ...
    def path(self, file: str) -> Path: ...
    def prefetch(self, file: str) -> None: ...
    def release(self, file: str) -> None: ...


def default_jobs() -> int:
    """Return how many streams to use: one core is left to reading, writing and hashing."""
    return max(1, min(4, (os.cpu_count() or 2) - 1))


def output_bytes(files: Iterable[OutputFile]) -> int:
    """Return the bytes of planned files together; the model's small files come on top."""
    return sum(f.bytes for f in files)


def cut(
    checkpoint: Checkpoint,
    placement: Placement,
    quantization: Quantization | None,
    directory: Path,
    *,
    name: str,
    quantise: OpenQuantise,
    jobs: int = 1,
    on_bytes: OnBytes | None = None,
    force: bool = False,
    keep_float32: bool = False,
) -> Manifest:
    """Write the shard set of a checkpoint to `directory`, or finish an interrupted one; return its manifest.

    `quantise` is `quantize.quantizer`; `jobs` streams work at once. `on_bytes` is told output bytes as they
    come (those of an earlier run at once), on the calling thread; they add up to `output_bytes`. A set that
    is there with the same settings is left alone unless `force`, which starts afresh. Raises PlanError,
    CheckpointError, ShardsDiffer or UsageError (the directory holds something else), StateError (disk full,
    not writable, in use), and IntegrityError or Unreachable from the checkpoint.
    """
    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError(f"{jobs} jobs cannot be; use 1 to {MAX_JOBS}")
    files = plan_files(checkpoint, placement, quantization, keep_float32=keep_float32)
    plain = Manifest(
        name=name,
        source=checkpoint.source,
        revision=checkpoint.revision,
        fingerprint=fingerprint_source(checkpoint),
        config=checkpoint.config,
        quantization=quantization,
        split=placement.split,
        shares=placement.shares,
        unit=placement.unit,
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with journals.lock_directory(directory):
            return _cut_locked(_Job(checkpoint, plain, files, directory, quantise, jobs, on_bytes), force)
    except OSError as error:
        raise _explain(error, directory) from error


def fingerprint_source(checkpoint: Checkpoint) -> str:
    """Return a hash that tells one state of the weight files from another without reading them.

    A commit of the Hub never changes; a directory may without a change of names or sizes, so its times count too.
    """
    local = checkpoint.revision is None
    state = [
        (file, size, checkpoint.path(file).stat().st_mtime_ns if local else checkpoint.revision)
        for file, size in sorted(checkpoint.sizes.items())
    ]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def verify(directory: Path, *, on_bytes: OnBytes | None = None) -> Manifest:
    """Hash every file of a shard set again and return its manifest.

    Raises NotSharded, and IntegrityError that names the files that are missing or have another size or bytes.
    """
    manifest = read_manifest(directory)
    problems = []
    for file, entry in manifest.files.items():
        problem = _find_problem(directory / file, entry, on_bytes)
        if problem:
            problems.append(f"{file} {problem}")
    if problems:
        named = ", ".join(problems[:3]) + (f", and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise IntegrityError(
            f"{len(problems)} of {len(manifest.files)} files in {directory} are damaged: {named}",
            hint="delete those files and run the same 'moectl shard' again: it makes only them",
        )
    return manifest


def _find_problem(path: Path, entry: FileEntry, on_bytes: OnBytes | None) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"has {size} bytes instead of {entry.bytes}"
        return None if _hash_file(path, on_bytes or _ignore) == entry.sha256 else "has other bytes"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _ignore(_: int) -> None:
    pass


class _Job:
    """The settings of one `cut`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        manifest: Manifest,
        files: list[OutputFile],
        directory: Path,
        quantise: OpenQuantise,
        jobs: int,
        on_bytes: OnBytes | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.manifest = manifest  # without files
        self.files = files
        self.directory = directory
        self.quantise = quantise
        self.jobs = jobs
        self.on_bytes = on_bytes or _ignore

    def binding(self) -> dict[str, Any]:
        """Return what an unfinished directory is bound to: as long as it is equal, its files may be kept."""
        m, q = self.manifest, self.manifest.quantization
        return {
            "schema": "moectl.journal/1",
            "source": m.source,
            "revision": m.revision,
            "config": m.config,
            "quantization": [q.bits, q.group_size, q.mode] if q else None,
            "split": m.split,
            "shares": list(m.shares),
            "unit": m.unit,
            "fingerprint": m.fingerprint,
            "files": {f.path: f.bytes for f in self.files},
        }


def _cut_locked(job: _Job, force: bool) -> Manifest:
    done = {} if force else _find_finished(job)
    manifest_path = job.directory / MANIFEST_NAME
    if done is None:
        manifest = read_manifest(job.directory)
        if manifest.name != job.manifest.name:
            manifest = replace(manifest, name=job.manifest.name)
            write_manifest(job.directory, manifest)
        job.on_bytes(output_bytes(job.files))
        (job.directory / journals.NAME).unlink(missing_ok=True)
        return manifest
    if force:
        _clear(job)
    journal = journals.Journal(job.directory, job.binding(), done)
    manifest_path.unlink(missing_ok=True)  # after the journal: one of the two says at any time that this is ours
    # A file has its final name before it has its hash: it is whole, and need not be made again.
    named = [f for f in job.files if f.path not in done and _size(job.directory / f.path) == f.bytes]
    missing = [f for f in job.files if f.path not in done and f not in named]
    _check_space(job, missing)
    job.on_bytes(output_bytes(f for f in job.files if f.path in done))
    _Run(job, journal).run(named, missing)
    sidecars = {file: _copy_sidecar(job, file) for file in _sidecars(job)}
    tensors: dict[str, list[str]] = {}
    for file in job.files:
        for tensor in file.tensors:
            tensors.setdefault(tensor, []).append(file.path)
    made = {f.path: journal.done[f.path] for f in job.files}
    manifest = replace(job.manifest, files=dict(sorted({**sidecars, **made}.items())), tensors=tensors)
    write_manifest(job.directory, manifest)
    journals.sync_directory(job.directory)
    journal.remove()
    return manifest


def _find_finished(job: _Job) -> dict[str, FileEntry] | None:
    """Return the files that an earlier run finished; None when the whole shard set is there."""
    held = journals.read_journal(job.directory)
    try:
        manifest = read_manifest(job.directory)
    except NotSharded:
        manifest = None
    if manifest is not None:
        done = _finished_of(job, manifest)
        whole = manifest.files.keys() == done.keys() | set(_sidecars(job)) and len(done) == len(job.files)
        return None if whole and all(_matches(job, f, e) for f, e in manifest.files.items()) else done
    if held is None:
        _refuse_strangers(job.directory)
        return {}
    binding, done = held
    if binding != job.binding():
        what = _difference(binding, job.binding())
        raise ShardsDiffer(
            f"{job.directory} holds an unfinished shard set made with other settings{what}",
            hint="choose another directory with -o, or start afresh with --force",
        )
    return {f: e for f, e in done.items() if _matches(job, f, e)}


def _finished_of(job: _Job, there: Manifest) -> dict[str, FileEntry]:
    """Return the files of a finished shard set that can be kept. Raises ShardsDiffer when it is another one."""
    mine = {f.path: f.bytes for f in job.files}
    same = replace(there, name=job.manifest.name, files={}, tensors={}).to_json() == job.manifest.to_json()
    sizes = {f: e.bytes for f, e in there.files.items() if f in mine}
    if same and sizes == mine:
        return {f: e for f, e in there.files.items() if f in mine and _matches(job, f, e)}
    if there.fingerprint != job.manifest.fingerprint and there.source == job.manifest.source:
        raise ShardsDiffer(
            f"{there.source} is not as it was when {job.directory} was made of it",
            hint="make it again with --force, or choose another directory with -o",
        )
    raise ShardsDiffer(
        f"{job.directory} already holds another shard set: {there.source}, "
        f"{describe(there.quantization)}, {there.split} {','.join(map(str, there.shares))}",
        hint="choose another directory with -o, or replace it with --force",
    )


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    for key in ("source", "revision", "quantization", "split", "shares", "unit"):
        if there.get(key) != here[key]:
            return f": {key} {there.get(key)} there, {here[key]} now"
    return ": the source has changed" if there.get("fingerprint") != here["fingerprint"] else ""


def _refuse_strangers(directory: Path) -> None:
    # Hidden names may be ours (a lock, a download beside) or the desktop's; anything else is somebody's work.
    if any(not p.name.startswith(".") for p in directory.iterdir()):
        raise UsageError(f"{directory} is not empty and is not a shard set", hint="choose a new directory with -o")


def _clear(job: _Job) -> None:
    """Delete what an earlier shard set left, by the names that its records and this plan give."""
    old = {f.path for f in job.files}
    held = journals.read_journal(job.directory)
    if held is not None:
        old |= set(held[0].get("files", {}))
    try:
        old |= set(read_manifest(job.directory).files)
    except MoectlError:
        if held is None:
            _refuse_strangers(job.directory)
    for file in old:
        path = job.directory / file
        path.unlink(missing_ok=True)
        _partial(path).unlink(missing_ok=True)
        if path.parent != job.directory and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
    (job.directory / MANIFEST_NAME).unlink(missing_ok=True)
    (job.directory / journals.NAME).unlink(missing_ok=True)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _matches(job: _Job, file: str, entry: FileEntry) -> bool:
    return _size(job.directory / file) == entry.bytes


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _check_space(job: _Job, missing: Sequence[OutputFile]) -> None:
    """Raise StateError unless the disk has room for what is missing."""
    there = sum(p.stat().st_blocks * 512 for p in (_partial(job.directory / f.path) for f in missing) if p.exists())
    needed = max(0, output_bytes(missing) - there)
    files = {p.file for f in missing for p in f.pieces}
    sources = 0
    if job.manifest.revision is not None:
        sources = sum(sorted((job.checkpoint.sizes[f] for f in files), reverse=True)[:2])
    free = shutil.disk_usage(job.directory).free
    if needed + sources > free:
        downloads = f" and {_gb(sources)} for downloads" if sources else ""
        raise StateError(
            f"{job.directory} has {_gb(free)} free, {_gb(needed)}{downloads} are needed",
            hint="free some space, or choose another disk with -o",
        )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _sidecars(job: _Job) -> list[str]:
    skip = (MANIFEST_NAME, "model.safetensors.index.json")
    return sorted({"config.json", *(s for s in job.checkpoint.sidecars if s not in skip)})


def _copy_sidecar(job: _Job, file: str) -> FileEntry:
    target = job.directory / file
    data = job.checkpoint.path(file).read_bytes()
    with _partial(target).open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    _partial(target).replace(target)
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def _hash_file(path: Path, on_bytes: OnBytes) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_HASH_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as f:
        while count := f.readinto(buffer):
            digest.update(view[:count])
            on_bytes(count)
    return digest.hexdigest()


def _explain(error: OSError, directory: Path) -> MoectlError:
    """Turn what the disk says into what to do."""
    path = error.filename or directory
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(directory).free if directory.is_dir() else 0
        return StateError(
            f"{directory} is full ({os.strerror(error.errno)}; {_gb(free)} free)",
            hint="free some space and run the same command again: it continues",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StateError(
            f"{path} cannot be written: {os.strerror(error.errno)}", hint="choose another directory with -o"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UsageError(f"{directory} is not a directory", hint="choose another directory with -o")
    return StateError(f"{path} cannot be used: {error.strerror or error}")


class _Cancelled(Exception):
    """Another thread failed, or the user wants to stop."""


class _Sources:
    """Source files passing through: the next is fetched in advance, each is dropped after its last use."""

    def __init__(self, checkpoint: Checkpoint, files: Sequence[OutputFile], cancel: threading.Event) -> None:
        self._checkpoint = checkpoint
        self._cancel = cancel
        self._remaining = Counter(p.file for f in files for p in f.pieces)
        self._order = list(self._remaining)
        self._lock = threading.Lock()
        self._opening = {file: threading.Lock() for file in self._order}
        self._fds: dict[str, int] = {}
        self._held: set[str] = set()  # here, or on their way

    def open(self, file: str) -> int:
        """Return an open descriptor of a file, fetched first when it is not there."""
        with self._opening[file]:
            if self._cancel.is_set():
                raise _Cancelled
            if file not in self._fds:
                with self._lock:
                    self._held.add(file)
                path = self._fetch(file)
                self._fds[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._fetch_next()
            return self._fds[file]

    def _fetch(self, file: str) -> Path:
        if self._checkpoint.revision is None:
            return self._checkpoint.path(file)
        # A download takes minutes and cannot be told to stop from here: wait where Ctrl-C is heard.
        future: Future[Path] = Future()
        threading.Thread(target=_resolve, args=(future, self._checkpoint.path, file), daemon=True).start()
        while not self._cancel.wait(0 if future.done() else 0.05):
            if future.done():
                return future.result()
        raise _Cancelled

    def done(self, file: str) -> None:
        """Count one use of a file as over."""
        with self._lock:
            self._remaining[file] -= 1
            if self._remaining[file]:
                return
            self._held.discard(file)
            os.close(self._fds.pop(file))
            self._checkpoint.release(file)
        self._fetch_next()

    def _fetch_next(self) -> None:
        # Two at a time: the one in use and the one after it.
        with self._lock:
            coming = next((f for f in self._order if self._remaining[f] and f not in self._held), None)
            if coming is not None and len(self._held) < 2 and not self._cancel.is_set():
                self._held.add(coming)
                self._checkpoint.prefetch(coming)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _resolve(future: Future[Path], call: Callable[[str], Path], file: str) -> None:
    try:
        future.set_result(call(file))
    except BaseException as error:
        future.set_exception(error)


class _Output:
    """One file under construction."""

    def __init__(self, file: OutputFile, directory: Path, flusher: ThreadPoolExecutor) -> None:
        self.file = file
        self.path = directory / file.path
        self.path.parent.mkdir(exist_ok=True)
        self.remaining = len(file.pieces)
        self._flusher = flusher
        self._flush: Future[None] | None = None
        self._unflushed = 0
        self._fd = os.open(_partial(self.path), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            self.write(0, memoryview(file.header))
        except BaseException:
            self.discard()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            count = os.pwrite(self._fd, data, offset)
            offset += count
            self._unflushed += count
            data = data[count:]
        # Keeps little for the fsync at the end, at which a stream would wait.
        if self._unflushed > _FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._unflushed = 0
            self._flush = self._flusher.submit(os.fsync, self._fd)

    def finish(self) -> None:
        """Make the file durable and give it its name."""
        if self._flush is not None:
            self._flush.result()
        if os.fstat(self._fd).st_size != self.file.bytes:
            raise IntegrityError(f"{self.path} came out at another size than planned; this is a defect of moectl")
        os.fsync(self._fd)
        self.close()
        _partial(self.path).replace(self.path)
        journals.sync_directory(self.path.parent)

    def close(self) -> None:
        if self._flush is not None:
            self._flush.exception()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def discard(self) -> None:
        self.close()
        _partial(self.path).unlink(missing_ok=True)


class _Run:
    """Threads that make the missing files of a shard set, piece by piece, and hash them."""

    def __init__(self, job: _Job, journal: journals.Journal) -> None:
        self._job = job
        self._journal = journal
        self._journal_lock = threading.Lock()
        self._cancel = threading.Event()
        self._news: SimpleQueue[int | BaseException | None] = SimpleQueue()  # bytes, a failure, or a thread's end
        self._outputs: dict[str, _Output] = {}
        self._lock = threading.Lock()
        self._pieces: Iterator[tuple[OutputFile, Piece]] = iter(())

    def run(self, named: Sequence[OutputFile], missing: Sequence[OutputFile]) -> None:
        """Hash the files of `named`, make and hash those of `missing`; raise a thread's first failure."""
        self._pieces = ((f, p) for f in missing for p in f.pieces)
        self._sources = _Sources(self._job.checkpoint, missing, self._cancel)
        with ExitStack() as stack:
            stack.callback(self._clean_up)
            self._flusher = stack.enter_context(ThreadPoolExecutor(1, "flush"))
            self._hasher = stack.enter_context(ThreadPoolExecutor(self._job.jobs, "hash"))
            stack.callback(self._cancel.set)
            hashes = [self._hasher.submit(self._hash, f, True) for f in named]
            self._hashes = hashes
            workers = [threading.Thread(target=self._work, name=f"cut {i}", daemon=True) for i in range(self._job.jobs)]
            for worker in workers:
                worker.start()
            try:
                self._follow(len(workers))
            finally:
                self._cancel.set()
                for worker in workers:
                    worker.join()

    def _follow(self, running: int) -> None:
        """Pass news on until all threads have ended."""
        failure: BaseException | None = None
        while running or any(not h.done() for h in self._hashes) or not self._news.empty():
            try:
                news = self._news.get(timeout=0.1 if running else 0.02)
            except Empty:
                continue
            if isinstance(news, int):
                self._job.on_bytes(news)
            elif news is None:
                running -= 1
            elif failure is None:
                failure = news
                self._cancel.set()
        if failure is not None:
            raise failure

    def _work(self) -> None:
        try:
            with ExitStack() as stack:
                quantise: Quantise | None = None
                while (item := self._next()) is not None:
                    output, piece = item
                    if not piece.matrix.is_copy and quantise is None:
                        quantise = stack.enter_context(self._job.quantise(_MEMORY_BYTES // self._job.jobs))
                    self._make(output, piece, quantise)
        except _Cancelled:
            pass
        except BaseException as error:
            self._news.put(error)
        finally:
            self._news.put(None)

    def _next(self) -> tuple[_Output, Piece] | None:
        with self._lock:
            if self._cancel.is_set():
                return None
            item = next(self._pieces, None)
            if item is None:
                return None
            file, piece = item
            if file.path not in self._outputs:
                self._outputs[file.path] = _Output(file, self._job.directory, self._flusher)
                self._news.put(len(file.header))
            return self._outputs[file.path], piece

    def _make(self, output: _Output, piece: Piece, quantise: Quantise | None) -> None:
        transfer = _Transfer(piece, self._sources.open(piece.file), output, self._cancel, self._news.put)
        if piece.matrix.is_copy:
            transfer.copy()
        else:
            assert quantise is not None
            quantise(piece.matrix, transfer.read, transfer.write)
        transfer.report()
        self._sources.done(piece.file)
        with self._lock:
            output.remaining -= 1
            last = output.remaining == 0
        if last:
            output.finish()
            with self._lock:
                del self._outputs[output.file.path]
                self._hashes.append(self._hasher.submit(self._hash, output.file, False))

    def _hash(self, file: OutputFile, report: bool) -> None:
        try:
            digest = _hash_file(self._job.directory / file.path, self._check)
            with self._journal_lock:
                self._journal.record(file.path, FileEntry(file.bytes, digest))
            if report:
                self._news.put(file.bytes)
        except _Cancelled:
            pass
        except BaseException as error:
            self._news.put(error)

    def _check(self, _: int) -> None:
        if self._cancel.is_set():
            raise _Cancelled

    def _clean_up(self) -> None:
        for output in self._outputs.values():
            output.discard()
        self._sources.close()


class _Transfer:
    """Reads and writes of one piece."""

    def __init__(
        self, piece: Piece, fd: int, output: _Output, cancel: threading.Event, tell: Callable[[int], None]
    ) -> None:
        self._piece = piece
        self._fd = fd
        self._output = output
        self._cancel = cancel
        self._tell = tell
        self._unreported = 0
        self._row_bytes = piece.matrix.cols * item_bytes(piece.matrix.dtype)

    def read(self, first: int, rows: int, buffer: memoryview, stride: int) -> None:
        """Fill `buffer` with rows of the piece, `stride` bytes from one to the next."""
        if self._cancel.is_set():
            raise _Cancelled
        offset = self._piece.offset + first * self._piece.stride
        width = self._row_bytes
        if self._piece.stride != width and rows > 1:
            for row in range(rows):
                self._fill(offset + row * self._piece.stride, [buffer[row * stride : row * stride + width]])
        elif stride == width:
            self._fill(offset, [buffer[: rows * width]])
        else:
            for start in range(0, rows, _MAX_VECTORS):
                stop = min(rows, start + _MAX_VECTORS)
                views = [buffer[row * stride : row * stride + width] for row in range(start, stop)]
                self._fill(offset + start * width, views)

    def _fill(self, offset: int, views: list[memoryview]) -> None:
        wanted = sum(map(len, views))
        while wanted:
            count = os.preadv(self._fd, views, offset)
            if count == 0:
                raise CheckpointError(f"{self._piece.file} ended too early: it was cut short while being read")
            wanted -= count
            offset += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if views and count:
                views[0] = views[0][count:]

    def write(self, part: int, offset: int, data: memoryview) -> None:
        """Write bytes of one part of the result."""
        self._output.write(self._piece.to[part] + offset, data)
        self._unreported += len(data)
        if self._unreported >= 1 << 20:
            self.report()

    def copy(self) -> None:
        """Copy the piece as it is."""
        rows, width = self._piece.matrix.rows, self._row_bytes
        step = max(1, _COPY_BYTES // width)
        buffer = memoryview(bytearray(min(rows, step) * width))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            self.read(first, count, buffer, width)
            self.write(0, first * width, buffer[: count * width])

    def report(self) -> None:
        self._tell(self._unreported)
        self._unreported = 0
