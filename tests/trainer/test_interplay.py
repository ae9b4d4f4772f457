"""
Nexus with other settings. Settings of speed and memory change no result. Settings that change the training have the
same effect as in a loop around `Nexus` on the same micro-batches.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend

from hf_nexus import Nexus, NexusConfigMixin, NexusTrainer, NexusTrainerMixin
from tests.support.faults import AtEvents
from tests.support.tiny import VOCAB, Rows, tiny_llama

Batch = dict[str, torch.Tensor]


class Narrow(Trainer):
    """Overrides with fewer or other arguments, as the examples of transformers have them."""

    def create_optimizer(self):
        return super().create_optimizer()

    def evaluate(self, eval_dataset=None, examples=None, ignore_keys=None, metric_key_prefix="eval"):
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, **kwargs):
        return super().evaluation_loop(dataloader, description, prediction_loss_only, **kwargs)


class InitFirst(Trainer):
    """Makes the model before the constructor of the Trainer, as sentence-transformers does."""

    def __init__(self, model=None, args=None, model_init=None, **kwargs):
        self.model_init = model_init
        super().__init__(self.call_model_init() if model is None else model, args, **kwargs)


@pytest.mark.parametrize("nexus", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_overrides_with_other_arguments_are_called(make_trainer, sources, nexus, several):
    class Ours(NexusTrainerMixin, Narrow):
        pass

    held_out = {"text": Rows(4, 0), "law": Rows(4, 5)} if several else Rows(4, 0)
    args = make_trainer(sources, nexus=nexus, max_steps=1).args
    trainer = Ours(tiny_llama(), args, train_dataset=sources, eval_dataset=held_out)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("nexus", [True, False])
def test_a_model_may_be_made_before_the_trainer(make_trainer, sources, nexus):
    class Ours(NexusTrainerMixin, InitFirst):
        pass

    args = make_trainer(sources, nexus=nexus, max_steps=1).args
    trainer = Ours(args=args, model_init=lambda: tiny_llama(), train_dataset=sources)
    assert trainer.train().global_step == 1


def test_a_metric_of_no_set_keeps_its_name(make_trainer, sources):
    """sentence-transformers runs its evaluator once, with the first set."""

    class Once(Trainer):
        def evaluation_loop(self, *args, metric_key_prefix, **kwargs):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            output.metrics.update({"eval_similarity": 0.5} if metric_key_prefix == "eval_text" else {})
            return output

    class Ours(NexusTrainerMixin, Once):
        pass

    args = make_trainer(sources).args
    for names in (["text"], ["text", "law"]):
        trainer = Ours(tiny_llama(), args, train_dataset=sources, eval_dataset={name: Rows(4, 0) for name in names})
        metrics = trainer.evaluate()
        assert metrics["eval_similarity"] == 0.5 and ("eval_text_similarity" in metrics) == (len(names) == 1)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def distance(model: torch.nn.Module, other: torch.nn.Module) -> float:
    return float((weights(model) - weights(other)).norm() / weights(other).norm())


class Recorded(NexusTrainer):
    """Records the micro-batches of each window and the random state at its start."""

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(*args)
        self.windows = [*getattr(self, "windows", []), ([dict(b) for b in batches], torch.get_rng_state())]
        return batches, items


def by_hand(
    model: torch.nn.Module,
    windows: list[tuple[list[Batch], torch.Tensor]],
    compute_loss: Callable[[torch.nn.Module, Batch], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    max_grad_norm: float | None = 1.0,
) -> torch.nn.Module:
    """Train the model in a loop without a Trainer."""
    model.train()
    nexus = Nexus(model.parameters())
    for batches, state in windows:
        torch.set_rng_state(state)
        with nexus.window():
            for batch in batches:
                compute_loss(model, batch).backward()
                nexus.inner_step()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return model


def plain_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def smoothed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.2)


def noisy_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    embedded = model.get_input_embeddings()(batch["input_ids"])
    bound = 5 / math.sqrt(embedded[0].numel())  # alpha / sqrt(T * d)
    return model(
        inputs_embeds=embedded + torch.empty_like(embedded).uniform_(-bound, bound), labels=batch["labels"]
    ).loss


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)


# ---- Switches that change the training ----


@pytest.mark.parametrize(
    ("config", "shape", "compute_loss", "max_grad_norm"),
    [
        ({}, {}, plain_loss, 1.0),
        ({"neftune_noise_alpha": 5.0}, {}, noisy_loss, 1.0),
        ({"label_smoothing_factor": 0.2}, {}, smoothed_loss, 1.0),
        ({}, {"tie_word_embeddings": True}, plain_loss, 1.0),
        ({"max_grad_norm": 0.0}, {}, plain_loss, None),
        ({"max_grad_norm": 0.01, "optim": "sgd", "learning_rate": 10.0}, {}, plain_loss, 0.01),
    ],
    ids=["nothing", "neftune", "label_smoothing", "tied_embeddings", "no_clipping", "clipping"],
)
def test_the_trainer_does_what_a_loop_by_hand_does(make_trainer, sources, config, shape, compute_loss, max_grad_norm):
    """To 1e-5 after 3 outer steps: the loss is divided at another place, and AdamW magnifies the rounding."""
    trainer = make_trainer(sources, tiny_llama(**shape), trainer_class=Recorded, max_steps=3, **config)
    trainer.train()
    model = tiny_llama(**shape)
    assert distance(model, trainer.model) > 1e-2  # it moves
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0) if "optim" in config else adamw(model)
    by_hand(model, trainer.windows, compute_loss, optimizer, max_grad_norm=max_grad_norm)
    assert distance(model, trainer.model) < 1e-5
    # Without the setting, the result differs, except for clipping at 1, which a pseudo-gradient never exceeds.
    if config and max_grad_norm is not None:
        without = tiny_llama(**shape)
        optimizer = torch.optim.SGD(without.parameters(), lr=10.0) if "optim" in config else adamw(without)
        assert distance(by_hand(without, trainer.windows, plain_loss, optimizer), trainer.model) > 1e-4


def test_neftune_repeats_itself_with_the_same_seed(make_trainer, sources):
    def train(**config: Any) -> torch.Tensor:
        trainer = make_trainer(sources, tiny_llama(), neftune_noise_alpha=5.0, **config)
        trainer.train()
        return weights(trainer.model)

    assert torch.equal(train(), train())
    assert not torch.equal(train(), train(seed=1, data_seed=42))


def test_an_optimizer_and_a_scheduler_of_ones_own(make_trainer, sources):
    def own(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    model = tiny_llama()
    trainer = make_trainer(sources, model, {"optimizers": own(model)}, Recorded, max_steps=3)
    trainer.train()
    model = tiny_llama()
    assert distance(by_hand(model, trainer.windows, plain_loss, *own(model)), trainer.model) < 1e-5
    model = tiny_llama()
    assert distance(by_hand(model, trainer.windows, plain_loss, own(model)[0]), trainer.model) > 1e-3


def test_a_mixture_of_experts_trains(make_trainer, sources):
    """With the auxiliary loss of the router. Experts without tokens in a micro-batch do not change its step."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    routers = [name for name, _ in model.named_parameters() if "gate.weight" in name]
    assert len(routers) == 2
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(sources, model, {"eval_dataset": Rows(8, 0)}, max_steps=8)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.meter.inner_steps_skipped == 0
    assert trainer.evaluate()["eval_loss"] < first - 0.1


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses.square().sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)


def test_a_loss_of_ones_own(make_trainer, sources):
    trainer = make_trainer(sources, tiny_llama(), {"compute_loss_func": own_loss}, Recorded, max_steps=3)
    trainer.train()
    model = tiny_llama()
    by_hand(model, trainer.windows, lambda m, batch: own_loss(m(batch["input_ids"]), batch["labels"]), adamw(model))
    assert distance(model, trainer.model) < 1e-5
    usual = tiny_llama()
    assert distance(by_hand(usual, trainer.windows, plain_loss, adamw(usual)), model) > 1e-4


class Switched(torch.nn.Module):
    """Has an unused parameter, and others of which each micro-batch uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = tiny_llama()
        self.config = self.llama.config
        self.never = torch.nn.Parameter(torch.ones(3))
        self.scales = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(16)) for _ in range(3)])

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = self.scales[int(input_ids[0, 0]) % 3]
        logits = self.llama.lm_head(self.llama.model(input_ids=input_ids).last_hidden_state * scale)
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def test_parameters_that_are_not_used(make_trainer, sources):
    """A parameter without a gradient in a window stays unchanged, also by weight decay."""
    trainer = make_trainer(sources, Switched(), trainer_class=Recorded, max_steps=3, weight_decay=0.1)
    trainer.train()
    assert torch.equal(trainer.model.never, torch.ones(3))
    assert all(not torch.equal(scale, torch.ones(16)) for scale in trainer.model.scales)
    model = Switched()
    decaying = trainer.get_decay_parameter_names(model)
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in decaying) == is_in], "weight_decay": decay}
        for is_in, decay in ((True, 0.1), (False, 0.0))
    ]
    by_hand(model, trainer.windows, lambda m, batch: m(**batch)["loss"], torch.optim.AdamW(groups, lr=1e-2))
    assert distance(model, trainer.model) < 1e-5


def test_callbacks_hear_what_they_would_from_the_base_class(make_trainer, sources, tmp_path):
    def events(trainer: Trainer) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []
        trainer.add_callback(AtEvents(lambda event: seen.append((event, trainer.state.global_step))))
        trainer.train()
        return seen

    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 7}
    ours = make_trainer(sources["text"], trainer_kwargs={"eval_dataset": Rows(4, 5)}, **saving)
    kept = {k: v for k, v in ours.args.to_dict().items() if k in TrainingArguments.__dataclass_fields__}
    args = TrainingArguments(**kept | {"output_dir": str(tmp_path / "stock"), "accelerator_config": None})
    stock = Trainer(tiny_llama(), args, train_dataset=sources["text"], eval_dataset=Rows(4, 5))
    heard = events(ours)
    assert heard == events(stock)
    assert {event for event, _ in heard} >= {
        "on_substep_end",
        "on_pre_optimizer_step",
        "on_prediction_step",
        "on_save",
    }


class Search(HyperParamSearchBackendBase):
    """Tries a number of settings and records the weights after each."""

    name = "optuna"

    def __init__(self) -> None:
        self.found: list[tuple[float, torch.Tensor]] = []

    @staticmethod
    def is_available() -> bool:
        return True

    def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
        for number in range(n_trials):
            trainer.train(trial=SimpleNamespace(number=number, params={}))
            loss = trainer.compute_objective(trainer.evaluate())
            self.found.append((loss, weights(trainer.model)))
            trainer.model = trainer.model_wrapped = None  # as real tuners do
        best = min(range(n_trials), key=lambda i: self.found[i][0])
        return BestRun(str(best), self.found[best][0], {})


def test_each_trial_of_a_search_is_a_fresh_run(make_trainer, sources, monkeypatch):
    trials: list[dict[str, Any]] = [{"inner_lr": 0.0}, {"inner_lr": 0.2}]
    trials += [trials[-1] | {"gradient_accumulation_steps": 2}]
    trials += [trials[-1] | {"seed": 7}]
    trials += [trials[-1] | {"mixture_weights": {"text": 0.0, "code": 0.5, "math": 0.5}}]
    backend, held_out = Search(), {"text": Rows(8, 0), "law": Rows(8, 5)}
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, lambda: backend)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    made = make_trainer(sources)
    trainer = NexusTrainer(
        args=made.args, train_dataset=sources, eval_dataset=held_out, model_init=lambda: tiny_llama()
    )
    best = trainer.hyperparameter_search(
        lambda trial: trials[trial.number], lambda metrics: metrics["eval_loss"], n_trials=5, backend="optuna"
    )
    for settings, (_, found) in zip(trials, backend.found, strict=True):
        alone = make_trainer(sources, tiny_llama(), **settings)
        alone.train()
        assert torch.equal(weights(alone.model), found)
    losses = [loss for loss, _ in backend.found]
    assert len(set(losses)) == 5 and best.objective == min(losses)


@pytest.mark.slow
def test_optuna_finds_an_inner_learning_rate(make_trainer, sources):
    optuna = pytest.importorskip("optuna")
    tried: dict[float, float] = {}

    def objective(metrics: dict[str, float]) -> float:
        tried[trainer.args.inner_lr] = metrics["eval_loss"]
        return metrics["eval_loss"]

    trainer = NexusTrainer(
        args=make_trainer(sources).args,
        train_dataset=sources,
        eval_dataset={"text": Rows(8, 0)},
        model_init=lambda: tiny_llama(),
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"inner_lr": trial.suggest_float("inner_lr", 0.01, 1.0, log=True)},
        objective,
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    assert len(set(tried.values())) == 3
    assert tried[best.hyperparameters["inner_lr"]] == best.objective == min(tried.values())


@pytest.mark.parametrize("search", [False, True])
def test_streams_follow_a_changed_seed(make_trainer, monkeypatch, search):
    def stream(rows):
        return datasets.Dataset.from_list([{k: v.tolist() for k, v in rows[i].items()} for i in range(40)])

    streams = {name: stream(Rows(40, i)).to_iterable_dataset() for i, name in enumerate(("text", "code"))}
    shares = {"mixture_weights": {"text": 1, "code": 1}}
    changed = make_trainer(streams, **shares)
    if search:  # it changes the arguments when the training has begun
        monkeypatch.setattr(changed, "_hp_search_setup", lambda trial: setattr(changed.args, "seed", 7))
    else:
        changed.args.seed = 7
    given, other = (make_trainer(streams, seed=seed, **shares) for seed in (7, 8))
    for trainer in (changed, given, other):
        trainer.train()
    assert torch.equal(weights(changed.model), weights(given.model))
    assert not torch.equal(weights(changed.model), weights(other.model))


# ---- Parameters that change ----


class Unfreeze(TrainerCallback):
    """Unfreezes the first layer before the second step."""

    def __init__(self):
        self.norms: list[float] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.model.layers[0].requires_grad_(state.global_step > 0)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms.append(
            float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
        )


def frozen() -> Any:
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    return model


def test_unfrozen_parameters_join_the_path(make_trainer, sources):
    model, callback = frozen(), Unfreeze()
    optimizers = (torch.optim.AdamW(model.parameters(), lr=1e-2), None)
    start = model.model.layers[0].mlp.up_proj.weight.clone()
    trainer = make_trainer(
        sources, model, {"optimizers": optimizers, "callbacks": [callback]}, max_steps=3, max_grad_norm=0
    )
    trainer.train()
    assert len(trainer._walker.nexus.params) == len(list(model.parameters()))
    assert not torch.equal(start, model.model.layers[0].mlp.up_proj.weight)
    assert max(callback.norms) <= 1 + 1e-6  # as that of a mean of normalized gradients


def test_a_trained_parameter_outside_the_optimizer_is_an_error(make_trainer, sources):
    with pytest.raises(ValueError, match=r"layers.0.\S+ is trainable, but the optimizer does not train it"):
        make_trainer(sources, frozen(), {"callbacks": [Unfreeze()]}).train()
    model = tiny_llama()
    optimizers = (torch.optim.AdamW(model.lm_head.parameters()), None)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is trainable, but the optimizer does not"):
        make_trainer(sources, model, {"optimizers": optimizers}).train()


class Replace(TrainerCallback):
    """Replaces parameters around the second step."""

    def __init__(self, hook: str, replace: Any):
        self.replace = replace
        setattr(self, hook, self._at_second_step)

    def _at_second_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.replace(model)


def replace_layer(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 32, bias=False)


@pytest.mark.parametrize("replace", [replace_layer, lambda model: model.resize_token_embeddings(70)])
@pytest.mark.parametrize("hook", ["on_step_begin", "on_step_end"])
def test_a_layer_that_is_replaced_while_training_is_an_error(make_trainer, sources, replace, hook):
    with pytest.raises(ValueError, match=r"\.weight' is trainable, but the optimizer does not train it"):
        make_trainer(sources, None, {"callbacks": [Replace(hook, replace)]}, max_steps=3).train()


def test_parameters_of_a_loss_function_are_walked(make_trainer, sources):
    scale, model = torch.nn.Parameter(torch.full((3,), 9.0)), tiny_llama()

    class Scaled(NexusTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs) * scale.square().sum()

    optimizers = (torch.optim.SGD([*model.parameters(), scale], lr=0.0), None)
    trainer = make_trainer(sources, model, {"optimizers": optimizers}, Scaled, max_steps=1)
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            norms.append(sum(float(p.grad.square().sum()) for p in [*model.parameters(), scale]))

    trainer.add_callback(Norms())
    trainer.train()
    assert norms[0] <= 1 + 1e-6
    assert torch.equal(scale.data, torch.full((3,), 9.0))


@pytest.mark.parametrize("nexus", [True, False])
def test_a_frozen_model_is_an_error(make_trainer, sources, nexus):
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameters: .* Saved adapters load frozen"):
        make_trainer(sources, model, nexus=nexus).train()


class Normalized(torch.nn.Module):
    """A language model with running statistics."""

    def __init__(self):
        super().__init__()
        self.lm = tiny_llama()
        self.norm = torch.nn.BatchNorm1d(64)
        self.config = self.lm.config

    def forward(self, input_ids=None, labels=None):
        logits = self.norm(self.lm(input_ids=input_ids).logits.transpose(1, 2))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("momentum", [0.1, 0.0])
def test_state_that_changes_along_the_path_is_named(make_trainer, sources, caplog, momentum):
    model = Normalized()
    model.norm.momentum = momentum
    if not momentum:
        model.norm.register_buffer("num_batches_tracked", None)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        make_trainer(sources, model).train()
    said = [record.message for record in caplog.records if "is not restored" in record.message]
    assert len(said) == bool(momentum)
    assert not momentum or said[0].startswith("Buffer 'norm.running_mean' changes while Nexus moves the weights")


# ---- Other models and trainers ----


class Examples(Dataset):
    """Rows of one source for a model that is not a causal language model."""

    def __init__(self, kind: str, n: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randint(0, 2, (n,), generator=generator)
        ids = torch.randint(2, 20, (n, 8), generator=generator) + 20 * classes[:, None]
        self.rows: dict[str, torch.Tensor] = {
            "classification": {"input_ids": ids, "labels": classes},
            "seq2seq": {"input_ids": ids, "labels": ids[:, :5]},
            "vision": {"pixel_values": torch.randn(n, 3, 8, 8, generator=generator) + classes[:, None, None, None]},
        }[kind]
        self.rows.setdefault("labels", classes)

    def __len__(self) -> int:
        return len(self.rows["labels"])

    def __getitem__(self, i: int) -> Batch:
        return {name: values[i] for name, values in self.rows.items()}


def model_for(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "classification":
        return LlamaForSequenceClassification(tiny_llama(pad_token_id=0).config)
    if kind == "vision":
        shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "attn_implementation": "eager"}
        return ViTForImageClassification(ViTConfig(**shape, **heads))
    shape = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**shape, dropout_rate=0.0, decoder_start_token_id=0))


class NexusSeq2SeqTrainer(NexusTrainerMixin, Seq2SeqTrainer):
    pass


@dataclass
class NexusSeq2SeqConfig(NexusConfigMixin, Seq2SeqTrainingArguments):
    pass


def test_perplexities_are_of_token_losses_only(make_trainer):
    def evaluate(kind: str) -> dict[str, float]:
        sets = {"one": Examples(kind, 6, 1), "two": Examples(kind, 6, 2)}
        trainer = make_trainer(
            {"one": Examples(kind, 16, 0), "more": Examples(kind, 16, 3)},
            model_for(kind),
            {"eval_dataset": sets},
        )
        return trainer.evaluate()

    found = {kind: evaluate(kind) for kind in ("classification", "seq2seq")}
    assert all("eval_one_loss" in metrics and "eval_ood_loss" in metrics for metrics in found.values())
    assert not any("perplexity" in key for key in found["classification"])
    assert found["seq2seq"]["eval_two_perplexity"] == pytest.approx(math.exp(found["seq2seq"]["eval_two_loss"]))


class ManyLabels(Examples):
    """Three labels per row, each true or false."""

    def __getitem__(self, i: int) -> Batch:
        row = super().__getitem__(i)
        return row | {"labels": torch.nn.functional.one_hot(row["labels"], 3).float()}


@pytest.mark.parametrize("nexus", [True, False])
def test_rows_are_counted_where_a_row_has_many_labels(make_trainer, tmp_path, nexus):
    """Also after a resume, and after a resume without further training."""
    sources = {"one": ManyLabels("classification", 24, 0), "two": ManyLabels("classification", 16, 1)}

    def make() -> Any:
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(tiny_llama(pad_token_id=0, num_labels=3).config)
        return make_trainer(sources, model, max_steps=3, nexus=nexus, save_strategy="steps", save_steps=3)

    trainer = make()
    trainer.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    for found in (trainer.meter, resumed.meter):
        assert (sum(found.trained_tokens.values()), found.unit) == (3 * 4 * 2, "rows")


@pytest.mark.parametrize("kind", ["classification", "seq2seq", "vision"])
def test_other_models_train_as_in_a_loop_by_hand(make_trainer, kind):
    sources = {"one": Examples(kind, 24, 0), "two": Examples(kind, 16, 1)}
    held_out = {"one": Examples(kind, 6, 2), "two": Examples(kind, 5, 3)}
    trainer = make_trainer(sources, model_for(kind), {"eval_dataset": held_out}, Recorded, max_steps=3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    model = model_for(kind)
    assert distance(model, trainer.model) > 1e-3
    assert distance(by_hand(model, trainer.windows, plain_loss, adamw(model)), trainer.model) < 1e-5
    assert trainer.evaluate()["eval_loss"] < before
    assert set(trainer.meter.trained_tokens) == {"one", "two"}
    if trainer.meter.unit == "rows":
        assert sum(trainer.meter.trained_tokens.values()) == 3 * 4 * 2
    assert (trainer.meter.unit == "tokens") == (kind == "seq2seq" and trainer.model_accepts_loss_kwargs)


def test_a_seq2seq_trainer_generates_when_it_evaluates(make_trainer, tmp_path):
    generated, asked = [], []

    def compute_metrics(predictions: Any) -> dict[str, float]:
        generated.append(predictions.predictions.shape)
        return {"matches": float((predictions.predictions[:, 1:5] == predictions.label_ids[:, :4]).mean())}

    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2}
    args = NexusSeq2SeqConfig(str(tmp_path), max_steps=2, predict_with_generate=True, **quiet)
    trainer = NexusSeq2SeqTrainer(
        model_for("seq2seq"),
        args,
        train_dataset={"one": Examples("seq2seq", 24, 0), "two": Examples("seq2seq", 16, 1)},
        eval_dataset={"one": Examples("seq2seq", 6, 2), "two": Examples("seq2seq", 5, 3)},
        compute_metrics=compute_metrics,
    )
    trainer.train()
    generate = trainer.model.generate

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append((kwargs["max_length"], kwargs["num_beams"]))
        return generate(*args, **kwargs)

    trainer.model.generate = spy
    metrics = trainer.evaluate(max_length=7, num_beams=2)
    assert set(asked) == {(7, 2)} and [shape[0] for shape in generated] == [6, 5]
    assert {"eval_one_matches", "eval_two_matches", "eval_one_loss", "eval_loss"} <= metrics.keys()
    assert len(trainer.predict(Examples("seq2seq", 3, 4), max_length=6, num_beams=1).predictions) == 3
    assert asked[-1] == (6, 1)


# ---- Switches of speed and memory ----


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(make_trainer, sources, reentrant):
    """Also with dropout, whose masks the second forward pass draws again."""

    def train(**config: Any) -> tuple[torch.Tensor, int]:
        model, calls = tiny_llama(attention_dropout=0.2), [0]
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        trainer = make_trainer(sources, model, max_steps=3, **config)
        trainer.train()
        return weights(trainer.model), calls[0]

    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain, calls = train()
    checkpointed, more_calls = train(**settings)
    assert torch.equal(plain, checkpointed)
    assert (calls, more_calls) == (12, 24)  # each layer is computed again in the backward pass


@pytest.mark.parametrize(
    "settings",
    [
        {"torch_empty_cache_steps": 1},
        {"include_num_input_tokens_seen": "all"},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"dataloader_drop_last": True},
        {"remove_unused_columns": False},
        {"save_strategy": "steps", "save_steps": 1, "save_only_model": True},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_settings_that_change_no_bit(make_trainer, sources, settings):
    plain, other = make_trainer(sources), make_trainer(sources, **settings)
    plain.train()
    other.train()
    assert all(map(torch.equal, plain.model.parameters(), other.model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiling_matches_to_rounding_with_one_graph(make_trainer, sources, backend):
    """To 1e-5 after 4 outer steps. Moved and restored weights cause no recompilation."""

    def train(**config: Any) -> torch.nn.Module:
        trainer = make_trainer(sources, tiny_llama(), max_steps=4, **config)
        trainer.train()
        return trainer.model

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(torch_compile=True, torch_compile_backend=backend)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    assert distance(compiled, train()) < 1e-5
