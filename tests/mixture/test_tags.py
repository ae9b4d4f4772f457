"""Tags reach the trainer through the collator, and say where the rows of a micro-batch come from."""

import pytest
import torch

from hf_nexus.mixture.indexed import MixtureDataset
from hf_nexus.mixture.tags import MicroBatchTag, TaggingCollator, pop_tag


def test_a_micro_batch_carries_its_source_and_number_of_rows():
    dataset = MixtureDataset({"a": [{"x": 1}, {"x": 2}], "b": [{"x": 3}, {"x": 4}]})
    batch = TaggingCollator(lambda rows: {"x": [row["x"] for row in rows]})(dataset.__getitems__([3, 2]))
    assert pop_tag(batch) == MicroBatchTag({"b": 2}) and batch == {"x": [4, 3]}
    assert pop_tag(batch) is None and pop_tag(torch.zeros(2)) is None


def test_rows_of_several_sources_keep_their_order():
    rows = MixtureDataset({"a": [{"x": 1}, {"x": 2}], "b": [{"x": 3}, {"x": 4}]}).__getitems__([3, 0, 2])
    assert [row["x"] for row in rows] == [4, 1, 3] and rows.tag == MicroBatchTag({"b": 2, "a": 1})


def test_a_collator_that_returns_no_mapping_is_refused():
    dataset = MixtureDataset({"a": [{"x": 1}]})
    with pytest.raises(ValueError, match="returned a list"):
        TaggingCollator(lambda rows: rows)(dataset.__getitems__([0]))
