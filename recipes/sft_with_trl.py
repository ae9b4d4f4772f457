# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-nexus[trl]"]
#
# [tool.uv.sources]
# hf-nexus = { path = "..", editable = true }
# ///
"""
Fine-tune on conversations of several sources with TRL's SFTTrainer and the Nexus update: pip install '.[trl]'

A tiny model from scratch on the built-in corpus, in a minute on one CPU core without a download:

    python recipes/sft_with_trl.py --output_dir runs/sft
    python recipes/sft_with_trl.py --output_dir runs/sft-packed --packing True

A pretrained model with LoRA on your own files, whose rows hold {"messages": [...]}:

    accelerate launch recipes/sft_with_trl.py --model_name_or_path Qwen/Qwen3-0.6B \\
        --files '{"chat": "chat.jsonl", "code": "code.jsonl"}' --mixture_weights '{"chat": 0.6, "code": 0.4}' \\
        --lora_r 16 --learning_rate 2e-4 --inner_lr 0.01 --gradient_accumulation_steps 8 --max_steps 1000 \\
        --output_dir runs/sft

A base model without a chat template learns a plain one (`Q: ... A: ...`), or that of `--chat_template_path`.
The loss is on the messages of the assistant only. A model whose template TRL does not know, such as SmolLM2's, needs
`--assistant_only_loss False`. Other TRL trainers work in the same way:
`class NexusDPOTrainer(NexusTrainerMixin, DPOTrainer): pass`.
"""

from dataclasses import dataclass, field

import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import is_conversational, is_conversational_from_value

from hf_nexus import NexusConfigMixin, NexusTrainerMixin
from hf_nexus.errors import one_line_errors
from hf_nexus.mixture.builtin.corpus import builtin_documents
from hf_nexus.mixture.builtin.tokenizer import CHAT_TEMPLATE, train_tokenizer
from hf_nexus.mixture.config import SourceConfig
from hf_nexus.mixture.documents import load_documents
from hf_nexus.strict import parse_yaml
from hf_nexus.trainer.precision import has_bfloat16

BUILTIN = ("mathematics", "reasoning")
# Defaults for the tiny model from scratch. A pretrained one has those of TRL.
TINY = {"max_length": 256, "max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "inner_lr": 0.1}


class NexusSFTTrainer(NexusTrainerMixin, SFTTrainer):
    """SFTTrainer with the Nexus update. Each source is packed separately, and a micro-batch holds one source."""


@dataclass
class NexusSFTConfig(NexusConfigMixin, SFTConfig):
    """SFTConfig with the Nexus fields."""

    output_dir: str | None = "runs/sft"
    assistant_only_loss: bool = True
    gradient_accumulation_steps: int = 4
    eval_on_start: bool = True

    def __post_init__(self) -> None:
        if self.bf16 is None:  # SFTConfig would choose True, also without a GPU.
            self.bf16 = torch.accelerator.is_available() and has_bfloat16()
        super().__post_init__()


@dataclass
class ScriptArguments:
    """Arguments of the model and the data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or local path of a model. By default, a tiny Llama from scratch."}
    )
    files: str | None = field(
        default=None, metadata={"help": "A JSON object with the file, folder or Hub id of each source."}
    )
    eval_rows: int = field(default=32, metadata={"help": "Number of held-out conversations of each source."})
    lora_r: int = field(default=0, metadata={"help": "Rank of the LoRA adapters. 0 trains all weights."})

    def __post_init__(self) -> None:
        if self.lora_r and self.model_name_or_path is None:
            raise ValueError("--lora_r trains adapters of a pretrained model. Add --model_name_or_path.")


def conversations(source: str) -> Dataset:
    """The problems of a built-in source and their solutions as messages."""
    problems = [problem for document in builtin_documents(source)[:60] for problem in document.split("\n\n")]
    messages = []
    for question, _, answer in (problem.partition("\n") for problem in problems):
        messages.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return Dataset.from_dict({"messages": messages})


def tiny_model(sources: dict[str, Dataset]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model from scratch and a tokenizer that is trained on the sources."""
    texts = [message["content"] for rows in sources.values() for chat in rows["messages"] for message in chat]
    tokenizer = train_tokenizer(texts, vocab_size=1024)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False), tokenizer


def tokenizer_of(name: str, args: NexusSFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a chat template, which is checked before anything else is loaded."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not tokenizer.chat_template and args.chat_template_path is None:
        print(f"{name} has no chat template. It learns a plain one; --chat_template_path names another.")
        tokenizer.chat_template = CHAT_TEMPLATE
    if args.assistant_only_loss and args.chat_template_path is None:
        try:
            if not has_generation_markers(tokenizer.chat_template):
                get_training_chat_template(tokenizer)  # TRL knows those of common models
        except ValueError as error:
            raise ValueError(
                f"The chat template of {name} does not mark what the assistant writes. Pass "
                "--assistant_only_loss False to train on all messages, or a marked template as --chat_template_path."
            ) from error
    return tokenizer


def load_sources(script: ScriptArguments, args: NexusSFTConfig) -> dict[str, Dataset]:
    """The conversations of the files, or of the built-in corpus."""
    if script.files is None:
        return {name: conversations(name) for name in BUILTIN}
    sources: dict[str, Dataset] = {}
    for name, path in parse_yaml(script.files, "--files").items():
        sources[name], _ = load_documents(name, SourceConfig(path), "train", every_column=True)
        check_format(name, sources[name][0], script, args)
    return sources


def check_format(name: str, row: dict, script: ScriptArguments, args: NexusSFTConfig) -> None:
    """Refuse rows that cannot be trained on before anything else is loaded."""
    if script.model_name_or_path is None:  # its tokenizer is trained on messages
        fits = "messages" in row
    elif args.assistant_only_loss:
        fits = is_conversational(row) or is_conversational_from_value(row)
    else:
        fits = any(column in row for column in (args.dataset_text_field, "messages", "conversations", "completion"))
    if not fits:
        raise ValueError(
            f"Source {name!r} has the columns {', '.join(row)}. Save conversations as 'messages'. A pretrained model "
            "with --assistant_only_loss False may also learn 'text', or the 'completion' of a 'prompt'."
        )


def read_arguments() -> tuple[ScriptArguments, NexusSFTConfig]:
    parser = HfArgumentParser((ScriptArguments, NexusSFTConfig))
    if parser.parse_known_args()[0].model_name_or_path is None:
        parser.set_defaults(**TINY)
    return parser.parse_args_into_dataclasses()


def main() -> None:
    script, args = read_arguments()
    set_seed(args.seed)
    sources, split = load_sources(script, args), {}
    for name, rows in sources.items():
        if not 0 < script.eval_rows < len(rows):
            raise ValueError(f"--eval_rows {script.eval_rows}: source {name!r} has {len(rows)} rows to share.")
        split[name] = rows.train_test_split(test_size=script.eval_rows, seed=0)

    if script.model_name_or_path is None:
        model, tokenizer = tiny_model(sources)
    else:
        tokenizer = tokenizer_of(script.model_name_or_path, args)
        model = AutoModelForCausalLM.from_pretrained(
            script.model_name_or_path, dtype="float32", trust_remote_code=False
        )
    adapters = None
    if script.lora_r:
        from peft import LoraConfig

        adapters = LoraConfig(task_type="CAUSAL_LM", r=script.lora_r, target_modules="all-linear")

    trainer = NexusSFTTrainer(
        model=model,
        args=args,
        train_dataset=DatasetDict({name: rows["train"] for name, rows in split.items()}),
        eval_dataset={name: rows["test"] for name, rows in split.items()},
        processing_class=tokenizer,
        peft_config=adapters,
    )

    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    after = trainer.evaluate()
    if args.push_to_hub:
        trainer.push_to_hub()  # with the card of this evaluation
    else:
        trainer.create_model_card()
    before = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)  # on start
    for name in sources:
        print(f"{name}: loss {before[f'eval_{name}_loss']:.3f} -> {after[f'eval_{name}_loss']:.3f}")


if __name__ == "__main__":
    with one_line_errors():
        main()
