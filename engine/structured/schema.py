"""A JSON Schema as a grammar: every text of the grammar is an object that the schema accepts.

The subset of JSON Schema (2020-12, and what drafts 4 to 2019-09 write differently) that is taken:
- `type`, one or several; where it is absent, the types that the other keywords speak of, all if none does
- objects: `properties`, `required`, `additionalProperties`, `minProperties` up to the number of required members or 1,
  `maxProperties` where nothing or all is declared; `patternProperties` of one pattern beside nothing else. Members come
  in the order in which `properties` names them, others after them; other names are spelled without escapes
- `unevaluatedProperties`, `unevaluatedItems`: for the members and items that nothing beside them names
- arrays: `items`, `prefixItems` (`items` and `additionalItems` of old), `minItems`, `maxItems`; `uniqueItems` where
  there is at most one item
- strings: `minLength`, `maxLength`, `pattern` (see `patterns.py`) and `format` (`formats.py`); a pattern or format goes
  without lengths
- numbers: `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum` of at most 6 decimal places; `multipleOf: 1`
- `enum`, `const`, beside `type` alone
- `anyOf`; `oneOf` whose options can be told apart by type, by constants, or by a required member of constants; `allOf`
  of schemas that can be put together keyword by keyword
- `$ref` to `#`, `#/…`: within the schema, never fetched; recursion is fine; `$defs`, `definitions`
- `true`, `{}`: any JSON value; annotations (`title`, `description`, `default`, `examples`, …) say nothing here
Everything else is refused by name: better no answer than one that the schema would not accept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from aiexport_edge.engine.structured import json_grammar, numbers
from aiexport_edge.engine.structured.constants import is_of, same, spelled
from aiexport_edge.engine.structured.expressions import Call, Expression, Grammar, Lexeme, Repeat, Text, alt, maybe, seq
from aiexport_edge.engine.structured.formats import FORMATS
from aiexport_edge.engine.structured.json_grammar import WS, key, mark, other_key
from aiexport_edge.engine.structured.patterns import UnknownPattern, pattern_text
from aiexport_edge.engine.structured.resolve import Resolver, Schema, UnsupportedSchema, at

_BOUNDED_NUMBER = 10  # what a number within bounds counts as, by the time that it takes
MAX_COUNT = 2000  # of items and characters
MAX_ENUM = 1000


def schema_grammar(schema: Schema) -> Grammar:
    """The grammar of a schema. Raises `UnsupportedSchema`."""
    return _Compiler(schema).compile()


class _Compiler:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._resolver = Resolver(root)
        self._rules = dict(json_grammar.RULES)
        self._refs: dict[str, str] = {}  # target to rule

    def compile(self) -> Grammar:
        try:
            start = self._expression({"allOf": [self._root, {"type": "object"}]}, "", 0)
        except UnsupportedSchema as error:
            place = error.place.removeprefix("allOf.0").removeprefix("allOf.1").lstrip(".")
            raise UnsupportedSchema(place, error.problem) from error
        if start is None:
            raise UnsupportedSchema("", "no document satisfies this schema")
        self._rules["root"] = start
        return Grammar(self._rules, "root")

    # ------------------------------------------------------------------------------------------------ any schema

    def _expression(self, schema: Any, place: str, depth: int) -> Expression | None:
        """The texts that a schema accepts; None where there are none."""
        self._resolver.count(1, place, depth)
        if schema is True:
            return Call("value")
        if schema is False:
            return None
        if not isinstance(schema, Mapping):
            raise UnsupportedSchema(place, "a schema is an object, true or false")
        schema = self._resolver.stripped(schema, place)
        if not schema:
            return Call("value")
        if "$ref" in schema:
            if len(schema) == 1:
                return self._reference(schema["$ref"], place, depth)
            return self._expression(self._resolver.inlined(schema, place, depth), place, depth + 1)
        if "allOf" in schema:
            return self._expression(self._resolver.merged(schema, place, depth), place, depth + 1)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._union(schema, keyword, place, depth)
        if "enum" in schema or "const" in schema:
            return self._constants(schema, place)
        options = [self._typed(kind, schema, place, depth) for kind in self._resolver.types(schema, place)]
        found = [option for option in options if option is not None]
        return alt(found) if found else None

    def _typed(self, kind: str, schema: Mapping[str, Any], place: str, depth: int) -> Expression | None:
        match kind:
            case "object":
                return self._object(schema, place, depth)
            case "array":
                return self._array(schema, place, depth)
            case "string":
                return self._string(schema, place)
            case "boolean":
                return alt((Lexeme(Text("true")), Lexeme(Text("false"))))
            case "null":
                return Lexeme(Text("null"))
            case _:
                return self._number(kind, schema, place)

    def _rule(self, expression: Expression, kind: str) -> Expression:
        """A rule of its own, so that what is used in several places is written once."""
        name = f"{kind}_{len(self._rules)}"
        self._rules[name] = expression
        return Call(name)

    # ------------------------------------------------------------------------------------------------ objects

    def _object(self, schema: Mapping[str, Any], place: str, depth: int) -> Expression | None:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        names = [*properties, *(name for name in dict.fromkeys(required) if name not in properties)]
        additional = schema.get("additionalProperties", schema.get("unevaluatedProperties", True))
        patterns = schema.get("patternProperties")
        other_names: Expression = other_key(names)
        if patterns:
            if len(patterns) != 1 or names or additional is not False:
                raise UnsupportedSchema(
                    at(place, "patternProperties"),
                    "is supported with one pattern, without properties and with additionalProperties false",
                )
            ((pattern, additional),) = patterns.items()
            other_names = Lexeme(seq(Text('"'), self._pattern(pattern, at(place, "patternProperties")), Text('"')))
        least, most = self._count(schema, "minProperties", place, 0), self._count(schema, "maxProperties", place, None)
        assert least is not None
        others = self._expression(additional, at(place, "additionalProperties"), depth + 1)
        members: list[tuple[Expression | None, bool]] = []
        for name in names:
            declared = properties.get(name, additional)
            value = self._expression(declared, at(place, f"properties.{name[:40]}"), depth + 1)
            if value is None and name in required:
                return None
            members.append(
                (None if value is None else self._rule(_member(key(name), value), "member"), name in required)
            )
        other = None if others is None else self._rule(_member(other_names, others), "member")
        if not names and other is not None and least <= 1:
            self_contained = _listed("{", other, "}", least, most)
            return None if self_contained is None else self._rule(self_contained, "object")
        num_required = sum(needed for _, needed in members)
        if least > max(1, num_required) or (least and not names and other is None):
            raise UnsupportedSchema(at(place, "minProperties"), "is supported up to the number of required members")
        if most is not None and (most < len(names) or other is not None):
            raise UnsupportedSchema(at(place, "maxProperties"), "is supported where properties or nothing is declared")
        return self._members(members, other, needs_one=least > num_required)

    def _members(
        self, members: Sequence[tuple[Expression | None, bool]], other: Expression | None, *, needs_one: bool
    ) -> Expression:
        """Members in their order, then any number of others. A rule for what may come from each place on: after a
        member, and before any."""
        later: Expression = mark("}")
        if other is not None:
            later = seq(Repeat(seq(mark(","), WS, other), 0, None), mark("}"))
        later = self._rule(later, "rest")
        firsts: list[Expression] = [] if needs_one else [mark("}")]
        if other is not None:
            firsts.append(seq(other, later))
        for member, needed in reversed(members):
            if member is None:
                continue
            this_first = seq(member, later)
            firsts = [this_first] if needed else [*firsts, this_first]
            this_later = seq(mark(","), WS, member, later)
            later = self._rule(this_later if needed else alt((this_later, later)), "rest")
        return self._rule(seq(mark("{"), WS, alt(reversed(firsts))), "object")

    # ------------------------------------------------------------------------------------------------ arrays

    def _array(self, schema: Mapping[str, Any], place: str, depth: int) -> Expression | None:
        items = schema.get("items", schema.get("unevaluatedItems", True))
        first = schema.get("prefixItems", [])
        if isinstance(items, list):  # before 2020-12
            first, items = items, schema.get("additionalItems", schema.get("unevaluatedItems", True))
        least, most = self._count(schema, "minItems", place, 0), self._count(schema, "maxItems", place, None)
        assert least is not None
        heads: list[Expression] = []
        for index, head in enumerate(first[: most if most is not None else len(first)]):
            expression = self._expression(head, at(place, f"prefixItems.{index}"), depth + 1)
            if expression is None:
                most = index
                break
            heads.append(self._rule(expression, "item"))
        item = self._expression(items, at(place, "items"), depth + 1)
        if item is None:
            most = len(heads) if most is None else min(most, len(heads))
        if schema.get("uniqueItems") is True and (most is None or most > 1):
            raise UnsupportedSchema(at(place, "uniqueItems"), "is supported where there is at most one item")
        if most is not None and least > most:
            return None
        body: Expression | None = None  # what may follow the heads, comma first
        if item is not None and (most is None or most > len(heads)):
            counted = (max(0, least - len(heads)), None if most is None else most - len(heads))
            if not heads:
                listed = _listed("[", item, "]", *counted)
                assert listed is not None
                return self._rule(listed, "array")
            body = Repeat(seq(mark(","), WS, item, WS), *counted)
        later: Expression = seq(body, mark("]")) if body is not None else mark("]")
        for index in range(len(heads) - 1, -1, -1):
            this = seq(*([mark(","), WS] if index else []), heads[index], WS, later)
            later = self._rule(this if index < least else alt((this, mark("]"))), "rest")
        return self._rule(seq(mark("["), WS, later), "array")

    # ------------------------------------------------------------------------------------------------ leaves

    def _string(self, schema: Mapping[str, Any], place: str) -> Expression | None:
        least, most = self._count(schema, "minLength", place, 0), self._count(schema, "maxLength", place, None)
        assert least is not None
        pattern: str | None = schema.get("pattern")
        form: str | None = schema.get("format")
        if form is not None and form not in FORMATS:
            raise UnsupportedSchema(at(place, "format"), f"is supported as {', '.join(FORMATS)}")
        if pattern is not None and form is not None:
            raise UnsupportedSchema(at(place, "format"), "is not supported together with pattern")
        if pattern is not None or form is not None:
            if least > 0 or most is not None:
                raise UnsupportedSchema(place, "lengths are not supported together with pattern or format")
            text = self._pattern(pattern if pattern is not None else FORMATS[str(form)], at(place, "pattern"))
            return Lexeme(seq(Text('"'), text, Text('"')))
        if least == 0 and most is None:
            return json_grammar.STRING
        if most is not None and least > most:
            return None
        return Lexeme(seq(Text('"'), Repeat(Call("CHAR"), least, most), Text('"')))

    def _pattern(self, pattern: str, place: str) -> Expression:
        try:
            return pattern_text(pattern)
        except UnknownPattern as error:
            raise UnsupportedSchema(place, f"this regular expression is not supported ({error})") from error

    def _number(self, kind: str, schema: Mapping[str, Any], place: str) -> Expression | None:
        low, low_strict = self._bound(schema, "minimum", "exclusiveMinimum", place, lower=True)
        high, high_strict = self._bound(schema, "maximum", "exclusiveMaximum", place, lower=False)
        multiple = schema.get("multipleOf")
        if multiple is not None and (isinstance(multiple, bool) or multiple != 1):
            raise UnsupportedSchema(at(place, "multipleOf"), "is supported as 1")
        bounds = numbers.Bounds(low, high, low_strict, high_strict)
        if kind == "integer" or multiple is not None:
            return numbers.integer(bounds)
        if low is not None or high is not None:
            self._resolver.count(_BOUNDED_NUMBER, place, 0)
        try:
            return numbers.number(bounds)
        except ValueError as error:
            raise UnsupportedSchema(place, str(error)) from error

    def _bound(
        self, schema: Mapping[str, Any], name: str, strict_name: str, place: str, *, lower: bool
    ) -> tuple[Fraction | None, bool]:
        """The tighter of an inclusive and an exclusive bound; in draft 4 the latter is a boolean."""
        inclusive, exclusive = schema.get(name), schema.get(strict_name)
        strict = exclusive is True
        if isinstance(exclusive, bool):
            exclusive = None
        found: list[tuple[Fraction, bool]] = []
        for keyword, value, is_strict in ((name, inclusive, strict), (strict_name, exclusive, True)):
            if value is None:
                continue
            if not math.isfinite(value) or abs(value) > 10**json_grammar.MAX_INTEGER_DIGITS:
                raise UnsupportedSchema(at(place, keyword), "is too large a number")
            found.append((Fraction(value) if isinstance(value, int) else Fraction(repr(value)), is_strict))
        if not found:
            return None, False
        return max(found) if lower else min(found, key=lambda bound: (bound[0], not bound[1]))

    def _count(self, schema: Mapping[str, Any], name: str, place: str, default: int | None) -> int | None:
        if name not in schema:
            return default
        value: float = schema[name]
        if value < 0 or value != value // 1:
            raise UnsupportedSchema(at(place, name), "must be an integer of at least 0")
        if value > MAX_COUNT:
            if name.startswith("max"):
                return MAX_COUNT
            raise UnsupportedSchema(at(place, name), f"is supported up to {MAX_COUNT}")
        return int(value)

    def _constants(self, schema: Mapping[str, Any], place: str) -> Expression | None:
        beside = [keyword for keyword in schema if keyword not in ("enum", "const", "type")]
        if beside:
            raise UnsupportedSchema(at(place, beside[0]), "is not supported together with enum or const")
        values = schema.get("enum", [schema.get("const")])
        if len(values) > MAX_ENUM:
            raise UnsupportedSchema(at(place, "enum"), f"must have at most {MAX_ENUM} values")
        if "enum" in schema and "const" in schema:
            values = [value for value in values if same(value, schema["const"])]
        if "type" in schema:
            kinds = self._resolver.types(schema, place)
            values = [value for value in values if any(is_of(value, kind) for kind in kinds)]
        try:
            return alt([Lexeme(Text(spelled(value))) for value in values]) if values else None
        except ValueError:
            raise UnsupportedSchema(place, "a constant has a number that JSON cannot write") from None

    # ------------------------------------------------------------------------------------------------ combinations

    def _reference(self, reference: str, place: str, depth: int) -> Expression:
        """A call of the rule of what is referred to, which is made when it is met first."""
        name = self._refs.get(reference)
        if name is None:
            target = self._resolver.target(reference, place)
            name = self._refs[reference] = f"ref_{len(self._refs)}"
            self._rules[name] = Text("")  # its place, while it is being made: a reference back is a call
            expression = self._expression(target, f"$ref {reference[:80]}", depth + 1)
            if expression is None:
                raise UnsupportedSchema(place, f"nothing satisfies {reference[:80]}")
            self._rules[name] = expression
            self._check_progress(name, place)
        return Call(name)

    def _check_progress(self, name: str, place: str) -> None:
        """A rule that calls itself before it has read anything never ends."""
        seen: set[str] = set()
        todo = [name]
        while todo:
            for called in _called_first(self._rules[todo.pop()]):
                if called == name:
                    raise UnsupportedSchema(place, "a $ref leads back to itself")
                if called not in seen and called.startswith("ref_"):
                    seen.add(called)
                    todo.append(called)

    def _union(self, schema: Mapping[str, Any], keyword: str, place: str, depth: int) -> Expression | None:
        """`anyOf` and `oneOf`. What stands beside goes into each option."""
        options = schema[keyword]
        beside = {name: value for name, value in schema.items() if name != keyword}
        if beside:
            options = [{**beside, "allOf": [*beside.get("allOf", ()), option]} for option in options]
        if keyword == "oneOf" and len(options) > 1:
            self._resolver.check_apart(options, at(place, keyword), depth)
        found: list[Expression] = []
        for index, option in enumerate(options):
            expression = self._expression(option, at(place, f"{keyword}.{index}"), depth + 1)
            if expression is not None:
                found.append(expression)
        return alt(found) if found else None


def _member(name: Expression, value: Expression) -> Expression:
    return seq(name, WS, mark(":"), WS, value, WS)


def _listed(opening: str, item: Expression, closing: str, least: int, most: int | None) -> Expression | None:
    """`least` to `most` items between brackets."""
    if most is not None and least > most:
        return None
    if most == 0:
        return seq(mark(opening), WS, mark(closing))
    more = Repeat(seq(mark(","), WS, item, WS), max(0, least - 1), None if most is None else most - 1)
    body = seq(item, WS, more)
    return seq(mark(opening), WS, body if least else maybe(body), mark(closing))


def _called_first(expression: Expression) -> list[str]:
    """Rules that an expression may call before it reads anything. A value reads something, so a sequence's first
    part is all that counts."""
    match expression:
        case Call(rule):
            return [rule]
        case _ if hasattr(expression, "options"):
            return [name for option in expression.options for name in _called_first(option)]
        case _:
            return []
