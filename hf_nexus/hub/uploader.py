"""Sending the jobs of a queue to the Hub: one commit per job, even after retries and lost answers."""

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm

from ..files import hidden, printable, read_plain
from .card import merge_cards, user_text_digest
from .check import check_card
from .job import FINISHED_RUN, Job, RefusedJobError, SpoiledJobError, Target
from .queue import QUEUE_NAME, QueueStatus, UploadQueue, sending
from .retries import CONFLICTS, CardRefusedError, RetryPolicy, deadline, http_status, is_permanent, limit_requests

__all__ = ["Uploader", "prepare", "push_queue"]

_CARD = "README.md"
# Differs for each attempt. The log of the upload process has it.
_REQUEST = re.compile(r" ?\((Request ID|Amzn Trace ID|Amz CF ID): [^)]*\)")
_MOST_FILES = 100_000  # of one folder of a repository; a server could list files without end


def push_queue(
    output_dir: Path,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    approve: Callable[[str], bool] = lambda question: False,
    token: str | None = None,
    endpoint: str | None = None,
    retry: RetryPolicy | None = None,
    attempts: int = 5,
    lock_timeout: float = 10.0,
) -> tuple[QueueStatus, bool]:
    """
    Send the queue of a run from this process, with progress bars. Afterwards, all requests of `huggingface_hub` in
    this process have timeouts.

    `repo_id`, `revision` and `private` replace those of the run. `approve` decides whether to send a job that this
    user may not have queued, of which it gets a description. By default, such jobs are not sent. Temporary errors are
    retried up to `attempts` times. Another sender has `lock_timeout` seconds to end.

    Returns:
        The status afterwards, and whether everything that was queued is on the Hub.

    Raises:
        ValueError: the folder holds no queue, or its queue is a link.
        QueueBusyError: another process is sending the queue.
        OSError: the queue is not writable.
    """
    folder, retry, token = output_dir / QUEUE_NAME, retry or RetryPolicy(), hidden(token)
    if not folder.is_dir():
        raise ValueError(f"{output_dir} holds nothing to push: name a repository with --repo.")
    given = {"repo_id": repo_id, "revision": revision, "private": private}
    instead = {name: value for name, value in given.items() if value is not None}

    def ask(job: Job, doubts: str) -> bool:
        return approve(f"{_describe(job, queue.destination(job))} It may not be yours: {printable(doubts)}.")

    queue, lost = UploadQueue(folder, instead, ask), QueueStatus.read(folder).lost
    with sending(folder, lock_timeout):
        queue.finish_deletions()
        limit_requests(retry.request)
        uploader = Uploader(queue, HfApi(endpoint=endpoint, token=token, library_name="hf-nexus"), retry)
        jobs = [job for job, _ in queue.pending()]
        for job in jobs:
            print(_describe(job, queue.destination(job)))
        with tqdm(total=len(jobs), desc="Pushing", unit="checkpoint", disable=not jobs) as bar:
            for failures in range(1, attempts + 1):
                failure = uploader.send_all(lambda job: bar.set_description(f"Pushing step {job.step}"))
                bar.update(len(jobs) - len(queue.pending()) - bar.n)
                if failure is None or is_permanent(failure):
                    break
                if failures < attempts:
                    time.sleep(retry.delay(failures))
    status = QueueStatus.read(folder)
    return status, status.complete and status.lost == lost


def prepare(target: Target, api: HfApi) -> str:
    """Create the repository and the branch if they are missing; return the full id of the repository."""
    url = api.create_repo(target.repo_id, private=target.private, exist_ok=True)
    if target.revision is not None and not target.revision.startswith("refs/"):  # pull requests exist already
        api.create_branch(url.repo_id, branch=target.revision, exist_ok=True)
    return url.repo_id


class Uploader:
    """
    Sends jobs, one commit each. A call may be repeated after any error: it sends nothing that the Hub already has.

    The caller holds the lock of the queue. The process exits if one job takes longer than `retry` allows.
    """

    def __init__(self, queue: UploadQueue, api: HfApi, retry: RetryPolicy | None = None):
        self.queue, self.api, self.retry = queue, api, retry or RetryPolicy()
        self._prepared: dict[Target, str] = {}

    def send_all(self, before: Callable[[Job], object] = lambda job: None) -> Exception | None:
        """
        Try each job once, newest first. A permanent error skips the job; a temporary error ends the call.

        Calls `before` with each job before it is sent. Returns the last error, or `None` if the queue is empty.
        """
        refused: tuple[Exception, int] | None = None
        tried: set[int] = set()
        while left := [(job, slots) for job, slots in self.queue.pending() if job.number not in tried]:
            job, slots = left[0]
            tried.add(job.number)
            if not slots:
                self.queue.remove(job)
                continue
            claimed = self.queue.claim(job)
            if claimed is None:
                continue
            try:
                before(claimed)
                with deadline(self.retry.seconds(claimed.size()), f"step {job.step}"):
                    self._send(claimed, slots)
            except SpoiledJobError as error:
                state = self.queue.state()
                self._note({**state, "lost": [*state.get("lost", ()), str(error)]})
                self.queue.remove(claimed)
            except Exception as error:  # the client raises many types, and none may block the other jobs
                self._note_error(error, job.step)
                self.queue.release(claimed)
                if not is_permanent(error):
                    return error
                refused = error, job.step
        if (reasons := self.queue.refused()) and refused is None:
            refused = RefusedJobError(" ".join(reasons)), 0
        state = self.queue.state()
        if reasons or state.pop("error", None) or "refused" in state:
            self._note({**state, "refused": reasons})
        if refused is not None:
            self._note_error(*refused, permanent=True)
        return refused and refused[0]

    def _send(self, job: Job, slots: tuple[str, ...]) -> None:
        """Commit the files of a job and delete the job. If the card is invalid, commit the other files and keep it."""
        files = job.files(slots)
        problem = _card_problem(files[_CARD]) if _CARD in files else None
        if problem is None:
            try:
                self._commit(job, slots, files)
            except (HfHubHTTPError, ValueError) as error:
                if _CARD not in files or http_status(error) not in (400, 422):
                    raise
                problem = str(error)  # the card may be the reason; the attempt without it will show
        if problem is not None:
            rest = {name: path for name, path in files.items() if name != _CARD}
            if rest:
                self._commit(job, slots, rest)
            self.queue.keep_only(job, _CARD)
            original = f"{self.queue.folder.parent / _CARD} and push it again with --repo"
            card = original if job.message == FINISHED_RUN else self.queue.released_path(job) / "files" / _CARD
            raise CardRefusedError(f"The Hub has step {job.step} without its card. Correct {card}: {problem}")
        self.queue.remove(job)

    def _commit(self, job: Job, slots: tuple[str, ...], files: dict[str, Path]) -> None:
        """Commit files, again after conflicts with other commits, and note the commit in the state."""
        target = self.queue.destination(job)
        assert target is not None  # otherwise the queue refuses the job
        for attempt in range(10):
            try:
                if target not in self._prepared:
                    self._prepared[target] = prepare(target, self.api)
                repo_id = self._prepared[target]
                commit = self._commit_once(job, slots, files, repo_id, target)
                break
            except Exception as error:
                self._prepared.pop(target, None)  # the repository may have been deleted
                if http_status(error) not in CONFLICTS or attempt == 9:
                    raise
                time.sleep(random.uniform(0.05, 0.5))
        state = self.queue.state()
        sent = state.setdefault("sent", {}).setdefault(str(job.target), {})
        sent.update({slot: max(job.number, sent.get(slot, 0)) for slot in slots})
        if _CARD in files and (digest := user_text_digest(read_plain(files[_CARD]))) is not None:
            state.setdefault("texts", {})[str(target)] = digest
        if "" in slots:
            state["pushed"] = {"step": job.step, "commit": commit, "repo_id": repo_id, "revision": target.revision}
        self._note(state)

    def _commit_once(
        self, job: Job, slots: tuple[str, ...], files: dict[str, Path], repo_id: str, target: Target
    ) -> str:
        job.verify(files)
        revision = target.revision
        # With a parent, the Hub refuses an earlier attempt that arrives late, after a retry was committed.
        parent = self.api.repo_info(repo_id, revision=revision).sha
        contents: dict[str, Path | bytes] = {**files}
        if _CARD in files and (card := self._merged_card(files[_CARD], repo_id, target, parent)) is not None:
            contents[_CARD] = card.encode()
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        deletions = [
            CommitOperationDelete(name)
            for slot in slots
            if slot
            for name in self._names_below(repo_id, slot, parent)
            if name not in files
        ]
        self.api.preupload_lfs_files(repo_id, additions, revision=revision, free_memory=False)
        job.verify(files)  # again: the files were read in between, and no commit refers to them yet
        commit = self.api.create_commit(
            repo_id,
            [*additions, *deletions],  # the client drops files that the Hub already has, and makes no empty commit
            commit_message=job.message,
            revision=revision,
            parent_commit=parent,
        )
        return commit.oid

    def _merged_card(self, path: Path, repo_id: str, target: Target, parent: str | None) -> str | None:
        """
        A card with what users wrote into that of the repository, `None` if one of both is not ours or damaged. Their
        text on the Hub is kept unless that of the run has changed since its last push.
        """
        digest = user_text_digest(card := read_plain(path))
        if digest is None:
            return None
        unchanged = digest == self.queue.state().get("texts", {}).get(str(target), "")
        try:
            check_card(merged := merge_cards(card, self._published_card(repo_id, parent), unchanged))
        except ValueError:
            return None
        return merged

    def _published_card(self, repo_id: str, revision: str | None) -> str:
        """The card in the repository; empty if there is none, or it may not be read."""
        url = hf_hub_url(repo_id, _CARD, revision=revision, endpoint=self.api.endpoint)
        response = get_session().get(url, headers=build_hf_headers(token=self.api.token, library_name="hf-nexus"))
        try:
            hf_raise_for_status(response)
        except HfHubHTTPError as error:
            if isinstance(error, EntryNotFoundError) or is_permanent(error):
                return ""
            raise
        return response.content.decode("utf-8-sig")

    def _names_below(self, repo_id: str, folder: str, revision: str | None) -> list[str]:
        try:
            entries = self.api.list_repo_tree(repo_id, folder, recursive=True, revision=revision)
            return [entry.path for entry in islice(entries, _MOST_FILES) if isinstance(entry, RepoFile)]
        except EntryNotFoundError:
            return []

    def _note_error(self, error: Exception, step: int, permanent: bool = False) -> None:
        text = _REQUEST.sub("", printable(f"{type(error).__name__}: {error}"))[:1000]
        note = {"text": text, "step": step, "permanent": permanent, "time": time.time()}
        self._note({**self.queue.state(), "error": note})

    def _note(self, state: dict[str, Any]) -> None:
        with suppress(OSError):  # on a full disk, the queue keeps the state in memory and writes it next time
            self.queue.write_state(state)


def _card_problem(path: Path) -> str | None:
    try:
        check_card(read_plain(path))
    except ValueError as error:
        return str(error)
    return None


def _describe(job: Job, target: Target | None) -> str:
    """What is sent and where to, for the user."""
    private = None if target is None else target.private
    visibility = "the account's default visibility" if private is None else "private" if private else "public"
    names = list(job.stamps)
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    replaced = "".join(f" Replaces the folder {slot}." for slot in job.slots if slot)
    where = f"{target} (if new: {visibility})"
    return printable(f"Step {job.step} to {where}: {len(names)} files, {job.size():,} bytes: {listed}.{replaced}")
