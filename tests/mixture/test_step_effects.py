"""Effects of a window, which count once its step was taken."""

import pytest

from hf_nexus.mixture.step_effects import StepEffects


@pytest.fixture
def applied() -> list[str]:
    return []


def begun(step: int, applied: list[str], *names: str) -> StepEffects:
    effects = StepEffects()
    effects.begin(step)
    for name in names:
        effects.add(lambda name=name: applied.append(name))
    return effects


def test_effects_wait_for_the_step_and_are_applied_once(applied):
    effects = begun(4, applied, "a", "b")
    effects.apply(4)
    assert applied == []
    effects.apply(5)
    effects.apply(6)
    assert applied == ["a", "b"]


def test_the_next_window_applies_those_of_the_last(applied):
    effects = begun(0, applied, "a")
    effects.begin(1)
    effects.apply(2)
    assert applied == ["a"]


def test_an_interrupted_window_has_no_effect(applied):
    effects = begun(3, applied, "interrupted")
    effects.begin(3)
    effects.add(lambda: applied.append("repeated"))
    effects.apply(4)
    assert applied == ["repeated"]
