"""The failures of the Hub as our errors: with the Hub's own message, and what to do.

Its functions import huggingface_hub, which `hub` has imported by then.
"""

from __future__ import annotations

from pathlib import Path

from moectl.errors import CheckpointError, MoectlError, Unreachable
from moectl.files import explain_refusal
from moectl.shards.source.hub_environment import explain_certificates, find_proxy

MIRRORS = (  # of DBRX, whose own repositories ask for an account
    "alpindale/dbrx-instruct",
    "SinclairSchneider/dbrx-instruct-quantization-fixed",
    "mlx-community/dbrx-instruct-4bit",
)
AGAIN = "run the same command again"
_LONGEST_WAIT_S = 60  # moectl does not wait for a server that asks for more


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def retry_after_s(error: BaseException) -> float:
    """Return how long the Hub asks to wait, 0 where it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0


def may_pass(error: Exception) -> bool:
    """Return whether the same request may succeed a little later."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return _status(error) in (408, 429, 500, 502, 503, 504) and retry_after_s(error) <= _LONGEST_WAIT_S
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # httpx is not a dependency of moectl: its errors are the base class of HfHubHTTPError.
    cut_short = isinstance(error, OSError) and error.errno is None and not isinstance(error, FileNotFoundError)
    return cut_short or isinstance(error, HfHubHTTPError.__bases__[0])


def hub_error(error: BaseException, repo: str, what: str) -> MoectlError:
    """Return our error for one of huggingface_hub or of the disk, with what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, errors.HFValidationError):
        message = f"{repo!r} is neither a directory nor a repository's name"
        return CheckpointError(message, hint="use OWNER/NAME or a path")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        message = f"{what} of {repo} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set"
        return Unreachable(message, hint="unset HF_HUB_OFFLINE, or give a directory")
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{repo} has no {what}", hint=f"see https://huggingface.co/{repo}/commits/main")
    if isinstance(error, errors.EntryNotFoundError):
        return CheckpointError(f"{repo} has no file {what}")
    if _status(error):
        return _status_error(error, repo, what)
    if isinstance(error, OSError) and error.errno is not None:
        refused = explain_refusal(error, Path(error.filename or what))
        if error.filename and Path(error.filename).is_relative_to(constants.HF_HOME):
            refused.hint = "set HF_HOME to a directory that can be written to"
        return refused
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if proxy := find_proxy(constants.ENDPOINT):
        way = f"{what} of {repo} did not come from {constants.ENDPOINT} through the proxy of {proxy}: {reason}"
        return Unreachable(way, hint=explain_certificates(reason) or f"correct or unset {proxy}")
    return Unreachable(
        f"{what} of {repo} did not come from {constants.ENDPOINT}: {reason}",
        hint=explain_certificates(reason)
        or f"check the network, then {AGAIN}: it resumes; if {repo} is a directory, there is none of that name here",
    )


def _status_error(error: BaseException, repo: str, what: str) -> MoectlError:
    from huggingface_hub.errors import GatedRepoError

    status = _status(error)
    words = " ".join(str(getattr(error, "server_message", None) or "").split())[:300]
    said = f": {words}" if words else ""  # the Hub's own
    accept = f"accept its licence at https://huggingface.co/{repo}"
    mirrors = ", ".join(m for m in MIRRORS if m != repo) if "dbrx" in repo.lower() else ""
    other = f"; or use a mirror: {mirrors}" if mirrors else ""
    if status == 403 or isinstance(error, GatedRepoError):
        message = f"{repo} may not be downloaded with this account (HTTP {status}){said}"
        return CheckpointError(message, hint=f"{accept} and set HF_TOKEN{other}")
    if status == 401:
        message = f"{repo} does not exist, or is closed to you (HTTP 401){said}"
        return CheckpointError(message, hint=f"{accept} and set a valid HF_TOKEN{other}")
    if status in (404, 410):
        right = f"try a mirror: {mirrors}" if mirrors else "correct the name: OWNER/NAME at https://huggingface.co"
        return CheckpointError(f"the Hub has no repository {repo} (HTTP {status}){said}", hint=right)
    wait_s = retry_after_s(error)
    when = f" in {wait_s:.0f} s" if wait_s else ""
    message = f"{what} of {repo} did not come: the Hub answered HTTP {status}{said}"
    return Unreachable(message, hint=f"{AGAIN}{when}: it resumes")
