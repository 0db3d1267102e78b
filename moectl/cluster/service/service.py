"""The one service of this machine: installed, looked at, started and removed, by launchd or by systemd."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from moectl.cluster.service.job import Manager, ServiceJob, Standing, forget_record, read_record, write_record
from moectl.cluster.service.launchd import Launchd
from moectl.cluster.service.systemd import Systemd
from moectl.errors import StateError

TIMES = ("login", "boot")


@dataclass(frozen=True, slots=True)
class Service:
    """The service as it is installed; `job` is None where its record is lost."""

    at: str
    path: Path
    text: bytes
    job: ServiceJob | None


def find_manager() -> Launchd | Systemd:
    """Return what starts services on this system."""
    return Launchd() if sys.platform == "darwin" else Systemd()


def find_service(manager: Manager) -> Service | None:
    """Return the installed service, or None. Raises StateError for a file that cannot be read."""
    job = read_record()
    times = sorted(TIMES, key=lambda at: job is None or at != job.at)
    for at in times:
        path = manager.path(at)
        try:
            return Service(at, path, path.read_bytes(), job)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StateError(f"cannot read {path}: {error.strerror}") from None
    return None


def require_service(manager: Manager) -> Service:
    """Return the installed service. Raises StateError where there is none."""
    found = find_service(manager)
    if found is None:
        raise StateError("no service is installed", hint="moectl service install")
    return found


def install(manager: Manager, job: ServiceJob, before: Service | None) -> str:
    """Install the service, or put it in the place of the one before; return what a person should know.

    Raises StateError and CommandFailed; what was there before stays then.
    """
    if before is not None and before.at != job.at and manager.path(before.at) != manager.path(job.at):
        manager.remove(before.at)
    told = manager.install(job)
    write_record(job)
    return told


def remove(manager: Manager, service: Service) -> None:
    """Stop the service and remove its file; a second time does no harm. Raises CommandFailed."""
    manager.remove(service.at)
    forget_record()


def is_as_written(manager: Manager, service: Service) -> bool:
    """Whether the file is what `install` wrote: no person has changed it since."""
    return service.job is not None and manager.render(service.job) == service.text


def is_up(standing: Standing) -> bool:
    """Whether the service runs, or will try again by itself."""
    return standing.state in ("running", "starting", "waiting")
