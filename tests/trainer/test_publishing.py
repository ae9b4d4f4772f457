"""`push_to_hub` of NexusTrainer: the results on the Hub, on disk and on the screen."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_nexus.hub.publisher import Publisher
from hf_nexus.hub.queue import QUEUE_NAME, QueueStatus
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.run import pretrain
from hf_nexus.trainer.publishing import Publishing
from tests.support.hub.runs import QUICK, REPO, SECONDS, api, content, digests, impatient_client, until
from tests.support.hub.server import ALICE, READER, HubServer
from tests.support.launcher import launch
from tests.support.tiny import Rows, tiny_llama
from tests.support.tiny_config import write_config
from tests.trainer.test_mixin import weights

STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
MODEL = ("config.json", "model.safetensors", "training_args.bin", "nexus.yaml", "trainer_state.json")
CARD = ("README.md", "run_summary.json", "training.png")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server, which all processes of the tests use."""
    with HubServer(tmp_path / "hub") as hub:
        for name, value in {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": os.getcwd(),
            "OMP_NUM_THREADS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def make(
    hub: HubServer, make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """`make(**options)`: a trainer that saves steps 2 and 4 and pushes to `REPO`, with short timeouts."""
    monkeypatch.setattr(
        "hf_nexus.trainer.publishing.Publisher", partial(Publisher, endpoint=hub.endpoint, retry=QUICK)
    )
    made = []

    def make(**options: Any) -> Any:
        defaults: dict[str, Any] = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 1,
            "push_to_hub": True,
            "hub_model_id": REPO,
            "hub_token": ALICE,
            "hub_flush_timeout": SECONDS,
        }
        made.append(make_trainer({"text": Rows(40, 0), "code": Rows(32, 1)}, **{**defaults, **options}))
        return made[-1]

    yield make
    for trainer in made:
        if trainer._publishing._final_flush is not None:
            trainer._publishing._final_flush.end(0.0)


def push(out: Path, *options: str, token: str = ALICE) -> subprocess.CompletedProcess[str]:
    """Run `hf-nexus push`."""
    command = [sys.executable, "-m", "hf_nexus.cli", "push", str(out), *options]
    return subprocess.run(
        command, env={**os.environ, "HF_TOKEN": token}, capture_output=True, text=True, timeout=2 * SECONDS
    )


def holders(token: str, *folders: Path) -> list[str]:
    """The files that contain the token."""
    return [
        f"{folder}/{name}" for folder in folders for name, data in content(folder).items() if token.encode() in data
    ]


# ---- What arrives ----


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=pytest.mark.slow) if s in ("end", "all_checkpoints") else s for s in STRATEGIES],
)
def test_each_strategy_leaves_what_its_documentation_says(
    hub: HubServer, make: Callable[..., Any], tmp_path: Path, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are those of the last checkpoint, by hash. With `"end"`, only explicit pushes are made."""
    out = tmp_path / "out"
    trainer = make(hub_strategy=strategy, hub_model_id="model", hub_revision="dev", hub_private_repo=True)
    trainer.train()
    files = hub.files(REPO, "dev")
    last = content(out / "checkpoint-4")
    if strategy == "end":
        assert files == {}
        commit = trainer.push_to_hub(license="mit")
        assert commit.oid == hub.history(REPO, "dev")[0]["oid"]
        files = hub.files(REPO, "dev")
    else:
        assert {*MODEL, "README.md", "run_summary.json"} <= files.keys()
        assert b"\n# alice/model\n" in files["README.md"]
        assert digests({name: files[name] for name in MODEL}) == digests({name: last[name] for name in MODEL})
        logged = [entry for entry in trainer.state.log_history if "hub/pending" in entry]
        assert logged[0]["hub/pending"] == 0 and logged[2]["hub/pending"] + logged[2].get("hub/pushed_step", 0) > 0
        assert "Publisher" in json.loads(last["trainer_state.json"])["stateful_callbacks"]
    folder = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-4"}.get(strategy)
    below = {
        name.partition("/")[2]: data for name, data in files.items() if name.startswith(("last-", "checkpoint-4"))
    }
    assert digests(below) == (digests(last) if folder else {})
    assert ("checkpoint-2/optimizer.pt" in files) == (strategy == "all_checkpoints")
    assert capsys.readouterr().out.strip().splitlines()[-1] == "On the Hub (alice/model@dev): step 4."
    repo = hub.store.load("models", REPO)
    assert repo is not None and repo["private"] and hub.history(REPO) == []
    pushed = tmp_path / "pushed.safetensors"
    pushed.write_bytes(files["model.safetensors"])
    saved, trained = load_file(pushed), trainer.model.state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in saved) and len(saved) > 10
    assert not holders(ALICE, tmp_path) and trainer.args.hub_token == ALICE
    arguments = torch.load(out / "checkpoint-4/training_args.bin", weights_only=False)
    assert arguments.hub_token is None and arguments.hub_strategy is trainer.args.hub_strategy
    assert arguments.save_strategy is trainer.args.save_strategy


@pytest.mark.parametrize("adapters", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_folder_of_the_machine_arrives(
    hub: HubServer, make: Callable[..., Any], tmp_path: Path, adapters: bool
) -> None:
    """The output folder is absolute, and so is that of the base model. Both are known here after a resume."""
    options: dict[str, Any] = {"hub_strategy": "checkpoint", "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "trainer_kwargs": {"eval_dataset": Rows(8, 0)}}
    if adapters:
        peft = pytest.importorskip("peft")
        tiny_llama().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        options["model"] = peft.get_peft_model(
            base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
        )
    folders = {"run_name": str(tmp_path / "run"), "resume_from_checkpoint": str(tmp_path / "earlier")}
    trainer = make(**options, **folders)
    trainer.train()
    trainer.save_state()
    trainer.push_to_hub()
    assert trainer.args.run_name == str(tmp_path / "run")
    files = hub.files(REPO)
    late = make(push_to_hub=False, output_dir=str(tmp_path / "late"), **folders)
    late.push_to_hub(revision="late")
    saved = hub.files(REPO, "late")["training_args.bin"]
    assert str(tmp_path).encode() not in saved and ALICE.encode() not in saved
    assert "last-checkpoint/trainer_state.json" in files
    assert [name for name, data in files.items() if str(tmp_path).encode() in data] == []
    assert json.loads(files["trainer_state.json"])["best_model_checkpoint"].startswith("checkpoint-")
    again = make(**options, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert Path(again.state.best_model_checkpoint).parent == tmp_path / "out"
    for name, data in files.items():
        if name.startswith("last-checkpoint/"):
            (tmp_path / "downloaded").mkdir(exist_ok=True)
            (tmp_path / "downloaded" / Path(name).name).write_bytes(data)
    make(**options, max_steps=6, push_to_hub=False).train(resume_from_checkpoint=str(tmp_path / "downloaded"))


def test_last_checkpoint_resumes_bit_for_bit(
    hub: HubServer, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, as docs/hub.md says. The downloaded folder does not replace the newer one of the Hub."""
    whole = make(push_to_hub=False, max_steps=6, output_dir=str(tmp_path / "whole"))
    whole.train()
    make(hub_strategy="checkpoint").train()
    out = tmp_path / "other"
    with impatient_client(monkeypatch, xet=False):
        api(hub).snapshot_download(REPO, allow_patterns=["last-checkpoint/*"], local_dir=out)
    assert (out / ".cache").is_dir()
    resumed = make(hub_strategy="checkpoint", max_steps=6, output_dir=str(out))
    resumed.train(resume_from_checkpoint=str(out / "last-checkpoint"))
    assert resumed.state.global_step == 6
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.push_to_hub() is not None
    files, last = hub.files(REPO), content(out / "checkpoint-6")
    below = {name.partition("/")[2]: data for name, data in files.items() if name.startswith("last-checkpoint/")}
    assert digests(below) == digests(last) and digests(below) != digests(content(out / "last-checkpoint"))
    assert not [name for name in files if name.startswith(".cache/")]


def test_saving_the_model_queues_it_and_does_not_wait(
    hub: HubServer, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save_model` pushes as in the Trainer (hazard G), but does not wait. A push may name another branch."""
    trainer = make(save_strategy="no")
    trainer.train()
    hub.fail("/commit/", action="hang")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.publisher, "flush", lambda seconds: pytest.fail("it waits"))
        trainer.save_model()
    assert trainer.publisher.status().waiting
    hub.heal()
    assert trainer.push_to_hub("Elsewhere", revision="other", license="mit", language="en")
    assert [commit["title"] for commit in hub.history(REPO)] == ["Model save"]
    assert hub.history(REPO, "other")[0]["title"] == "Elsewhere"
    assert b"license: mit" in hub.files(REPO, "other")["README.md"]
    with pytest.raises(TypeError, match="licence"):
        trainer.push_to_hub(licence="mit")


# ---- What fails ----


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 403}])
@pytest.mark.slow
def test_a_hub_that_stays_down_costs_its_time_bound_at_most(
    hub: HubServer, make: Callable[..., Any], tmp_path: Path, fault: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Training ends, all files are on disk, and the command of the last line sends them once the Hub is back."""
    out = tmp_path / "out"
    trainer = make(hub_strategy="checkpoint", hub_flush_timeout=1.0)
    hub.fail("/commit/", **fault)
    trainer.train()
    assert trainer.push_to_hub() is None
    trainer._publishing._final_flush.end()
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith(f"On the Hub ({REPO}@main): nothing. Not yet on the Hub: step ")
    assert line.endswith(f"Send the rest with: hf-nexus push {out}")
    failed = push(out) if fault.get("status") == 403 else None
    if failed is not None:
        assert failed.returncode == 1 and "403" in failed.stdout and "Traceback" not in failed.stderr
    hub.heal()
    done = push(out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"On the Hub ({REPO}@main): step 4."
    assert "Pushing" in done.stderr  # the progress bar
    files = hub.files(REPO)
    assert digests({name: files[name] for name in MODEL}) == digests(content(out, *MODEL))
    resumable = {f"last-checkpoint/{name}": data for name, data in content(out / "checkpoint-4").items()}
    assert digests({name: files.get(name, b"") for name in resumable}) == digests(resumable)


def test_ctrl_c_ends_the_wait_for_the_hub_and_not_the_run(
    hub: HubServer, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("/commit/", status=500)
    trainer = make(hub_strategy="every_save")
    monkeypatch.setattr(Publisher, "flush", Mock(side_effect=KeyboardInterrupt))
    assert trainer.train().global_step == 4
    assert trainer.push_to_hub() is None
    trainer._publishing._final_flush.end()
    assert "Not yet on the Hub: step 4" in capsys.readouterr().out


@pytest.mark.parametrize(("token", "repo_id"), [("hf_unknown", REPO), (READER, REPO), (ALICE, "bob/model")])
def test_a_rejected_token_fails_before_the_first_step(
    hub: HubServer, make: Callable[..., Any], tmp_path: Path, token: str, repo_id: str
) -> None:
    """The constructor raises a clear error, and the folder stays empty."""
    with pytest.raises(ValueError, match=r"The Hub refuses .* `hf auth login`") as error:
        make(hub_token=token, hub_model_id=repo_id)
    assert token not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_card_that_cannot_be_written_stops_nothing(
    hub: HubServer, make: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training continues, and the weights are pushed."""
    (tmp_path / "out/README.md").mkdir(parents=True)
    make(hub_strategy="every_save").train()
    assert "The card could not be written" in caplog.text
    files = hub.files(REPO)
    assert digests({name: files[name] for name in MODEL}) == digests(content(tmp_path / "out/checkpoint-4", *MODEL))


class _Fails(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step 3 is never saved."""
        if state.global_step == 3:
            raise RuntimeError("out of luck")


def test_what_was_saved_arrives_although_the_run_fails(
    hub: HubServer, make: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of the process sends it, after an exception in training."""
    hub.fail("/commit/", status=503, times=3)
    trainer = make(hub_strategy="every_save")
    trainer.add_callback(_Fails())
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    trainer._publishing._final_flush.end()
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"On the Hub ({REPO}@main): step 2."
    files, saved = hub.files(REPO), content(tmp_path / "out/checkpoint-2", *MODEL)
    assert digests({name: files[name] for name in MODEL}) == digests(saved)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_the_flush_timeout_is_a_number_of_seconds(make_trainer: Callable[..., Any], value: float) -> None:
    """Values other than a number of seconds are an error."""
    with pytest.raises(ValueError, match=r"hub_flush_timeout: .*a finite number of at least 0"):
        make_trainer({"text": Rows(40, 0)}, hub_flush_timeout=value)


# ---- Processes ----

_RUN = """
import sys
from functools import partial
from transformers import TrainerCallback
from hf_nexus import NexusConfig, NexusTrainer
from hf_nexus.trainer import publishing
from tests.support.hub.runs import QUICK
from tests.support.tiny import Rows, tiny_llama
publishing.Publisher = partial(publishing.Publisher, retry=QUICK)
out, timeout, ending = sys.argv[1:]
class End(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and ending == "waits":
            print("step 3", flush=True)
            sys.stdin.read()
args = NexusConfig(output_dir=out, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4,
    save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, push_to_hub=True, hub_model_id="alice/model",
    hub_strategy="checkpoint", hub_flush_timeout=float(timeout))
data = {"text": Rows(40, 0), "code": Rows(32, 1)}
trainer = NexusTrainer(tiny_llama(), args, train_dataset=data, callbacks=[End()])
trainer.wait_after_training = ending != "leaves"
trainer.train()
print("trained", flush=True)
"""


def start(out: Path, timeout: float, ending: str, token: str = ALICE) -> subprocess.Popen[str]:
    """Start a run in another process."""
    return subprocess.Popen(
        [sys.executable, "-c", _RUN, str(out), str(timeout), ending],
        env={**os.environ, "HF_TOKEN": token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_hub_that_hangs_does_not_keep_the_process(hub: HubServer, tmp_path: Path) -> None:
    """The process exits with 0 within the timeout. Later, `hf-nexus push` sends the rest to the given branch."""
    hub.fail("/preupload/", action="hang")
    out = tmp_path / "out"
    run = start(out, 1.0, "leaves")
    printed, errors = run.communicate(timeout=2 * SECONDS)
    assert run.returncode == 0, errors
    assert re.search(r"nothing\. Not yet on the Hub: step (2, )?4.*hf-nexus push", printed.strip().splitlines()[-1])
    hub.heal()
    assert push(out, "--revision", "rescued").returncode == 0
    files = hub.files(REPO, "rescued")
    assert digests({name: files[name] for name in MODEL}) == digests(content(out / "checkpoint-4", *MODEL))
    assert hub.history(REPO) == []


@pytest.mark.slow
def test_push_sends_what_a_killed_run_was_uploading(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed during an upload. `hf-nexus push` sends it once. No file contains the token."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    hub.fail("/__lfs/", method="PUT", action="hang", times=1)
    out = tmp_path / "out"
    run = start(out, SECONDS, "waits")
    assert run.stdout is not None and any(line == "step 3\n" for line in run.stdout)
    until(lambda: hub.count("PUT", "/__lfs/"))
    run.send_signal(signal.SIGKILL)
    run.communicate()
    saved = content(out / "checkpoint-2")
    shutil.rmtree(out / "checkpoint-2")
    assert QueueStatus.read(out / QUEUE_NAME).waiting == (2,)
    done = push(out)
    assert done.returncode == 0, done.stderr
    files = hub.files(REPO)
    assert digests({k.partition("/")[2]: v for k, v in files.items() if k.startswith("last-")}) == digests(saved)
    assert [commit["title"] for commit in hub.history(REPO)] == ["Training in progress, step 2"]
    assert not holders(ALICE, tmp_path)


def test_a_push_without_a_queue_fails_with_one_line(tmp_path: Path) -> None:
    """The error names the folder and the expected one."""
    (tmp_path / "empty").mkdir()
    done = push(tmp_path / "empty")
    assert done.returncode == 1
    started, error = done.stderr.splitlines()
    assert started.startswith("hf-nexus") and re.fullmatch(r"error: .*empty holds nothing to push: .*", error)


@pytest.mark.parametrize("refused", [True, False])
def test_the_other_ranks_follow_the_main_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """They make no publisher, and fail if the Hub refused the main process."""
    monkeypatch.setattr("hf_nexus.trainer.publishing.broadcast", lambda tensor, device: torch.tensor(int(refused)))
    args = SimpleNamespace(hub_model_id=REPO, output_dir=str(tmp_path), process_index=1, device="cpu")
    publishing = Publishing(args)
    with pytest.raises(ValueError, match="main process") if refused else nullcontext():
        assert publishing.connect(None, None) == REPO
    assert publishing.publisher is None and publishing.wait("title") is None


@pytest.mark.slow
def test_of_two_ranks_only_the_main_process_sends(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the main rank sends, no rank waits, a rejected token ends both ranks, and the model arrives."""
    monkeypatch.setenv("HF_TOKEN", ALICE)
    hub.fail("/commit/", action="slow", seconds=10.0, times=1)
    first, second = launch("tests.trainer.distributed.hub_worker", ranks=2, out=tmp_path, torchrun=True)
    assert "The Hub refuses" in first["refusal"] and "main process" in second["refusal"]
    assert first["waiting"] and second["waiting"] is None, "all had passed a barrier after training"
    files = hub.files(REPO)
    assert digests({name: files[name] for name in MODEL}) == digests(content(tmp_path / "run", *MODEL))
    assert "End of training" in [commit["title"] for commit in hub.history(REPO)]


def test_a_pretraining_run_ends_with_its_report_on_the_hub(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The card has the last evaluation, and no file has the token or a folder of this machine."""
    monkeypatch.setattr(
        "hf_nexus.trainer.publishing.Publisher", partial(Publisher, endpoint=hub.endpoint, retry=QUICK)
    )
    flags = ["--push_to_hub", "True", "--hub_token", ALICE, "--hub_strategy", "end", "--hub_model_id", REPO]
    config, out = write_config(tmp_path), tmp_path / "out"
    trainer = pretrain(
        parse_arguments(["--config", str(config), "--output_dir", str(out), "--max_steps", "3", *flags])
    )
    assert trainer._publishing._final_flush is not None
    trainer._publishing._final_flush.end()
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"On the Hub ({REPO}@main): step 3."
    files = hub.files(REPO)
    names = [*MODEL, *CARD, "tokenizer.json"]
    assert digests({name: files[name] for name in names}) == digests(content(out, *names))
    assert [name for name, data in files.items() if str(tmp_path).encode() in data] == []
    sent, saved = (yaml.safe_load(text) for text in (files["pretrain.yaml"], (out / "pretrain.yaml").read_text()))
    assert saved["training"]["output_dir"] == str(out) and sent["training"]["output_dir"] == "out"
    assert sent["data"]["sources"]["digits"]["path"] == "digits.jsonl" and sent.keys() == saved.keys()
    assert f'"{REPO}"'.encode() in files["README.md"]
    assert [commit["title"] for commit in hub.history(REPO)] == ["End of training"]
    assert not holders(ALICE, tmp_path)
