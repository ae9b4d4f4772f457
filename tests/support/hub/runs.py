"""What the tests of publishing share: runs to publish, and a client whose patience is short."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from hf_nexus.hub.uploader_process import Patience, bound_requests
from tests.support.hub.server import ALICE, HubServer

REPO = "alice/model"
CARD = "---\nlicense: mit\n---\n# A model\n"
QUICK = Patience(request=1.0, first_retry=0.05, last_retry=0.2)
LARGE = 1 << 20  # bytes, from where on files are linked


def write_checkpoint(output_dir: Path, step: int) -> Path:
    """A checkpoint with weights that are large enough to be linked; its content is a function of the step."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(step).bytes(LARGE + step)
    for name, content in {
        "model.safetensors": weights,
        "config.json": b'{"step": %d}' % step,
        "optimizer.pt": b"\0" + weights[: 1000 + step],
        "rng_state.pth": b"\0rng%d" % step,
        "trainer_state.json": b'{"global_step": %d}' % step,
    }.items():
        (folder / name).write_bytes(content)
    (output_dir / "README.md").write_text(CARD)
    return folder


def content(folder: Path, *names: str) -> dict[str, bytes]:
    """Files of a folder, all by default."""
    paths = [folder / name for name in names] or [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """Hashes: what a failing assertion can print."""
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in sorted(files.items())}


MODEL = ("config.json", "model.safetensors", "trainer_state.json")  # of a checkpoint, what goes to the root


def model_of(checkpoint: Path) -> dict[str, bytes]:
    """What the root of the repository holds after this checkpoint was pushed, card included."""
    return {**content(checkpoint, *MODEL), "README.md": CARD.encode()}


@contextmanager
def impatient_client(monkeypatch: pytest.MonkeyPatch, xet: bool) -> Iterator[None]:
    """This process's `huggingface_hub` online, on one transfer path, with timeouts and hardly any backoff."""
    from huggingface_hub.utils import _http

    sleep = _http.time.sleep
    quick: Any = SimpleNamespace(**{**vars(_http.time), "sleep": lambda seconds: sleep(min(seconds, 0.01))})
    monkeypatch.setattr(_http, "time", quick)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    disable_progress_bars()
    set_client_factory(_http.default_client_factory)
    bound_requests(QUICK.request)
    yield
    set_client_factory(_http.default_client_factory)
    enable_progress_bars()


def api(hub: HubServer) -> HfApi:
    """The client of somebody who may write."""
    return HfApi(endpoint=hub.endpoint, token=ALICE)
