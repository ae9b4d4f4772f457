"""The record of a run: refused if it is damaged."""

import json

import pytest

from hf_nexus.compare.records import RECORD_NAME, RunRecord
from tests.support.comparison import make_record


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda text: text[:40], "line"),
        (lambda text: "[]", "list"),
        (lambda text: "[" * 100_000, "recursion"),
        (lambda text: json.dumps({**json.loads(text), "newer": 1}), "newer"),
        (lambda text: text.replace('"curve"', '"curves"'), "it lacks 'curve'"),
        (lambda text: text.replace('"pairwise"', '"pairs"'), "it lacks 'pairwise'"),
        (lambda text: text.replace('"ood_loss"', '"ood"'), "ood"),
    ],
)
def test_a_damaged_record_is_named(damage, problem, tmp_path):
    path = make_record("nexus", 1).save(tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=rf"{RECORD_NAME} is not the record of a run: .*{problem}.*\. Restore it"):
        RunRecord.load(tmp_path)


def test_a_record_is_read_as_it_was_saved(tmp_path):
    record = make_record("nexus", 1)
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record
