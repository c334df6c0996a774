"""A reply's text: however its ids are dealt out, and wherever an earlier attempt stopped."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from aiexport_edge.engine.text.reply import ReplyText

END = 1000
TOKENS = [b"a", b"b", b"ab", b"\n", b"\xc3", b"\xa9", b"\xe2\x82", b"\xac", b"\xff", b"", b" a"]


def decode_bytes(token_id: int) -> bytes:
    return TOKENS[token_id] if token_id < len(TOKENS) else b"<|end|>"


def run(
    ids: list[int], cuts: list[int], stops: list[str], *, forced: int = 0, sent: int = 0
) -> tuple[str, int, str | None]:
    """Feeds `ids` cut at `cuts` (the first `forced` as one replay); the text sent, ids taken and the stop sequence."""
    reply = ReplyText(decode_bytes, strip_space=False, stop_ids={END}, stops=stops, sent_bytes=sent)
    text, taken = "", 0
    borders = sorted({forced, len(ids), *(cut for cut in cuts if forced < cut < len(ids))})
    start = 0
    for end in borders:
        if ids[start:end]:
            piece = reply.feed(ids[start:end])
            text, taken = text + piece.text, taken + piece.num_ids
            if piece.stop is not None or taken < end or ids[taken - 1] == END:
                break
        start = end
    else:
        piece = reply.flush()
        text += piece.text
    if piece.stop is None and taken and ids[taken - 1] == END:
        piece = reply.flush()
        text += piece.text
    assert reply.emitted_bytes == max(sent, sent + len(text.encode()))
    return text, taken, piece.stop


IDS = st.lists(st.one_of(st.integers(0, len(TOKENS) - 1), st.just(END)), max_size=25)
STOPS = st.lists(st.sampled_from(["ab", "b\n", "é", "€a", "aab", " a"]), max_size=3)
CUTS = st.lists(st.integers(1, 25), max_size=6)


@settings(max_examples=600, deadline=None)
@given(ids=IDS, stops=STOPS, cuts=CUTS)
def test_the_text_does_not_depend_on_how_ids_are_dealt_out(ids: list[int], stops: list[str], cuts: list[int]) -> None:
    assert run(ids, cuts, stops) == run(ids, list(range(1, 26)), stops)


@settings(max_examples=600, deadline=None)
@given(ids=IDS, stops=STOPS, cuts=CUTS, data=st.data())
def test_a_resume_sends_the_rest(ids: list[int], stops: list[str], cuts: list[int], data: st.DataObject) -> None:
    whole, taken, stop = run(ids, cuts, stops)
    forced = data.draw(st.integers(0, taken))
    received = data.draw(st.integers(0, len(whole)))
    rest, *others = run(ids, cuts, stops, forced=forced, sent=len(whole[:received].encode()))
    assert rest == whole[received:]
    assert others == [taken, stop]


def test_an_end_of_turn_counts_and_is_no_text() -> None:
    reply = ReplyText(decode_bytes, strip_space=False, stop_ids={END}, stops=[])
    piece = reply.feed([0, 1, END, 0])
    assert (piece.text, piece.num_ids, piece.stop) == ("ab", 3, None)


def test_overshoot_past_a_stop_sequence_is_not_the_replys() -> None:
    reply = ReplyText(decode_bytes, strip_space=False, stop_ids={END}, stops=["b"])
    piece = reply.feed([0, 2, 0, 0])
    assert (piece.text, piece.num_ids, piece.stop) == ("aa", 2, "b")
    assert reply.emitted_bytes == 2


def test_the_space_that_sentencepiece_puts_first() -> None:
    assert ReplyText(decode_bytes, strip_space=True, stop_ids=(), stops=[]).feed([10, 10]).text == "a a"
