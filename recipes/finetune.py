# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-nexus", "peft>=0.21"]
#
# [tool.uv.sources]
# hf-nexus = { path = "..", editable = true }
# ///
"""
Train or fine-tune a causal language model on text with the Nexus update.

Only the two lines marked `Nexus` differ from the same script for Trainer. `--train_source` needs these lines.

A small byte-level model from scratch on built-in text, in half a minute on one CPU core without a download:

    python recipes/finetune.py --train_file builtin/code --do_train --do_eval --max_steps 40 --block_size 128 \\
        --gradient_accumulation_steps 4 --learning_rate 3e-3 --inner_lr 0.1 --output_dir runs/finetune

20 more steps, with the same flags and these:

    --max_steps 60 --resume_from_checkpoint runs/finetune/checkpoint-40

A mixture, whose sources are files or datasets of the Hub. Each micro-batch holds one source, and each source is
evaluated. `--mixture_weights '{"code": 0.7, "records": 0.3}'` sets the shares, which are by size otherwise:

    python recipes/finetune.py --train_source code=builtin/code records=builtin/records --do_train --do_eval \\
        --max_steps 40 --block_size 128 --gradient_accumulation_steps 4 --learning_rate 3e-3 --inner_lr 0.1 \\
        --output_dir runs/finetune-mixture

LoRA adapters for a model of the Hub on a streamed dataset, pushed to the Hub. Use `torchrun` for several GPUs:

    python recipes/finetune.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --lora_r 16 \\
        --dataset_name HuggingFaceFW/fineweb-edu --dataset_config_name sample-10BT --streaming --block_size 1024 \\
        --do_train --do_eval --max_eval_samples 500 --max_steps 1000 --gradient_accumulation_steps 8 --bf16 \\
        --learning_rate 2e-4 --inner_lr 0.01 --output_dir runs/smol --push_to_hub
"""

import logging
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from datasets import Dataset, load_dataset
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    HfArgumentParser,
    default_data_collator,
    set_seed,
)

from hf_nexus import NexusConfig as TrainingArguments  # Nexus: was `from transformers import TrainingArguments`
from hf_nexus import NexusTrainer as Trainer  # Nexus: was `from transformers import Trainer`
from hf_nexus.errors import one_line_errors
from hf_nexus.evaluation.metrics import NextTokenAccuracy
from hf_nexus.files import Secret, hide_token
from hf_nexus.mixture.config import BUILTIN_PREFIX, SourceConfig
from hf_nexus.mixture.data_files import means_files
from hf_nexus.mixture.documents import DocumentEncoder, load_documents
from hf_nexus.mixture.texts import guess_columns, guess_source
from hf_nexus.trainer.distributed import one_process_first

TINY = "hidden_size=64,intermediate_size=192,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=4"


@dataclass
class ModelArguments:
    """Arguments of the model and the tokenizer."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or local path of a model."})
    model_type: str = field(default="llama", metadata={"help": "Architecture of a model from scratch."})
    config_overrides: str = field(default=TINY, metadata={"help": "Shape of a model from scratch, as a whole."})
    config_name: str | None = field(default=None, metadata={"help": "Saved configuration of a model from scratch."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's tokenizer, or bytes."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    token: Secret | None = field(default=None, metadata={"help": "Hub token. Default: that of `hf auth login`."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code in the model's repository."})
    dtype: str = field(default="float32", metadata={"help": "Type of the loaded weights. Trained ones need float32."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads."})
    lora_r: int = field(default=0, metadata={"help": "Rank of the LoRA adapters. 0 trains all weights."})

    def __post_init__(self) -> None:
        if self.lora_r and self.model_name_or_path is None:
            raise ValueError("--lora_r trains adapters of a pretrained model. Add --model_name_or_path.")


@dataclass
class DataTrainingArguments:
    """Arguments of the data."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "File, folder, glob or URL of data files."})
    train_source: list[str] | None = field(
        default=None,
        metadata={"help": "name=path of a source of a mixture: a file or Hub id. Several.", "action": "extend"},
    )
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on."})
    validation_split_percentage: int = field(default=5, metadata={"help": "Held-out part if there is no such file."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Maximum number of rows to train on."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Maximum number of rows to evaluate on."})
    block_size: int = field(default=512, metadata={"help": "Number of tokens in a row."})
    streaming: bool = field(default=False, metadata={"help": "Read the data during training. Needs --max_steps."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenization."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again."})

    def __post_init__(self) -> None:
        given = [self.dataset_name, self.train_file, self.train_source]
        if not any(given):
            raise ValueError(
                "There is no training data. Pass --dataset_name or --train_file, or several --train_source."
            )
        if self.train_source and any([self.dataset_name, self.train_file, self.validation_file]):
            raise ValueError("--train_source names all data. Pass it without --dataset_name and files.")

    def sources(self) -> dict[str, "DataTrainingArguments"]:
        """The arguments of each source of a mixture; empty for one dataset."""
        found: dict[str, DataTrainingArguments] = {}
        for text in self.train_source or []:
            name, _, path = text.partition("=")
            if not name or not path or name in found:
                raise ValueError(f"--train_source {text}: give each source once, as name=path.")
            of_files = means_files(path) or path.startswith(BUILTIN_PREFIX)
            found[name] = replace(self, train_source=None, **{"train_file" if of_files else "dataset_name": path})
        return found


def load_texts(
    args: DataTrainingArguments, cache_dir: str | None, token: str | None, name: str | None = None
) -> tuple[dict[str, Any], dict[str, SourceConfig]]:
    """
    The splits `train` and `validation`, and the columns of each, which are guessed from the first rows. Without
    validation data, both are the same rows. Errors name the source of a mixture.
    """
    if args.dataset_name is not None:
        options: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "streaming": args.streaming}
        texts = dict(load_dataset(args.dataset_name, args.dataset_config_name, trust_remote_code=False, **options))
        source = SourceConfig(args.dataset_name, **guess_columns(args.dataset_name, list(texts["train"].take(100))))
        sources = dict.fromkeys(texts, source)
    else:
        assert args.train_file is not None
        files = {"train": args.train_file, "validation": args.validation_file}
        sources = {split: guess_source(name or split, path) for split, path in files.items() if path is not None}
        texts = {s: load_documents(name or s, sources[s], "train", cache_dir, args.streaming)[0] for s in sources}
    for splits in (texts, sources):
        splits.setdefault("validation", splits["train"])
    return texts, sources


def group_texts(examples: dict[str, list], block_size: int) -> dict[str, list]:
    """Concatenate the texts and cut them into blocks. A shorter rest is dropped."""
    joined = {key: list(chain.from_iterable(values)) for key, values in examples.items()}
    length = len(joined["input_ids"]) // block_size * block_size
    rows = {key: [v[i : i + block_size] for i in range(0, length, block_size)] for key, v in joined.items()}
    return {**rows, "labels": [list(row) for row in rows["input_ids"]]}


def is_of(split: str, percent: int, number: int) -> bool:
    """Whether the row or hash with a number is of a split if a part of the rows is held out for the other."""
    return (number * percent % 100 < percent) == (split == "validation")


def tokenize(
    texts: Any, encoder: DocumentEncoder, args: DataTrainingArguments, taken: Callable[[int], bool] | None = None
) -> Any:
    """
    Rows of `block_size` tokens, of all documents or those with a taken number. Each document ends with an EOS. Workers
    of a data loader number the rows of a stream differently, so the number of a streamed document is its hash.
    """
    options: dict[str, Any] = {"batched": True}
    streamed = not isinstance(texts, Dataset)
    if not streamed:
        options |= {"num_proc": args.preprocessing_num_workers, "load_from_cache_file": not args.overwrite_cache}

    def encode(examples: Any, numbers: list[int]) -> dict[str, list]:
        read = encoder.documents(examples, numbers[0])
        of = [document.hash for document in read] if streamed else numbers
        documents = [document for number, document in zip(of, read, strict=True) if not taken or taken(number)]
        return {"input_ids": [tokens.tolist() for tokens in encoder.encode(documents)]}

    tokens = texts.map(encode, with_indices=True, remove_columns=list(next(iter(texts), {})), **options)
    return tokens.map(group_texts, fn_kwargs={"block_size": args.block_size}, **options)


def load_model(args: ModelArguments) -> tuple[Any, Any]:
    """The model and the tokenizer."""
    name = args.tokenizer_name or args.model_name_or_path
    options: dict[str, Any] = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    options |= {"cache_dir": args.cache_dir, "token": args.token}
    tokenizer = AutoTokenizer.from_pretrained(name, **options) if name else ByT5Tokenizer()
    if args.model_name_or_path is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype, **options)
    elif args.config_name is not None:
        config = AutoConfig.from_pretrained(args.config_name, **options)
        config.name_or_path = ""  # a new model is not trained further from this one
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    else:
        special = {
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = CONFIG_MAPPING[args.model_type]()
        config.update_from_string(args.config_overrides)  # reads the values, and keeps what follows from the old ones
        shape = {key: getattr(config, key) for key in re.findall(r"(\w+)=", args.config_overrides)}
        config = type(config)(**{"vocab_size": len(tokenizer), **special, **shape})
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if args.lora_r:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=args.lora_r, target_modules="all-linear"))
    return model, tokenizer


def build_trainer(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: TrainingArguments
) -> Trainer:
    sources = data_args.sources()
    endless = data_args.streaming and data_args.validation_file is None
    if endless and training_args.do_eval and data_args.max_eval_samples is None:
        raise ValueError("--streaming --do_eval would evaluate on the whole stream. Add --max_eval_samples.")
    logging.basicConfig(level=training_args.get_process_log_level())
    set_seed(training_args.seed)

    model, tokenizer = load_model(model_args)

    splits = {"train": data_args.max_train_samples} if training_args.do_train else {}
    if training_args.do_eval:
        splits["validation"] = data_args.max_eval_samples

    def load(args: DataTrainingArguments, name: str | None = None) -> dict[str, Any]:
        texts, sources = load_texts(args, model_args.cache_dir, model_args.token, name)
        shared, found = texts["train"] is texts["validation"], {}
        for split, most in splits.items():
            source = sources[split]
            encoder = DocumentEncoder(name or split, source, tokenizer, list(source.columns.values()))
            taken = partial(is_of, split, args.validation_split_percentage) if shared else None
            rows = tokenize(texts[split], encoder, args, taken)
            if isinstance(rows, Dataset) and not len(rows):
                raise ValueError(
                    f"{source.path}: the {split} split fills no row of {args.block_size} tokens. Lower --block_size, "
                    "add text, or raise --validation_split_percentage."
                )
            found[split] = rows if most is None else rows.take(most)
        return found

    with one_process_first(training_args):
        if sources:
            loaded = {name: load(args, name) for name, args in sources.items()}
            data: dict[str, Any] = {split: {name: rows[split] for name, rows in loaded.items()} for split in splits}
        else:
            data = load(data_args)

    accuracy = NextTokenAccuracy()
    return Trainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=accuracy.compute_metrics,
        preprocess_logits_for_metrics=accuracy.argmax,
    )


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(hide_token(sys.argv[1:]))
    trainer = build_trainer(model_args, data_args, training_args)

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(min(metrics["eval_loss"], 700))
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card = {"finetuned_from": model_args.model_name_or_path, "dataset": data_args.dataset_name}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    with one_line_errors():  # a traceback could show the token
        main()
