"""Data files of a source, local or remote: which ones a path means, and of which split each is."""

import csv
import glob
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any
from urllib.parse import urlsplit

from .config import SourceConfig
from .token_files import index_of

__all__ = ["card_lists_files", "data_files", "find_files", "is_remote", "is_saved", "listed_options", "means_files"]

logger = logging.getLogger(__name__)

# Builders of `datasets` by suffix. `load_documents` reads the files of a label that is no builder. Another also needs,
# - if its builder has options: `_options`; if it opens files as text: `_stream_of_text`; if its files may be
#   compressed: `_COMPRESSIBLE`;
# - if its text is in a column that is not guessed yet: `mixture/texts.py` (`_COLUMNS`), `tests/mixture/test_texts.py`,
#   `docs/own_data.md`;
# - if `datasets` has no builder for it: a module with an Arrow-based one (whose `_generate_more_gen_kwargs` lets a
#   resume skip parts of a file), called in `mixture/documents.py` (`load_documents`);
# - if its files stay in place: a reader like `mixture/token_files.py`, called there as well;
# - for each of these two: a test of the module, and `tests/test_upstream_contract.py` for what it uses of upstream;
# - if its builder is new: `tests/mixture/test_state.py`, `docs/streaming_resume.md` (table);
# - if its builder is that of text: `docs/own_data.md`, because `init` splits a few such files;
# - if its builder is neither Arrow- nor generator-based: `mixture/stream/sources.py` (`_DIVISIBLE`);
# - if it needs a package that `datasets` does not bring: `pyproject.toml` (`test`), `make lock`.
_FORMATS = dict.fromkeys((".jsonl", ".json", ".ndjson"), "json") | {".parquet": "parquet", ".arrow": "arrow"}
_FORMATS |= {".csv": "csv", ".tsv": "tsv", ".txt": "text", ".ds": "token files", ".bin": "token files"}
_COMPRESSIBLE = ("json", "csv", "tsv", "text")
_COMPRESSIONS: dict[str, Any] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}  # with pandas' names
# Files that describe a dataset.
_METADATA = ("config.json", "dataset_info.json", "dataset_infos.json")
# Files of a folder of `save_to_disk`, with a key of each: files of other folders may have these names.
_SAVED = {"state.json": b'"_data_files"', "dataset_dict.json": b'"splits"'}
# Words in names, as `datasets` knows them, in any case: `test.csv`, `test/1.csv`, `my-test.00000-of-00002.json.gz`.
_SPLITS = dict.fromkeys(("train", "training"), "train")
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
# What file systems know of a file that changes with its content, always or mostly.
_VERSION = ("ETag", "etag", "blob_id")
_CHANGING = (*_VERSION, "mtime", "Last-Modified", "LastModified", "updated", "created", "size")
_SPLIT_NAME = re.compile(rf"(?:^|[-_. 0-9])({'|'.join(_SPLITS)})(?:[-_. 0-9]|$)")


def is_remote(path: str) -> bool:
    """Whether a path is a URL, such as `s3://bucket/folder`."""
    return "://" in path


def means_files(path: str) -> bool:
    """Whether a path means data files, and not a dataset on the Hub."""
    known = os.path.exists(path) or is_remote(path) or glob.has_magic(path)
    return known or path.startswith((".", "/")) or _suffix(path) in _FORMATS


def is_saved(folder: str) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any(_is_of_saved(path) for name in _SAVED if os.path.isfile(path := os.path.join(folder, name)))


def _is_of_saved(file: str) -> bool:
    key = _SAVED.get(os.path.basename(file))
    if key is None:
        return False
    if is_remote(file):
        return True
    with open(file, "rb") as opened:
        return key in opened.read(4096)


def card_lists_files(folder: str) -> bool:
    """Whether a folder is a copy of a dataset on the Hub whose card lists the files of its subsets and splits."""
    from huggingface_hub import metadata_load

    card = os.path.join(folder, "README.md")
    return os.path.isfile(card) and "configs" in (metadata_load(card) or {})


def data_files(name: str, path: str, source: SourceConfig, split: str, streaming: bool = False) -> dict[str, Any]:
    """
    The arguments with which `load_dataset` reads the files of a path, each literally, or the lists of `token_files`,
    for which it has no builder. From a path alone, `datasets` takes brackets for patterns, and silently leaves out
    files by their names and formats.

    If every file is named after a split, and not all after the same, each is of its split. Else all are of "train".

    Raises:
        ValueError: There are no data files, or they have several formats, or names that `datasets` changes.
    """
    from datasets.data_files import DataFilesList

    if source.subset is not None:
        raise ValueError(f"data files have no subset {source.subset!r}. Remove it, and name the files with a glob.")
    base, found = _find_remote(path) if is_remote(path) else find_files(path)
    formats = {file: _FORMATS[_suffix(file)] for file, facts in found.items() if facts and _holds_rows(file, path)}
    if not found:
        raise ValueError(f"no file matches {path!r}" + ("." if is_remote(path) else f" in {os.getcwd()!r}."))
    if not formats:
        raise ValueError(
            f"{_listed(found)} cannot be read; use files of one of {', '.join(_FORMATS)} that exist and are not empty."
        )
    builder, *others = dict.fromkeys(formats.values())
    if others:
        raise _several_formats(base, found, formats)
    packed = [file for file in formats if _suffixes(file)[1] in _COMPRESSIONS]
    if packed and builder not in _COMPRESSIBLE:
        raise ValueError(f"{_listed(packed)}: files of this format are not read compressed. Decompress them.")
    if changed := [file for file in formats if "::" in file or os.path.expandvars(file) != file]:
        raise ValueError(f"{_listed(changed)}: a name must not hold '::' or a variable. Rename the files.")
    splits: dict[str, list[str]] = {}
    for file in formats:
        splits.setdefault(_named_split(file.removeprefix(base)), []).append(file)
    if "" in splits or len(splits) == 1:
        splits = {"train": list(formats)}
    if builder == "token files" and is_remote(path):
        raise ValueError(f"{_listed(formats)}: token files are read in place. Copy them with their indices to a disk.")
    used = re.findall(r"\w+", f"{source.split} {split} {source.eval_split}")
    indices = [name for f in formats for name in (index_of(f), f"{f}.metadata")] if builder == "token files" else []
    if left_out := set(found).difference(indices, *(splits.get(key, ()) for key in used)):
        _warn_of_left_out(name, os.path.abspath(path), _listed(left_out))
    # Lists that `datasets` does not take for patterns, with what changes when the files do: the cache depends on it.
    place: Callable[[str], str] = os.path.abspath
    if is_remote(path):
        place = _stream_of_text if streaming and builder == "text" else str
    lists = {key: DataFilesList([*map(place, files)], [found[f] for f in files]) for key, files in splits.items()}
    options = _options(builder, formats, source)
    if builder == "token files":
        return {"token_files": lists}
    if is_remote(path) and not all(found[file][0].startswith(_VERSION) for file in formats):
        options["download_mode"] = "force_redownload"  # by default, an old copy of the file is taken
    return {"path": "csv" if builder == "tsv" else builder, "data_files": lists, **options}


@cache  # once for each path: a command may list the files of a source several times
def _warn_of_left_out(name: str, path: str, files: str) -> None:
    logger.warning(
        f"Source {name!r} leaves out {files}: files without rows, of another split (`split: train+test` reads both), "
        f"or that do not end in one of {', '.join(_FORMATS)}."
    )


def _several_formats(base: str, found: dict[str, tuple[str, ...]], formats: dict[str, str]) -> ValueError:
    """The error for files of several formats. It suggests the format with the most bytes."""
    examples = {format: file for file, format in formats.items()}
    sizes = dict.fromkeys(examples, 0)
    for file, format in formats.items():
        size = found[file][-1].removeprefix("size ")
        sizes[format] += int(size) if size.isdecimal() else 0
    pattern = os.path.join(base, "**", f"*{_suffix(examples[max(sizes, key=sizes.__getitem__)])}*")
    return ValueError(
        f"the files have several formats, such as {_listed(examples.values())}; use files of one of "
        f"{', '.join(_FORMATS)}, for instance {pattern!r}."
    )


def listed_options(builder: str, source: SourceConfig, columns: Iterable[str]) -> dict[str, Any]:
    """As `_options`, for columns of files that a dataset on the Hub or a card lists, whose headers are not read."""
    if builder in ("csv", "tsv") and source.sample_by == "document":
        quoting = {"quoting": csv.QUOTE_NONE} if builder == "tsv" else {}
        return {"converters": dict.fromkeys(columns, str), "keep_default_na": False, **quoting}
    return _options(builder, (), source)


def _options(builder: str, files: Iterable[str], source: SourceConfig) -> dict[str, Any]:
    """What `datasets` needs to know to read files of a format as they are."""
    if builder == "text":
        return {"sample_by": source.sample_by}
    if source.sample_by != "document":
        raise ValueError(f"sample_by={source.sample_by!r} is for .txt files. Remove it.")
    if builder == "json":
        return {"parse_agent_traces": False}  # by default, a file with certain columns is one row
    if builder in ("csv", "tsv"):
        separator = "\t" if builder == "tsv" else ","
        # Other tools write TSV without quotes: one at the start of a cell would join rows.
        quoting = csv.QUOTE_NONE if builder == "tsv" else csv.QUOTE_MINIMAL
        return {"sep": separator, "quoting": quoting, **_csv_options(files, separator, quoting)}
    return {}


def _stream_of_text(url: str) -> str:
    """
    A URL for the builder of text. It passes its encoding to the first file system of a URL, which must not be HTTP:
    the folder of a file can be one.
    """
    if not url.startswith(("http://", "https://")) or _suffixes(url)[1] in _COMPRESSIONS:
        return url
    address, mark, query = url.partition("?")
    folder, _, name = address.rpartition("/")
    return f"dir://{name}{mark}{query}::{folder}"


def _find_remote(url: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    """As `find_files`, for a URL of a file, a folder, or a glob whose only sign is `*`: others belong to addresses."""
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    if "*" in path:
        found = system.glob(path, detail=True)
    elif system.isfile(path):
        found = {path: system.info(path)}
    else:
        found = system.find(path, detail=True)
    base = path.partition("*")[0].rpartition("/")[0] if "*" in path else path
    unknown = ("unknown",)  # such a file is downloaded at each start
    start = url.rstrip("/").removesuffix(path)  # with the host and user, which the paths of some stores leave out

    def full(file: str) -> str:
        return start + file if start != url.rstrip("/") else system.unstrip_protocol(file)

    facts = {
        full(file): tuple(f"{key} {info[key]}" for key in _CHANGING if info.get(key)) or unknown
        for file, info in sorted(found.items())
        if info.get("type", "file") == "file" and info.get("size") != 0 and "/." not in f"/{file.removeprefix(base)}"
    }
    return full(base), facts


def find_files(path: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    """
    The start of the path that exists as it is written, and the files that the folder or glob means, with facts that
    change with their content (none if a file is empty or gone).
    """
    base = path
    while base and not os.path.exists(base):
        base = os.path.dirname(base)
    pattern = glob.escape(base) + path[len(base) :]
    if os.path.isdir(path):
        pattern = os.path.join(pattern, "**")
    found = [file for file in _glob(pattern) if not os.path.isdir(file)]
    # Each file once, by its shortest path: a link may lead to a folder that is read already.
    folders = {folder: os.path.realpath(folder) for folder in map(os.path.dirname, found)}
    shortest = {
        (folders[os.path.dirname(file)], os.path.basename(file)): file for file in sorted(found, key=len, reverse=True)
    }
    stats = {file: os.stat(file) if os.path.isfile(file) else None for file in sorted(shortest.values())}
    return base, {n: (str(s.st_mtime_ns), str(s.st_size)) if s and s.st_size else () for n, s in stats.items()}


def _glob(pattern: str) -> list[str]:
    """What a pattern matches, as of `glob`, which would follow links that lead in a loop."""
    parts = pattern.replace(os.altsep or os.sep, os.sep).split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    i = parts.index("**")
    tops = glob.glob(os.path.join(os.sep.join(parts[:i]), "")) if any(parts[:i]) else [os.sep if i else ""]
    rest = os.path.join("", *parts[i + 1 :]) or "*"
    found = [os.path.join(glob.escape(folder), rest) for top in tops for folder in _folders(top)]
    return [file for inner in found for file in _glob(inner)]


def _folders(top: str) -> Iterator[str]:
    """A folder and those below it that are not hidden, each once, and links last."""
    waiting, seen = deque([top]), set()
    while waiting:
        folder = waiting.popleft()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        yield folder
        try:
            names = [name for name in sorted(os.listdir(folder or ".")) if not name.startswith(".")]
        except OSError:  # not readable
            continue
        for path in (os.path.join(folder, name) for name in names):
            if os.path.isdir(path):
                (waiting.append if os.path.islink(path) else waiting.appendleft)(path)


def _suffix(path: str) -> str:
    """The suffix of a file name, without that of a compression."""
    inner, last = _suffixes(path)
    return inner if last in _COMPRESSIONS else last


def _suffixes(path: str) -> tuple[str, str]:
    """The last two suffixes of a file name, which ends before the `?` of a URL."""
    stem, last = os.path.splitext((urlsplit(path).path if is_remote(path) else path).lower())
    return os.path.splitext(stem)[1], last


def _holds_rows(file: str, path: str) -> bool:
    name = os.path.basename(file)
    named = name == os.path.basename(path) or not (name in _METADATA or _is_of_saved(file))
    indexed = _FORMATS.get(_suffix(file)) != "token files" or is_remote(file) or os.path.isfile(index_of(file))
    return named and _suffix(file) in _FORMATS and indexed


def _named_split(file: str) -> str:
    """The split after which a file or one of its folders is named, "" if there is none."""
    matches = map(_SPLIT_NAME.search, reversed(file.lower().replace(os.sep, "/").split("/")))
    return next((_SPLITS[match[1]] for match in matches if match), "")


def _csv_options(files: Iterable[str], separator: str, quoting: int) -> dict[str, Any]:
    """Read every cell as it is written. By default, "None" and "NA" are missing values, and "007" is a number."""
    import pandas

    converters: dict[str, type] = {}
    for file in files:
        compression = _COMPRESSIONS.get(_suffixes(file)[1])
        read = partial(pandas.read_csv, file, compression=compression)
        first = read(nrows=1, sep=separator, quoting=quoting)
        if len(first.columns) == 1:
            lines = [*read(nrows=2, sep="\1", quoting=csv.QUOTE_NONE, header=None, dtype=str)[0]]  # as written
            if any(0 < lines[0].count(sign) == lines[-1].count(sign) for sign in {*";\t,"} - {separator}):
                raise ValueError(
                    f"{file!r} has one column, {first.columns[0]!r}. Save it with {separator!r} between cells."
                )
        if len(first) and not isinstance(first.index, pandas.RangeIndex):  # pandas would shift the columns
            advice = "Quote text that holds commas." if separator == "," else "Replace tabs in text."
            raise ValueError(f"{file!r} has rows with more cells than its header. {advice}")
        converters |= dict.fromkeys(first, str)
    return {"converters": converters, "keep_default_na": False}


def _listed(files: Iterable[str]) -> str:
    names = sorted(map(repr, files))
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
