"""What our commands print: tables, and of other packages only what the user can act on."""

import logging
import os
import re
import sys
import warnings
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["format_bytes", "format_number", "is_live", "new_console", "new_table", "quieten"]

# Records of the Trainer that are left out.
_RECORDS = re.compile(
    # The checkpoint of a model with tied embeddings has them once. Loading it ties them again.
    r"There were missing keys in the checkpoint model loaded: \['lm_head\.weight'\]\."
    # A fraction of the steps is compared with the number of steps that was made of it.
    r"|Warning: The following arguments do not match .*:( *\n\t\w+_steps: 0\.\d+ \(from args\) != \d+ \(from \S+\))+"
)


def new_console(quiet: bool = False) -> "Console":
    """A console that prints names and paths as they are: `[a]` is no markup, and `:a:` no emoji."""
    from rich.console import Console

    return Console(quiet=quiet, markup=False, emoji=False)


def is_live(console: "Console") -> bool:
    """
    Whether a console can update lines in place. A command that a notebook starts takes its output for a terminal, but
    the notebook keeps each update.
    """
    return console.is_terminal and not console.is_dumb_terminal and "JPY_PARENT_PID" not in os.environ


def new_table(title: str, *columns: str, texts: int = 1) -> "Table":
    """
    A table whose first `texts` columns are text, on the left, and the others numbers, on the right. In a narrow
    terminal, text is wrapped and numbers keep their width.
    """
    from rich.table import Table

    table = Table(title=title, show_header=any(columns))
    for index, column in enumerate(columns):
        if index < texts:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def format_bytes(count: int) -> str:
    """A size with its unit."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def format_number(value: float, digits: int) -> str:
    """A number rounded to so many significant digits, without an exponent."""
    return f"{Decimal(f'{value:.{digits}g}'):,f}"


def quieten() -> None:
    """
    Leave out warnings of other packages that the user cannot act on, and let finished progress bars disappear.

    It is for the process of a command, before tqdm is imported. The library leaves the output of others alone.
    """
    # Pinned memory is the default of the Trainer. Without an accelerator, it has no effect.
    warnings.filterwarnings(
        "ignore", "'pin_memory' argument is set as true but no accelerator", module=r"torch\.utils"
    )
    # A single process says it at each save and load of a checkpoint in sharded files.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
    logging.getLogger("transformers.trainer").addFilter(lambda record: not _RECORDS.fullmatch(record.getMessage()))
    # Each pass over each source has a bar. Those that end at once do not appear, and in a file, few lines do.
    first, between = ("0.5", "0.1") if sys.stderr.isatty() else ("10", "30")
    for option, value in {"LEAVE": "", "DELAY": first, "MININTERVAL": between}.items():
        os.environ.setdefault(f"TQDM_{option}", value)
