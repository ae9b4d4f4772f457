"""Model cards: the numbers of the run, metadata that the Hub accepts, and the text of users.

After a change of the card, run `make cards`. It renders `tests/hub/golden_card.md` and the cards in `model_cards/`
again. Review the difference.
"""

import ast
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_nexus.files import printable
from hf_nexus.hub import card as card_module
from hf_nexus.hub.card import merge_cards, run_card, save_card, user_text_digest
from hf_nexus.hub.check import check_card, split_card
from hf_nexus.hub.results import BenchmarkScore, HeldOutLoss, save_results
from hf_nexus.hub.run_summary import MixtureRow, RunSummary
from hf_nexus.mixture.stages import Stage
from model_cards import render
from tests.support.hub.summaries import NEXUS, full_run, make_run

GOLDEN = Path(__file__).with_name("golden_card.md")
MODEL_CARDS = sorted(path.parent for path in GOLDEN.parents[2].glob("model_cards/*/run_summary.json"))


def front_matter(card):
    return yaml.safe_load(str(card).split("---\n")[1])


def tables(text):
    """Every row of every table, as the cells a Markdown reader would see."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_the_card_equals_the_golden_card():
    assert str(run_card(full_run())) == GOLDEN.read_text(encoding="utf-8"), "see the head of this file"


@pytest.mark.parametrize("folder", MODEL_CARDS, ids=lambda folder: folder.name)
def test_model_cards_are_rendered_from_their_summaries(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert str(run_card(RunSummary.load(folder), text)) == text, "see the head of this file"
    check_card(text)
    for plot in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"fine-tuned version of \[\]|More information needed|/home/|/tmp/", text)


def test_the_planned_card_follows_its_configuration():
    assert [folder.name for folder in MODEL_CARDS] == ["demo", "lora", "pretraining-3b"]
    plan = render.plan()
    recorded = RunSummary.load(MODEL_CARDS[-1])
    for name in ("planned", "parameters", "mixture", "stages", "nexus", "datasets", "base_model"):
        assert getattr(recorded, name) == getattr(plan, name), f"{name}: see the head of this file"
    assert recorded.planned and sum(row.tokens for row in plan.mixture) == 30_000 * 2**21
    assert not [folder for folder in MODEL_CARDS[:-1] if RunSummary.load(folder).planned]


# --- numbers ---------------------------------------------------------------------------------------------------------


@given(st.floats(-1e300, 1e300))
def test_printed_numbers_equal_the_given_ones(value):
    printed = float(card_module._number(value).replace(",", ""))
    assert math.isclose(printed, value, rel_tol=5.1e-3)
    assert math.isclose(float(card_module._loss(value)), value, abs_tol=5.1e-5, rel_tol=1e-15)


def test_counts_are_printed_as_they_are_read():
    counts = [999_499, 999_500, 1_049_728, 999_600_000, 62_914_560_000, 10**13]
    printed = [card_module._count(count) for count in counts]
    assert printed == ["999,499", "1.00 million", "1.05 million", "1.00 billion", "62.9 billion", "10.0 trillion"]


@settings(max_examples=25)
@given(st.floats(0.0, 50.0))
def test_model_index_holds_the_numbers_of_the_card(loss):
    card = ModelCard(str(run_card(make_run(evaluations=[HeldOutLoss("a", "ood", None, loss)]))))
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["loss"] == round(loss, 4) and math.isclose(found["perplexity"], math.exp(loss), rel_tol=5.1e-3)
    assert found["perplexity"] == float(f"{found['perplexity']:.3g}") or found["perplexity"] % 1 == 0


def test_every_loss_is_in_the_table_and_in_the_index():
    run = make_run()
    card, text = run_card(run), str(run_card(run))
    for row in run.evaluations:
        first, last, perplexity = tables(text)[row.name][-3:]
        assert first == ("-" if row.first_loss is None else f"{row.first_loss:.4f}")
        assert (last, perplexity) == (f"{row.last_loss:.4f}", f"{math.exp(row.last_loss):.3g}")
    index = {(r.dataset_name, r.metric_type): (r.metric_value, r.dataset_args) for r in card.data.eval_results}
    assert len(index) == 2 * len(run.evaluations)
    assert index["cpp", "loss"] == (4.1235, {"role": "ood"})
    assert index["macro", "perplexity"] == (16.5, {"role": "macro"})


def test_sets_of_one_dataset_are_not_merged_in_the_index():
    rows = [HeldOutLoss("a", "train", None, 1.0, "org/data"), HeldOutLoss("b", "train", None, 2.0, "org/data")]
    (model,) = front_matter(run_card(make_run(evaluations=rows)))["model-index"]
    assert [(r["dataset"]["name"], r["metrics"][0]["value"]) for r in model["results"]] == [("a", 1.0), ("b", 2.0)]


def test_tasks_of_one_dataset_are_not_merged_in_the_index():
    scores = [BenchmarkScore(name, "allenai/ai2_arc", "acc", value) for name, value in (("easy", 1.0), ("hard", 2.0))]
    (model,) = front_matter(run_card(make_run(evaluations=[], benchmarks=scores)))["model-index"]
    found = [(r["dataset"]["name"], [m["value"] for m in r["metrics"]]) for r in model["results"]]
    assert found == [("easy", [1.0]), ("hard", [2.0])]


def test_the_example_of_a_chat_model_sends_a_message():
    text = str(run_card(make_run(chat=True, prompt="Hello!")))
    assert 'messages = [{"role": "user", "content": "Hello!"}]' in text
    assert "tokenizer.apply_chat_template(messages, add_generation_prompt=True" in text and "tokenizer(" not in text


def test_shares_by_size_have_four_digits():
    settings = NEXUS | {"mixture_weights": {"a": 0.6408544726301736, "b": 0.3591455273698264}}
    assert tables(str(run_card(make_run(nexus=settings))))["`mixture_weights`"] == ["a: 0.6409, b: 0.3591"]


def test_a_training_time_that_is_not_known_is_left_out():
    assert "Training time: 0:03:20" in str(run_card(make_run(seconds=200.2)))
    for seconds in (None, math.nan, math.inf):
        assert "Training time" not in str(run_card(make_run(seconds=seconds)))


def test_the_card_of_a_diverged_run_is_valid():
    card = run_card(
        make_run(evaluations=[HeldOutLoss("a", "train", 8.0, math.nan), HeldOutLoss("b", "ood", 8.0, 1e4)])
    )
    check_card(card)
    assert tables(str(card))["a"][-2:] == ["nan", "nan"] and tables(str(card))["b"][-1] == "inf"
    (model,) = front_matter(card)["model-index"]
    assert [metric for r in model["results"] for metric in r["metrics"]] == [{"type": "loss", "value": 1e4}]
    assert "model-index" not in front_matter(
        run_card(make_run(evaluations=[HeldOutLoss("a", "train", 8.0, math.nan)]))
    )


# --- content ---------------------------------------------------------------------------------------------------------


def test_from_scratch_means_no_base_model():
    card = run_card(make_run(), existing="---\nbase_model: org/old\ndatasets: [org/old]\n---\n")
    assert "pretrained from scratch" in str(card)
    assert "base_model" not in front_matter(card) and "org/old" not in str(card)
    assert not re.search(r"fine-?tuned|\[\]\(", str(card), flags=re.IGNORECASE)
    assert "pretraining" in card.data.tags and "continued-pretraining" not in card.data.tags


def test_a_base_model_is_named():
    card = run_card(make_run(base_model="org/base"), existing=str(run_card(make_run())))
    assert front_matter(card)["base_model"] == "org/base" and "trained further from `org/base`" in str(card)
    assert "from scratch" not in str(card)
    # Whatever the base model was trained on is not known.
    assert "never trained on" not in str(card) and "never trained on" in str(run_card(make_run()))
    assert "continued-pretraining" in card.data.tags and "pretraining" not in card.data.tags
    local = run_card(make_run(base_model="/home/someone/runs/base"))
    check_card(local)
    assert "base_model" not in front_matter(local) and "`base`" in str(local) and "someone" not in str(local)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "takes 4 inner steps of length 0.05, each along"),
        ({"inner_lr_schedule": "follow"}, "length at most 0.05"),
        ({"nexus": False}, "Nexus is off"),
        ({"inner_lr": 0.0}, "at the same weights"),
        ({"inner_direction": "random"}, "random directions"),
        ({"gradient_accumulation_steps": 1}, "cannot align"),
        ({"source_schedule": "mixed"}, "Each micro-batch mixes all sources"),
        ({"source_schedule": "blocked"}, "an outer step hold one source"),
    ],
)
def test_the_text_follows_the_settings(settings, said):
    text = str(run_card(make_run(nexus=NEXUS | settings)))
    phrases = ("each along", "Nexus is off", "at the same weights", "random dir", "cannot align")
    said_here = [phrase for phrase in phrases if phrase in text]
    assert said in text and len(said_here) == 1
    assert ("is a path loss" in text) == (settings.get("nexus") is not False)


def test_the_usage_code_runs_from_the_card(tmp_path, monkeypatch, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<eos>": 0, "The": 1, "end": 2}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    inputs = ["input_ids", "token_type_ids", "attention_mask"]  # as older checkpoints have it; generate takes no types
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", model_input_names=inputs)
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=3, **sizes)).save_pretrained(tmp_path)
    path = save_card(make_run(repo_id=None, prompt='The "end"\n'), tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.startswith("The")
    assert 'path = "user/nexus-test"' in str(run_card(make_run()))


def test_names_do_not_break_the_tables():
    mixture = [MixtureRow("a|b\nc", 1.0, 1.0, 1.0, 10, license="see | LICENSE")]
    text = str(run_card(make_run(mixture=mixture, evaluations=[HeldOutLoss("x|y", "train", 1.0, 1.0)])))
    assert tables(text)[r"a\|b c"][1:3] == [r"see \| LICENSE", "100.0 %"]
    assert len(tables(text)[r"x\|y"]) == 4


def test_a_card_has_no_token_and_no_local_folder():
    secrets = {
        "hub_token": "s3cret",
        "push_to_hub_token": "s3cret",
        "output_dir": "/home/s3cret",
        "logging_dir": "s3cret",
    }
    text = str(
        run_card(make_run(hyperparameters=secrets | {"seed": 7}, changed_hyperparameters=secrets | {"seed": 7}))
    )
    assert "s3cret" not in text and "\nseed: 7\n" in text


def test_a_card_has_no_empty_sections():
    card = run_card(RunSummary("bare", "llama", 10**9, NEXUS))
    check_card(card)
    for missing in ("## Mixture", "## Results", "![", "training log", "A model of this size"):
        assert missing not in str(card)
    assert "No out-of-distribution source was evaluated" in str(card)


# --- sections that not every run has ---------------------------------------------------------------------------------


def test_unknown_numbers_are_a_dash():
    mixture = [MixtureRow("web", None, 1.0, None, 10)]
    assert tables(str(run_card(make_run(mixture=mixture))))["web"] == ["-", "-", "-", "100.0 %", "-", "10"]


def test_losses_of_another_arm_have_a_difference():
    text = str(run_card(full_run()))
    assert tables(text)["code"][-2:] == ["3.1000", f"{3.00061234 - 3.1:+.4f}"]
    assert tables(text)["maths"][-2:] == ["-", "-"] and "plain accumulation" in text
    assert "plain accumulation" not in str(run_card(make_run()))


def test_several_stages_are_a_table():
    text = str(run_card(full_run())).partition("Weights by stage")[2].partition("## Results")[0]
    assert tables(text)["Source"] == ["0 to 75 %", "75 to 100 %"]
    assert tables(text)["maths"] == ["50.0 %", "10.0 %"]
    one = make_run(stages=[Stage(1.0, {"code": 0.6, "maths": 0.4})])
    assert str(run_card(one)) == str(run_card(make_run()))


def test_a_planned_run_says_so_and_has_no_results():
    run = make_run(planned=True, evaluations=[], numbers={}, plot=None)
    text = str(run_card(run))
    assert "Planned, not trained" in text and "Planned tokens" in text and "Trained tokens" not in text
    assert "model-index" not in text and "## Results" not in text
    assert "Planned" not in str(run_card(make_run()))
    with pytest.raises(ValueError, match="planned"):
        make_run(planned=True)


def test_scores_are_in_the_table_the_index_and_a_file(tmp_path):
    run = full_run()
    index = {r.dataset_name: r.metric_value for r in run_card(run).data.eval_results if r.metric_type != "loss"}
    assert (index["GSM8K"], index["LAMBADA"]) == (41.25, 12.5)
    assert tables(str(run_card(run)))["GSM8K"][1:] == ["exact_match", "41.25", "1.4", "40", "8-shot"]
    foreign = tmp_path / ".eval_results" / "gsm8k.yaml"
    foreign.parent.mkdir()
    foreign.write_text("[]")
    path = save_results(run.benchmarks, tmp_path)
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 41.25)
    assert (entry.dataset_revision, entry.date, entry.notes) == ("abc", "2026-05-01", "8-shot")
    assert save_results(run.benchmarks[1:], tmp_path) is None
    assert [file.name for file in foreign.parent.iterdir()] == ["gsm8k.yaml"]


def test_an_adapter_names_its_base_model_and_peft():
    run = make_run(base_model="org/base", adapter="LoRA", trainable_parameters=1_234, tags=["lora"])
    card = run_card(run)
    check_card(card)
    head = front_matter(card)
    assert (head["base_model"], head["base_model_relation"], head["library_name"]) == ("org/base", "adapter", "peft")
    assert "fine-tuning" in head["tags"] and "pretraining" not in head["tags"]
    assert "is a LoRA adapter with 1,234 trainable parameters" in str(card) and "from scratch" not in str(card)
    again = front_matter(run_card(make_run(), existing=str(card)))
    assert "base_model" not in again and "base_model_relation" not in again and "fine-tuning" not in again["tags"]


def test_the_tag_of_a_base_model_is_not_kept():
    """Peft writes it, also for a folder of the training machine, which the Hub refuses."""
    card = run_card(make_run(), existing="---\ntags: ['base_model:adapter:/home/alice/base', by-hand]\n---\n")
    check_card(card)
    assert "by-hand" in card.data.tags and not [tag for tag in card.data.tags if tag.startswith("base_model:")]


def test_an_adapter_without_a_base_model_has_no_example():
    card = run_card(make_run(adapter="LoRA", trainable_parameters=1_234))
    check_card(card)
    head = front_matter(card)
    assert "base_model" not in head and "base_model_relation" not in head and head["library_name"] == "peft"
    assert "for **a base model without a name**, a `llama` language model" in str(card)
    assert "None" not in str(card) and "from_pretrained" not in str(card) and "## Use" not in str(card)
    assert "from scratch" not in str(card) and "never trained on" not in str(card)  # of the base nothing is known


def test_a_loss_that_is_not_per_token_has_no_perplexity():
    run = replace(full_run(), per_token=False)
    card = run_card(run)
    check_card(card)
    head, text = front_matter(card), str(card)
    assert "erplexity" not in text and "nats" not in text and head["metrics"] == ["exact_match", "acc"]
    assert "a `llama` language model" in text and "model.generate(" in text
    assert tables(text)["code"][1:] == ["8.3187", "3.0006", "3.1000", "-0.0994"]
    names = {r["task"]["name"] for r in head["model-index"][0]["results"]}
    assert names == {"Held-out loss (hf_nexus)", "Benchmark (hf_nexus)"}


def test_a_card_of_another_task_has_no_perplexity():
    image = {"pipeline_tag": "image-classification", "auto_class": "AutoModelForImageClassification"}
    run = replace(full_run(), **image, model_type="vit", tags=[], benchmarks=[])
    card = run_card(run)
    check_card(card)
    head, text = front_matter(card), str(card).replace("title = {hf\\_nexus: training language models", "")
    assert head["pipeline_tag"] == "image-classification" and "metrics" not in head
    for wrong in ("language model", "text-generation", "erplexity", "nats", "CausalLM", "Tokenizer", "generate("):
        assert wrong not in text
    assert "is a `vit` image-classification model with 1.23 million parameters" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    compile(code, "card", "exec")
    assert code.startswith("from transformers import AutoModelForImageClassification\n\npath = ")
    assert code.endswith("model = AutoModelForImageClassification.from_pretrained(path)\n")
    section = text.partition("## Results")[2].partition("Last values")[0]
    widths = {line.count("|") for line in section.splitlines()} - {0}
    assert len(widths) == 1 and tables(text)["code"][1:] == ["8.3187", "3.0006", "3.1000", "-0.0994"]
    results = head["model-index"][0]["results"]
    assert {(r["task"]["type"], m["type"]) for r in results for m in r["metrics"]} == {
        ("image-classification", "loss")
    }
    assert str(run_card(run, existing=str(card))) == str(card)


def test_a_model_without_an_auto_class_has_no_example():
    card = run_card(make_run(pipeline_tag=None, auto_class=None))
    check_card(card)
    assert not {"pipeline_tag", "metrics", "model-index"} & set(front_matter(card))
    assert "is a `llama` model with" in str(card) and "## Use" not in str(card) and "```python" not in str(card)


# --- what is already there -------------------------------------------------------------------------------------------


def test_rendering_again_changes_nothing():
    once = str(run_card(make_run()))
    assert str(run_card(make_run(), existing=once)) == once
    user = once.replace("---\n\n<!--", "---\n\nAbove.\n\n<!--") + "\nBelow.\n"
    assert str(run_card(make_run(), existing=user)) == str(
        run_card(make_run(), existing=str(run_card(make_run(), user)))
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_user_text_and_metadata_are_kept(newline):
    old = str(run_card(make_run(model_name="old-name", tags=["kept-tag"])))
    old = old.replace("---\n\n<!--", "co2_eq_emissions: 12.5\n---\n\n# Mine\n\n--- a rule\n\n<!--")
    old = old.replace("tags:\n", "tags:\n- by-hand\n") + "\n## Notes\n\nOnly `mine` \\1 | here.\n"
    card = run_card(make_run(), existing=old.replace("\n", newline))
    text = str(card)
    check_card(card)
    assert text.index("# Mine\n\n--- a rule") < text.index("# nexus-test") < text.index("Only `mine` \\1 | here.\n")
    assert "old-name" not in text and text.count(card_module.BEGIN) == text.count(card_module.END) == 1
    assert front_matter(card)["co2_eq_emissions"] == 12.5
    assert {"by-hand", "kept-tag", "demo"} <= set(card.data.tags)
    assert "\r" not in text


def test_a_foreign_readme_is_kept_below_the_card():
    card = run_card(
        make_run(license=None, languages=[]), existing="---\nlicense: mit\nlanguage: fr\n---\n\n# Mine\n\nWords."
    )
    assert str(card).endswith(f"{card_module.END}\n\n# Mine\n\nWords.\n")
    assert (card.data.license, card.data.language) == ("mit", "fr")
    assert run_card(make_run(), existing="---\nlicense: other\nlicense_name: x\n---\n").data.license_name is None


def test_a_stock_trainer_card_is_replaced():
    from transformers.modelcard import TrainingSummary

    stock = TrainingSummary(model_name="stock-name", hyperparameters={}).to_model_card()
    assert "stock-name" in stock
    card = run_card(make_run(), existing=stock)
    check_card(card)
    assert "stock-name" not in str(card) and "More information needed" not in str(card)


def test_only_results_of_other_tools_are_kept():
    old = run_card(make_run(evaluations=[HeldOutLoss("gone", "ood", 9.0, 8.0)]))
    head = front_matter(old)
    benchmark = {
        "task": {"type": "text-generation", "name": "Benchmark"},
        "dataset": {"name": "GSM8K", "type": "openai/gsm8k"},
        "metrics": [{"type": "exact_match", "value": 0.25}],
    }
    head["model-index"][0]["results"].append(benchmark)
    for run in (make_run(), make_run(evaluations=[])):
        card = run_card(run, existing=f"---\n{yaml.safe_dump(head)}---\n{old.text}")
        check_card(card)
        (model,) = front_matter(card)["model-index"]
        names = [result["dataset"]["name"] for result in model["results"]]
        assert names == [row.name for row in run.evaluations] + ["GSM8K"] and model["results"][-1] == benchmark


@pytest.mark.parametrize(
    ("existing", "message"),
    [
        (f"{card_module.BEGIN}\nbut no end", "once each"),
        (f"{card_module.END}\n{card_module.BEGIN}", "once each"),
        (f"{card_module.BEGIN}{card_module.END}" * 2, "once each"),
        ("---\nlicense: [mit\n---\n", "not YAML"),
        ("---\na: &a [x]\nb: [*a, *a]\n---\n", "not YAML.*aliases"),
        (f"---\ntags: {'[' * 1200}\n---\n", "not YAML"),
        (f"---\nco2: {'9' * 5000}\n---\n", "not YAML"),
        ("---\n- a list\n---\n", "not a mapping"),
        ("---\nmodel-index: nonsense\n---\n", "malformed"),
    ],
)
def test_a_damaged_readme_is_not_changed(tmp_path, existing, message):
    (tmp_path / "README.md").write_text(existing, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        save_card(make_run(), tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == existing
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_edits_of_a_published_card_are_merged():
    """As those of a local one. What the run knows stays, and merging again changes nothing."""
    head, (above, body, below) = front_matter(run_card(make_run(license="mit"))), ("Above.", "old body", "Below.")
    foreign = {"task": {"type": "text-generation", "name": "Other"}, "dataset": {"name": "D", "type": "o/d"}}
    foreign["metrics"] = [{"type": "acc", "value": 0.5}]
    head["model-index"][0]["results"].append(foreign)
    head |= {"tags": ["by-hand"], "co2_eq_emissions": 1.5, "license": "apache-2.0"}
    published = f"---\n{yaml.safe_dump(head)}---\n{above}\n{card_module.BEGIN}\n{body}\n{card_module.END}\n{below}"
    local = str(run_card(make_run(license="mit"))) + "\nLocal.\n"
    for newline in ("\n", "\r\n"):
        merged = merge_cards(local, published.replace("\n", newline), take_text=True)
        check_card(merged)
        metadata, text = split_card(merged)
        assert text.startswith(f"\nAbove.\n\n{card_module.BEGIN}") and text.endswith(f"{card_module.END}\n\nBelow.\n")
        assert "old body" not in text and "Local." not in text
        assert {"by-hand", "hf_nexus"} <= set(metadata["tags"]) and metadata["license"] == "mit"
        assert metadata["co2_eq_emissions"] == 1.5 and metadata["model-index"][0]["results"].count(foreign) == 1
        assert merge_cards(local, merged, take_text=True) == merge_cards(merged, merged, take_text=False) == merged
    ours = merge_cards(local, published, take_text=False)
    assert ours.endswith("\nLocal.\n") and "Above." not in ours and "by-hand" in ours
    assert merge_cards(local, "", True) == merge_cards(local, "# Foreign", True) == local
    assert merge_cards("# Mine", published, take_text=True) == "# Mine"


@pytest.mark.parametrize(
    ("card", "digest"),
    [("", None), ("# Mine", None), (card_module.BEGIN, None), (f"{card_module.BEGIN}\n{card_module.END}", "")],
)
def test_a_card_without_text_of_users_has_no_hash(card, digest):
    assert user_text_digest(card) == digest
    assert user_text_digest(f"Mine.\n{card_module.BEGIN}\n{card_module.END}")


def test_save_card_writes_what_run_card_renders(tmp_path):
    path = save_card(make_run(), tmp_path / "new")
    assert path.read_bytes() == str(run_card(make_run())).encode()
    path.write_text(path.read_text(encoding="utf-8") + "Mine: é.\n", encoding="utf-8-sig")
    save_card(make_run(), tmp_path / "new")  # a byte-order mark must not hide the metadata
    assert path.read_text(encoding="utf-8") == f"{run_card(make_run())}\nMine: é.\n"
    assert [file.name for file in path.parent.iterdir()] == ["README.md"]


def test_an_invalid_card_is_not_written(tmp_path):
    path = save_card(make_run(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="`license` must be"):
        save_card(make_run(license="nope"), tmp_path)
    assert path.read_bytes() == before


# --- text from data --------------------------------------------------------------------------------------------------

_PIECES = [
    *(card_module.END, card_module.BEGIN, "<!--", "-->", "<img src=x onerror=y>", "[text](http://a.b)", "![i](//a.b)"),
    *("# Title", "\n\n# Title\n", "a|b", "---\nlicense: mit\n---", "```\n", "`", "&lt;", "<details>", "*", "_", "~~"),
    *(
        "https://a.b",
        "www.a.b",
        "\\",
        "- x",
        "1. x",
        "> x",
        "\x1b[31m",
        "\x00",
        "\u2028",
        "[^1]: x",
        "$",
        ": ",
        "{{ x }}",
    ),
]
_TEXTS = st.lists(st.sampled_from(_PIECES) | st.text(max_size=5), min_size=1, max_size=4).map("".join).filter(bool)


def hostile_run(text: str) -> RunSummary:
    """A run in which all texts that may come from data or a configuration are `text`."""
    run = full_run()
    names = {row.source: f"{row.source} {text}" for row in run.mixture}
    return replace(
        run,
        **dict.fromkeys(("model_name", "model_type", "license_name", "license_link", "hardware", "commit"), text),
        mixture=[replace(row, source=names[row.source], license=text, dataset=text) for row in run.mixture],
        stages=[Stage(s.until, {names[name]: share for name, share in s.weights.items()}) for s in run.stages],
        evaluations=[replace(row, name=f"{row.name} {text}") for row in run.evaluations],
        benchmarks=[
            replace(score, name=f"{i} {text}", metric="a" + text, notes=text) for i, score in enumerate(run.benchmarks)
        ],
        arm=f"a{text}",
        hyperparameters={text: text, "x": {text: [text]}},
        changed_hyperparameters={f"x{text}": text},
        nexus=run.nexus | {text: text},
        numbers={f"a{text}": 1.0},
        **dict.fromkeys(("repo_id", "prompt"), text),
        tags=[f"a{text}"],
        limitations=[text],
        versions={"hf-nexus": text, text: text},
    )


@cache
def harmless_card() -> str:
    return str(run_card(hostile_run("harmless")))


@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # slow to shrink
@given(_TEXTS)
@example(card_module.END)
@example("www.a\\|<img src=x>")
def test_text_from_data_shows_only_itself(text):
    """It makes no heading, cell, link, image, HTML or metadata, and the card can be rendered again."""
    run, whole = hostile_run(text), harmless_card()
    card = str(run_card(run))
    assert str(run_card(run, existing=card)) == card
    head = split_card(card)[0]
    assert head["license_name"] == printable(text) and head.keys() == front_matter(whole).keys()
    assert str(ModelCard(card).data.license_name) == printable(text)
    body, expected = (str(ModelCard(content).text) for content in (card, whole))
    for start in ("#", "|", "- ", "```", ">", "!", "    "):
        found = [sum(line.startswith(start) for line in side.split("\n")) for side in (body, expected)]
        assert found[0] == found[1], start
    rows = [[re.sub(r"\\.", "", line) for line in side.split("\n") if line[:1] == "|"] for side in (body, expected)]
    assert [row.count("|") for row in rows[0]] == [row.count("|") for row in rows[1]]
    outside_code = re.sub(r"^```.*?^```|`[^`\n]*`", "", body, flags=re.DOTALL | re.MULTILINE)
    assert outside_code.count("<") == 6 and outside_code.count("](") == 2 and "://" not in outside_code
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", body)


_MARKS = [*"_*~`|\\<>&[]()!#+-=.:$^@;ab1 é", "__", "**", "&lt;", "&#60;", "## ", "12)", "x_y", "<!--", "- "]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(_MARKS), min_size=1, max_size=8).map("".join).filter(printable))
@example("__init__")
@example("a ##")
@example("_init_.*py*")
def test_a_cell_is_read_as_its_text(text):
    """In a table, a heading and a list item, by a reader of Markdown."""
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for around in ("| x |\n|---|\n| {} |", "### {}", "- {}"):
        tokens = markdown.parse(around.format(card_module._cell(text)))
        assert [t.type for t in tokens] == [t.type for t in markdown.parse(around.format("a"))]
        shown = [t.children for t in tokens if t.type == "inline"][-1]
        if "@" in text and shown[0].type == "code_inline":
            continue  # an address, in which ` is replaced
        assert {t.type for t in shown} == {"text"} and "".join(t.content for t in shown) == printable(text)


@pytest.mark.parametrize(
    "text", ["_www.a.com", "(www.a.com)", "http://a.com", "a+@b.com", "mailto:a.@-b.com", "a@_b.com"]
)
def test_addresses_are_code(text):
    """Markdown of GitHub makes links of them."""
    assert card_module._cell(text) == f"`{text}`"


def test_an_address_on_a_card_is_no_link():
    run = make_run(mixture=[MixtureRow("web", 1.0, 1.0, 1.0, 10, license="ask me@a.com")])
    assert "| `ask me@a.com` |" in str(run_card(run))


def test_the_code_of_a_card_keeps_its_text():
    """Also a text that would be a comment of Markdown."""
    text = str(run_card(make_run(prompt=f'"{card_module.END}\n```')))
    (code,) = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert f'"{card_module.END}\n```' in constants


@pytest.mark.parametrize(
    ("link", "read"),
    [
        ("README.md", lambda folder: save_card(make_run(), folder)),
        ("run_summary.json", RunSummary.load),
        (".eval_results", lambda folder: save_results([], folder)),
    ],
)
def test_links_to_other_folders_are_not_followed(tmp_path, link, read):
    """Their text would be published with the card."""
    secret = tmp_path / "secret"
    secret.write_text("{}") if link != ".eval_results" else secret.mkdir()
    (tmp_path / link).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{link} is a link"):
        read(tmp_path)
    full_run().save(tmp_path)
    assert secret.is_dir() or secret.read_text() == "{}"


if __name__ == "__main__":
    GOLDEN.write_text(str(run_card(full_run())), encoding="utf-8", newline="\n")
    print(f"rendered {GOLDEN}")
