"""Every kind of source gives the same rows, held-out text is not trained on, and a second call reads the cache."""

import gzip
import json
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, DatasetInfo, Features, Value, load_from_disk
from transformers import PreTrainedTokenizerBase

from hf_nexus.mixture import Mixture, MixtureConfig, load_mixture
from hf_nexus.mixture.stream.dataset import MixtureStream
from hf_nexus.mixture.stream.documents import StreamedDocuments
from hf_nexus.mixture.stream.reader import SourceError

from ..support.hub.runs import api, impatient_client
from ..support.hub.server import HubServer
from ..support.tiny_tokenizer import EOS, adding_bos, count_tokenized, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`load(web={...}, law={...}, sequence_length=8)` loads a mixture. Relative paths are in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def load(*, sequence_length: int = 8, num_proc: int | None = None, with_: Any = None, **sources: Any) -> Mixture:
        config = {"sources": sources, "sequence_length": sequence_length, "num_proc": num_proc}
        return load_mixture(MixtureConfig.from_dict(config), with_ or tokenizer, cache_dir=tmp_path / "cache")

    return load


def write(path: str, texts: list[Any], column: str = "text") -> str:
    Path(path).write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    return path


def texts(n: int, word: str = "fox") -> list[str]:
    return [f"the {word} number {i} jumps over the lazy dog" for i in range(n)]


def documents(tokenizer: Any, rows: Dataset) -> list[str]:
    """The text in the rows, one string per document. The last one may be incomplete."""
    return tokenizer.decode(rows["input_ids"][:].flatten()).split(EOS)


# --- rows


def test_a_mixture_has_rows_shares_and_sizes_of_each_source(load: Any, tmp_path: Path, tokenizer: Any) -> None:
    sources = {
        "web": {"path": write("web.jsonl", texts(60)), "eval_rows": 10},
        "law": {"path": "law.jsonl", "role": "ood"},
    }
    write("law.jsonl", texts(20, "judge"))
    write("code.jsonl", texts(30, "bug"))
    mixture = load(**sources, code={"path": "code.jsonl"})
    assert list(mixture.train) == ["web", "code"]
    assert list(mixture.eval) == ["web", "law"]
    assert mixture.tokens == {name: 8 * len(rows) for name, rows in mixture.train.items()}
    assert mixture.eval_tokens == {name: 8 * len(rows) for name, rows in mixture.eval.items()}
    assert mixture.weights == mixture.config.weights(mixture.tokens)
    assert all("bug" in text for text in documents(tokenizer, mixture.train["code"])[:-1])
    assert all("judge" in text for text in documents(tokenizer, mixture.eval["law"])[:-1])


def write_every_kind(docs: list[str]) -> list[str]:
    """Write the same documents in files of every kind, and return their paths."""
    dataset = Dataset.from_dict({"text": docs})
    write("a.jsonl", docs)
    dataset.to_json("a.json")
    dataset.to_csv("a.csv")
    dataset.to_parquet("a.parquet")
    dataset.with_format("arrow").save_to_disk("saved")
    DatasetDict(train=dataset, test=dataset.select(range(3))).save_to_disk("splits")
    for folder, files in (("shards", [docs[:15], docs[15:]]), ("folder", [docs])):
        Path(folder).mkdir()
        for number, file in enumerate(files):
            write(f"{folder}/{number}.jsonl", file)
    Path("files").mkdir()
    for number, text in enumerate(docs):
        Path(f"files/{number:02}.txt").write_text(text)
    return ["a.jsonl", "a.json", "a.csv", "a.parquet", "saved", "splits", "shards/*.jsonl", "folder", "files/*.txt"]


def test_all_kinds_of_files_give_the_same_rows(load: Any) -> None:
    paths = write_every_kind(texts(40))
    mixture = load(**{f"source{i}": {"path": path} for i, path in enumerate(paths)})
    rows = [dataset["input_ids"][:].tolist() for dataset in mixture.train.values()]
    assert all(other == rows[0] for other in rows)


def test_a_text_file_is_one_document_lines_and_all(load: Any, tokenizer: Any) -> None:
    Path("book.txt").write_text("the fox\n\njumps over\nthe dog\n")
    rows = load(book={"path": "book.txt"}, sequence_length=4).train["book"]
    assert documents(tokenizer, rows)[0].startswith("the fox\n\njumps")


def test_built_in_sources_load_by_name_and_are_cached(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_nexus.mixture.builtin import corpus as builtin

    source = builtin.BuiltinSource("train", "CC0")
    monkeypatch.setitem(builtin.BUILTIN_SOURCES, "fables", source)
    known = builtin.builtin_documents
    monkeypatch.setattr(builtin, "builtin_documents", lambda name: texts(30) if name == "fables" else known(name))
    first = load(a={"path": "builtin/fables"})
    assert first.licenses == {"a": "CC0"}
    calls = count_tokenized(monkeypatch)
    assert load(a={"path": "builtin/fables"}).tokens == first.tokens
    assert not calls
    with pytest.raises(ValueError, match=r"sources\.a: 'builtin/fable'"):
        load(a={"path": "builtin/fable"})


def test_a_path_that_is_not_local_is_loaded_from_the_hub(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: Any = None, **kwargs: Any) -> Dataset:
        asked.append((path, name, kwargs["split"], kwargs["revision"]))
        return Dataset.from_dict({"body": texts(9)})

    monkeypatch.setattr("datasets.load_dataset_builder", lambda **files: SimpleNamespace(name="web"))
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    load(web={"path": "org/web", "subset": "en", "split": "train[:9]", "revision": "v1", "text_column": "body"})
    assert asked == [("org/web", "en", "train[:9]", "v1")]


@pytest.mark.parametrize("stream", [False, True])
def test_files_that_a_card_lists_are_read_as_others_are(load: Any, tokenizer: Any, stream: bool) -> None:
    card, prose = (
        "---\nconfigs:\n- config_name: default\n  data_files: '*.{0}'\n---\n",
        "the fox\n\njumps over\nthe dog",
    )
    for name, text in {"txt": prose, "csv": 'text\nNA\n"007"\n', "tsv": 'text\n"fox\nNA\n'}.items():
        Path(f"a-{name}").mkdir()
        Path(f"a-{name}", "README.md").write_text(card.format(name))
        Path(f"a-{name}", f"a.{name}").write_text(text)

    def read(name: str, **options: Any) -> set[str]:
        source = {"path": f"a-{name}", "weight": 1, "streaming": stream, **options}
        rows = load(a=source, sequence_length=2).train["a"]
        return {*(stream_texts(rows, 99).split(EOS) if stream else documents(tokenizer, rows))}

    assert prose in read("txt") and read("txt", sample_by="paragraph") >= {"the fox"}
    assert "NA" in read("csv") and '"fox' in read("tsv")
    with pytest.raises(ValueError, match=r"sources\.a: 'a-csv'.*sample_by='line' is for \.txt files"):
        read("csv", sample_by="line")


def write_damaged(path: Path) -> None:
    """A Parquet file of which only the columns `text` and `more` can be read."""
    columns = {name: texts(40, name) for name in ("html", "text", "url", "more")}
    pq.write_table(pa.table(columns), path, row_group_size=10)
    data, metadata = bytearray(path.read_bytes()), pq.read_metadata(path)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, (0, 2)):
            start, size = column.dictionary_page_offset, column.total_compressed_size
            data[start : start + size] = bytes(size)
    path.write_bytes(data)


def test_only_the_named_columns_of_parquet_are_read(load: Any, tmp_path: Path) -> None:
    write_damaged(tmp_path / "a.parquet")
    with pytest.raises(OSError):
        pq.read_table(tmp_path / "a.parquet")
    stored = {"path": "a.parquet", "weight": 1}
    stream = {**stored, "streaming": True}
    for columns in ({"text_column": "text"}, {"prompt_column": "more", "completion_column": "text"}):
        loaded = load(a={**stored, **columns, "eval_rows": 2}, b={**stream, **columns})
        assert len(loaded.train["a"]) and len(loaded.eval["a"])
        assert "the text number" in stream_texts(loaded.train["b"], 9)
    for source in (stored, stream):
        with pytest.raises(ValueError, match=r"no column 'body'. Name one of html, text, url, more."):
            load(a={**source, "text_column": "body"})


_LOAD = """
import sys
from hf_nexus.mixture import MixtureConfig, load_mixture
from tests.support.tiny_tokenizer import tiny_tokenizer
for options in sys.argv[1:]:
    source = {"path": "alice/web", "weight": 1, "streaming": options == "stream", "eval_rows": 2}
    mixture = load_mixture(MixtureConfig.from_dict({"sources": {"a": source}, "sequence_length": 8}), tiny_tokenizer())
    print("read" if len(mixture.eval["a"]) else "empty")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "txt", "tsv"])
def test_what_the_source_names_of_the_hub_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The named columns of Parquet files, or text as it is. Without a network, the copy in the cache is read."""
    (tmp_path / "web").mkdir()
    if kind == "parquet":
        write_damaged(tmp_path / "web" / "a.parquet")
    else:
        for number, text in enumerate(texts(9)):
            (tmp_path / "web" / f"{number}.{kind}").write_text(f'text\n"{text}\n')
    with HubServer(tmp_path / "hub") as hub, impatient_client(monkeypatch, xet=False):
        api(hub).create_repo("alice/web", repo_type="dataset")
        api(hub).upload_folder(repo_id="alice/web", repo_type="dataset", folder_path=tmp_path / "web")
        told = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.getcwd()}
        for offline, modes in (("0", ["stored", "stream"]), ("1", ["stored"])):
            command = [sys.executable, "-c", _LOAD, *modes]
            environment = {**os.environ, **told, "HF_HUB_OFFLINE": offline}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout.split() == ["read"] * len(modes), done.stderr


def test_the_licence_is_the_stated_one_else_that_of_the_data(load: Any) -> None:
    dataset = Dataset.from_dict({"text": texts(5)}, info=DatasetInfo(license="odc-by"))
    dataset.save_to_disk("saved")
    write("a.jsonl", texts(5))
    mixture = load(a={"path": "saved"}, b={"path": "saved", "license": "mit"}, c={"path": "a.jsonl"})
    assert mixture.licenses == {"a": "odc-by", "b": "mit", "c": None}


# --- held-out documents


def test_copies_of_held_out_documents_are_not_trained_on(load: Any, tokenizer: Any) -> None:
    docs = texts(50)
    write("web.jsonl", docs + docs[::-1] + docs[:25])
    mixture = load(web={"path": "web.jsonl", "eval_rows": 12}, sequence_length=2)
    held_out = documents(tokenizer, mixture.eval["web"])[:-1]
    trained = documents(tokenizer, mixture.train["web"])
    assert len(held_out) in (11, 12)  # the last one may be lost with the incomplete row
    assert len(set(held_out)) == len(held_out)
    assert set(held_out).isdisjoint(trained)
    assert set(held_out) | set(trained) >= set(docs[1:-1]) - set(held_out)
    assert len(set(trained) & set(docs)) in (37, 38)


def test_the_same_documents_are_held_out_whatever_their_order(load: Any, tokenizer: Any) -> None:
    docs = texts(50)
    write("a.jsonl", docs)
    write("b.jsonl", docs[::-1] + docs)
    mixture = load(a={"path": "a.jsonl", "eval_rows": 12}, b={"path": "b.jsonl", "eval_rows": 12}, sequence_length=2)
    assert documents(tokenizer, mixture.eval["a"]) == documents(tokenizer, mixture.eval["b"])


def test_text_of_evaluation_sets_is_trained_on_nowhere(
    load: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    web, code, law = texts(30), texts(30, "bug"), texts(30, "judge")
    DatasetDict(
        train=Dataset.from_dict({"text": web + law[:5]}), test=Dataset.from_dict({"text": web[:7]})
    ).save_to_disk("web")
    write("code.jsonl", code + web[3:5])
    write("law.jsonl", law)
    mixture = load(
        web={"path": "web", "eval_split": "test"},
        code={"path": "code.jsonl"},
        law={"path": "law.jsonl", "role": "ood"},
        sequence_length=2,
    )
    assert documents(tokenizer, mixture.eval["web"])[:6] == web[:6]
    assert documents(tokenizer, mixture.train["web"])[:22] == web[7:29]
    assert documents(tokenizer, mixture.train["code"])[:29] == code[:29]
    trained = {text for rows in mixture.train.values() for text in documents(tokenizer, rows)}
    assert trained.isdisjoint(web[:7]) and trained.isdisjoint(law)
    assert "'web': 12 more documents" in caplog.text and "'code': 2 more documents" in caplog.text


def test_max_tokens_does_not_limit_held_out_rows(load: Any) -> None:
    write("a.jsonl", texts(50))
    write("b.jsonl", texts(50, "judge"))
    everything = load(a={"path": "a.jsonl", "eval_rows": 10}, b={"path": "b.jsonl", "role": "ood"})
    limited = load(
        a={"path": "a.jsonl", "eval_rows": 10, "max_tokens": 100},
        b={"path": "b.jsonl", "role": "ood", "max_tokens": 100},
    )
    assert 64 <= limited.tokens["a"] <= 100 < everything.tokens["a"]
    assert 64 <= limited.eval_tokens["b"] <= 100 < everything.eval_tokens["b"]
    assert limited.eval_tokens["a"] == everything.eval_tokens["a"]


# --- streaming sources


def stream_texts(source: StreamedDocuments, micro_batches: int) -> str:
    """The first rows of a streaming source, as text."""
    stream = MixtureStream({"a": source})
    rows = [stream.__getitems__([(i, 0)])[0]["input_ids"] for i in range(micro_batches)]
    return source.encoder.tokenizer.decode(torch.cat(rows))


def test_only_held_out_documents_of_a_stream_are_read_early(
    load: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = texts(300)
    write("web.jsonl", [docs[0], *docs])
    web = {"path": "web.jsonl", "streaming": True, "weight": 1}
    calls = count_tokenized(monkeypatch)
    mixture = load(web={**web, "eval_rows": 5})
    assert sum(calls) == 5
    assert documents(tokenizer, mixture.eval["web"])[:4] == docs[:4]  # the first different ones
    assert mixture.tokens == {"web": None} and mixture.weights == {"web": 1.0}
    assert set(stream_texts(mixture.train["web"], 1500).split(EOS)[:-1]) == set(docs[5:])
    assert load(web={**web, "tokens": 900}).tokens == {"web": 900}


def test_a_stream_leaves_out_what_any_other_source_holds_out(load: Any) -> None:
    web, code = texts(60), texts(40, "bug")
    write("web.jsonl", web + code[:9])
    write("code.jsonl", code + web[:3])
    write("law.jsonl", web[10:12])
    DatasetDict(train=Dataset.from_dict({"text": web}), test=Dataset.from_dict({"text": web[20:30]})).save_to_disk("s")
    mixture = load(
        web={"path": "web.jsonl", "streaming": True, "weight": 1, "eval_rows": 2},
        code={"path": "code.jsonl", "weight": 1, "eval_rows": 5},
        saved={"path": "s", "streaming": True, "weight": 1, "eval_split": "test[:4]"},
        law={"path": "law.jsonl", "role": "ood"},
        sequence_length=4,
    )
    held_out = set(web[:2]) | set(web[10:12]) | set(web[20:24])
    tokenizer = mixture.train["web"].encoder.tokenizer
    held_out |= set(documents(tokenizer, mixture.eval["code"])[:-1]) - {""}
    for name in ("web", "saved"):
        trained = set(stream_texts(mixture.train[name], 1500).split(EOS)[:-1])
        assert trained == set(web + (code[:9] if name == "web" else [])) - held_out
    assert not held_out & set(documents(tokenizer, mixture.train["code"]))


@pytest.mark.parametrize("held_out", [{"eval_rows": 8}, {"eval_split": "train[:8]", "split": "train+train"}])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_held_out_chat_is_left_out_whatever_its_arguments(load: Any, held_out: dict, mixed: bool) -> None:
    """The keys of their arguments come in any order, and their values have several types."""

    def chat(i: int) -> list[Any]:
        arguments = {"b": i, "a": "x" if mixed and i % 3 == 1 else 2} if i % 2 else {"a": i, f"key{i % 4}": "z"}
        return [{"role": "user", "content": f"fox {i}", "tool_calls": [{"arguments": arguments}]}]

    write("chats.jsonl", [chat(i) for i in range(30)], column="messages")
    chatty = tiny_tokenizer()
    chatty.chat_template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    source = {"path": "chats.jsonl", "messages_column": "messages", "streaming": True, "weight": 1, **held_out}
    mixture = load(a=source, with_=chatty, sequence_length=2)
    held = set(documents(chatty, mixture.eval["a"])[:-1])
    trained = set(stream_texts(mixture.train["a"], 2000).split(EOS)[1:-1])
    assert len(held) in (7, 8) and len(trained) == 22 and held.isdisjoint(trained)


def test_every_kind_of_file_streams(load: Any) -> None:
    docs = texts(20)
    for path in write_every_kind(docs):
        mixture = load(a={"path": path, "streaming": True, "weight": 1}, sequence_length=4)
        assert set(stream_texts(mixture.train["a"], 300).split(EOS)[:20]) == set(docs), path


def test_a_stream_of_parquet_may_have_files_without_rows(load: Any, tmp_path: Path) -> None:
    table = Dataset.from_dict({"text": texts(20)}).data.table
    for i, rows in enumerate((0, 20, 0)):
        pq.write_table(table.slice(0, rows), tmp_path / f"{i}.parquet", row_group_size=7)
    mixture = load(a={"path": "*.parquet", "streaming": True, "weight": 1}, sequence_length=4)
    assert set(stream_texts(mixture.train["a"], 300).split(EOS)[:20]) == set(texts(20))


def test_streams_that_cannot_be_loaded_say_so(load: Any) -> None:
    write("a.jsonl", [*texts(5), None])
    stream = {"path": "a.jsonl", "streaming": True, "weight": 1}
    for wrong, message in (
        ({"text_column": "body"}, r"sources\.a\.text_column: .*'body'.*id, text"),
        ({"path": "b.jsonl"}, r"sources\.a: 'b\.jsonl'"),
        ({"split": "test"}, r"sources\.a: .*split 'test'"),
        ({"eval_split": "test[5%:]"}, r"sources\.a\.eval_split: 'test\[5%:\]'.*'validation\[:1000\]'"),
        ({"eval_rows": 6}, r"row 5 holds None .*on_error to 'skip'"),
        ({"eval_rows": 6, "on_error": "skip"}, r"sources\.a\.eval_rows: 6 documents .*only 5"),
    ):
        with pytest.raises(ValueError, match=message):
            load(a={**stream, **wrong})


@pytest.mark.parametrize("column", ["messages", "meta"])
def test_late_keys_are_an_error_that_says_where_to_put_them(load: Any, column: str) -> None:
    for name, value in (("d/1.jsonl", {"k": 1}), ("d/2.jsonl", {"k": 1, "late": {"n": 1}})):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(json.dumps({"text": "fox", column: [value]}) + "\n")
    web = {"path": "d", "weight": 1}
    advice = (
        "first 10 MB of JSON or first Parquet file, or files have different columns. Put a row with all keys first"
    )
    with pytest.raises(ValueError, match=advice):
        load(web=web)
    stream = {**web, "streaming": True}
    with pytest.raises(SourceError, match=f"Couldn't cast.*{advice}"):
        stream_texts(load(web=stream).train["web"], 9)
    Path("d/2.jsonl").rename("d/0.jsonl")
    assert "fox" in stream_texts(load(web=stream).train["web"], 9)


def test_a_late_key_at_top_level_is_an_error_that_says_so(load: Any) -> None:
    rows = [json.dumps({"text": "x" * 1_000_000})] * 12
    Path("a.jsonl").write_text("\n".join([*rows, json.dumps({"text": "y", "late": 1})]))
    for streaming in (False, True):
        with pytest.raises(
            (ValueError, SourceError),
            match=r"A key first occurs after the first 10 MB .* Put a row with all keys first",
        ):
            stream_texts(load(web={"path": "a.jsonl", "weight": 1, "streaming": streaming}).train["web"], 99)


# --- cache


def test_a_second_call_tokenizes_nothing(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", texts(50))
    sources = {
        "a": {"path": "a.jsonl", "eval_rows": 5, "max_tokens": 400},
        "b": {"path": "a.jsonl", "role": "ood", "split": "train[:5]"},
    }
    first = load(**sources)
    calls = count_tokenized(monkeypatch)
    second = load(**sources)
    assert not calls
    for name in first.train:
        assert first.train[name]["input_ids"][:].equal(second.train[name]["input_ids"][:])
    assert load(**sources, with_=tiny_tokenizer()).tokens == first.tokens  # an equal tokenizer, another object
    assert not calls


def test_another_tokenizer_length_or_text_gives_other_rows(
    load: Any, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    write("a.jsonl", texts(50))
    first = load(a={"path": "a.jsonl"})
    calls = count_tokenized(monkeypatch)
    other = tiny_tokenizer("number jumps lazy over hello")
    retokenized = load(a={"path": "a.jsonl"}, with_=other)
    assert sum(calls) == 50
    assert documents(other, retokenized.train["a"])[:40] == documents(tokenizer, first.train["a"])[:40]
    assert not retokenized.train["a"]["input_ids"][:8].equal(first.train["a"]["input_ids"][:8])
    longer = load(a={"path": "a.jsonl"}, sequence_length=11)
    assert longer.train["a"]["input_ids"][:].shape == (sum(len(r) for r in [first.train["a"]]) * 8 // 11, 11)
    write("a.jsonl", texts(50, "cat"))
    assert "cat" in documents(tokenizer, load(a={"path": "a.jsonl"}).train["a"])[0]


def test_a_folder_that_is_read_is_not_written_to(load: Any) -> None:
    Dataset.from_dict({"text": texts(20)}).save_to_disk("saved")
    before = sorted(path.name for path in Path("saved").iterdir())
    load(a={"path": "saved", "eval_rows": 5})
    assert sorted(path.name for path in Path("saved").iterdir()) == before
    assert len(load_from_disk("saved")) == 20


# --- text of rows


def test_prompt_and_completion_are_one_document(load: Any, tokenizer: Any) -> None:
    Path("qa.jsonl").write_text('{"q": "1 + 1?", "a": "2"}\n{"q": "2 + 2? ", "a": "4"}\n' * 3)
    mixture = load(qa={"path": "qa.jsonl", "prompt_column": "q", "completion_column": "a"}, sequence_length=4)
    assert documents(tokenizer, mixture.train["qa"])[:2] == ["1 + 1?\n2", "2 + 2? 4"]


NAME = "{% if m.name is defined %}({{ m.name }}){% endif %}"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + NAME + "{% endfor %}"


def test_messages_use_the_chat_template_and_end_in_one_eos(load: Any) -> None:
    chats = [
        [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "dog"}],
        [{"role": "user", "content": "the", "name": "Ann"}],
    ]
    write("chat.jsonl", chats * 5, column="messages")  # read as JSON, where absent keys are absent ...
    schema = {"role": Value("string"), "content": Value("string"), "name": Value("string")}
    full = [[{"name": None, **message} for message in chat] for chat in chats * 5]  # ... and with a schema, as None
    Dataset.from_dict({"messages": full}, features=Features({"messages": [schema]})).to_parquet("full.parquet")
    Path("pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": chat[:1], "completion": chat[1:]}) + "\n" for chat in chats[:1] * 10)
    )
    chatty = tiny_tokenizer()
    sources = {
        "chat": {"path": "chat.jsonl", "messages_column": "messages"},
        "full": {"path": "full.parquet", "messages_column": "messages"},
        "pairs": {"path": "pairs.jsonl", "prompt_column": "prompt", "completion_column": "completion"},
    }
    for source in sources.items():
        with pytest.raises(ValueError, match=rf"sources\.{source[0]}\.\w+_column: .*chat template"):
            load(**dict([source]))
    for template in (TEMPLATE, TEMPLATE + EOS):
        chatty.chat_template = template
        mixture = load(**sources, with_=chatty, sequence_length=4)
        for name in ("chat", "full"):
            assert documents(chatty, mixture.train[name])[:2] == ["[user]fox?[assistant]dog", "[user]the(Ann)"]
        assert documents(chatty, mixture.train["pairs"])[0] == "[user]fox?[assistant]dog"


def test_a_column_of_tools_is_named_as_not_read(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    row = {"messages": [{"role": "user", "content": "the quick fox"}], "tools": "[]"}
    Path("chat.jsonl").write_text((json.dumps(row) + "\n") * 9)
    chatty = tiny_tokenizer()
    chatty.chat_template = TEMPLATE
    load(chat={"path": "chat.jsonl", "messages_column": "messages"}, with_=chatty, sequence_length=4)
    assert "sources.chat: the column 'tools' is not read" in caplog.text


def test_tool_calls_look_alike_from_every_format(load: Any, tokenizer: Any) -> None:
    def call(name: str, **arguments: Any) -> list[Any]:
        calls = [{"function": {"name": name, "arguments": arguments}, "tags": [name, None]}]
        return [{"role": "user", "content": "fox"}, {"role": "assistant", "content": None, "tool_calls": calls}]

    chats = [call("jump", over="dog"), call("run", far={"unit": "m", "n": [1]}), call("run", far={"n": [2]})] * 3
    write("chats.jsonl", chats, column="messages")
    table = pa.Table.from_pylist([{"messages": chat} for chat in chats])
    pq.write_table(table, "chats.parquet")
    Dataset(table).save_to_disk("chats")
    chatty = tiny_tokenizer()
    chatty.chat_template = (
        "{% for m in messages %}{{ m.role }}{% for t in m.tool_calls or [] %}{{ t | tojson }}{% endfor %}{% endfor %}"
    )
    expected = ["".join(m["role"] + "".join(map(json.dumps, m.get("tool_calls", []))) for m in chat) for chat in chats]
    for path in ("chats.jsonl", "chats.parquet", "chats"):
        for stream in ({}, {"streaming": True, "weight": 1}):
            mixture = load(a={"path": path, "messages_column": "messages", **stream}, with_=chatty, sequence_length=2)
            rows = mixture.train["a"]
            found = stream_texts(rows, 700).split(EOS) if stream else documents(chatty, rows)
            assert set(found[:-1]) == set(expected), path


def test_messages_with_dates_in_place_of_their_text_are_refused(load: Any) -> None:
    chat = [{"role": "user", "content": "fox", "tool_calls": [{"arguments": {"day": "2024-05-01"}}]}]
    write("chats.jsonl", [chat] * 9, column="messages")
    chatty = tiny_tokenizer()
    chatty.chat_template = "{% for m in messages %}{{ m.tool_calls | tojson }}{% endfor %}"
    source = {"path": "chats.jsonl", "messages_column": "messages"}
    with pytest.raises(ValueError, match=r"sources\.a: .* row 0: it holds the date 2024-05-01 .* Parquet"):
        load(a=source, with_=chatty, sequence_length=2)
    pq.write_table(pa.Table.from_pylist([{"messages": chat}] * 9), "chats.parquet")
    mixture = load(a=source | {"path": "chats.parquet"}, with_=chatty, sequence_length=2)
    assert "2024-05-01" in documents(chatty, mixture.train["a"])[0]


@pytest.mark.parametrize("value", ["2024-05-01T10:00:00", Decimal("1.50"), b"fox"])
def test_values_that_no_template_reads_are_no_obstacle(load: Any, value: Any) -> None:
    chats = [[{"role": "user", "content": text, "created": value}] for text in texts(20)]
    source = {"path": "chats.parquet", "messages_column": "messages", "eval_rows": 2}
    if isinstance(value, str):  # Arrow makes dates of such text
        source["path"] = write("chats.jsonl", chats, column="messages")
    else:
        pq.write_table(pa.Table.from_pylist([{"messages": chat} for chat in chats]), "chats.parquet")
    chatty = tiny_tokenizer()
    chatty.chat_template = TEMPLATE
    for stream in ({}, {"streaming": True, "weight": 1}):
        rows = load(a=source | stream, with_=chatty, sequence_length=4).train["a"]
        found = stream_texts(rows, 99).split(EOS) if stream else documents(chatty, rows)
        assert {f"[user]{text}" for text in texts(20)} >= {*found[1:-1]} and len(found) > 10
    chatty.chat_template = TEMPLATE.replace("m.content", "m.created")
    with pytest.raises(ValueError, match=r"sources\.a: .* row 0: it holds"):
        load(a=source, with_=chatty, sequence_length=4)


@pytest.mark.parametrize("value", [Decimal("1.50"), b"fox"])
def test_messages_that_json_cannot_hold_are_refused(load: Any, value: Any) -> None:
    chat = [{"role": "user", "content": "fox", "tool_calls": [{"arguments": {"given": value}}]}]
    pq.write_table(pa.Table.from_pylist([{"messages": chat}] * 9), "chats.parquet")
    chatty = tiny_tokenizer()
    chatty.chat_template = "{% for m in messages %}{{ m.tool_calls[0].arguments.given }}{% endfor %}"
    for stream in ({}, {"streaming": True, "weight": 1, "eval_rows": 1}):
        with pytest.raises(ValueError, match=rf"sources\.a: .* row 0: it holds {re.escape(repr(value))}.*Save it as"):
            load(a={"path": "chats.parquet", "messages_column": "messages", **stream}, with_=chatty)


# --- errors


def test_a_missing_column_is_an_error_listing_those_there_are(load: Any) -> None:
    write("a.jsonl", texts(5), column="content")
    with pytest.raises(ValueError, match=r"sources\.a\.text_column: .*'text'.*id, content"):
        load(a={"path": "a.jsonl"})


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_value_that_is_no_string_is_an_error_with_its_row(load: Any, num_proc: int | None) -> None:
    docs: list[Any] = texts(600)
    docs[500] = None
    write("a.jsonl", docs)
    with pytest.raises(
        ValueError, match=r"sources\.a\.text_column: row 500 holds None .*must hold a string.*id, text"
    ):
        load(a={"path": "a.jsonl"}, num_proc=num_proc)
    write("b.jsonl", [[1]] * 5)
    with pytest.raises(ValueError, match=r"sources\.b\.text_column: row 0 holds \[1\]"):
        load(b={"path": "b.jsonl", "eval_rows": 1}, num_proc=num_proc)


def test_a_conversation_that_is_none_is_an_error(load: Any) -> None:
    chatty = tiny_tokenizer()
    chatty.chat_template = TEMPLATE
    write("chat.jsonl", texts(5), column="messages")
    with pytest.raises(ValueError, match=r"sources\.chat\.messages_column: row 0 .*list of messages"):
        load(chat={"path": "chat.jsonl", "messages_column": "messages"}, with_=chatty)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "missing.jsonl"}, r"sources\.a: 'missing\.jsonl'.*no file matches"),
        ({"path": "data/*.parquet"}, r"sources\.a: .*no file matches"),
        ({"path": "token files"}, r"sources\.a: 'token files'.*token files"),
        ({"path": "{a.jsonl,b.csv}"}, r"sources\.a"),
        ({"path": "a.*"}, r"sources\.a: .*use files of one of"),
        ({"path": "org/web"}, r"sources\.a: 'org/web'.*looked up on the Hub"),
        ({"path": "a.jsonl", "split": "test"}, r"sources\.a: .*split 'test'"),
        ({"path": "saved", "split": "test"}, r"sources\.a: .*without splits"),
        ({"path": "splits", "split": "test"}, r"sources\.a: .*only train"),
        ({"path": "a.jsonl", "eval_split": "test"}, r"sources\.a: .*split 'test'"),
        ({"path": "broken.jsonl"}, r"sources\.a: 'broken\.jsonl'"),
        ({"path": "header.csv"}, r"sources\.a: .*no data"),
        ({"path": "a.jsonl", "eval_rows": 20}, r"sources\.a\.eval_rows: .*only 20 different"),
        ({"path": "a.jsonl", "eval_rows": 1, "max_tokens": 1000}, r"sources\.a: the 1 held-out .*raise eval_rows"),
        ({"path": "short.jsonl"}, r"sources\.a: the documents .*add documents"),
        ({"path": "a.jsonl", "tokens": 3_000_000_000}, r"sources\.a\.tokens: .*streaming"),
        ({"path": "a.jsonl.zst"}, r"sources\.a: .*pip install zstandard"),
        ({"path": "a.csv.zst"}, r"sources\.a: .*pip install zstandard"),
        ({"path": "cut.jsonl.gz"}, r"sources\.a: 'cut\.jsonl\.gz'.*ended before"),
        ({"path": "deep.jsonl"}, r"sources\.a: 'deep\.jsonl'.*recursion"),
        ({"path": "blank.jsonl", "streaming": True, "weight": 1}, r"sources\.a: 'blank\.jsonl'.*no rows"),
        ({"path": "latin.txt"}, r"sources\.a: 'latin\.txt'.*iconv"),
    ],
)
def test_a_source_that_cannot_be_used_is_named_with_the_reason(
    load: Any, source: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.jsonl", texts(20))
    write("short.jsonl", ["fox"])
    Path("a.csv").write_text("text\nfox\n")
    Path("broken.jsonl").write_text('{"text": "fox"\n')
    Dataset.from_dict({"text": texts(3)}).save_to_disk("saved")
    DatasetDict(train=Dataset.from_dict({"text": texts(3)})).save_to_disk("splits")
    Path("header.csv").write_text("text\n")
    for name in ("a.jsonl.zst", "a.csv.zst"):
        Path(name).write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.delitem(fsspec.compression.compr, "zstd", raising=False)  # as without the package
    Path("cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 999)[:-9])
    Path("deep.jsonl").write_text(f'{{"text": {"[" * 3000}{"]" * 3000}}}\n')
    Path("blank.jsonl").write_text("\n\n")
    Path("latin.txt").write_text("caf\xe9", encoding="latin-1")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(a=source, sequence_length=64)


@pytest.mark.parametrize("shards", [None, 1])
def test_saved_datasets_without_rows_are_errors(load: Any, shards: int | None) -> None:
    full, empty = (Dataset.from_dict({"text": texts(n)}) for n in (9, 0))
    empty.save_to_disk("empty", num_shards=shards)
    DatasetDict(train=full, test=empty).save_to_disk("splits", num_shards=shards and {"train": 1, "test": 1})
    for source in ({"path": "empty"}, {"path": "splits", "eval_split": "test"}):
        with pytest.raises(ValueError, match=rf"sources\.a: '{source['path']}'.* has no rows"):
            load(a=source)


def test_a_held_out_split_of_a_stream_has_rows(load: Any) -> None:
    write("a.jsonl", texts(9))
    source = {"path": "a.jsonl", "streaming": True, "weight": 1, "split": "train+train", "eval_split": "train[:0]"}
    with pytest.raises(ValueError, match=r"sources\.a\.eval_split: 'train\[:0\]' has no rows"):
        load(a=source)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_bytes_that_are_no_utf8_are_an_error_with_their_row(load: Any, num_proc: int | None) -> None:
    Path("a.jsonl").write_bytes(
        "".join(f'{{"text": "{text}"}}\n' for text in [*texts(300), "caf\xe9"]).encode("latin-1")
    )
    values = pa.array([b"fox"] * 300 + [b"caf\xe9"], pa.binary())
    content = pa.Array.from_buffers(pa.string(), 301, values.buffers())
    roles = pa.array(["user"] * 301)
    chats = pa.ListArray.from_arrays(range(302), pa.StructArray.from_arrays([roles, content], ["role", "content"]))
    pq.write_table(pa.table({"messages": chats}), "a.parquet")
    chatty = tiny_tokenizer()
    chatty.chat_template = TEMPLATE
    for source in ({"path": "a.jsonl"}, {"path": "a.parquet", "messages_column": "messages"}):
        with pytest.raises(ValueError, match=r"sources\.a: row 300 .*not UTF-8.*iconv"):
            load(a=source, num_proc=num_proc, with_=chatty)
        stream = {**source, "streaming": True, "weight": 1}
        with pytest.raises(SourceError, match=r"'a': row 300 .*not UTF-8.*on_error to 'skip'"):
            stream_texts(load(a=stream, with_=chatty).train["a"], 999)
        assert "fox" in stream_texts(load(a={**stream, "on_error": "skip"}, with_=chatty).train["a"], 999)
        with pytest.raises(ValueError, match=r"(?s)sources\.a: .*iconv"):
            load(a={**stream, "eval_rows": 301}, with_=chatty)


@pytest.mark.parametrize("split", [{"eval_rows": 25}, {"eval_split": "train[:25]", "split": "train+train"}])
def test_a_file_that_breaks_in_held_out_rows_is_named(load: Any, split: dict) -> None:
    write("a.jsonl", texts(20))
    Path("b.jsonl").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match=r"(?s)sources\.a: .*JSON parse error"):
        load(a={"path": "[ab].jsonl", "streaming": True, "weight": 1, **split})


@pytest.mark.parametrize("role", ["train", "ood"])
def test_documents_longer_than_max_tokens_say_to_raise_it(load: Any, role: str) -> None:
    write("a.jsonl", texts(20))
    write("long.jsonl", [" ".join(texts(40, "judge"))])
    sources = {"a": {"path": "a.jsonl"}, "b": {"path": "long.jsonl", "role": role, "max_tokens": 70}}
    with pytest.raises(ValueError, match=r"sources\.b: .*within max_tokens=70.*raise max_tokens"):
        load(**sources, sequence_length=64)


def test_a_source_held_out_elsewhere_as_a_whole_is_refused(load: Any) -> None:
    write("a.jsonl", texts(20))
    with pytest.raises(ValueError, match=r"sources\.a: all of its 20 documents are held out"):
        load(a={"path": "a.jsonl"}, b={"path": "a.jsonl", "role": "ood"})


def test_a_tokenizer_needs_an_eos(load: Any) -> None:
    nameless = tiny_tokenizer()
    nameless.eos_token = None
    with pytest.raises(ValueError, match=r"no EOS token.*tokenizer\.eos_token"):
        load(a={"path": "a.jsonl"}, with_=nameless)


def test_a_bos_needs_a_bos_token_and_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = {"web": {"path": write("web.jsonl", texts(9))}}
    config = MixtureConfig.from_dict({"sources": sources, "sequence_length": 8, "add_bos_token": True})
    with pytest.raises(ValueError, match=r"add_bos_token: the tokenizer has no BOS token\. Set tokenizer\.bos_token"):
        load_mixture(config, tiny_tokenizer(), cache_dir=tmp_path / "cache")
    config.add_bos_token, tokenizer = None, adding_bos(tiny_tokenizer())
    assert load_mixture(config, tokenizer, cache_dir=tmp_path / "cache").bos_token_id == tokenizer.bos_token_id
    assert load_mixture(config, tiny_tokenizer(), cache_dir=tmp_path / "cache").bos_token_id is None
