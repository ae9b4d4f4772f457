"""Losses are means over tokens on one and two ranks, whatever a loss function divides by."""

import pytest

from tests.trainer.distributed.training_losses_worker import KINDS, measure, right


@pytest.mark.parametrize("nexus", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_means_whatever_divides_them(two_ranks: list[dict], tmp_path, kind: str, nexus: bool) -> None:
    trained, held_out = right(kind, 8), right(kind, 7)
    expected = {"loss": trained[""], "loss/text": trained["text"], "loss/code": trained["code"]}
    expected |= {f"eval_{name}_loss": held_out[name] for name in ("text", "code")}
    assert measure(tmp_path, kind, nexus, 1) == pytest.approx(expected, rel=1e-5)
    for rank in two_ranks:
        assert rank["training_losses"][f"{kind}/{nexus}"] == pytest.approx(expected, rel=1e-5)
