"""Pack the moectl that is running into a wheel, so that every host gets exactly this one.

It packs the imported package and its installed metadata: no build tool or source tree is needed. Equal files give
equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import moectl
from moectl.errors import VersionMismatch
from moectl.hosts.onhost.deploy import hash_package, list_package

TAG = "py3-none-any"
EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's earliest date: the wheel must not depend on when it was packed
INSTALL_HINT = "install it again: pip install -e . in its source tree"


def pack_wheel(directory: Path) -> Path:
    """Write `moectl-VERSION-py3-none-any.whl` into `directory` and return its path.

    Raises VersionMismatch when moectl was not installed by pip, or was changed to another version since.
    """
    version = moectl.__version__
    try:
        installed = metadata.distribution("moectl")
    except metadata.PackageNotFoundError:
        raise VersionMismatch(
            "this moectl was not installed, so it cannot be sent to a host", hint=INSTALL_HINT
        ) from None
    if installed.version != version:
        raise VersionMismatch(f"this moectl is {version}, but was installed as {installed.version}", hint=INSTALL_HINT)
    info = f"moectl-{version}.dist-info"
    files = _package_files()
    for name in ("METADATA", "entry_points.txt"):
        text = installed.read_text(name)
        if text is not None:
            files[f"{info}/{name}"] = text.encode()
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: moectl\nRoot-Is-Purelib: true\nTag: {TAG}\n".encode()
    path = directory / f"moectl-{version}-{TAG}.whl"
    write_wheel(path, info, files)
    return path


def is_ours(wheel: Path) -> bool:
    """Whether a wheel is some version of moectl itself: `deploy` sends the one that runs here in its place."""
    return wheel.name.startswith("moectl-")


def hash_code() -> str:
    """Return the hash of the running moectl's files, as a host tells its own."""
    return hash_package(str(Path(moectl.__file__).parent))


def download_command(directory: str, versions: Mapping[str, str]) -> str:
    """Return the command that fills a wheelhouse with all that moectl needs, in exactly these versions."""
    needed = [line for line in metadata.requires("moectl") or [] if "extra ==" not in line]
    pinned = [f"{name}=={version}" for name, version in versions.items() if name != "moectl"]
    return shlex.join(["pip", "download", "--only-binary=:all:", "-d", directory, *pinned, *needed])


def write_wheel(path: Path, info: str, files: dict[str, bytes]) -> None:
    """Write a wheel of `files` (archive path → content) with its RECORD; equal input gives equal bytes."""
    rows = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in sorted(files.items())]
    record = "\n".join([*rows, f"{info}/RECORD,,"]) + "\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*sorted(files.items()), (f"{info}/RECORD", record.encode())]:
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            # Weights shrink little, and compressing the demo's would take half the time of a deploy without copies.
            weights = name.endswith(".safetensors")
            entry.compress_type = zipfile.ZIP_STORED if weights else zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)


def _package_files() -> dict[str, bytes]:
    root = Path(moectl.__file__).parent
    found = map(Path, list_package(str(root)))
    return {f"moectl/{p.relative_to(root).as_posix()}": p.read_bytes() for p in found}


def _digest(content: bytes) -> str:
    # The wheel format wants urlsafe base64 without padding.
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
