"""Benchmarks: what is run, in which process, what becomes of its scores, and of everything else when it fails."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_nexus.cli import benchmark as benchmarking
from hf_nexus.cli.benchmark import SCORES_NAME, benchmark, load_scores, record_scores
from hf_nexus.evaluation.lm_eval import models as benchmark_models
from hf_nexus.evaluation.lm_eval import runs as benchmark_runs
from hf_nexus.evaluation.lm_eval.benchmarks import QUICK, SUITE, Task, select_tasks
from hf_nexus.evaluation.lm_eval.models import model_arguments
from hf_nexus.evaluation.lm_eval.runs import run_tasks
from hf_nexus.evaluation.lm_eval.scores import Score, read_scores
from hf_nexus.hub.results import RESULTS_NAME, BenchmarkScore
from hf_nexus.hub.run_summary import RunSummary

from ..support.tiny import tiny_llama
from ..support.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
NEXUS = {"nexus": True, "inner_lr": 0.05, "inner_direction": "gradient", "gradient_accumulation_steps": 4}


def raw(task="gsm8k", key="exact_match,strict-match", value=0.412, shots=5, **more):
    """What lm-eval returns of a task, in as far as it is read."""
    metric, kind = key.split(",")
    row = {"alias": task, "sample_len": 10, key: value, f"{metric}_stderr,{kind}": 0.014}
    return {
        "results": {task: row},
        "configs": {task: {"dataset_path": "some/data"}},
        "n-shot": {task: shots},
        "date": 1.7e9,
        "lm_eval_version": "0.4.13",
    } | more


def score(task="gsm8k", value=41.2, limit=None, **more):
    fields = {"metric": "exact_match", "stderr": 1.4, "dataset": "openai/gsm8k", "task_id": None, "notes": "5-shot"}
    return Score(
        **({"task": task, "name": task, "value": value, "date": "2026-01-31", "limit": limit} | fields | more)
    )


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """`stand_in(code)`: what runs in place of lm-eval; `settings` and `succeed(results)` are there."""
    results = json.dumps(raw())
    head = f"""
import json, os, signal, subprocess, sys, time
settings = json.load(sys.stdin)
def succeed(results={results}):
    json.dump(results, open(settings["results"], "w"))
"""

    def write(code):
        path = tmp_path / "stand_in.py"
        path.write_text(head + textwrap.dedent(code))
        monkeypatch.setattr(benchmark_runs, "_CHILD", path)

    monkeypatch.setattr(benchmarking, "_require_lm_eval", lambda: None)
    return write


@pytest.fixture
def model(tmp_path):
    """A folder that passes for a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


GSM8K = Task("gsm8k", SUITE["gsm8k"])


def run_one(folder, task=GSM8K, **options):
    (outcome,) = run_tasks({"pretrained": "x"}, [task], folder, **options)
    return outcome


# ---- What is run ----


def test_the_papers_suite_leaves_code_out_unless_told_otherwise():
    tasks, left_out = select_tasks(["paper"])
    assert [task.name for task in tasks] == ["gsm8k", "minerva_math", "mmlu", "bbh", "gpqa_main_zeroshot"]
    assert left_out == ["humaneval", "mbpp"]
    everything, nothing = select_tasks(["paper"], allow_code_execution=True)
    assert [task.benchmark for task in everything] == list(SUITE.values()) and not nothing


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_naming_a_task_that_executes_code_needs_leave(name):
    with pytest.raises(ValueError, match="--allow-code-execution"):
        select_tasks([name])
    assert select_tasks([name], allow_code_execution=True)[0][0].name == name


def test_the_quick_set_is_limited_and_a_limit_is_passed_on():
    limits = {task.benchmark: task.limit for task in select_tasks(["quick"])[0]}
    assert limits == {SUITE[key]: limit for key, limit in QUICK.items()}
    assert {task.limit for task in select_tasks(["quick"], limit=3)[0]} == {3}
    assert select_tasks(["gsm8k"])[0][0].limit is None
    with pytest.raises(ValueError, match="limit=0"):
        select_tasks(["quick"], limit=0)


def test_names_of_the_suite_and_of_lm_eval_mean_the_same_and_others_pass():
    assert select_tasks(["math"]) == select_tasks(["minerva_math"])
    assert select_tasks(["hellaswag"])[0] == [Task("hellaswag")]
    with pytest.raises(ValueError, match="minerva_math"):
        select_tasks(["math", "quick"])


def test_task_files_and_folders(tmp_path):
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
    for bad in ("_part.yaml", "none.yaml"):
        with pytest.raises(ValueError, match=bad):
            select_tasks([str(tmp_path / bad)])


def test_a_folder_a_hub_model_and_an_adapter_are_loaded_as_what_they_are(tmp_path, model, monkeypatch):
    assert model_arguments(str(model), dtype="bfloat16") == {"pretrained": str(model), "dtype": "bfloat16"}
    monkeypatch.setattr(benchmark_models, "_fetch_adapter", lambda *args: None)
    assert model_arguments("org/model", "v1") == {"pretrained": "org/model", "revision": "v1", "dtype": "auto"}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(model), "revision": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    expected = {"pretrained": str(model), "peft": str(adapter), "dtype": "auto"}
    assert model_arguments(str(adapter)) == expected
    # An adapter of the Hub at a revision: the base model must not be looked for at it.
    monkeypatch.setattr(benchmark_models, "_fetch_adapter", lambda *args: adapter)
    (adapter / "tokenizer_config.json").write_text("{}")
    assert model_arguments("org/adapter", "v1") == expected | {"tokenizer": str(adapter)}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model"):
        model_arguments(str(adapter))


def test_what_is_no_model_is_refused_with_a_hint(tmp_path, model):
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Did you mean .*checkpoint-20\?"):
        model_arguments(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="no such folder"):
        model_arguments(str(tmp_path / "rum"))
    with pytest.raises(ValueError, match="leave it out"):
        model_arguments(str(model), revision="main")


def test_a_model_that_the_hub_does_not_give_is_an_error_before_any_task_runs(tmp_path):
    """The tests are offline."""
    with pytest.raises(ValueError, match=r"model='no/such-model' is no folder, and the Hub does not"):
        model_arguments("no/such-model")


# ---- In which process, and when it fails ----


def test_the_child_is_told_everything_and_its_raw_results_are_kept(tmp_path, stand_in):
    stand_in("""
        print(json.dumps(settings)); print("HF_ALLOW_CODE_EVAL" in os.environ, "RANK" in os.environ)
        succeed()
    """)
    task = Task("gsm8k", SUITE["gsm8k"], limit=7)
    outcome = run_one(tmp_path, task, batch_size=3, device="cpu")
    told, *rest = outcome.log.read_text().splitlines()
    told = json.loads(told)
    assert (told["task"], told["limit"], told["batch_size"], told["device"]) == ("gsm8k", 7, 3, "cpu")
    assert told["allow_code_execution"] is False and told["model_args"] == {"pretrained": "x"}
    assert rest == ["False False"]
    assert outcome.error is None and outcome.scores[0].value == pytest.approx(41.2)
    kept = [path.name for path in (tmp_path / "benchmarks").iterdir()]
    assert kept == ["gsm8k-first-7.json"]
    assert json.loads((tmp_path / "benchmarks" / kept[0]).read_text()) == raw()


def test_mmlu_is_asked_with_five_examples_which_is_not_its_default(tmp_path, stand_in):
    stand_in("print(settings['num_fewshot']); sys.exit(1)")
    assert run_one(tmp_path, Task("mmlu", SUITE["mmlu"])).log.read_text() == "5\n"


@pytest.mark.parametrize("allowed", [False, True])
def test_leave_to_execute_code_is_given_to_the_child_only_and_not_inherited(tmp_path, stand_in, monkeypatch, allowed):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1" if not allowed else "0")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    stand_in("""
        print(os.environ.get("HF_ALLOW_CODE_EVAL"), settings["allow_code_execution"])
        print([name for name in ("RANK", "MASTER_ADDR", "ACCELERATE_USE_FSDP") if name in os.environ])
    """)
    log = run_one(tmp_path, allow_code_execution=allowed).log.read_text()
    assert log == ("1 True\n[]\n" if allowed else "None False\n[]\n")
    assert os.environ["HF_ALLOW_CODE_EVAL"] == ("0" if allowed else "1")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('no such thing\\nand more')", "exit status 1: RuntimeError: no such thing. Its"),
        ("print('stop'); sys.exit(3)", "exit status 3: stop"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9 (out of memory?)"),
        ("os.abort()", "signal 6"),
        ("pass", "left no results that can be read"),
        ("open(settings['results'], 'w').write('{')", "left no results that can be read"),
        ("succeed({'results': {}})", "left no results that can be read"),
        ("sys.exit('Set confirm_run_unsafe_code=True')", "needs --allow-code-execution"),
    ],
)
def test_a_child_that_fails_is_one_line_that_names_the_log(tmp_path, stand_in, code, words):
    stand_in(code)
    outcome = run_one(tmp_path)
    assert not outcome.scores and "\n" not in outcome.error
    assert outcome.error.startswith("gsm8k ") and words in outcome.error and str(outcome.log) in outcome.error
    assert not list((tmp_path / "benchmarks").iterdir())


def test_old_raw_results_do_not_pass_for_new_ones_and_survive_a_failure(tmp_path, stand_in):
    stand_in("succeed()")
    run_one(tmp_path)
    stand_in("pass")
    assert run_one(tmp_path).error is not None
    assert json.loads((tmp_path / "benchmarks" / "gsm8k.json").read_text()) == raw()


def gone(pid):
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_until(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize(("ending", "timeout"), [("hang", 15), ("exit", 180)])
def test_nothing_that_a_child_started_outlives_it(tmp_path, stand_in, ending, timeout):
    stand_in(f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        {"time.sleep(600)" if ending == "hang" else "succeed()"}
    """)
    outcome = run_one(tmp_path, timeout=timeout)
    assert (outcome.error is None) == (ending == "exit")
    if ending == "hang":
        assert "more than 15 s" in outcome.error and "--timeout" in outcome.error
    wait_until(lambda: gone(int(outcome.log.read_text())))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_ctrl_c_ends_the_child_and_keeps_what_was_done(tmp_path, model, stand_in):
    """In a process of its own, as the signal is for all of it."""
    stand_in("""
        if settings["task"] == "gsm8k":
            succeed()
        else:
            print(os.getpid(), flush=True); time.sleep(600)
    """)
    code = f"""
import signal
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests may ignore it
from hf_nexus import benchmarking
from hf_nexus.evaluation import benchmark_runs
benchmarking._require_lm_eval = lambda: None
benchmark_runs._CHILD = Path({str(benchmark_runs._CHILD)!r})
benchmarking.benchmark({str(model)!r}, ["gsm8k", "bbh"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = model / "_benchmark_logs" / "bbh.log"
    try:
        wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=180)[1]
    finally:
        process.kill()
    wait_until(lambda: gone(int(log.read_text())))
    assert [score.name for score in load_scores(model)] == ["GSM8K"]


def test_a_crash_costs_that_task_alone(model, stand_in):
    stand_in("os.abort() if settings['task'] == 'bbh' else succeed()")
    said = []
    outcomes = benchmark(str(model), ["bbh", "gsm8k"], say=said.append)
    assert [outcome.error is None for outcome in outcomes] == [False, True]
    assert any(line.startswith("FAILED: bbh was killed by signal 6") for line in said)
    assert any(line.startswith("GSM8K   exact_match 41.20 ± 1.40") for line in said)
    assert [score.name for score in load_scores(model)] == ["GSM8K"]


# ---- What becomes of the scores ----


def test_a_headline_figure_is_read_in_percent_with_how_it_was_asked():
    (found,) = read_scores(Task("gsm8k", SUITE["gsm8k"]), raw())
    assert (found.name, found.metric, found.dataset, found.task_id) == (
        "GSM8K",
        "exact_match",
        "openai/gsm8k",
        "gsm8k",
    )
    assert (found.value, found.stderr) == (pytest.approx(41.2), pytest.approx(1.4))
    assert found.notes == "5-shot, strict-match, lm-eval 0.4.13" and found.date == "2023-11-14"


def test_a_score_on_some_examples_says_so_and_is_no_registered_result():
    (found,) = read_scores(Task("gsm8k", SUITE["gsm8k"], limit=10), raw())
    assert found.task_id is None and "first 10 examples" in found.notes


def test_groups_tags_and_other_metrics():
    group = raw(
        "mmlu", "acc,none", 0.3, configs={"mmlu_a": {}, "mmlu_b": {}}, **{"n-shot": {"mmlu_a": 5, "mmlu_b": 5}}
    )
    group = group | {"groups": group["results"], "results": {"mmlu_a": {"acc,none": 1.0}, "mmlu_b": {"acc,none": 0.0}}}
    (found,) = read_scores(Task("mmlu", SUITE["mmlu"], limit=4), group)
    assert found.value == pytest.approx(30) and found.notes.startswith("5-shot, lm-eval")
    assert found.notes.endswith("first 4 examples of each part")
    assert [row.name for row in read_scores(Task("a_tag"), group)] == ["mmlu_a", "mmlu_b", "mmlu"]
    (other,) = read_scores(Task("wikitext"), raw("wikitext", "word_perplexity,none", 37.5))
    assert other.value == 37.5 and other.dataset == "some/data"  # no share, so as it is
    nothing = raw("wikitext", "word_perplexity,none", float("nan"))
    with pytest.raises(ValueError, match="no finite score"):
        read_scores(Task("wikitext"), nothing)
    with pytest.raises(ValueError, match="strict-match"):
        read_scores(Task("gsm8k", SUITE["gsm8k"]), raw(key="acc,none"))


def test_scores_are_merged_and_the_newest_of_a_task_wins(tmp_path):
    record_scores(tmp_path, [score("gsm8k", 1.0), score("bbh", 2.0)])
    record_scores(tmp_path, [score("gsm8k", 3.0)])
    assert [(row.name, row.value) for row in load_scores(tmp_path)] == [("bbh", 2.0), ("gsm8k", 3.0)]


def test_a_limited_score_never_takes_the_place_of_a_whole_one(tmp_path):
    record_scores(tmp_path, [score(value=1.0, limit=5)])
    record_scores(tmp_path, [score(value=2.0, limit=9)])
    assert [row.value for row in load_scores(tmp_path)] == [2.0]
    record_scores(tmp_path, [score(value=3.0)])
    assert [row.value for row in load_scores(tmp_path)] == [3.0]
    record_scores(tmp_path, [score(value=4.0, limit=5)])
    assert [row.value for row in load_scores(tmp_path)] == [3.0, 4.0]


def test_card_metadata_and_registered_results_show_the_scores(tmp_path):
    run = RunSummary("tiny", "llama", 1000, NEXUS)
    elsewhere = BenchmarkScore("ARC", "allenai/ai2_arc", "acc", 25.0)
    compared = BenchmarkScore("gsm8k", "openai/gsm8k", "exact_match", 1.0, notes="5-shot", arm_value=30.0)
    run.benchmarks = [elsewhere, compared]
    run.save(tmp_path)
    (tmp_path / "README.md").write_text("My words.\n")
    record_scores(tmp_path, [score(task_id="gsm8k"), score("sums/local", 50.0, dataset=None)])
    text = (tmp_path / "README.md").read_text()
    assert "My words." in text and "| gsm8k | openai/gsm8k | exact_match | 41.2000 | 1.4000 |" in text
    results = ModelCard(text).data.to_dict()["model-index"][0]["results"]
    values = {result["dataset"]["type"]: result["metrics"][0]["value"] for result in results}
    assert values == {"allenai/ai2_arc": 25.0, "openai/gsm8k": 41.2, "sums_local": 50.0}
    (entry,) = yaml.safe_load((tmp_path / RESULTS_NAME).read_text())
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and entry["value"] == 41.2
    saved = RunSummary.load(tmp_path).benchmarks
    assert saved[0] == elsewhere and saved[1].arm_value == 30.0
    record_scores(tmp_path, [score(value=42.0)])
    assert len(RunSummary.load(tmp_path).benchmarks) == 3  # none twice


def test_a_damaged_readme_costs_no_score_and_no_task(model, stand_in):
    RunSummary("tiny", "llama", 1000, NEXUS).save(model)
    readme = "---\nlicense: [\n---\n"
    (model / "README.md").write_text(readme)
    stand_in("succeed()")
    said = []
    with pytest.raises(ValueError, match="not YAML"):
        benchmark(str(model), ["gsm8k", "hellaswag"], say=said.append)
    assert (model / "README.md").read_text() == readme
    assert len(load_scores(model)) == 2 and said[-1].startswith("2 of 2 tasks done")


def test_a_folder_never_mixes_two_models(tmp_path, monkeypatch, model, stand_in):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark_models, "_fetch_adapter", lambda *args: None)
    stand_in("succeed()")
    benchmark("org/one", ["gsm8k"])
    assert json.loads((tmp_path / "org--one" / SCORES_NAME).read_text())["model"] == "org/one"
    with pytest.raises(ValueError, match="holds the scores of org/one"):
        benchmark("org/two", ["gsm8k"], output="org--one")
    with pytest.raises(ValueError, match="is no file of ours"):
        (model / SCORES_NAME).write_text("[]")
        benchmark(str(model), ["gsm8k"])


def test_what_is_wrong_is_said_before_anything_runs(tmp_path, model, stand_in):
    stand_in("succeed()")
    with pytest.raises(ValueError, match="--allow-code-execution"):
        benchmark(str(model), ["gsm8k", "humaneval"])
    with pytest.raises(ValueError, match="timeout=0"):
        benchmark(str(model), ["gsm8k"], timeout=0)
    assert sorted(path.name for path in model.iterdir()) == ["config.json"]


def test_without_lm_eval_one_line_says_what_to_install(model, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest)
    )
    with pytest.raises(ImportError, match=r"pip install 'hf-nexus\[eval\]'"):
        benchmark(str(model))


# ---- The real lm-eval ----

QUESTIONS = [{"question": f"{i} plus 1", "answer": str(i + 1), "wrong": str(i + 5)} for i in range(6)]
COMMON = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}}, "test_split": "test"}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tiny model, and two tasks on a local file that is named from the folder of the tasks."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'hf-nexus[eval]'")
    folder = tmp_path_factory.mktemp("real 1,2")  # what a list of names or of arguments would trip over
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    choice = {"task": "tiny_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}} =", **COMMON}
    choice |= {"doc_to_choice": "{{[answer, wrong]}}", "doc_to_target": 0}
    written = {"task": "tiny_written", "output_type": "generate_until", "doc_to_text": "{{question}} =", **COMMON}
    written |= {"doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    for task, metric in ((choice, "acc"), (written, "exact_match")):
        task["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
        (tasks / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


def test_a_local_task_runs_offline_from_file_to_card(real, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    model = real / "model"
    RunSummary("tiny", "llama", 1000, NEXUS).save(model)
    outcomes = benchmark(str(model), [str(real / "tasks")], device="cpu", batch_size=2)
    assert [outcome.error for outcome in outcomes] == [None, None]
    scores = {score.name: score for score in load_scores(model)}
    assert scores.keys() == {"tiny_choice", "tiny_written"}
    # The same figure by hand: which of two endings the model finds more likely.
    net, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)

    def likelihood(text, ending):
        start, ids = len(tokenizer(text).input_ids), tokenizer(text + ending, return_tensors="pt").input_ids
        with torch.no_grad():
            logs = net(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        return logs[start - 1 :].sum().item()

    right = [
        likelihood(f"{row['question']} =", f" {row['answer']}")
        > likelihood(f"{row['question']} =", f" {row['wrong']}")
        for row in QUESTIONS
    ]
    assert scores["tiny_choice"].value == pytest.approx(100 * sum(right) / len(right))
    assert "0-shot" in scores["tiny_choice"].notes and "local task file" in scores["tiny_choice"].notes
    card = (model / "README.md").read_text()
    assert "| tiny_choice | tiny_choice | acc |" in card and "| tiny_written |" in card
    kept = (model / "benchmarks" / "tiny_choice.json").read_text()
    assert str(real) not in kept and "pretty_env_info" not in kept  # may be published


def test_an_adapter_is_put_on_its_base_model(real):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(real / "model")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(real / "adapter")
    (outcome,) = benchmark(str(real / "adapter"), [str(real / "tasks" / "tiny_choice.yaml")], limit=2, device="cpu")
    assert outcome.error is None, outcome.log.read_text()
    assert "first 2 examples" in outcome.scores[0].notes
    count = json.loads((real / "adapter" / "benchmarks" / "tiny_choice-first-2.json").read_text())["config"]
    assert count["model_num_parameters"] == adapted.num_parameters()


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'hf-nexus[eval]'")
def test_the_suite_is_what_the_installed_lm_eval_has():
    """Names, metrics, filters, datasets and leave to run code, read from its task files."""
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
    """A task file with what it includes."""
    from hf_nexus.evaluation.lm_eval.benchmarks import _read

    config = _read(path)
    include = config.pop("include", None)
    return config if include is None else load(path.parent / include) | config
