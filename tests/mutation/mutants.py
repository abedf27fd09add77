"""One-line faults of a module, made from its syntax tree."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type, str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
ARITHMETIC: dict[type, str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//",
    ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "ceil": "floor", "floor": "ceil", "any": "all", "all": "any",
    "round": "int", "MIN": "MAX", "MAX": "MIN", "argmin": "argmax", "argmax": "argmin",
}  # fmt: skip
SKIPPED = (ast.Assert, ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr)
"""Not mutated: invariants, messages, imports."""


@dataclass(frozen=True, order=True)
class Mutant:
    """One replaced piece of source."""

    path: str
    line: int
    begin: int
    """Offset of the piece in the file, in characters."""

    end: int
    new: str
    old: str

    def source(self, original: str) -> str:
        """The whole file with the fault in it."""
        return original[: self.begin] + self.new + original[self.end :]

    def __str__(self) -> str:
        """file:line and the change, in one line."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.path}:{self.line}  {old}  ->  {new}"


def find_mutants(path: str, source: str) -> list[Mutant]:
    """All mutants of one file, in the order of its lines."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    encoded = source.encode()

    def offset(line: int, column: int) -> int:
        return len(encoded[: starts[line - 1] + column].decode())

    found = []
    for node, new in _faults(ast.parse(source)):
        begin = offset(node.lineno, node.col_offset)
        end = offset(node.end_lineno, node.end_col_offset)
        found.append(Mutant(path, node.lineno, begin, end, new, source[begin:end]))
    return sorted(set(found))


def _faults(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Nodes and the text that replaces each."""
    for node in _walk(tree):
        for new in _replacements(node):
            yield node, new


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes whose change can matter: no annotations, decorators, messages or docstrings."""
    if isinstance(node, SKIPPED):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)


def _replacements(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Compare(left=left, ops=ops, comparators=others):
            for number, kind in enumerate(ops):
                signs = [_SIGN[type(op)] for op in ops]
                signs[number] = COMPARISONS[type(kind)]
                pieces = [_inner(left)]
                pieces += [f"{s} {_inner(o)}" for s, o in zip(signs, others, strict=True)]
                yield f"({' '.join(pieces)})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            if not isinstance(left, ast.Constant) or not isinstance(left.value, str):
                yield f"({_inner(left)} {ARITHMETIC[type(op)]} {_inner(right)})"
                if isinstance(op, ast.Mult | ast.Div):
                    yield _inner(left)
        case ast.BoolOp(op=op, values=values):
            other = " or " if isinstance(op, ast.And) else " and "
            yield f"({other.join(_inner(value) for value in values)})"
            for value in values:
                left_out = " and " if isinstance(op, ast.And) else " or "
                yield f"({left_out.join(_inner(v) for v in values if v is not value)})"
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield _inner(operand)
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value)):
            yield str(value + 1)
        case ast.Constant(value=float(value)):
            yield repr(value * 2 if value else 1.0)
        case ast.Slice(lower=lower, upper=upper, step=step):
            if lower is not None:
                yield f"{_inner(lower)} + 1:{_or_empty(upper)}:{_or_empty(step)}"
                yield f":{_or_empty(upper)}:{_or_empty(step)}"
            if upper is not None:
                yield f"{_or_empty(lower)}:{_inner(upper)} - 1:{_or_empty(step)}"
                yield f"{_or_empty(lower)}::{_or_empty(step)}"
        case ast.IfExp(body=body, orelse=orelse):
            yield _inner(body)
            yield _inner(orelse)
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield NAMES[name]
        case ast.Attribute(value=value, attr=name, ctx=ast.Load()) if name in NAMES:
            yield f"{ast.unparse(value)}.{NAMES[name]}"
        case ast.Expr(value=ast.Call()):
            yield "pass"
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in ARITHMETIC:
            yield f"{ast.unparse(target)} = {ast.unparse(value)}"
        case ast.Call(args=args, keywords=keywords):
            for value in [*args, *(keyword.value for keyword in keywords)]:
                if isinstance(value, ast.Tuple) and len(value.elts) > 1:
                    yield from _without_a_part(node, value)
        case ast.Continue() | ast.Break():
            yield "pass"


def _without_a_part(call: ast.Call, parts: ast.Tuple) -> Iterator[str]:
    """The call with one part of a tuple (a key, a seed) set to 0."""
    for number, part in enumerate(parts.elts):
        if isinstance(part, ast.Name | ast.Attribute):
            parts.elts[number] = ast.Constant(0)
            yield ast.unparse(call)
            parts.elts[number] = part


_SIGN = {kind: sign for kind, sign in (
    (ast.Lt, "<"), (ast.LtE, "<="), (ast.Gt, ">"), (ast.GtE, ">="), (ast.Eq, "=="),
    (ast.NotEq, "!="), (ast.In, "in"), (ast.NotIn, "not in"), (ast.Is, "is"), (ast.IsNot, "is not"),
)}  # fmt: skip


def _inner(node: ast.AST) -> str:
    text = ast.unparse(node)
    simple = ast.Name | ast.Attribute | ast.Call | ast.Constant | ast.Subscript | ast.Tuple
    return text if isinstance(node, simple) else f"({text})"


def _or_empty(node: ast.AST | None) -> str:
    return "" if node is None else _inner(node)
