"""Invented tables in several formats, each followed by a summary of its last column as JSON."""

import json
import random
from collections.abc import Callable
from typing import Any

from .templates import Problem, draw, fill, setting, templates

Row = dict[str, str | int | float]


def _csv(name: str, rows: list[Row]) -> str:
    return "\n".join(",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows)))


def _json(name: str, rows: list[Row]) -> str:
    return json.dumps({name: rows}, indent=1)


def _yaml(name: str, rows: list[Row]) -> str:
    entries = ("\n    ".join(f"{key}: {json.dumps(value)}" for key, value in row.items()) for row in rows)
    return "\n".join([f"{name}:", *(f"  - {entry}" for entry in entries)])


def _markdown(name: str, rows: list[Row]) -> str:
    lines = (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _sql(name: str, rows: list[Row]) -> str:
    entries = (", ".join(f"'{v}'" if isinstance(v, str) else str(v) for v in row.values()) for row in rows)
    return f"INSERT INTO {name} ({', '.join(rows[0])}) VALUES\n" + ",\n".join(f"({entry})" for entry in entries) + ";"


def _log(name: str, rows: list[Row]) -> str:
    entries = (" ".join(f"{key}={json.dumps(value)}" for key, value in row.items()) for row in rows)
    return "\n".join(f"[{name} {number}] {entry}" for number, entry in enumerate(entries, 1))


_FORMATS: dict[str, Callable[[str, list[Row]], str]]
_FORMATS = {"csv": _csv, "json": _json, "yaml": _yaml, "md": _markdown, "sql": _sql, "log": _log}


def _typed(text: str) -> str | int | float:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _table(name: str, header: str, text: str) -> Problem:
    """
    The header is drawn for each row, and the text holds the columns and their templates. `home`, `label` and `state`
    belong to the table. A row may change the state that the previous row left.
    """
    columns, cells = text.split("\n")

    def write(rng: random.Random) -> str:
        names: dict[str, Any] = {"label": rng.randint(1, 250), "state": rng.randint(60, 300)}
        names["home"] = setting(rng)["town"]
        rows: list[Row] = []
        for _ in range(rng.randint(3, 7)):
            names |= setting(rng)
            draw(header, names, rng)
            row = map(_typed, fill(cells, names, rng).split(" | "))
            rows.append(dict(zip(columns.split(" | "), row, strict=True)))
        last = list(rows[0])[-1]
        values = [int(row[last]) for row in rows]
        numbers = {"rows": len(rows), "sum": sum(values), "min": min(values), "max": max(values)}
        summary = json.dumps({"table": name, "column": last, **numbers})
        suffix = rng.choice(list(_FORMATS))
        return f"{name}.{suffix}\n{_FORMATS[suffix](name, rows)}\n{summary}"

    return write


PROBLEMS: dict[str, Problem] = {table[0]: _table(*table) for table in templates("records")}
