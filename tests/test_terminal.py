"""Tables, and which warnings of other packages our commands leave out."""

import logging
import os
import subprocess
import sys

import pytest

MISSING = "There were missing keys in the checkpoint model loaded: ['{}']."
CHANGED = "Warning: The following arguments do not match the ones in the `trainer_state.json` within the checkpoint \
directory: "
PRINT = """
import warnings
from hf_nexus.terminal import quieten
quieten()
from tqdm import tqdm
for step in tqdm(range(3)): pass
from torch.utils.data import DataLoader
list(DataLoader([1], pin_memory=True))
import tempfile, torch.distributed.checkpoint
torch.distributed.checkpoint.save({}, checkpoint_id=tempfile.mkdtemp())
warnings.warn("the user's")
"""


def test_names_and_paths_are_printed_as_they_are(capsys):
    from hf_nexus.terminal import new_console, new_table

    table = new_table("s3://a:100:b", "source")
    table.add_row("[red]a:b:c")
    new_console().print("[bold]:x:", table)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[bold]:x:", "s3://a:100:b", "[red]a:b:c"))


def test_narrow_tables_wrap_text_and_keep_numbers(capsys):
    from rich.console import Console

    from hf_nexus.terminal import new_table

    table = new_table("", "source", "tokens")
    table.add_row("a-name-of-many-letters", "1,234,567")
    Console(width=20).print(table)  # half of it for each column would cut the number
    shown = capsys.readouterr().out
    assert "1,234,567" in shown and "a-name-of-man" not in shown and "…" not in shown
    names = [line.split("│")[1].strip() for line in shown.splitlines() if line.count("│") == 3]
    assert "".join(names) == "a-name-of-many-letters"


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        (MISSING.format("lm_head.weight"), False),
        (MISSING.format("model.norm.weight"), True),
        (f"{CHANGED}\n\teval_steps: 0.1 (from args) != 400 (from trainer_state.json)", False),
        (f"{CHANGED}\n\teval_steps: 40 (from args) != 20 (from trainer_state.json)", True),
        (f"{CHANGED}\n\tsave_steps: 0.1 (from args) != 4 (from args)\n\teval_steps: 4 (from args) != 2 (x)", True),
    ],
)
def test_only_what_the_user_cannot_change_is_left_out(monkeypatch, record, kept):
    from hf_nexus.terminal import quieten

    logger = logging.getLogger("transformers.trainer")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    quieten()
    made = logger.makeRecord(logger.name, logging.WARNING, "trainer.py", 1, record, (), None)
    assert bool(logger.filter(made)) is kept


def test_bars_that_end_at_once_and_warnings_do_not_appear():
    found = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True)
    assert "the user's" in found.stderr
    assert not [text for text in ("pin_memory", "single process", "3/3") if text in found.stderr]
