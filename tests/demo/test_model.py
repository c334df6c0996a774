"""The committed demo model: what it promises, its size, its template, and the determinism of its data."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from aiexport_edge.engine.demo import MODEL_DIR, dataset, evaluate, stories, tokenizer, train  # noqa: E402
from aiexport_edge.engine.demo.network import Network, Shape  # noqa: E402


@cache
def model() -> evaluate.Model:
    return evaluate.Model(MODEL_DIR)


def ask(text: str, *, temperature: float = 0.0, system: str = "") -> str:
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    return model().answer([[*messages, {"role": "user", "content": text}]], temperature)[0]


def test_size() -> None:
    assert sum(p.stat().st_size for p in MODEL_DIR.rglob("*")) <= 16_000_000
    assert sum(p.stat().st_size for p in Path(evaluate.__file__).parent.rglob("*") if p.is_file()) <= 16_000_000


def test_files_and_configuration() -> None:
    names = {p.name for p in MODEL_DIR.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "LICENSE",
        "README.md",
    }  # fmt: skip
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["architectures"] in (["Qwen3ForCausalLM"], ["Qwen3VLForConditionalGeneration"])
    assert config["tie_word_embeddings"] is True
    decoder = config.get("text_config", config)
    assert decoder["head_dim"] == 64
    assert decoder["max_position_embeddings"] >= 4096
    assert decoder["tie_word_embeddings"] is True
    assert ("vision_config" in config) == ("preprocessor_config.json" in names)
    tok = model().tokenizer
    ends = json.loads((MODEL_DIR / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tok.convert_tokens_to_ids("<|im_end|>"), tok.convert_tokens_to_ids("<|endoftext|>")]
    assert decoder["vocab_size"] == len(tok) == tokenizer.VOCABULARY


def test_special_tokens_are_single_and_special() -> None:
    tok = model().tokenizer
    for token in tokenizer.SPECIAL:
        ids = tok.encode(token, add_special_tokens=False)
        assert len(ids) == 1
        assert tok.decode(ids, skip_special_tokens=True) == ""
    for token in tokenizer.MARKS:
        ids = tok.encode(token, add_special_tokens=False)
        assert len(ids) == 1
        assert tok.decode(ids, skip_special_tokens=True) == token


TEXTS = [
    "plain",
    " two  spaces\n\n\ttab ",
    "naïve e\u0301 e\u0301\u0301",
    "你好 мир 🙂👩‍👩‍👧",
    "\x00\x7f\u200b\ufeff",
    "1234567890",
    "a\r\nb",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(text: str) -> None:
    tok = model().tokenizer
    assert tok.decode(tok.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False) == text


def test_digits_stand_alone() -> None:
    tok = model().tokenizer
    assert len(tok.encode("12345", add_special_tokens=False)) == 5


def test_template() -> None:
    tok = model().tokenizer
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi "},
    ]
    text = tok.apply_chat_template(talk, tokenize=False)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\nHi <|im_end|>\n")
    text = tok.apply_chat_template(talk[1:2], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    text = tok.apply_chat_template(talk, tokenize=False, continue_final_message=True)
    assert text.rstrip().endswith("<|im_start|>assistant\nHi")
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}
    ]
    text = tok.apply_chat_template(parts, tokenize=False)
    assert text == "<|im_start|>user\na<|vision_start|><|image_pad|><|vision_end|>b<|im_end|>\n"
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
    text = tok.apply_chat_template(talk[:2], tools=[tool], tokenize=False)
    assert "get_weather" in text
    assert text.startswith("<|im_start|>system\nBe kind.\n\n# Tools")


def test_training_lays_text_out_as_the_template_does() -> None:
    tok = model().tokenizer
    for messages in itertools.islice(dataset.stream(11, []), 50):
        ids, own = train.encode(tok.backend_tokenizer, messages)
        assert ids == tok.encode(tok.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        assert tok.decode([i for i, o in zip(ids, own, strict=True) if o]) == "".join(s + "<|im_end|>" for s in said)


def test_network_is_transformers_qwen3(tmp_path: Path) -> None:
    import transformers

    ours = Network(Shape(layers=2), seed=3)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(p.add(0.05 * torch.randn_like(p)).bfloat16())
    ours.save(tmp_path, 0, 2, 0)
    auto: Any = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.eval()
    ids = torch.randint(0, 2048, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        a = ours(ids, mask, torch.arange(80)).view(2, 40, -1)
        b = theirs(ids).logits
    torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def test_data_are_deterministic() -> None:
    def some(seed: int) -> list[Any]:
        return list(itertools.islice(dataset.stream(seed, ["A sentence."], long_share=0.1), 300))

    assert some(5) == some(5)
    assert some(5) != some(6)


def test_held_out_sums_are_not_in_the_data() -> None:
    import re

    from aiexport_edge.engine.demo import arithmetic

    for messages in itertools.islice(dataset.stream(12, []), 3000):
        for message in messages:
            if message["role"] == "assistant":
                for a, b in re.findall(r"(\d+) \+ (\d+) =", message["content"]):
                    assert not arithmetic.held_out(int(a), int(b))


def test_evaluation_questions_are_not_in_the_data() -> None:
    asked = {q.lower().rstrip(".?!") for q, _ in evaluate.PRODUCT} | {q.lower().rstrip(".?!") for q in evaluate.UNKNOWN}
    for messages in itertools.islice(dataset.stream(13, []), 20000):
        for message in messages:
            if message["role"] == "user":
                assert message["content"].lower().rstrip(".?!") not in asked


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_identity(temperature: float) -> None:
    torch.manual_seed(5)
    assert "demo model of AI Export Edge" in ask("What are you?", temperature=temperature)


def test_product() -> None:
    assert "[[models]]" in ask("How do I serve a real model?")
    assert "aiexport-edge keys create" in ask("How do I make an API key?")
    assert "/v2/messages/stream" in ask("How do I stream an answer?")
    assert "AI Export Edge" in ask("Who made you?")
    assert "Hello" in ask("Hello!", system="You are a helpful assistant.")


SUMS = [("What is 3 + 4?", "7"), ("add 12 and 7", "19"), ("7 plus 5", "12"), ("What is 38 + 45?", "83")]


@pytest.mark.parametrize(("question", "result"), SUMS)
def test_sum(question: str, result: str) -> None:
    assert ask(question).rstrip(".").endswith(f" {result}")


def test_json() -> None:
    assert list(json.loads(ask("Reply in JSON with name and age of a cat"))) == ["name", "age"]
    assert list(json.loads(ask("Give me a JSON object with keys city and country"))) == ["city", "country"]


def test_story() -> None:
    text = ask("Tell me a story about a fox named Ruby.")
    assert "Ruby" in text
    assert "fox" in text
    assert text.endswith(stories.ENDING)
    assert len(text.split()) > 50


def test_repeats() -> None:
    assert ask("Repeat after me: banana") == "banana"
    assert ask("Say hello").lower().startswith("hello")


def test_says_that_it_does_not_know() -> None:
    assert "tiny demonstration model" in ask("What is the capital of France?")


def test_knows_a_name_some_turns_later() -> None:
    talk: Any = [
        {"role": "user", "content": "My name is Anna."},
        {"role": "assistant", "content": "Nice to meet you, Anna! How can I help you?"},
        {"role": "user", "content": "What is my name?"},
    ]
    assert "Anna" in model().answer([talk], 0.0)[0]
