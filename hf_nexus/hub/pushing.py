"""What `hf-nexus push` does."""

from pathlib import Path

from .queue import QUEUE_NAME
from .status import Status
from .uploader_process import drain

__all__ = ["push_rest"]


def push_rest(output_dir: Path, revision: str | None = None) -> tuple[str, bool]:
    """
    Send what a run left in its queue, with progress bars.

    Args:
        output_dir (`Path`): The run's folder.
        revision (`str`, *optional*): Branch to send to, in place of the run's.

    Returns:
        `tuple[str, bool]`: what is on the Hub and what is not, in one line, and whether nothing stayed behind.

    Raises:
        ValueError: nothing was ever queued there.
        QueueBusyError: another process is sending.
        OSError: the queue cannot be written to.

    Example:
        ```python
        >>> push_rest(Path("no/such/folder"))
        Traceback (most recent call last):
        ...
        ValueError: no/such/folder holds nothing to push: give the output_dir of a run that had push_to_hub.

        ```
    """
    queue = output_dir / QUEUE_NAME
    if not queue.is_dir():
        raise ValueError(f"{output_dir} holds nothing to push: give the output_dir of a run that had push_to_hub.")
    lost = Status.read(queue).lost
    failure = drain(queue, revision=revision)
    status = Status.read(queue)
    return status.line(output_dir), failure is None and status.complete and status.lost == lost
