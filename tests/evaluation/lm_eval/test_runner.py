"""Child processes that run tasks: what they are told, how they fail, and that they leave nothing behind."""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from hf_nexus.evaluation.lm_eval import runner
from hf_nexus.evaluation.lm_eval.runner import run_tasks
from hf_nexus.evaluation.lm_eval.tasks import SUITE, Task
from tests.support import lm_eval as support
from tests.support.lm_eval import gone, raw, wait_until

stand_in = support.stand_in  # the fixture
GSM8K = Task("gsm8k", SUITE["gsm8k"])


def run_one(folder, task=GSM8K, **options):
    (result,) = run_tasks({"pretrained": "x"}, [task], folder, **options)
    return result


def test_the_child_gets_all_settings_and_raw_results_are_kept(tmp_path, stand_in):
    stand_in("""
        print(json.dumps(settings)); print("HF_ALLOW_CODE_EVAL" in os.environ, "RANK" in os.environ)
        succeed()
    """)
    task = Task("gsm8k", SUITE["gsm8k"], limit=7)
    result = run_one(tmp_path, task, batch_size=3, device="cpu")
    told, *rest = result.log.read_text().splitlines()
    told = json.loads(told)
    assert (told["task"], told["limit"], told["batch_size"], told["device"]) == ("gsm8k", 7, 3, "cpu")
    assert told["allow_code_execution"] is False and told["model_args"] == {"pretrained": "x"}
    assert rest == ["False False"]
    assert result.error is None and result.scores[0].value == pytest.approx(41.2)
    kept = [path.name for path in (tmp_path / "benchmarks").iterdir()]
    assert kept == ["gsm8k-first-7.json"]
    assert json.loads((tmp_path / "benchmarks" / kept[0]).read_text()) == raw()


def test_mmlu_has_five_shots(tmp_path, stand_in):
    stand_in("print(settings['num_fewshot']); sys.exit(1)")
    assert run_one(tmp_path, Task("mmlu", SUITE["mmlu"])).log.read_text() == "5\n"


@pytest.mark.parametrize("allowed", [False, True])
def test_permission_to_execute_code_is_not_inherited(tmp_path, stand_in, monkeypatch, allowed):
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
    ("code", "expected"),
    [
        ("raise RuntimeError('no such thing\\nand more')", "exit status 1: RuntimeError: no such thing. See"),
        ("print('stop'); sys.exit(3)", "exit status 3: stop"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9 (out of memory?)"),
        ("os.abort()", "signal 6"),
        ("pass", "left no results that can be read"),
        ("open(settings['results'], 'w').write('{')", "left no results that can be read"),
        ("succeed({'results': {}})", "left no results that can be read"),
        ("sys.exit('Set confirm_run_unsafe_code=True')", "needs --allow-code-execution"),
    ],
)
def test_the_error_of_a_failed_child_names_the_log(tmp_path, stand_in, code, expected):
    stand_in(code)
    result = run_one(tmp_path)
    assert not result.scores and "\n" not in result.error
    assert result.error.startswith("gsm8k ") and expected in result.error and str(result.log) in result.error
    left = [path.read_text() for path in (tmp_path / "benchmarks").iterdir()]
    assert left == ([] if "results" not in code else ["{"] if "open" in code else ['{"results": {}}'])  # hours of work


def test_a_child_ends_where_processes_have_no_groups(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.delattr("os.killpg")
    stand_in("succeed()")
    assert run_one(tmp_path).error is None


def test_old_raw_results_survive_a_failure(tmp_path, stand_in):
    stand_in("succeed()")
    run_one(tmp_path)
    stand_in("pass")
    assert run_one(tmp_path).error is not None
    assert json.loads((tmp_path / "benchmarks" / "gsm8k.json").read_text()) == raw()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks up processes in /proc")
@pytest.mark.parametrize("ending", ["hang", "exit"])
def test_no_process_of_a_child_outlives_it(tmp_path, stand_in, monkeypatch, ending):
    """The timeout expires when the child has started a process."""
    stand_in(f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        {"time.sleep(600)" if ending == "hang" else "succeed()"}
    """)
    log, communicate = tmp_path / runner.LOG_FOLDER / "gsm8k.log", subprocess.Popen.communicate

    def expire(process, data, timeout):
        if ending == "hang":
            with suppress(subprocess.TimeoutExpired):
                communicate(process, data, 0.01)
            wait_until(lambda: log.read_text().endswith("\n"))
            data, timeout = None, 0.01
        return communicate(process, data, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", expire)
    result = run_one(tmp_path, timeout=180)
    assert (result.error is None) == (ending == "exit")
    if ending == "hang":
        assert "more than 180 s" in result.error and "--timeout" in result.error
    wait_until(lambda: gone(int(result.log.read_text())))
