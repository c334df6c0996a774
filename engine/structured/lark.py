"""A grammar in llguidance's dialect of Lark, for its token masks.

Lexemes become terminals (regular expressions, read greedily), the rest rules. Equal lexemes are one terminal.
"""

from __future__ import annotations

from aiexport_edge.engine.structured.expressions import (
    Alt,
    Call,
    Chars,
    Except,
    Expression,
    Grammar,
    Lexeme,
    Repeat,
    Seq,
    Text,
)


def lark(grammar: Grammar) -> str:
    """The grammar's text; rules that nothing calls are left out."""
    return _Writer(grammar).write()


class _Writer:
    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._names: dict[str, str] = {}  # of rules, by their names in the grammar
        self._terminals: dict[Expression, str] = {}
        self._lines: list[str] = []
        self._todo: list[str] = []

    def write(self) -> str:
        body = self._rule(Call(self._grammar.start))
        lines = [f"start: {body}"]
        while self._todo:
            name = self._todo.pop()
            lines.append(f"{self._names[name]}: {self._rule(self._grammar.rules[name])}")
        return "\n".join(lines + self._lines) + "\n"

    def _rule(self, expression: Expression) -> str:
        match expression:
            case Lexeme(part):
                return self._terminal(part)
            case Call(rule):
                if rule not in self._names:
                    self._names[rule] = f"r{len(self._names)}"
                    self._todo.append(rule)
                return self._names[rule]
            case Seq(parts):
                return " ".join(map(self._rule, parts)) if parts else '""'
            case Alt(options):
                return f"({' | '.join(map(self._rule, options))})"
            case Repeat(_, _, 0):
                return '""'
            case Repeat(part, least, most):
                return f"({self._rule(part)}){_count(least, most)}"
            case Text() | Chars() | Except():
                raise AssertionError("characters stand in lexemes")

    def _terminal(self, part: Expression) -> str:
        name = self._terminals.get(part)
        if name is None:
            name = self._terminals[part] = f"T{len(self._terminals)}"
            if isinstance(part, Except):  # the library is much faster with it said than with it spelled out
                exceptions = self._regex(Alt(tuple(map(Text, part.texts))))
                self._lines.append(f"{name}: /{self._regex(part.whole)}/ & ~/{exceptions}/")
            else:
                self._lines.append(f"{name}: /{self._regex(part)}/")
        return name

    def _regex(self, expression: Expression) -> str:
        match expression:
            case Text(text):
                return "".join(character if character.isalnum() else _code(ord(character)) for character in text)
            case Chars(ranges):
                return "[" + "".join(f"{_code(low)}-{_code(high)}" for low, high in ranges) + "]"
            case Seq(parts):
                return "".join(map(self._regex, parts))
            case Alt(options):
                return f"(?:{'|'.join(map(self._regex, options))})"
            case Repeat(_, _, 0):
                return ""
            case Repeat(part, least, most):
                return f"(?:{self._regex(part)}){_count(least, most)}"
            case Call(rule):
                return f"(?:{self._regex(self._grammar.rules[rule])})"
            case Except(_, _, part) | Lexeme(part):
                return self._regex(part)


def _code(point: int) -> str:
    return f"\\x{{{point:x}}}"


def _count(least: int, most: int | None) -> str:
    if most is None:
        return {0: "*", 1: "+"}.get(least, f"{{{least},}}")
    return "?" if (least, most) == (0, 1) else f"{{{least},{most}}}"
