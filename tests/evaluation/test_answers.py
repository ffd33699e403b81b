"""Greedy answers: length, repetition and loops, of emulated models and of a server, against the reference's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import raises
from helpers.mock_vllm import Mock
from snugfit.evaluation.answers import answer_figures, choose_questions
from snugfit.evaluation.evaluate import evaluate
from snugfit.evaluation.served import ServerOptions
from snugfit.records.evaluation import Answer
from snugfit.serving.text_quality import broken, loops, repeated_share, verdict


def answer(model: str, tokens: int, repeated: float = 0.0, *, same: int | None = None) -> Answer:
    return Answer(
        model=model,
        question="?",
        text="",
        tokens=tokens,
        finished=tokens < 100,
        repeated=repeated,
        loops=repeated > 0.5,
        same_tokens=same,
    )


def test_figures_by_hand() -> None:
    """Lengths are compared by their sums, repetition question by question, with the errors of those differences."""
    reference = [answer("r", tokens) for tokens in (10, 30)]
    other = [answer("q", 20, 0.1, same=3), answer("q", 100, 0.7, same=5)]
    first, second = answer_figures([*reference, *other], 100, has_reference=True)
    assert (first.tokens, first.length_change, first.unfinished, first.loops) == (20, None, 0, 0)
    assert second.length_change == pytest.approx(2.0)
    # d_i = a_i - 3 b_i = -10, 10; sqrt(2) * std / 40
    assert second.length_change_error == pytest.approx(2**0.5 * 200**0.5 / 40)
    assert second.repeated_change == pytest.approx(0.4)
    assert second.repeated_change_error == pytest.approx(0.3)
    assert (second.loops, second.unfinished, second.same_tokens) == (1, 1, 4.0)
    (alone,) = answer_figures(other, 100, has_reference=False)
    assert alone.length_change is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The capital of France is Paris.", "answers"),
        ("Paris, Paris, ha ha ha ... done!!!", "answers"),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "answers"),
        ("", "empty"),
        (" \n", "empty"),
        ("Well, " + "I think that is it. " * 4, "loops"),
        ("a" * 40, "loops"),
        ("ok" + "\n- item\n- item" * 9, "loops"),
        ("東京は日本の首都です。カタカナも漢字も。", "answers"),
        ("Der Himmel ist blau, because π is Ω.", "answers"),
        ("cut within a character \ufffd", "answers"),
        ("\ufffd\ufffd x \ufffd\ufffd", "broken"),
        ("abc\x00\x01\x02", "broken"),
        ("the кот 猫 बिल्ली قطة γάτα", "broken"),
    ],
)
def test_verdicts(text: str, expected: str) -> None:
    """Sound answers, empty ones, loops and characters that no text has are told from each other."""
    assert verdict(text) == expected


def test_loops_of_tokens() -> None:
    """Token rows loop where they end in three equal pieces of at least twelve tokens together, and not earlier."""
    assert loops([1, 2, 3, 4, *[7, 8, 9, 5] * 3])
    assert not loops([1, 2, 3, 4, *[7, 8, 9] * 3])
    assert loops([7] * 12)
    assert not loops([7] * 11)
    assert not loops([*[7, 8, 9, 5] * 5, 1])
    assert not loops([])


def test_repeated_share_by_hand() -> None:
    """Of seven 4-token sequences two occurred before."""
    assert repeated_share([1, 2, 3, 4, 5, 1, 2, 3, 4, 5]) == pytest.approx(2 / 7)
    assert repeated_share([1, 2, 3, 4]) == 0
    assert not broken("")


def test_models_and_server_answer(smollm2: Path, tmp_path: Path) -> None:
    """A model has its own answers to the letter; a server's are read by their token ids, or tokenized again."""
    questions = tmp_path / "questions.txt"
    questions.write_text("What is the capital of France?\n\nCount from 1 to 3.\n", encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": [1, 5, 9, 20]}) + "\n", encoding="utf-8")
    with Served() as mock:
        record = evaluate(
            [],
            reference=smollm2,
            dataset=[rows],
            noise_floor="none",
            answers=2,
            questions=questions,
            answer_tokens=12,
            server=ServerOptions(url=mock.url, journal=tmp_path / "journal"),
        )
    own, served = record.answers[:2], record.answers[2:]
    assert "Paris" in own[0].text
    assert own[0].tokens <= 12
    assert served[0].tokens == 4
    assert served[0].finished
    assert served[1].text == " one two three"
    assert not served[1].finished
    first, second = record.answer_figures
    assert (first.model, second.model) == (record.reference and record.reference.name, served[0].model)
    assert second.length_change is not None
    assert second.length_change < 0


class Served(Mock):
    """Answers prompts, and scores rows with equal values for all tokens."""

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Token ids first, then text alone."""
        row = body["prompt"]
        if "prompt_logprobs" not in body:
            self.answered = getattr(self, "answered", 0) + 1
            if self.answered == 1:
                return 200, {"choices": [{"text": "Paris it is", "token_ids": [5, 6, 7, 2], "finish_reason": "stop"}]}
            return 200, {"choices": [{"text": " one two three", "finish_reason": "length"}]}
        if body["prompt_logprobs"] == -1:
            return 400, {"error": {"message": "which is greater than max allowed: 2", "code": 400}}
        places = [None, *({str(token): {"logprob": -2.0}, "3": {"logprob": -0.5}} for token in row[1:])]
        return 200, {"choices": [{"text": "", "prompt_logprobs": places, "prompt_token_ids": row}]}


def test_bad_questions_are_refused(tmp_path: Path) -> None:
    """Impossible numbers, too few questions, an unreadable file and a stored reference are errors before the run."""
    with raises("option-invalid", where="answers"):
        choose_questions(-1, None, 64, None)
    with raises("option-invalid", where="answers"):
        choose_questions(99, None, 64, None)
    with raises("option-invalid", where="answer_tokens"):
        choose_questions(2, None, 1, None)
    with raises("option-conflict", where="questions"):
        choose_questions(0, tmp_path / "q.txt", 64, None)
    with raises("file-unreadable", where=tmp_path / "q.txt"):
        choose_questions(1, tmp_path / "q.txt", 64, None)
    with raises("option-conflict", where="answers"):
        choose_questions(1, None, 64, tmp_path / "reference.safetensors")
