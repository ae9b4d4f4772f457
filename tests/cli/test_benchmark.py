"""`hf-nexus benchmark`: from a model and task names to saved scores, with failures in between."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hf_nexus.cli.app import app
from hf_nexus.hub.run_summary import RunSummary
from tests.support import lm_eval as support
from tests.support.lm_eval import gone, load_scores, wait_until
from tests.support.tiny import tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer

model, stand_in = support.model, support.stand_in  # the fixtures
ROOT = Path(__file__).parents[2]
NEXUS = {"nexus": True, "inner_lr": 0.05, "inner_direction": "gradient", "gradient_accumulation_steps": 4}


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark(model, tasks, ...)` runs the command as if lm-eval were installed."""
    monkeypatch.setattr("hf_nexus.evaluation.lm_eval.runner.require_lm_eval", lambda: None)
    return run


def run(*argv):
    return CliRunner().invoke(app, ["benchmark", *map(str, argv)])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks up processes in /proc")
@pytest.mark.slow
def test_ctrl_c_kills_the_child_and_keeps_the_scores(model, stand_in):
    child = stand_in("""
        if settings["task"] == "gsm8k":
            succeed()
        else:
            print(os.getpid(), flush=True); time.sleep(600)
    """)
    code = f"""
import signal
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
from hf_nexus.cli import app
from hf_nexus.evaluation.lm_eval import runner
runner.require_lm_eval = lambda: None
runner._CHILD = Path({str(child)!r})
app.main(["benchmark", {str(model)!r}, "--tasks", "gsm8k,bbh"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    log = model / "_benchmark_logs" / "bbh.log"
    try:
        wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
        process.send_signal(signal.SIGINT)
        assert process.wait(180) != 0
    finally:
        process.kill()
    wait_until(lambda: gone(int(log.read_text())))
    assert [score.name for score in load_scores(model)] == ["GSM8K"]


def test_a_crash_costs_only_that_task(model, benchmark, stand_in):
    stand_in("os.abort() if settings['task'] == 'bbh' else succeed()")
    result = benchmark(model, "--tasks", "bbh, gsm8k")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert any(line.startswith("FAILED: bbh was killed by signal 6") for line in lines)
    assert any(line.startswith("GSM8K   exact_match 41.20 ± 1.40") for line in lines)
    assert lines[-1].startswith("1 of 2 tasks done")
    assert [score.name for score in load_scores(model)] == ["GSM8K"]


def test_a_damaged_readme_costs_no_score_and_no_task(model, benchmark, stand_in):
    RunSummary("tiny", "llama", 1000, NEXUS).save(model)
    readme = "---\nlicense: [\n---\n"
    (model / "README.md").write_text(readme)
    stand_in("succeed()")
    result = benchmark(model, "--tasks", "gsm8k,hellaswag")
    assert result.exit_code != 0 and "not YAML" in str(result.exception)
    assert (model / "README.md").read_text() == readme
    assert len(load_scores(model)) == 2 and "2 of 2 tasks done" in result.output


def test_scores_of_a_hub_model_go_to_a_new_folder(tmp_path, monkeypatch, benchmark, stand_in):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_nexus.evaluation.lm_eval.model_arguments._check_hub", lambda *args: None)
    stand_in("succeed()")
    assert benchmark("org/one", "--tasks", "gsm8k", "--revision", "v1").exit_code == 0
    assert [score.name for score in load_scores("org--one@v1")] == ["GSM8K"]
    result = benchmark("org/two", "--tasks", "gsm8k", "--output", "org--one@v1")
    assert "holds the scores of org/one@v1" in str(result.exception)


def test_mistakes_are_found_before_anything_runs(model, benchmark, stand_in):
    stand_in("succeed()")
    assert "--allow-code-execution" in str(benchmark(model, "--tasks", "gsm8k,humaneval").exception)
    for flag in ("--timeout", "--limit"):
        result = benchmark(model, "--tasks", "gsm8k", flag, "0")
        assert result.exit_code == 2 and flag in result.output
    assert sorted(path.name for path in model.iterdir()) == ["config.json"]


def test_without_lm_eval_one_line_says_what_to_install(model, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest)
    )
    assert str(run(model).exception) == "error: Benchmarks need lm-eval: pip install 'lm-eval[math]'"


# ---- The real lm-eval ----

MODEL = "model 1,2=3"  # with separators of arguments
QUESTIONS = [{"question": f"{i} plus 1", "answer": str(i + 1), "wrong": str(i + 5)} for i in range(6)]
COMMON = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}}, "test_split": "test"}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tiny model, and two tasks on a local file with a path relative to theirs."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install '.[eval]'")
    folder = tmp_path_factory.mktemp("real")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
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


@pytest.mark.slow
def test_a_local_task_runs_offline_from_file_to_card(real, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    model = real / MODEL
    RunSummary("tiny", "llama", 1000, NEXUS).save(model)
    result = run(model, "--tasks", real / "tasks", "--device", "cpu", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    scores = {score.name: score for score in load_scores(model)}
    assert scores.keys() == {"tiny_choice", "tiny_written"}
    # The same score by hand: which of two endings is more likely.
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


@pytest.mark.slow
def test_answers_that_exceed_the_context_are_cut(real):
    """The task of lm-eval says nothing of the length, so its default of 256 tokens holds: the whole context."""
    task = yaml.safe_load((real / "tasks/tiny_written.yaml").read_text()) | {"task": "tiny_long"}
    del task["generation_kwargs"]["max_gen_toks"]
    (real / "tasks/tiny_long.yaml").write_text(yaml.safe_dump(task))
    model = real / "model of long answers"
    shutil.copytree(real / MODEL, model)
    result = run(model, "--tasks", real / "tasks/tiny_long.yaml", "--limit", "1", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "answers cut at 128 tokens by the model's context" in result.output
    assert load_scores(model)[-1].notes.endswith("context, local task file")


@pytest.mark.slow
def test_an_adapter_is_scored_on_its_base_model(real):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(real / MODEL)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(real / "adapter")
    result = run(real / "adapter", "--tasks", real / "tasks" / "tiny_choice.yaml", "--limit", "2", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "first 2 examples" in result.output
    count = json.loads((real / "adapter" / "benchmarks" / "tiny_choice-first-2.json").read_text())["config"]
    assert count["model_num_parameters"] == adapted.num_parameters()
