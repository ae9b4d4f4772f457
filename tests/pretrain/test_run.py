"""A run from its configuration to its folder: plan, training, resuming, and the files it leaves."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from argparse import Namespace
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_nexus
from hf_nexus.lock import HOLDER_NAME, LOCK_NAME
from hf_nexus.pretrain.fields import PretrainConfig
from hf_nexus.pretrain.folder import find_checkpoint
from hf_nexus.pretrain.layout import launched_sharding
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.run import PretrainRun, leaving_process_group, main, prepare_run, pretrain
from hf_nexus.pretrain.run_file import continuation
from hf_nexus.pretrain.sections import load_config
from hf_nexus.trainer.mixin import NexusTrainer
from tests.support.launcher import ROOT
from tests.support.tiny_config import STEPS, run

CONFIGS = Path(hf_nexus.__file__).parent / "pretrain" / "configs"


# ---- Before training ----


def test_a_source_too_large_to_load_is_refused_at_once(monkeypatch, tmp_path):
    import socket

    whole = tmp_path / "whole.yaml"
    whole.write_text((CONFIGS / "130m.yaml").read_text().replace("streaming: true", "streaming: false"))
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("the network was used"))
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(whole), "--accelerators", "0", "--bf16", "false"])
    assert "sources.text.tokens" in str(stop.value.code) and "streaming" in str(stop.value.code)


def test_dry_run_prints_the_plan_without_network(monkeypatch, capsys):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("the network was used"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    main(["--dry_run"])
    printed = capsys.readouterr().out
    for number in ("2,969,742,336", "2,097,152", "30,000", "62,914,560,000", "Nexus snapshot"):
        assert number in printed, number
    assert "computed (not measured)" in printed


def test_the_plan_of_other_processes_is_not_printed_again(monkeypatch, capsys):
    monkeypatch.setattr(PretrainConfig, "process_index", 1)
    main(["--config", "130m", "--dry_run"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hidden_size", "36"], ["hidden_size=36", "even width", "multiple of 8"]),
        (["--num_hidden_layers", "0"], ["--num_hidden_layers: 0", "at least 1"]),
        (["--mixture_weights", '{"code": 1}'], ["mixture_weights", "code", "digits, letters", "0 leaves"]),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(config, tmp_path, flags, words, dry):
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(config), "--output_dir", str(tmp_path), *flags, *(["--dry_run"] if dry else [])])
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_several_gpus_in_one_process_are_refused_before_data(config, tmp_path, monkeypatch):
    monkeypatch.setattr(PretrainConfig, "n_gpu", 4)
    monkeypatch.setattr("hf_nexus.pretrain.run.load_mixture", lambda *args: pytest.fail("the data was read"))
    with pytest.raises(ValueError, match=r"`hf-nexus train CONFIG --devices 4`, or .*CUDA_VISIBLE_DEVICES=0"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensor_parallelism_is_planned_and_not_trained(config, tmp_path):
    with pytest.raises(ValueError, match="tp_size=2 is for a plan only"):
        pretrain(parse_arguments(["--config", str(config), "--output_dir", str(tmp_path / "x"), "--tp_size", "2"]))


def test_devices_that_the_run_does_not_have_are_refused(config, tmp_path):
    instead = r"torchrun --nproc_per_node 2 .*hf-nexus train CONFIG --devices 2"
    with pytest.raises(ValueError, match=rf"devices=2 is for a plan only, and this run has 1\..*{instead}"):
        run(config, tmp_path, "--devices", "2")
    one = parse_arguments(["--config", str(config), "--output_dir", str(tmp_path), "--devices", "1"])
    prepare_run(one).lock.close()


@pytest.mark.parametrize(
    ("planned", "launched", "words"),
    [("fsdp2", "false", ["uses ddp", "--accelerate_config", "--fsdp "]), ("ddp", "true", ["uses fsdp2", "Remove"])],
)
def test_a_sharding_that_the_run_does_not_use_is_refused(config, tmp_path, monkeypatch, planned, launched, words):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", launched)
    with pytest.raises(ValueError, match=f"sharding='{planned}' is for a plan only") as error:
        run(config, tmp_path, "--sharding", planned)
    assert all(word in str(error.value) for word in words), error.value


def test_the_flags_that_the_refusal_of_a_sharding_names_shard(config):
    flags = ["--fsdp", "--fsdp_config", '{"fsdp_version": 2}', "--sharding", "fsdp2"]
    training = parse_arguments(["--config", str(config), "--gradient_cosine_steps", "0", *flags]).training
    assert launched_sharding(training) == "fsdp2" and training.fsdp_plugin_args["fsdp_version"] == 2


def test_a_source_smaller_than_a_micro_batch_is_one_line(config, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(config), "--output_dir", str(tmp_path), "--per_device_train_batch_size", "5000"])
    message = str(stop.value.code)
    assert message.startswith("error: sources.digits: ") and "\n" not in message
    assert "micro-batch of 5000" in message and "per_device_train_batch_size" in message


# ---- A finished run ----


@pytest.mark.parametrize(
    ("missing", "saved"), [("none", "the model, its card and its plots"), ("matplotlib", "the model and its card")]
)
def test_a_run_names_plots_only_if_they_are_drawn(config, tmp_path, monkeypatch, capsys, missing, saved):
    monkeypatch.setitem(sys.modules, missing, None)
    run(config, tmp_path / "out", "--max_steps", "1")
    assert f": {saved}\n" in capsys.readouterr().out.replace(str(tmp_path), "")
    assert (tmp_path / "out" / "training.png").exists() == ("plots" in saved)


def test_the_folder_holds_what_was_promised(finished):
    names = {path.name for path in finished.iterdir()}
    promised = {
        "model.safetensors",
        "tokenizer.json",
        "trainer_state.json",
        "training.png",
        "README.md",
        "pretrain.yaml",
    }
    assert promised <= names


def test_the_run_file_names_files_and_continues_a_row(finished):
    text, names = (finished / "RUN.md").read_text(), {path.name for path in finished.iterdir()}
    assert {name for name in names if f"`{name}`" not in text} <= {HOLDER_NAME, LOCK_NAME}
    assert not {name for name in re.findall(r"^\| `([^`]+)`", text, re.MULTILINE) if name not in names}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    row = {"input_ids": torch.arange(100, 132), "position_ids": torch.tensor([*range(12), *range(20)])}
    before, after = continuation(model, tokenizer, row)
    assert before == tokenizer.decode(row["input_ids"][:6])  # half of the first document
    tokens = model.generate(row["input_ids"][None, :6], max_new_tokens=26, do_sample=False, pad_token_id=0)[0, 6:]
    assert after == tokenizer.decode(tokens, skip_special_tokens=True)
    for source in ("letters", "digits", "signs"):
        assert f"### {source}\n" in text


def test_the_model_loads_in_float32_and_generates(finished):
    assert {tensor.dtype for tensor in load_file(finished / "model.safetensors").values()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    inputs = tokenizer("abcd", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False).shape[1] > 5


def test_losses_are_evaluated_first_and_last_and_fall(finished):
    log = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 3, STEPS]
    for key in ("eval_letters_loss", "eval_digits_loss", "eval_loss"):
        assert evaluations[-1][key] < evaluations[0][key]
    assert all(math.isfinite(evaluations[-1][key]) for key in ("eval_signs_loss", "eval_ood_loss"))


def test_the_card_says_what_the_state_says(finished):
    log = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    first, *_, last = (entry for entry in log if "eval_loss" in entry)
    card = (finished / "README.md").read_text()
    keys = {"letters": "letters", "digits": "digits", "signs": "signs", "macro": ""}
    for name, key in keys.items():
        key = f"eval_{key}_loss" if key else "eval_loss"
        row = re.search(rf"^\| {name} \|[^|]*\| *([\d.]+) *\| *([\d.]+) *\|", card, re.MULTILINE)
        assert row is not None, name
        assert row.groups() == (f"{first[key]:.4f}", f"{last[key]:.4f}")
    trained = [entry for entry in log if "path_cosine" in entry][-1]
    assert f"| `path_cosine` | {trained['path_cosine']:.3g} |" in card
    for source in ("letters", "digits"):
        assert f"| {int(trained[f'tokens/{source}']):,} |" in card


def test_the_saved_configuration_repeats_the_run(finished, tmp_path):
    again = pretrain(parse_arguments(["--config", str(finished / "pretrain.yaml"), "--output_dir", str(tmp_path)]))
    assert again.state.global_step == STEPS
    assert same_weights(finished, tmp_path)
    saved, repeated = (yaml.safe_load((folder / "pretrain.yaml").read_text()) for folder in (finished, tmp_path))
    saved["training"]["output_dir"] = str(tmp_path)
    assert saved == repeated


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_resumed_run_ends_in_the_same_weights(config, finished, tmp_path):
    schedule = ["--lr_scheduler_kwargs", '{"num_decay_steps": 2, "num_stable_steps": 3}']
    run(config, tmp_path / "last", "--max_steps", "3", *schedule)
    assert not same_weights(finished, tmp_path / "last")
    shutil.copytree(tmp_path / "last", tmp_path / "path")
    run(config, tmp_path / "last", "--resume_from_checkpoint", "last")
    run(config, tmp_path / "path", "--resume_from_checkpoint", str(tmp_path / "path" / "checkpoint-3"))
    for folder in (tmp_path / "last", tmp_path / "path"):
        assert same_weights(finished, folder)
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert min(entry["step"] for entry in log if "eval_loss" in entry) == 0  # the table begins at step 0


def test_a_finished_run_can_be_resumed_to_the_same_end(config, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    run(config, tmp_path / "copy", "--resume_from_checkpoint", "true")
    assert "All steps are trained already." in capsys.readouterr().out
    assert same_weights(finished, tmp_path / "copy")


def test_an_earlier_run_is_not_mixed_with_a_new_one(config, finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    with pytest.raises(ValueError, match="already holds checkpoints") as error:
        run(config, folder)
    for way_out in ("--resume_from_checkpoint", "--output_dir", "delete its checkpoint-* folders"):
        assert way_out in str(error.value)


def test_a_run_that_torchrun_has_restarted_is_resumed(config, finished, tmp_path, monkeypatch):
    """An earlier run in the folder is not: the first start was refused."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    saved = folder / "pretrain.yaml"
    saved.write_text(saved.read_text().replace(str(finished), str(folder)))

    def found(folder: Path, *flags: str) -> str | None:
        return find_checkpoint(parse_arguments(["--config", str(config), "--output_dir", str(folder), *flags]))

    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert found(tmp_path / "new") is None
        with pytest.raises(ValueError, match="already holds checkpoints") if count == "0" else nullcontext():
            assert found(folder) == str(folder / "checkpoint-6")
        with pytest.raises(ValueError, match="already holds checkpoints"):
            found(folder, "--seed", "3")
        given = ("--resume_from_checkpoint", str(folder / "checkpoint-3"))
        assert found(folder, *given) == str(folder / ("checkpoint-3" if count == "0" else "checkpoint-6"))
        assert found(folder, *given, "--seed", "3") == given[1]


@pytest.mark.slow
def test_a_killed_run_under_torchrun_ends_in_the_same_weights(config, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command += ["-m", "tests.pretrain.restart_worker", "--config", str(config), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "exitcode: -9" in done.stderr and "Resuming after step 3" in done.stdout
    assert same_weights(finished, tmp_path)


def test_only_the_folder_of_the_demo_is_overwritten(config, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/nexus-demo", "runs/mine"):
        shutil.copytree(finished, folder)
    with pytest.raises(ValueError, match=r"runs/mine already holds checkpoints .*only does so in runs/nexus-demo"):
        run(config, Path("runs/mine"), "--overwrite_output_dir")
    assert (tmp_path / "runs/mine/checkpoint-6").is_dir()
    run(config, Path("runs/nexus-demo"), "--overwrite_output_dir", "--max_steps", "2", "--save_steps", "2")
    assert [path.name for path in Path("runs/nexus-demo").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("model", [{"attn_implementation": "eager"}, {"model_type": "mamba", "hidden_size": 32}])
def test_impossible_isolation_is_refused_before_reading_data(config, tmp_path, monkeypatch, model):
    monkeypatch.setattr("hf_nexus.pretrain.run.load_mixture", lambda *args: pytest.fail("the data was loaded"))
    monkeypatch.setattr("hf_nexus.mixture.isolation._ROUNDING", -1.0)  # nothing is apart enough
    content = yaml.safe_load(config.read_text())
    content["model"] = {"vocab_size": 304, "tokenizer": content["model"]["tokenizer"], **model}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="isolate_documents: the documents of a row cannot be kept apart"):
        run(tmp_path / "c.yaml", tmp_path / "out", "--isolate_documents")


def test_the_folder_of_another_process_is_left_alone(config, finished, tmp_path, monkeypatch):
    def held(*args):
        raise BlockingIOError(errno.EAGAIN, "held")

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    monkeypatch.setattr("fcntl.flock", held)
    monkeypatch.setattr("hf_nexus.pretrain.run.load_mixture", lambda *args: pytest.fail("the data was loaded"))
    with pytest.raises(ValueError, match="copy is used by another process"):
        run(config, folder, "--overwrite_output_dir")
    assert [path.name for path in folder.glob("checkpoint-*")] == [path.name for path in finished.glob("checkpoint-*")]
    assert (folder / "pretrain.yaml").read_text() == (finished / "pretrain.yaml").read_text()


def test_the_folder_is_locked_until_the_report_is_written(config, tmp_path, monkeypatch):
    write_report, seen = hf_nexus.pretrain.run._write_report, []

    def look(*args):
        seen.append((tmp_path / LOCK_NAME).exists())
        write_report(*args)

    monkeypatch.setattr("hf_nexus.pretrain.run._write_report", look)
    run(config, tmp_path, "--max_steps", "1")
    assert seen == [True] and not (tmp_path / LOCK_NAME).exists()


def test_there_must_be_something_to_resume_from(config, tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        run(config, tmp_path, "--resume_from_checkpoint", "last")
    with pytest.raises(ValueError, match="there is no such folder"):
        run(config, tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-9"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="vocab_size=280"):
        run(config, tmp_path, "--vocab_size", "280")


def test_a_tokenizer_is_trained_on_the_sources_and_saved(config, tmp_path):
    trainer = run(config, tmp_path, "--tokenizer", "train", "--vocab_size", "290", "--max_steps", "1")
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.get_vocab() == trainer.processing_class.get_vocab() and len(saved) == 290
    assert len(saved.tokenize("abcd1234")) < 8


def test_a_tokenizer_is_not_trained_on_tokens(config, tmp_path):
    content = yaml.safe_load(config.read_text())
    content["data"]["sources"]["letters"] |= {"tokens_column": "ids"}
    content["model"]["tokenizer"] = "train"
    (tmp_path / "tokens.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="tokenizer='train' cannot read a tokens_column"):
        run(tmp_path / "tokens.yaml", tmp_path)


def test_an_interrupted_run_says_how_to_go_on(config, finished, tmp_path, monkeypatch, capsys):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setattr(NexusTrainer, "train", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(config), "--output_dir", str(tmp_path / "copy"), "--resume_from_checkpoint", "last"])
    assert stop.value.code == 130
    assert f"checkpoint-{STEPS}" in capsys.readouterr().out


def test_an_interrupt_before_the_first_step_is_confirmed(config, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_nexus.pretrain.run.load_mixture", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(config), "--output_dir", str(tmp_path / "run")])
    assert stop.value.code == 130
    assert "Interrupted before the first step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("world", "local", "fsdp", "command"),
    [
        (1, None, False, "with:\nhf-nexus train out/pretrain.yaml --resume"),
        (8, 8, False, "with:\nhf-nexus train out/pretrain.yaml --devices 8 --resume"),
        (64, 8, False, "by starting the run as before, with:\n--resume"),
        (8, 8, True, "by starting the run as before, with:\n--resume"),
    ],
)
def test_the_command_to_go_on_starts_the_same_processes(monkeypatch, capsys, world, local, fsdp, command):
    monkeypatch.setattr("hf_nexus.pretrain.run.last_checkpoint", lambda folder: "out/checkpoint-3")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    flags = dict.fromkeys(("bf16", "fp16", "use_cpu", "torch_compile"), False)
    args = Namespace(world_size=world, mixed_precision="no", **flags)
    assert how_to_go_on(capsys, args, fsdp) == f"{command}_from_checkpoint last\n"


def how_to_go_on(capsys, args, fsdp=False) -> str:
    """What an interrupted run in the folder `out` prints after the checkpoint."""
    trainer = Namespace(args=args, is_fsdp_enabled=fsdp, state=Namespace(global_step=4))
    run = PretrainRun(Namespace(folder=Path("out")), trainer, None, None, Console(), ExitStack())
    run._print_how_to_resume("Interrupted")
    printed = capsys.readouterr().out
    start = "Interrupted after step 4; continue checkpoint-3 "
    assert printed.startswith(start), printed
    return printed.removeprefix(start)


@pytest.mark.parametrize(
    ("variable", "on", "off", "field"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "no", "bf16"),
        ("ACCELERATE_USE_CPU", "True", "False", "use_cpu"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "NO", "torch_compile"),
    ],
)
def test_the_command_to_go_on_keeps_what_a_launcher_chose(config, monkeypatch, capsys, variable, on, off, field):
    """`accelerate launch` sets variables, and the command reads the saved fields."""
    monkeypatch.setattr("hf_nexus.pretrain.run.last_checkpoint", lambda folder: "out/checkpoint-3")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    as_before, directly = "by starting the run as before, with:\n--resume", "with:\nhf-nexus train"
    for value, said, words in ((on, "false", as_before), (on, "true", directly), (off, "false", directly)):
        monkeypatch.setenv(variable, value)
        args = parse_arguments(["--config", str(config), f"--{field}", said]).training
        assert how_to_go_on(capsys, args).startswith(words)


def test_an_error_in_training_keeps_its_traceback(config, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise ValueError("in the middle")

    monkeypatch.setattr(NexusTrainer, "train", fail)
    with pytest.raises(ValueError, match="in the middle"):
        main(["--config", str(config), "--output_dir", str(tmp_path)])


def test_the_card_of_a_run_without_a_log_line_counts_its_tokens(config, tmp_path):
    # With isolation the first token of a document would be no target.
    run(config, tmp_path, "--max_steps", "2", "--logging_steps", "50", "--isolate_documents", "false")
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert not any("tokens/letters" in entry for entry in log)
    card = (tmp_path / "README.md").read_text()
    rows = [re.search(rf"^\| {name} \|.*\| ([\d,]+) \|", card, re.MULTILINE) for name in ("letters", "digits")]
    assert sum(int(row[1].replace(",", "")) for row in rows) == 2 * 4 * 2 * 31


def test_after_a_sigterm_there_is_a_checkpoint_and_no_report(config, tmp_path, monkeypatch, capsys):
    train = NexusTrainer.train

    def terminated(self, *args, **kwargs):
        train(self, *args, **kwargs)
        self._checkpoints.stopped_by_sigterm = True

    monkeypatch.setattr(NexusTrainer, "train", terminated)
    with pytest.raises(SystemExit) as stop:
        run(config, tmp_path, "--max_steps", "2", "--save_steps", "2")
    assert stop.value.code == 143
    text = capsys.readouterr().out
    assert "continue checkpoint-2 with:" in text and "--resume_from_checkpoint last" in text
    assert not (tmp_path / "README.md").exists()


def test_a_refused_resumption_leaves_the_folder_as_it_was(config, tmp_path):
    run(config, tmp_path, "--max_steps", "2", "--save_steps", "2")
    told = (tmp_path / "pretrain.yaml").read_text()
    with pytest.raises(ValueError, match=r"seed was .* and is 3"):
        run(config, tmp_path, "--resume_from_checkpoint", "last", "--seed", "3", "--max_steps", "4")
    assert (tmp_path / "pretrain.yaml").read_text() == told


@pytest.mark.parametrize("fails", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_gone_before_the_process_group(config, tmp_path, monkeypatch, fails):
    train, destroy = NexusTrainer.train, torch.distributed.destroy_process_group
    models, alive = [], []

    def watched(self, *args, **kwargs):
        models.append(weakref.ref(self.model))
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        if fails:
            raise fails("in the middle")
        return train(self, *args, **kwargs)

    def watch():
        alive.append(models[0]() is not None)
        destroy()

    monkeypatch.setattr(NexusTrainer, "train", watched)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", watch)
    with pytest.raises(SystemExit if fails is KeyboardInterrupt else fails) if fails else nullcontext():
        main(["--config", str(config), "--output_dir", str(tmp_path)])
    assert alive == [False]


def test_an_error_ends_a_process_that_others_wait_for(monkeypatch):
    """NCCL would wait for them."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    with pytest.raises(RuntimeError, match="out of memory"), leaving_process_group():
        raise RuntimeError("out of memory")
    assert torch.distributed.is_initialized()
    with leaving_process_group():
        pass
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_the_demo_lowers_every_loss_and_resumes_exactly(tmp_path):
    output = tmp_path / "demo"
    first = pretrain(parse_arguments(["--config", "demo", "--output_dir", str(output)]))
    evaluations = [entry for entry in first.state.log_history if "eval_loss" in entry]
    keys = [f"eval_{name}_loss" for name in load_config("demo")["data"]["sources"]]
    assert len(keys) == 8
    for key in keys:
        assert evaluations[-1][key] <= evaluations[0][key] - 0.5, key
    flags = ["--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", str(output / "checkpoint-80")]
    pretrain(parse_arguments(["--config", str(output / "pretrain.yaml"), *flags]))
    assert same_weights(output, tmp_path / "resumed")


@pytest.mark.slow
def test_of_two_processes_only_one_prints(config, tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "pretrain_3b.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(recipe)]
    flags = ["--config", str(config), "--output_dir", str(tmp_path), "--per_device_train_batch_size", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(recipe.parents[1])}
    result = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Held-out loss (nats per token)") == 1
    assert (tmp_path / "README.md").exists()
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    trained = [entry for entry in log if "tokens/letters" in entry][-1]
    assert trained["tokens/letters"] + trained["tokens/digits"] == pytest.approx(STEPS * 4 * 2 * 32, rel=0.05)
