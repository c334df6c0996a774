"""JSON (RFC 8259) as grammar rules: what every document may be made of.

Narrower than JSON where that keeps a reply readable by every parser: whitespace between two parts is at most one space,
or one line break and 32 blanks; numbers have at most 18 digits before the point, 15 after it and two in the exponent,
so that each is a finite double; a surrogate is escaped only together with its other half.
"""

from __future__ import annotations

from collections.abc import Iterable

from aiexport_edge.engine.structured.expressions import (
    ANY,
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
    alt,
    chars,
    common,
    maybe,
    seq,
    without,
)

MAX_BLANKS = 32
MAX_INTEGER_DIGITS = 18
MAX_FRACTION_DIGITS = 15

_CONTROL = chars((0, 0x1F))
_RAW = without(ANY, chars((0, 0x1F), '"\\'))
_ESCAPED = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_DIGIT, _HEX = chars("0123456789"), chars("0123456789abcdefABCDEF")

WS = maybe(Call("ws"))
STRING = Call("string")

_INTEGER_PART = Alt((Text("0"), Seq((chars("123456789"), Repeat(_DIGIT, 0, MAX_INTEGER_DIGITS - 1)))))
FRACTION = Seq((Text("."), Repeat(_DIGIT, 1, MAX_FRACTION_DIGITS)))
_EXPONENT = Seq((chars("eE"), maybe(chars("+-")), Repeat(_DIGIT, 1, 2)))
INTEGER = Lexeme(Seq((maybe(Text("-")), _INTEGER_PART)))
NUMBER = Lexeme(Seq((maybe(Text("-")), _INTEGER_PART, maybe(FRACTION), maybe(_EXPONENT))))

RULES: dict[str, Expression] = {
    # Upper case: parts of lexemes.
    "CHAR": Alt(
        (
            _RAW,
            Seq(
                (
                    Text("\\"),
                    Alt(
                        (
                            chars('"\\/bfnrt'),
                            Seq(
                                (
                                    Text("u"),
                                    Alt(
                                        (
                                            Seq((without(_HEX, chars("dD")), _HEX, _HEX, _HEX)),
                                            Seq((chars("dD"), chars("01234567"), _HEX, _HEX)),
                                            Seq(
                                                (
                                                    chars("dD"),
                                                    chars("89abAB"),
                                                    _HEX,
                                                    _HEX,
                                                    Text("\\u"),
                                                    chars("dD"),
                                                    chars("cdefCDEF"),
                                                    _HEX,
                                                    _HEX,
                                                )
                                            ),
                                        )
                                    ),
                                )
                            ),
                        )
                    ),
                )
            ),
        )
    ),
    "REST": Seq((Repeat(_RAW, 0, None), Text('"'))),
    "ws": Lexeme(Alt((Text(" "), Seq((Text("\n"), Repeat(chars(" \t"), 0, MAX_BLANKS)))))),
    "string": Lexeme(Seq((Text('"'), Repeat(Call("CHAR"), 0, None), Text('"')))),
    "number": NUMBER,
    "literal": Alt((Lexeme(Text("true")), Lexeme(Text("false")), Lexeme(Text("null")))),
}


def mark(text: str) -> Expression:
    """A bracket, comma or colon."""
    return Lexeme(Text(text))


def listed(opening: str, item: Expression, closing: str) -> Expression:
    """Any number of items between brackets."""
    more = Repeat(seq(mark(","), WS, item, WS), 0, None)
    return seq(mark(opening), WS, maybe(seq(item, WS, more)), mark(closing))


RULES["value"] = Alt((STRING, Call("number"), Call("literal"), Call("array"), Call("object")))
RULES["array"] = listed("[", Call("value"), "]")
RULES["object"] = listed("{", seq(STRING, WS, mark(":"), WS, Call("value")), "}")

JSON_OBJECT = Grammar(dict(RULES), "object")


def string_char(characters: Chars) -> Expression:
    """One character of `characters` inside a string: as it is where JSON allows that, else escaped."""
    options: list[Expression] = []
    raw = common(characters, _RAW)
    if raw.ranges:
        options.append(raw)
    for low, high in common(characters, chars((0, 0x1F), '"\\')).ranges:
        for code in range(low, high + 1):
            short = _ESCAPED.get(chr(code))
            options.append(Text(f"\\{short}" if short else f"\\u{code:04x}"))
    return alt(options)


def string_text(text: str) -> str:
    """What stands between the quotes of a string with this value."""
    pieces = []
    for character in text:
        short = _ESCAPED.get(character)
        if short is not None:
            pieces.append(f"\\{short}")
        elif ord(character) < 0x20 or 0xD800 <= ord(character) <= 0xDFFF:
            pieces.append(f"\\u{ord(character):04x}")
        else:
            pieces.append(character)
    return "".join(pieces)


def key(name: str) -> Expression:
    """A member's name, in its one spelling."""
    return Lexeme(Text(f'"{string_text(name)}"'))


def other_key(names: Iterable[str]) -> Expression:
    """A member's name that is none of `names`. Without escapes, so that no spelling of one of them slips through."""
    whole = seq(Text('"'), Call("REST"))
    taken = {string_text(name) for name in names if "\\" not in string_text(name)}
    if not taken:
        return Lexeme(whole)
    return Lexeme(Except(whole, tuple(f'"{text}"' for text in sorted(taken)), seq(Text('"'), _other(taken))))


def _other(taken: set[str]) -> Expression:
    """The rest of a string, closing quote included, that is none of `taken`."""
    if not taken:
        return Call("REST")
    options: list[Expression] = [] if "" in taken else [Text('"')]
    by_first: dict[str, set[str]] = {}
    for text in taken:
        if text:
            by_first.setdefault(text[0], set()).add(text[1:])
    free = without(_RAW, chars("".join(by_first)))
    options.append(seq(free, Call("REST")))
    options += [seq(Text(first), _other(rests)) for first, rests in sorted(by_first.items())]
    return alt(options)
