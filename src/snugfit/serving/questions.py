"""A few short questions in several languages, for a first look at what a served model answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from snugfit.storage.model_card import card_languages, read_card

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


def language_of(model: Path) -> str:
    """The first language that the model's card (README.md) names and that has questions; else English."""
    stated = (language.partition("-")[0] for language in card_languages(read_card(model)))
    return next((language for language in stated if language in QUESTIONS), DEFAULT_LANGUAGE)
