"""A pretraining run, from a configuration to a folder with a model, its curves and its card."""

import gc
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from ..files import one_line_errors
from ..mixture.loading import check_loadable
from ..trainer.checkpoints import last_checkpoint
from .fields import PretrainArguments
from .folder import claim_folder, find_checkpoint
from .model import build_model, model_config
from .parsing import parse_arguments
from .plan import plan_run, print_plan

if TYPE_CHECKING:
    from rich.console import Console

    from ..mixture.loading import Mixture
    from ..trainer.mixin import NexusTrainer

__all__ = ["PretrainRun", "dry_run", "load_tokenizer", "main", "prepare_run", "pretrain"]


def main(argv: list[str] | None = None, *, debug: bool = False) -> None:
    """
    Run a command line, that of the process by default: print the plan with `--dry_run`, else train.

    What is wrong before the first step (an argument, a source, a folder) ends the process with one line, or with its
    traceback if `debug`. An error in training always keeps its traceback.

    Args:
        argv (`list[str]`, *optional*):
            As for [`parse_arguments`].
        debug (`bool`, *optional*, defaults to `False`):
            Keep every traceback.

    Example:
        >>> from hf_nexus.pretrain.run import main
        >>> main(["--config", "3b", "--dry_run"])  # doctest: +SKIP
    """
    run = None
    try:
        run = _from_command_line(sys.argv[1:] if argv is None else argv, debug)
        if run is not None:
            disable_progress_bar()  # of writing shards; a line per log entry says enough
            run.train()
            run.trainer.accelerator.wait_for_everyone()  # nobody leaves while another still communicates
    except BaseException as error:
        if torch.distributed.is_initialized():
            traceback.clear_frames(error.__traceback__)  # they hold the model; the traceback can still be printed
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise
    finally:
        if torch.distributed.is_initialized():
            # The model first: as the last owner of the group, DDP would join the group's threads with Python's lock
            # held, and wait forever for one that waits for that lock.
            del run
            gc.collect()
            torch.distributed.destroy_process_group()


def _from_command_line(argv: list[str], debug: bool) -> "PretrainRun | None":
    with one_line_errors(debug=debug):
        arguments = parse_arguments(argv)
        if arguments.dry_run:
            dry_run(arguments)
            return None
        return prepare_run(arguments)


def dry_run(arguments: PretrainArguments) -> None:
    """Print the plan for `--devices`, else for the launcher's processes, else for what the configuration names."""
    launched = arguments.training.world_size
    devices = arguments.hardware.devices or (launched if launched > 1 else max(1, arguments.model.accelerators))
    if arguments.training.process_index == 0:
        print_plan(arguments, plan_run(arguments, devices), _console())


def pretrain(arguments: PretrainArguments) -> "NexusTrainer":
    """
    Train a model from scratch and leave in `output_dir`: the model (float32) and its tokenizer, `trainer_state.json`,
    `training.png`, `README.md`, and `pretrain.yaml`, which given as `--config` repeats the run.

    Of several processes, drop the trainer before `torch.distributed.destroy_process_group()`, as [`main`] does.

    Args:
        arguments ([`PretrainArguments`]):
            What [`parse_arguments`] returns.

    Returns:
        [`NexusTrainer`]: after training.

    Raises:
        ValueError: a folder that already holds checkpoints, nothing to resume from, or sources that cannot be loaded.

    Example:
        >>> from hf_nexus.pretrain.parsing import parse_arguments
        >>> from hf_nexus.pretrain.run import pretrain
        >>> trainer = pretrain(parse_arguments(["--config", "demo"]))  # doctest: +SKIP
    """
    run = prepare_run(arguments)
    run.train()
    return run.trainer


@dataclass
class PretrainRun:
    """A run that is ready for its first step."""

    arguments: PretrainArguments
    trainer: "NexusTrainer"
    mixture: "Mixture"
    checkpoint: str | None
    console: "Console"

    def train(self) -> None:
        """Train, evaluate at the end if that was not done anyway, save, and report."""
        from .console import write_report

        trainer = self.trainer
        try:
            trainer.train(resume_from_checkpoint=self.checkpoint)
        except KeyboardInterrupt:
            self._say_how_to_go_on("Interrupted")
            raise
        if trainer.stopped_by_sigterm:  # whoever sent it wants the machine, not an evaluation
            self._say_how_to_go_on("Terminated")
            raise SystemExit(128 + signal.SIGTERM)
        evaluated = {entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry}
        if self.mixture.eval and trainer.state.global_step not in evaluated:
            trainer.evaluate()
        trainer.save_model(_internal_call=True)  # what is pushed has its card
        trainer.save_state()
        try:
            if trainer.args.should_save:
                write_report(self.arguments, trainer, self.console)
        finally:
            trainer.publish("End of training")

    def _say_how_to_go_on(self, what: str) -> None:
        last = last_checkpoint(self.arguments.folder)
        hint = f"continue {Path(last).name} with --resume_from_checkpoint last" if last else "nothing was saved yet"
        self.console.print(f"{what} after step {self.trainer.state.global_step}; {hint}.")


def prepare_run(arguments: PretrainArguments) -> PretrainRun:
    from ..mixture.loading import load_mixture
    from ..trainer.mixin import NexusTrainer
    from .console import RunLog

    args = arguments.training
    check_loadable(arguments.mixture)
    checkpoint = find_checkpoint(arguments)
    console = _console(quiet=args.process_index > 0)
    if args.cpu_threads is not None:
        torch.set_num_threads(args.cpu_threads)
    set_seed(args.seed)
    with args.main_process_first(desc="tokenizer and datasets"):
        tokenizer = load_tokenizer(arguments, checkpoint)
        mixture = load_mixture(arguments.mixture, tokenizer)
    print_plan(arguments, plan_run(arguments, args.world_size, mixture.tokens), console, mixture)
    _print_layout(arguments, console)
    config = model_config(arguments.model, arguments.mixture.sequence_length, tokenizer)
    trainer = NexusTrainer(
        model=build_model(config, arguments.model.attn_implementation),
        args=args,
        train_dataset=mixture,
        processing_class=tokenizer,
    )
    trainer.wait_after_training = False  # there is an evaluation to come, and a report
    trainer.card_details["base_model"] = None  # there is none, whatever name the configuration carries
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(RunLog(console))
    if checkpoint is not None and not args.allow_mixture_change:
        trainer.check_data(checkpoint)  # before the folder is changed
    if args.should_save:
        claim_folder(arguments, checkpoint, console)
    trainer.accelerator.wait_for_everyone()
    return PretrainRun(arguments, trainer, mixture, checkpoint, console)


def load_tokenizer(arguments: PretrainArguments, checkpoint: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer named by the configuration, or one trained on its built-in training sources."""
    from ..mixture.builtin.corpus import builtin_documents
    from ..mixture.builtin.tokenizer import train_tokenizer

    name, size = arguments.model.tokenizer, arguments.model.vocab_size
    if checkpoint is not None:
        return AutoTokenizer.from_pretrained(checkpoint)
    if name != "train":
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        paths = [source.path for source in arguments.mixture.train_sources.values()]
        builtin = [path.removeprefix("builtin/") for path in paths if path.startswith("builtin/")]
        if not builtin:
            raise ValueError(
                "tokenizer='train' needs built-in training sources, and the mixture has none: set model.tokenizer to "
                "the Hub id or path of a tokenizer."
            )
        tokenizer = train_tokenizer((text for source in builtin for text in builtin_documents(source)), size)
    if len(tokenizer) > size:
        raise ValueError(
            f"The tokenizer {name!r} has {len(tokenizer)} entries, more than vocab_size={size}; raise vocab_size."
        )
    return tokenizer


def _print_layout(arguments: PretrainArguments, console: "Console") -> None:
    planned, devices = arguments.model.accelerators, arguments.training.world_size
    if planned not in (0, devices):
        console.print(
            f"[yellow]{arguments.config} is laid out for {planned} accelerators and runs on {devices}: a step has "
            f"{devices / planned:g} of the tokens it was tuned for. Change gradient_accumulation_steps, "
            "per_device_train_batch_size or max_steps to make up for it."
        )


def _console(quiet: bool = False) -> "Console":
    from rich.console import Console

    return Console(quiet=quiet)
