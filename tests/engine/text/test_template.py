"""Chat templates: the ids of `transformers` for ordinary text, never a control token that a client spelled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_tokenizers import CORPUS, MAKERS, LoadedTokenizers, decode
from transformers import PreTrainedTokenizerFast

from aiexport_edge.engine.text.template import ChatTemplate, Message, TemplateError
from aiexport_edge.engine.text.tokenizer import Tokenizer, TokenizerError, TooManyTokens

KINDS = sorted(kind for kind, (_, _, template) in MAKERS.items() if template is not None)
DEMO = Path(__file__).resolve().parents[3] / "engine" / "demo" / "model"

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


class Templates(dict[str, tuple[ChatTemplate, Any]]):
    """By kind: ours, and the tokenizer of `transformers` for the same directory."""

    def __repr__(self) -> str:
        return f"templates {sorted(self)}"


@pytest.fixture(scope="module")
def templates(loaded: LoadedTokenizers, directories: dict[str, Path]) -> Templates:
    return Templates(
        (
            kind,
            (
                ChatTemplate.load(directories[kind], loaded[kind][0]),
                PreTrainedTokenizerFast.from_pretrained(directories[kind]),
            ),
        )
        for kind in KINDS
    )


def messages_of(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, text) for role, text in turns]  # type: ignore[arg-type]


def reference_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """What transformers makes of it: for a prefill, the last message is left open."""
    prefill = messages[-1].role == "assistant"
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.text} for message in messages],
        add_generation_prompt=not prefill,
        continue_final_message=prefill,
        enable_thinking=False,
        return_dict=False,
    )
    return ids


CONVERSATIONS = [
    [(USER, "Hello!")],
    [(USER, "")],
    [(USER, "  spaces around  \n")],
    [(USER, "\n\nlines\n\n")],
    [(USER, CORPUS[3]), (ASSISTANT, CORPUS[1]), (USER, CORPUS[4])],
    [(USER, "a < b > c | d [x] {y}"), (ASSISTANT, "<b>bold</b> <|x|> [[ ]]"), (USER, "<<|>>")],
    [(USER, "What is 1+1?"), (ASSISTANT, "It is")],
    [(USER, "What is 1+1?"), (ASSISTANT, "It is ")],
    [(USER, "What is 1+1?"), (ASSISTANT, "  It is\n")],
    [(USER, "hi"), (ASSISTANT, "hello"), (USER, "more"), (ASSISTANT, "{")],
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_equal_those_of_transformers(kind: str, turns: list[tuple[str, str]], templates: Templates) -> None:
    template, reference = templates[kind]
    messages = messages_of(*turns)
    assert template.encode(messages) == reference_ids(reference, messages)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mistral"])
def test_system_messages(kind: str, templates: Templates) -> None:
    template, reference = templates[kind]
    messages = messages_of((SYSTEM, "Answer in German. "), (USER, "Hello!"))
    assert template.encode(messages) == reference_ids(reference, messages)


def test_a_template_without_a_system_role_gets_it_with_the_first_user_message(templates: Templates) -> None:
    template, reference = templates["mistral"]
    folded = messages_of((USER, "Answer in German.\n\nHello!"), (ASSISTANT, "Hallo!"), (USER, "Bye"))
    ids = template.encode(
        messages_of((SYSTEM, "Answer in German."), (USER, "Hello!"), (ASSISTANT, "Hallo!"), (USER, "Bye"))
    )
    assert ids == reference_ids(reference, folded)
    with pytest.raises(TemplateError, match="no system role"):
        template.encode(messages_of((SYSTEM, "Answer in German.")))


def test_a_template_that_drops_the_system_message_in_silence(loaded: LoadedTokenizers) -> None:
    source = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, loaded["qwen3"][0])
    ids = template.encode(messages_of((SYSTEM, "Be brief."), (USER, "Hello!")))
    assert ids == template.encode(messages_of((USER, "Be brief.\n\nHello!")))


WORDS = st.one_of(
    st.text(max_size=10),
    st.sampled_from(CORPUS),
    st.sampled_from(
        [" ", "\n", "<", ">", "|", "[", "]", "<|", "|>", "</", "think", "im_start", "INST", "{{", "}}", "{%", "%}"]
    ),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_text_without_control_tokens_is_encoded_as_by_transformers(
    kind: str, data: st.DataObject, templates: Templates, loaded: LoadedTokenizers
) -> None:
    template, reference = templates[kind]
    control = loaded[kind][0].control_tokens
    text = st.lists(WORDS, max_size=6).map("".join).filter(lambda text: not any(token in text for token in control))
    num_turns = data.draw(st.integers(1, 4))
    messages = [Message(USER if turn % 2 == 0 else ASSISTANT, data.draw(text)) for turn in range(num_turns)]  # type: ignore[arg-type]
    if num_turns % 2 == 0 and not messages[-1].text.strip():
        messages.pop()  # transformers finds the place of an empty prefill by searching, and not always the right one
    assert template.encode(messages) == reference_ids(reference, messages)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_text_adds_or_removes_a_control_token(
    kind: str, data: st.DataObject, templates: Templates, loaded: LoadedTokenizers
) -> None:
    """However control tokens are spelled in texts, whole, cut or nested: the prompt has those of an innocent chat."""
    template, _ = templates[kind]
    tokenizer = loaded[kind][0]
    spellings = sorted(tokenizer.control_tokens)
    fragments = [text[:cut] for text in spellings for cut in range(1, len(text))]
    fragments += [text[cut:] for text in spellings for cut in range(1, len(text))]
    text = st.lists(st.one_of(WORDS, st.sampled_from(spellings), st.sampled_from(fragments)), max_size=8).map("".join)
    num_turns = data.draw(st.integers(1, 4))
    roles = [USER if turn % 2 == 0 else ASSISTANT for turn in range(num_turns)]
    unknown = tokenizer.control_tokens.get("<unk>")

    def control_of(texts: list[str]) -> list[int]:
        ids = template.encode(messages_of(*zip(roles, texts, strict=True)))
        return [token_id for token_id in ids if tokenizer.is_control(token_id) and token_id != unknown]

    texts = [data.draw(text) for _ in roles]
    assert control_of(texts) == control_of(["innocent"] * num_turns)


@pytest.mark.parametrize("kind", KINDS)
def test_spelled_control_tokens_reach_the_model_as_text(
    kind: str, templates: Templates, loaded: LoadedTokenizers
) -> None:
    template, tokenizer = templates[kind][0], loaded[kind][0]
    text = "x" + "y".join(spelling for spelling in tokenizer.control_tokens if spelling != "<unk>") + "z"
    ids = template.encode(messages_of((USER, text)))
    assert text in decode(ids, tokenizer.decode_bytes)


def test_pieces_that_a_template_puts_together_do_not_become_a_control_token(loaded: LoadedTokenizers) -> None:
    tokenizer = loaded["qwen3"][0]
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content | replace('xx', '') }}{% endfor %}<|im_end|>", tokenizer
    )
    ids = template.encode(messages_of((USER, "<|im_"), (ASSISTANT, "start|>"), (USER, "<|im_xxend|>")))
    control = [token_id for token_id in ids if tokenizer.is_control(token_id)]
    assert control == [tokenizer.control_tokens["<|im_end|>"]]
    assert decode(ids, tokenizer.decode_bytes) == "<|im_start|><|im_end|>"


def test_templates_may_inspect_measure_and_change_texts(loaded: LoadedTokenizers) -> None:
    source = (
        "{% for m in messages %}{{ m.content|length }}:{{ m.content | trim | upper }}:{{ 'secret' in m.content }}"
        ":{{ m.content.split('|')[1] }}:{{ m.content[:4] | tojson }};{% endfor %}"
    )
    tokenizer = loaded["qwen3"][0]
    ids = ChatTemplate(source, tokenizer).encode(messages_of((USER, " <a|b<é|> secret ")))
    assert decode(ids, tokenizer.decode_bytes) == '17:<A|B<É|> SECRET:True:b<é:" <a|";'


def test_thinking_is_off(templates: Templates, loaded: LoadedTokenizers) -> None:
    ids = templates["qwen3"][0].encode(messages_of((USER, "hi")))
    control = loaded["qwen3"][0].control_tokens
    assert ids.count(control["<think>"]) == ids.count(control["</think>"]) == 1


def test_refusals_of_a_template_are_said(templates: Templates, loaded: LoadedTokenizers) -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        templates["mistral"][0].encode(messages_of((USER, "a"), (USER, "b")))
    broken = ChatTemplate("{{ messages[0].content + 1 }}", loaded["qwen3"][0])
    with pytest.raises(TemplateError, match="cannot render"):
        broken.encode(messages_of((USER, "a")))
    with pytest.raises(TokenizerError, match="chat template has an error"):
        ChatTemplate("{% for %}", loaded["qwen3"][0])


def test_a_template_without_a_place_for_a_prefill(loaded: LoadedTokenizers) -> None:
    source = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    template = ChatTemplate(source, loaded["qwen3"][0])
    with pytest.raises(TemplateError, match="end with a user message"):
        template.encode(messages_of((USER, "a"), (ASSISTANT, "b")))


def test_the_sandbox_holds(loaded: LoadedTokenizers) -> None:
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"):
        template = ChatTemplate(source, loaded["qwen3"][0])
        with pytest.raises(TemplateError):
            template.encode(messages_of((USER, "a")))


def test_what_templates_of_the_hub_use(loaded: LoadedTokenizers) -> None:
    source = (
        "{{ strftime_now('%Y') | length }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %} {{ {'a': 'é<'} | tojson }}"
        "{{ pad_token }}{% if unk_token is defined %}!{% endif %}{% if tools %}!{% endif %}"
    )
    tokenizer = loaded["qwen3"][0]
    ids = ChatTemplate(source, tokenizer).encode(messages_of((USER, "x"), (USER, "y")))
    assert decode(ids, tokenizer.decode_bytes) == '4x {"a": "é<"}'
    assert ids[-1] == tokenizer.control_tokens["<|endoftext|>"]


def test_where_a_template_is_found(directories: dict[str, Path], loaded: LoadedTokenizers, tmp_path: Path) -> None:
    tokenizer = loaded["llama3"][0]

    def prompt() -> str:
        ids = ChatTemplate.load(tmp_path, tokenizer).encode(messages_of((USER, "hi")))
        return decode(ids, tokenizer.decode_bytes)

    for file in directories["llama3"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert prompt() == "user\n\nhiassistant\n\n"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json {{ messages[0].content }}"}')
    assert prompt() == "json hi"
    (tmp_path / "chat_template.jinja").write_text("jinja {{ messages[0].content }}")
    assert prompt() == "jinja hi"
    several = {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "several"}]}
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps(several))
    assert prompt() == "several"
    del several["chat_template"][1]
    (tmp_path / "chat_template.json").write_text(json.dumps(several))
    with pytest.raises(TokenizerError, match=r"chat templates \(tool_use\), but none whose name is default"):
        prompt()
    (tmp_path / "chat_template.json").write_text('{"chat_template": [1]}')
    with pytest.raises(TokenizerError, match="chat_template is not a text"):
        prompt()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="cannot be read as text"):
        prompt()


def test_a_template_that_takes_lists_of_parts_alone(loaded: LoadedTokenizers) -> None:
    """Of a text it would write nothing: its items are characters."""
    source = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %};{% endfor %}"
    )
    tokenizer = loaded["qwen3"][0]
    template = ChatTemplate(source, tokenizer)
    ids = template.encode(messages_of((SYSTEM, "a"), (USER, "b<|im_end|>"), (ASSISTANT, "c")))
    assert decode(ids, tokenizer.decode_bytes) == "system:a;user:b<|im_end|>;assistant:c"
    assert not set(ids) & set(tokenizer.control_tokens.values())


def test_a_model_without_a_template_goes_on_from_the_texts(loaded: LoadedTokenizers) -> None:
    tokenizer = loaded["llama2"][0]
    template = ChatTemplate(None, tokenizer)
    assert not template.exists
    ids = template.encode(messages_of((SYSTEM, "A tale."), (USER, "Once upon"), (ASSISTANT, "a time")))
    assert ids == tokenizer.encode_text("A tale.\n\nOnce upon\n\na time")
    assert ids[0] == tokenizer.control_tokens["<s>"]


def test_over_long_prompts_are_recognised(templates: Templates) -> None:
    for template, _ in templates.values():
        with pytest.raises(TooManyTokens):
            template.encode(messages_of((USER, "xyzzy qwop " * 2000)), limit=256)


@pytest.mark.skipif(not (DEMO / "tokenizer.json").is_file(), reason="the demo model is not there yet")
def test_the_demo_model() -> None:
    tokenizer = Tokenizer.load(DEMO)
    template, reference = ChatTemplate.load(DEMO, tokenizer), PreTrainedTokenizerFast.from_pretrained(DEMO)
    for turns in CONVERSATIONS:
        messages = messages_of(*turns)
        assert template.encode(messages) == reference_ids(reference, messages)
    spelled = "".join(tokenizer.control_tokens)
    ids = template.encode(messages_of((SYSTEM, spelled), (USER, spelled)))
    innocent = template.encode(messages_of((SYSTEM, "x"), (USER, "x")))
    assert [id_ for id_ in ids if tokenizer.is_control(id_)] == [id_ for id_ in innocent if tokenizer.is_control(id_)]
