"""Text to token ids and token ids to bytes, for one Hugging Face directory.

Owns `tokenizer.json` and what the directory says of special tokens. Knows no roles and no templates.

Two kinds of text meet in a prompt: the template's, in which `<|im_start|>` is a control token, and the client's, in
which it is twelve characters. Both have to go through the tokenizer as one string, because normalisers and merges
look across borders. So the tokenizer in use here knows the control tokens under other names: long random spellings,
drawn anew in each process, which no client can guess. Whoever renders a prompt writes a control token as
`alias(...)`; the true spellings are ordinary text to it.
"""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

_MARKUP_OPENS, _MARKUP_CLOSES = tuple("<[{|"), tuple(">]}|")
_SURE_CHARACTERS = 8  # a text of so many characters a token is looked at in part first
_BORDER_TOKENS = 64  # by how many tokens a text's beginning may differ when it is encoded alone
_LONG_CHARACTERS = 2000  # longer texts are encoded without the interpreter's lock
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(Exception):
    """The directory's tokenizer cannot be served; the message is a sentence for the operator."""


class TooManyTokens(Exception):
    """A text has more tokens than it may; `at_least` so many."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"at least {at_least} tokens")
        self.at_least = at_least


class Tokenizer:
    """The tokenizer of one model directory. Thread-safe: nothing changes after `load`.

    `special_tokens` are the spellings that templates refer to by name (`bos_token`, `eos_token`, …). `control_tokens`
    maps the spelling of each control token to its id: added tokens that are marked special or are written as markup
    (`<think>`, `[TOOL]`). Other added tokens (runs of blanks, words, single brackets) are part of the text's
    vocabulary.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        whole: HFTokenizer,
        *,
        special_tokens: dict[str, str],
        add_bos: bool | None,
    ) -> None:
        added: list[dict[str, Any]] = spec.get("added_tokens") or []
        control = [token for token in added if token["special"] or _is_markup(token["content"])]
        control = [token for token in control if token["content"]]
        self.control_tokens: dict[str, int] = {token["content"]: token["id"] for token in control}
        self._control_ids = frozenset(self.control_tokens.values())
        self.special_tokens = special_tokens

        # The tokenizer in use: the same without its control tokens, then with them again under their aliases. Added
        # tokens that are in no vocabulary get other ids there; `_real_ids` leads back.
        plain = dict(spec, post_processor=None, truncation=None, padding=None)
        kept = [token for token in added if token["content"] not in self.control_tokens]
        plain["added_tokens"] = kept
        tokenizer = HFTokenizer.from_str(json.dumps(plain))
        # Ids that text alone could reach and may not. The unknown token may: it is what a character without a token is.
        unknown = special_tokens.get("unk_token")
        reachable = {tokenizer.token_to_id(text) for text in self.control_tokens if text != unknown}
        self._forbidden = frozenset(id_ for id_ in reachable if id_ is not None)
        nonce = secrets.token_hex(16)
        self._aliases = {text: f"\U0010f8ff{nonce}:{n}\U0010f8fe" for n, text in enumerate(self.control_tokens)}
        for token in control:
            name = self._aliases[token["content"]]
            tokenizer.add_special_tokens(
                [AddedToken(name, single_word=False, lstrip=token["lstrip"], rstrip=token["rstrip"], normalized=False)]
            )
        names = {self._aliases.get(token["content"], token["content"]): token["id"] for token in added}
        ids_here = {name: tokenizer.token_to_id(name) for name in names}
        self._real_ids = {id_: names[name] for name, id_ in ids_here.items() if id_ is not None}
        self._tokenizer = tokenizer

        spelled = sorted(self.control_tokens, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, spelled))) if spelled else None
        self.border_characters = frozenset(character for text in spelled for character in (text[0], text[-1]))

        bos = special_tokens.get("bos_token")
        bos_id = whole.token_to_id(bos) if bos else None
        if add_bos is None and bos_id is not None:
            add_bos = whole.encode("").ids[:1] == [bos_id]
        eos = special_tokens.get("eos_token")
        self.eos_id: int | None = whole.token_to_id(eos) if eos else None
        self.bos_ids: list[int] = [bos_id] if add_bos and bos_id is not None else []

        self._bytes, self.strips_leading_space = _bytes_per_id(whole, spec)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads `tokenizer.json` and what `tokenizer_config.json` and `special_tokens_map.json` say of special tokens.

        Raises `TokenizerError`.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{directory} has no tokenizer.json; save the model with a fast tokenizer (tokenizer.save_pretrained)."
            )
        settings = read_json(directory / "tokenizer_config.json")
        special: dict[str, str] = {}
        for source in (read_json(directory / "special_tokens_map.json"), settings):
            for name in _SPECIAL_NAMES:
                value = source.get(name)
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    special[name] = text
        spec = read_json(path)
        try:
            whole = HFTokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise TokenizerError(
                f"{path} is not a tokenizer that `tokenizers` can read ({error}); download the model again."
            ) from error
        _add_named(special, spec, whole)
        add_bos = settings.get("add_bos_token")
        return cls(
            spec,
            whole,
            special_tokens=special,
            add_bos=add_bos if isinstance(add_bos, bool) else None,
        )

    def alias(self, template_text: str) -> str:
        """`template_text` with each control token in it written as the alias that `encode` turns into its id."""
        if self._control_pattern is None:
            return template_text
        return self._control_pattern.sub(lambda match: self._aliases[match.group()], template_text)

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        """Ids of `text`, without BOS. Aliases become control tokens; nothing else in it can.

        A lone surrogate, which UTF-8 cannot hold, is encoded as U+FFFD. Raises `TooManyTokens` where there are surely
        more than `limit` ids and finding out how many would take long; below that the caller counts.
        """
        if limit is not None and len(text) > _SURE_CHARACTERS * limit:
            beginning = len(self._encode(text[: _SURE_CHARACTERS * limit]))
            if beginning > limit + _BORDER_TOKENS:
                raise TooManyTokens(beginning - _BORDER_TOKENS)
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        try:
            ids = self._ids(text)
        except (UnicodeEncodeError, TypeError):  # a lone surrogate: not a str that the Rust side can take
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._ids(text)
        real = self._real_ids
        if self._forbidden and not self._forbidden.isdisjoint(ids):
            return self._encode_apart(text)
        return [real.get(id_, id_) for id_ in ids]

    def _encode_apart(self, text: str) -> list[int]:
        """For models whose vocabulary lets plain text reach a control token (Unigram): its spellings are cut in two."""
        assert self._control_pattern is not None
        parts: list[str] = []
        start = 0
        for match in self._control_pattern.finditer(text):
            parts.append(text[start : match.start() + 1])
            start = match.start() + 1
        parts.append(text[start:])
        ids: list[int] = []
        for part in parts:
            ids += [self._real_ids.get(id_, id_) for id_ in self._ids(part) if id_ not in self._forbidden]
        return ids

    def _ids(self, text: str) -> list[int]:
        """The ids in use here. `encode` holds the interpreter's lock all the while, 0.2 s for 200 K tokens; a batch of
        one does not, but hands the text to another thread."""
        if len(text) <= _LONG_CHARACTERS:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_text(self, text: str, *, limit: int | None = None) -> list[int]:
        """Ids of a plain prompt: text alone, after the model's BOS where it has one. `limit` as for `encode`."""
        return self.bos_ids + self.encode(text, limit=limit)

    def decode_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for. None for special tokens and for ids that the tokenizer does not have."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def is_control(self, token_id: int) -> bool:
        """Whether a token is a control token: text after it begins anew."""
        return token_id in self._control_ids


def _add_named(special: dict[str, str], spec: dict[str, Any], whole: HFTokenizer) -> None:
    """Beginning and end are special where the directory names them, though `spec` may not say so; unless it is a word
    that it names there, as some do.
    """
    added = spec["added_tokens"] = list(spec.get("added_tokens") or [])
    known = {token["content"] for token in added}
    for text in {special[name]: None for name in ("bos_token", "eos_token") if special.get(name)}:
        id_ = whole.token_to_id(text)
        is_word = not _is_markup(text) and id_ in whole.encode(text, add_special_tokens=False).ids
        if text in known or id_ is None or is_word:
            continue
        marks = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": id_, "content": text, "special": True, **marks})
        whole.add_special_tokens([AddedToken(text, normalized=False)])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the model directory; empty where the file is absent. Raises `TokenizerError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON ({error}); download the model again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is not a JSON object; download the model again.")
    return value


def _is_markup(text: str) -> bool:
    """Whether a token is something between brackets, rather than a bracket."""
    return len(text) > 2 and text.startswith(_MARKUP_OPENS) and text.endswith(_MARKUP_CLOSES)


def _bytes_per_id(whole: HFTokenizer, spec: dict[str, Any]) -> tuple[list[bytes], bool]:
    """The bytes of every id, and whether one space at the very beginning of a text belongs to the tokenizer, not the
    text.

    `tokenizers` decodes lists of tokens by a chain of decoders. Per token that comes to one of two: byte-level
    (each character of a token stands for a byte, GPT-2's table), or SentencePiece's (`▁` is a space, `<0x0A>` a byte).
    """
    decoder = spec.get("decoder") or {}
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    special_ids = {token["id"] for token in spec.get("added_tokens") or [] if token["special"]}
    vocab = whole.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)

    if "ByteLevel" in kinds:
        byte_of = _byte_level_table()
        for token, id_ in vocab.items():
            if id_ not in special_ids:
                known = all(character in byte_of for character in token)
                table[id_] = bytes(byte_of[character] for character in token) if known else token.encode()
        return table, False

    if not {"Metaspace", "Replace"} & set(kinds) or not set(kinds) <= {
        "Metaspace",
        "Replace",
        "ByteFallback",
        "Fuse",
        "Strip",
    }:
        raise TokenizerError(
            f"the tokenizer's decoder ({', '.join(map(str, kinds))}) is not byte-level or SentencePiece-like; "
            "serve a model of the Llama, Mistral or Qwen families."
        )
    replacements = []
    strips = False
    for step in steps:
        if step["type"] == "Replace":
            if "String" not in step["pattern"]:
                raise TokenizerError(
                    "the tokenizer's decoder replaces a regular expression; serve one whose decoder replaces a text."
                )
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            replacements.append((step.get("replacement", "▁"), " "))
            strips = step.get("prepend_scheme", "always") != "never"
        elif step["type"] == "Strip":
            strips = step.get("content") == " " and step.get("start", 0) > 0
    fallback = "ByteFallback" in kinds
    for token, id_ in vocab.items():
        if id_ in special_ids:
            continue
        byte = _BYTE_FALLBACK.fullmatch(token) if fallback else None
        if byte:
            table[id_] = bytes([int(byte.group(1), 16)])
            continue
        for old, new in replacements:
            token = token.replace(old, new)
        table[id_] = token.encode()
    return table, strips


def _byte_level_table() -> dict[str, int]:
    """GPT-2's map between bytes and printable characters (`bytes_to_unicode` in its encoder.py), character to byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
