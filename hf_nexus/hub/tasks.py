"""What a model is for: its task on the Hub, and the Auto class of transformers that loads it."""

from functools import cache
from typing import Any

from transformers.models.auto import modeling_auto
from transformers.utils import is_peft_available

__all__ = ["find_task"]

# Auto classes, the model classes that each loads (`MODEL_FOR_..._MAPPING_NAMES`), and the Hub's name of the task. Of a
# class that several load the first counts.
_TASKS = (
    ("AutoModelForCausalLM", "CAUSAL_LM", "text-generation"),
    ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", "automatic-speech-recognition"),
    ("AutoModelForCTC", "CTC", "automatic-speech-recognition"),
    ("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT", "image-text-to-text"),
    ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", "text2text-generation"),
    ("AutoModelForMaskedLM", "MASKED_LM", "fill-mask"),
    ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION", "text-classification"),
    ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION", "token-classification"),
    ("AutoModelForQuestionAnswering", "QUESTION_ANSWERING", "question-answering"),
    ("AutoModelForTableQuestionAnswering", "TABLE_QUESTION_ANSWERING", "table-question-answering"),
    ("AutoModelForVisualQuestionAnswering", "VISUAL_QUESTION_ANSWERING", "visual-question-answering"),
    ("AutoModelForDocumentQuestionAnswering", "DOCUMENT_QUESTION_ANSWERING", "document-question-answering"),
    ("AutoModelForMultipleChoice", "MULTIPLE_CHOICE", "multiple-choice"),
    ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION", "image-classification"),
    ("AutoModelForVideoClassification", "VIDEO_CLASSIFICATION", "video-classification"),
    ("AutoModelForAudioClassification", "AUDIO_CLASSIFICATION", "audio-classification"),
    ("AutoModelForZeroShotImageClassification", "ZERO_SHOT_IMAGE_CLASSIFICATION", "zero-shot-image-classification"),
    ("AutoModelForImageSegmentation", "IMAGE_SEGMENTATION", "image-segmentation"),
    ("AutoModelForSemanticSegmentation", "SEMANTIC_SEGMENTATION", "image-segmentation"),
    ("AutoModelForUniversalSegmentation", "UNIVERSAL_SEGMENTATION", "image-segmentation"),
    ("AutoModelForObjectDetection", "OBJECT_DETECTION", "object-detection"),
    ("AutoModelForDepthEstimation", "DEPTH_ESTIMATION", "depth-estimation"),
)


def find_task(model: Any) -> dict[str, str | None]:
    """
    The task of a model, and the Auto class that loads it.

    Args:
        model (`torch.nn.Module`):
            Not wrapped, but for adapters of peft.

    Returns:
        `dict[str, str | None]`: `task`, as the Hub names it, and `auto_class`; `None` where transformers knows none
        for the model's class.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_nexus.hub.tasks import find_task
        >>> find_task(ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))
        {'task': 'image-classification', 'auto_class': 'AutoModelForImageClassification'}
    """
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            model = model.get_base_model()
    for name in (parent.__name__ for parent in type(model).__mro__):
        known = [row for row in _TASKS if name in _class_names(row[1])]
        # A class that its own code registers is in no mapping, but is named like the others.
        known += [row for row in _TASKS if name.endswith(row[0].removeprefix("AutoModel"))]
        if known:
            return {"task": known[0][2], "auto_class": known[0][0]}
    return {"task": None, "auto_class": None}


@cache
def _class_names(mapping: str) -> frozenset[str]:
    values = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
    return frozenset(name for value in values for name in ([value] if isinstance(value, str) else value))
