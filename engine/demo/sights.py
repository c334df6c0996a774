"""Conversations about simple pictures: what is asked, and the answer that names shape and color.

A message's content is a list of parts here, as the chat template takes it; a picture is a number into the list that
comes with the conversation. Answers name shape and color together, whichever of them was asked for.
"""

# ruff: noqa: E501

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TypedDict

from PIL import Image

from . import conversations, dataset
from .pictures import SHAPE_COLORS, SHAPES, Sight, picture
from .variation import Message, article, expand, sentence, typed


class Part(TypedDict, total=False):
    """Text or a picture."""

    type: str
    text: str
    image: int


class Seeing(TypedDict):
    """One message of a conversation with pictures."""

    role: str
    content: str | list[Part]


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation and the pictures in it, in their order."""

    messages: list[Seeing]
    pictures: list[Image.Image]


_IT = "{the picture|this picture|the image|this image|the photo|this drawing|the shape|the figure|the object|it|this}"
_HERE = "{the|this} {picture|picture|image|image|photo|drawing|figure}"
DESCRIBE = [
    f"What is {{in|on|shown in|shown on}} {_HERE}?", f"What's {{in|on}} {_HERE}?", f"What does {_HERE} show?", f"Describe {_HERE}.", f"Describe {_HERE} {{briefly|in a few words|in one sentence|for me}}.",
    f"What {{can|do}} you see{{ here| in {_HERE}|}}?", "What is this?", "What's this?", "What is that?", "What {is|was} drawn here?", "What is shown here?", f"Tell me what is in {_HERE}.", f"Tell me what {_HERE} shows.",
    f"Please {{describe|name|tell me}} what you see{{ in {_HERE}|}}.", f"Caption {_HERE}.", f"Write a caption for {_HERE}.", f"Name {{the|}} {{shape and color|color and shape|shape and its color|object}} in {_HERE}.", f"{{Can|Could}} you describe {_HERE}?",
    f"What {{shape and color|color and shape|colour and shape|shape and colour}} {{is|are}} {{this|it|shown|in {_HERE}|there|that}}?", f"Which {{shape and color|color and shape|object|figure}} {{is|are}} in {_HERE}?",
    f"Look at {_HERE}. What {{is it|do you see|is there}}?", "Describe this.", "Describe it", "What do we have here?", "{Explain|Identify} {what you see|the object|the shape|this picture|this image}.", f"What object is {{in|on}} {_HERE}?", f"What is {{depicted|visible|displayed|pictured}} {{here|in {_HERE}}}?",
    "Image?", "picture?", f"Say what is in {_HERE}.", "What am I looking at?", "What did I {draw|send you|paint|just send}?", "Which colored shape do you see?", "Answer in a few words: what is in the {image|picture}?", "What is the shape and what is its color?", "What shape is this and what color is it?",
    f"Tell me the {{shape and color|color and the shape|shape and the colour}}{{ of the object|}} in {_HERE}.",
]  # fmt: skip
COLOR = [
    f"{{What|Which}} {{color|colour}} is {_IT}?", f"{{What|Which}} {{color|colour}} does {_IT} have?", f"What is the {{color|colour}} of {_IT}?", "{What|Which} {color|colour}?", "{What|Which} {color|colour} is the $shape?", "{Color|Colour}?", "What is its {color|colour}?",
    f"Tell me the {{color|colour}}{{ of {_IT}|}}.", f"Name the {{color|colour}}{{ of {_IT}|}}.", "{What|Which} {color|colour} {do|can} you see{ here| in the picture|}?", "In {what|which} {color|colour} is it {drawn|painted}?", "{What|Which} {color|colour} is {used|shown} {here|in the {image|picture}}?", "What {color|colour} is the {shape|object|figure} in the {picture|image}?", "{What|Which} {color|colour} is that?",
]  # fmt: skip
SHAPE = [
    "{What|Which} shape is {it|this|that|shown|shown here|in the picture|in the image|in this image|in this picture|drawn here|the figure|the object}?", "{What|Which} {shape|form|figure} {do|can} you see{ here| in the picture|}?", "{What|Which} shape?", "Shape?", "{What|Which} {geometric|} {shape|figure} is {in|on} {the|this} {picture|image}?", "Name the shape{ in the picture| in the image|}.",
    "Tell me the shape{ of it| in the picture|}.", "What kind of shape is {this|it|that|in the {image|picture}}?", "What is the shape{ of the object| in the {image|picture}|}?", "What shape does {it|this|the object|the picture} {have|show}?", "Which geometric figure is this?", "What $color shape is {this|that|it|in the {picture|image}}?",
]  # fmt: skip
GROUND = [
    "What {color|colour} is the background?", "{What|Which} {color|colour} does the background have?", "What is the background?", "Which {color|colour} is behind {it|the shape|the $shape}?", "And the background?", "{What|Which} background {color|colour} {does it have|is it}?", "What is the {color|colour} of the background?",
]  # fmt: skip
IS_SHAPE = [
    "Is {it|this|that} $a?",
    "Is there $a in the {picture|image}?",
    "Do you see $a?",
    "Does the {picture|image} show $a?",
]
IS_COLOR = ["Is {it|this|the shape|the {picture|image}} $c?", "Is the $shape $c?"]
IN_JSON = [
    "{Reply|Answer|Respond} in JSON with {the |}{keys|fields|} $keys.", "Describe {the|this} {picture|image} {in|as} JSON with {the |}{keys|fields|} $keys.", "Give me a JSON object with {keys|fields|the keys|} $keys.", "What is in the {picture|image}? {Answer|Reply|Respond} in JSON with {keys|the keys|} $keys.",
    "{Return|Output} {only |}JSON{:| with} $keys{ of the {picture|image|shape}|}.", "JSON with $keys{, please|}.", "$keys as JSON", "What do you see? {Answer|Reply} {as|with} a JSON object with {the |}keys $keys.", "{Return|Write|Make|Create|Generate|Output|Produce} a JSON object {for|about|describing} {the|this} {picture|image} with $keys.",
]  # fmt: skip
PLAIN_JSON = [
    "Describe {the|this} {picture|image} in JSON.",
    "What is in the {picture|image}? {Answer|Reply} in JSON.",
    "{Picture|Image} as JSON",
    "Answer in JSON: what do you see?",
]
BOTH = [
    "What is in {these|the|both|the two} {pictures|images}?", "What do {these|the|the two} {pictures|images} show?", "Describe {these|the|both|the two} {pictures|images}.", "What do you see{ in {these|the} {pictures|images}|}?", "What are these?", "Tell me what is in {each|both} {picture|image|pictures|images}.", "{Describe|Name} {both|them|each of them}.", "Compare {these|the} {pictures|images}.", "What is the difference between {these|the} {pictures|images}?",
]  # fmt: skip
ONE_OF = [
    "What is in the $nth {picture|image}?",
    "What does the $nth {picture|image} show?",
    "Describe the $nth {picture|image}.",
    "And the $nth {one|picture|image}?",
    "{What|Which} {color|colour} is the $nth {one|picture|image|shape}?",
    "{What|Which} shape is {in |}the $nth {picture|image}?",
    "What is the $nth one?",
]
NOTHING = "I see no picture. Send one with your message, and I name the shape and the color in it."
ABLE = (
    ["{Can|Could|Do} you {see|understand|read|describe|recognize|look at} {pictures|images|photos}?", "{Do|Can} you {have eyes|see}?", "Are you able to see {pictures|images}?", "{What|Which} {pictures|images} {can you see|do you understand}?", "{Can|May} I {send|show|give} you {a picture|an image|pictures|images}?", "Do you support {images|pictures|vision}?"],
    "Yes: send a simple picture with your message, and I name the shape and the color in it, such as a red circle on white.",
)  # fmt: skip


def phrase(sight: Sight) -> str:
    """Such as "a red circle on white"."""
    return f"{article(f'{sight.color} {sight.shape}')} on {sight.background}"


def _about(rng: random.Random, sight: Sight) -> tuple[str, str]:
    """A question about one picture and its answer."""
    r = rng.random()
    it = f"{sight.color} {sight.shape}"
    if r < 0.43:
        return _ask(rng, DESCRIBE, sight), sentence(phrase(sight)) + "."
    if r < 0.57:
        return _ask(rng, COLOR, sight), f"The {sight.shape} is {sight.color}."
    if r < 0.71:
        return _ask(rng, SHAPE, sight), f"It is {article(it)}."
    if r < 0.77:
        return _ask(rng, GROUND, sight), f"The background is {sight.background}."
    if r < 0.82:
        true = rng.random() < 0.5
        if rng.random() < 0.5:
            other = sight.shape if true else rng.choice([s for s in SHAPES if s != sight.shape])
            question = _ask(rng, IS_SHAPE, sight).replace("$a", article(other))
        else:
            other = sight.color if true else rng.choice([c for c in SHAPE_COLORS if c != sight.color])
            question = _ask(rng, IS_COLOR, sight).replace("$c", other)
        return question, f"{'Yes' if true else 'No'}, it is {article(it)}."
    return _json(rng, sight)


def _ask(rng: random.Random, patterns: list[str], sight: Sight) -> str:
    return typed(rng, sentence(expand(rng, rng.choice(patterns), shape=sight.shape, color=sight.color)))


def _json(rng: random.Random, sight: Sight) -> tuple[str, str]:
    color = "colour" if rng.random() < 0.15 else "color"
    values = {"shape": sight.shape, color: sight.color, "background": sight.background}
    if rng.random() < 0.15:
        return typed(rng, expand(rng, rng.choice(PLAIN_JSON)), exact=True), json.dumps(
            {"shape": sight.shape, "color": sight.color, "background": sight.background}
        )
    keys = ["shape", color] if rng.random() < 0.65 else rng.sample(list(values), rng.choice((1, 2, 3)))
    if rng.random() < 0.5:
        keys.reverse()
    shown = " and ".join(keys) if len(keys) < 3 else ", ".join(keys[:-1]) + " and " + keys[-1]
    if rng.random() < 0.15:
        shown = ", ".join(keys)
    question = sentence(expand(rng, rng.choice(IN_JSON), keys=shown).replace("  ", " "))
    return typed(rng, question, exact=True), json.dumps({key: values[key] for key in keys})


def _content(rng: random.Random, numbers: list[int], text: str) -> list[Part]:
    images: list[Part] = [{"type": "image", "image": number} for number in numbers]
    if not text:
        return images
    said: Part = {"type": "text", "text": text}
    if len(images) == 2 and rng.random() < 0.15:
        return [images[0], said, images[1]]
    return [*images, said] if rng.random() < 0.65 else [said, *images]


def talk(rng: random.Random, sizes: list[tuple[int, int]], quotes: list[str], *, wide: float = 0.0) -> Talk:
    """A conversation with one or two pictures, of sizes (width, height) from these; ``wide`` is as for a picture."""
    shown = [picture(rng, rng.choice(sizes), wide=wide) for _ in range(1 + (rng.random() < 0.22))]
    images, sights = [image for image, _ in shown], [sight for _, sight in shown]
    messages: list[Seeing] = []
    if rng.random() < 0.12:
        messages.append({"role": "system", "content": expand(rng, rng.choice(conversations.SYSTEM))})

    def say(content: str | list[Part], answer: str) -> None:
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer})

    if len(sights) == 2:
        if rng.random() < 0.3:  # one after the other
            for number, sight in enumerate(sights):
                question, answer = _about(rng, sight)
                say(_content(rng, [number], question), answer)
            return Talk(messages, images)
        first, second = (phrase(sight) for sight in sights)
        if rng.random() < 0.6:
            question = typed(rng, expand(rng, rng.choice(BOTH)))
            say(_content(rng, [0, 1], question), f"The first picture shows {first}, the second {second}.")
        if len(messages) < 2 or rng.random() < 0.3:
            which = rng.randrange(2)
            pattern = rng.choice(ONE_OF)
            question = typed(rng, expand(rng, pattern, nth=("first", "second")[which]))
            say(
                question if len(messages) > 1 else _content(rng, [0, 1], question),
                sentence(phrase(sights[which])) + ".",
            )
        return Talk(messages, images)
    sight = sights[0]
    r = rng.random()
    if r < 0.05:  # a picture, and something else is asked
        other = dataset.segment(rng, quotes)
        say(_content(rng, [0], other[0][0]), other[0][1])
    elif r < 0.09:
        say(_content(rng, [0], ""), sentence(phrase(sight)) + ".")
    else:
        if rng.random() < 0.06:  # a picture later in the talk
            for user, answer in dataset.segment(rng, quotes)[:2]:
                say(user, answer)
        question, answer = _about(rng, sight)
        say(_content(rng, [0], question), answer)
        while rng.random() < 0.15:
            question, answer = _about(rng, sight)
            say(question, answer)
        if rng.random() < 0.05:
            for user, answer in dataset.segment(rng, quotes)[:2]:
                say(user, answer)
    return Talk(messages, images)


def blind(rng: random.Random) -> list[Message]:
    """Asked about a picture where there is none, or whether it can see."""
    if rng.random() < 0.4:
        asks, answer = ABLE
        return _turn(typed(rng, expand(rng, rng.choice(asks))), answer)
    sight = Sight(rng.choice(SHAPES), rng.choice(SHAPE_COLORS), "white", Image.new("L", (1, 1)))
    pattern = rng.choice([p for p in DESCRIBE if "mage" in p or "icture" in p])
    return _turn(_ask(rng, [pattern], sight), NOTHING)


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
