"""What arrays are made of, from MLX's own drawing of its graph: nothing is computed for it."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import mlx.core as mx

_EDGE = re.compile(r'^"?([^"]+?)"? -> "?([^"]+?)"?$', re.MULTILINE)


class Graph:
    """The graph behind some arrays, in which others have names."""

    def __init__(self, asked: Iterable[mx.array], named: Mapping[str, mx.array]) -> None:
        asked, everything = list(asked), dict(named)
        known = {id(array) for array in everything.values()}
        for array in asked:
            if id(array) not in known:
                everything[f"asked {len(everything)}"] = array
                known.add(id(array))
        self._names = {id(array): name for name, array in everything.items()}
        self._ends = named.keys()
        drawing = io.StringIO()
        mx.export_to_dot(drawing, *asked, **everything)
        self._inputs: defaultdict[str, list[str]] = defaultdict(list)
        for source, target in _EDGE.findall(drawing.getvalue()):
            self._inputs[target].append(source)
        self._keep = everything  # ids are those of living arrays

    def find_sources(self, arrays: Iterable[mx.array]) -> set[str]:
        """Return the names of the named arrays that some of the asked ones are made of, and not what is behind them."""
        seen: set[str] = set()
        todo = [self._names[id(array)] for array in arrays]
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                if name not in self._ends:
                    todo += self._inputs[name]
        return seen & set(self._ends)
