"""`recipes/plain_accelerate.py` on machines that a test does not have. `test_commands.py` runs it."""

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "recipes/plain_accelerate.py"


class Chosen(Exception):
    """Ends the recipe when it has chosen its device."""


@pytest.mark.parametrize(
    ("device", "processes", "cpu"),
    [(None, 2, True), ("mps", 2, True), ("cuda", 2, False), ("mps", 1, False), (None, 1, True)],
)
def test_processes_that_no_device_connects_use_the_cpu(monkeypatch, device, processes, cpu):
    def accelerator(*, cpu: bool) -> None:
        raise Chosen(cpu)

    found = None if device is None else torch.device(device)
    monkeypatch.setattr("accelerate.Accelerator", accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(Chosen) as stop:
        runpy.run_path(str(SCRIPT))["main"](1, 0.1)
    assert stop.value.args == (cpu,)
