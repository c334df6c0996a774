"""Token ids to text as they come. Owns the bytes of a character that has not come whole yet.

The concatenation of what `feed` and `flush` return equals the decoding of all ids at once with errors="replace",
however the ids are dealt out.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """One reply's text. `strip_space`: drop one space at its beginning, which SentencePiece puts before any text."""

    def __init__(self, decode_bytes: Callable[[int], bytes], *, strip_space: bool = False) -> None:
        self._decode_bytes = decode_bytes
        self._decoder = _new_decoder(errors="replace")
        self._strip_space = strip_space
        self.is_empty = not strip_space  # neither bytes are held nor is a space to be dropped

    def feed(self, token_id: int) -> str:
        """The text that has become certain by this token: whole characters only."""
        data = self._decode_bytes(token_id)
        if self._strip_space and data:
            self._strip_space = False
            self.is_empty = True
            data = data.removeprefix(b" ")
        if self.is_empty and data.isascii():  # most tokens by far, at a tenth of the decoder's cost
            return data.decode("ascii")
        text = self._decoder.decode(data)
        self.is_empty = not (self._strip_space or self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """U+FFFD for the bytes of a character that never came whole; then nothing is held any more."""
        self.is_empty = not self._strip_space
        return self._decoder.decode(b"", final=True)
