"""The plan of a mixture: the tokens from each source, and limits that cannot be met."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hf_nexus.mixture.plan import mixture_plan
from hf_nexus.mixture.plan_tables import plan_table, stage_table


def test_epochs_are_tokens_seen_over_size() -> None:
    web, code = mixture_plan({"web": 800, "code": 100}, {"web": 0.8, "code": 0.2}, 1000, {"web": None, "code": 2})
    assert (web.train_tokens, web.epochs, web.share) == (800, 1.0, 0.8)
    assert (code.train_tokens, code.epochs, code.max_epochs) == (200, 2.0, 2)


def test_weights_need_not_sum_to_one() -> None:
    assert mixture_plan({"a": 10, "b": 10}, {"a": 3, "b": 1}, 40) == mixture_plan(
        {"a": 10, "b": 10}, {"a": 0.75, "b": 0.25}, 40
    )


sources = st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(1, 10**9), st.floats(0.01, 1)), min_size=1)


@given(sources, st.integers(1, 10**10))
def test_all_tokens_of_the_run_are_accounted_for(sources: dict[str, tuple[int, float]], total: int) -> None:
    rows = mixture_plan({n: s for n, (s, _) in sources.items()}, {n: w for n, (_, w) in sources.items()}, total)
    assert sum(row.train_tokens for row in rows) == total
    assert all(row.train_tokens == pytest.approx(row.share * total, abs=1.01) for row in rows)
    assert sum(row.share for row in rows) == pytest.approx(1)


def test_exceeded_max_epochs_name_the_key_and_usable_numbers() -> None:
    tokens, weights, caps = {"web": 8000, "code": 1000}, {"web": 0.5, "code": 0.5}, {"code": 3.0, "web": None}
    with pytest.raises(
        ValueError, match=r"^sources\.code\.max_epochs: .*1,000 tokens 5 times, but at most 3 is allowed"
    ) as e:
        mixture_plan(tokens, weights, 10_000, caps)
    weight = float(re.search(r"sources\.code\.weight to at most ([\d.]+)", str(e.value))[1])
    fewer = int(re.search(r"train for at most ([\d,]+)", str(e.value))[1].replace(",", ""))
    assert (weight, fewer) == (0.3, 6000)
    mixture_plan(tokens, {"web": 1 - weight, "code": weight}, 10_000, caps)
    mixture_plan(tokens, weights, fewer, caps)


def test_max_epochs_that_no_weights_can_meet_say_so() -> None:
    with pytest.raises(ValueError, match="together allow 300 tokens with any weights") as error:
        mixture_plan({"a": 100, "b": 50}, {"a": 0.5, "b": 0.5}, 1000, {"a": 2, "b": 2})
    assert "weight to at most" not in str(error.value)


def test_max_epochs_reached_exactly_are_allowed() -> None:
    # 2.1 / (0.9 + 2.1) * 1000 / 700 is 1.0000000000000002 in floating point.
    rows = mixture_plan({"a": 300, "b": 700}, {"a": 0.9, "b": 2.1}, 1000, {"a": 1.0, "b": 1.0})
    assert [row.epochs for row in rows] == pytest.approx([1, 1])


def test_sizes_and_weights_must_be_of_the_same_sources() -> None:
    with pytest.raises(ValueError, match="weights name b, but the training sources are a"):
        mixture_plan({"a": 1}, {"b": 1.0}, 10)


# ---- Stages ----

STAGES = [(0, {"web": 0.9, "code": 0.1}), (8000, {"web": 0.5, "code": 0.5})]


def test_a_staged_run_adds_up_over_its_stages() -> None:
    web, code = mixture_plan({"web": 16_400, "code": 1000}, STAGES, 10_000)
    assert (web.stage_tokens, web.train_tokens, web.share, web.epochs) == ((7200, 1000), 8200, 0.82, 0.5)
    assert (code.stage_tokens, code.train_tokens, code.epochs) == ((800, 1000), 1800, 1.8)
    assert code.stage_shares == (0.1, 0.5) and code.epochs_of(code.stage_tokens[0]) == 0.8


def test_stages_of_the_same_weights_are_no_stages() -> None:
    tokens, weights = {"a": 300, "b": 700}, {"a": 0.25, "b": 0.75}
    (a, b), whole = mixture_plan(tokens, [(0, weights), (400, weights)], 1000), mixture_plan(tokens, weights, 1000)
    assert [(r.share, r.train_tokens, r.epochs) for r in (a, b)] == [
        (r.share, r.train_tokens, r.epochs) for r in whole
    ]


def test_a_stage_after_the_end_of_the_run_takes_nothing() -> None:
    web, code = mixture_plan({"web": 100, "code": 100}, STAGES, 5000)
    assert (web.stage_tokens, code.stage_tokens) == ((4500, 0), (500, 0))


def test_max_epochs_hold_for_all_stages_together() -> None:
    tokens, caps = {"web": 16_400, "code": 1000}, {"web": None, "code": 1.7}
    with pytest.raises(ValueError, match=r"^sources\.code\.max_epochs: .* 1\.8 times, but at most 1\.7 is") as error:
        mixture_plan(tokens, STAGES, 10_000, caps)
    assert "Lower its weights in the stages, to at most 0.17 of all tokens" in str(error.value)
    mixture_plan(tokens, STAGES, 10_000, {"code": 1.8})


def test_max_epochs_without_a_known_size_are_left_to_training() -> None:
    web, code = mixture_plan({"web": 1000, "code": None}, {"web": 0.1, "code": 0.9}, 10_000, {"code": 1})
    assert (code.epochs, code.train_tokens, web.epochs) == (None, 9000, 1.0)
    with pytest.raises(ValueError, match=r"sources\.web\.max_epochs.*weight to at most 0\.05"):
        mixture_plan({"web": 1000, "code": None}, {"web": 0.1, "code": 0.9}, 10_000, {"web": 0.5, "code": 1})


def render(table: Any, width: int = 140) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_table_shows_every_source_and_the_total() -> None:
    rows = mixture_plan({"web": 8000, "code": 1000}, {"web": 0.8, "code": 0.2}, 10_000, {"web": None, "code": 4})
    text = render(
        plan_table(
            rows,
            licenses={"web": "odc-by", "code": None, "law": "mit"},
            ood_tokens={"law": 512, "med": None},
        )
    )
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert all(part in lines["web"] for part in ("train", "odc-by", "8,000", "80.0%", "1.00"))
    assert all(part in lines["code"] for part in ("train", "unknown", "1,000", "20.0%", "2,000", "2.00 (max 4)"))
    assert all(part in lines["law"] for part in ("ood", "mit", "512"))
    assert all(part in lines["med"] for part in ("ood", "unknown"))
    assert all(part in lines["total"] for part in ("9,000", "100.0%", "10.0k", "1.11"))


def test_no_number_is_cut_at_80_columns() -> None:
    tokens = {"english-web-pages-and-books": 1_300_000_000_000, "code": 1_730_000, "mathematics": 999_600}
    weights = {"english-web-pages-and-books": 0.99990, "code": 0.00007, "mathematics": 0.00003}
    caps = {"code": 4.0, "mathematics": 12.5, "english-web-pages-and-books": None}
    licenses = {"english-web-pages-and-books": "odc-by and others", "code": "apache-2.0", "law": "cc-by-nc-sa-4.0"}
    rows = mixture_plan(tokens, weights, 62_914_560_000, caps)
    lines = render(plan_table(rows, licenses=licenses, ood_tokens={"law": 10_000_000_000}), 80).splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    cells = [[cell.strip() for cell in line.split("│")[4:8]] for line in lines if line.startswith("│")]
    for numbers in (
        ["1.30T", "100.0%", "62.9B", "0.05"],
        ["1.73M", "0.0%", "4.40M", "2.55 (max 4)"],
        ["1.00M", "0.0%", "1.89M", "1.89 (max 12.5)"],
        ["10.0B", "", "", ""],
        ["1.30T", "100.0%", "62.9B", "0.05"],
    ):
        assert numbers in cells, numbers


def test_the_tables_show_stages_and_what_is_not_known() -> None:
    rows = mixture_plan({"web": None, "code": 1000}, STAGES, 10_000, {"web": 1, "code": 2})

    def cells(table: Any) -> list[list[str]]:
        lines = render(table, 80).splitlines()
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]

    assert cells(plan_table(rows)) == [
        ["web", "train", "", "unknown", "82.0%", "8,200", "unknown (max 1)"],
        ["code", "train", "", "1,000", "18.0%", "1,800", "1.80 (max 2)"],
        ["total", "train", "", "unknown", "100.0%", "10.0k", "unknown"],
    ]
    assert cells(stage_table(rows, ["steps 0 to 80", "steps 80 to 100"])) == [
        ["steps 0 to 80", "web", "90.0%", "7,200", "unknown"],
        ["", "code", "10.0%", "800", "0.80"],
        ["steps 80 to 100", "web", "50.0%", "1,000", "unknown"],
        ["", "code", "50.0%", "1,000", "1.00"],
    ]
