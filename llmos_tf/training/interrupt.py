"""SIGINT and SIGTERM as a wish to stop after the step that is running."""

import os
import signal
from types import FrameType, TracebackType


class GracefulStop:
    """Notes the first SIGINT or SIGTERM while it is entered, and says so; the second acts as usual.

    Example:
        >>> with GracefulStop() as stop:
        ...     while not stop.requested:
        ...         step()
    """

    def __init__(self):
        self.requested: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "GracefulStop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = signal.Signals(number).name
        # Not by print, which may be what was interrupted. A first step takes minutes to trace.
        line = f"\n{self.requested}: stopping after this step. Once more stops at once.\n"
        os.write(2, line.encode())
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
