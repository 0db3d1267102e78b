"""Keep an error of one answer from ending the others: which errors are its own, and what is sent and logged.

Only the leader samples and sends an answer. On an error there it tells the client at once, and the answer's row leaves
the batch like a cancelled one: by a control word, at the same step on every rank. What every rank does in the same way
(reading a prompt) fails on every rank, and takes no row. If one rank alone fails in such work, the ranks are at
different places: that ends them all, like an error in the model or its exchanges.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moectl.engine.backend_errors import BACKEND_ERRORS
from moectl.errors import MoectlError

_HINT = "the other answers go on; 'moectl logs' shows where it happened"
_log = logging.getLogger("moectl.worker.answers")  # below the worker's, which has the files


@contextmanager
def isolated(request_id: int, on_error: Callable[[MoectlError], None]) -> Iterator[None]:
    """Pass an error of the block to `on_error`, explained and logged, unless it concerns more than one answer."""
    try:
        yield
    # BaseException: a panic in the tokenizer's Rust code is no Exception.
    except BaseException as error:
        if _concerns_all(error):
            raise
        on_error(explain(request_id, error))


def explain(request_id: int, error: BaseException) -> MoectlError:
    """Log where an error of one answer came from; return the error for its client."""
    _log.error("request %d ends by an error, the others go on:\n%s", request_id, trace(error))
    what = ": ".join(filter(None, (type(error).__name__, str(error))))
    return MoectlError(f"internal error in this request: {what} (a bug in moectl)", hint=_HINT)


def trace(error: BaseException) -> str:
    """Return where an exception came from, for a log: without its message, which may quote a prompt or an answer."""
    return "".join([*traceback.format_tb(error.__traceback__), type(error).__name__])


def _concerns_all(error: BaseException) -> bool:
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(BACKEND_ERRORS)
