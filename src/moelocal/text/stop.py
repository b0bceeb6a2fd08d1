"""Stop strings in a stream of text pieces."""

from __future__ import annotations

from collections.abc import Sequence

from moelocal.errors import RequestError
from moelocal.text.partial import partial_suffix


class StopStrings:
    """Passes text through until a stop string is complete, however the pieces cut it.

    The stop string that is complete first wins; of several complete at the same character, the longest. So
    the result depends on the text only, not on the pieces. Held back is only what may be the beginning of a
    stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises RequestError for an empty stop string or one that is no string."""
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop strings must be non-empty strings, but got {stop!r}")
        self._held = ""
        self._stopped = False

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string is complete. Nothing comes after that."""
        if self._stopped:
            return "", True
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self._held, self._stopped = "", True
            return text[: min(matches)[1]], True
        safe = len(text) - partial_suffix(text, self._stops)
        self._held = text[safe:]
        return text[:safe], False

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held
