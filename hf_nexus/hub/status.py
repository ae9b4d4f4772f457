"""What a run may say about its queue: in logs, in its state and at the end."""

import os
from dataclasses import dataclass
from pathlib import Path

from .queue import UploadQueue

__all__ = ["Status"]


@dataclass(frozen=True)
class Status:
    """
    What is on the Hub and what is not.

    Args:
        target (`str`): Repository and branch.
        pushed_step (`int`, *optional*): Step of the model that is on the Hub, of this queue's.
        commit (`str`, *optional*): Its commit.
        waiting (`tuple[int, ...]`): Steps of what waits on disk, oldest first.
        error (`str`, *optional*): What holds it up.
        permanent (`bool`): Whether somebody has to do something about that.
        lost (`tuple[str, ...]`): What can no longer be sent as it was saved, and why.
        unqueued (`str`, *optional*): Why the last result could not even be put aside.
    """

    target: str
    pushed_step: int | None
    commit: str | None
    waiting: tuple[int, ...]
    error: str | None
    permanent: bool
    lost: tuple[str, ...] = ()
    unqueued: str | None = None

    @classmethod
    def read(cls, folder: Path, target: str = "") -> "Status":
        """From the queue's folder, whoever sends what is in it."""
        queue = UploadQueue(folder)
        jobs, state = queue.jobs(), queue.state()
        pushed, error = state.get("pushed"), state.get("error", {})
        if pushed is not None:
            target = f"{pushed['repo_id']}@{pushed['revision'] or 'main'}"
        elif jobs and not target:
            target = str(jobs[-1].target)
        return cls(
            target=target,
            pushed_step=pushed and pushed["step"],
            commit=pushed and pushed["commit"],
            waiting=tuple(job.step for job in jobs),
            error=error.get("text"),
            permanent=error.get("permanent", False),
            lost=tuple(state.get("lost", ())),
        )

    @property
    def complete(self) -> bool:
        """Whether nothing stayed behind."""
        return not self.waiting and self.unqueued is None

    def logs(self) -> dict[str, int]:
        """For a log line of the training."""
        logs = {"hub/pending": len(self.waiting) + (self.unqueued is not None)}
        return logs if self.pushed_step is None else {**logs, "hub/pushed_step": self.pushed_step}

    def line(self, output_dir: str | os.PathLike[str]) -> str:
        """One plain line: what is on the Hub, what is not and why, and how to send it."""
        there = f"step {self.pushed_step}" if self.pushed_step is not None else "nothing"
        line = f"On the Hub ({self.target}): {there}."
        if self.waiting:
            steps = ", ".join(str(step) for step in self.waiting)
            why = f" ({self.error})" if self.error else ""
            line += f" Not there yet: step {steps}{why}. Send the rest with: hf-nexus push {output_dir}"
        if self.lost:
            line += f" Lost: {'; '.join(self.lost)}"
        if self.unqueued is not None:
            line += f" Not even put aside, it is in {output_dir} only: {self.unqueued}."
        return line
