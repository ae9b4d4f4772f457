"""Structured records: invented tables as CSV, JSON, YAML, Markdown, XML, SQL or log lines, each with a summary."""

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from . import words
from .common import Problem, invented, people, place

Value = str | int | float
Row = dict[str, Value]


@dataclass(frozen=True)
class Table:
    """Rows with the same columns, and the numeric column that a summary is about."""

    name: str
    rows: list[Row]
    measure: str


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1995, 2029)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _orders(rng: random.Random, count: int) -> Table:
    rows: list[Row] = []
    for number in range(count):
        quantity, cents = rng.randint(1, 40), rng.randint(50, 9000)
        rows.append({
            "order": f"{rng.choice('ABCDEFGH')}-{1000 * rng.randint(1, 99) + number}",
            "customer": f"{people(rng, 1)[0]} {invented(rng)}",
            "city": place(rng),
            "item": rng.choice(words.GOODS),
            "quantity": quantity,
            "cents": cents,
            "total": quantity * cents,
        })  # fmt: skip
    return Table("orders", rows, "total")


def _staff(rng: random.Random, count: int) -> Table:
    offices = rng.sample([place(rng) for _ in range(5)], 3)
    teams = ("accounts", "design", "kitchen", "legal", "research", "sales", "security", "transport", "workshop")
    rows: list[Row] = [
        {
            "id": rng.randint(100, 9999),
            "name": name,
            "surname": invented(rng),
            "team": rng.choice(teams),
            "office": rng.choice(offices),
            "since": _date(rng),
            "salary": 50 * rng.randint(400, 2400),
        }
        for name in people(rng, count)
    ]
    return Table("staff", rows, "salary")


def _weather(rng: random.Random, count: int) -> Table:
    station, day, start = place(rng), _date(rng), rng.randint(0, 12)
    temperature = rng.randint(-150, 300)
    rows: list[Row] = []
    for hour in range(start, start + count):
        temperature += rng.randint(-18, 20)
        sky = rng.choice(("clear", "cloudy", "fog", "hail", "rain", "snow", "sunny", "thunder"))
        wind, direction = rng.randint(0, 90), rng.choice(("N", "NE", "E", "SE", "S", "SW", "W", "NW"))
        rows.append({"station": station, "time": f"{day}T{hour:02d}:00", "celsius": temperature / 10, "sky": sky,
                     "wind": wind, "direction": direction, "humidity": rng.randint(20, 100)})  # fmt: skip
    return Table("weather", rows, "humidity")


def _books(rng: random.Random, count: int) -> Table:
    kinds = ("atlas", "biography", "chronicle", "cookbook", "dictionary", "essay", "fable", "grammar", "novel", "poem")
    rows: list[Row] = [
        {
            "shelf": f"{rng.choice('KLMNPQ')}{rng.randint(1, 99)}",
            "title": f"The {rng.choice(kinds)} of {place(rng)}",
            "author": f"{name} {invented(rng)}",
            "year": rng.randint(1780, 2024),
            "pages": rng.randint(40, 1200),
            "on loan": rng.choice(("yes", "no")),
        }
        for name in people(rng, count)
    ]
    return Table("books", rows, "pages")


def _trains(rng: random.Random, count: int) -> Table:
    line, stop, minute = f"{rng.choice(('IC', 'RE', 'S'))} {rng.randint(1, 999)}", place(rng), rng.randint(240, 800)
    rows: list[Row] = []
    for _ in range(count):
        ride, target = rng.randint(4, 55), place(rng)
        arrival = minute + ride
        departs, arrives = f"{minute // 60:02d}:{minute % 60:02d}", f"{arrival // 60:02d}:{arrival % 60:02d}"
        rows.append({"train": line, "origin": stop, "target": target, "departs": departs, "arrives": arrives,
                     "minutes": ride})  # fmt: skip
        minute, stop = arrival + rng.randint(1, 6), target
    return Table("trains", rows, "minutes")


def _account(rng: random.Random, count: int) -> Table:
    balance, year, day = rng.randint(1000, 90000), rng.randint(1995, 2029), rng.randint(1, 100)
    rows: list[Row] = []
    for _ in range(count):
        amount = rng.choice((-1, -1, 1)) * rng.randint(10, 9000)
        balance += amount
        day += rng.randint(1, 9)
        party = f"{invented(rng)} {rng.choice(('Ltd', 'and Sons', 'Works'))}"
        purpose = rng.choice(("fee", "gift", "groceries", "insurance", "interest", "refund", "rent", "tax", "wages"))
        rows.append({"day": f"{year}/{day:03d}", "party": party, "purpose": purpose, "amount": amount,
                     "balance": balance})  # fmt: skip
    return Table("account", rows, "amount")


def _machines(rng: random.Random, count: int) -> Table:
    site, net = place(rng).lower(), f"10.{rng.randint(0, 255)}.{rng.randint(0, 255)}"
    jobs = ("archive", "cache", "database", "gateway", "mail", "printer", "proxy", "queue", "search", "storage")
    rows: list[Row] = [
        {
            "host": f"{job}{rng.randint(1, 40)}.{site}",
            "address": f"{net}.{rng.randint(2, 254)}",
            "port": rng.choice((22, 25, 53, 80, 443, 5432, 6379, 8080, 9200)),
            "state": rng.choice(("up", "up", "up", "slow", "down")),
            "load": rng.randint(0, 400) / 100,
            "uptime": rng.randint(1, 90000),
        }
        for job in rng.sample(jobs, min(count, len(jobs)))
    ]
    return Table("machines", rows, "uptime")


def as_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, table.rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return out.getvalue().rstrip()


def as_json(table: Table) -> str:
    return json.dumps({table.name: table.rows}, indent=1)


def as_json_lines(table: Table) -> str:
    return "\n".join(json.dumps(row) for row in table.rows)


def as_yaml(table: Table) -> str:
    lines = [f"{table.name}:"]
    for row in table.rows:
        entries = [f"{key}: {json.dumps(value)}" for key, value in row.items()]
        lines += ["  - " + entries[0], *("    " + entry for entry in entries[1:])]
    return "\n".join(lines)


def as_markdown(table: Table) -> str:
    lines = [list(table.rows[0]), ["---"] * len(table.rows[0]), *(row.values() for row in table.rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def as_xml(table: Table) -> str:
    rows = (" ".join(f'{key.replace(" ", "-")}="{value}"' for key, value in row.items()) for row in table.rows)
    return f"<{table.name}>\n" + "\n".join(f"  <row {row}/>" for row in rows) + f"\n</{table.name}>"


def as_sql(table: Table) -> str:
    columns = ", ".join(key.replace(" ", "_") for key in table.rows[0])
    rows = (", ".join(f"'{v}'" if isinstance(v, str) else str(v) for v in row.values()) for row in table.rows)
    return f"INSERT INTO {table.name} ({columns}) VALUES\n" + ",\n".join(f"({row})" for row in rows) + ";"


def as_log(table: Table) -> str:
    def entries(row: Row) -> str:
        return " ".join(f"{key.replace(' ', '_')}={json.dumps(value)}" for key, value in row.items())

    return "\n".join(f"[{table.name} {number}] {entries(row)}" for number, row in enumerate(table.rows, 1))


def summary(table: Table) -> str:
    """The number of rows and the sum, least and greatest of the measure, as JSON."""
    values = [int(row[table.measure]) for row in table.rows]
    figures = {"rows": len(values), "sum": sum(values), "min": min(values), "max": max(values)}
    return json.dumps({"table": table.name, "column": table.measure, **figures})


_FORMATS: tuple[tuple[str, Callable[[Table], str]], ...] = (
    ("csv", as_csv), ("json", as_json), ("jsonl", as_json_lines), ("yaml", as_yaml),
    ("md", as_markdown), ("xml", as_xml), ("sql", as_sql), ("log", as_log),
)  # fmt: skip


def _problem(make: Callable[[random.Random, int], Table]) -> Problem:
    def write(rng: random.Random) -> str:
        table = make(rng, rng.randint(3, 7))
        suffix, render = rng.choice(_FORMATS)
        return f"{table.name}.{suffix}\n{render(table)}\n{summary(table)}"

    return write


PROBLEMS = tuple(_problem(make) for make in (_orders, _staff, _weather, _books, _trains, _account, _machines))
