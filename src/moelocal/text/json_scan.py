"""Finds the end of a JSON object in a text that is still growing."""

from __future__ import annotations

import re

_MARKS = re.compile(r'["\\{}\[\]]')


class JsonObjectScanner:
    """Counts brackets outside of strings. Each character is looked at once."""

    def __init__(self, start: int) -> None:
        """`start`: the position of the opening brace."""
        self._at = start
        self._depth = 0
        self._in_string = False
        self._found: int | None = None

    def end(self, text: str) -> int | None:
        """The position after the object, None while it is open. `text` may only grow between calls."""
        while self._found is None and (mark := _MARKS.search(text, self._at)):
            if mark[0] == "\\":
                if mark.end() == len(text):
                    self._at = mark.start()  # the escaped character is still to come
                    return None
                self._at = mark.end() + self._in_string
                continue
            self._at = mark.end()
            if mark[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if mark[0] in "{[" else -1
                if self._depth == 0:
                    self._found = self._at
        if self._found is None:
            self._at = len(text)
        return self._found
