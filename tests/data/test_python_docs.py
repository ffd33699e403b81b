"""The default text: Python's documentation topics in two halves."""

from __future__ import annotations

from pydoc_data.topics import topics

from snugfit.data.python_docs import Part, no_dataset_message, python_topics, unwrap


def test_calibration_and_evaluation_are_all_topics() -> None:
    """Every paragraph of Python's documentation topics is in one of the two parts."""
    both = python_topics("calibration") + "\n\n" + python_topics("evaluation")
    found = {paragraph.strip() for paragraph in both.split("\n\n")}
    assert {paragraph.strip() for text in topics.values() for paragraph in unwrap(text).split("\n\n")} <= found


def test_calibration_and_evaluation_share_no_paragraph() -> None:
    """No paragraph of prose that is calibrated on is evaluated on, though topics quote each other at length."""
    parts = [
        {" ".join(paragraph.split()) for paragraph in python_topics(part).split("\n\n") if len(paragraph) > 80}
        for part in ("calibration", "evaluation")
    ]
    assert min(len(part) for part in parts) > 300
    assert not parts[0] & parts[1]


def test_unwrapping_joins_prose_and_leaves_what_is_indented() -> None:
    """Hard line breaks of prose are joined; code, lists and headings' underlines keep their lines."""
    text = "one\ntwo\n\n   code\n   more\n\na list\n  * item\n\nlast"
    assert unwrap(text) == "one two\n\n   code\n   more\n\na list\n  * item\n\nlast"


def test_a_run_without_a_dataset_says_so() -> None:
    """The message of a run without a dataset names the purpose and the text that takes its place."""
    doing: dict[Part, str] = {"calibration": "calibrating", "evaluation": "evaluating"}
    for part, verb in doing.items():
        message = no_dataset_message(part)
        assert "no dataset given" in message
        assert verb in message
        assert "Python's documentation" in message
