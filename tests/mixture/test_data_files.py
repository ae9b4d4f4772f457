"""A path or URL means the same files as a folder, as a glob and by name, and files that are left out are named."""

import gzip
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from datasets import Dataset
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from hf_nexus.mixture import SourceConfig
from hf_nexus.mixture.data_files import _find_remote, data_files
from hf_nexus.mixture.documents import load_documents


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*names: str) -> None:
    """Files of one document, which is their name."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name if ".txt" in name else json.dumps({"text": name}) + "\n")


def files(path: str, split: str = "train", **source: Any) -> list[str]:
    """The files that a source reads, as names in the current folder."""
    found = data_files("a", path, SourceConfig(path, split=split, **source), split)["data_files"]
    return [str(Path(file).relative_to(Path.cwd())) for file in found[split]]


def documents(path: str, streaming: bool = False, **source: Any) -> list[str]:
    loaded, _ = load_documents("a", SourceConfig(path, **source), source.get("split", "train"), "cache", streaming)
    return sorted(row["text"] for row in loaded)


ODD_NAMES = [
    "part[1].jsonl",
    "[!a].jsonl",
    "a*.jsonl",
    "a?.jsonl",
    "{a,b}.jsonl",
    "a b.jsonl",
    "__a.jsonl",
    "a#b%20.jsonl",
]


@pytest.mark.parametrize("streaming", [False, True])
def test_odd_names_mean_the_file_of_that_name_alone(streaming: bool) -> None:
    write("d/part1.jsonl", "d/b.jsonl", "d/ab.jsonl", *(f"d/{name}" for name in ODD_NAMES))
    for name in ODD_NAMES:
        assert documents(f"d/{name}", streaming) == [f"d/{name}"]
    everything = sorted(str(path) for path in Path("d").iterdir())
    assert documents("d/*.jsonl", streaming) == documents("d", streaming) == everything


def test_a_folder_with_brackets_is_no_pattern() -> None:
    write("run [v2]/a.jsonl", "run [v2]/b.jsonl", "run v/c.jsonl")
    assert documents("run [v2]") == documents("run [v2]/*.jsonl") == ["run [v2]/a.jsonl", "run [v2]/b.jsonl"]
    assert documents("run [v2]/[a].jsonl") == ["run [v2]/a.jsonl"]


@pytest.mark.parametrize("streaming", [False, True])
def test_each_text_file_of_a_folder_is_one_document(streaming: bool) -> None:
    Path("books").mkdir()
    texts = ["first\nsecond\n\nthird\n", "first\nsecond\n"]
    for name, text in zip("ab", texts, strict=True):
        Path(f"books/{name}.txt").write_text(text)
    assert documents("books", streaming) == documents("books/*.txt", streaming) == sorted(texts)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_file_can_be_split_into_documents(streaming: bool) -> None:
    Path("a.txt").write_text("first\nsecond\n\nthird")
    assert documents("a.txt", streaming, sample_by="paragraph") == ["first\nsecond", "third"]
    assert documents("a.txt", streaming, sample_by="line") == ["", "first", "second", "third"]
    write("b.jsonl")
    with pytest.raises(ValueError, match=r"sample_by='line' is for \.txt files"):
        documents("b.jsonl", streaming, sample_by="line")


def test_a_folder_and_a_glob_mean_the_same_files() -> None:
    names = ["d/a.jsonl", "d/train.jsonl", "d/sub/test-1.jsonl.gz", "d/test/b.JSONL", "d/my_eval.jsonl"]
    write(*names, "d/.hidden.jsonl", "d/.cache/c.jsonl")
    assert files("d") == files("d/**") == files("d/") == files(str(Path("d").absolute())) == sorted(names)
    assert files("d/**/**") == sorted(names)  # each once
    assert files("d/.hidden.jsonl") == ["d/.hidden.jsonl"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_data_file_may_have_a_name_of_save_to_disk(name: str, streaming: bool) -> None:
    write("d/a.json", f"d/{name}")
    assert documents("d", streaming) == documents("d/*.json", streaming) == ["d/a.json", f"d/{name}"]
    Dataset.from_dict({"text": ["fox"]}).save_to_disk("d/saved")
    assert documents("d/saved", streaming) == documents("d/saved/*", streaming) == ["fox"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_a_url_of_this_machine_is_a_local_path(scheme: str, streaming: bool) -> None:
    write("d/a?[1].jsonl", "d/b.jsonl")
    for path in ("d/a?[1].jsonl", "d", "d/*.jsonl"):
        assert documents(f"{scheme}{Path.cwd()}/{path}", streaming) == documents(path, streaming)


@pytest.mark.parametrize("path", ["d", "d/*", "d/**"])
def test_files_that_are_left_out_are_named(path: str, caplog: pytest.LogCaptureFixture) -> None:
    write("d/a.jsonl", "d/b.jsonl", "d/README.md", "d/dataset_info.json", "d/c.png")
    Path("d/empty.jsonl").touch()
    Path("d/gone.jsonl").symlink_to("nowhere")
    assert files(path) == ["d/a.jsonl", "d/b.jsonl"]
    left_out = ["README.md", "dataset_info.json", "c.png", "empty.jsonl", "gone.jsonl"]
    assert all(name in caplog.text for name in left_out) and "a.jsonl" not in caplog.text
    assert files(path) and len(caplog.records) == 1  # once
    caplog.clear()
    assert files("d/[ab].jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert not caplog.records


def test_long_lists_of_left_out_files_are_shortened(caplog: pytest.LogCaptureFixture) -> None:
    write("d/a.jsonl", *(f"d/{i:02}.png" for i in range(30)))
    files("d")
    assert "09.png' and 20 more" in caplog.text and "10.png" not in caplog.text


@pytest.mark.parametrize("path", ["d", "d/**"])
def test_files_named_after_splits_are_of_these_splits(path: str, caplog: pytest.LogCaptureFixture) -> None:
    train = ["d/my-train.00000-of-00002.jsonl", "d/train_2.jsonl"]
    write(*train, "d/dev.jsonl", "d/test/a.jsonl")
    with caplog.at_level(logging.WARNING):
        assert files(path) == train
    assert "d/dev.jsonl" in caplog.text and "d/test/a.jsonl" in caplog.text
    caplog.clear()
    assert files(path, eval_split="validation") == train
    data_files("a", path, SourceConfig(path, eval_split="validation"), "validation")  # the held-out rows
    assert "train" not in caplog.text.replace("train+test", "")
    assert "d/dev.jsonl" not in caplog.text and "d/test/a.jsonl" in caplog.text
    assert files(path, split="validation") == ["d/dev.jsonl"]
    assert documents(path, split="train+test") == sorted(["d/test/a.jsonl", *train])
    assert files("d/test") == files("d/test/*.jsonl") == ["d/test/a.jsonl"]  # only one split: named by the user
    write("d/other.jsonl")
    assert len(files(path)) == 5


def test_splits_are_told_apart_in_any_case() -> None:
    write("d/Train/a.jsonl", "d/TEST/a.jsonl")
    assert files("d") == files("d/**") == ["d/Train/a.jsonl"]


def test_links_to_folders_above_repeat_no_file() -> None:
    """There would be more paths than can be listed."""
    write("d/a.jsonl", "d/sub/b.jsonl")
    for name in ("d/loop", "d/again", "d/sub/loop", "d/sub/again"):
        Path(name).symlink_to(Path("d").absolute())
    Path("link").symlink_to("d")
    assert files("d") == files("d/**/*.jsonl") == ["d/a.jsonl", "d/sub/b.jsonl"]
    assert files("link") == ["link/a.jsonl", "link/sub/b.jsonl"]


def test_several_formats_are_an_error_naming_a_glob() -> None:
    write("d/a.jsonl", "d/sub/b.txt")
    for path in ("d", "d/**"):
        with pytest.raises(ValueError, match=r"several formats.*d/a\.jsonl.*d/sub/b\.txt.*for instance 'd/\*\*/\*\."):
            files(path)


def test_the_format_of_most_bytes_is_proposed() -> None:
    write("l/LICENSE.txt", "l/web-1.jsonl", "l/web-2.jsonl")
    with pytest.raises(ValueError, match=r"for instance 'l/\*\*/\*\.jsonl\*'"):
        files("l")


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.zst"])
def test_a_compressed_file_of_a_binary_format_is_refused(name: str) -> None:
    write(f"packed/{name}")
    for path in ("packed", f"packed/{name}"):
        with pytest.raises(ValueError, match=rf"packed/{name}.*Decompress"):
            files(path)


@pytest.mark.parametrize("name", ["state.json", "config.json"])
def test_a_glob_of_a_name_of_metadata_reads_it(name: str) -> None:
    for folder in "xy":
        Path("m", folder).mkdir(parents=True)
        Path("m", folder, name).write_text('{"text": "fox", "_data_files": 1}\n')
    assert files(f"m/*/{name}") == [f"m/x/{name}", f"m/y/{name}"]


@pytest.mark.parametrize("name", ["a.docx", "plain", "empty.jsonl", "gone.jsonl"])
def test_a_path_without_data_files_names_what_is_there(name: str) -> None:
    write("a.docx", "plain")
    Path("empty.jsonl").touch()
    Path("gone.jsonl").symlink_to("nowhere")
    with pytest.raises(ValueError, match=rf"'{name}' cannot be read; use files of one of \.jsonl"):
        files(name)
    with pytest.raises(ValueError, match="no file matches 'd/x'"):
        files("d/x")


@pytest.mark.parametrize("name", ["a::b.jsonl", "$HOME.jsonl"])
def test_names_that_would_be_changed_are_refused(name: str) -> None:
    write(name, "a")
    with pytest.raises(ValueError, match="Rename the files"):
        files(name)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_files_of_other_columns_are_told_apart(suffix: str) -> None:
    rows = {"a": {"text": "fox"}, "b": {"text": "dog", "id": "1", "url": "x"}}
    for name, row in rows.items():
        text = json.dumps(row) if suffix == "jsonl" else f"{','.join(row)}\n{','.join(row.values())}"
        Path(f"{name}.{suffix}").write_text(f"{text}\n")
    with pytest.raises(ValueError, match="or files have different columns"):
        documents(f"[ab].{suffix}")


def test_a_changed_file_is_read_again() -> None:
    write("a.jsonl")
    assert documents("a.jsonl") == ["a.jsonl"]
    Path("a.jsonl").write_text('{"text": "longer than before"}\n')
    assert documents("a.jsonl") == ["longer than before"]


CARD = """---
configs:
- config_name: en
  data_files: [{split: train, path: en/a.jsonl}, {split: test, path: en/b.jsonl}]
- config_name: de
  data_files: de/*.jsonl
---
"""


@pytest.mark.parametrize("path", ["d/*.jsonl", "d", "saved", "hf://datasets/org/web/*.jsonl"])
def test_files_have_no_revision(path: str) -> None:
    write("d/a.jsonl")
    Path("d/README.md").write_text(CARD)
    Dataset.from_dict({"text": ["fox"]}).save_to_disk("saved")
    with pytest.raises(ValueError, match=r"no revision 'v1'\. Remove it, or .*@revision/"):
        documents(path, revision="v1")


def test_a_saved_folder_has_no_subset() -> None:
    Dataset.from_dict({"text": ["fox"]}).save_to_disk("saved")
    with pytest.raises(ValueError, match="no subset 'en'"):
        documents("saved", subset="en")


def test_a_copy_of_a_hub_dataset_has_its_subsets_and_splits() -> None:
    write("d/en/a.jsonl", "d/en/b.jsonl", "d/de/c.jsonl")
    with pytest.raises(ValueError, match="no subset 'en'"):
        documents("d", subset="en")
    Path("d/README.md").write_text(CARD)
    assert documents("d", subset="en") == ["d/en/a.jsonl"]
    assert documents("d", subset="en", split="test") == ["d/en/b.jsonl"]
    assert documents("d", subset="de") == ["d/de/c.jsonl"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_subset_is_said_with_all_names(streaming: bool) -> None:
    write("d/en/a.jsonl", "d/en/b.jsonl", "d/de/c.jsonl")
    Path("d/README.md").write_text(CARD)
    with pytest.raises(ValueError, match="pick one among the available configs"):
        documents("d", streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_csv_files_are_text_as_written(streaming: bool) -> None:
    words = ["fox", "None", "NA", "nan", "null", "007", "1e5"]
    Path("a.csv").write_text("id,text\n" + "".join(f",{word}\n" for word in words) + "x,\n")
    assert documents("a.csv", streaming) == sorted(["", *words])
    Path("b.csv").write_text("text,id\n" + "fox,1\n" * 10_001 + "dog,x\n")  # read in two parts, of other types
    assert len(documents("b.csv", streaming)) == 10_002


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rows", ["1,the fox, jumps\n2,dog\n", "1,dog\n2,the fox, jumps\n", "1,fox,\n"])
def test_text_that_is_cut_at_a_comma_is_an_error(rows: str, streaming: bool) -> None:
    Path("a.csv").write_text("id,text\n1,fox\n")
    Path("b.csv").write_text(f"id,text\n{rows}")
    with pytest.raises(ValueError, match=r"more cells than its header|Expected 2 fields in line 3, saw 3"):
        documents("[ab].csv", streaming)


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [("a.csv", "id;text\n1;fox, dog\n", ","), ("a.csv", "id\ttext\n", ","), ("a.tsv", "id,text\n1,fox\n", "\t")],
)
def test_cells_that_end_at_another_sign_are_an_error(name: str, text: str, right: str) -> None:
    Path(name).write_text(text)
    with pytest.raises(ValueError, match=f"'{name}' has one column, .*Save it with {re.escape(repr(right))} between"):
        documents(name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", '"text; cleaned"\nfox\n'),
        ("a.csv", "text; cleaned\nfox\n"),
        ("a.csv", '"a, b"\n"c, d"\n'),
        ("a.tsv", "a, b\nfox\n"),
    ],
)
def test_one_column_may_have_any_name(name: str, text: str) -> None:
    Path(name).write_text(text)
    loaded, columns = load_documents("a", SourceConfig(name), "train", "cache", every_column=True)
    assert len(columns) == len(loaded) == 1


def test_a_file_that_looks_like_a_trace_is_read_by_line() -> None:
    line = json.dumps({"type": "session", "id": "1", "version": 3, "cwd": "/", "text": "fox"})
    Path("a.jsonl").write_text(f"{line}\n" * 3)
    assert documents("a.jsonl") == ["fox"] * 3


@pytest.mark.parametrize("streaming", [False, True])
def test_cells_of_tsv_files_are_text_as_written(streaming: bool) -> None:
    words = ["fox, dog", "None", "007", "a b", '"Hello, she said', 'he said "bye"', '"whole"', 'ends"']
    Path("a.tsv").write_text("id\ttext\n" + "".join(f"1\t{word}\n" for word in words))
    assert documents("a.tsv", streaming) == sorted(words)
    Path("b.csv").write_text("text\nfox\n")
    with pytest.raises(ValueError, match="several formats"):
        files("*.?sv")


@pytest.mark.parametrize("streaming", [False, True])
def test_ndjson_and_arrow_files_are_read(streaming: bool) -> None:
    write("d/a.jsonl", "d/b.ndjson")
    assert documents("d", streaming) == ["d/a.jsonl", "d/b.ndjson"]
    Dataset.from_dict({"text": ["fox", "dog"]}).save_to_disk("saved")
    (name,) = (path.name for path in Path("saved").glob("*.arrow"))
    assert documents(f"saved/{name}", streaming) == ["dog", "fox"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_utf_16_is_an_error_that_says_how_to_convert(name: str, streaming: bool) -> None:
    Path(name).write_text('{"text": "żółw"}\n' if name == "a.jsonl" else "text\nżółw\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"sources\.a: 'a\..*could not be loaded(.|\n)*`-f utf-16` for UTF-16"):
        documents(name, streaming)


# ---- Remote ----


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' setting of `datasets` would refuse every URL."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)


@pytest.fixture
def bucket(online: None) -> Iterator[str]:
    """A folder of an object store in memory."""
    url = "memory://bucket"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.fixture
def website(online: None) -> Iterator[str]:
    """The address of a server of the current folder."""

    class Quiet(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def send_header(self, keyword: str, value: str) -> None:
            """A name with `export` is made on request: nothing tells its size or whether it changed."""
            made = "export" in self.path
            if made and keyword == "Content-Length":
                keyword, value = "Connection", "close"
            if not (made and keyword == "Last-Modified"):
                super().send_header(keyword, value)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(Path.cwd())))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def upload(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.mark.parametrize("path", ["data/a.jsonl", "data", "data/", "data/*.jsonl"])
def test_the_host_of_a_url_stays_in_those_of_its_files(path: str) -> None:
    """The paths of some stores have no host."""

    class Store(MemoryFileSystem):
        protocol = "elsewhere"
        store, pseudo_dirs = {"/data/a.jsonl": MemoryFile(None, "/data/a.jsonl", b"1")}, ["", "/data"]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("elsewhere://me@host:8/").strip("/")

    fsspec.register_implementation("elsewhere", Store, clobber=True)
    start, files = _find_remote(f"elsewhere://me@host:8/{path}")
    assert list(files) == ["elsewhere://me@host:8/data/a.jsonl"] and start.startswith("elsewhere://me@host:8/data")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bucket_is_read_as_a_file_a_folder_and_a_glob(bucket: str, streaming: bool) -> None:
    upload(f"{bucket}/d/a.jsonl", line("a"))
    upload(f"{bucket}/d/sub/b.jsonl.gz", gzip.compress(line("b")))
    for hidden in ("d/.hidden.jsonl", "d/.ipynb_checkpoints/a.jsonl", "d/sub/.cache/deep/b.jsonl"):
        upload(f"{bucket}/{hidden}", line("hidden"))
    upload(f"{bucket}/d/empty.jsonl", b"")
    upload(f"{bucket}/d/README.md", b"readme")
    assert documents(f"{bucket}/d", streaming) == documents(f"{bucket}/d/**", streaming) == ["a", "b"]
    assert documents(f"{bucket}/d/*.jsonl", streaming) == documents(f"{bucket}/d/a.jsonl", streaming) == ["a"]
    with pytest.raises(ValueError, match=r"no file matches 'memory://bucket/x\*'"):
        documents(f"{bucket}/x*", streaming)
    upload(f"{bucket}/.cache/c.jsonl", line("c"))
    assert documents(f"{bucket}/.cache", streaming) == documents(f"{bucket}/.cache/*", streaming) == ["c"]  # named


def content(suffix: str) -> bytes:
    """A file of two documents, `fox` and `dog`."""
    dataset = Dataset.from_dict({"text": ["fox", "dog"]})
    if suffix == "arrow":
        dataset.save_to_disk("saved")
        return next(Path("saved").glob("*.arrow")).read_bytes()
    if suffix == "parquet":
        dataset.to_parquet("a.parquet")
        return Path("a.parquet").read_bytes()
    texts = {"csv": b"id,text\n1,fox\n2,dog\n", "tsv": b"id\ttext\n1\tfox\n2\tdog\n", "txt": b"fox\n\ndog"}
    return texts.get(suffix, line("fox") + line("dog"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "tsv", "txt", "arrow"])
def test_every_format_is_read_from_any_store(bucket: str, website: str, suffix: str, streaming: bool) -> None:
    source = {"sample_by": "paragraph"} if suffix == "txt" else {}
    upload(f"{bucket}/a.{suffix}", content(suffix))
    Path("www").mkdir()
    Path(f"www/a.{suffix}").write_bytes(content(suffix))
    Path(f"www/a.{suffix}.gz").write_bytes(gzip.compress(content(suffix)))
    assert documents(f"{bucket}/a.{suffix}", streaming, **source) == ["dog", "fox"]
    for signature in ("", "?X-Sig=a/b"):
        assert documents(f"{website}/www/a.{suffix}{signature}", streaming, **source) == ["dog", "fox"]
        if suffix not in ("parquet", "arrow"):
            assert documents(f"{website}/www/a.{suffix}.gz{signature}", streaming, **source) == ["dog", "fox"]


def test_splits_of_a_bucket_are_told_apart(bucket: str) -> None:
    for name in ("train", "test"):
        upload(f"{bucket}/{name}/1.jsonl", line(name))
    assert documents(bucket) == ["train"] and documents(bucket, split="test") == ["test"]
    assert documents(f"{bucket}/*/*.jsonl") == ["train"] and documents(f"{bucket}/test/1.jsonl") == ["test"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_changed_remote_file_is_read_again(bucket: str, website: str, streaming: bool) -> None:
    for text in ("fox", "longer than before"):
        upload(f"{bucket}/a.jsonl", line(text))
        Path("a.jsonl").write_bytes(line(text))
        Path("export.jsonl").write_bytes(line(text))
        for address in (f"{bucket}/a.jsonl", f"{website}/a.jsonl", f"{website}/export.jsonl"):
            assert documents(address, streaming) == [text]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_is_read_over_http(website: str, streaming: bool) -> None:
    write("d/a.jsonl", "d/b.jsonl")
    Path("c.csv").write_text("text\nfox\n")
    assert documents(f"{website}/d/a.jsonl?download=true", streaming) == ["d/a.jsonl"]
    assert documents(f"{website}/c.csv", streaming) == ["fox"]
    with pytest.raises(ValueError, match=r"sources\.a: 'http://.*/x\.jsonl'.*could not be loaded"):
        documents(f"{website}/x.jsonl", streaming)


def test_errors_show_no_credentials_of_a_url(website: str) -> None:
    """Nor do the errors before them, which a traceback shows."""
    with pytest.raises(ValueError, match=r"'http://127.0.0.1:\d+/x\.jsonl' .*could not be loaded") as caught:
        documents(f"{website}/x.jsonl?sig=s3cret".replace("://", "://alice:s3cret@"), False)
    error = caught.value
    assert "s3cret" not in str(error) and error.__cause__ is None and error.__suppress_context__


def test_a_download_without_a_network_names_its_variable(website: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    write("a.jsonl")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set, so nothing is downloaded"):
        documents(f"{website}/a.jsonl")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_of_a_store_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(vars(sys.modules["fsspec.registry"])["_registry"], scheme, raising=False)
    with pytest.raises(ValueError, match=rf"sources\.a: '{scheme}://b/a\.jsonl'.*\n.*pip install {package}$"):
        documents(f"{scheme}://b/a.jsonl")
