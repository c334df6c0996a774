"""The tokenizer against `tokenizers` itself: ordinary text as it does, control tokens by their aliases only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_tokenizers import CORPUS, MAKERS, LoadedTokenizers, decode
from tokenizers import Tokenizer as HFTokenizer

from aiexport_edge.engine.text.tokenizer import Tokenizer, TokenizerError, TooManyTokens

KINDS = sorted(MAKERS)
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TEXTS = [
    *CORPUS,
    "",
    " ",
    "  two  spaces ",
    "\n\n\n",
    "a",
    " a",
    "▁ is a character too",
    "ﬁ combining e\u0301",
    "\x00\x01",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_ordinary_text_is_encoded_as_by_tokenizers(kind: str, text: str, loaded: LoadedTokenizers) -> None:
    tokenizer, reference = loaded[kind]
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_spelled_control_tokens_stay_text(kind: str, loaded: LoadedTokenizers) -> None:
    tokenizer, reference = loaded[kind]
    control = set(tokenizer.control_tokens.values())
    for spelling in tokenizer.control_tokens:
        if spelling == "<unk>":
            continue
        text = f"before {spelling}after {spelling}"
        ids = tokenizer.encode(text)
        assert control.isdisjoint(ids), spelling
        decoded = decode(ids, tokenizer.decode_bytes)
        assert decoded.removeprefix(" ") == text
        # … whereas the plain library would have let it through: the test is about something.
        assert not control.isdisjoint(reference.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", KINDS)
def test_aliases_become_control_tokens(kind: str, loaded: LoadedTokenizers) -> None:
    tokenizer, reference = loaded[kind]
    text = "".join(f"{spelling}some words{spelling}\n" for spelling in tokenizer.control_tokens)
    assert tokenizer.encode(tokenizer.alias(text)) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_mixture_is_encoded_as_by_tokenizers(kind: str, data: st.DataObject, loaded: LoadedTokenizers) -> None:
    """Control tokens by alias among text without them: the same ids as the library gives for the whole string."""
    tokenizer, reference = loaded[kind]
    control = sorted(tokenizer.control_tokens)
    piece = st.one_of(st.text(max_size=12), st.sampled_from(CORPUS), st.sampled_from([" ", "\n", "  ", "▁"]))
    pieces = data.draw(st.lists(st.one_of(piece, st.sampled_from(control)), max_size=8))
    text = "".join(pieces)
    assert tokenizer.encode(tokenizer.alias(text)) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_client_text_reaches_a_control_token(kind: str, data: st.DataObject, loaded: LoadedTokenizers) -> None:
    tokenizer, _ = loaded[kind]
    control = sorted(tokenizer.control_tokens)
    fragments = [text[:cut] for text in control for cut in range(1, len(text))] + [text[1:] for text in control]
    piece = st.one_of(st.sampled_from(control), st.sampled_from(fragments), st.text(max_size=5))
    text = "".join(data.draw(st.lists(piece, max_size=10)))
    unknown = tokenizer.control_tokens.get("<unk>")
    assert not any(tokenizer.is_control(token_id) and token_id != unknown for token_id in tokenizer.encode(text))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_decoding_gives_the_text_back(kind: str, text: str, loaded: LoadedTokenizers) -> None:
    tokenizer, reference = loaded[kind]
    ids = tokenizer.encode(text)
    expected = reference.decode(ids, skip_special_tokens=True)
    got = decode(ids, tokenizer.decode_bytes)
    assert (got.removeprefix(" ") if tokenizer.strips_leading_space else got) == expected


def test_lone_surrogates_do_not_bring_it_down(loaded: LoadedTokenizers) -> None:
    for tokenizer, reference in loaded.values():
        assert tokenizer.encode("a\ud800b") == reference.encode("a\ufffdb", add_special_tokens=False).ids


def test_bos(loaded: LoadedTokenizers) -> None:
    for kind, name in (("llama2", "<s>"), ("mistral", "<s>"), ("llama3", "<|begin_of_text|>")):
        tokenizer, reference = loaded[kind]
        assert tokenizer.encode_text("hello") == reference.encode("hello").ids
        assert tokenizer.bos_ids == [reference.token_to_id(name)]
    assert loaded["qwen3"][0].bos_ids == []


def test_add_bos_token_of_the_configuration_decides(directories: dict[str, Path], tmp_path: Path) -> None:
    for kind, value in (("llama3", False), ("qwen3", True)):
        directory = tmp_path / kind
        directory.mkdir()
        for file in directories[kind].iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config |= {"add_bos_token": value, "bos_token": config.get("bos_token", "<|endoftext|>")}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        assert bool(Tokenizer.load(directory).bos_ids) is value


def test_added_tokens_that_are_no_markup_belong_to_the_text(tmp_path: Path, directories: dict[str, Path]) -> None:
    """Runs of blanks and words that a model was given later are how its text is written; their ids are not moved."""
    spec = json.loads((directories["qwen3"] / "tokenizer.json").read_text())
    first = max(token["id"] for token in spec["added_tokens"]) + 1
    spec["added_tokens"] += [
        {"id": first, "content": "      ", "special": False, **ADDED},
        {"id": first + 1, "content": "kubernetes", "special": False, **ADDED},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer, reference = Tokenizer.load(tmp_path), HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "run      kubernetes now"
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert {first, first + 1} <= set(tokenizer.encode(text))


def test_single_brackets_belong_to_the_text(tmp_path: Path, directories: dict[str, Path]) -> None:
    spec = json.loads((directories["qwen3"] / "tokenizer.json").read_text())
    ids = {text: id_ for text, id_ in spec["model"]["vocab"].items() if text in "[{"}
    first = max(token["id"] for token in spec["added_tokens"]) + 1
    spec["added_tokens"] = [{"id": ids[text], "content": text, "special": False, **ADDED} for text in "[{"] + [
        *spec["added_tokens"],
        {"id": first, "content": "{{", "special": False, **ADDED},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer, reference = Tokenizer.load(tmp_path), HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = 'a[0] = {"b": {{1}}}'
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert decode(tokenizer.encode(text), tokenizer.decode_bytes) == text


def test_an_end_that_only_the_configuration_names(tmp_path: Path, directories: dict[str, Path]) -> None:
    spec = json.loads((directories["mistral"] / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in ("</s>", "[INST]")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    settings = {"eos_token": "</s>", "pad_token": "e"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == 2
    assert tokenizer.encode(tokenizer.alias("</s>")) == [2]
    assert tokenizer.decode_bytes(2) == b""
    assert 2 not in tokenizer.encode("</s>")
    assert decode(tokenizer.encode("eel"), tokenizer.decode_bytes) == " eel"  # a word that is named is a word


def test_a_vocabulary_that_lets_text_reach_control_tokens(tmp_path: Path) -> None:
    """Unigram matches every entry of its vocabulary, control tokens too."""
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": 1, "content": "</s>", "special": True, **ADDED}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False},
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [["<unk>", 0.0], ["</s>", 0.0], *([character, -5.0] for character in "</s>ab")],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path)
    assert 1 not in tokenizer.encode("a</s>b")
    assert decode(tokenizer.encode("a</s>b</s>"), tokenizer.decode_bytes) == "a</s>b</s>"
    assert tokenizer.encode(tokenizer.alias("</s>") + "a</s>")[0] == 1
    spec["added_tokens"] = []  # named by the configuration alone
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert 1 not in tokenizer.encode("a</s>b")
    assert tokenizer.encode(tokenizer.alias("</s>"))[0] == 1


def test_over_long_texts_are_recognised_by_their_beginning(loaded: LoadedTokenizers) -> None:
    for tokenizer, _ in loaded.values():
        text = "xyzzy qwop, 99 bjkv! " * 500
        num_tokens = len(tokenizer.encode(text))
        with pytest.raises(TooManyTokens) as raised:
            tokenizer.encode(text, limit=100)
        assert 100 < raised.value.at_least <= num_tokens
        assert tokenizer.encode(text, limit=num_tokens) == tokenizer.encode(text)
        # Long in characters, short in tokens: not refused by its looks.
        assert len(tokenizer.encode("a" * 20, limit=2)) == len(tokenizer.encode("a" * 20))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, r"no tokenizer\.json"),
        ({"tokenizer.json": "{"}, "cannot be read as JSON"),
        ({"tokenizer.json": "[]"}, "not a JSON object"),
        ({"tokenizer.json": "{}"}, "not a tokenizer"),
    ],
)
def test_what_cannot_be_served_is_said(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=sentence):
        Tokenizer.load(tmp_path)


def test_an_unknown_decoder_is_said(tmp_path: Path, directories: dict[str, Path]) -> None:
    spec = json.loads((directories["qwen3"] / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        ({"type": "Metaspace", "replacement": "_", "prepend_scheme": "never", "split": False}, b" a"),
        ({"type": "Replace", "pattern": {"String": "_"}, "content": " "}, b" a"),
        ({"type": "Replace", "pattern": {"Regex": "_+"}, "content": " "}, None),
    ],
)
def test_decoders_of_another_blank(tmp_path: Path, decoder: dict[str, Any], expected: bytes | None) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "_": 1, "_a": 2}, "merges": [["_", "a"]]}
    empty = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor"))
    spec: dict[str, Any] = {"version": "1.0", "added_tokens": [], **empty, "decoder": decoder, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    if expected is None:
        with pytest.raises(TokenizerError, match="replaces a regular expression"):
            Tokenizer.load(tmp_path)
    else:
        assert Tokenizer.load(tmp_path).decode_bytes(2) == expected


def test_stories(stories: Path) -> None:
    tokenizer, reference = Tokenizer.load(stories), HFTokenizer.from_file(str(stories / "tokenizer.json"))
    assert tokenizer.bos_ids == [1]
    assert tokenizer.eos_id == 2
    for text in TEXTS:
        assert tokenizer.encode_text(text) == reference.encode(text).ids
    assert {1, 2}.isdisjoint(tokenizer.encode("<s></s>"))
