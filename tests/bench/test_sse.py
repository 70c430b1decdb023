from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ossquant.bench.sse import Event, events

RECORDED = (
    b': ping\r\n\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{"b": 2}\n\nid: 7\n\n'
    b"data: one\ndata: two\n\ndata: \xc3\xa4\n\ndata: [DONE]\n\n"
)
DATA = [b'{"a": 1}', b'{"b": 2}', b"one\ntwo", "ä".encode(), b"[DONE]"]


@given(st.lists(st.integers(0, len(RECORDED)), max_size=20))
def test_events_do_not_depend_on_how_the_socket_cuts_them(cuts: list[int]) -> None:
    """The same bytes are the same events, however they come; comments and other fields are none."""
    places = [0, *sorted(cuts), len(RECORDED)]
    pieces = [(float(n), RECORDED[a:b]) for n, (a, b) in enumerate(pairwise(places))]
    assert [event.data for event in events(pieces)] == DATA


def test_an_event_is_there_when_its_last_byte_is() -> None:
    """An event that comes in two pieces has the second one's time; two in one piece share theirs."""
    pieces = [(1.0, b"data: a"), (2.0, b"b\n\ndata: c\n\ndata: d"), (3.0, b"\n\n")]
    assert events(pieces) == [Event(2.0, b"ab"), Event(2.0, b"c"), Event(3.0, b"d")]


def test_a_stream_that_is_cut_keeps_its_last_event() -> None:
    """Data without the empty line after it counts; nothing is no event."""
    assert events([(1.0, b"data: a\n\ndata: b")]) == [Event(1.0, b"a"), Event(1.0, b"b")]
    assert events([]) == events([(1.0, b"\n\n\n")]) == []
