"""YAML whose values know their lines, without duplicate keys and runaway aliases: recipes, calibration sets, plans."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from snugfit.errors import UserError

MAX_BYTES = 256_000  # PyYAML reads some 100 kB a second
MAX_NODES = 100_000  # of a document with all aliases expanded
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class YamlDocument:
    """A document's `value` as SafeLoader constructs it, and the name of its file for errors."""

    value: Any
    where: str
    root: yaml.Node | None

    def line_of(self, *path: str | int) -> int:
        """The line, from 1, of the key or list entry at `path`; of what surrounds it if the document lacks it."""
        line, node = 1, self.root
        for step in path:
            line, node = _inside(node, step) or (line, None)
        return line

    def place_of(self, *path: str | int) -> str:
        """The place for errors, such as mine.yaml:4: rules[0].format."""
        name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
        return f"{self.where}:{self.line_of(*path)}: {name}"


def load_yaml(text: str, *, where: str) -> YamlDocument:
    """The one document of a YAML text; UserError, with file and line, for a text that is not valid or too large."""
    try:
        loader = _StrictLoader(text)
        try:
            root = loader.get_single_node()
            value = None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except Exception as error:  # noqa: BLE001  # PyYAML's constructors let through whatever they stumble on
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        what = f"not valid YAML ({problem})."
        raise UserError(what, code="yaml-invalid", where=place, remedy="Correct this line.") from None
    return YamlDocument(value, where, root)


def read_yaml_text(file: Path) -> str:
    """The text of a YAML file; UserError for a file that is too large, not UTF-8, or cannot be read."""
    where = str(file)
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            what = f"a file of {size:,} bytes, more than the {MAX_BYTES:,} that are read."
            raise UserError(what, code="yaml-invalid", where=where, remedy="Shorten it.")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        remedy = "Give a YAML file in UTF-8."
        raise UserError("not a text file.", code="file-unreadable", where=where, remedy=remedy) from None
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})."
        raise UserError(what, code="file-unreadable", where=where, remedy="Check its permissions.") from None


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which the second would silently replace the first, and documents that are too large.

    Aliases count as often as they are used: nested ones expand exponentially, one inside its own anchor without end.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[yaml.Node, int] = {}  # of finished nodes, with all aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, or the node that an alias stands for."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[node] = 1 + sum(self._sizes[part] for part in _parts(node))
        # an alias inside its own anchor stands for a node that is not finished
        if self._sizes.get(node, MAX_NODES + 1) > MAX_NODES:
            problem = f"more than {MAX_NODES:,} values with all aliases expanded"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, its keys all different."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _inside(node: yaml.Node | None, step: str | int) -> tuple[int, yaml.Node] | None:
    """Line and node of one key of a mapping or one entry of a list; None if it does not exist."""
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):  # merged keys come first, a mapping's own keys win
            if key.value == step:
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        entry = node.value[step]
        return entry.start_mark.line + 1, entry
    return None
