"""Whatever YAML, a command line or a mixture hold: the only error is a `ValueError` of one line."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_nexus.mixture.config import MixtureConfig, SourceConfig
from hf_nexus.pretrain.fields import SECTIONS
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.plan import plan_run
from hf_nexus.strict import field_types, parse_yaml

SCALARS: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 1000, 2**31, 2**63, 10**20, 10**400, -(10**30)),
    *(0.5, -0.5, 1.0, 1e-320, 1e300, float("inf"), float("nan")),
    *("", " ", "none", "no", "train", "builtin/code", "x" * 300, "é\u2028", "{", "a\nb", "1e5", "auto", "../..", "~x"),
]
PIECES = [*"[]{}:,-?*&!|>'\"#%@` \n\t\0", "<<: *a", "&a ", "*a", "!!float ", "!!python/object:x ", "- ", "? ", "a: "]
PIECES += ['"\\UFFFFFFFF"', "0x" + "f" * 999, "9" * 5000, "2024-13-99", "1:99:99", "---\n", "1e999", "sources", "é"]
# Fields that start something or read files of the machine.
LEFT_OUT = {"deepspeed", "torch_compile", "torch_compile_backend", "torch_compile_mode", "output_dir"}


def odd(rng: random.Random, depth: int = 0) -> Any:
    """A value that no field expects, or a plain one."""
    kind = rng.random()
    if depth > 2 or kind < 0.7:
        return rng.choice(SCALARS)
    if kind < 0.85:
        return [odd(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice(["a", "until", "weights", "path", ""]): odd(rng, depth + 1) for _ in range(2)}


def changed(rng: random.Random, fields: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return fields | {rng.choice(names): odd(rng) for _ in range(rng.randrange(1, 3))}


def read_yaml_text(rng: random.Random, folder: Path) -> None:
    """Pieces of YAML in disorder, alone or inside a configuration."""
    text = yaml.safe_dump({"data": odd(rng), "training": {"a": odd(rng)}}) if rng.random() < 0.5 else ""
    for piece in rng.choices(PIECES, k=rng.randrange(1, 4 if text else 40)):
        place = rng.randrange(len(text) + 1)
        text = text[:place] + piece + text[place:]
    parse_yaml(text, "odd.yaml")


def build_mixture(rng: random.Random, folder: Path) -> None:
    sources = {name: {"path": f"{name}.jsonl", "tokens": 1000} for name in "ab"}
    sources["a"] = changed(rng, sources["a"], list(field_types(SourceConfig)))
    mapping = (
        changed(rng, {"sources": sources}, list(field_types(MixtureConfig)))
        if rng.random() < 0.5
        else {"sources": sources}
    )
    config = MixtureConfig.from_dict(mapping)
    config.weights(dict.fromkeys(config.train_sources, 1000))


def plan(rng: random.Random, folder: Path) -> None:
    """Odd values in a file and on the command line."""
    config: dict[str, Any] = {
        "model": {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
        "data": {"sources": {"code": {"path": "builtin/code", "tokens": 10**6}}},
        "training": {"report_to": "none", "max_steps": 3, "output_dir": "out"},
    }
    names = {section: [name for name in field_types(cls) if name not in LEFT_OUT] for section, cls in SECTIONS.items()}
    section, flags = rng.choice(list(SECTIONS)), []
    if rng.random() < 0.7:
        config[section] = changed(rng, config[section], names[section])
    else:
        flags = [f"--{rng.choice(names[section])}", *map(str, rng.choices(SCALARS[:-1], k=rng.randrange(2)))]
    file = folder / "odd.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    argv = ["--config", str(file), "--dry_run", *flags]
    plan_run(parse_arguments(argv), 1)


def fuzz(attempt: Callable[[random.Random, Path], None], count: int, folder: Path) -> int:
    """The number of inputs that are accepted. All others must end in the documented error."""
    accepted = 0
    for seed in range(count):
        try:
            with warnings.catch_warnings(action="ignore"):
                attempt(random.Random(seed), folder)
            accepted += 1
        except (ValueError, OSError, ImportError) as error:
            assert len(str(error)) < 3000, f"seed {seed}: {str(error)[:300]}"
        except Exception as error:
            raise AssertionError(f"seed {seed} ended in {error!r}") from error
    return accepted


@pytest.mark.parametrize(("attempt", "count"), [(read_yaml_text, 500), (build_mixture, 300), (plan, 30)])
def test_odd_input_ends_in_the_documented_error(tmp_path, attempt, count) -> None:
    assert 0 < fuzz(attempt, count, tmp_path) < count


@pytest.mark.slow
@pytest.mark.parametrize(("attempt", "count"), [(read_yaml_text, 4500), (build_mixture, 4500), (plan, 1000)])
def test_ten_thousand_odd_inputs_end_in_the_documented_error(tmp_path, attempt, count) -> None:
    assert 0 < fuzz(attempt, count, tmp_path) < count
