"""Closeness of saved models: losses as in evaluation, cosines of their gradients, minimizers, adapters."""

import json
import shutil
from dataclasses import replace

import datasets
import pytest
import torch
from transformers import default_data_collator

from hf_nexus.evaluation import closeness
from hf_nexus.evaluation.models import load_model
from hf_nexus.mixture import MixtureConfig, load_mixture
from hf_nexus.mixture.isolation import PackedRowCollator
from tests.support.closeness import moved, save, write_run
from tests.support.tiny import tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("closeness"))


@pytest.fixture(scope="module")
def mixture(run):
    return MixtureConfig.from_yaml(run.parent / "mixture.yaml")


@pytest.fixture(scope="module")
def loaded(mixture, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("rows")))
        yield load_mixture(mixture, tiny_tokenizer())


@pytest.fixture(scope="module")
def measure(mixture, loaded):
    """`measure(model, ...)` with the mixture, which is loaded only once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closeness, "load_mixture", lambda config, _: loaded)
        yield lambda model, **options: closeness.measure_closeness(str(model), mixture, **options)


@pytest.fixture(scope="module")
def found(run, measure):
    """The model of the run, on all of its held-out rows in small batches."""
    return measure(run, batches=3, batch_size=2)


def direct_cosine(loaded, model, a, b, count):
    """Cosine of the gradients on the first `count` rows of two sources."""
    collate, grads = PackedRowCollator(default_data_collator, loaded.eos_token_id, isolate=True), []
    for name in (a, b):
        batch = collate([loaded.eval[name][i] for i in range(min(count, len(loaded.eval[name])))])
        params = [p for p in model.parameters() if p.requires_grad]
        loss = model(**batch, use_cache=False).loss
        grads.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)]).double())
    return float(torch.cosine_similarity(*grads, dim=0))


def test_losses_are_those_of_the_trainer(run, found, loaded, make_trainer):
    model = load_model(str(run))[0]
    evaluated = make_trainer(loaded, model=model, trainer_kwargs={"processing_class": tiny_tokenizer()}).evaluate()
    for name, loss in {**found.losses, **found.ood_losses}.items():
        assert loss == pytest.approx(evaluated[f"eval_{name}_loss"], rel=1e-5)
    assert found.macro_loss == pytest.approx(evaluated["eval_loss"], rel=1e-5)
    assert found.ood_loss == pytest.approx(evaluated["eval_ood_loss"], rel=1e-5)
    assert (list(found.losses), list(found.ood_losses)) == (["web", "code", "math"], ["law"])
    assert found.parameters == sum(p.numel() for p in model.parameters()) and found.base is None


def test_cosines_are_those_of_the_gradients(run, found, loaded):
    model = load_model(str(run))[0].eval()
    for a, b, value in found.cosines:
        assert value == pytest.approx(direct_cosine(loaded, model, a, b, 6), abs=1e-5)


def test_nothing_depends_on_the_batch_size(run, found, measure):
    again = measure(run, batches=1, batch_size=6)
    assert again.losses == pytest.approx(found.losses, rel=1e-5)
    assert [v for *_, v in again.cosines] == pytest.approx([v for *_, v in found.cosines], abs=1e-5)
    assert again.cosine_tokens == found.cosine_tokens


def test_projected_cosines_are_near_the_exact_ones(run, found, measure):
    near = measure(run, batches=3, batch_size=2, projection=4096)
    errors = [abs(x[2] - y[2]) for x, y in zip(near.cosines, found.cosines, strict=True)]
    assert 0 < max(errors) < 5 / 64 and near.mean_cosine == pytest.approx(found.mean_cosine, abs=0.05)


def test_the_model_is_measured_on_any_accelerator(run, measure, monkeypatch):
    places = []
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr("torch.nn.Module.to", lambda module, device: places.append(device) or module)
    measure(run, batches=1)
    assert places == [torch.device("xpu")]


def test_dropout_is_off(measure, tmp_path):
    save(tiny_llama(vocab_size=300, attention_dropout=0.5), tmp_path / "model")
    assert measure(tmp_path / "model") == measure(tmp_path / "model")


def test_minimizers_from_folders_are_compared(run, found, measure, tmp_path):
    minima = {name: moved(run, tmp_path / name, i) for i, name in enumerate(("code", "math", "web"), 1)}
    paths = {name: str(tmp_path / name) for name in minima}
    three = measure(run, minima=paths, batches=1).minima
    start = dict(load_model(str(run))[0].named_parameters())

    def far(a, b):
        return sum(float((a[key] - b[key]).detach().double().square().sum()) for key in start) ** 0.5

    assert three["to_start"] == pytest.approx({n: far(start, point) for n, point in minima.items()}, rel=1e-6)
    expected = [far(minima[a], minima[b]) for a, b, _ in three["pairwise"]]
    assert [v for *_, v in three["pairwise"]] == pytest.approx(expected, rel=1e-6)
    assert three["plane"] is None  # which takes many losses, and nothing here shows it
    two = measure(run, minima={name: paths[name] for name in ("code", "math")}, batches=100)
    assert two.minima["end_loss"]["code"] == pytest.approx(measure(tmp_path / "code").losses["code"], rel=1e-5)
    assert two.minima["start_loss"] == pytest.approx({n: found.losses[n] for n in ("code", "math")}, rel=1e-5)


def test_minimizers_of_other_sources_or_models_are_refused(run, measure, tmp_path):
    with pytest.raises(ValueError, match=r"'coed' is not a training source.*Did you mean 'code'\?"):
        measure(run, minima={"coed": run, "math": run})
    for name in ("law", "plain"):
        with pytest.raises(ValueError, match="Allowed: web, code, math"):
            measure(run, minima={name: run, "math": run})
    with pytest.raises(ValueError, match="two or more sources"):
        measure(run, minima={"code": run})
    save(tiny_llama(vocab_size=300, num_hidden_layers=1), tmp_path / "small")
    with pytest.raises(ValueError, match=r"minimizer of 'math', .*small, does not have the parameters"):
        measure(run, minima={"code": str(run), "math": str(tmp_path / "small")})


def test_a_mixture_without_held_out_rows_is_refused(run, mixture, loaded, monkeypatch):
    monkeypatch.setattr(closeness, "load_mixture", load_mixture)
    none = replace(mixture, sources={n: replace(s, eval_rows=None) for n, s in mixture.sources.items()})
    with pytest.raises(ValueError, match=r"No training source has held-out rows.*eval_rows"):
        closeness.measure_closeness(str(run), none)


def test_results_are_saved_as_strict_json(found, tmp_path):
    odd = replace(found, cosines=[("web", "code", float("nan")), *found.cosines[1:]])
    path = odd.save(tmp_path / "new" / "closeness.json")
    saved = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert saved["losses"] == found.losses and saved["cosines"][0] == ["web", "code", None]
    assert saved["mean_cosine"] is None


def test_a_hub_id_is_loaded_from_the_hub(run, found, measure, tmp_path, monkeypatch):
    """From a copy in the cache."""
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(run, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    again = measure("org/tiny", batches=3, batch_size=2)
    assert again == replace(found, model="org/tiny")


# ---- Adapters ----


@pytest.fixture(scope="module")
def adapters(run, tmp_path_factory):
    """A folder with three adapters of one base model, without a tokenizer, and their parameters."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(load_model(str(run))[0], lora)
    points = {}
    for name in ("adapter", "code", "math"):
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p += torch.randn_like(p)
        points[name] = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        model.save_pretrained(folder / name)
    return folder, points


def test_only_the_parameters_of_an_adapter_are_measured(run, found, loaded, measure, adapters):
    from peft import PeftModel

    folder, points = adapters
    minima = {name: str(folder / name) for name in ("code", "math")}
    adapter = measure(folder / "adapter", batches=1, batch_size=4, minima=minima)
    assert adapter.base == str(run)
    assert adapter.parameters == sum(p.numel() for p in points["adapter"]) < 2000
    model = PeftModel.from_pretrained(load_model(str(run))[0], folder / "adapter", is_trainable=True).eval()
    for a, b, value in adapter.cosines:
        assert value == pytest.approx(direct_cosine(loaded, model, a, b, 4), abs=1e-5)
    expected = sum(float((x - y).square().sum()) for x, y in zip(points["code"], points["math"], strict=True)) ** 0.5
    assert adapter.minima["pairwise"] == [("code", "math", pytest.approx(expected, rel=1e-5))]
    save(model.merge_and_unload(), folder / "merged")
    assert measure(folder / "merged").losses == pytest.approx(adapter.losses, rel=1e-4)
    assert adapter.losses != pytest.approx(found.losses, rel=1e-3)


def test_the_base_of_an_adapter_can_be_given(run, measure, adapters):
    folder, _ = adapters
    moved(run, folder / "other", 5)
    other = measure(folder / "adapter", base=str(folder / "other"))
    assert other.base == str(folder / "other")
    assert other.losses != measure(folder / "adapter").losses


@pytest.mark.parametrize("projection", [None, 64])
def test_the_progress_ends_with_the_last_gradient(run, measure, projection):
    left = {}

    def track(text, parts):
        for number, part in enumerate(parts):
            left[text] = len(parts) - number
            yield part
        left[text] = 0

    measure(run, batches=2, batch_size=2, projection=projection, track=track)
    assert left == {"Held-out losses": 0, "Gradients": 0}
