"""For the page of the API: the `help` of a dataclass field is its documentation."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class FieldHelp(griffe.Extension):
    """Read `field(metadata={"help": ...})`."""

    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any) -> None:
        """Give an attribute the help of its field."""
        for entry in ast.walk(node) if isinstance(node, ast.AnnAssign) else ():
            if isinstance(entry, ast.keyword) and entry.arg == "metadata":
                text = ast.literal_eval(entry.value)["help"]
                attr.docstring = griffe.Docstring(text, parent=attr, lineno=node.lineno)
                given = {k.name: k.value for k in getattr(attr.value, "arguments", ())}
                attr.value = given.get("default", "None" if "default_factory" in given else None)
