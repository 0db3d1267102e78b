"""Keep an error that one answer met from ending the others: which errors are its own, and what is told and logged.

On the leader alone an answer is sampled and told, so an error there is the leader's to know: it tells the asker at
once, and the answer's row leaves the batch as a cancelled one does, by a control word, at the same step on every rank.
What every rank does alike (reading a prompt) fails alike, and takes no row on any. An error that one rank meets in what
all have to do alike leaves them at different places: that ends them all, like an error in the model or its exchanges.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moectl.errors import MoectlError

# How mlx begins what its data planes raise: no answer is the cause of that.
BACKEND_ERRORS = ("[ring]", "[jaccl]")
_HINT = "the other answers go on; 'moectl logs' shows where it happened"
_log = logging.getLogger("moectl.worker.answers")  # below the worker's, which has the files


@contextmanager
def isolated(request_id: int, on_error: Callable[[MoectlError], None]) -> Iterator[None]:
    """Hand an error of the block to `on_error`, explained and logged, unless it concerns more than one answer."""
    try:
        yield
    # Not Exception: a panic in the tokenizer's Rust code is none.
    except BaseException as error:
        if _concerns_all(error):
            raise
        on_error(explain(request_id, error))


def explain(request_id: int, error: BaseException) -> MoectlError:
    """Log where an error of one answer came from; return what its asker is told."""
    # Without the error's own words: they may quote the prompt or the answer, which are in no log.
    places = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    _log.error("request %d ends by an error, the others go on: %s\n%s", request_id, type(error).__name__, places)
    what = ": ".join(filter(None, (type(error).__name__, str(error))))
    return MoectlError(f"internal error in this request: {what} (a bug in moectl)", hint=_HINT)


def _concerns_all(error: BaseException) -> bool:
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(BACKEND_ERRORS)
