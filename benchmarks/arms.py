"""Arms of the benchmarks: ways to train the same models on the same micro-batches."""

import os
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peers import NaiveNexus, SharpnessAware, UPGradDescent
from torch.utils.data import Dataset, Subset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_nexus import NexusConfig, NexusTrainer
from hf_nexus.mixture import SourceSchedule
from hf_nexus.mixture.indexed import MixtureDataset, MixtureSampler

__all__ = ["ARMS", "CUDA", "GROUPS", "LENGTH", "MODELS", "NEXUS", "NEXUS_FSDP2", "OFFLOAD", "PLAIN"]
__all__ += ["Arm", "Case", "RandomRows"]

CUDA = torch.cuda.is_available()
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
LENGTH = 2048 if CUDA else 256  # tokens per row, at most
SOURCES = ("text", "code", "mathematics")
SEED = 42
PLAIN, NEXUS, NEXUS_FSDP2 = "plain accumulation", "Nexus, gamma 0.05", "Nexus, FSDP2"
OFFLOAD = "Nexus, snapshot_device='cpu'"

_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
MODELS = {
    "1M": dict(zip(_SHAPE, (2048, 128, 384, 4, 4, 4), strict=True)),
    "15M": dict(zip(_SHAPE, (8192, 384, 1024, 7, 6, 6), strict=True)),
    "130M": dict(zip(_SHAPE, (49152, 768, 2048, 13, 12, 12), strict=True)),
    "3B": dict(zip(_SHAPE, (49152, 3072, 8192, 28, 24, 8), strict=True)),
}


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    trainer: type[Trainer] = Trainer
    settings: dict[str, Any] = field(default_factory=dict)  # training arguments in addition to those of all arms
    baseline: str = PLAIN  # the arm to compare with
    lora: bool = False  # train adapters of rank 8 on all linear layers instead of all weights
    launch: str = ""  # "ddp" or "fsdp2": train on two ranks
    needs: tuple[str, ...] = ()  # optional packages


_DDP = {"ddp_find_unused_parameters": False}
_FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
_PLAIN_LORA, _PLAIN_DDP, _PLAIN_FSDP2 = (f"{PLAIN}, {how}" for how in ("LoRA", "DDP", "FSDP2"))
ARMS = {
    PLAIN: Arm(),
    NEXUS: Arm(NexusTrainer),
    "gamma 0": Arm(NexusTrainer, {"inner_lr": 0.0}),
    "random direction": Arm(NexusTrainer, {"inner_direction": "random"}),
    OFFLOAD: Arm(NexusTrainer, {"snapshot_device": "cpu"}),
    "naive deep copies": Arm(NaiveNexus),
    "SAM": Arm(SharpnessAware),
    "UPGrad (TorchJD)": Arm(UPGradDescent, needs=("torchjd", "qpsolvers", "quadprog")),
    _PLAIN_LORA: Arm(baseline=_PLAIN_LORA, lora=True, needs=("peft",)),
    "Nexus, LoRA": Arm(NexusTrainer, baseline=_PLAIN_LORA, lora=True, needs=("peft",)),
    _PLAIN_DDP: Arm(Trainer, _DDP, _PLAIN_DDP, launch="ddp"),
    "Nexus, DDP global": Arm(NexusTrainer, _DDP, _PLAIN_DDP, launch="ddp"),
    "Nexus, DDP local": Arm(NexusTrainer, {**_DDP, "inner_sync": "local"}, _PLAIN_DDP, launch="ddp"),
    "Nexus, DDP node": Arm(NexusTrainer, {**_DDP, "inner_sync": "node"}, _PLAIN_DDP, launch="ddp"),
    _PLAIN_FSDP2: Arm(Trainer, _FSDP2, _PLAIN_FSDP2, launch="fsdp2"),
    NEXUS_FSDP2: Arm(NexusTrainer, _FSDP2, _PLAIN_FSDP2, launch="fsdp2"),
}
# Arms that are measured together. The first is the baseline.
GROUPS = {
    "nexus": [PLAIN, NEXUS],
    "controls": [PLAIN, "gamma 0", "random direction"],
    **({"offload": [PLAIN, OFFLOAD]} if CUDA else {}),
    "peers": [PLAIN, "naive deep copies", "SAM", "UPGrad (TorchJD)"],
    "lora": [_PLAIN_LORA, "Nexus, LoRA"],
    "ddp": [_PLAIN_DDP, "Nexus, DDP global", "Nexus, DDP local"],
    "machines": [_PLAIN_DDP, "Nexus, DDP global", "Nexus, DDP node", "Nexus, DDP local"],
    "fsdp2": [_PLAIN_FSDP2, NEXUS_FSDP2],
}


class RandomRows(Dataset):
    """Rows of random tokens."""

    def __init__(self, rows: int, length: int, seed: int, vocab_size: int):
        self.ids = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


@dataclass(frozen=True)
class Case:
    """One model and one micro-batch size."""

    model: str  # a key of `MODELS`
    tokens: int  # per micro-batch and rank: at most `LENGTH` (one row), or a multiple of it
    k: int  # micro-batches per outer step
    settings: dict[str, Any] = field(default_factory=dict)  # training arguments of all its arms
    attention: str = "sdpa"

    @property
    def rows(self) -> int:
        """Rows per micro-batch."""
        return max(1, self.tokens // LENGTH)

    def build_model(self, arm: str, device: str) -> PreTrainedModel:
        torch.manual_seed(SEED)
        config = LlamaConfig(**MODELS[self.model], tie_word_embeddings=True, use_cache=False)
        config._attn_implementation = self.attention
        with torch.device(device):
            model = LlamaForCausalLM(config)
            if ARMS[arm].lora:
                from peft import LoraConfig, get_peft_model

                model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        return model

    def parameters(self, arm: str) -> tuple[int, int]:
        """Number of parameters, and number of trainable parameters."""
        model = replace(self, attention="sdpa").build_model(arm, "meta")  # needs no package
        parameters = list(model.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

    def sources(self, steps: int) -> dict[str, RandomRows]:
        """Enough rows for `steps` outer steps within one epoch."""
        rows = -(-steps * self.k // len(SOURCES)) * self.rows * WORLD_SIZE
        shape = (rows, min(self.tokens, LENGTH))
        vocab_size = MODELS[self.model]["vocab_size"]
        return {name: RandomRows(*shape, seed, vocab_size) for seed, name in enumerate(SOURCES)}

    def trainer(self, arm: str, sources: dict[str, RandomRows], steps: int) -> Trainer:
        """A trainer of a new model. All arms read the same micro-batches in the same order."""
        spec = ARMS[arm]
        settings: dict[str, Any] = {
            "output_dir": tempfile.gettempdir(),  # nothing is written
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": self.k,
            "max_steps": steps,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not CUDA,
            "bf16": CUDA,
            "seed": SEED,
            **self.settings,
            **spec.settings,
        }
        dataset: Any = sources
        if issubclass(spec.trainer, NexusTrainer):
            args: TrainingArguments = NexusConfig(**settings)
        else:
            mixture = MixtureDataset(sources)
            # The order that NexusTrainer draws for these sources.
            schedule = SourceSchedule(dict.fromkeys(sources, 1.0), SEED, rows=self.rows * WORLD_SIZE)
            dataset = Subset(mixture, list(MixtureSampler(mixture, schedule)))
            args = TrainingArguments(**settings, train_sampling_strategy="sequential")
        args.device  # noqa: B018  # initializes the process group
        if spec.launch == "fsdp2" and not CUDA:
            # Accelerate shards on accelerators only. On CPU it uses DDP without a warning.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        trainer = spec.trainer(self.build_model(arm, "cuda" if CUDA else "cpu"), args, train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        return trainer
