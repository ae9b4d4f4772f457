"""Which tasks a list of names means."""

import importlib.util
from pathlib import Path

import pytest

from hf_nexus.evaluation.lm_eval.tasks import QUICK, SUITE, Task, select_tasks


def test_the_suite_leaves_out_tasks_that_execute_code():
    tasks, left_out = select_tasks(["paper"])
    assert [task.name for task in tasks] == ["gsm8k", "minerva_math", "mmlu", "bbh", "gpqa_main_zeroshot"]
    assert left_out == ["humaneval", "mbpp"]
    everything, nothing = select_tasks(["paper"], allow_code_execution=True)
    assert [task.benchmark for task in everything] == list(SUITE.values()) and not nothing


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_a_task_that_executes_code_needs_permission(name):
    with pytest.raises(ValueError, match="--allow-code-execution"):
        select_tasks([name])
    assert select_tasks([name], allow_code_execution=True)[0][0].name == name


def test_limits_of_the_quick_set_and_of_others():
    limits = {task.benchmark: task.limit for task in select_tasks(["quick"])[0]}
    assert limits == {SUITE[key]: limit for key, limit in QUICK.items()}
    assert {task.limit for task in select_tasks(["quick"], limit=3)[0]} == {3}
    assert select_tasks(["gsm8k"])[0][0].limit is None


def test_names_are_those_of_the_suite_or_of_lm_eval():
    assert select_tasks(["math"]) == select_tasks(["minerva_math"])
    assert select_tasks(["hellaswag"])[0] == [Task("hellaswag")]
    with pytest.raises(ValueError, match="minerva_math"):
        select_tasks(["math", "quick"])


@pytest.mark.parametrize("name", [*SUITE, *(benchmark.task for benchmark in SUITE.values())])
def test_a_folder_does_not_hide_a_benchmark(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    (tmp_path / name / "own.yaml").write_text("task: own\n")
    monkeypatch.chdir(tmp_path)
    assert select_tasks([name], allow_code_execution=True)[0][0].benchmark in SUITE.values()


def test_an_empty_name_is_not_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("task: own\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="have an empty name"):
        select_tasks(["gsm8k", ""])


def test_tasks_are_read_from_files_and_folders(tmp_path):
    (tmp_path / "a.yaml").write_text("task: first\nprocess_docs: !function utils.clean\n")
    (tmp_path / "b.yaml").write_text("task: second\nunsafe_code: true\n")
    (tmp_path / "_part.yaml").write_text("metric_list: []\n")
    (tmp_path / "group.yaml").write_text("group: both\ntask: [first, gsm8k]\n")
    assert select_tasks([str(tmp_path / "a.yaml")])[0] == [
        Task("first", None, tmp_path / "a.yaml", needs_defaults=False)
    ]
    with pytest.raises(ValueError, match=r"second executes code.*--allow-code-execution"):
        select_tasks([str(tmp_path)])
    assert [task.name for task in select_tasks([str(tmp_path)], allow_code_execution=True)[0]] == ["first", "second"]
    assert select_tasks([str(tmp_path / "group.yaml")])[0][0].needs_defaults
    (tmp_path / "nested.yaml").write_text("[" * 10_000)
    for bad in ("_part.yaml", "none.yaml", "nested.yaml"):
        with pytest.raises(ValueError, match=bad):
            select_tasks([str(tmp_path / bad)])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install '.[eval]'")
def test_the_suite_matches_the_installed_lm_eval():
    """Names, metrics, filters, datasets and code execution in its task files."""
    import lm_eval

    folder, index = Path(lm_eval.__file__).parent / "tasks", {}
    for name in (
        "gsm8k",
        "minerva_math",
        "mmlu/default",
        "bbh/cot_fewshot",
        "humaneval",
        "mbpp",
        "gpqa/zeroshot",
        "benchmarks",
    ):
        for path in folder.glob(f"{name}/*.yaml"):
            config = load(path)
            index |= {config[key]: config for key in ("tag", "task", "group") if isinstance(config.get(key), str)}
    for entry in SUITE.values():
        leaf = index[entry.task]
        while isinstance(leaf.get("task"), list):
            first = leaf["task"][0]
            leaf = index[first if isinstance(first, str) else first["task"]]
        assert leaf["dataset_path"] == entry.dataset
        assert bool(leaf.get("unsafe_code")) == entry.runs_code
        metric, kind = entry.metric.split(",")
        filters = [row["name"] for row in leaf.get("filter_list", [])] or ["none"]
        assert kind in filters
        metrics = [row["metric"] for row in leaf["metric_list"]]
        assert metric in metrics or (entry.runs_code and metric.startswith("pass"))


def load(path):
    """A task file and the files that it includes."""
    from hf_nexus.evaluation.lm_eval.tasks import _read

    config = _read(path)
    include = config.pop("include", None)
    return config if include is None else load(path.parent / include) | config
