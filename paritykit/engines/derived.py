"""What the reference itself makes of a parameter before it uses it: an engine may store that in the parameter's place.

Read from the code of the module that holds it: around ``self.A_log`` the longest expression of one argument is taken,
``-torch.exp(self.A_log.float())``, and named by what it does to numbers.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
from torch import nn

from paritykit.provenance.changes import name_change

POINTS = 64


def derived_functions(model: nn.Module) -> dict[str, list[str]]:
    """Parameter path to the functions, by name (``-exp(x)``), that its module's code takes of it alone."""
    known: dict[type, dict[str, list[str]]] = {}
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or type(module).__module__.startswith("torch."):
            continue
        functions = known.setdefault(type(module), _of_class(type(module)))
        found |= {f"{path}.{n}".lstrip("."): functions[n] for n in own if n in functions}
    return found


def _of_class(kind: type) -> dict[str, list[str]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return {}
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    scope = {**vars(inspect.getmodule(kind) or torch), "torch": torch}
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            name = _named(_widest(node, parents), node, scope)
            if name and name not in found.setdefault(node.attr, []):
                found[node.attr].append(name)
    return {attribute: names for attribute, names in found.items() if names}


def _widest(node: ast.expr, parents: dict[ast.AST, ast.AST]) -> ast.expr:
    """The longest expression around ``node`` that is a function of it alone."""
    while True:
        up = parents.get(node)
        if isinstance(up, ast.UnaryOp) or (
            isinstance(up, ast.Call) and node in up.args and len(up.args) == 1 and not up.keywords
        ):
            node = up
        elif isinstance(up, ast.Attribute) and isinstance(call := parents.get(up), ast.Call) and not call.keywords:
            if call.args and not all(isinstance(a, ast.Attribute | ast.Constant) for a in call.args):
                return node
            node = call
        else:
            return node


def _named(expression: ast.expr, place: ast.Attribute, scope: dict[str, Any]) -> str:
    """What the expression does to numbers put in at ``place``; empty for nothing, or for what has no name."""
    if expression is place:
        return ""
    text = ast.unparse(expression).replace(ast.unparse(place), "_value", 1)
    before = torch.linspace(0.25, 1.75, POINTS)
    try:
        after = eval(text, {**scope, "_value": before.clone()})  # noqa: S307  (the reference's own code)
    except Exception:  # code taken out of its place may fail in any way
        return ""
    if not isinstance(after, torch.Tensor) or after.shape != before.shape or torch.equal(after, before):
        return ""
    return name_change(before.to(torch.float64), after.to(torch.float64), after.dtype)
