"""The side that talks to the Hub: one commit for each job, made once however often it is tried."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile

from .check import check_card
from .job import Job, SpoiledJobError, Target
from .queue import UploadQueue

__all__ = ["CardRefusedError", "Uploader", "is_permanent"]

CARD = "README.md"
_CONFLICTS = (409, 412)  # somebody else committed meanwhile: look again, at once
_TRANSIENT = (404, 408, 425, 429, *_CONFLICTS)  # what is not there may be made by the next attempt


class CardRefusedError(ValueError):
    """All is on the Hub but for the card."""


class Uploader:
    """
    Sends jobs, one commit each. May be called again after any error: what the Hub already has is not sent twice.

    Args:
        queue ([`UploadQueue`]): Where the jobs are; the caller holds its lock.
        api (`HfApi`): The client, with endpoint and token.
        revision (`str`, *optional*): Branch to send to, in place of the one that was asked for.
    """

    def __init__(self, queue: UploadQueue, api: HfApi, revision: str | None = None):
        self.queue, self.api, self.revision = queue, api, revision
        self._prepared: dict[Target, str] = {}

    def prepare(self, target: Target) -> str:
        """
        Create what is missing of the repository and the branch.

        Returns:
            `str`: the full id of the repository.
        """
        if target not in self._prepared:
            url = self.api.create_repo(target.repo_id, private=target.private, exist_ok=True)
            if target.revision is not None:
                self.api.create_branch(url.repo_id, branch=target.revision, exist_ok=True)
            self._prepared[target] = url.repo_id
        return self._prepared[target]

    def send(self, job: Job, slots: tuple[str, ...]) -> None:
        """
        Make the job's commit, note it in the state and delete the job. Of a card that the Hub would refuse, the job
        is what remains; all else is sent.

        Raises:
            CardRefusedError: the card is not valid.
            Exception: anything that the client raises.
        """
        files = job.files(slots)
        problem = _card_problem(files[CARD]) if CARD in files else None
        if problem is None:
            try:
                self._commit(job, slots, files)
            except (HfHubHTTPError, ValueError) as error:
                if CARD not in files or not _is_bad_request(error):
                    raise
                problem = str(error)  # it may be the card: the next attempt will tell
        if problem is not None:
            rest = {name: path for name, path in files.items() if name != CARD}
            if rest:
                self._commit(job, slots, rest)
            self.queue.keep_only(job, CARD)
            card = self.queue.resting_place(job) / "files" / CARD
            raise CardRefusedError(f"The Hub has step {job.step}, but not its card. Mend {card}: {problem}")
        self.queue.remove(job)

    def _commit(self, job: Job, slots: tuple[str, ...], files: dict[str, Path]) -> None:
        target = job.target if self.revision is None else replace(job.target, revision=self.revision)
        for attempt in range(10):
            try:
                repo_id = self.prepare(target)
                commit = self._commit_once(job, slots, files, repo_id, target.revision)
                break
            except Exception as error:
                self._prepared.pop(target, None)  # it may have been deleted
                if _status(error) not in _CONFLICTS or attempt == 9:
                    raise
                time.sleep(random.uniform(0.05, 0.5))
        state = self.queue.state()
        sent = state.setdefault("sent", {}).setdefault(str(job.target), {})
        sent.update({slot: max(job.number, sent.get(slot, 0)) for slot in slots})
        if "" in slots:
            state["pushed"] = {"step": job.step, "commit": commit, "repo_id": repo_id, "revision": target.revision}
        self._note(state)

    def _commit_once(
        self, job: Job, slots: tuple[str, ...], files: dict[str, Path], repo_id: str, revision: str | None
    ) -> str:
        job.verify(files)
        # With a parent, a commit whose answer was lost and that the Hub makes after all, late, is refused.
        parent = self.api.repo_info(repo_id, revision=revision).sha
        additions = [CommitOperationAdd(name, path) for name, path in files.items()]
        deletions = [
            CommitOperationDelete(name)
            for slot in slots
            if slot
            for name in self._names_below(repo_id, slot, parent)
            if name not in files
        ]
        self.api.preupload_lfs_files(repo_id, additions, revision=revision, free_memory=False)
        job.verify(files)  # again: now the files were read, and nothing refers to them yet
        commit = self.api.create_commit(
            repo_id,
            [*additions, *deletions],  # the client drops what the Hub already has, and makes no empty commit
            commit_message=job.message,
            revision=revision,
            parent_commit=parent,
        )
        return commit.oid

    def _names_below(self, repo_id: str, folder: str, revision: str | None) -> list[str]:
        try:
            entries = self.api.list_repo_tree(repo_id, folder, recursive=True, revision=revision)
            return [entry.path for entry in entries if isinstance(entry, RepoFile)]
        except EntryNotFoundError:
            return []

    def send_pending(self, before: Callable[[Job], object] = lambda job: None) -> Exception | None:
        """
        One pass over the queue, newest job first. A job that is refused stays and lets the others pass; a failure
        that may be temporary ends the pass.

        Args:
            before (`Callable[[Job], object]`, *optional*): Called with each job before it is sent.

        Returns:
            `Exception`, *optional*: what went wrong last; `None` if nothing is left.
        """
        refused: tuple[Exception, Job] | None = None
        tried: set[int] = set()
        while left := [(job, slots) for job, slots in self.queue.todo() if job.number not in tried]:
            job, slots = left[0]
            tried.add(job.number)
            if not slots:
                self.queue.remove(job)
                continue
            claimed = self.queue.claim(job)
            if claimed is None:
                continue
            before(claimed)
            try:
                self.send(claimed, slots)
            except SpoiledJobError as error:
                state = self.queue.state()
                self._note({**state, "lost": [*state.get("lost", ()), str(error)]})
                self.queue.remove(claimed)
            except Exception as error:  # whatever the client raises: it must not cost the jobs behind this one
                self._note_error(error, claimed)
                self.queue.release(claimed)
                if not is_permanent(error):
                    return error
                refused = error, claimed
        if refused is not None:
            self._note_error(*refused, final=True)
            return refused[0]
        state = self.queue.state()
        if state.pop("error", None):
            self._note(state)
        return None

    def _note_error(self, error: Exception, job: Job, final: bool = False) -> None:
        """Write down an error; `final` says that nothing more can be done until a person does something about it."""
        text = " ".join(f"{type(error).__name__}: {error}".split())[:1000]
        note = {"text": text, "step": job.step, "permanent": final, "time": time.time()}
        self._note({**self.queue.state(), "error": note})

    def _note(self, state: dict[str, Any]) -> None:
        with suppress(OSError):  # a full disk; the queue remembers, and writes it with what comes next
            self.queue.write_state(state)


def is_permanent(error: BaseException) -> bool:
    """Whether an error will come back until a person does something about it."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _TRANSIENT
    return isinstance(error, CardRefusedError | HFValidationError)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error: the client wraps those of LFS uploads and cards."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None


def _is_bad_request(error: Exception) -> bool:
    return _status(error) in (400, 422)


def _card_problem(path: Path) -> str | None:
    try:
        check_card(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        return str(error)
    return None
