"""Facts on a card: the task of a model follows from its class."""

import pytest
import torch

from hf_nexus.hub.facts import find_task


@pytest.mark.parametrize(
    ("name", "task"),
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
def test_the_task_follows_from_the_class_of_the_model(name: str, task: str | None) -> None:
    """The mappings of transformers decide, for a class that they do not list the end of its name."""
    assert find_task(type(name, (torch.nn.Module,), {})())["task"] == task
