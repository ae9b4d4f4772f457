"""Outer optimizers: each one trains and resumes bit for bit. Muon with AdamW is tested in detail."""

import copy
import pickle
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor, init_device_mesh
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from hf_nexus import NexusConfig, NexusTrainerMixin
from hf_nexus.trainer.optimizers import MuonWithAdamW, create_matrix_optimizer, muon_options
from tests.support.tiny import Rows, tiny_llama

STEPS = 10
MUON = {"optim": "adamw_torch", "matrix_optimizer": "muon"}
# Name: the required package, and training fields. Without `optim` among them, the name is the `optim`.
OPTIMIZERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "adamw_torch": (None, {}),
    "adamw_torch_fused": (None, {}),
    "sgd": (None, {"learning_rate": 1.0, "optim_args": "momentum=0.9"}),
    "adafactor": (None, {}),
    "schedule_free_adamw": ("schedulefree", {"lr_scheduler_type": "constant"}),
    "lion_32bit": ("bitsandbytes", {}),
    "lion-pytorch": ("lion_pytorch", {"optim": "adamw_torch"}),  # given as a class, which has priority over `optim`
    "muon": (None, MUON),
    "muon, fused": (None, {**MUON, "optim": "adamw_torch_fused", "optim_args": "muon_lr=0.02"}),
}
CORE = ("adamw_torch", "schedule_free_adamw", "muon")


@pytest.fixture
def build(make_trainer, sources, tmp_path):
    """`build(name, folder, **config)`: a trainer that evaluates and then saves after every fourth step."""

    def make(name: str, folder: str = "out", model: nn.Module | None = None, **config: Any) -> Any:
        package, fields = OPTIMIZERS[name]
        module = pytest.importorskip(package) if package else None
        kwargs: dict[str, Any] = {"eval_dataset": {source: Rows(16, i) for i, source in enumerate(sources)}}
        if name == "lion-pytorch":
            kwargs["optimizer_cls_and_kwargs"] = (module.Lion, {"lr": 1e-2, "weight_decay": 0.1})
        defaults = {"optim": name, "weight_decay": 0.1, "lr_scheduler_type": "linear", "max_steps": STEPS}
        defaults |= {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
        return make_trainer(
            sources, model, kwargs, **(defaults | fields | {"output_dir": str(tmp_path / folder)} | config)
        )

    return make


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])


@pytest.mark.parametrize(
    "name", [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)
def test_every_optimizer_trains_and_resumes_to_the_bit(build, tmp_path, name: str) -> None:
    whole = build(name, "whole")
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before - 0.3
    resumed = build(name, "again", tiny_llama(seed=9))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    resumed.evaluate()
    assert torch.equal(weights(whole), weights(resumed))


class Watch(TrainerCallback):
    """Records the weights at each event."""

    def __init__(self) -> None:
        self.seen: dict[str, list[torch.Tensor]] = {"step": [], "evaluation": [], "pseudo-gradient": []}

    def _keep(self, event: str, model: nn.Module) -> None:
        self.seen[event].append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._keep("step", model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._keep("evaluation", model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._keep("pseudo-gradient", model)


def test_schedule_free_swaps_weights_outside_windows_only(build) -> None:
    trainer, watch = build("schedule_free_adamw", eval_steps=1, max_steps=4), Watch()
    trainer.add_callback(watch)
    trainer.train()
    trained, averaged, at_step = watch.seen["step"], watch.seen["evaluation"], watch.seen["pseudo-gradient"]
    for step in range(1, 3):  # at the first evaluation, both are the same
        assert (averaged[step] - trained[step]).norm() > 1e-3  # evaluated at the optimizer's evaluation weights
        # The window after an evaluation restores the training weights, not the evaluation weights.
        torch.testing.assert_close(at_step[step + 1], trained[step], atol=1e-6, rtol=1e-5)


# ---- Muon with AdamW ----


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(5, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(x)))


def joined(model: Small) -> MuonWithAdamW:
    matrices = [{"params": [model.hidden.weight, model.out.weight]}, {"params": []}]
    others = [{"params": [model.hidden.bias], "weight_decay": 0.0}, {"params": [model.out.bias]}]
    return MuonWithAdamW(matrices, others, muon={"lr": 0.02}, adamw={"lr": 0.01, "weight_decay": 0.1})


def walk(model: nn.Module, optimizers: list[Any], schedulers: tuple = (), steps: int = 3, seed: int = 1) -> None:
    data = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(8, 5, generator=data)).square().mean().backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        for scheduler in schedulers:
            scheduler.step()


def test_joined_they_step_as_each_does_alone_on_one_schedule() -> None:
    one, two = Small(), Small()
    together = joined(one)
    muon = torch.optim.Muon([two.hidden.weight, two.out.weight], lr=0.02)
    adamw = torch.optim.AdamW(
        [{"params": [two.hidden.bias], "weight_decay": 0.0}, {"params": [two.out.bias]}], lr=0.01, weight_decay=0.1
    )
    schedules = [LambdaLR(each, lambda step: 1 / (1 + step)) for each in (together, muon, adamw)]
    walk(one, [together], (schedules[0],))
    walk(two, [muon, adamw], tuple(schedules[1:]))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [group["lr"] for group in together.param_groups] == pytest.approx([0.01 / 4, 0.01 / 4, 0.02 / 4])


@pytest.mark.parametrize("how", ["state_dict", "pickle"])
def test_its_state_survives_the_round_trip(how: str) -> None:
    model = Small()
    optimizer = joined(model)
    walk(model, [optimizer])
    if how == "pickle":
        again, loaded = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        again = copy.deepcopy(model)
        loaded = joined(again)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(loaded.state) == 4  # one state for each parameter of both optimizers
    walk(model, [optimizer], seed=2)
    walk(again, [loaded], seed=2)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model = Small()
    calls = []

    def closure() -> torch.Tensor:
        calls.append(loss := model(torch.ones(2, 5)).square().mean())
        loss.backward()
        return loss

    assert joined(model).step(closure) is calls[0]
    assert len(calls) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_hidden_matrices_with_the_trainers_decay(build, tied: bool) -> None:
    trainer = build("muon", model=tiny_llama(tie_word_embeddings=tied), optim_args="muon_lr=0.5,muon_momentum=0.9")
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    kinds: dict[str, set[str]] = {"muon": set(), "adamw": set()}
    for group in optimizer.param_groups:
        kind = "muon" if "momentum" in group else "adamw"
        for p in group["params"]:
            kinds[kind].add(names[id(p)])
            assert group["weight_decay"] == (0.0 if "norm" in names[id(p)] else 0.1)
        assert group["lr"] == (0.5 if kind == "muon" else 1e-2)
        assert group.get("momentum", 0.9) == 0.9
    hidden = {name for name in names.values() if "_proj" in name}
    assert kinds == {"muon": hidden, "adamw": set(names.values()) - hidden}
    assert ("lm_head.weight" in kinds["adamw"]) is not tied


def of_muon(trainer: Any) -> set[str]:
    """The names of the parameters that Muon trains."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = [group for group in trainer.create_optimizer().param_groups if "momentum" in group]
    return {names[id(p)] for group in groups for p in group["params"]}


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_muon_leaves_the_head_of_a_classifier_to_adamw(build, task: str) -> None:
    body = {name for name, _ in tiny_llama().named_parameters() if "_proj" in name}
    model = getattr(transformers, f"LlamaFor{task}")(tiny_llama().config)
    found = of_muon(build("muon", model=model))
    assert {name.split("layers.")[-1] for name in found} == {name.split("layers.")[-1] for name in body}


@pytest.mark.parametrize(
    "adapter", [{"trainable_token_indices": [1, 2]}, {"target_modules": ["embed_tokens", "q_proj"]}]
)
def test_muon_leaves_adapters_of_embeddings_to_adamw(build, adapter: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **adapter})
    found = of_muon(build("muon", model=peft.get_peft_model(tiny_llama(), config)))
    assert len(found) == 2 and all("q_proj.lora_" in name for name in found)


def test_muon_leaves_output_adapters_and_single_rows_to_adamw(build) -> None:
    peft = pytest.importorskip("peft")
    for rank, expected in ((2, {"q_proj"}), (1, None)):
        targets = ["q_proj", "lm_head"]
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=rank, target_modules=targets))
        trainer = build("muon", model=model)
        if expected is None:
            with pytest.raises(ValueError, match="no trainable matrix"):
                trainer.create_optimizer()
            continue
        assert {name.split(".lora")[0].split(".")[-1] for name in of_muon(trainer)} == expected


def test_muon_needs_a_row_of_each_matrix_for_each_shard(build) -> None:
    trainer = build("muon", model=tiny_llama(intermediate_size=3))
    create = partial(create_matrix_optimizer, trainer.model, trainer.args, {}, [])
    assert len(create(shards=3).param_groups) == len(create().param_groups)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight' of shape \(3, 16\) over 4 ranks"):
        create(shards=4)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_parameters_of_different_meshes_are_stepped_apart(build, mesh: DeviceMesh) -> None:
    """As under tensor parallelism, which leaves norms as they are, and shards biases."""

    def stepped(*sharded: str) -> torch.Tensor:
        trainer = build("muon, fused", model=tiny_llama())
        for name in sharded:
            module, _, key = name.rpartition(".")
            owner = trainer.model.get_submodule(module)
            setattr(owner, key, nn.Parameter(distribute_tensor(getattr(owner, key), mesh, [Shard(0)])))
        optimizer = trainer.create_optimizer()
        for p in trainer.model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in trainer.model.parameters()]
        return torch.cat([p.detach().flatten() for p in whole])

    layer = "model.layers.0"
    parts = (f"{layer}.mlp.up_proj.weight", f"{layer}.input_layernorm.weight", "lm_head.weight")
    torch.testing.assert_close(stepped(*parts), stepped())


@pytest.mark.parametrize(("replicas", "sharded", "shards"), [(None, True, 4), (2, True, 2), (2, False, 1)])
def test_replicas_are_not_shards(replicas: int | None, sharded: bool, shards: int) -> None:
    mesh = replicas and SimpleNamespace(dp_replicate_size=replicas)
    args, accelerator = SimpleNamespace(world_size=4), SimpleNamespace(parallelism_config=mesh)
    trainer: Any = SimpleNamespace(args=args, accelerator=accelerator, sharded=sharded)
    assert NexusTrainerMixin._shards.fget(trainer) == shards


def test_one_learning_rate_serves_both_by_default(build) -> None:
    groups = build("muon").create_optimizer().param_groups
    assert {group["lr"] for group in groups} == {1e-2}
    assert {group["adjust_lr_fn"] for group in groups if "momentum" in group} == {"match_rms_adamw"}


@pytest.mark.parametrize("text", ["lr=0.1", "muon_lr", "muon_lr=fast", "muon_lr=-1", "muon_adjust_lr_fn=best"])
def test_unknown_muon_options_are_refused_by_the_config(text: str) -> None:
    with pytest.raises(ValueError, match=r"muon_lr|Learning rate|Adjust"):
        NexusConfig(output_dir="out", matrix_optimizer="muon", optim_args=text, report_to="none")
    NexusConfig(output_dir="out", optim_args=text, report_to="none")  # another optimizer may have this option


def test_options_may_have_spaces() -> None:
    assert muon_options(" muon_lr = 0.1, muon_adjust_lr_fn=original ") == {"lr": 0.1, "adjust_lr_fn": "original"}


def test_what_contradicts_a_matrix_optimizer_is_refused(make_trainer, sources) -> None:
    muon = {"matrix_optimizer": "muon"}
    with pytest.raises(ValueError, match="and optim='sgd' exclude each other"):
        make_trainer(sources, optim="sgd", **muon)
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    with pytest.raises(ValueError, match="an optimizer given to the trainer"):
        make_trainer(sources, trainer_kwargs=given, **muon)
    with pytest.raises(ValueError, match="matrix_optimizer: 'shampoo' is not allowed"):
        make_trainer(sources, matrix_optimizer="shampoo")
