"""`push_to_hub` of a Trainer, through a queue on disk and a process beside the run; no step waits for it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, constants

from .distributed import broadcast
from .hub.last_wait import LastWait
from .hub.publisher import Publisher
from .hub.run_summary import RunSummary

__all__ = ["PublishingMixin"]

logger = logging.getLogger(__name__)

# What the mixins are mixed into has the Trainer's attributes; this tells type checkers not to look for them.
Base: Any = object


class PublishingMixin(Base):
    """
    Takes the place of everything in a Trainer that talks to the Hub; see docs/hub.md. Only the main process has a
    `publisher`, and no other waits for it but before the first step.

    Attributes:
        publisher ([`Publisher`], *optional*):
            Once there is something to push to.
        card_details (`dict[str, Any]`):
            Fields of [`RunSummary`] that a trainer cannot know, such as `license` or `languages`; every card that is
            written has them.
        wait_after_training (`bool`):
            Whether `train()` waits for the Hub before it returns, up to `hub_flush_timeout`; a single process does.
            Otherwise that is left to the end of the process.
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
        Create repository and branch if they are missing. If the Hub cannot be reached that is put off. All ranks must
        call it.

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
        from .report import CARD_FILES

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card()
        strategy, step = self.args.hub_strategy.value, self.state.global_step
        self.publisher.submit_checkpoint(checkpoint_folder, step, strategy, CARD_FILES)

    def create_model_card(self, *args: Any, **details: Any) -> None:
        """
        Write the card with its plots and results into the output folder, see [`~report.write_card`]. If that is not
        possible, a warning says why.

        Args:
            details:
                Fields of [`RunSummary`], or `language`, `tags` and `model_name` as in
                [`~transformers.Trainer.create_model_card`], whose other arguments the run itself answers.
        """
        from .report import write_card

        if not self.is_world_process_zero():
            return
        self.card_details |= _details(**details)
        try:
            write_card(self, **self.card_details)  # type: ignore[arg-type]  # the mixin of which this is a part
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
            self.push_to_hub("Model save", blocking=False)

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
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None or token is not None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        self.create_model_card(**details)
        if self.args.should_save:
            self.save_state()
        message = commit_message or "End of training"
        self.publish(message, revision)
        if not blocking or self._last_wait is None:
            return None
        status = self._last_wait.wait(self.args.hub_flush_timeout)
        if not status.complete or status.commit is None:
            return None
        url = f"{constants.ENDPOINT}/{status.target.rpartition('@')[0]}/commit/{status.commit}"
        return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=status.commit)

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
        # Several ranks would wait for the first one at their next collective.
        if self._last_wait is not None and self.wait_after_training and self.args.world_size == 1:
            self._last_wait.wait(self.args.hub_flush_timeout)


def _details(
    language: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    finetuned_from: str | None = None,
    tasks: Any = None,
    dataset: Any = None,
    dataset_tags: Any = None,
    dataset_args: Any = None,
    dataset_name: Any = None,
    **details: Any,
) -> dict[str, Any]:
    """The Trainer's arguments for cards in terms of [`RunSummary`]."""
    allowed = [f.name for f in fields(RunSummary)]
    if unknown := [name for name in details if name not in allowed]:
        raise TypeError(f"A card has nothing called {', '.join(unknown)}; use {', '.join(allowed)}.")
    if finetuned_from is not None:
        details["base_model"] = finetuned_from
    for name, value in {"languages": language, "tags": tags}.items():
        if value is not None:
            details[name] = [value] if isinstance(value, str) else list(value)
    return {name: value for name, value in details.items() if value is not None}
