"""The model that all servers run: the shapes of Qwen3-0.6B with random weights, and a tokenizer of as many tokens.

    python -m benchmarks.peers.model DIRECTORY

Owns the directory's files. The tokenizer is the demo model's with made-up words behind its own. Special tokens have
zero embeddings, which are never the likeliest here: so a greedy reply ends by its length alone, on every server alike.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo" / "model"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SEED = 0
EOS = "<|im_end|>"

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def made_up_words() -> Iterator[str]:
    """Words of three syllables and more that follow a space ("Ġ" to a byte-level tokenizer)."""
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    for length in itertools.count(3):
        for word in itertools.product(syllables, repeat=length):
            yield "Ġ" + "".join(word)


def make_tokenizer(vocab_size: int) -> dict[str, Any]:
    """`tokenizer.json` with `vocab_size` tokens. No merge leads to the words: they are in replies, not in prompts."""
    tokenizer: dict[str, Any] = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    words = (word for word in made_up_words() if word not in vocabulary)
    for id_ in range(vocab_size):
        if id_ not in taken:
            vocabulary[next(words)] = id_
    return tokenizer


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    hidden, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    q_rows, kv_rows = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden)}
    for number in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def make_model(directory: Path) -> None:
    """Write everything; some seconds and 1.2 GB."""
    import torch
    from safetensors.torch import save_file

    tokenizer = make_tokenizer(CONFIG["vocab_size"])
    special = [token["id"] for token in tokenizer["added_tokens"]]
    eos = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == EOS)
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, shape in tensor_shapes().items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    tensors["model.embed_tokens.weight"][special] = 0

    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": 0}
    settings = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = CONFIG["max_position_embeddings"]
    for name, content in (
        ("config.json", config),
        ("generation_config.json", {"do_sample": False, "eos_token_id": eos, "pad_token_id": 0}),
        ("tokenizer_config.json", settings),
        ("tokenizer.json", tokenizer),
    ):
        (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.model", description="Makes the peers' model.")
    parser.add_argument("directory", type=Path)
    make_model(parser.parse_args().directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
