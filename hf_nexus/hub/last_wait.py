"""The end of a run: what is queued gets some more time, and one line says what became of it."""

import atexit

from .publisher import Publisher
from .status import Status

__all__ = ["LastWait"]


class LastWait:
    """
    Waits for a publisher, at the latest when the process ends: then it holds up neither other ranks nor the
    evaluation that follows on training, and an exception does not keep it from what was saved before.

    Args:
        publisher ([`Publisher`]):
            Closed at the end of the process.
        seconds (`float`):
            The bound of that wait.
    """

    def __init__(self, publisher: Publisher, seconds: float):
        self.publisher, self.seconds = publisher, seconds
        self._left = seconds
        self._printed = ""
        atexit.register(self.end)

    def wait(self, seconds: float) -> Status:
        """Wait for so long, and print what is on the Hub and what is not, if that is news."""
        self._left = 0.0  # nobody waits twice for the same
        waiting = self.publisher.status().waiting
        if waiting and seconds:
            steps = ", ".join(str(step) for step in waiting)
            print(f"Waiting for the Hub to take step {steps}, for at most {seconds:g} s (Ctrl-C ends it).", flush=True)
        status = self.publisher.flush(seconds)
        if status.complete:
            self._left = self.seconds
            self.publisher.close()  # the next job starts it again
        self._print(status)
        return status

    def end(self, seconds: float | None = None) -> None:
        """The last wait: as long as the run said by default, unless one has just been in vain."""
        atexit.unregister(self.end)
        try:
            if self.publisher.output_dir.exists():  # or there is nothing left to send, nor to say
                self.wait(self._left if seconds is None else seconds)
        except KeyboardInterrupt:
            self._print(self.publisher.status())
        finally:
            self.publisher.close()

    def _print(self, status: Status) -> None:
        line = status.line(self.publisher.output_dir)
        if line != self._printed:
            print(line, flush=True)
        self._printed = line
