"""`push_to_hub` of a Trainer through an on-disk queue and a process that uploads: no step waits for the Hub."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, constants

from ..hub.facts import public_model
from ..hub.publisher import FinalFlush, Publisher
from ..hub.run_summary import RunSummary
from .distributed import broadcast

__all__ = ["Publishing", "card_fields"]


class Publishing:
    """Pushes of a run during and after training. See docs/hub.md."""

    def __init__(self, args: Any):
        self._args = args
        self._final_flush: FinalFlush | None = None
        self.publisher: Publisher | None = None  # on the main process, once there is a repository to push to

    def connect(self, token: str | None, private: bool | None) -> str:
        """
        Create the repository and branch if missing, or later if the Hub is unreachable. All ranks must call it.

        Returns:
            `str`: id of the repository.

        Raises:
            ValueError: on all ranks, if the Hub refuses.
        """
        args = self._args
        name, refusal = args.hub_model_id or Path(args.output_dir).absolute().name, None
        if args.process_index == 0:
            private = args.hub_private_repo if private is None else private
            try:
                target = {"private": private, "revision": args.hub_revision, "dtype": args.save_dtype}
                publisher = Publisher(name, args.output_dir, token=token or args.hub_token, **target)
                name = publisher.check() or name
            except ValueError as error:
                refusal = error
            else:
                self.publisher, self._final_flush = publisher, FinalFlush(publisher, args.hub_flush_timeout)
        if broadcast(torch.tensor(int(refusal is not None)), args.device).item():
            raise refusal or ValueError("The main process may not push to the Hub: see its message.")
        return name

    @property
    def pushes_checkpoints(self) -> bool:
        """Whether this process queues checkpoints while it trains."""
        return self.publisher is not None and self._args.hub_strategy != "end"

    def push_checkpoint(self, folder: str, step: int, files: tuple[str, ...]) -> None:
        """Queue a complete checkpoint and the files of the card."""
        if self.publisher is not None:
            self.publisher.submit_checkpoint(folder, step, self._args.hub_strategy.value, files)

    def push_run(self, step: int, message: str, revision: str | None = None) -> None:
        """Queue the output folder without its checkpoints."""
        if self.publisher is not None:
            self.publisher.submit(step, message, revision)

    def logs(self) -> dict[str, float]:
        """The numbers `hub/pending` and `hub/pushed_step` for a log line."""
        return {} if self.publisher is None else dict(self.publisher.status().logs())

    def record(self, states: dict[str, Any]) -> None:
        """Put the status into `stateful_callbacks` of `trainer_state.json`."""
        if self.publisher is not None:
            status = asdict(self.publisher.status())
            states["Publisher"] = {"args": {}, "attributes": {"status": status}}

    def wait(self, message: str) -> CommitInfo | None:
        """Wait for the Hub, up to `hub_flush_timeout` seconds. Returns the last commit if everything is uploaded."""
        if self._final_flush is None:
            return None
        status = self._final_flush.wait(self._args.hub_flush_timeout)
        if not status.complete or status.commit is None:
            return None
        url = f"{constants.ENDPOINT}/{status.target.rpartition('@')[0]}/commit/{status.commit}"
        return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=status.commit)

    def end(self, seconds: float) -> None:
        """Wait for the Hub for the last time, and end the upload process."""
        if self._final_flush is not None:
            self._final_flush.end(min(seconds, self._args.hub_flush_timeout))


# Arguments of `Trainer.create_model_card` by position, and the fields of `RunSummary` that they set.
_CARD_ARGUMENTS = ("language", "license", "tags", "model_name", "finetuned_from", "tasks")
_RENAMED = {"language": "languages", "finetuned_from": "base_model", "tasks": "pipeline_tag"}
_LISTS = ("languages", "tags")
# The run itself knows its data.
_IGNORED = ("dataset_tags", "dataset", "dataset_args", "dataset_name")


def card_fields(args: tuple, given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Arguments of [`~transformers.Trainer.create_model_card`] as fields of [`RunSummary`].

    Raises:
        TypeError: a name that a card does not have.
    """
    known: dict[str, Any] = {}
    for name, value in {**dict(zip(_CARD_ARGUMENTS, args, strict=False)), **given}.items():
        if value is None or name in _IGNORED:
            continue
        name = _RENAMED.get(name, name)
        if name == "pipeline_tag" and not isinstance(value, str):
            value = value[0]  # a model has one task on the Hub
        if name == "base_model":
            value = public_model(value)
        if name in _LISTS:
            value = [value] if isinstance(value, str) else list(value)
        known[name] = value
    allowed = [f.name for f in fields(RunSummary)]
    if unknown := [name for name in known if name not in allowed]:
        raise TypeError(f"A card has nothing called {', '.join(unknown)}; use {', '.join(allowed)}.")
    return known
