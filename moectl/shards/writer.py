"""Make the files of a recipe, piece by piece, on several threads, and hash them.

All threads work on the pieces of one file at a time, so an interruption costs one file at most. Making it durable and
hashing it overlap with the next file. A file gets its final name only when it is whole. `build` says which files are
missing, and uses their hashes.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from moectl.durable import sync_directory, sync_file, write_back
from moectl.errors import IntegrityError
from moectl.files import partial_path
from moectl.model.manifest import FileEntry
from moectl.shards.quantize import Converter, converter
from moectl.shards.recipe import Matrix, OutputFile, Piece
from moectl.shards.source.sources import Cancelled, Sources, Supply, fill
from moectl.shards.source.stored import StoredReader
from moectl.shards.source.tensors import item_bytes

_MEMORY_BYTES = 96 << 20  # for unfinished results, shared by all jobs
_COPY_BYTES = 4 << 20
_HASH_BYTES = 1 << 20
_FLUSH_BYTES = 64 << 20
_MAX_VECTORS = 1024  # IOV_MAX of Linux and macOS

OnBytes = Callable[[int], None]
OnHashed = Callable[[str, FileEntry], None]
_News = int | tuple[str, FileEntry] | BaseException | None  # bytes made, a hashed file, a failure, the end


def make_files(
    supply: Supply,
    directory: Path,
    missing: Sequence[OutputFile],
    named: Sequence[OutputFile],
    *,
    jobs: int,
    on_bytes: OnBytes,
    on_hashed: OnHashed,
) -> None:
    """Make and hash the files of `missing`, in order, and hash those of `named`, which exist.

    The calling thread calls both callbacks. Raises the first failure of any thread: OSError of the output's disk,
    CheckpointError and what `supply` raises for the source, IntegrityError.
    """
    run = _Run(directory, Sources(supply, missing), missing, jobs)
    run.follow(named, on_bytes, on_hashed)


def hash_file(path: Path, on_bytes: OnBytes) -> str:
    """Return a file's SHA-256 in hex; call `on_bytes` with the size of each block."""
    digest = hashlib.sha256()
    buffer = bytearray(_HASH_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as f:
        while count := f.readinto(buffer):
            digest.update(view[:count])
            on_bytes(count)
    return digest.hexdigest()


class _Output:
    """One file that is not complete yet."""

    def __init__(self, file: OutputFile, directory: Path, flusher: ThreadPoolExecutor) -> None:
        self.file = file
        self.path = directory / file.path
        self.path.parent.mkdir(exist_ok=True)
        self.pieces = file.pieces
        self.remaining = len(self.pieces)
        self._flusher = flusher
        self._flush: Future[None] | None = None
        self._unflushed = 0
        self._fd = os.open(partial_path(self.path), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
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
        # So that the fsync at the end, for which a thread waits, has little left to do.
        if self._unflushed > _FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._unflushed = 0
            self._flush = self._flusher.submit(write_back, self._fd)

    def finish(self) -> None:
        """Make the file durable and give it its name."""
        if self._flush is not None:
            self._flush.result()
        if os.fstat(self._fd).st_size != self.file.bytes:
            raise IntegrityError(f"{self.path} has another size than planned (a bug in moectl)")
        sync_file(self._fd)
        self.close()
        partial_path(self.path).replace(self.path)
        sync_directory(self.path.parent)

    def close(self) -> None:
        if self._flush is not None:
            self._flush.exception()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def discard(self) -> None:
        self.close()
        partial_path(self.path).unlink(missing_ok=True)


class _Run:
    """The threads, and the file on which they work."""

    def __init__(self, directory: Path, sources: Sources, files: Sequence[OutputFile], jobs: int) -> None:
        self._directory = directory
        self._sources = sources
        self._files = iter(files)
        self._jobs = jobs
        self._news: SimpleQueue[_News] = SimpleQueue()
        self._ends: SimpleQueue[None] = SimpleQueue()  # wakes the thread that stops the others
        self._turn = threading.Condition()  # guards what follows
        self._stopped = False
        self._output: _Output | None = None
        self._pieces: Iterator[Piece] = iter(())  # of that output, those that no thread has taken
        self._unfinished: set[_Output] = set()

    def follow(self, named: Sequence[OutputFile], on_bytes: OnBytes, on_hashed: OnHashed) -> None:
        """Start the threads, and call the callbacks with their results until all threads have ended."""
        with ExitStack() as stack:
            stack.callback(self._clean_up)
            self._flusher = stack.enter_context(ThreadPoolExecutor(1, "flush"))
            self._hasher = stack.enter_context(ThreadPoolExecutor(self._jobs, "hash"))
            for file in named:
                self._hasher.submit(self._hash, file, report=True)
            end = threading.Thread(target=self._work_all, name="cut", daemon=True)
            end.start()
            threading.Thread(target=self._wait_for_end, name="stop", daemon=True).start()
            stack.callback(self._join, end)
            failure: BaseException | None = None
            while (news := self._news.get()) is not None:
                if isinstance(news, int):
                    on_bytes(news)
                elif isinstance(news, tuple):
                    on_hashed(*news)
                elif failure is None:
                    failure = news
                    self._ends.put(None)
            if failure is not None:
                raise failure

    def _work_all(self) -> None:
        workers = [threading.Thread(target=self._work, name=f"cut {i}", daemon=True) for i in range(self._jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self._hasher.shutdown()
        self._news.put(None)

    def _join(self, end: threading.Thread) -> None:
        self._ends.put(None)
        end.join()

    def _wait_for_end(self) -> None:
        # Not on the main thread: a second Ctrl-C just after it has taken the lock would leave the lock closed for ever.
        self._ends.get()
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        self._sources.cancel()

    def _work(self) -> None:
        try:
            with ExitStack() as stack:
                convert: Converter | None = None
                while (item := self._take()) is not None:
                    output, piece = item
                    if not piece.is_copy and convert is None:
                        convert = stack.enter_context(converter(_MEMORY_BYTES // self._jobs))
                    self._make(output, piece, convert)
        except Cancelled:
            pass
        except BaseException as error:
            self._news.put(error)

    def _take(self) -> tuple[_Output, Piece] | None:
        """Return the next piece; wait while all pieces of a file are taken and not all are made."""
        with self._turn:
            while not self._stopped:
                piece = next(self._pieces, None)
                if piece is not None and self._output is not None:
                    return self._output, piece
                if self._output is not None and self._output.remaining:
                    self._turn.wait()
                    continue
                file = next(self._files, None)
                if file is None:
                    return None
                self._output = _Output(file, self._directory, self._flusher)
                self._pieces = iter(self._output.pieces)
                self._unfinished.add(self._output)
                self._news.put(len(file.header))
            return None

    def _make(self, output: _Output, piece: Piece, convert: Converter | None) -> None:
        transfer = _Transfer(piece, output, self._check, self._news.put)
        if isinstance(piece.work, Matrix):
            transfer.open(self._sources.open(piece.file), piece.work)
        if piece.is_copy:
            transfer.copy()
        else:
            assert convert is not None
            if isinstance(piece.work, Matrix):
                convert.convert(piece.work, transfer.read, transfer.write)
            else:
                convert.compute(piece.work, StoredReader(output.file.stored, self._open_checked), transfer.write)
        transfer.report()
        with self._turn:
            output.remaining -= 1
            last = output.remaining == 0
            if last:
                self._turn.notify_all()
        if last:
            for file in output.file.sources:
                self._sources.done(file)
            output.finish()
            with self._turn:
                self._unfinished.remove(output)
            self._hasher.submit(self._hash, output.file, report=False)

    def _hash(self, file: OutputFile, *, report: bool) -> None:
        try:
            digest = hash_file(self._directory / file.path, self._check)
            self._news.put((file.path, FileEntry(file.bytes, digest)))
            if report:
                self._news.put(file.bytes)
        except Cancelled:
            pass
        except BaseException as error:
            self._news.put(error)

    def _open_checked(self, file: str) -> int:
        self._check()
        return self._sources.open(file)

    def _check(self, _: int = 0) -> None:
        if self._stopped:
            raise Cancelled

    def _clean_up(self) -> None:
        for output in self._unfinished:
            output.discard()
        self._sources.close()


class _Transfer:
    """Reads and writes of one piece."""

    def __init__(self, piece: Piece, output: _Output, check: Callable[[], None], tell: Callable[[int], None]) -> None:
        self._piece = piece
        self._output = output
        self._check = check
        self._tell = tell
        self._unreported = 0

    def open(self, fd: int, matrix: Matrix) -> None:
        """Get ready to read a stored matrix."""
        self._rows = matrix.rows
        self._row_bytes = matrix.cols * item_bytes(matrix.dtype)
        self._fill = partial(fill, fd, self._piece.file)

    def read(self, first: int, rows: int, buffer: memoryview, stride: int) -> None:
        """Fill `buffer` with rows of the piece, `stride` bytes from one to the next."""
        self._check()
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

    def write(self, part: int, offset: int, data: memoryview) -> None:
        """Write bytes of one part of the result."""
        self._output.write(self._piece.to[part] + offset, data)
        self._unreported += len(data)
        if self._unreported >= 1 << 20:
            self.report()

    def copy(self) -> None:
        """Copy the piece unchanged."""
        rows, width = self._rows, self._row_bytes
        step = max(1, _COPY_BYTES // width)
        buffer = memoryview(bytearray(min(rows, step) * width))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            self.read(first, count, buffer, width)
            self.write(0, first * width, buffer[: count * width])

    def report(self) -> None:
        """Report the bytes since the last report."""
        self._tell(self._unreported)
        self._unreported = 0
