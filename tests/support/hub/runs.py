"""Shared by the tests of publishing: checkpoints, hashes, waiting, and a client with short timeouts."""

import hashlib
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from hf_nexus.hub.retries import RetryPolicy, limit_requests
from tests.support.hub.server import ALICE, HubServer

CERTIFICATES = ssl.create_default_context()  # each client reads them, which takes longer than a request
REPO = "alice/model"
CARD = "---\nlicense: mit\n---\n# A model\n"
QUICK = RetryPolicy(request=1.0, first_retry=0.05, last_retry=0.2)
LARGE = 1 << 20  # bytes; files of this size are linked
SECONDS = 180.0  # time limit of what must happen, on a busy machine


def write_checkpoint(output_dir: Path, step: int) -> Path:
    """Write a checkpoint whose weights are large enough to be linked. Its content is a function of the step."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(step).bytes(LARGE + step)
    for name, content in {
        "model.safetensors": weights,
        "config.json": b'{"step": %d}' % step,
        "optimizer.pt": b"\0" + weights[: 1000 + step],
        "rng_state.pth": b"\0rng%d" % step,
        "totals.json": b'{"rows": {"text": %d}}' % step,
        "trainer_state.json": b'{"global_step": %d}' % step,
    }.items():
        (folder / name).write_bytes(content)
    (output_dir / "README.md").write_text(CARD)
    return folder


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition that must come true."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def content(folder: Path, *names: str) -> dict[str, bytes]:
    """Content of the named files of a folder, by default of all."""
    paths = [folder / name for name in names] or [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """Hashes, which a failing assertion can print."""
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in sorted(files.items())}


MODEL = ("config.json", "model.safetensors", "trainer_state.json")  # files of a checkpoint that go to the root


def model_of(checkpoint: Path) -> dict[str, bytes]:
    """Content of the root of the repository after this checkpoint was pushed, with the card."""
    return {**content(checkpoint, *MODEL), "README.md": CARD.encode()}


@contextmanager
def impatient_client(monkeypatch: pytest.MonkeyPatch, xet: bool) -> Iterator[None]:
    """Make `huggingface_hub` in this process online, on one transfer path, with timeouts and short retries."""
    from huggingface_hub.utils import _http

    sleep = _http.time.sleep
    quick: Any = SimpleNamespace(**{**vars(_http.time), "sleep": lambda seconds: sleep(min(seconds, 0.01))})
    monkeypatch.setattr(_http, "time", quick)
    monkeypatch.setattr(ssl, "create_default_context", lambda *args, **options: CERTIFICATES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    disable_progress_bars()
    set_client_factory(_http.default_client_factory)
    limit_requests(QUICK.request)
    yield
    set_client_factory(_http.default_client_factory)
    enable_progress_bars()


def api(hub: HubServer) -> HfApi:
    """A client with write access."""
    return HfApi(endpoint=hub.endpoint, token=ALICE)
