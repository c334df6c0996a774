"""JSON Schemas as grammars: what a grammar writes, its schema accepts; what is outside the subset is refused."""

from __future__ import annotations

import copy
import itertools
import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.structured import Kit, drawn_by, suite, text_of, write

from aiexport_edge.engine.structured.compile import Compiled, compile_grammar
from aiexport_edge.engine.structured.constraint import NoRoom
from aiexport_edge.engine.structured.resolve import UnsupportedSchema

ANY_OF_IT = {"type": "object"}
TAKEN = [entry for entry in suite() if entry["tests"] is not None]
REFUSED = [entry for entry in suite() if entry["tests"] is None]


def grammar_of(schema: Any) -> Compiled:
    return compile_grammar(json.dumps(schema).encode())


def accepts(compiled: Compiled, text: str) -> bool:
    """Whether the grammar has this very text."""
    positions = compiled.reader.read(compiled.reader.beginning, text.encode())
    return bool(positions) and compiled.reader.num_bytes_left(positions) == 0


def validator_of(schema: Any) -> Any:
    draft = jsonschema.Draft7Validator if "additionalItems" in json.dumps(schema) else jsonschema.Draft202012Validator
    return jsonschema.validators.validator_for(schema, default=draft)(schema)


def held(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"v": schema}, "required": ["v"], "additionalProperties": False}


def written_documents(schema: Any, rng: random.Random, number: int) -> list[Any]:
    """Documents drawn under the masks, some cut, some not."""
    kit = Kit.of(schema)
    documents = []
    for _ in range(number):
        budget = rng.choice([0, 3, 10, 60, 120])
        try:
            constraint = kit.constraint(budget)
        except NoRoom as error:
            budget = error.num_tokens + rng.choice([0, 1, 5, 20])
            constraint = kit.constraint(budget)
        ids, _ = write(constraint, drawn_by(rng))
        assert len(ids) <= budget
        documents.append(json.loads(text_of(ids)))
    return documents


def check_suite(per_schema: int) -> None:
    assert len(TAKEN) >= 200
    rng = random.Random(5)
    for entry in TAKEN:
        validator = validator_of(entry["schema"])
        for document in written_documents(entry["schema"], rng, per_schema):
            errors = [error.message for error in validator.iter_errors(document)]
            assert errors == [], (entry["name"], document)


def test_of_the_public_suite_every_document_validates() -> None:
    check_suite(1)


@pytest.mark.prove
def test_of_the_public_suite_very_many_documents_validate() -> None:
    check_suite(100)


def test_of_the_public_suite_no_invalid_instance_is_in_the_grammar() -> None:
    """And of its valid ones that are objects, most are, as `json.dumps` writes them."""
    num_valid = num_accepted = 0
    for entry in TAKEN:
        compiled = grammar_of(entry["schema"])
        for instance, valid in entry["tests"]:
            accepted = any(
                accepts(compiled, json.dumps(instance, ensure_ascii=False, separators=separators))
                for separators in ((",", ":"), (", ", ": "))
            )
            if valid and isinstance(instance, dict):
                num_valid += 1
                num_accepted += accepted
            assert valid or not accepted, (entry["name"], instance)
    assert num_accepted >= 0.7 * num_valid, (num_accepted, num_valid)


def test_of_the_public_suite_the_rest_is_refused() -> None:
    for entry in REFUSED:
        with pytest.raises(UnsupportedSchema):
            grammar_of(entry["schema"])


CASES: list[tuple[Any, list[str], list[str]]] = [
    ({"type": "integer"}, ["0", "-1", "123456789012345678"], ["01", "1.0", "1e3", "-", "1234567890123456789", "true"]),
    ({"type": "number"}, ["0", "-0.5", "1e9", "1.5E-10"], [".5", "1.", "1e", "1e999", "+1"]),
    ({"type": "integer", "minimum": -12, "maximum": 7}, ["-12", "-9", "0", "7"], ["-13", "8", "-0", "70"]),
    ({"type": "integer", "exclusiveMinimum": 99, "maximum": 1000.5}, ["100", "999", "1000"], ["99", "1001"]),
    ({"minimum": 0.5, "maximum": 2.25}, ["0.5", "0.75", "1", "1.99", "2", "2.25", "2.0"], ["0.4", "0.49", "2.26", "3"]),
    ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, ["0.1", "0.5", "0.999"], ["0", "1", "-0.5", "1.0"]),
    ({"type": "number", "minimum": -1.5, "exclusiveMaximum": 0}, ["-1.5", "-1", "-0.1"], ["0", "-0", "-1.6", "0.1"]),
    # What a reader of doubles rounds to the bound is not within it.
    (
        {"exclusiveMinimum": 100, "exclusiveMaximum": 1000},
        ["100.00001", "999.999999999999", "101.5"],
        ["100.000000000000001", "999.999999999999999", "1000", "100"],
    ),
    (
        {"minimum": 0, "maximum": 999999999999999998},
        ["0.5", "999999999.999999", "999999999999999998"],
        ["999999999999999997.5", "999999999999999999"],
    ),
    (
        {"exclusiveMinimum": -99.3, "maximum": 0},
        ["-99.2999999999999", "0", "-0.5"],
        ["-99.3", "-99.299999999999999"],
    ),
    ({"exclusiveMinimum": 999999999999999998}, ["999999999999999999"], ["999999999999999998.5"]),
    (
        {"type": "string", "minLength": 2, "maxLength": 3},
        ['"ab"', '"äöü"', '"\\n\\""', '"😀😀"'],
        ['"a"', '"abcd"', '""'],
    ),
    ({"type": "string", "pattern": "^[a-c]+(-[0-9]{2})?$"}, ['"abc"', '"a-12"'], ['""', '"d"', '"a-1"', '"a-123"']),
    ({"pattern": "b+"}, ['"b"', '"abc"'], ['"a"', '""']),
    ({"pattern": '^"\\\\\\n$'}, ['"\\"\\\\\\n"'], ['"x"']),
    ({"pattern": "^(?:a|b.)$|^c"}, ['"a"', '"bx"', '"cde"'], ['"b"', '"ab"']),
    ({"type": "string", "format": "date"}, ['"2024-02-28"', '"1999-12-31"'], ['"2024-02-30"', '"2024-13-01"', '"x"']),
    ({"type": "string", "format": "hostname"}, ['"a-b.c1"', '"a"'], ['"a--b"', '"-a"', '"a-"', '"a..b"']),
    ({"type": "string", "format": "email"}, ['"a.b@c-d.e"'], ['"a@b"', '"a@b--c.d"', '"@a.b"']),
    ({"type": "string", "format": "uuid"}, ['"00000000-0000-4000-8000-0123456789ab"'], ['"0"']),
    ({"enum": ["a", 1, None, {"b": [True]}]}, ['"a"', "1", "null", '{"b":[true]}'], ['"b"', "true", "[1]"]),
    ({"enum": [1, "x", 2.5], "type": "integer"}, ["1"], ['"x"', "2.5"]),
    ({"const": 'a"\n'}, ['"a\\"\\n"'], ['"a"']),
    ({"type": ["string", "null"]}, ['"x"', "null"], ["1"]),
    (
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        ["[]", "[true]", "[true, false]"],
        ["[true,true,true]"],
    ),
    ({"items": False, "prefixItems": [{"const": 1}, {"const": 2}], "minItems": 1}, ["[1]", "[1,2]"], ["[]", "[1,2,3]"]),
    ({"items": [{"const": 1}], "additionalItems": {"const": 2}, "minItems": 3}, ["[1,2,2]", "[1,2,2,2]"], ["[1,2]"]),
    ({"type": "array", "uniqueItems": True, "maxItems": 1}, ["[]", "[5]"], ["[5,5]"]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, ["{}", '{"a":1}'], ['{"a":"x"}']),
    ({"type": "object", "minProperties": 1}, ['{"a":1}'], ["{}"]),
    (
        {"properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["b"], "additionalProperties": False},
        ['{"a":1,"b":2}', '{"b":2}'],
        ["{}", '{"a":1}', '{"b":2,"a":1}', '{"b":2,"c":3}', '{"b":2,}'],
    ),
    ({"properties": {"ab": {"const": 1}}}, ['{"a":2}', '{"abc":2}', '{"ab":1,"":3}'], ['{"ab":2}', '{"a\\u0062":2}']),
    ({"patternProperties": {"^x": {"const": 1}}, "additionalProperties": False}, ['{"x1":1}', "{}"], ['{"a":1}']),
    ({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, ["5", '"a"'], ['"ab"', "5.5"]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["5", '"a"'], ["null"]),
    (
        {
            "oneOf": [
                {
                    "properties": {"t": {"const": "a"}, "x": {"type": "integer"}},
                    "required": ["t", "x"],
                    "type": "object",
                },
                {"properties": {"t": {"const": "b"}}, "required": ["t"], "type": "object"},
            ]
        },
        ['{"t":"a","x":1}', '{"t":"b"}', '{"t":"b","x":"y"}'],
        ['{"t":"a"}', '{"t":"c"}'],
    ),
    ({"allOf": [{"minimum": 3}, {"maximum": 9}, {"type": "integer"}]}, ["3", "9"], ["2", "10", "3.5"]),
    (
        {"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}, "required": ["a"]}]},
        ['{"a":1,"b":2}', '{"a":1}'],
        ['{"b":2}', '{"a":2}'],
    ),
]


@pytest.mark.parametrize(("schema", "good", "bad"), CASES, ids=[json.dumps(case[0])[:60] for case in CASES])
def test_what_a_schema_comes_to(schema: Any, good: list[str], bad: list[str]) -> None:
    compiled = grammar_of(held(schema))
    validator = validator_of(held(schema))
    for text in good:
        assert accepts(compiled, f'{{"v":{text}}}'), text
        assert validator.is_valid({"v": json.loads(text)}), text
    for text in bad:
        assert not accepts(compiled, f'{{"v":{text}}}'), text


def test_recursion_by_references() -> None:
    tree = {
        "$defs": {
            "tree": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}
        },
        "$ref": "#/$defs/tree",
    }
    compiled = grammar_of(tree)
    assert accepts(compiled, '{"kids":[{"kids":[]},{}]}')
    assert not accepts(compiled, '{"kids":[1]}')
    escaped = {"$defs": {"a/b~c d": {"const": 1}}, "properties": {"x": {"$ref": "#/$defs/a~1b~0c%20d"}}}
    assert not accepts(grammar_of(escaped), '{"x":2}')


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"$ref": "http://localhost/schema"}, "$ref"),
        ({"$ref": "file:///etc/passwd"}, "$ref"),
        ({"properties": {"a": {"$ref": "other.json#/x"}}}, "properties.a.$ref"),
        ({"$ref": "#/$defs/none"}, "$ref"),
        ({"properties": {"a": {"not": {}}}}, "properties.a"),
        ({"properties": {"a": {"pattern": "(?=x)"}}}, "properties.a.pattern"),
        ({"properties": {"a": {"pattern": "\\bx"}}}, "properties.a.pattern"),
        ({"properties": {"a": {"format": "color"}}}, "properties.a.format"),
        ({"properties": {"a": {"multipleOf": 3}}}, "properties.a.multipleOf"),
        ({"properties": {"a": {"minLength": "1"}}}, "properties.a.minLength"),
        ({"properties": {"a": {"type": "str"}}}, "properties.a.type"),
        ({"properties": 5}, "properties"),
        ({"required": [1]}, "required"),
        ({"type": "string"}, "type"),
        ({"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}, ""),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, ""),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "oneOf"),
        ({"properties": {"a": {"const": 1e400}}}, "properties.a"),
        (True, None),
        (5, ""),
        ("x", ""),
        (None, ""),
    ],
)
def test_refusals_name_the_place(schema: Any, place: str | None) -> None:
    if place is None:
        assert accepts(grammar_of(schema), '{"any":["thing"]}')
        return
    with pytest.raises(UnsupportedSchema) as refused:
        grammar_of(schema)
    assert refused.value.place == place


def properties(number: int, schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{n}": schema for n in range(number)}}


def chain(number: int, link: Any) -> dict[str, Any]:
    defs = {f"d{n}": link(f"#/$defs/d{n + 1}") for n in range(number)}
    return {"$defs": {**defs, f"d{number}": ANY_OF_IT}, "$ref": "#/$defs/d0"}


HOSTILE = {
    "itself": {"$ref": "#"},
    "many members": properties(1900, {"type": "integer"}),
    "long strings": properties(300, {"type": "string", "maxLength": 2000}),
    "powers in a pattern": properties(1, {"pattern": "^((a{0,1000}){0,1000}){0,1000}$"}),
    "a long pattern": properties(1, {"pattern": "^((" + "(a|b)?" * 1000 + "){0,10})$"}),
    "brackets in a pattern": properties(1, {"pattern": "(" * 2000 + ")" * 2000}),
    "a pattern that counts": properties(1, {"pattern": ".*a.{0,900}b.{0,900}c"}),
    "powers of references": chain(50, lambda to: {"anyOf": [{"$ref": to}, {"$ref": to}]}),
    "powers of parts": chain(50, lambda to: {"allOf": [{"$ref": to}, {"$ref": to}]}),
    "powers of members": chain(
        40, lambda to: {"type": "object", "required": ["a", "b"], "properties": {"a": {"$ref": to}, "b": {"$ref": to}}}
    ),
    "cubes of items": properties(
        1, {"items": {"items": {"items": {}, "minItems": 2000}, "minItems": 2000}, "minItems": 2000}
    )
    | {"required": ["p0"]},
    "numbers": {"anyOf": [properties(30, {"minimum": 0.000001, "maximum": 99999.999999}) for _ in range(30)]},
    "deep": {"properties": {"a": {}}},
    "a long reference": {"$ref": "#/" + "a/" * 20_000},
    "long": {"title": "x" * 70_000},
}
for _ in range(100):
    HOSTILE["deep"] = {"properties": {"a": HOSTILE["deep"]}}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_schemas_are_refused(schema: Any) -> None:
    with pytest.raises(UnsupportedSchema):
        grammar_of(schema)


def test_wide_and_deep_schemas_within_the_limits() -> None:
    rng = random.Random(4)
    wide = properties(100, {"type": "string", "maxLength": 20}) | {"required": [f"p{n}" for n in range(0, 100, 7)]}
    deep: Any = {"type": "object"}
    for _ in range(20):
        deep = {"type": "object", "properties": {"a": deep, "b": {"enum": [1, 2]}}, "required": ["a"]}
    for schema in (wide, deep):
        for document in written_documents(schema, rng, 2):
            validator_of(schema).validate(document)


def mutated(rng: random.Random, value: Any) -> Any:
    """A schema with one thing in it replaced by something else."""
    value = copy.deepcopy(value)
    places = []
    todo = [value]
    while todo:
        here = todo.pop()
        entries = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, child in entries:
            places.append((here, key))
            todo.append(child)
    if places:
        here, key = rng.choice(places)
        here[key] = rng.choice(
            [None, True, False, -1, 0.5, 10**30, "", "#", [], {}, [1], {"a": 1}, ["a"], copy.deepcopy(value)]
        )
    return value


SCHEMAS = [case[0] for case in CASES] + [entry["schema"] for entry in itertools.chain(TAKEN[::4], REFUSED[::6])]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_a_damaged_schema_is_refused_or_held_to(seed: int) -> None:
    """Never an error of another kind, and never a document that it does not accept where `jsonschema` can tell."""
    rng = random.Random(seed)
    schema = mutated(rng, held(rng.choice(SCHEMAS)))
    try:
        compiled = grammar_of(schema)
    except UnsupportedSchema:
        return
    shortest = json.loads(compiled.reader.ending(compiled.reader.beginning))
    assert isinstance(shortest, dict)
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError:
        return
    jsonschema.Draft202012Validator(schema).validate(shortest)
