"""The Hub's rules for cards: ours are valid, and each problem of others is named."""

import re

import pytest

from hf_nexus.hub.card import run_card
from hf_nexus.hub.check import check_card
from tests.support.hub.summaries import make_run


def test_our_cards_are_valid():
    check_card(run_card(make_run()))
    check_card(run_card(make_run(license="other", license_name="mine", license_link="LICENSE", base_model="org/base")))
    check_card("---\ntags: ['base_model:adapter:org/base']\n---\n")
    check_card("# A text without metadata")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("license: apache2", "Did you mean 'apache-2.0'"),
        ("license: my-own", "Use `other`"),
        ("license: [mit]", "one of the Hub's identifiers"),
        ("license: other", "license_name"),
        ("language: English", "ISO 639"),
        ("language: [no]", "must be a string"),
        ("tags: [1]", "`tags` must be"),
        ("tags: ['base_model:adapter:/home/alice/base']", "`tags` must name base models by ids"),
        ("datasets: [builtin/code]", "ids of the Hub"),
        ("datasets: ['data/a/b.jsonl']", "ids of the Hub"),
        ("base_model: ''", "`base_model` must be"),
        ("pipeline_tag: [a]", "`pipeline_tag` must be"),
        ("model-index: {name: a}", "list of mappings"),
        ("model-index: [{name: a}]", "list of `results`"),
        ("model-index: [{name: a, results: [{task: {type: t}}]}]", "lacks 'dataset'"),
        (
            "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: n}, metrics: []}]}]",
            "needs a metric",
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


def test_all_problems_and_tokens_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)language.*license.*access token"):
        check_card(f"---\nlicense: nope\nlanguage: English\n---\nhf_{'a1' * 17}")
