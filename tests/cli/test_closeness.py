"""`hf-nexus closeness`: the same losses as evaluation gives, gradients of what is trained, minimizers from folders."""

import io
import json
import shutil
import sys

import datasets
import pytest
import torch
import yaml
from rich.console import Console

from hf_nexus.cli.closeness import Closeness, measure_closeness, print_closeness
from hf_nexus.cli.closeness_inputs import load_model, mixture_of, parse_minima
from hf_nexus.mixture import load_mixture

from ..support.tiny import tiny_llama
from ..support.tiny_tokenizer import tiny_tokenizer

WORDS = {"web": "fox", "code": "bug", "math": "sum", "law": "judge", "plain": "hen"}


def sentences(name):
    return [f"the {WORDS[name]} number {i} jumps over {'the lazy dog ' * (i % 4)}" for i in range(40)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a run's model, tokenizer and pretrain.yaml, and the data it names."""
    root = tmp_path_factory.mktemp("closeness")
    sources = {}
    for name in WORDS:
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(name)))
        role = {"role": "ood"} if name == "law" else {"weight": 3 if name == "web" else 1, "eval_rows": 9}
        sources[name] = {"path": str(root / f"{name}.jsonl"), **role}
    del sources["plain"]["eval_rows"]
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=True, attn_implementation="sdpa")
    save(model, root / "run")
    data = {"sequence_length": 16, "sources": sources}
    (root / "run" / "pretrain.yaml").write_text(yaml.safe_dump({"data": data}, sort_keys=False))
    (root / "mixture.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return root


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def moved(folder, target, seed, **overrides):
    """The model of a folder with other weights nearby."""
    model = load_model(str(folder))[0]
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    save(model, target)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "rows"))


def first_rows(folder, model, name, count):
    """A batch of held-out rows as the model takes it: documents apart."""
    from transformers import default_data_collator

    from hf_nexus.mixture.isolation import IsolateDocuments

    loaded = load_mixture(mixture_of(str(folder)), tiny_tokenizer())
    collate = IsolateDocuments(default_data_collator, loaded.eos_token_id)
    return collate([loaded.eval[name][i] for i in range(min(count, len(loaded.eval[name])))])


def direct_cosine(folder, model, params, a, b, count):
    grads = []
    for name in (a, b):
        loss = model(**first_rows(folder, model, name, count), use_cache=False).loss
        grads.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)]).double())
    return float(torch.cosine_similarity(*grads, dim=0))


def test_a_folder_has_the_losses_that_evaluation_gives_and_the_cosines_of_its_gradients(files, make_trainer):
    run = files / "run"
    found = measure_closeness(str(run), batches=3, batch_size=2)
    model = load_model(str(run))[0]
    mixture = load_mixture(mixture_of(str(run)), tiny_tokenizer())
    evaluated = make_trainer(mixture, model=model, trainer_kwargs={"processing_class": tiny_tokenizer()}).evaluate()
    for name, loss in {**found.losses, **found.ood_losses}.items():
        assert loss == pytest.approx(evaluated[f"eval_{name}_loss"], rel=1e-5)
    assert found.macro_loss == pytest.approx(evaluated["eval_loss"], rel=1e-5)
    assert found.ood_loss == pytest.approx(evaluated["eval_ood_loss"], rel=1e-5)
    assert list(found.losses) == ["web", "code", "math"] and list(found.ood_losses) == [
        "law"
    ]  # `plain` holds out none
    assert found.parameters == sum(p.numel() for p in model.parameters()) and found.base is None
    params = list(model.eval().parameters())
    for a, b, value in found.cosines:
        assert value == pytest.approx(direct_cosine(run, model, params, a, b, 6), abs=1e-5)
    again = measure_closeness(str(run), batches=1, batch_size=6)
    assert again.losses == pytest.approx(found.losses, rel=1e-5)
    assert [v for *_, v in again.cosines] == pytest.approx([v for *_, v in found.cosines], abs=1e-5)
    assert again.cosine_tokens == found.cosine_tokens
    near = measure_closeness(str(run), batches=3, batch_size=2, projection=4096)
    errors = [abs(x[2] - y[2]) for x, y in zip(near.cosines, found.cosines, strict=True)]
    assert 0 < max(errors) < 5 / 64 and near.mean_cosine == pytest.approx(found.mean_cosine, abs=0.05)


def test_weights_are_float32_and_dropout_is_off_whatever_was_saved(files, tmp_path):
    model = tiny_llama(vocab_size=300, attention_dropout=0.5).bfloat16()
    save(model, tmp_path / "half")
    loaded = load_model(str(tmp_path / "half"))[0]
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    twice = [measure_closeness(str(tmp_path / "half"), mixture_of(str(files / "run"))) for _ in range(2)]
    assert twice[0] == twice[1]


def test_minimizers_from_folders_are_compared(files, tmp_path):
    run = files / "run"
    minima = {name: moved(run, tmp_path / name, i) for i, name in enumerate(("code", "math", "web"), 1)}
    found = measure_closeness(str(run), minima={n: str(tmp_path / n) for n in minima}, batches=1, resolution=2)
    start = dict(load_model(str(run))[0].named_parameters())

    def far(a, b):
        return sum(float((a[key] - b[key]).detach().double().square().sum()) for key in start) ** 0.5

    assert found.minima["to_start"] == pytest.approx({n: far(start, point) for n, point in minima.items()}, rel=1e-6)
    assert [far(minima[a], minima[b]) for a, b, _ in found.minima["pairwise"]] == pytest.approx(
        [v for *_, v in found.minima["pairwise"]], rel=1e-6
    )
    assert found.minima["plane"]["sources"] == ["code", "math", "web"]
    alone = measure_closeness(str(tmp_path / "code"), mixture_of(str(run)), batches=100)
    whole = measure_closeness(str(run), minima={n: str(tmp_path / n) for n in ("code", "math")}, batches=100)
    assert whole.minima["end_loss"]["code"] == pytest.approx(alone.losses["code"], rel=1e-5)
    assert whole.minima["start_loss"]["code"] == pytest.approx(whole.losses["code"], rel=1e-5)
    assert whole.minima["plane"] is None and whole.cosines == measure_closeness(str(run), batches=100).cosines


def test_minimizers_of_other_sources_or_models_are_refused(files, tmp_path):
    run = str(files / "run")
    with pytest.raises(ValueError, match=r"'coed' is no training source.*Did you mean 'code'\?"):
        measure_closeness(run, minima={"coed": run, "math": run})
    for name in ("law", "plain"):
        with pytest.raises(ValueError, match="Allowed: web, code, math"):
            measure_closeness(run, minima={name: run, "math": run})
    with pytest.raises(ValueError, match="two sources or more"):
        measure_closeness(run, minima={"code": run})
    save(tiny_llama(vocab_size=300, num_hidden_layers=1), tmp_path / "small")
    with pytest.raises(ValueError, match=r"minimizer of 'math', .*small, does not have the parameters"):
        measure_closeness(run, minima={"code": run, "math": str(tmp_path / "small")})


# ---- Adapters ----


@pytest.fixture
def adapters(files, tmp_path):
    """Three adapters of one base, which lies without a tokenizer beside them."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(load_model(str(files / "run"))[0], lora)
    points = {}
    for name in ("adapter", "code", "math"):
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p += torch.randn_like(p)
        points[name] = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        model.save_pretrained(tmp_path / name)
    return tmp_path, points


def test_an_adapter_is_measured_by_its_own_parameters(files, adapters):
    from peft import PeftModel

    folder, points = adapters
    mixture = mixture_of(str(files / "run"))
    minima = {name: str(folder / name) for name in ("code", "math")}
    found = measure_closeness(str(folder / "adapter"), mixture, batches=1, batch_size=4, minima=minima)
    assert found.base == str(files / "run")
    assert found.parameters == sum(p.numel() for p in points["adapter"]) < 2000
    base = load_model(str(files / "run"))[0]
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()
    params = [p for p in model.parameters() if p.requires_grad]
    for a, b, value in found.cosines:
        assert value == pytest.approx(direct_cosine(files / "run", model, params, a, b, 4), abs=1e-5)
    expected = sum(float((x - y).square().sum()) for x, y in zip(points["code"], points["math"], strict=True)) ** 0.5
    assert found.minima["pairwise"] == [("code", "math", pytest.approx(expected, rel=1e-5))]
    save(model.merge_and_unload(), folder / "merged")
    merged = measure_closeness(str(folder / "merged"), mixture)
    assert merged.losses == pytest.approx(found.losses, rel=1e-4)
    assert merged.losses != pytest.approx(measure_closeness(str(files / "run")).losses, rel=1e-3)


def test_the_base_of_an_adapter_can_be_named_and_must_be_of_an_adapter(files, adapters):
    folder, _ = adapters
    mixture = mixture_of(str(files / "run"))
    moved(files / "run", folder / "other", 5)
    named = measure_closeness(str(folder / "adapter"), mixture, base=str(folder / "other"))
    assert named.base == str(folder / "other")
    assert named.losses != measure_closeness(str(folder / "adapter"), mixture).losses
    with pytest.raises(ValueError, match=r"no adapter of .*Leave --base out"):
        measure_closeness(str(files / "run"), base=str(folder / "other"))


def test_an_adapter_without_peft_says_what_to_install(adapters, monkeypatch):
    folder, _ = adapters
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        load_model(str(folder / "adapter"))


# ---- What it is told, and what it says ----


def test_the_mixture_is_found_beside_the_model_or_named(files, tmp_path):
    run = files / "run"
    beside = mixture_of(str(run))
    assert mixture_of(str(run / "checkpoint-3")) == beside  # the last one need not be the best one
    assert mixture_of("org/model", str(run / "pretrain.yaml")) == beside
    assert mixture_of("org/model", str(files / "mixture.yaml")) == beside
    assert list(mixture_of("org/model", "demo").ood_sources) == ["headers", "licenses", "readmes", "logic"]
    for nowhere in ("org/model", str(run / "figures"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"no pretrain.yaml beside.*--config"):
            mixture_of(nowhere)
    with pytest.raises(ValueError, match="Did you mean 'demo'"):
        mixture_of("org/model", "demoo")


def test_a_mixture_without_held_out_rows_is_refused(files):
    mixture = mixture_of(str(files / "run"))
    for source in mixture.train_sources.values():
        source.eval_rows = None
    with pytest.raises(ValueError, match=r"No training source has held-out rows.*eval_rows"):
        measure_closeness(str(files / "run"), mixture)
    with pytest.raises(ValueError, match="batches=0"):
        measure_closeness(str(files / "run"), batches=0)


def test_minima_are_read_from_one_word():
    assert parse_minima("code=runs/a, math = org/b") == {"code": "runs/a", "math": "org/b"}
    assert parse_minima(None) == {}
    for wrong in ("code", "code=", "=runs/a", "code=a,code=b", "code=a,"):
        with pytest.raises(ValueError, match="--minima"):
            parse_minima(wrong)


def test_the_report_is_saved_as_strict_json_and_printed(files, tmp_path):
    run = files / "run"
    for i, name in enumerate(("code", "math"), 1):
        moved(run, tmp_path / name, i)
    found = measure_closeness(str(run), minima={n: str(tmp_path / n) for n in ("code", "math")}, batches=1)
    odd = Closeness(**{**vars(found), "cosines": [("web", "code", float("nan")), *found.cosines[1:]]})
    path = odd.save(tmp_path / "new" / "closeness.json")
    saved = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert saved["losses"] == found.losses and saved["cosines"][0] == ["web", "code", None]
    assert saved["mean_cosine"] is None
    console = Console(width=120, record=True, file=io.StringIO())
    print_closeness(odd, console)
    text = console.export_text()
    for name in ("web", "code", "math", "law", "macro", "OOD", "nan"):
        assert name in text
    assert f"{found.losses['web']:.4f}" in text and f"{found.cosines[1][2]:+.3f}" in text
    assert f"{found.minima['pairwise'][0][2]:.4g}" in text


def test_a_hub_id_is_read_from_the_hub(files, tmp_path, monkeypatch):
    """Here from what has been downloaded before."""
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    shutil.copytree(files / "run", snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = measure_closeness("org/tiny", mixture_of("org/tiny", str(files / "mixture.yaml")))
    assert found.model == "org/tiny" and found.losses == measure_closeness(str(files / "run")).losses
