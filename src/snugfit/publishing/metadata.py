"""The Hub's metadata of a model card: from options, from records, and from the original's card beside the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from snugfit.errors import UserError
from snugfit.report.collection import Collection, Hub
from snugfit.storage.model_card import card_languages, read_card

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_URL = re.compile(r"https?://[^\s<>\"]{1,2000}")
MAX_TEXT = 96  # characters of a name on the Hub


def hub_metadata(
    collection: Collection,
    *,
    base_model: str | None = None,
    license_id: str | None = None,
    quantized_by: str | None = None,
    repo: str | None = None,
) -> Hub:
    """The metadata of the published checkpoint; what neither an option nor a file states is None.

    UserError for an option that the Hub would not take.
    """
    for where, name in (("base_model", base_model), ("repo", repo)):
        if name is not None:
            check_repo(where, name)
    _check("license", license_id, _LICENSE, "an id of the Hub's list, such as apache-2.0")
    _check("quantized_by", quantized_by, _USER, "the name of a user or organization on the Hub")
    one = collection.checkpoint
    stated = base_metadata(Path(one.folder)) if one is not None and one.folder is not None else Hub()
    source = one.record.source if one is not None and is_repo(one.record.source) else None
    found = replace(
        stated,
        base_model=base_model or source,
        quantized_by=quantized_by or (repo.partition("/")[0] if repo else None),
        repo=repo,
    )
    if license_id is not None:
        found = replace(found, license=license_id, license_name=None, license_link=None)
    if found.pipeline_tag is None and one is not None and "ForCausalLM" in one.architecture:
        found = replace(found, pipeline_tag="text-generation")
    return found


def is_repo(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub: org/name."""
    return _REPO.fullmatch(name) is not None and len(name) <= MAX_TEXT and not any(x in name for x in ("--", ".."))


def check_repo(where: str, name: str) -> None:
    """UserError for a name that is not org/name; `where` is the parameter that holds it."""
    if not is_repo(name):
        what = f"must be org/name, got {name!r}."
        raise UserError(what, code="option-invalid", where=where, remedy="Give the id of a repository on the Hub.")


def _check(where: str, value: str | None, pattern: re.Pattern[str], kind: str) -> None:
    if value is not None and (len(value) > MAX_TEXT or pattern.fullmatch(value) is None):
        raise UserError(f"must be {kind}, got {value!r}.", code="option-invalid", where=where)


def base_metadata(model: Path) -> Hub:
    """What the card of the original states about license, languages, tags and task; nothing where it is unreadable."""
    data = read_card(model)
    license_id = _text(data, "license", _LICENSE)
    other = license_id == "other"
    return Hub(
        license=license_id,
        license_name=_text(data, "license_name", _LICENSE) if other else None,
        license_link=_text(data, "license_link", _URL) if other else None,
        languages=card_languages(data),
        pipeline_tag=_text(data, "pipeline_tag", _LICENSE),
    )


def _text(data: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str | None:
    value = data.get(key)
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def unknown_metadata(hub: Hub) -> tuple[str, ...]:
    """Names of the options that would state what the card lacks."""
    pairs = {"base_model": hub.base_model, "license": hub.license, "quantized_by": hub.quantized_by}
    return tuple(name for name, value in pairs.items() if value is None)
