"""Model cards: numbers that equal the run's, metadata that the Hub takes, user text that survives.

After a deliberate change of the card run `make cards`: it renders `tests/hub/golden_card.md` and the cards in
`model_cards/` anew, and the difference belongs into the review.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nexus.hub import card as card_module
from hf_nexus.hub.card import BenchmarkScore, Evaluation, MixtureRow, RunSummary, check_card, run_card, save_card
from hf_nexus.hub.results import save_results
from hf_nexus.pretrain.card import planned_summary
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.plan import plan_run

GOLDEN = Path(__file__).with_name("golden_card.md")
MODEL_CARDS = sorted(path.parent for path in GOLDEN.parents[2].glob("model_cards/*/run_summary.json"))
NEXUS = {"nexus": True, "inner_lr": 0.05, "inner_direction": "gradient", "gradient_accumulation_steps": 4}


def make_run(**changes):
    run = RunSummary(
        model_name="nexus-test",
        model_type="llama",
        parameters=1_234_567,
        nexus=dict(NEXUS),
        mixture=[
            MixtureRow("code", 0.6, 0.59375, 1.25, 1_200_000, "PSF-2.0", "builtin/code"),
            MixtureRow("maths", 0.4, 0.40625, 0.5, 800_000),
        ],
        evaluations=[
            Evaluation("code", "train", 8.318742113, 3.00061234, "org/code"),
            Evaluation("maths", "train", 8.31, 2.5),
            Evaluation("cpp", "ood", None, 4.123456789),
            Evaluation("macro", "macro", 8.3152, 2.8004),
        ],
        hyperparameters={"learning_rate": 2e-3, "weight_decay": 0.0, "report_to": ["none"]},
        changed_hyperparameters={"learning_rate": 2e-3},
        numbers={"path_cosine": 0.087654321, "inner_steps_skipped": 0, "learning_rate": 1.25e-5},
        repo_id="user/nexus-test",
        license="Apache-2.0",
        languages=["en", "code"],
        datasets=["org/code"],
        tags=["demo"],
        limitations=["Trained on an embedded corpus."],
        hardware="2 CPU cores",
        commit="0123abc",
        seconds=200.4,
        tokens_per_second=10_000.5,
        versions={"hf-nexus": "0.1.0", "torch": "2.13.0"},
        plot="training curves.png",
    )
    return replace(run, **changes)


def full_run():
    """Every section that a card can have."""
    run = make_run(
        stages=[(0.75, {"code": 0.5, "maths": 0.5}), (1.0, {"code": 0.9, "maths": 0.1})],
        benchmarks=[
            BenchmarkScore(
                "GSM8K", "openai/gsm8k", "exact_match", 41.25, 1.4, "gsm8k", "abc", "2026-05-01", "8-shot", 40
            ),
            BenchmarkScore("LAMBADA", "EleutherAI/lambada_openai", "acc", 12.5),
        ],
        cosine_plot="gradient_cosines.png",
    )
    run.mixture.append(MixtureRow("web", None, 0.0, None, 0, "odc-by", "org/web"))
    other = replace(run, evaluations=[Evaluation("code", "train", 8.3, 3.1), Evaluation("cpp", "ood", None, 4.0)])
    return run.against(other, "plain accumulation")


def front_matter(card):
    return yaml.safe_load(str(card).split("---\n")[1])


def tables(text):
    """Every row of every table, as the cells a Markdown reader would see."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_golden_card():
    assert str(run_card(full_run())) == GOLDEN.read_text(encoding="utf-8"), "see the head of this file"


@pytest.mark.parametrize("folder", MODEL_CARDS, ids=lambda folder: folder.name)
def test_the_cards_of_the_recipes_are_what_their_summaries_say(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert str(run_card(RunSummary.load(folder), text)) == text, "see the head of this file"
    check_card(text)
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert not re.search(r"fine-tuned version of \[\]|More information needed|/home/|/tmp/", text)


def test_three_recipes_have_cards_and_the_planned_one_follows_its_configuration():
    assert [folder.name for folder in MODEL_CARDS] == ["demo", "lora", "pretraining-3b"]
    arguments = parse_arguments(["--config", "3b", "--dry_run"])
    plan = planned_summary(arguments, plan_run(arguments, arguments.model.accelerators))
    recorded = RunSummary.load(MODEL_CARDS[-1])
    for name in ("planned", "parameters", "mixture", "stages", "nexus", "datasets", "base_model"):
        assert getattr(recorded, name) == getattr(plan, name), f"{name}: see the head of this file"
    assert recorded.planned and sum(row.tokens for row in plan.mixture) == 30_000 * 2**21
    assert not [folder for folder in MODEL_CARDS[:-1] if RunSummary.load(folder).planned]


# --- numbers ---------------------------------------------------------------------------------------------------------


@given(st.floats(-1e300, 1e300))
def test_printed_numbers_equal_the_given_floats(value):
    printed = float(card_module._number(value))
    assert math.isclose(printed, value, rel_tol=5.1e-5, abs_tol=5.1e-5 if 1e-3 <= abs(value) < 1e6 else 0.0)


@settings(max_examples=25)
@given(st.floats(0.0, 50.0))
def test_model_index_holds_the_floats_themselves(loss):
    card = ModelCard(str(run_card(make_run(evaluations=[Evaluation("a", "ood", None, loss)]))))
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"loss": loss, "perplexity": math.exp(loss)}


def test_every_evaluation_is_in_the_table_and_in_the_index():
    run = make_run()
    card, text = run_card(run), str(run_card(run))
    for row in run.evaluations:
        first, last, perplexity = tables(text)[row.name][-3:]
        assert first == ("-" if row.first_loss is None else f"{row.first_loss:.4f}")
        assert (last, perplexity) == (f"{row.last_loss:.4f}", f"{math.exp(row.last_loss):.4f}")
    index = {(r.dataset_name, r.metric_type): (r.metric_value, r.dataset_args) for r in card.data.eval_results}
    assert len(index) == 2 * len(run.evaluations)
    assert index["cpp", "loss"] == (4.123456789, {"role": "ood"})
    assert index["macro", "perplexity"] == (math.exp(2.8004), {"role": "macro"})


def test_sets_of_one_dataset_are_not_merged_in_the_index():
    rows = [Evaluation("a", "train", None, 1.0, "org/data"), Evaluation("b", "train", None, 2.0, "org/data")]
    (model,) = front_matter(run_card(make_run(evaluations=rows)))["model-index"]
    assert [(r["dataset"]["name"], r["metrics"][0]["value"]) for r in model["results"]] == [("a", 1.0), ("b", 2.0)]


def test_a_diverged_run_has_a_valid_card_that_says_so():
    card = run_card(make_run(evaluations=[Evaluation("a", "train", 8.0, math.nan), Evaluation("b", "ood", 8.0, 1e4)]))
    check_card(card)
    assert tables(str(card))["a"][-2:] == ["nan", "nan"] and tables(str(card))["b"][-1] == "inf"
    (model,) = front_matter(card)["model-index"]
    assert [metric for r in model["results"] for metric in r["metrics"]] == [{"type": "loss", "value": 1e4}]
    assert "model-index" not in front_matter(run_card(make_run(evaluations=[Evaluation("a", "train", 8.0, math.nan)])))


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
        ({}, "walks 4 inner steps of length 0.05"),
        ({"inner_lr_schedule": "follow"}, "length at most 0.05"),
        ({"nexus": False}, "switched off"),
        ({"inner_lr": 0.0}, "without moving"),
        ({"inner_direction": "random"}, "random directions"),
        ({"gradient_accumulation_steps": 1}, "nothing can be aligned"),
    ],
)
def test_the_text_follows_the_settings(settings, said):
    text = str(run_card(make_run(nexus=NEXUS | settings)))
    said_here = [
        phrase for phrase in ("walks", "switched off", "without moving", "random dir", "aligned") if phrase in text
    ]
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


def test_tables_keep_their_columns_whatever_the_names():
    mixture = [MixtureRow("a|b\nc", 1.0, 1.0, 1.0, 10, license="see | LICENSE")]
    text = str(run_card(make_run(mixture=mixture, evaluations=[Evaluation("x|y", "train", 1.0, 1.0)])))
    assert tables(text)[r"a\|b c"][1:3] == [r"see \| LICENSE", "1.0000"]
    assert len(tables(text)[r"x\|y"]) == 4


def test_no_secret_and_no_local_folder_gets_into_a_card():
    secrets = {
        "hub_token": "s3cret",
        "push_to_hub_token": "s3cret",
        "output_dir": "/home/s3cret",
        "logging_dir": "s3cret",
    }
    text = str(
        run_card(make_run(hyperparameters=secrets | {"seed": 7}, changed_hyperparameters=secrets | {"seed": 7}))
    )
    assert "s3cret" not in text and "`seed`: `7`" in text


def test_a_bare_run_has_a_valid_card_without_empty_sections():
    card = run_card(RunSummary("bare", "llama", 10**9, NEXUS))
    check_card(card)
    for missing in ("## Mixture", "## Results", "![", "From the training log", "A model this small"):
        assert missing not in str(card)
    assert "No out-of-distribution source was evaluated" in str(card)


# --- sections that not every run has ---------------------------------------------------------------------------------


def test_what_is_not_known_is_a_dash():
    mixture = [MixtureRow("web", None, 1.0, None, 10)]
    assert tables(str(run_card(make_run(mixture=mixture))))["web"] == ["-", "-", "-", "1.0000", "-", "10"]


def test_an_arm_stands_beside_the_losses_with_the_difference():
    text = str(run_card(full_run()))
    assert tables(text)["code"][-2:] == ["3.1000", f"{3.00061234 - 3.1:+.4f}"]
    assert tables(text)["maths"][-2:] == ["-", "-"] and "plain accumulation" in text
    assert "plain accumulation" not in str(run_card(make_run()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluations": [Evaluation("else", "ood", None, 1.0)]}, "no evaluation set"),
        ({"mixture": [MixtureRow("code", 1.0, 1.0, 1.0, 1_000)]}, "equally many"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_run().against(make_run(**changes), "other")


def test_stages_are_a_table_where_there_are_several():
    text = str(run_card(full_run())).partition("Weights by stage")[2].partition("## Results")[0]
    assert tables(text)["Source"] == ["0 to 75 %", "75 to 100 %"]
    assert tables(text)["maths"] == ["0.5000", "0.1000"]
    one = make_run(stages=[(1.0, {"code": 0.6, "maths": 0.4})])
    assert str(run_card(one)) == str(run_card(make_run()))


def test_a_planned_run_says_so_and_has_no_results():
    run = make_run(planned=True, evaluations=[], numbers={}, plot=None)
    text = str(run_card(run))
    assert "Planned, not measured" in text and "Tokens planned" in text and "Tokens trained on" not in text
    assert "model-index" not in text and "## Results" not in text
    assert "Planned" not in str(run_card(make_run()))
    with pytest.raises(ValueError, match="planned"):
        make_run(planned=True)


def test_scores_go_to_the_table_the_index_and_if_registered_to_a_file(tmp_path):
    run = full_run()
    index = {r.dataset_name: r.metric_value for r in run_card(run).data.eval_results if r.metric_type != "loss"}
    assert (index["GSM8K"], index["LAMBADA"]) == (41.25, 12.5)
    assert tables(str(run_card(run)))["GSM8K"][1:] == ["exact_match", "41.2500", "1.4000", "40", "8-shot"]
    foreign = tmp_path / ".eval_results" / "gsm8k.yaml"
    foreign.parent.mkdir()
    foreign.write_text("[]")
    path = save_results(run.benchmarks, tmp_path)
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 41.25)
    assert (entry.dataset_revision, entry.date, entry.notes) == ("abc", "2026-05-01", "8-shot")
    assert save_results(run.benchmarks[1:], tmp_path) is None
    assert [file.name for file in foreign.parent.iterdir()] == ["gsm8k.yaml"]


@pytest.mark.parametrize(("change", "message"), [({"value": math.nan}, "finite"), ({"dataset": "a/b/c"}, "no id")])
def test_an_impossible_score_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        replace(full_run().benchmarks[0], **change)


def test_an_adapter_names_its_base_model_and_is_for_peft():
    run = make_run(base_model="org/base", adapter="LoRA", trainable_parameters=1_234, tags=["lora"])
    card = run_card(run)
    check_card(card)
    head = front_matter(card)
    assert (head["base_model"], head["base_model_relation"], head["library_name"]) == ("org/base", "adapter", "peft")
    assert "fine-tuning" in head["tags"] and "pretraining" not in head["tags"]
    assert "LoRA adapter of 1,234 trainable parameters" in str(card) and "from scratch" not in str(card)
    again = front_matter(run_card(make_run(), existing=str(card)))
    assert "base_model" not in again and "base_model_relation" not in again and "fine-tuning" not in again["tags"]


def test_the_adapter_of_an_unnamed_model_says_so_and_loads_nothing():
    card = run_card(make_run(adapter="LoRA", trainable_parameters=1_234))
    check_card(card)
    head = front_matter(card)
    assert "base_model" not in head and "base_model_relation" not in head and head["library_name"] == "peft"
    assert "for **a base model without a name**, a `llama` language model" in str(card)
    assert "None" not in str(card) and "from_pretrained" not in str(card) and "## Use" not in str(card)
    assert "from scratch" not in str(card) and "never trained on" not in str(card)  # of the base nothing is known


def test_the_card_of_another_model_speaks_of_its_task_and_of_no_perplexity():
    run = replace(full_run(), task="image-classification", auto_class="AutoModelForImageClassification", tags=[])
    card = run_card(replace(run, model_type="vit", benchmarks=[]))
    check_card(card)
    head, text = front_matter(card), str(card).replace("title = {hf\\_nexus: training language models", "")
    assert head["pipeline_tag"] == "image-classification" and "metrics" not in head
    for wrong in ("language model", "text-generation", "erplexity", "nats", "CausalLM", "Tokenizer", "generate("):
        assert wrong not in text
    assert "A `vit` image-classification model of" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    compile(code, "card", "exec")
    assert code.startswith("from transformers import AutoModelForImageClassification\n\npath = ")
    assert code.endswith("model = AutoModelForImageClassification.from_pretrained(path)\n")
    widths = {line.count("|") for line in text.partition("## Results")[2].partition("From the")[0].splitlines()} - {0}
    assert len(widths) == 1 and tables(text)["code"][1:] == ["8.3187", "3.0006", "3.1000", "-0.0994"]
    results = head["model-index"][0]["results"]
    assert {(r["task"]["type"], m["type"]) for r in results for m in r["metrics"]} == {
        ("image-classification", "loss")
    }
    assert str(run_card(replace(run, model_type="vit", benchmarks=[]), existing=str(card))) == str(card)


def test_of_a_model_without_an_auto_class_nothing_is_guessed():
    card = run_card(make_run(task=None, auto_class=None))
    check_card(card)
    assert not {"pipeline_tag", "metrics", "model-index"} & set(front_matter(card))
    assert "A `llama` model of" in str(card) and "## Use" not in str(card) and "```python" not in str(card)


def test_a_saved_summary_gives_the_same_card_and_holds_no_secret(tmp_path):
    run = full_run()
    run.save(tmp_path)
    assert RunSummary.load(tmp_path) == run
    make_run(hyperparameters={"hub_token": "s3cret", "output_dir": "/home/s3cret"}).save(tmp_path)
    assert "s3cret" not in (tmp_path / "run_summary.json").read_text()


# --- what is already there -------------------------------------------------------------------------------------------


def test_rendering_again_changes_nothing():
    once = str(run_card(make_run()))
    assert str(run_card(make_run(), existing=once)) == once
    user = once.replace("---\n\n<!--", "---\n\nAbove.\n\n<!--") + "\nBelow.\n"
    assert str(run_card(make_run(), existing=user)) == str(
        run_card(make_run(), existing=str(run_card(make_run(), user)))
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_user_text_and_metadata_survive_while_the_rest_is_replaced(newline):
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


def test_a_readme_without_our_part_is_kept_whole_below():
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


def test_results_of_other_tools_stay_and_our_old_ones_go():
    old = run_card(make_run(evaluations=[Evaluation("gone", "ood", 9.0, 8.0)]))
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
        ("---\n- a list\n---\n", "not a mapping"),
        ("---\nmodel-index: nonsense\n---\n", "malformed"),
    ],
)
def test_a_damaged_readme_is_an_error_and_stays_untouched(tmp_path, existing, message):
    (tmp_path / "README.md").write_text(existing, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        save_card(make_run(), tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == existing
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


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


# --- validity --------------------------------------------------------------------------------------------------------


def test_our_cards_are_valid():
    check_card(run_card(make_run()))
    check_card(run_card(make_run(license="other", license_name="mine", license_link="LICENSE", base_model="org/base")))
    check_card("# A text without metadata")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("license: apache2", "Did you mean 'apache-2.0'"),
        ("license: my-own", "Use `other`"),
        ("license: [mit]", "one of the Hub's identifiers"),
        ("license: other", "license_name"),
        ("language: English", "ISO 639"),
        ("language: [no]", "must be a text"),
        ("tags: [1]", "`tags` must be"),
        ("datasets: [builtin/code]", "ids of the Hub"),
        ("datasets: ['data/a/b.jsonl']", "ids of the Hub"),
        ("base_model: ''", "`base_model` must be"),
        ("pipeline_tag: [a]", "`pipeline_tag` must be"),
        ("model-index: {name: a}", "list of mappings"),
        ("model-index: [{name: a}]", "list of `results`"),
        ("model-index: [{name: a, results: [{task: {type: t}}]}]", "lacks 'dataset'"),
        (
            "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: n}, metrics: []}]}]",
            "at least one",
        ),
        (
            "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: n}, "
            "metrics: [{type: m, value: .nan}]}]}]",
            "finite",
        ),
    ],
)
def test_invalid_metadata_is_named(head, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_card(f"---\n{head}\n---\n")


def test_all_problems_are_named_at_once_and_tokens_are_found():
    with pytest.raises(ValueError, match=r"(?s)language.*license.*access token"):
        check_card(f"---\nlicense: nope\nlanguage: English\n---\nhf_{'a1' * 17}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nexus": {"nexus": True}}, "lacks.*inner_lr"),
        ({"evaluations": [Evaluation("a", "train", None, 1.0)] * 2}, "different names"),
        ({"evaluations": [Evaluation("a", "test", None, 1.0)]}, "roles.*test.*use one of"),
    ],
)
def test_an_impossible_summary_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        make_run(**changes)


if __name__ == "__main__":
    GOLDEN.write_text(str(run_card(full_run())), encoding="utf-8", newline="\n")
    print(f"rendered {GOLDEN}")
