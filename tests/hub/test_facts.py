"""Facts on a card: the pipeline tag of a model follows from its class."""

import pytest
import torch

from hf_nexus.hub.facts import find_pipeline_tag


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("TapasForQuestionAnswering", "table-question-answering"),
        ("BertForQuestionAnswering", "question-answering"),
        ("BertForMultipleChoice", "multiple-choice"),
        ("ViltForQuestionAnswering", "visual-question-answering"),
        ("Wav2Vec2ForSequenceClassification", "audio-classification"),
        ("Mask2FormerForUniversalSegmentation", "image-segmentation"),
        ("BartForConditionalGeneration", "text2text-generation"),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
        ("Gemma3ForConditionalGeneration", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("RemoteCodeForCausalLM", "text-generation"),
        ("LlamaModel", None),
    ],
)
def test_the_pipeline_tag_follows_from_the_model_class(name: str, tag: str | None) -> None:
    """The mappings of transformers decide, for a class that they do not list the end of its name."""
    assert find_pipeline_tag(type(name, (torch.nn.Module,), {})())["pipeline_tag"] == tag
