"""Small helpers for files, messages and errors."""

import difflib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

__all__ = [
    "Secret",
    "checkpoints_of",
    "delete",
    "finite_json",
    "hidden",
    "hide_token",
    "nearest",
    "printable",
    "read_json",
    "read_plain",
    "require_folder",
    "shown",
    "step_of",
    "without_credentials",
    "without_folders",
    "write_atomic",
]

_TOKEN_FLAGS = ("--hub_token", "--hub-token", "--token")
# Names that other programs use for the fields of a configuration.
_SHORT_NAMES = {
    **dict.fromkeys(("bs", "batch", "batch_size", "micro_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("k", "ga", "grad_accum", "accumulation_steps", "inner_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(("seq_len", "block_size", "context_length", "max_length", "max_seq_length"), "sequence_length"),
    **dict.fromkeys(("out", "output", "out_dir", "save_dir"), "output_dir"),
    **{"lr": "learning_rate", "scheduler": "lr_scheduler_type", "wd": "weight_decay", "warmup": "warmup_steps"},
    **{"epochs": "num_train_epochs", "steps": "max_steps", "gamma": "inner_lr", "optimizer": "optim"},
    **{"layers": "num_hidden_layers", "heads": "num_attention_heads", "dim": "hidden_size", "width": "hidden_size"},
    **{"resume": "resume_from_checkpoint", "repo": "hub_model_id", "gpus": "devices", "wandb": "report_to"},
}
_LARGEST = 64 << 20  # bytes of a text file that is read whole
# The folders of an absolute path, which is a whole text, or follows a space, quote or separator in it.
_ROOT = r"(?:file://)?(?:(?:~[\w.-]*|[a-zA-Z]:)[\\/]+|//?|\\\\)"
_FOLDERS = re.compile(
    rf"^{_ROOT}(?:[^\\/\n]+[\\/]+)*(?=[^\s\\/])|(?:(?<=[\s\"'=,;])|(?<=:)(?!//)){_ROOT}(?:[^\\/\s\"'=,;]+[\\/]+)+(?=[^\s\\/])"
)
# What stands before the host of a URL, and a query that holds a key or a signature.
_USER = re.compile(r"(?<=://)[^\s/@?#\"']+@")
_SIGNED = re.compile(
    r"(://[^\s?\"']+)\?(?=[^\s\"']*(?:sig|token|key|secret|passw|credential)[\w.-]*=)[^\s\"']*", re.IGNORECASE
)
_TERMINAL_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)?|\x1b.?")


def write_atomic(path: str | Path, text: str) -> Path:
    """
    Write a UTF-8 file by renaming: an interrupted process leaves the old file or the new one.

    The file is not forced to the disk, because this can wait for a whole checkpoint to be written. A power failure
    may therefore lose it. A link is replaced and not followed. Missing folders are created, and line ends are written
    as they are.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"_{path.name}.{uuid4().hex}.tmp")  # never pushed, and of this process alone
    try:
        with open(scratch, "x", encoding="utf-8", newline="\n") as file:  # "x" does not follow a link
            file.write(text)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def require_folder(folder: str | os.PathLike[str], name: str = "output_dir") -> None:
    """
    Create a folder if it is missing, and check that files can be written there.

    Raises:
        ValueError: it is a file, inside a file, or not writable. The message names the argument `name`.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name}: {shown(str(folder))} is not a folder that can be written to ({error.strerror}). Choose another."
        ) from error


def read_json(path: Path, remedy: str) -> Any:
    """
    The content of a JSON file. `remedy` says what to do if it is damaged.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). {remedy}") from error


def read_plain(path: str | Path) -> str:
    """
    Read a UTF-8 file of a folder that another user may have written: not a link, nor something that blocks.

    Raises:
        ValueError: a link, not a regular file, too large, or not UTF-8.
        OSError: the file cannot be read.
    """
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)  # Windows has neither
    if Path(path).is_symlink():
        raise ValueError(f"{path} is a link, which is not followed. Replace it by the file.")
    with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
            raise ValueError(f"{path} is not a regular file of at most {_LARGEST >> 20} MiB.")
        return file.read(_LARGEST).decode("utf-8-sig")


def checkpoints_of(folder: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a Trainer in a folder, by their step."""
    return sorted((path for path in Path(folder).glob("*") if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The training step in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def delete(path: Path) -> None:
    """Delete a folder with its content if it exists; of a link, the link itself. Errors are ignored."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def printable(text: object) -> str:
    """
    Text on one line without terminal codes and other invisible characters, for text that a server, a file or another
    user wrote.

    Example:
        >>> from hf_nexus.files import printable
        >>> printable("\\x1b[31mred\\x1b[0m\\ntext")
        'red text'
    """
    words = _TERMINAL_CODES.sub("", str(text)).split()
    return "".join(character for character in " ".join(words) if character.isprintable())


def finite_json(value: Any, **options: Any) -> str:
    """
    JSON text with `null` for numbers that are not finite, because the standard has no NaN. `options` are those of
    `json.dumps`.
    """
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def without_folders(value: Any) -> Any:
    """
    Plain data whose absolute paths, at any depth and also within texts, are reduced to their names. URLs are
    [`without_credentials`].

    Example:
        >>> from hf_nexus.files import without_folders
        >>> without_folders({"deepspeed": "/home/alice/ds.json", "optim_args": ["path=/home/alice/a.pt,b=1"]})
        {'deepspeed': 'ds.json', 'optim_args': ['path=a.pt,b=1']}
    """
    if isinstance(value, float | int | Enum):  # most values of a long log, and members that are texts
        return value
    if isinstance(value, Mapping):
        return {without_folders(key): without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [without_folders(item) for item in value]
    return _text_without_folders(str(value)) if isinstance(value, str | os.PathLike) else value


@lru_cache(maxsize=4096)  # each entry of a log has the same keys
def _text_without_folders(text: str) -> str:
    return _FOLDERS.sub("", without_credentials(text))


def without_credentials(text: str) -> str:
    """
    A text in which URLs have no user, password, key or signature.

    Example:
        >>> from hf_nexus.files import without_credentials
        >>> without_credentials("https://alice:pw@host/a.jsonl and s3://bucket/a?X-Amz-Signature=f00 are gone")
        'https://host/a.jsonl and s3://bucket/a are gone'
    """
    return _SIGNED.sub(r"\1", _USER.sub("", text))


def nearest(word: Any, known: Iterable[str]) -> str:
    """
    A sentence for an error message that suggests the known word that is nearest, or that is meant by a common short
    name. Empty if there is none.

    Example:
        >>> from hf_nexus.files import nearest
        >>> "Unknown key." + nearest("inner_Ir", ["inner_lr", "optim"])
        "Unknown key. Did you mean 'inner_lr'?"
        >>> nearest("--lr", ["--learning_rate", "--link"])
        " Did you mean '--learning_rate'?"
    """
    words, bare = list(known), str(word).lstrip("-").replace("-", "_")
    meant = str(word)[: len(str(word)) - len(bare)] + _SHORT_NAMES.get(bare, "")
    close = [meant] if meant in words else difflib.get_close_matches(str(word), words, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class Secret(str):
    """Text that `repr` does not show, nor a traceback with the values of variables."""

    def __repr__(self) -> str:
        return "<hidden>"

    def __getitem__(self, key: Any) -> str:
        return Secret(super().__getitem__(key))  # rich shortens a long text before it is shown


def hidden(text: str | None) -> Secret | None:
    """A [`Secret`], if there is one."""
    return None if text is None else Secret(text)


def hide_token(argv: Iterable[str]) -> list[str]:
    """
    A command line whose `--hub_token` or `--token` is a [`Secret`].

    Example:
        >>> from hf_nexus.files import hide_token
        >>> hide_token(["demo", "--hub_token=hf_abc"])
        ['demo', '--hub_token', <hidden>]
    """
    found: list[str] = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if found and found[-1] in _TOKEN_FLAGS:
            found.append(Secret(argument))
        elif equals and flag in _TOKEN_FLAGS:
            found += [flag, Secret(value)]
        else:
            found.append(argument)
    return found


def shown(value: Any) -> str:
    """The `repr` of a value for an error message, shortened to 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "an integer of too many digits"
    return text if len(text) <= 200 else f"{text[:197]}..."
