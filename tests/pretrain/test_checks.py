"""A plan refuses what a run refuses, with the same message and before anything is loaded."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from hf_nexus.files import require_folder
from hf_nexus.mixture.config import MixtureConfig
from hf_nexus.pretrain import run as pretrain
from hf_nexus.pretrain.checks import _check_metric
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.run import dry_run, prepare_run
from tests.support.tiny_config import planned

WSD = "--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps: 0 is not allowed"),
        ("--gradient_accumulation_steps -1", "of at least 1 and of at most 1,000,000"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size: 0"),
        ("--per_device_eval_batch_size -3", "per_device_eval_batch_size: -3"),
        ("--max_steps 100000000000000000000", "max_steps: 100000000000000000000 is not allowed"),
        ("--max_steps 10000000000", "max_steps: 10000000000 is not allowed"),
        ("--max_steps -1 --num_train_epochs 0", "the run has no steps"),
        ("--max_steps 0 --num_train_epochs 2", "the run has no steps"),
        ("--max_steps -1 --num_train_epochs 1e300", "num_train_epochs: 1e+300"),
        ("--dataloader_num_workers -1", "dataloader_num_workers: -1"),
        ("--seed -1", "seed: -1"),
        ("--fp16", "does not support fp16"),
        ("--bf16_full_eval", "bf16_full_eval=True would round the weights before they are saved"),
        ("--fp16_full_eval", "fp16_full_eval=True would round the weights before they are saved"),
        ("--optim lomo", "optim='lomo' updates weights inside the backward pass"),
        ("--optim galore_adamw_layerwise", "inside the backward pass"),
        ("--checkpoint_async --optim schedule_free_adamw", "does not support optim='schedule_free_adamw'"),
        ("--checkpoint_async --save_on_each_node True", "a folder that all machines share"),
        (
            "--checkpoint_async --push_to_hub True --hub_strategy every_save",
            "Set hub_strategy to 'end', 'checkpoint' or",
        ),
        ("--optim adafactor --matrix_optimizer muon", "exclude each other"),
        ("--report_to nonsense", "nonsense is not supported"),
        ("--report_to none,wandb", "none,wandb is not supported"),
        ("--learning_rate -1", "Invalid learning rate"),
        ("--learning_rate nan", "learning_rate: nan"),
        ("--adam_beta1 2", "Invalid beta parameter"),
        (f'{WSD} {{"bogus":1}}', "unexpected keyword argument 'bogus'"),
        (f"{WSD} {{}}", "num_decay_steps"),
        ('--accelerator_config {"bogus":1}', "unexpected keyword argument 'bogus'"),
        ('--accelerator_config {"split_batches":true}', "accelerator_config.split_batches=True"),
        ("--train_sampling_strategy sequential", "train_sampling_strategy='sequential'"),
        ("--use_cache", "use_cache=True would let"),
        ("--lr_scheduler_kwargs 3", "lr_scheduler_kwargs: '3' is not allowed; it must be a mapping"),
        ("--save_strategy best", "metric_for_best_model: missing"),
        ("--metric_for_best_model eval_lettres_loss", "not measured. Did you mean 'letters_loss'?"),
        ("--metric_for_best_model perplexity --label_smoothing_factor 0.1", "'perplexity' is not measured"),
        ("--push_to_hub --hub_model_id a/b/c", "hub_model_id='a/b/c' is not allowed"),
        ("--torch_compile_backend inducter", "'inducter' is not allowed. Did you mean 'inductor'?"),
        ("--optim_args a", "optim_args: 'a' is not allowed"),
        ("--deepspeed ds.json", "deepspeed"),
        ("--attn_implementation bogus", "bogus"),
        ("--temperature 1e-320", "temperature: 1e-320"),
        ('--mixture_weights {"letters":1e300,"digits":1}', "mixture_weights.letters: 1e+300"),
        ("--hidden_size 400000000000", "hidden_size: 400000000000"),
        ("--num_hidden_layers 100000", "num_hidden_layers: 100000"),
        ("--sequence_length 1000000000000", "sequence_length: 1000000000000"),
    ],
)
def test_a_plan_and_a_run_refuse_the_same(config: Path, tmp_path: Path, monkeypatch, flags: str, words: str) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(pretrain, "load_mixture", lambda *args: loaded.append("mixture"))
    given = [*flags.split(" "), "--output_dir", str(tmp_path)]
    messages = []
    for start in (lambda: dry_run(planned(config, *given)), lambda: prepare_run(run_arguments(config, given))):
        with pytest.raises(ValueError) as error:
            start()
        messages.append(str(error.value))
    assert words in messages[0] and messages[0] == messages[1] and not loaded


@pytest.mark.parametrize(("rows", "measured"), [(4, True), (None, False)])
def test_ood_sources_alone_have_no_second_mean(rows, measured) -> None:
    sources = {"web": {"path": "web.jsonl", "eval_rows": rows}, "law": {"path": "law.jsonl", "role": "ood"}}
    mixture = MixtureConfig.from_dict({"sources": sources})
    with nullcontext() if measured else pytest.raises(ValueError, match="'ood_loss' is not measured"):
        _check_metric("ood_loss", mixture)


def run_arguments(config: Path, flags: list[str]):
    return parse_arguments(["--config", str(config), *flags])


def test_a_missing_package_is_named_before_a_run_only(config: Path, monkeypatch) -> None:
    def missing() -> None:
        raise RuntimeError("CometCallback requires comet-ml. Run `pip install comet-ml`.")

    monkeypatch.setattr("hf_nexus.pretrain.checks.get_reporting_integration_callbacks", lambda names: [missing])
    planned(config)
    with pytest.raises(ImportError, match=r"^report_to: .*pip install comet-ml"):
        run_arguments(config, [])


@pytest.mark.parametrize("folder", ["", "file", "file/inside", "/proc/new"])
def test_a_bad_output_folder_is_named_before_anything_is_loaded(config, tmp_path, monkeypatch, folder) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(pretrain, "load_tokenizer", lambda *args: loaded.append("tokenizer"))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ValueError, match=rf"output_dir: '{folder}' is not"):
        prepare_run(run_arguments(config, ["--output_dir", folder]))
    assert not loaded


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(
        ValueError, match=r"^output_dir: .* is not a folder that can be written to \(Permission denied"
    ):
        require_folder(tmp_path)
