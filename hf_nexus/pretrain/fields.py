"""The arguments of a pretraining run: the sections of its configuration, and the hardware to plan for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..mixture.config import MixtureConfig
from ..schema import documented
from ..strict import Bound, Positive, Text, check_fields
from ..trainer.config import NexusConfig

__all__ = ["SECTIONS", "SHAPE", "HardwareArguments", "ModelArguments", "PretrainArguments", "PretrainConfig"]

# Tensors of larger sizes have more bytes than a process can count.
Size = Annotated[int, Bound(least=1, most=10**7)]

# The fields of `ModelArguments` that are those of a configuration class. The first seven decide the sizes of weights.
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "tie_word_embeddings", "rms_norm_eps", "rope_theta", "max_position_embeddings"),
)


@documented
@dataclass
class HardwareArguments:
    """
    The hardware that a plan is computed for. Only from the command line.

    Args:
        devices (`int`, *optional*):
            Number of devices to plan for, which a run must not contradict. Defaults to that of the launcher, else that
            of the configuration.
        sharding (`str`, *optional*):
            `"ddp"` (each device holds a whole copy) or `"fsdp2"`. Defaults to what the launcher and the training
            arguments say, which a run must not contradict.
        tp_size (`int`, *optional*, defaults to 1):
            Devices that share the weights and the rows by tensor parallelism, next to FSDP2. Only for a plan.
        peak_tflops (`float`, *optional*, defaults to 989.0):
            Peak of one device, in TFLOP/s. The default is the stated dense bfloat16 peak of an H100 or H200.
        mfu (`float`, *optional*, defaults to 0.4):
            Share of the peak that the run reaches, which docs/cost.md explains. An assumption until it is measured.
        link (`float`, *optional*, defaults to 50.0):
            GB/s that one device sends to other machines. The default is one 400 Gb/s adapter per device.
        devices_per_node (`int`, *optional*):
            Devices of one machine. Defaults to those of the launcher, else to 8.
        node_link (`float`, *optional*, defaults to 450.0):
            GB/s that one device sends to the others of its machine. The default is NVLink of an H100.
        price_per_hour (`float`, *optional*):
            Price of one device for one hour, in any currency.

    Raises:
        ValueError: a value that is not allowed.
    """

    devices: Size | None = None
    sharding: Literal["ddp", "fsdp2"] | None = None
    tp_size: Size = 1
    peak_tflops: Positive = 989.0
    mfu: Annotated[float, Bound(above=0, most=1)] = 0.4
    link: Positive = 50.0
    devices_per_node: Size | None = None
    node_link: Positive = 450.0
    price_per_hour: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@documented
@dataclass
class ModelArguments:
    """
    The `model` section: a new model or one to continue, and its tokenizer. In a file, all fields of the configuration
    class of the model are keys of this section: `num_local_experts` of [`~transformers.MixtralConfig`], for example.

    The defaults are those of a small Llama. For another type, what is not set is that of its configuration class.

    Args:
        vocab_size (`int`, *optional*, defaults to 4096):
            Rows of the embedding, at least the length of the tokenizer.
        hidden_size (`int`, *optional*, defaults to 128):
            Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 384):
            Width of the feed-forward layers.
        num_hidden_layers (`int`, *optional*, defaults to 4):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 4):
            Number of attention heads.
        num_key_value_heads (`int`, *optional*):
            Number of key and value heads. Defaults to the number of attention heads.
        max_position_embeddings (`int`, *optional*):
            Longest context, in tokens. Defaults to the `sequence_length` of the data.
        rope_theta (`float`, *optional*, defaults to 10000.0):
            Base of the rotary embedding.
        rms_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the normalization layers.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Share the input and output embeddings.
        attn_implementation (`str`, *optional*):
            Attention implementation, as in transformers.
        tokenizer (`str`, *optional*):
            Hub id or local path. `"train"` trains a byte-level BPE of at most `vocab_size` entries on the first 20
            million characters of each training source. It is saved with the model. Defaults to the tokenizer of a
            model to continue, else to `"train"`.
        accelerators (`int`, *optional*, defaults to 0):
            Number of accelerators that the configuration is designed for. 0: it also runs on a CPU.
        path (`str`, *optional*):
            Hub id or folder of a model to continue, or a file `config.json` with the shape of a new model.
        revision (`str`, *optional*):
            Branch, tag or commit of `path`.
        model_type (`str`, *optional*):
            Type of a new causal language model of transformers, such as `"qwen3"` or `"mamba"`. Defaults to `"llama"`.
        config_fields (`dict`, *optional*):
            Other fields of the configuration class, for the command line.

    Raises:
        ValueError: a value that is not allowed, fields that exclude each other, or heads that do not divide the width.
            The message starts with the field.
    """

    vocab_size: Size | None = 4096
    hidden_size: Size | None = 128
    intermediate_size: Size | None = 384
    num_hidden_layers: Annotated[int, Bound(least=1, most=1000)] | None = 4
    num_attention_heads: Size | None = 4
    num_key_value_heads: Size | None = None
    max_position_embeddings: Size | None = None
    rope_theta: float | None = 10000.0
    rms_norm_eps: float | None = 1e-5
    tie_word_embeddings: bool | None = True
    attn_implementation: str | None = None
    tokenizer: str | None = None
    accelerators: Annotated[int, Bound(least=0)] = 0
    path: Text | None = None
    revision: Text | None = None
    model_type: Text | None = None
    config_fields: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.path is None and self.revision is not None:
            raise ValueError("revision: it is that of path, which is not set. Set path, or remove it.")
        if self.path is not None and self.model_type is not None:
            raise ValueError("model_type: path has a type already. Leave one of the two out.")
        sizes = [name for name in SHAPE[:7] if getattr(self, name) is not None]
        if self.continues and sizes:
            raise ValueError(f"{sizes[0]}: it is that of path, which is continued. Remove it.")
        if self.tokenizer is None and not self.continues:
            self.tokenizer = "train"
        heads = self.num_attention_heads
        if self.path is not None or self.model_type not in (None, "llama") or not (self.hidden_size and heads):
            return
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_attention_heads={heads} is not allowed: each head needs the "
                f"same even width. Make hidden_size a multiple of {2 * heads}, or change num_attention_heads."
            )

    @property
    def continues(self) -> bool:
        """Whether the model is that of `path`, and not a new one."""
        return self.path is not None and not self.path.endswith(".json")


@documented
@dataclass(repr=False)
class PretrainConfig(NexusConfig):
    """
    The `training` section: [`NexusConfig`] with options of the process and of the output folder.

    Args:
        cpu_threads (`int`, *optional*):
            Threads that compute on a CPU. Defaults to the choice of torch.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Delete the `checkpoint-*` folders of an earlier run if `output_dir` is that of the demo,
            `runs/nexus-demo`. Any other folder with checkpoints is an error unless the run is resumed.
    """

    cpu_threads: Annotated[int, Bound(least=1, most=10_000)] | None = None
    overwrite_output_dir: bool = False
    # Types and defaults that a saved configuration can hold. They mean the same as those of transformers.
    bf16: bool = False  # type: ignore[assignment]  # the model is built in float32
    debug: str | None = None  # type: ignore[assignment]
    include_num_input_tokens_seen: bool | str = False
    parallelism_config: None = None  # type: ignore[assignment]  # an object, which YAML cannot hold
    deepspeed: None = None  # not supported


SECTIONS: dict[str, type] = {"model": ModelArguments, "data": MixtureConfig, "training": PretrainConfig}


@dataclass
class PretrainArguments:
    """A configuration with the command line applied to it."""

    name: str  # of the configuration, or the path of its file
    sections: dict[str, dict[str, Any]]  # of the configuration, without the command line
    model: ModelArguments
    mixture: MixtureConfig  # the section `data`
    training: PretrainConfig
    resolved: dict[str, dict[str, Any]]  # all fields as plain data: saved as `pretrain.yaml`, a valid configuration
    dry_run: bool = False
    hardware: HardwareArguments = field(default_factory=HardwareArguments)

    @property
    def bf16(self) -> bool:
        """Whether a run computes in bfloat16, by its fields or by the choice of `accelerate launch`."""
        return bool(self.training.mixed_precision == "bf16")

    @property
    def folder(self) -> Path:
        """`output_dir`."""
        return Path(str(self.training.output_dir))
