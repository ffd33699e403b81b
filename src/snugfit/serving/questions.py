"""A few short questions in several languages, for a first look at what a served model answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "en": ("What is the capital of France?", "Explain in two sentences why the sky is blue.", "Count from 1 to 10."),
    "de": (
        "Was ist die Hauptstadt von Frankreich?",
        "Erkläre in zwei Sätzen, warum der Himmel blau ist.",
        "Zähle von 1 bis 10.",
    ),
    "fr": (
        "Quelle est la capitale de la France ?",
        "Explique en deux phrases pourquoi le ciel est bleu.",
        "Compte de 1 à 10.",
    ),
    "es": (
        "¿Cuál es la capital de Francia?",
        "Explica en dos frases por qué el cielo es azul.",
        "Cuenta del 1 al 10.",
    ),
    "it": ("Qual è la capitale della Francia?", "Spiega in due frasi perché il cielo è blu.", "Conta da 1 a 10."),
    "pt": ("Qual é a capital da França?", "Explique em duas frases por que o céu é azul.", "Conte de 1 a 10."),
    "nl": (
        "Wat is de hoofdstad van Frankrijk?",
        "Leg in twee zinnen uit waarom de lucht blauw is.",
        "Tel van 1 tot 10.",
    ),
    "pl": (
        "Jaka jest stolica Francji?",
        "Wyjaśnij w dwóch zdaniach, dlaczego niebo jest niebieskie.",
        "Policz od 1 do 10.",
    ),
    "ru": ("Какая столица Франции?", "Объясни в двух предложениях, почему небо голубое.", "Посчитай от 1 до 10."),
    "zh": ("法国的首都是哪里?", "请用两句话解释天空为什么是蓝色的。", "请从1数到10。"),
    "ja": ("フランスの首都はどこですか。", "空が青い理由を二文で説明してください。", "1から10まで数えてください。"),
    "ko": ("프랑스의 수도는 어디인가요?", "하늘이 파란 이유를 두 문장으로 설명해 주세요.", "1부터 10까지 세어 주세요."),
    "ar": ("ما هي عاصمة فرنسا؟", "اشرح في جملتين لماذا السماء زرقاء.", "عد من 1 إلى 10."),
}
DEFAULT_LANGUAGE = "en"
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_LANGUAGE = re.compile(r"^language:\s*(?:\n\s*-\s*|\[?\s*)['\"]?([a-z]{2})\b", re.MULTILINE)
_LONGEST_CARD = 1 << 20


def language_of(model: Path) -> str:
    """The first language that the model's card (README.md) names and that has questions; else English."""
    try:
        with (model / "README.md").open(encoding="utf-8", errors="replace") as file:
            front = _FRONT.match(file.read(_LONGEST_CARD))
    except OSError:
        return DEFAULT_LANGUAGE
    found = _LANGUAGE.search(front[1] if front else "")
    return found[1] if found and found[1] in QUESTIONS else DEFAULT_LANGUAGE
