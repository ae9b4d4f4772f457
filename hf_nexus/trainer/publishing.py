"""`push_to_hub` of a Trainer, through a queue on disk and a process beside the run; no step waits for it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, constants

from ..hub.last_wait import LastWait
from ..hub.publisher import Publisher
from ..hub.run_summary import RunSummary
from .distributed import broadcast

__all__ = ["PublishingMixin"]

logger = logging.getLogger(__name__)

# What the mixins are mixed into has the Trainer's attributes; this tells type checkers not to look for them.
Base: Any = object


class PublishingMixin(Base):
    """
    Takes the place of everything in a Trainer that talks to the Hub; see docs/hub.md.

    Attributes:
        publisher ([`Publisher`], *optional*):
            Of the main process, once there is something to push to.
        card_details (`dict[str, Any]`):
            Fields of [`RunSummary`] that a trainer cannot know, such as `license` or `languages`; every card that is
            written has them.
        wait_after_training (`bool`):
            Whether `train()` of a single process waits for the Hub, up to `hub_flush_timeout`. Otherwise that is left
            to the end of the process.
    """

    hub_model_id: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self.publisher: Publisher | None = None
        self.card_details: dict[str, Any] = {}
        self.wait_after_training = True
        self._last_wait: LastWait | None = None
        super().__init__(*args, **kwargs)

    # ---- Before the first step ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create what is missing of repository and branch, later if the Hub cannot be reached. All ranks must call it.

        Args:
            token (`str`, *optional*):
                With write access; `args.hub_token`, or the one that is logged in, by default.
            private (`bool`, *optional*):
                Visibility of a repository that is yet to be created; `args.hub_private_repo` by default.

        Raises:
            ValueError: on all ranks, if the Hub refuses.
        """
        args = self.args
        name, refusal = args.hub_model_id or Path(args.output_dir).absolute().name, None
        if self.is_world_process_zero():
            private = args.hub_private_repo if private is None else private
            try:
                publisher = Publisher(
                    name, args.output_dir, token=token or args.hub_token, private=private, revision=args.hub_revision
                )
                name = publisher.check() or name
            except ValueError as error:
                refusal = error
            else:
                if self._last_wait is not None:
                    self._last_wait.end(0.0)  # a queue has one sender
                self.publisher, self._last_wait = publisher, LastWait(publisher, args.hub_flush_timeout)
        if broadcast(torch.tensor(int(refusal is not None)), args.device).item():
            raise refusal or ValueError("The main process may not push to the Hub: see its message.")
        self.hub_model_id = self.card_details["repo_id"] = name

    # ---- During training ----

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.publisher is None or self.args.hub_strategy == "end":
            return
        from .card import CARD_FILES

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._write_card(plots=False)  # drawing would hold up training; the last card has the pictures
        strategy, step = self.args.hub_strategy.value, self.state.global_step
        self.publisher.submit_checkpoint(checkpoint_folder, step, strategy, CARD_FILES)

    def create_model_card(self, *args: Any, **details: Any) -> None:
        """
        Write the card with its plots and results into the output folder, see [`write_card`]. If that is not possible,
        a warning says why.

        Args:
            details:
                Fields of [`RunSummary`], or `language`, `tags`, `tasks` and `model_name` as in
                [`~transformers.Trainer.create_model_card`], whose other arguments the run itself answers.
        """
        self.card_details |= _details(*args, **details)
        self._write_card(plots=not self._staging)  # TRL calls this for each checkpoint

    def _write_card(self, plots: bool) -> None:
        from .card import write_card

        if not self.is_world_process_zero():
            return
        try:
            write_card(self, plots=plots, **self.card_details)  # type: ignore[arg-type]  # the mixin of which this is a part
        except Exception as error:  # a card, plots and all, is never worth a run
            logger.warning(f"The card could not be written: {error}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the training log line what waits for the Hub (`hub/pending`) and what is there."""
        if self.publisher is not None and self.is_in_train and "loss" in logs:
            logs |= self.publisher.status().logs()
        super().log(logs, start_time)

    # ---- Saving ----

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with self._token_left_out():
            super()._save(*args, **kwargs)

    @contextmanager
    def _token_left_out(self) -> Iterator[None]:
        """Whoever saves the arguments publishes them."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            yield
        finally:
            self.args.hub_token = token

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._note_status()
        super()._save_checkpoint(*args, **kwargs)

    def save_state(self) -> None:
        """Save `trainer_state.json`, with the status of the publishing at this moment."""
        self._note_status()
        super().save_state()

    def _note_status(self) -> None:
        if self.publisher is not None:
            status = asdict(self.publisher.status())
            self.state.stateful_callbacks["Publisher"] = {"args": {}, "attributes": {"status": status}}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; with `push_to_hub`, that of the output folder is queued as well."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            if Path(output_dir or self.args.output_dir) != Path(self.args.output_dir):
                super().save_model(_internal_call=True)
            self._publish_run("Model save")

    # ---- After the last step ----

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **details: Any,
    ) -> Any:
        """
        Save the model and push the output folder, all but its checkpoints. All ranks must call it.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether the main process waits, up to `args.hub_flush_timeout` seconds.
            token (`str`, *optional*), private (`bool`, *optional*):
                As in `init_hf_repo`.
            revision (`str`, *optional*):
                Branch, created when missing; `args.hub_revision` by default.
            details:
                For [`create_model_card`].

        Returns:
            `CommitInfo`, *optional*: on the main process, if it waited and everything is on the Hub. `None` is no
            error: what is missing stays on disk.

        Raises:
            ValueError: if there is nothing to push to yet, as `init_hf_repo`.

        Example:
            >>> trainer.push_to_hub(license="apache-2.0", language="en")  # doctest: +SKIP
        """
        if self.hub_model_id is None or token is not None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        message = commit_message or "End of training"
        self._publish_run(message, revision, **details)
        if not blocking or self._last_wait is None:
            return None
        status = self._last_wait.wait(self.args.hub_flush_timeout)
        if not status.complete or status.commit is None:
            return None
        url = f"{constants.ENDPOINT}/{status.target.rpartition('@')[0]}/commit/{status.commit}"
        return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=status.commit)

    def _publish_run(self, commit_message: str, revision: str | None = None, **details: Any) -> None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card(**details)
        self.save_state()
        self.publish(commit_message, revision)

    def publish(self, commit_message: str, revision: str | None = None) -> None:
        """Queue the output folder as it is, without its checkpoints."""
        if self.publisher is None:
            return
        usual = self.publisher.target
        if revision is not None:
            self.publisher.target = replace(usual, revision=revision)
        self.publisher.submit(self.state.global_step, commit_message)
        self.publisher.target = usual

    def _finish_current_push(self) -> None:
        waits = self.wait_after_training and self.args.world_size == 1  # several would wait at the next collective
        if waits and self._last_wait is not None and self.args.hub_strategy != "end":
            self._last_wait.wait(self.args.hub_flush_timeout)


def _details(
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    *unused: Any,
    **details: Any,
) -> dict[str, Any]:
    """The Trainer's arguments for cards in terms of [`RunSummary`]."""
    for name in ("dataset_tags", "dataset", "dataset_args", "dataset_name"):
        details.pop(name, None)  # the run itself knows
    allowed = [f.name for f in fields(RunSummary)]
    if unknown := [name for name in details if name not in allowed]:
        raise TypeError(f"A card has nothing called {', '.join(unknown)}; use {', '.join(allowed)}.")
    details |= {"license": license, "model_name": model_name}
    if finetuned_from is not None:
        details["base_model"] = finetuned_from
    if tasks:
        details["task"] = tasks if isinstance(tasks, str) else tasks[0]  # the Hub has one per model
    for name, value in {"languages": language, "tags": tags}.items():
        if value is not None:
            details[name] = [value] if isinstance(value, str) else list(value)
    return {name: value for name, value in details.items() if value is not None}
