"""Records: every table parses, and its columns and its summary agree."""

import csv
import io
import itertools
import json
import re
from typing import Any

import pytest
import yaml

from ....support.builtin_text.records import PROBLEMS
from ....support.generated_text import written


def parse(suffix: str, body: str) -> list[dict[str, str]]:
    """The rows of a table, with every value as text."""
    rows: Any
    if suffix == "csv":
        rows = list(csv.DictReader(io.StringIO(body)))
    elif suffix == "json":
        (rows,) = json.loads(body).values()
    elif suffix == "yaml":
        (rows,) = yaml.safe_load(body).values()
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


def minutes(time: str) -> int:
    hour, minute = time.split(":")
    return 60 * int(hour) + int(minute)


@pytest.mark.parametrize("name", PROBLEMS)
def test_records_parse_and_their_summaries_and_columns_agree(name):
    seen = set()
    for text in written(PROBLEMS[name]):
        title, *body, end = text.splitlines()
        suffix = title.removeprefix(f"{name}.")
        rows, summary = parse(suffix, "\n".join(body)), json.loads(end)
        last = list(rows[0])[-1]
        values = [int(row[last]) for row in rows]
        found = {"rows": len(rows), "sum": sum(values), "min": min(values), "max": max(values)}
        assert summary == {"table": name, "column": last, **found}, text
        if name == "orders":
            assert values == [int(row["quantity"]) * int(row["price"]) for row in rows], text
        if name == "accounts":
            pairs = itertools.pairwise(rows)
            assert all(int(a["balance"]) + int(b["amount"]) == int(b["balance"]) for a, b in pairs), text
        if name == "trains":
            times = [minutes(row[key]) for row in rows for key in ("depart", "arrive")]
            assert times == sorted(times), text
            assert [end - start for start, end in zip(times[::2], times[1::2], strict=True)] == values, text
        seen.add(suffix)
    assert seen == {"csv", "json", "yaml", "md", "sql", "log"}
