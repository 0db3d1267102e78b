"""The files of a shard set's tokenizer: the checkpoint's own, or those of another repository or directory.

The files are copied and never run. Where a tokenizer is Python code beside a tiktoken vocabulary, as Kimi's is,
`tiktoken_file` makes a tokenizer.json. `tokenizer` says whether a worker can read the files.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from moectl.durable import sync_directory
from moectl.errors import CheckpointError, MoectlError
from moectl.files import explain_refusal, partial_path, write_partial
from moectl.model.manifest import FileEntry, Manifest, read_manifest, refuse_links_outside, write_manifest
from moectl.shards import journal as journals
from moectl.shards.chat.tiktoken_file import CONFIG, convert
from moectl.shards.source.cache_layout import refuse_pointers
from moectl.shards.source.checkpoint import TEMPLATES, TOKENIZERS, Checkpoint, is_plain_data, open_store, read_json
from moectl.shards.verified import write_stamps
from moectl.shards.writer import hash_file

NAME = "tokenizer.json"
# DBRX's tokenizer as data; the model's own repositories have it as Python code.
KNOWN = "Xenova/dbrx-instruct-tokenizer"
KNOWN_VOCABULARY = 100352


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer's files at one place: name → local path."""

    source: str
    files: Mapping[str, Path]

    @property
    def has_template(self) -> bool:
        config = self.files.get("tokenizer_config.json")
        in_config = config is not None and "chat_template" in read_json(config, config.name)
        return in_config or any(fnmatch(file, TEMPLATES) for file in self.files)


def fetch_tokenizer(source: str, vocabulary: int) -> TokenizerFiles:
    """Return the tokenizer of a directory or a Hub repository, for a model of this many tokens.

    Raises CheckpointError when it has none, or that of another model, and the errors of the Hub.
    """
    with contextlib.closing(open_store(source)) as store:
        names = [file for file in store.files if is_tokenizer(file) and is_plain_data(file, store.files[file])]
        made = None if NAME in names else _convert(store.files, store.path, source, vocabulary)
        if NAME not in names and made is None:
            raise CheckpointError(f"{source} has no {NAME}", hint=f"take another one, such as {KNOWN} for DBRX")
        found = TokenizerFiles(source, {name: store.path(name) for name in names} | ({NAME: made} if made else {}))
    _check_vocabulary(found.files[NAME], source, vocabulary)
    return found


def with_tokenizer(checkpoint: Checkpoint, tokenizer: TokenizerFiles) -> Checkpoint:
    """Return a checkpoint with another tokenizer; its own chat template stays where the tokenizer has none."""
    kept = [file for file in checkpoint.sidecars if not _is_replaced(file, tokenizer)]
    return checkpoint.with_files(tuple(kept), tokenizer.files)


def choose_tokenizer(
    model: str, asked: str | None, can_read: Callable[[Path], object], say: Callable[[str], None]
) -> Callable[[Checkpoint, int], Checkpoint]:
    """Return a function that gives a checkpoint a tokenizer, or refuses it, before anything is cut.

    It takes the checkpoint and the size of the model's vocabulary.
    `model` is the user's name of the checkpoint, `asked` the place of the tokenizer, if the user gave one; `can_read`
    raises CheckpointError for files that a worker cannot read.
    """

    def choose(checkpoint: Checkpoint, vocabulary: int) -> Checkpoint:
        if asked is not None:
            return with_tokenizer(checkpoint, fetch_tokenizer(asked, vocabulary))
        if NAME in checkpoint.sidecars:
            _check_vocabulary(checkpoint.path(NAME), checkpoint.source, vocabulary)
            return checkpoint
        made = _convert(checkpoint.files, checkpoint.path, checkpoint.source, vocabulary)
        if made is not None:
            say(f"{checkpoint.source} has no {NAME}: making it from its tiktoken vocabulary.")
            return checkpoint.with_files(checkpoint.sidecars, {NAME: made})
        if _is_readable(checkpoint, can_read):
            return checkpoint
        return _replace_missing(checkpoint, vocabulary, model, say)

    return choose


def add_tokenizer(directory: Path, source: str) -> Manifest:
    """Give a finished shard set another tokenizer, and at last write its manifest. Return the manifest.

    Raises NotSharded, IntegrityError, StateError (the disk, or another `shard`), and what `fetch_tokenizer` raises.
    """
    manifest = read_manifest(directory)
    refuse_links_outside(directory)
    tokenizer = fetch_tokenizer(source, manifest.structure.vocab_size)
    try:
        with journals.lock_directory(directory):
            manifest = read_manifest(directory)
            old = [file for file in manifest.files if "/" not in file and _is_replaced(file, tokenizer)]
            new = {name: _write(directory / name, path.read_bytes()) for name, path in tokenizer.files.items()}
            for name in new:
                partial_path(directory / name).replace(directory / name)
            files = {file: entry for file, entry in manifest.files.items() if file not in old}
            manifest = replace(manifest, files=dict(sorted((files | new).items())))
            write_manifest(directory, manifest)
            for name in set(old) - set(new):
                (directory / name).unlink(missing_ok=True)
            write_stamps(directory, {})
            sync_directory(directory)
    except OSError as error:
        raise explain_refusal(error, directory) from error
    return manifest


def find_stray(directory: Path, manifest: Manifest) -> str | None:
    """Return what to do about a tokenizer that is in a shard set's directory but not in its manifest, else None."""
    path = directory / NAME
    if not path.is_file():
        return None
    entry = manifest.files.get(NAME)
    if entry is not None and hash_file(path, lambda _: None) == entry.sha256:
        return None
    where = shlex.quote(str(directory))
    return f"{path} is not in the set's manifest and is not sent: moectl shard --add-tokenizer {where} -o {where}"


def is_tokenizer(file: str) -> bool:
    """Whether a file at the top of a repository is a part of its tokenizer."""
    return any(fnmatch(file.lower(), pattern) for pattern in TOKENIZERS)


def _replace_missing(checkpoint: Checkpoint, vocabulary: int, model: str, say: Callable[[str], None]) -> Checkpoint:
    source = checkpoint.source
    lacks = f"{source} has no {NAME}, and no other tokenizer that can be read without running its code"
    other = KNOWN if vocabulary == KNOWN_VOCABULARY else "REPO|DIR"
    hint = f"moectl shard {shlex.quote(model)} --tokenizer {other}"
    if vocabulary != KNOWN_VOCABULARY:
        raise CheckpointError(lacks, hint=hint)
    try:
        taken = fetch_tokenizer(KNOWN, vocabulary)
    except MoectlError as error:
        raise CheckpointError(f"{lacks}; {KNOWN} cannot be downloaded: {error.message}", hint=hint) from None
    say(f"{source} has no {NAME}: taking DBRX's from {KNOWN} (--tokenizer REPO|DIR takes another).")
    return with_tokenizer(checkpoint, taken)


def _convert(files: Mapping[str, int], path: Callable[[str], Path], source: str, vocabulary: int) -> Path | None:
    """Return a tokenizer.json made from a tiktoken vocabulary, None where there is none. Raises CheckpointError."""

    def read(name: str) -> bytes | None:
        if name not in files:
            return None
        refuse_pointers(path(name).parent, [name])
        return path(name).read_bytes()

    config = read_json(path(CONFIG), f"{source}: {CONFIG}") if CONFIG in files else {}
    data = convert(read, list(files), config, source, vocabulary)
    if data is None:
        return None
    made = _directory_of_this_process() / f"{hashlib.sha256(data).hexdigest()}.json"
    made.write_bytes(data)
    return made


@cache
def _directory_of_this_process() -> Path:
    directory = tempfile.mkdtemp(prefix="moectl-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _is_readable(checkpoint: Checkpoint, can_read: Callable[[Path], object]) -> bool:
    files = [file for file in checkpoint.sidecars if is_tokenizer(file) or file == "config.json"]
    if not any(file.startswith("tokenizer") for file in files):
        return False
    with tempfile.TemporaryDirectory(prefix="moectl-") as directory:
        for file in files:
            (Path(directory) / file).symlink_to(checkpoint.path(file).resolve())
        try:
            can_read(Path(directory))
        except CheckpointError:
            return False
    return True


def _is_replaced(file: str, by: TokenizerFiles) -> bool:
    if fnmatch(file.lower(), TEMPLATES):
        return by.has_template
    return is_tokenizer(file)


def _check_vocabulary(path: Path, source: str, vocabulary: int) -> None:
    refuse_pointers(path.parent, [path.name])
    read = read_json(path, path.name)
    model, added = read.get("model"), read.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        numbers: Sequence[object] = list(vocab.values())
    elif isinstance(vocab, list):
        numbers = range(len(vocab))
    else:
        raise CheckpointError(f"{NAME} of {source} has no vocabulary")
    numbers = [*numbers, *(token.get("id") for token in added if isinstance(token, dict))]
    highest = max((number for number in numbers if isinstance(number, int)), default=-1)
    if not 0 <= highest < vocabulary:
        raise CheckpointError(
            f"the tokenizer of {source} is another model's: its tokens go up to {highest}, the model has {vocabulary}",
            hint="--tokenizer REPO|DIR takes this model's own",
        )


def _write(path: Path, data: bytes) -> FileEntry:
    """Write a file under its partial name; return its entry for the manifest."""
    return FileEntry(len(data), hash_file(write_partial(path, data), lambda _: None))
