"""Structured records: what is written parses, and its figures agree."""

import csv
import io
import itertools
import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from hf_nexus.mixture.builtin.generated import records
from hf_nexus.mixture.builtin.generated.common import Problem

from ...support.generated_text import written


def parse(suffix: str, body: str) -> list[dict[str, str]]:
    """The rows of a table, everything as text."""
    rows: Any
    if suffix == "csv":
        rows = list(csv.DictReader(io.StringIO(body)))
    elif suffix == "json":
        (rows,) = json.loads(body).values()
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in body.splitlines()]
    elif suffix == "yaml":
        (rows,) = yaml.safe_load(body).values()
    elif suffix == "xml":
        rows = [row.attrib for row in ElementTree.fromstring(body)]
    elif suffix == "md":
        head, _, *lines = [line.strip("| ").split(" | ") for line in body.splitlines()]
        rows = [dict(zip(head, line, strict=True)) for line in lines]
    elif suffix == "sql":
        head = re.search(r"\((.*)\) VALUES", body)[1].split(", ")
        lines = [re.findall(r"'([^']*)'|([^', ()]+)", line.rstrip(";,")) for line in body.splitlines()[1:]]
        rows = [dict(zip(head, (a or b for a, b in line), strict=True)) for line in lines]
    else:
        assert suffix == "log", suffix
        lines = [re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', line) for line in body.splitlines()]
        rows = [{key: a or b for key, a, b in line} for line in lines]
    return [{key: str(item) for key, item in row.items()} for row in rows]


@pytest.mark.parametrize("problem", records.PROBLEMS)
def test_records_parse_and_their_summaries_and_columns_agree(problem: Problem) -> None:
    seen = set()
    for text in written(problem, 120):
        title, body, end = text.split("\n", 1)[0], text.split("\n", 1)[1].rsplit("\n", 1)[0], text.rsplit("\n", 1)[1]
        name, suffix = title.split(".")
        rows, summary = parse(suffix, body), json.loads(end)
        measured = [int(row[summary["column"]]) for row in rows]
        found = {"rows": len(rows), "sum": sum(measured), "min": min(measured), "max": max(measured)}
        assert summary == {"table": name, "column": summary["column"], **found}, text
        if name == "orders":
            assert all(int(row["quantity"]) * int(row["cents"]) == int(row["total"]) for row in rows), text
        if name == "account":
            pairs = itertools.pairwise(rows)
            assert all(int(a["balance"]) + int(b["amount"]) == int(b["balance"]) for a, b in pairs), text
        if name == "trains":
            at = [[60 * int(row[key][:2]) + int(row[key][3:]) for key in ("departs", "arrives")] for row in rows]
            assert [end - start for start, end in at] == measured and at == sorted(at), text
        seen.add(suffix)
    assert seen == {"csv", "json", "jsonl", "yaml", "md", "xml", "sql", "log"}
