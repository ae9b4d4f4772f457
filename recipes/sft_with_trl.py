"""
Supervised fine-tuning on conversations of several sources: TRL's SFTTrainer with the Nexus update (pip install
'hf-nexus[trl]'). A minute on one CPU core, a tiny model from scratch and the built-in corpus, no download:

    python recipes/sft_with_trl.py --output_dir runs/sft
    python recipes/sft_with_trl.py --output_dir runs/sft-packed --packing True

A model and conversations of your own, in files of one JSON object {"messages": [...]} a line; LoRA if peft is there:

    accelerate launch recipes/sft_with_trl.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
        --files '{"chat": "chat.jsonl", "code": "code.jsonl"}' --mixture_weights '{"chat": 0.6, "code": 0.4}' \\
        --lora_r 16 --output_dir runs/sft --gradient_accumulation_steps 8 --max_steps 1000

Only what the assistant says is learned (`--assistant_only_loss False`: all of it). A trainer for preferences is made
in the same way: `class NexusDPOTrainer(NexusTrainerMixin, DPOTrainer): pass`.
"""

import json
from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from hf_nexus import NexusConfigMixin, NexusTrainerMixin
from hf_nexus.mixture.builtin.corpus import builtin_documents
from hf_nexus.mixture.builtin.tokenizer import train_tokenizer

BUILTIN = ("mathematics", "reasoning")
# `generation` marks what the assistant says, its end included.
TEMPLATE = """{%- for message in messages -%}
{%- if message.role == "assistant" -%}
A: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else -%}
Q: {{ message.content }}
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}A: {% endif -%}"""


class NexusSFTTrainer(NexusTrainerMixin, SFTTrainer):
    """Each source is tokenized and packed on its own, and a micro-batch holds one source."""


@dataclass
class NexusSFTConfig(NexusConfigMixin, SFTConfig):
    """SFTConfig with the Nexus fields, and defaults for the built-in corpus."""

    output_dir: str | None = "runs/sft"
    assistant_only_loss: bool = True
    max_length: int | None = 256
    max_steps: int = 40
    gradient_accumulation_steps: int = 4
    per_device_train_batch_size: int = 4
    learning_rate: float = 2e-3
    inner_lr: float = 0.1

    def __post_init__(self) -> None:
        if self.bf16 is None:  # SFTConfig would insist on it
            self.bf16 = is_torch_bf16_gpu_available()
        super().__post_init__()


@dataclass
class ScriptArguments:
    """What is trained, on what."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A tiny Llama from scratch by default."})
    files: str | None = field(default=None, metadata={"help": "JSON: the JSONL file of each source."})
    eval_rows: int = field(default=32, metadata={"help": "Conversations of each source that are held out."})
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains all weights."})

    def __post_init__(self) -> None:
        if self.lora_r and self.model_name_or_path is None:
            raise ValueError("--lora_r needs --model_name_or_path: adapters are of no use without their base.")


def conversations(source: str) -> Dataset:
    """The questions of a built-in source, with their solutions, as messages."""
    examples = [example for document in builtin_documents(source)[:60] for example in document.split("\n\n")]
    parts = [(question, answer) for question, _, answer in (e.partition("\n") for e in examples) if answer]
    roles = ("user", "assistant")
    turns = [[{"role": r, "content": text} for r, text in zip(roles, part, strict=True)] for part in parts]
    return Dataset.from_dict({"messages": turns})


def tiny_model(sources: dict[str, Dataset]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """From scratch, with a tokenizer trained on the sources."""
    texts = [turn["content"] for rows in sources.values() for messages in rows["messages"] for turn in messages]
    tokenizer = train_tokenizer(texts, vocab_size=1024)
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, NexusSFTConfig)).parse_args_into_dataclasses()
    set_seed(args.seed)
    files = json.loads(script.files) if script.files else {}
    sources = {name: load_dataset("json", data_files=path, split="train") for name, path in files.items()}
    sources = sources or {name: conversations(name) for name in BUILTIN}
    split = {name: rows.train_test_split(test_size=script.eval_rows, seed=0) for name, rows in sources.items()}

    if script.model_name_or_path is None:
        model, tokenizer = tiny_model(sources)
    else:
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype="float32")
    adapters = None
    if script.lora_r:
        from peft import LoraConfig

        adapters = LoraConfig(task_type="CAUSAL_LM", r=script.lora_r, target_modules="all-linear")

    trainer = NexusSFTTrainer(
        model=model,
        args=args,
        train_dataset=DatasetDict({name: parts["train"] for name, parts in split.items()}),
        eval_dataset={name: parts["test"] for name, parts in split.items()},
        processing_class=tokenizer,
        peft_config=adapters,
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    after = trainer.evaluate()
    for name in sources:
        print(f"{name}: loss {before[f'eval_{name}_loss']:.3f} -> {after[f'eval_{name}_loss']:.3f}")


if __name__ == "__main__":
    main()
