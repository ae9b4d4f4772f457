"""Mixture weights become shares, and stages begin at whole outer steps."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nexus.mixture import MixtureConfig
from hf_nexus.mixture.stages import Stage, normalized, stage_borders


@given(st.dictionaries(st.text(), st.floats(0, 1e6), min_size=1).filter(lambda weights: sum(weights.values()) > 1e-3))
def test_shares_are_not_changed_by_normalizing_them_again(weights):
    shares = normalized(weights, list(weights))
    assert normalized(dict(zip(weights, shares, strict=True)), list(weights)).tolist() == shares.tolist()
    assert shares.sum() == pytest.approx(1, rel=1e-12)


def staged(*stages: Any, **more: Any) -> MixtureConfig:
    sources = {name: {"path": name, **more.pop(name, {})} for name in ("a", "b")}
    sources["c"] = {"path": "c", "role": "ood"}
    return MixtureConfig.from_dict({"sources": sources, "sequence_length": 8, "stages": list(stages), **more})


LAST = {"until": 1.0, "weights": {"a": 1, "b": 4}}


def test_the_last_stage_gives_the_weights() -> None:
    config = staged({"until": 0.8, "weights": {"b": 0, "a": 2}}, LAST)
    assert config.resolved_stages({}) == [Stage(0.8, {"a": 2.0, "b": 0.0}), Stage(1.0, {"a": 1.0, "b": 4.0})]
    assert config.weights({}) == {"a": 0.2, "b": 0.8}
    assert MixtureConfig(config.sources, 8, stages=config.stages) == config


@pytest.mark.parametrize(
    ("stages", "error"),
    [
        ([], r"stages: \[\] is not a list"),
        ([{"until": 0.5, "weights": {"a": 1, "b": 1}}], r"stages\[0\]\.until: 0\.5.*at 1\.0"),
        ([{"until": 1, "weights": {"a": 1, "b": 1}}, LAST], r"stages\[0\]\.until: 1\.0 .*only the last"),
        ([{"until": 0, "weights": {"a": 1, "b": 1}}, LAST], r"stages\[0\]\.until: 0 .*above"),
        ([{"until": 0.5, "weights": {"a": 1, "b": 1}}] * 2 + [LAST], r"stages\[1\]\.until: 0\.5 .*\(0\.5 here\)"),
        ([{"until": "1", "weights": {"a": 1, "b": 1}}], r"stages\[0\]\.until: '1'"),
        ([{"until": True, "weights": {"a": 1, "b": 1}}], r"stages\[0\]\.until: True"),
        ([{"untill": 1.0, "weights": {"a": 1, "b": 1}}], r"stages\[0\]\.untill: unknown key.*'until'"),
        ([{"until": 1.0}], r"stages\[0\]\.weights: missing"),
        ([{"until": 1.0, "weights": {"a": 1}}], r"stages\[0\]\.weights: .*sources are a, b"),
        ([{"until": 1.0, "weights": {"a": 1, "b": 1, "c": 1}}], r"stages\[0\]\.weights: .*sources are a, b"),
        ([{"until": 1.0, "weights": {"a": 1, "b": -1}}], r"stages\[0\]\.weights\.b: -1 "),
        ([{"until": 1.0, "weights": {"a": 0, "b": 0}}], r"stages\[0\]\.weights: all weights are 0"),
        ([{"until": 1.0, "weights": {"a": 1, "b": 0}}], r"stages: the source 'b' has no weight in any stage"),
    ],
)
def test_stages_that_make_no_sense_are_refused_by_name(stages: list, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        staged(*stages)


def test_stages_stand_in_for_weights_and_temperature() -> None:
    with pytest.raises(ValueError, match=r"sources\.b\.weight: it has no effect with stages"):
        staged(LAST, b={"weight": 1.0})
    with pytest.raises(ValueError, match="temperature: it has no effect"):
        staged(LAST, temperature=2.0)


def test_stages_begin_at_whole_outer_steps() -> None:
    stages = [Stage(0.1, {"a": 1.0}), Stage(0.8, {"a": 2.0}), Stage(1.0, {"a": 3.0})]
    assert stage_borders(stages, 44_000) == [(0, {"a": 1.0}), (4_400, {"a": 2.0}), (35_200, {"a": 3.0})]
    assert stage_borders(stages, 4) == [(0, {"a": 2.0}), (3, {"a": 3.0})]
    assert stage_borders([Stage(1.0, {"a": 1.0})], 1) == [(0, {"a": 1.0})]
