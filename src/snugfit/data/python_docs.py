"""The text that takes the place of a dataset where none is given: the documentation topics that come with Python.

Every Python has them, so that a first run needs no download. They are prose about one programming language: a dataset
like the text that the model will serve measures more relevant ranges. Runs therefore say aloud that they use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Part = Literal["calibration", "evaluation"]

SOURCES: Mapping[Part, str] = {
    "calibration": "Python's documentation topics, every other one",
    "evaluation": "Python's documentation topics (evaluation half)",
}
_DOING: Mapping[Part, str] = {"calibration": "calibrating", "evaluation": "evaluating"}


def no_dataset_message(part: Part) -> str:
    """The message of a run that was given no dataset."""
    return f"no dataset given: {_DOING[part]} on Python's documentation topics"


def calibration_topics() -> dict[str, str]:
    """The prose of every other topic, by its name."""
    return _topics(0)


def _topics(first: int) -> dict[str, str]:
    from pydoc_data.topics import topics

    return {name: unwrap(topics[name]) for name in sorted(topics)[first::2]}


def python_topics(part: Part) -> str:
    """Prose of Python's documentation topics: every other topic for calibration, the others for evaluation."""
    calibration = "\n\n".join(calibration_topics().values())
    if part == "calibration":
        return calibration
    # topics quote each other at length: paragraphs of the calibration half are left out
    seen = {" ".join(paragraph.split()) for paragraph in calibration.split("\n\n")}
    paragraphs = "\n\n".join(_topics(1).values()).split("\n\n")
    return "\n\n".join(paragraph for paragraph in paragraphs if " ".join(paragraph.split()) not in seen)


def unwrap(text: str) -> str:
    """Paragraphs on one line each: hard line breaks joined where no line of the paragraph is indented."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if "\n " in p or p.startswith(" ") else p.replace("\n", " ") for p in paragraphs)
