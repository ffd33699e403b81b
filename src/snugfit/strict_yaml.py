"""YAML with line numbers, without keys given twice and without runaway aliases: recipes, calibration sets, plans."""

from __future__ import annotations

from typing import Any

import yaml

MAX_BYTES = 256_000  # PyYAML reads some 100 kB a second


MAX_NODES = 100_000


class _UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice: the second would replace the first without a word.

    It also refuses aliases that lead to themselves, or write out to more than anyone means.
    """

    def compose_document(self) -> yaml.Node | None:
        """The document's nodes, no more of them than MAX_NODES with all aliases written out."""
        root = super().compose_document()
        sizes: dict[int, int] = {}

        def size(node: yaml.Node) -> int:
            if id(node) not in sizes:
                sizes[id(node)] = MAX_NODES + 1  # until it is known: a node inside itself
                inside = node.value if isinstance(node, yaml.CollectionNode) else []
                members = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
                sizes[id(node)] = 1 + sum(map(size, members))
            return sizes[id(node)]

        if root is not None and size(root) > MAX_NODES:
            raise yaml.constructor.ConstructorError(None, None, "aliases of aliases without end", root.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, its keys all different."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
