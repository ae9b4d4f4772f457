"""A pretraining run, from a configuration to a folder with a model, its plots and its card."""

import gc
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.logging import disable_progress_bar

from ..errors import one_line_errors
from ..files import printable
from ..lock import locked
from ..mixture.documents import vocabulary_size
from ..mixture.isolation import choose_isolation, isolation_problem
from ..mixture.loading import Mixture, load_mixture
from ..mixture.packing import largest_token, tokenizer_fingerprint
from ..mixture.texts import tokenizer_of_sources
from ..terminal import new_console
from ..trainer.checkpoints import last_checkpoint, recover
from ..trainer.checks import check_one_gpu
from ..trainer.distributed import one_process_first
from ..trainer.mixin import NexusTrainer
from .command_line import CommandLine, read_command_line
from .console import loss_table, print_plan, say
from .fields import PretrainArguments, PretrainConfig
from .folder import claim_folder, find_checkpoint
from .layout import check_planned_layout
from .model import build_model, config_of, model_config
from .parsing import resolve
from .plan import plan_run
from .progress import SaveOnSignal, TrainingProgress
from .run_file import write_run_file
from .sections import CONFIG_NAME

__all__ = [
    "PretrainRun",
    "dry_run",
    "leaving_process_group",
    "load_tokenizer",
    "main",
    "prepare_run",
    "pretrain",
    "run_command_line",
]

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Run a command line, by default that of the process, as [`run_command_line`]."""
    with one_line_errors():
        command_line = read_command_line(sys.argv[1:] if argv is None else argv)
    run_command_line(command_line)


def run_command_line(command_line: CommandLine, *, debug: bool = False) -> None:
    """
    Print the plan with `--dry_run`, else train.

    An error before the first step (in an argument, a source, the folder) ends the process with one line. An error in
    training keeps its traceback, and with `debug` every error does.
    """
    try:
        with leaving_process_group():
            _run(command_line, debug)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _run(command_line: CommandLine, debug: bool) -> None:
    # Its trainer is gone when it returns, as `leaving_process_group` requires.
    with one_line_errors(debug=debug):
        arguments = resolve(command_line)
        if arguments.dry_run:
            dry_run(arguments)
            return
        try:
            run = prepare_run(arguments)
        except KeyboardInterrupt:
            if arguments.training.process_index == 0:
                print("Interrupted before the first step. The same command starts again.", file=sys.stderr, flush=True)
            raise
    disable_progress_bar()  # of writing shards
    run.train()
    run.trainer.accelerator.wait_for_everyone()  # no process leaves while another still communicates


@contextmanager
def leaving_process_group() -> Iterator[None]:
    """
    Destroy the process group, if there is one, at the end of the context, after which no trainer may be left.

    As the last owner of a group of Gloo, DDP would join the threads of the group while it holds Python's lock, and
    wait forever for a thread that waits for that lock. After an error, groups of other backends are left to the end of
    the process: NCCL would wait for ranks that wait for this one, and the launcher would not learn of the error.
    """
    try:
        yield
    except BaseException as error:
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            traceback.clear_frames(error.__traceback__)  # they hold the model; the traceback can still be printed
            _destroy_process_group()
        raise
    if torch.distributed.is_initialized():
        _destroy_process_group()


def _destroy_process_group() -> None:
    gc.collect()
    torch.distributed.destroy_process_group()


def dry_run(arguments: PretrainArguments) -> None:
    """Print the plan for `--devices`, else for the launched processes, else for the devices of the configuration."""
    launched = arguments.training.world_size
    devices = arguments.hardware.devices or (launched if launched > 1 else max(1, arguments.model.accelerators))
    if arguments.training.process_index == 0:
        print_plan(arguments, plan_run(arguments, devices), new_console())


def pretrain(arguments: PretrainArguments) -> NexusTrainer:
    """
    Train a new model, or continue one.

    `output_dir` then holds the model (float32) and its tokenizer, `trainer_state.json`, `training.png`, `README.md`,
    and `pretrain.yaml`, which repeats the run if given as `--config` with another `--output_dir`. With several
    processes, delete the trainer before `torch.distributed.destroy_process_group()`, as [`main`] does.

    Raises:
        ValueError: a folder that already holds checkpoints, nothing to resume from, or sources that cannot be loaded.
    """
    run = prepare_run(arguments)
    run.train()
    return run.trainer


@dataclass
class PretrainRun:
    """A run that is ready for its first step."""

    arguments: PretrainArguments
    trainer: NexusTrainer
    mixture: Mixture
    checkpoint: str | None
    console: Console
    lock: ExitStack  # of the output folder

    def train(self) -> None:
        """
        Train, evaluate the last step if it is not evaluated yet, save, report, and release the output folder.

        Raises:
            KeyboardInterrupt: after Ctrl-C, which saves a checkpoint. A second one does not wait. If one after the
                last step comes too late for a checkpoint, the run goes on to its end.
        """
        with self.lock:
            try:
                self._train()
            except KeyboardInterrupt:
                self._print_how_to_resume("Interrupted")
                raise

    def _train(self) -> None:
        trainer, progress = self.trainer, TrainingProgress(self.console, bar=not self.trainer.args.disable_tqdm)
        signals = SaveOnSignal(self.console)
        for callback in (progress, signals):
            trainer.add_callback(callback)
        # On one process, the Trainer handles SIGTERM. On several, each would save when it notices the signal.
        sigterm = trainer.args.enable_jit_checkpoint and trainer.args.world_size > 1
        with progress.shown(), signals.listening(sigterm):
            trainer.train(resume_from_checkpoint=self.checkpoint)
        stopped = signals.stopped(trainer.state)
        if stopped == signal.SIGINT:
            raise KeyboardInterrupt
        if stopped or trainer.stopped_by_sigterm:  # the sender wants the machine, not an evaluation
            self._print_how_to_resume("Terminated")
            raise SystemExit(128 + signal.SIGTERM)
        evaluated = {entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry}
        if self.mixture.eval and trainer.state.global_step not in evaluated:
            with progress.shown():
                trainer.evaluate()
        trainer.save_model(_internal_call=True)  # does not push: the push below includes the card
        trainer.save_state()
        try:
            if trainer.args.should_save:
                _write_report(self.arguments, trainer, self.mixture, self.console)
        finally:
            trainer.publish("End of training")

    def _print_how_to_resume(self, event: str) -> None:
        folder, processes = self.arguments.folder, self.trainer.args.world_size
        hint = "nothing was saved yet."
        if last := last_checkpoint(folder):
            how, resume = "by starting the run as before, with", "--resume_from_checkpoint last"
            one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) == processes
            # Else, --devices or the saved fields would start something else.
            if one_machine and not self.trainer.is_fsdp_enabled and not _launcher_decides(self.trainer.args):
                devices = f" --devices {processes}" if processes > 1 else ""
                how, resume = "with", f"hf-nexus train {shlex.quote(str(folder / CONFIG_NAME))}{devices} {resume}"
            hint = f"continue {Path(last).name} {how}:\n{resume}"
        say(self.console, f"{event} after step {self.trainer.state.global_step}; {hint}")


def _launcher_decides(args: PretrainConfig) -> bool:
    """Whether `accelerate launch` has chosen what the fields, which are saved, do not say."""
    return (
        (args.mixed_precision != "no" and not (args.bf16 or args.fp16))
        or (parse_flag_from_env("ACCELERATE_USE_CPU") and not args.use_cpu)
        or (os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no" and not args.torch_compile)
    )


def _write_report(arguments: PretrainArguments, trainer: NexusTrainer, mixture: Mixture, console: Console) -> None:
    """Write the card of a run and `RUN.md` into its output folder, and print the table of losses."""
    folder = arguments.folder
    summary = trainer.write_card(folder)
    console.print(loss_table(summary.evaluations))
    saved = "the model, its card and its plots" if summary.plot or summary.cosine_plot else "the model and its card"
    say(console, f"Saved in {folder}: {saved}")
    held_out = {} if trainer.sharded else mixture.eval  # one process has a part of the weights
    try:
        path = write_run_file(folder, trainer.model, trainer.processing_class, held_out)
        say(console, f"{path} says which file is what, and shows generated text")
    except Exception as error:  # a model may not be able to generate
        say(console, f"No text could be generated: {printable(error)}")


def prepare_run(arguments: PretrainArguments) -> PretrainRun:
    """
    Lock the output folder, build the tokenizer and the model, load the data, print the plan, build the trainer and
    claim the folder. What this run does not have of the planned hardware is refused first.
    """
    args = arguments.training
    check_one_gpu(args, f"hf-nexus train CONFIG --devices {args.n_gpu}")  # before minutes of tokenizing
    check_planned_layout(arguments.hardware, args)
    with ExitStack() as stack:
        with one_process_first(args):  # the others see what it recovers
            if args.process_index == 0:
                stack.enter_context(locked(arguments.folder))
                recover(arguments.folder)
        checkpoint = find_checkpoint(arguments)
        console = new_console(quiet=args.process_index > 0)
        if args.cpu_threads is not None:
            torch.set_num_threads(args.cpu_threads)
        set_seed(args.seed)
        names = ", ".join(arguments.mixture.sources)
        say(console, f"Reading the sources: {names}")
        with one_process_first(args):
            tokenizer = load_tokenizer(arguments, checkpoint)
            model = _build(arguments, tokenizer, checkpoint)
            if arguments.mixture.isolate_documents:  # before minutes of tokenizing
                choose_isolation(True, isolation_problem(model, use_cache=False))
            mixture = load_mixture(arguments.mixture, tokenizer)
            _check_tokens(mixture, tokenizer, model.config.get_text_config().vocab_size)
        print_plan(arguments, plan_run(arguments, args.world_size, mixture.tokens), console, mixture)
        if not args.report_to:
            show = shlex.join(["trackio", "show", "--project", args.project])
            say(console, f"Live curves in a browser: pip install trackio, add --report_to trackio, and run: {show}")
        trainer = NexusTrainer(model=model, args=args, train_dataset=mixture, processing_class=tokenizer)
        trainer.wait_after_training = False  # an evaluation and a report follow
        if not arguments.model.continues:
            trainer.card_details["base_model"] = None  # a new model, also if its configuration has a name
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        if checkpoint is not None:
            trainer.check_data(checkpoint)  # before the folder is changed
            step = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step
            say(console, f"Resuming after step {step} from {checkpoint}")
            if 0 < args.max_steps <= step:
                say(console, "All steps are trained already. What follows is the evaluation and the report.")
        if args.should_save:
            claim_folder(arguments, checkpoint, console)
        trainer.accelerator.wait_for_everyone()
        return PretrainRun(arguments, trainer, mixture, checkpoint, console, stack.pop_all())


def _build(
    arguments: PretrainArguments, tokenizer: PreTrainedTokenizerBase, checkpoint: str | None
) -> PreTrainedModel:
    config = model_config(arguments.model, arguments.mixture.sequence_length, tokenizer)
    saved = {"pretrained_model_name_or_path": arguments.model.path, "revision": arguments.model.revision}
    new = checkpoint is not None or not arguments.model.continues  # a checkpoint has all weights
    model = build_model(config, arguments.model.attn_implementation, **({} if new else saved))
    # The Trainer loads the weights only.
    if checkpoint is not None and Path(checkpoint, GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model


def _check_tokens(mixture: Mixture, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse packed tokens that the model has no embeddings for. In a stream, their lookup fails."""
    if vocabulary_size(tokenizer) <= vocab_size:
        return
    for name, rows in [*mixture.train.items(), *mixture.eval.items()]:
        if isinstance(rows, Dataset) and (token := largest_token(rows)) >= vocab_size:
            raise ValueError(
                f"sources.{name}: the documents have the token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), "
                f"but the model has embeddings for {vocab_size} tokens only. Replace it in the documents."
            )


def load_tokenizer(arguments: PretrainArguments, checkpoint: str | None) -> PreTrainedTokenizerBase:
    """
    The tokenizer of the checkpoint, that of the configuration, or one trained on the training sources.

    Raises:
        ValueError: a model has no embeddings for some tokens of a tokenizer that is not its own, or transformers loads
            another tokenizer with the saved model.
    """
    if checkpoint is not None:
        return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    model, name = arguments.model, arguments.model.tokenizer or arguments.model.path
    config = config_of(arguments)
    tokenizer: PreTrainedTokenizerBase
    if name == "train":
        tokenizer = tokenizer_of_sources(arguments.mixture, config.vocab_size)
    else:
        revision = model.revision if model.tokenizer is None else None
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if (entries := vocabulary_size(tokenizer)) > config.vocab_size:
        problem = f"The tokenizer {name!r} has {entries} entries, more than vocab_size={config.vocab_size}."
        if not model.continues or model.tokenizer is not None:
            raise ValueError(f"{problem} Raise vocab_size, or choose the tokenizer of the model.")
        # Models of the Hub lack embeddings of entries that their texts do not have, such as that of an image.
        logger.warning("%s A document with one of the others ends the run with an error.", problem)
    with TemporaryDirectory() as folder:  # of some types, transformers ignores the saved class
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer_fingerprint(loaded) != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"model: with a {config.model_type}, transformers loads the tokenizer {name!r} as a "
            f"{type(loaded).__name__}, which gives other tokens. Choose another model_type (qwen3 for qwen2), or the "
            "tokenizer of such a model."
        )
    return tokenizer
