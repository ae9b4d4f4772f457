"""Packing loses only the last incomplete row, and rows depend only on documents, tokenizer and length."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, default_data_collator

from hf_nexus.mixture import SourceConfig
from hf_nexus.mixture.documents import DocumentEncoder
from hf_nexus.mixture.packing import BATCH_SIZE, RowPacker, SourcePacker, pack_rows, tokenizer_fingerprint

from ..support.tiny_tokenizer import BOS, EOS, adding_bos, count_tokenized, tiny_tokenizer


def packer(
    folder: Path, tokenizer: Any = None, num_proc: int | None = None, bos: bool | None = None, **source: Any
) -> SourcePacker:
    tokenizer = tokenizer or tiny_tokenizer()
    encoder = DocumentEncoder("web", SourceConfig(path="web", **source), tokenizer, ["text"], bos)
    return SourcePacker(encoder, tokenizer_fingerprint(tokenizer), folder, num_proc)


def texts(n: int) -> list[str]:
    return [f"the fox {i} jumps over {'the lazy dog ' * (i % 7)}" for i in range(n)]


def flat(tokenizer: Any, documents: list[str]) -> list[int]:
    """The tokens of the documents, an EOS after each."""
    return [t for text in documents for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def tokens_of(rows: Dataset) -> list[int]:
    return rows["input_ids"][:].flatten().tolist()


documents = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=30), max_size=30)


@given(documents, st.integers(1, 20), st.integers(1, 7))
def test_rows_are_the_documents_end_to_end_in_any_batches(docs: list, length: int, batch: int) -> None:
    pack = RowPacker(length)
    rows, positions = [], []
    for start in range(0, len(docs), batch):
        table = pa.table({"input_ids": pa.array(docs[start : start + batch], pa.list_(pa.int32()))})
        packed = pack(table)
        rows += packed["input_ids"].to_pylist()
        positions += packed["position_ids"].to_pylist()
    stream = [token for document in docs for token in document]
    starts = range(0, len(stream) - length + 1, length)
    assert rows == [stream[i : i + length] for i in starts]
    # Each token's distance from the start of its document, or of its row if that is nearer.
    inside = [i for document in docs for i in range(len(document))]
    assert positions == [[min(inside[i + j], j) for j in range(length)] for i in starts]


def test_rows_without_a_target_are_left_out() -> None:
    """The first token of a document is no target. A row of such tokens stays if all of them are trained on."""
    tokens, starts = [[5, 6], [~7, 8], [~7, 8], [~7, ~8]], [[1, 1], [1, 0], [1, 1], [1, 0]]
    rows = pack_rows(np.array(tokens), np.array(starts, dtype=bool))
    assert rows["input_ids"].tolist() == [[5, 6], [7, 8]] and rows["labels"].tolist() == [[5, 6], [-100, 8]]


@pytest.mark.parametrize("length", [1 << 16, (1 << 16) + 1])
def test_positions_of_long_rows_are_stored_whole(length: int) -> None:
    packed = RowPacker(length)(pa.table({"input_ids": pa.array([range(length)], pa.list_(pa.int32()))}))
    assert packed["position_ids"].to_pylist() == [list(range(length))]


def test_an_eos_ends_each_document_and_only_a_rest_is_lost(tmp_path: Path) -> None:
    tokenizer, docs = tiny_tokenizer(), texts(3 * BATCH_SIZE)
    rows = packer(tmp_path, tokenizer).pack_documents(Dataset.from_dict({"text": docs}), 64)
    stream = flat(tokenizer, docs)
    assert len(rows) == len(stream) // 64
    assert tokens_of(rows) == stream[: len(rows) * 64]


def test_boundaries_are_those_of_documents_not_of_tokens(tmp_path: Path) -> None:
    docs = [f"{'fox' * (i % 5)}{EOS}the dog{EOS}{EOS}" for i in range(100)]
    tokenizer = tiny_tokenizer()
    lengths = [len(flat(tokenizer, [text])) for text in docs]
    for _ in range(2):  # packed, and from the cache
        rows = packer(tmp_path, tokenizer).pack_documents(Dataset.from_dict({"text": docs}), max(lengths) + 1)
        positions = rows["position_ids"][:]
        first = {0, *np.cumsum(lengths).tolist(), *range(0, positions.numel(), max(lengths) + 1)}
        assert {i for i, p in enumerate(positions.flatten().tolist()) if p == 0} == first & set(
            range(positions.numel())
        )


def test_rows_and_cache_do_not_depend_on_the_processes(tmp_path: Path, monkeypatch: Any) -> None:
    docs = Dataset.from_dict({"text": texts(1000)})
    alone = packer(tmp_path / "alone").pack_documents(docs, 32)
    together = packer(tmp_path / "together", num_proc=2).pack_documents(docs, 32)
    assert tokens_of(alone) == tokens_of(together)
    calls = count_tokenized(monkeypatch)
    assert tokens_of(packer(tmp_path / "together").pack_documents(docs, 32)) == tokens_of(alone)
    assert not calls


def test_eos_is_the_only_special_token_and_empty_texts_vanish(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    stream = flat(tokenizer, ["the fox", "the dog"])
    first = [(EOS, tokenizer.eos_token_id)]  # like a tokenizer that starts each text with a BOS
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $0", special_tokens=first)
    assert tokenizer("fox")["input_ids"][0] == tokenizer.eos_token_id
    docs = ["", "the fox", "", "the dog", ""]
    rows = packer(tmp_path, tokenizer).pack_documents(Dataset.from_dict({"text": docs}), 2)
    assert tokens_of(rows) == stream[: len(stream) // 2 * 2]


@pytest.mark.parametrize(("adds", "wanted", "starts"), [(1, None, 1), (0, None, 0), (1, False, 0), (0, True, 1)])
def test_the_tokenizer_or_the_user_decides_on_a_bos(
    tmp_path: Path, adds: bool, wanted: bool | None, starts: bool
) -> None:
    tokenizer = adding_bos(tiny_tokenizer())
    if not adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    docs = ["the fox", "", f"{BOS}the dog", "fox"]  # one has its BOS already
    for other in (not starts, None):  # the cache of another choice is not read
        packer(tmp_path, tokenizer, bos=other).pack_documents(Dataset.from_dict({"text": docs}), 2)
    rows = packer(tmp_path, tokenizer, bos=wanted).pack_documents(Dataset.from_dict({"text": docs}), 2)
    expected = [(BOS if starts else "") + "the fox", f"{BOS}the dog", (BOS if starts else "") + "fox"]
    assert tokenizer.decode(tokens_of(rows)) in ("".join(f"{text}{EOS}" for text in expected), EOS.join(expected))


def test_a_chat_template_that_writes_the_bos_gets_no_second(tmp_path: Path) -> None:
    tokenizer = adding_bos(tiny_tokenizer())
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = Dataset.from_dict({"messages": [[{"role": "user", "content": f"fox {i}"}] for i in range(9)]})
    rows = packer(tmp_path, tokenizer, messages_column="messages").pack_documents(chats, 4)
    assert tokenizer.decode(tokens_of(rows)).startswith("".join(f"{BOS}fox {i}{EOS}" for i in range(8)))


def test_padding_of_an_earlier_call_does_not_reach_the_rows(tmp_path: Path) -> None:
    tokenizer, docs = tiny_tokenizer(), Dataset.from_dict({"text": texts(50)})
    before = packer(tmp_path / "a", tokenizer).pack_documents(docs, 16)
    tokenizer(["the fox", "dog"], truncation=True, max_length=1, padding="max_length")
    assert tokens_of(packer(tmp_path / "b", tokenizer).pack_documents(docs, 16)) == tokens_of(before)


@settings(max_examples=25)
@given(st.integers(8, 3000))
def test_max_tokens_takes_whole_documents_from_the_start(cached_packer: Any, limit: int) -> None:
    pack, docs = cached_packer
    pack.encoder.source.max_tokens = limit
    rows = pack.pack_documents(Dataset.from_dict({"text": docs}), 4)
    total, kept = 0, []
    for text in docs:
        total += len(flat(pack.encoder.tokenizer, [text]))
        if total > limit:
            break
        kept.append(text)
    stream = flat(pack.encoder.tokenizer, kept)
    assert tokens_of(rows) == stream[: len(stream) // 4 * 4]


@pytest.fixture(scope="module")
def cached_packer(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourcePacker, list[str]]:
    return packer(tmp_path_factory.mktemp("rows")), [text[: 4 + i % 40] for i, text in enumerate(texts(200))]


def test_max_tokens_tokenizes_little_more_than_it_takes(tmp_path: Path, monkeypatch: Any) -> None:
    docs = ["the lazy dog"] * 20_000
    each = len(flat(tiny_tokenizer(), docs[:1]))
    calls = count_tokenized(monkeypatch)
    rows = packer(tmp_path, max_tokens=5000 * each).pack_documents(Dataset.from_dict({"text": docs}), each)
    assert len(rows) == 5000
    assert 5000 <= sum(calls) <= 6000


def test_labels_are_the_tokens_and_lie_on_disk_once(tmp_path: Path) -> None:
    rows = packer(tmp_path).pack_documents(Dataset.from_dict({"text": texts(1000)}), 32)
    row = rows[3]
    assert row.keys() == {"input_ids", "labels", "position_ids"}
    assert row["position_ids"].shape == (32,) and row["position_ids"].dtype == row["input_ids"].dtype
    assert row["input_ids"].shape == (32,) and row["input_ids"].equal(row["labels"])
    (file,) = tmp_path.glob("pack-*")
    assert file.stat().st_size < 1.2 * (4 + 2) * 32 * len(rows)


def test_the_default_collator_makes_a_batch_of_rows(tmp_path: Path) -> None:
    rows = packer(tmp_path).pack_documents(Dataset.from_dict({"text": texts(100)}), 32)
    batch = default_data_collator(rows.__getitems__([5, 0, 5]))
    assert batch["input_ids"].shape == (3, 32) and str(batch["labels"].dtype) == "torch.int64"
    assert batch["input_ids"].equal(batch["labels"])
    assert batch["input_ids"][0].equal(rows[5]["input_ids"])


def test_too_few_tokens_for_a_row_are_an_error_with_a_fix(tmp_path: Path) -> None:
    for docs in (["the fox"], [""]):
        with pytest.raises(
            ValueError, match=r"sources\.web: the 1 held-out.* no row of sequence_length=99.*raise eval_rows"
        ):
            packer(tmp_path, eval_rows=1).pack_documents(Dataset.from_dict({"text": docs}), 99, held_out=True)
    with pytest.raises(ValueError, match="within max_tokens=8"):
        packer(tmp_path, max_tokens=8).pack_documents(Dataset.from_dict({"text": ["the fox"] * 9}), 8)


def test_tokens_for_one_row_are_enough(tmp_path: Path) -> None:
    stream = flat(tiny_tokenizer(), ["the fox"])
    rows = packer(tmp_path).pack_documents(Dataset.from_dict({"text": ["the fox"]}), len(stream))
    assert tokens_of(rows) == stream


def test_hashes_are_of_the_text_alone(tmp_path: Path) -> None:
    pack = packer(tmp_path)
    hashes = pack.hash_documents(Dataset.from_dict({"text": ["a", "b", "a", "é"]}))
    assert hashes.dtype == np.int64 and hashes[0] == hashes[2] and len(set(hashes.tolist())) == 3
    # Another value would hold out other documents than earlier versions.
    assert hashes[0] == 3405396810240292928
    assert np.array_equal(pack.hash_documents(Dataset.from_dict({"text": ["é", "a"]})), hashes[[3, 2]])
    other = packer(tmp_path, tiny_tokenizer("hello world"), num_proc=2)
    assert np.array_equal(other.hash_documents(Dataset.from_dict({"text": ["a", "b", "a", "é"]})), hashes)
    assert len(list(tmp_path.glob("hash-*"))) == 2  # another tokenizer does not hash the same text again


def test_hashes_of_messages_do_not_depend_on_the_template(tmp_path: Path) -> None:
    """Some templates write the date of today, by which no document must change sides."""
    chats = Dataset.from_dict({"messages": [[{"role": role, "content": "fox"}] for role in ("user", "system")]})
    other = Dataset.from_dict({"messages": [[{"content": "fox", "role": "user"}]]})  # the order in an Arrow file
    hashes = []
    for template in ("30 Nov {{ messages[0].content }}", "1 Dec {{ messages[0].content }}"):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        hashes.append(packer(tmp_path, tokenizer, messages_column="messages").hash_documents(chats).tolist())
    assert hashes[0] == hashes[1] and hashes[0][0] != hashes[0][1]
    assert packer(tmp_path, tokenizer, messages_column="messages").hash_documents(other).tolist() == hashes[0][:1]


def test_rows_that_other_settings_refuse_are_named(tmp_path: Path) -> None:
    tokenizer, long = tiny_tokenizer(), BATCH_SIZE + 44
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.length if m.content == 'dog' }}{{ m.content }}{% endfor %}"
    )
    chats = [[{"role": "user", "content": text}] for text in ["fox"] * long + ["dog"]]
    pairs = Dataset.from_dict({"prompt": chats, "completion": chats[::-1]})
    columns = {"prompt_column": "prompt", "completion_column": "completion"}
    tokens = Dataset.from_dict({"input_ids": [[20, 21, 22, 23]] * long + [[20]]})
    packed = packer(tmp_path, tokenizer, tokens_column="input_ids", packed=True)
    packed.encoder.packed_length = 4
    for rows, lenient, strict in (
        (pairs, packer(tmp_path, tokenizer, **columns), packer(tmp_path, tokenizer, **columns, loss_on="completion")),
        (tokens, packer(tmp_path, tokenizer, tokens_column="input_ids"), packed),
    ):
        lenient.pack_documents(rows, 4)
        lenient.hash_documents(rows)
        with pytest.raises(ValueError, match=rf"row {long}\b"):
            strict.hash_documents(rows)


def test_a_null_row_of_tokens_is_named(tmp_path: Path) -> None:
    """The numpy format fails if the first row of a batch is null."""
    for place in (0, 5):
        rows = [[20, 21]] * 5
        rows.insert(place, None)
        documents = Dataset.from_dict({"input_ids": rows}).with_format("numpy")
        with pytest.raises(ValueError, match=rf"tokens_column: row {place} holds None"):
            packer(tmp_path, tiny_tokenizer(), tokens_column="input_ids").hash_documents(documents)


def test_the_fingerprint_is_of_what_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer(["the fox"], truncation=True, max_length=1, padding=True)
    assert tokenizer_fingerprint(tokenizer) == fingerprint == tokenizer_fingerprint(tiny_tokenizer())
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == fingerprint
    assert tokenizer_fingerprint(tiny_tokenizer("hello world")) != fingerprint
    tokenizer.eos_token = "a"
    assert tokenizer_fingerprint(tokenizer) != fingerprint


def test_the_fingerprint_of_a_slow_tokenizer_survives_saving(tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["Zürich"])
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) != tokenizer_fingerprint(tokenizer)


def test_the_fingerprint_has_the_tokens_that_the_template_names() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    prints = []
    for tokenizer.bos_token in ("the", "fox"):
        prints.append(tokenizer_fingerprint(tokenizer))
    assert prints[0] != prints[1]
    tokenizer.pad_token = "fox"
    assert tokenizer_fingerprint(tokenizer) == prints[1]


@pytest.mark.parametrize("docs", [["the fox jumps " * 90], ["the fox " * 12, "dog " * 3] * 40])
def test_a_call_of_the_tokenizer_gets_a_bounded_text(tmp_path: Path, monkeypatch: Any, docs: list[str]) -> None:
    tokenizer, sizes = tiny_tokenizer(), []
    stream = flat(tokenizer, docs)
    call = PreTrainedTokenizerFast.__call__

    def noting(self: Any, texts: list[str], **options: Any) -> Any:
        sizes.append(sum(map(len, texts)))
        return call(self, texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", noting)
    monkeypatch.setattr("hf_nexus.mixture.documents.SEGMENT", 100)
    rows = packer(tmp_path, tokenizer).pack_documents(Dataset.from_dict({"text": docs}), 16)
    assert tokens_of(rows) == stream[: len(rows) * 16]
    assert max(sizes) <= 100 and len(sizes) < 3 * sum(map(len, docs)) / 100


def test_batches_of_long_documents_are_smaller(tmp_path: Path, monkeypatch: Any) -> None:
    batches = []
    documents_of = DocumentEncoder.documents

    def noting(self: Any, batch: Any, first_row: int) -> list[Any]:
        found = documents_of(self, batch, first_row)
        batches.append(sum(len(document.text) for document in found))
        return found

    monkeypatch.setattr(DocumentEncoder, "documents", noting)
    monkeypatch.setattr("hf_nexus.mixture.packing.BYTES_PER_BATCH", 5000)
    packer(tmp_path).pack_documents(Dataset.from_dict({"text": ["the fox " * 100] * 90}), 16)
    assert max(batches) <= 5000 and len(batches) <= 20
