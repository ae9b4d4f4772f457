"""What a pretraining run can be told: the sections of its configuration."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..mixture.config import MixtureConfig
from ..trainer.config import NexusConfig

__all__ = [
    "SECTIONS",
    "DataArguments",
    "HardwareArguments",
    "ModelArguments",
    "PretrainArguments",
    "PretrainConfig",
    "RunArguments",
]

DEFAULT_CONFIG = "3b"


@dataclass
class RunArguments:
    """What to do, as opposed to how to train; only from the command line."""

    config: str = field(default=DEFAULT_CONFIG, metadata={"help": "Name of a built-in configuration, or a YAML file."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and stop; needs no network and no GPU."})
    devices: int | None = field(
        default=None,
        metadata={"help": "Number of devices to plan for; the launcher's or the configuration's if unset."},
    )


@dataclass
class HardwareArguments:
    """
    What a plan is computed for, beside the number of devices; only from the command line.

    Args:
        sharding (`str`, *optional*):
            `"ddp"` (each device holds a whole copy) or `"fsdp2"`; what the launcher and the training arguments say if
            unset.
        peak_tflops (`float`, *optional*, defaults to 989.0):
            10^12 operations per second of one device; the default is what is stated for dense bfloat16 on an H100 or
            H200.
        mfu (`float`, *optional*, defaults to 0.4):
            Share of that peak which the run reaches: an assumption until it is measured (`mfu` in the logs).
        link (`float`, *optional*, defaults to 50.0):
            10^9 bytes per second that a device sends to the others; the default is one 400 Gb/s adapter per device.
        price_per_hour (`float`, *optional*):
            Of one device for one hour, in any currency.

    Raises:
        ValueError: names the field and what is allowed.
    """

    sharding: str | None = field(
        default=None, metadata={"help": "Plan for 'ddp' or 'fsdp2'; what the launcher says if unset."}
    )
    peak_tflops: float = field(default=989.0, metadata={"help": "Peak of a device to plan with, in TFLOP/s."})
    mfu: float = field(default=0.4, metadata={"help": "Share of the peak to plan with, above 0 and up to 1."})
    link: float = field(default=50.0, metadata={"help": "GB/s that a device sends to others, to plan with."})
    price_per_hour: float | None = field(default=None, metadata={"help": "Of one device, to plan the cost with."})

    def __post_init__(self) -> None:
        if self.sharding not in (None, "ddp", "fsdp2"):
            raise ValueError(f"--sharding {self.sharding!r} is not allowed; use 'ddp' or 'fsdp2'.")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu {self.mfu} is not allowed; it is a share of the peak, above 0 and up to 1.")
        for name in ("peak_tflops", "link", "price_per_hour"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} {value} is not allowed; it must be above 0.")


@dataclass
class ModelArguments:
    """
    The `model` section: the shape of a Llama, as in [`~transformers.LlamaConfig`], and its tokenizer.

    Args:
        vocab_size (`int`):
            Rows of the embedding; at least the tokenizer's length.
        hidden_size (`int`), intermediate_size (`int`), num_hidden_layers (`int`), num_attention_heads (`int`):
            The shape.
        num_key_value_heads (`int`, *optional*):
            Heads of keys and values; as many as attention heads if unset.
        max_position_embeddings (`int`, *optional*):
            Longest context; the `sequence_length` of the data if unset.
        rope_theta (`float`, *optional*, defaults to 10000.0), rms_norm_eps (`float`, *optional*, defaults to 1e-5),
        tie_word_embeddings (`bool`, *optional*, defaults to `True`), attn_implementation (`str`, *optional*):
            As in transformers.
        tokenizer (`str`, *optional*, defaults to `"train"`):
            Hub id or local path; `"train"` trains a byte-level BPE of `vocab_size` entries on the built-in training
            sources of the mixture.
        accelerators (`int`, *optional*, defaults to 0):
            Number of accelerators that the configuration is laid out for. 0: it runs on a CPU as well.
    """

    _argument_group_name = "model"

    vocab_size: int = field(default=4096, metadata={"help": "Rows of the embedding."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the residual stream."})
    intermediate_size: int = field(default=384, metadata={"help": "Width of the feed-forward layers."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Number of layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Key and value heads (grouped queries)."})
    max_position_embeddings: int | None = field(default=None, metadata={"help": "Longest context, in tokens."})
    rope_theta: float = field(default=10000.0, metadata={"help": "Base of the rotary embedding."})
    rms_norm_eps: float = field(default=1e-5, metadata={"help": "Epsilon of the normalization layers."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "Share the input and output embeddings."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel, as in transformers."})
    tokenizer: str = field(default="train", metadata={"help": "Hub id, local path, or 'train'."})
    accelerators: int = field(default=0, metadata={"help": "Accelerators it is laid out for; 0: a CPU will do."})


@dataclass
class DataArguments:
    """
    The fields of the `data` section, as in [`MixtureConfig`]; its `sources` are in the YAML only.

    Args:
        sequence_length (`int`, *optional*, defaults to 1024):
            Tokens per packed row.
        temperature (`float`, *optional*, defaults to 1.0):
            Sources without weights are sampled in proportion to `size ** (1 / temperature)`.
        num_proc (`int`, *optional*):
            Processes that tokenize.
        buffer_size (`int`, *optional*, defaults to 10000):
            Rows among which a streaming source is shuffled.
        stages (`list[dict]` or JSON `str`, *optional*):
            Weights by fraction of training: `[{"until": 0.8, "weights": {...}}, {"until": 1.0, "weights": {...}}]`.
        isolate_documents (`bool`, *optional*):
            Keep the documents of a row from attending to each other; where the attention allows it if unset.
    """

    _argument_group_name = "data"

    sequence_length: int = field(default=1024, metadata={"help": "Tokens per packed row."})
    temperature: float = field(default=1.0, metadata={"help": "Above 1, small sources are sampled more often."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    buffer_size: int = field(default=10_000, metadata={"help": "Rows among which a streaming source is shuffled."})
    stages: list | str | None = field(default=None, metadata={"help": "Weights by fraction of training; JSON."})
    isolate_documents: bool | None = field(
        default=None, metadata={"help": "No attention across documents; where the attention allows it if unset."}
    )


@dataclass
class PretrainConfig(NexusConfig):
    """
    The `training` section: [`NexusConfig`], with what concerns the process and a folder that is used again.

    Args:
        cpu_threads (`int`, *optional*):
            Threads that compute on a CPU; torch's choice if unset.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Delete the `checkpoint-*` folders of an earlier run in `output_dir` and start anew. When off, such a folder
            is refused unless the run is resumed.
    """

    cpu_threads: int | None = field(default=None, metadata={"help": "Threads that compute on a CPU."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete an earlier run's checkpoints in output_dir instead of refusing it."}
    )


SECTIONS: dict[str, type] = {"model": ModelArguments, "data": DataArguments, "training": PretrainConfig}


@dataclass
class PretrainArguments:
    """
    A parsed command line.

    Attributes:
        model, data, training, mixture:
            The sections; `mixture` is the whole `data` section, sources included.
        devices (`int`, *optional*), dry_run (`bool`), config (`str`), hardware ([`HardwareArguments`]):
            From the command line.
        resolved (`dict`):
            Every field with the value it was given, as plain data: what is saved, and can be given back as `--config`.
        changed (`dict`):
            Those of the `training` section that differ from their defaults.
    """

    model: ModelArguments
    data: DataArguments
    training: PretrainConfig
    mixture: MixtureConfig
    config: str
    dry_run: bool
    devices: int | None
    resolved: dict[str, dict[str, Any]]
    changed: dict[str, Any]
    hardware: HardwareArguments = field(default_factory=HardwareArguments)

    @property
    def folder(self) -> Path:
        """`output_dir`."""
        return Path(str(self.training.output_dir))
