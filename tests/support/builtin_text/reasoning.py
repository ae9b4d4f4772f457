"""Worded problems of several steps. The question is one line, each step one more, and `#### answer` the last."""

import random

from .templates import Problem, template, templates


def _story(header: str, text: str) -> Problem:
    """The first line opens and the last one asks. Of the events between them two to four happen, in any order."""
    opening, *events, question = text.split("\n")

    def write(rng: random.Random) -> str:
        happened = [event.split(" => ") for event in rng.sample(events, rng.randint(2, 4))]
        told = " ".join([opening, *(sentence for sentence, _ in happened), question])
        return template(header, "\n".join([told, *(working for _, working in happened), "#### {n}"]))(rng)

    return write


PROBLEMS: dict[str, Problem] = {
    name: _story(header, text) if " => " in text else template(header, text + "\n#### {answer}")
    for name, header, text in templates("reasoning")
}
