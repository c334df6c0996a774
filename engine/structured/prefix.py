"""What a client has written of a document, as grammars here read it: with whitespace between parts bounded."""

from __future__ import annotations

_BLANKS = " \t\n\r"


def document_prefix(text: str) -> bytes:
    """UTF-8 of `text` without whitespace at its beginning, and with each other run of it outside strings as one
    character: a line break where it holds one, else a space."""
    pieces: list[str] = []
    in_string = escaped = after_blank = False
    for character in text.lstrip(_BLANKS):
        if in_string:
            pieces.append(character)
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character in _BLANKS:
            breaks = character in "\n\r"
            if not after_blank:
                pieces.append("\n" if breaks else " ")
            elif breaks:
                pieces[-1] = "\n"
            after_blank = True
            continue
        else:
            in_string = character == '"'
            pieces.append(character)
        after_blank = False
    return "".join(pieces).encode("utf-8", "surrogatepass")
