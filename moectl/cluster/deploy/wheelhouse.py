"""A wheelhouse: every wheel that moectl needs on hosts without internet, and a list of their hashes.

This machine's pip fills it for the hosts' pythons and systems, in this machine's versions where they fit.
`requirements.txt` in it pins each file, so that pip takes these bytes or none.
"""

from __future__ import annotations

import contextlib
import email
import re
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from moectl.cluster.deploy.environment import PIP_S, reason_of, refuse_glibc
from moectl.errors import CommandFailed, IntegrityError, MoectlError, StateError, UsageError, VersionMismatch, with_hint
from moectl.files import explain_refusal, write_whole
from moectl.hosts.connect import on_each
from moectl.hosts.hostfile import Host
from moectl.hosts.macos import MLX_MACOS, RDMA_MACOS, Version, parse_version, refuse_mac
from moectl.hosts.onhost.files import hash_file
from moectl.hosts.programs import OLDEST_PYTHON, ask, list_bases
from moectl.hosts.remote import LocalRemote, Remote

LIST = "requirements.txt"
HEADER = "# moectl wheelhouse: each wheel here and its hash; pip takes no other bytes"
ASK_S = 60.0
# The older names of these tags, by the minor version of glibc.
_LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
_SYSTEMS = {"macosx": "darwin", "manylinux": "linux", "musllinux": "linux", "linux": "linux", "win": "win32"}


@dataclass(frozen=True, slots=True)
class Platform:
    """What a host's wheels are chosen by: python "3.12", platform tags best first, and what markers ask for."""

    python: str
    tags: tuple[str, ...]
    environment: Mapping[str, str] = field(hash=False, compare=False)

    def __str__(self) -> str:
        return f"python {self.python} on {self.tags[0]}"


def ask_platforms(hosts: Sequence[Host], remotes: Sequence[Remote]) -> list[Platform]:
    """Return the distinct platforms of the hosts that are not this machine.

    A host that does not answer is left out; when none does, its error is raised.
    """
    others = [host for host in hosts if not host.is_local]
    ways = [remote for host, remote in zip(hosts, remotes, strict=True) if not host.is_local]
    found = on_each(others, lambda index, host: _ask_platform(host, ways[index]))
    platforms = [one for one in found if isinstance(one, Platform)]
    if others and not platforms:
        raise next(one for one in found if isinstance(one, MoectlError))
    return list(dict.fromkeys(platforms))


def _ask_platform(host: Host, remote: Remote) -> Platform:
    answer = ask(remote, list_bases(host), "platform", {}, timeout_s=ASK_S, oldest=OLDEST_PYTHON)
    try:
        return make_platform(answer)
    except VersionMismatch as error:
        raise VersionMismatch(error.message, host=host.address) from None


def make_platform(answer: Mapping[str, Any]) -> Platform:
    """Return the platform that `onhost.platform` describes. Raises VersionMismatch for one without wheels."""
    if answer["implementation"] != "cpython":
        raise VersionMismatch(f"its python is {answer['implementation']}, and there are wheels for cpython only")
    machine = answer["machine"]
    tags: tuple[str, ...]
    if answer["system"] == "darwin":
        if refused := refuse_mac(answer["mac"], machine):
            raise VersionMismatch(refused)
        tags = _mac_tags(parse_version(answer["mac"]) or MLX_MACOS)
    else:
        tags = _linux_tags(answer["libc"][0], answer["libc"][1], machine)
    return Platform(answer["python"], tags, dict(answer["environment"]))


def _mac_tags(version: Version) -> tuple[str, ...]:
    """Return the newest tag that a Mac can use; pip adds the older ones."""
    major, _ = version
    if major == RDMA_MACOS[0] and version < RDMA_MACOS:
        major = 15  # the wheels for 26 are built for 26.2, although their tag says 26.0
    return (f"macosx_{major}_0_arm64",)


def _linux_tags(libc: str, version: str, machine: str) -> tuple[str, ...]:
    match = re.match(r"2\.(\d+)", version)
    if libc != "glibc" or match is None:
        raise VersionMismatch("its C library is not glibc, and MLX has wheels for that only")
    if refused := refuse_glibc(version):
        raise VersionMismatch(refused)
    tags = []
    for minor in range(int(match[1]), 4, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        tags += [f"{_LEGACY[minor]}_{machine}"] if minor in _LEGACY else []
    return (*tags, f"linux_{machine}")


# Filling.


def build(
    directory: Path,
    platforms: Sequence[Platform],
    versions: Mapping[str, str],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Fill a wheelhouse for these platforms, with this machine's versions, and write its list.

    A new one gets its name when it is complete; running it again continues. Raises CommandFailed for what pip says,
    StateError and UsageError for what the disk says.
    """
    partial = directory if directory.exists() else directory.with_name(f".{directory.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for platform in platforms:
            fill(partial, platform, versions, say=say)
        write_list(partial)
        if partial != directory:
            partial.replace(directory)
    except OSError as error:
        refused = explain_refusal(error, partial)
        hint = refused.hint and "choose another directory with --wheelhouse, or free some space"
        raise with_hint(refused, hint) from None


def fill(
    directory: Path, platform: Platform, versions: Mapping[str, str], *, say: Callable[[str], None] = lambda text: None
) -> None:
    """Download every wheel that moectl needs on a platform, without moectl's own."""

    def read(requirement: Requirement) -> tuple[str, list[str]]:
        # By itself: another system's wheel of the same version may have other requirements.
        with tempfile.TemporaryDirectory(dir=directory, prefix=".moectl-") as scratch:
            say(f"fetching {requirement.name} for {platform}")
            _download(Path(scratch), platform, [f"{requirement.name}{requirement.specifier}"])
            [wheel] = Path(scratch).glob("*.whl")
            told = _read_wheel(wheel)
            wheel.replace(directory / wheel.name)
        return told

    pinned = find_closure(metadata.requires("moectl") or [], platform.environment, versions, read)
    say(f"fetching {len(pinned)} wheels for {platform}")
    _download(directory, platform, [f"{name}=={version}" for name, version in sorted(pinned.items())])


def find_closure(
    lines: Iterable[str],
    environment: Mapping[str, str],
    versions: Mapping[str, str],
    read: Callable[[Requirement], tuple[str, list[str]]],
) -> dict[str, str]:
    """Return name → version of all that these requirements lead to in a target environment.

    Versions are those installed here, so that hosts get what runs here, and pip need not choose; `read(requirement)`
    tells (version, requirements) of what is not installed here or does not fit. `versions` are wanted exactly.
    """
    todo = [(Requirement(line), "") for line in lines]
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        new = [one for one in ("", *requirement.extras) if (name, one) not in seen]
        if not new:
            continue
        seen.update((name, one) for one in new)
        found[name], needs = _installed(requirement, versions.get(name)) or read(requirement)
        todo += [(Requirement(need), one) for need in needs for one in new]
    return found


def _installed(requirement: Requirement, wanted: str | None) -> tuple[str, list[str]] | None:
    """Return (version, requirements) of a distribution that is installed here, if it will do."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        here = metadata.distribution(requirement.name)
        fits = requirement.specifier.contains(here.version, prereleases=True) and wanted in (None, here.version)
        return (here.version, here.requires or []) if fits else None
    return None


def _download(directory: Path, platform: Platform, requirements: Sequence[str]) -> None:
    argv = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--quiet"]
    argv += ["--only-binary=:all:", "--no-deps", "--dest", str(directory)]
    argv += ["--implementation", "cp", "--python-version", platform.python]
    argv += [word for tag in platform.tags for word in ("--platform", tag)]
    done = LocalRemote().run([*argv, *requirements], timeout_s=PIP_S, check=False)
    if done.code:
        reason = reason_of(done.stderr.decode("utf-8", "replace")) or f"exit code {done.code}"
        raise CommandFailed(
            f"pip cannot fetch what {platform} needs: {reason}",
            hint="internet is needed here, and pip (python -m ensurepip); or take a directory of wheels that has them",
        )


def _read_wheel(path: Path) -> tuple[str, list[str]]:
    """Return (version, requirements) of a wheel."""
    _, version, _ = _parse(path)
    with zipfile.ZipFile(path) as archive:
        inner = next(one for one in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one))
        fields = email.message_from_bytes(archive.read(inner))
    return version, [str(line) for line in fields.get_all("Requires-Dist") or []]


# Hashes.


def write_list(directory: Path) -> None:
    """Record the hashes of all wheels in the wheelhouse's own list. Raises UsageError, StateError."""
    write_whole(directory / LIST, make_list(sorted(directory.glob("*.whl"))).encode())


def check(directory: Path) -> None:
    """Compare a wheelhouse with its list, and add new wheels to the list; make the list where there is none.

    Raises IntegrityError when a wheel is not what the list says, or is gone; what `make_list` raises.
    """
    path = directory / LIST
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if text and not text.startswith(HEADER):
        return  # not written by moectl
    listed = {name: sha256 for sha256, name in re.findall(r"^# ([0-9a-f]{64})  (.+)$", text, re.MULTILINE)}
    there = {wheel.name for wheel in directory.glob("*.whl")}
    for name, sha256 in listed.items():
        if name not in there:
            what = f"{name}, which {LIST} lists, is gone"
        elif _hash(directory / name) != sha256:
            what = f"{name} is not the file that {LIST} lists"
        else:
            continue
        hint = (
            f"fetch it again: rm -f {directory / name}, then --wheelhouse-build; or remove {path} to take what is there"
        )
        raise IntegrityError(f"{directory}: {what}", hint=hint)
    if there - set(listed):
        with contextlib.suppress(StateError):  # a directory that cannot be written serves too
            write_list(directory)


def make_list(wheels: Iterable[Path]) -> str:
    """Return a requirements file for `pip install --require-hashes` that pins exactly these wheels.

    A project whose wheels are for some systems or pythons only is installed on those. Raises UsageError for two
    versions of one project, for a file that is not named as a wheel, and for a wheel that cannot be read.
    """
    projects: dict[str, dict[str, list[tuple[Path, frozenset[Tag]]]]] = defaultdict(dict)
    for path in wheels:
        name, version, tags = _parse(path)
        projects[name].setdefault(version, []).append((path, tags))
    lines = [HEADER]
    for name, versions in sorted(projects.items()):
        if len(versions) > 1:
            raise UsageError(
                f"there are several versions of {name}: {', '.join(sorted(versions))}",
                hint="keep one: hosts have to agree",
            )
        [(version, files)] = versions.items()
        marker = _marker([tags for _, tags in files])
        hashes = {path.name: _hash(path) for path, _ in files}
        lines += [f"# {sha256}  {file}" for file, sha256 in hashes.items()]
        pins = sorted(f"--hash=sha256:{sha256}" for sha256 in hashes.values())
        lines.append(" ".join([f"{name}=={version}{f' ; {marker}' if marker else ''}", *pins]))
    return "\n".join(lines) + "\n"


def _hash(path: Path) -> str:
    try:
        return hash_file(str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


def _parse(path: Path) -> tuple[str, str, frozenset[Tag]]:
    try:
        name, version, _, tags = parse_wheel_filename(path.name)
    except InvalidWheelFilename:
        raise UsageError(f"{path} does not have the name of a wheel") from None
    return str(name), str(version), tags


def _marker(wheels: Sequence[frozenset[Tag]]) -> str:
    """Return where these wheels can be used at all, as a marker; empty for everywhere."""
    tags = [tag for one in wheels for tag in one]
    parts = []
    if all(tag.platform != "any" for tag in tags):
        systems = {system for tag in tags for start, system in _SYSTEMS.items() if tag.platform.startswith(start)}
        parts.append(_either("sys_platform", systems))
    if all(re.fullmatch(r"cp3\d+", tag.interpreter) and tag.abi.startswith("cp3") for tag in tags):
        parts.append(_either("python_version", {f"3.{tag.interpreter[3:]}" for tag in tags}))
    return " and ".join(part for part in parts if part)


def _either(name: str, values: set[str]) -> str:
    alternatives = " or ".join(f'{name} == "{value}"' for value in sorted(values))
    return f"({alternatives})" if len(values) > 1 else alternatives
