"""What is read of data to compare it, and what is not."""

import random
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Value
from torch.utils.data import ConcatDataset, Subset

from hf_nexus.mixture import digest as digests
from hf_nexus.mixture.digest import digest, sample
from hf_nexus.mixture.state import compare_data

ROWS = Dataset.from_dict({"x": list(range(100)), "ids": [[i, None] for i in range(100)]})


@pytest.mark.parametrize(
    "view", [lambda t: t.T, lambda t: t[:, 0], lambda t: t[::2], lambda t: t[0].expand(3, 4), lambda t: t[0, 0]]
)
def test_tensors_of_any_layout_are_read(view):
    tensor = view(torch.arange(24.0).reshape(6, 4))
    assert digest(tensor) == digest(tensor.contiguous()) != digest(tensor.contiguous() + 1)


class Unreadable(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        raise AssertionError("read")


class Lazy(torch.utils.data.Dataset):
    """Rows of an archive that each process opens at its first row."""

    archive = None

    def __init__(self, path: Any):
        self.path = path
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(40):
                archive.writestr(str(i), f"{i}" * 2000)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        self.archive = self.archive or zipfile.ZipFile(self.path)
        return {"x": len(self.archive.read(str(i)))}


@pytest.mark.parametrize("wrapped", [lambda d: d, lambda d: Subset(d, [1, 2]), lambda d: ConcatDataset([d, d])])
def test_rows_of_other_datasets_are_not_read(tmp_path, wrapped):
    dataset = Lazy(tmp_path / "rows.zip")
    assert sample(wrapped(dataset)) is None and dataset.archive is None
    assert sample(wrapped(Unreadable())) is None


def test_random_states_are_not_touched():
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    drawing = ROWS.with_transform(lambda batch: {"y": torch.rand(len(batch["x"]))})
    assert sample(drawing) == sample(ROWS)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


def test_each_row_is_read_once(monkeypatch):
    read = []
    monkeypatch.setattr(digests, "_place", lambda dataset, number: read.append(number) or (dataset, number))
    assert sample(ROWS) and len(read) == len({*read}) == 32
    read.clear()
    assert sample(ROWS.select(range(3))) and read == [0, 1, 2]
    assert sample(ROWS.select([])) == sample([])


def test_a_sample_is_compared_with_another_only():
    for name in ("sample", "a"):
        one, none, other = (
            {"sample": value} if name == "sample" else {name: {"rows": 3, "sample": value}}
            for value in ("x", None, "y")
        )
        assert not compare_data(one, none) and not compare_data(none, one)
        assert compare_data(one, other)


@pytest.mark.parametrize("make", [torch.rand, lambda *shape: torch.rand(*shape, dtype=torch.bfloat16), np.random.rand])
def test_all_values_of_large_arrays_count(make):
    array = make(3, 200, 200)
    other = array.clone() if isinstance(array, torch.Tensor) else array.copy()
    assert digest({"x": array}) == digest({"x": other})
    other[1, 100, 100] += 1
    assert digest({"x": array}) != digest({"x": other})
    assert digest(array) != digest(array.reshape(200, 3, 200))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["ab", "c"], ["a", "bc"]),
        ([["a"], "b"], [["a", "b"]]),
        ("a", b"a"),
        (1, "1"),
        ([1, 2], [12]),
        (torch.tensor(1), torch.tensor(1.0)),
        (np.array(["a", None]), np.array(["b", None])),
        ({"a": 1}, {"a": 2}),
    ],
)
def test_different_data_has_different_hashes(one, other):
    assert digest(one) != digest(other)


def columns(kind: str) -> tuple[Dataset, Dataset]:
    """Two datasets whose middle row differs, and is otherwise the same."""
    arrays = np.random.default_rng(0).integers(0, 9, (40, 4, 4))
    others = arrays.copy()
    others[20:, 3, 3] += 1
    if kind == "arrays":
        features = Features({"x": Array2D((4, 4), "int64"), "y": Value("string")})
        return tuple(Dataset.from_dict({"x": a, "y": ["y"] * 40}, features) for a in (arrays, others))  # type: ignore
    cells = {
        "lists": lambda a: a.tolist(),
        "structs": lambda a: [{"a": "", "b": row[3].tolist()} for row in a],
        "bytes": lambda a: [row.tobytes() for row in a],
        "nulls": lambda a: [[None, int(row[3, 3])] for row in a],
        "bool": lambda a: [bool(row[3, 3] > others[20, 3, 3] - 1) for row in a],
    }[kind]
    return Dataset.from_dict({"x": cells(arrays)}), Dataset.from_dict({"x": cells(others)})


@pytest.mark.parametrize("kind", ["arrays", "lists", "structs", "bytes", "nulls", "bool"])
def test_columns_of_every_kind_are_compared(kind):
    one, other = columns(kind)
    assert sample(one) != sample(other)
    assert sample(one) == sample(one.select(range(40)).flatten_indices()) == sample(one.select([*range(40)]))
    assert sample(one.shuffle(seed=0)) == sample(one.shuffle(seed=0).flatten_indices())


def test_the_folder_of_an_image_does_not_count():
    def images(folder: str, name: str = "cat") -> Dataset:
        return Dataset.from_dict({"image": [{"bytes": None, "path": f"{folder}/{name}.png"}, None]})

    assert sample(images("/old")) == sample(images("/new")) != sample(images("/new", "dog"))
