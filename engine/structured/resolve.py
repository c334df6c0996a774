"""What a JSON Schema comes to before it is made a grammar: keywords known, references followed, `allOf` put together.

Owns which keywords there are. A reference is followed within the schema alone: nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from aiexport_edge.engine.structured.constants import is_of, same

MAX_SCHEMAS = 2000  # subschemas, each counted as often as it is used
MAX_DEPTH = 60
MAX_PLACE_CHARACTERS = 200
MAX_OPTIONS = 50  # of a `oneOf`, each of which is held against each

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ANNOTATIONS = {
    *("$schema", "$id", "id", "$comment", "$defs", "definitions", "$anchor", "title", "description", "default"),
    *("example", "examples", "deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType"),
    *("contentSchema", "discriminator", "nullable"),
}
OF_TYPE = {
    "object": [
        "properties",
        "required",
        "additionalProperties",
        "minProperties",
        "maxProperties",
        "patternProperties",
        "unevaluatedProperties",
    ],
    "array": ["items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems"],
    "string": ["minLength", "maxLength", "pattern", "format"],
    "number": ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"],
}
TYPE_OF = {keyword: kind for kind, keywords in OF_TYPE.items() for keyword in keywords}
_UNIONS = ("allOf", "anyOf", "oneOf")
_ANY_VALUE = (Mapping, list, str, int, float, bool, type(None))
_COUNT, _NUMBER = ("an integer of at least 0", (int, float)), ("a number", (int, float))
_ARRAY, _STRING, _SCHEMA = ("an array", (list,)), ("a string", (str,)), ("a schema", (Mapping, bool))
_SHAPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "type": ("a type or an array of types", (str, list)),
    "$ref": _STRING,
    **dict.fromkeys((*_UNIONS, "enum", "required", "prefixItems"), _ARRAY),
    "const": ("any value", _ANY_VALUE),
    **dict.fromkeys(("properties", "patternProperties"), ("an object", (Mapping,))),
    **dict.fromkeys(("additionalProperties", "additionalItems"), _SCHEMA),
    **dict.fromkeys(("unevaluatedProperties", "unevaluatedItems"), _SCHEMA),
    "items": ("a schema or an array of schemas", (Mapping, bool, list)),
    "uniqueItems": ("true or false", (bool,)),
    **dict.fromkeys(("pattern", "format"), _STRING),
    **dict.fromkeys((f"{end}{of}" for end in ("min", "max") for of in ("Properties", "Items", "Length")), _COUNT),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), _NUMBER),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), ("a number", (int, float, bool))),
}

Schema = Mapping[str, Any] | bool


class UnsupportedSchema(Exception):
    """Why no grammar can be made of a schema; `place` is a path in it, such as `properties.age`."""

    def __init__(self, place: str, problem: str) -> None:
        place = place if len(place) <= MAX_PLACE_CHARACTERS else f"{place[:MAX_PLACE_CHARACTERS]}…"
        super().__init__(f"{place}: {problem}" if place else problem)
        self.place = place
        self.problem = problem


class Resolver:
    """Of one schema. `count` is called for each subschema that is looked at."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._num_schemas = 0

    def count(self, number: int, place: str, depth: int) -> None:
        """Raises where there are too many subschemas, or this one lies too deep."""
        self._num_schemas += number
        if self._num_schemas > MAX_SCHEMAS:
            raise UnsupportedSchema("", f"it has more than {MAX_SCHEMAS} subschemas")
        if depth > MAX_DEPTH:
            raise UnsupportedSchema(place, f"it is nested more than {MAX_DEPTH} deep")

    def stripped(self, schema: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Without annotations. Raises for a keyword that is not known here."""
        left: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in _ANNOTATIONS or keyword.startswith("x-"):
                if keyword in ("$id", "id") and place:
                    raise UnsupportedSchema(place, f"{keyword} inside a schema is not supported")
                continue
            if keyword in ("if", "then", "else") and "if" not in schema:
                continue
            if keyword not in _SHAPES:
                raise UnsupportedSchema(place, f"the keyword {keyword[:40]!r} is not supported")
            shape, allowed = _SHAPES[keyword]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise UnsupportedSchema(at(place, keyword), f"must be {shape}")
            if keyword == "required" and isinstance(value, list) and not all(isinstance(name, str) for name in value):
                raise UnsupportedSchema(at(place, keyword), "must be an array of strings")
            if keyword in _UNIONS and not value:
                raise UnsupportedSchema(at(place, keyword), "must not be empty")
            left[keyword] = value
        return left

    def types(self, schema: Mapping[str, Any], place: str) -> list[str]:
        """Those that it accepts as far as `type` says; else those that its keywords speak of."""
        declared = schema.get("type")
        if declared is None:
            spoken_of = {TYPE_OF[keyword] for keyword in schema if keyword in TYPE_OF}
            return [kind for kind in TYPES if kind in spoken_of] or [kind for kind in TYPES if kind != "integer"]
        kinds = [declared] if isinstance(declared, str) else declared
        if not kinds or any(kind not in TYPES for kind in kinds):
            raise UnsupportedSchema(at(place, "type"), f"must be of {', '.join(TYPES)}")
        return [kind for kind in TYPES if kind in kinds and not (kind == "integer" and "number" in kinds)]

    def target(self, reference: str, place: str) -> Any:
        """What a reference within the schema leads to."""
        if reference != "#" and not reference.startswith("#/"):
            raise UnsupportedSchema(at(place, "$ref"), "must be # or #/…: nothing is fetched from elsewhere")
        here: Any = self._root
        for step in unquote(reference)[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(here, Mapping) and step in here:
                here = here[step]
            elif isinstance(here, list) and step.isdecimal() and len(step) < 7 and int(step) < len(here):
                here = here[int(step)]
            else:
                raise UnsupportedSchema(at(place, "$ref"), f"{reference[:80]!r} is not in this schema")
        return here

    def inlined(self, schema: Mapping[str, Any], place: str, depth: int) -> Mapping[str, Any]:
        """A schema with keywords beside its `$ref`, as one."""
        beside = {keyword: value for keyword, value in schema.items() if keyword != "$ref"}
        return {**beside, "allOf": [*beside.get("allOf", ()), self.target(schema["$ref"], place)]}

    def merged(self, schema: Mapping[str, Any], place: str, depth: int) -> Schema:
        """A schema with `allOf`, put together keyword by keyword."""
        parts = schema["allOf"]
        merged: dict[str, Any] = {keyword: value for keyword, value in schema.items() if keyword != "allOf"}
        found: list[tuple[dict[str, Any], str]] = []
        for index, part in enumerate(parts):
            here = at(place, f"allOf.{index}")
            for _ in range(MAX_DEPTH):
                if isinstance(part, Mapping) and set(self.stripped(part, here)) == {"$ref"}:
                    part = self.target(part["$ref"], here)
                else:
                    break
            if part is False:
                return False
            if part is True:
                continue
            if not isinstance(part, Mapping):
                raise UnsupportedSchema(here, "a schema is an object, true or false")
            part = self.stripped(part, here)
            if "allOf" in part or "$ref" in part:
                self.count(1, here, depth + 1)
                inlined = self.inlined(part, here, depth) if "$ref" in part else part
                inner = self.merged(inlined, here, depth + 1)
                if isinstance(inner, bool):
                    return False
                part = dict(inner)
            found.append((part, here))
        for index, (part, here) in enumerate(found):
            _check_unseen(part, [merged, *(other for other, _ in found[:index] + found[index + 1 :])], here)
        for part, here in found:
            merged = _put_together(merged, part, here)
        return merged

    def check_apart(self, options: Sequence[Any], place: str, depth: int) -> None:
        """Raises unless no document satisfies two of the options."""
        plain = [self._plain(option, f"{place}.{index}", depth) for index, option in enumerate(options)]
        if len(plain) > MAX_OPTIONS:
            raise UnsupportedSchema(place, f"is supported with at most {MAX_OPTIONS} options")
        for index, one in enumerate(plain):
            for other in plain[:index]:
                if not self._apart(one, other, place, depth):
                    raise UnsupportedSchema(
                        place,
                        "is supported where type, constants or a required member tell the options apart; use anyOf",
                    )

    def _plain(self, schema: Any, place: str, depth: int) -> Schema:
        """With references and `allOf` resolved."""
        for _ in range(MAX_DEPTH):
            if isinstance(schema, bool):
                return schema
            if not isinstance(schema, Mapping):
                break
            plain = self.stripped(schema, place)
            if "$ref" in plain:
                schema = self.target(plain["$ref"], place) if len(plain) == 1 else self.inlined(plain, place, depth)
            elif "allOf" in plain:
                schema = self.merged(plain, place, depth)
            else:
                return plain
        raise UnsupportedSchema(place, "a schema is an object, true or false")

    def _apart(self, one: Schema, other: Schema, place: str, depth: int) -> bool:
        """Whether surely no document satisfies both."""
        if depth > MAX_DEPTH:
            return False
        if isinstance(one, bool) or isinstance(other, bool):
            return one is False or other is False
        constants = [self._values(schema) for schema in (one, other)]
        if constants[0] is not None and constants[1] is not None:
            return not any(same(a, b) for a in constants[0] for b in constants[1])
        kinds = [self._kinds(schema, place) for schema in (one, other)]
        if not kinds[0] & kinds[1]:
            return True
        if kinds[0] & kinds[1] != {"object"}:
            return False
        shared = set(one.get("required", [])) & set(other.get("required", []))
        for name in shared:
            members = [schema.get("properties", {}).get(name) for schema in (one, other)]
            if None not in members:
                plain = [self._plain(member, place, depth + 1) for member in members]
                if self._apart(plain[0], plain[1], place, depth + 1):
                    return True
        return False

    def _values(self, schema: Mapping[str, Any]) -> list[Any] | None:
        if "const" in schema:
            return [schema["const"]]
        return schema.get("enum")

    def _kinds(self, schema: Mapping[str, Any], place: str) -> set[str]:
        """The types that it may accept, integers as numbers."""
        values = self._values(schema)
        if values is not None:
            return {kind for kind in TYPES if kind != "integer" and any(is_of(value, kind) for value in values)}
        if "type" not in schema:  # keywords without a type accept every other type
            return set(TYPES) - {"integer"}
        return {"number" if kind == "integer" else kind for kind in self.types(schema, place)}


def at(place: str, step: str) -> str:
    """The path of a step further in."""
    return f"{place}.{step}" if place else step


# The first keyword is about what the second, in the same schema, does not name.
_CLOSED_BY = (
    ("additionalProperties", "properties"),
    ("additionalProperties", "patternProperties"),
    ("items", "prefixItems"),
)
_NAMING = {
    "unevaluatedProperties": ("properties", "patternProperties", "additionalProperties", "unevaluatedProperties"),
    "unevaluatedItems": ("items", "prefixItems", "unevaluatedItems"),
}
_TIGHTER = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minItems", "minLength", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxItems", "maxLength", "maxProperties"), min),
}


def _check_unseen(part: Mapping[str, Any], beside: Sequence[Mapping[str, Any]], place: str) -> None:
    """What stands beside an `allOf` sees what its schemas name, but these see neither it nor each other."""
    for keyword, naming in _NAMING.items():
        if part.get(keyword, True) is not True:
            for other in beside:
                if any(name in other for name in (*naming, "anyOf", "oneOf", "$ref")):
                    raise UnsupportedSchema(place, f"{keyword} beside what it does not see is not supported")


def _put_together(one: Mapping[str, Any], other: Mapping[str, Any], place: str) -> dict[str, Any]:
    """One schema that accepts what both accept. Raises where keywords cannot be put together one by one."""
    merged = dict(one)
    for closing, opened in _CLOSED_BY:
        for a, b in ((one, other), (other, one)):
            if a.get(closing, True) is True or b.get(opened) in (None, a.get(opened)):
                continue
            mine, theirs = a.get(opened, {}), b[opened]
            if opened != "properties" or not isinstance(theirs, Mapping) or not set(theirs) <= set(mine):
                raise UnsupportedSchema(place, f"{closing} and {opened} in different schemas cannot be put together")
    for keyword, value in other.items():
        if keyword not in merged or merged[keyword] == value:
            merged[keyword] = value
            continue
        mine = merged[keyword]
        if keyword in _TIGHTER and not isinstance(mine, bool) and not isinstance(value, bool):
            merged[keyword] = _TIGHTER[keyword](mine, value)
        elif keyword == "required":
            merged[keyword] = [*mine, *(name for name in value if name not in mine)]
        elif keyword == "properties":
            merged[keyword] = dict(mine)
            for name, member in value.items():
                both = name in mine and mine[name] != member
                merged[keyword][name] = {"allOf": [mine[name], member]} if both else member
        elif keyword == "type":
            merged[keyword] = _common_types(mine, value, place)
        elif keyword == "additionalProperties" and (mine is True or value is True):
            merged[keyword] = value if mine is True else mine
        elif keyword == "items" and isinstance(mine, Mapping) and isinstance(value, Mapping):
            merged[keyword] = {"allOf": [mine, value]}
        else:
            raise UnsupportedSchema(at(place, keyword), "is given twice and cannot be put together")
    return merged


def _common_types(one: Any, other: Any, place: str) -> list[str]:
    kinds = [[kind] if isinstance(kind, str) else kind for kind in (one, other)]
    both = [kind for kind in kinds[0] if kind in kinds[1]]
    for mine, theirs in (kinds, reversed(kinds)):
        if "integer" in mine and "number" in theirs and "integer" not in both:
            both.append("integer")
    if not both:
        raise UnsupportedSchema(at(place, "type"), "no type is left")
    return both
