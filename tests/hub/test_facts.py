"""Facts on a card: the pipeline tag of a model, and the devices."""

import pytest
import torch

from hf_nexus.hub.facts import describe_hardware, find_pipeline_tag


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


def test_the_hardware_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with `use_cpu` on a machine with accelerators trains on the CPU. Without a run, all devices count."""
    accelerator = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda: "Intel Max 1550")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert describe_hardware() == "8 x NVIDIA H100"
    assert describe_hardware("cuda", 2) == "2 x NVIDIA H100"
    assert describe_hardware("xpu", 2) == "2 x Intel Max 1550"
    assert describe_hardware("mps", 1) == "1 x mps"
    assert describe_hardware("cpu", 2) == "CPU, 4 threads, 2 processes"
    assert describe_hardware("cpu", 1) == "CPU, 4 threads"
