"""Fill the templates of a report; HTML is escaped, and a name that a template uses and nobody gave is an error."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = "snugfit.report"


def render(template: str, /, **given: Any) -> str:
    """The text of a template of this package."""
    return _environment().get_template(template).render(**given)


def read_template(name: str) -> str:
    """The text of a file beside the templates, as it is."""
    return (resources.files(FOLDER) / "templates" / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(  # Markdown is escaped where it is made
        loader=FunctionLoader(read_template),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),  # noqa: S701
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    return environment


def script_json(document: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element, and no NaN."""
    text = json.dumps(document, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
