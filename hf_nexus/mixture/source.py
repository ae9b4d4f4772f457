"""One source of a mixture."""

from dataclasses import dataclass

__all__ = ["SourceConfig"]


@dataclass
class SourceConfig:
    """
    One source of a mixture.

    Documents are read from a text column, from chat messages (rendered with the tokenizer's chat template), or from a
    prompt and its completion; all of their tokens are trained on.

    Args:
        path (`str`):
            A dataset on the Hub, a local file (`.jsonl`, `.json`, `.parquet`, `.csv`, or `.txt`: one document), a
            glob, a folder of data files or one written by `save_to_disk`, or `builtin/<name>`.
        subset (`str`, *optional*), split (`str`, *optional*, defaults to `"train"`), revision (`str`, *optional*):
            As in [`~datasets.load_dataset`].
        text_column (`str`, *optional*, defaults to `"text"`):
            Column with the documents.
        messages_column (`str`, *optional*):
            Column with conversations, in place of `text_column`.
        prompt_column (`str`, *optional*), completion_column (`str`, *optional*):
            Columns whose strings, or lists of messages, are put one after the other, in place of `text_column`.
        weight (`float`, *optional*):
            Share of the training tokens, relative to the other weights. All training sources have one, or none.
        max_tokens (`int`, *optional*):
            Read whole documents, in order, up to this number of tokens. It bounds what is tokenized, not what is
            downloaded.
        max_epochs (`float`, *optional*):
            Largest number of times that the source may be read. A streaming source hands its weight to the others
            when it is reached (a whole number there); where sizes are known, it is an error before training instead.
        eval_rows (`int`, *optional*):
            Number of documents to hold out, chosen by a hash of their text. Copies of them are not trained on either.
        eval_split (`str`, *optional*):
            Split to take the held-out documents from instead, for instance `"validation[:1000]"`.
        license (`str`, *optional*):
            Licence of the source; by default what the data itself states.
        role (`str`, *optional*, defaults to `"train"`):
            `"train"`, or `"ood"` for a source that is only evaluated.
        tokens (`int`, *optional*):
            Known size in tokens, for plans made before anything is downloaded.
        streaming (`bool`, *optional*, defaults to `False`):
            Read, tokenize and pack while training, in place of before it: for what is too large to load whole.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What a streaming source does with a row that holds no usable text: `"raise"`, or `"skip"` and count it.

    Example:
        >>> from hf_nexus.mixture import SourceConfig
        >>> SourceConfig(path="data/code/*.jsonl", text_column="content", eval_rows=100).role
        'train'
    """

    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    messages_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    weight: float | None = None
    max_tokens: int | None = None
    max_epochs: float | None = None
    eval_rows: int | None = None
    eval_split: str | None = None
    license: str | None = None
    role: str = "train"
    tokens: int | None = None
    streaming: bool = False
    on_error: str = "raise"

    @property
    def columns(self) -> dict[str, str]:
        """Key of the configuration to the column it names, for the columns that are read."""
        if self.messages_column is not None:
            return {"messages_column": self.messages_column}
        if self.prompt_column is not None and self.completion_column is not None:
            return {"prompt_column": self.prompt_column, "completion_column": self.completion_column}
        return {"text_column": self.text_column}

    @property
    def known_tokens(self) -> int | None:
        """The stated size after `max_tokens`, `None` where neither is given."""
        return min((n for n in (self.tokens, self.max_tokens) if n is not None), default=None)
