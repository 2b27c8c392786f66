"""Binary HTTP (RFC 9292): its examples, both framings of both kinds, cut everywhere, padded, over each limit."""

from dataclasses import dataclass, replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adytum.inference.channel import bhttp, varint
from adytum.inference.channel.bhttp import Content, Decoder, Event, Fields, Head, RequestHead, ResponseHead, Trailers
from adytum.inference.channel.errors import (
    ChannelError,
    ExchangeMisuse,
    MalformedMessage,
    MessageTooLarge,
    TruncatedMessage,
)
from adytum.inference.channel.limits import Limits
from tests.unit.channel.support import FUZZ, cuts, mutate, mutations, one_by_one, pieces, unhex

Kind = Literal["request", "response"]


@dataclass(frozen=True)
class Message:
    """A message with its content in one piece. Two messages with the same meaning are equal."""

    head: Head
    content: bytes = b""
    trailers: Fields = ()


def read(kind: Kind, parts: list[bytes], limits: Limits | None = None) -> Message:
    decoder = Decoder(kind, limits or Limits())
    events: list[Event] = []
    for part in parts:
        events += decoder.feed(part)
    events += decoder.finish()
    return message_of(events)


def message_of(events: list[Event]) -> Message:
    head, *rest = events
    assert isinstance(head, RequestHead | ResponseHead)
    trailers: Fields = ()
    if rest and isinstance(rest[-1], Trailers):
        trailers = rest.pop().fields
        assert trailers
    content = b""
    for event in rest:
        assert isinstance(event, Content)
        assert event.data
        content += event.data
    return Message(head, content, trailers)


def chunked(message: Message, size: int = 1 << 20) -> bytes:
    """The indeterminate-length form, content in chunks of `size`."""
    content = message.content
    return b"".join(
        (
            bhttp.encode_head(message.head),
            *(bhttp.encode_content(content[at : at + size]) for at in range(0, len(content), size)),
            bhttp.encode_end(message.trailers),
        )
    )


# The examples of RFC 9292, section 5. Figures 8 and 9: one request, known and indeterminate, the second with 10
# bytes of padding. Figures 11 and 13: responses.
REQUEST = Message(
    RequestHead(
        "GET",
        "https",
        "",
        "/hello.txt",
        (
            (b"user-agent", b"curl/7.16.3 libcurl/7.16.3 OpenSSL/0.9.7l zlib/1.2.3"),
            (b"host", b"www.example.com"),
            (b"accept-language", b"en, mi"),
        ),
    )
)
FIGURE_8 = unhex(
    "0003474554056874747073000a2f68656c6c6f2e747874406c0a757365722d61"
    + "67656e74346375726c2f372e31362e33206c69626375726c2f372e31362e3320"
    + "4f70656e53534c2f302e392e376c207a6c69622f312e322e3304686f73740f77"
    + "77772e6578616d706c652e636f6d0f6163636570742d6c616e67756167650665"
    + "6e2c206d690000"
)
FIGURE_9 = unhex(
    "0203474554056874747073000a2f68656c6c6f2e7478740a757365722d616765"
    + "6e74346375726c2f372e31362e33206c69626375726c2f372e31362e33204f70"
    + "656e53534c2f302e392e376c207a6c69622f312e322e3304686f73740f777777"
    + "2e6578616d706c652e636f6d0f6163636570742d6c616e677561676506656e2c"
    + "206d6900000000000000000000000000"
)
RESPONSE = Message(
    ResponseHead(
        200,
        (
            (b"date", b"Mon, 27 Jul 2009 12:28:53 GMT"),
            (b"server", b"Apache"),
            (b"last-modified", b"Wed, 22 Jul 2009 19:15:56 GMT"),
            (b"etag", b'"34aa387-d-1568eb00"'),
            (b"accept-ranges", b"bytes"),
            (b"content-length", b"51"),
            (b"vary", b"Accept-Encoding"),
            (b"content-type", b"text/plain"),
        ),
    ),
    b"Hello World! My content includes a trailing CRLF.\r\n",
)
FIGURE_11 = unhex(
    "03"
    # 102 and 103, informational, each with its fields.
    + "4066 0772756e6e696e67 0a22736c65657020313522 00"
    + "4067 046c696e6b 233c2f7374796c652e6373733e3b2072656c3d7072656c6f61643b2061733d7374796c65"
    + "046c696e6b 243c2f7363726970742e6a733e3b2072656c3d7072656c6f61643b2061733d736372697074 00"
    + "40c8"
    + "0464617465 1d4d6f6e2c203237204a756c20323030392031323a32383a353320474d54"
    + "06736572766572 06417061636865"
    + "0d6c6173742d6d6f646966696564 1d5765642c203232204a756c20323030392031393a31353a353620474d54"
    + "0465746167 1422333461613338372d642d313536386562303022"
    + "0d6163636570742d72616e676573 056279746573"
    + "0e636f6e74656e742d6c656e677468 023531"
    + "0476617279 0f4163636570742d456e636f64696e67"
    + "0c636f6e74656e742d74797065 0a746578742f706c61696e 00"
    + "3348656c6c6f20576f726c6421204d7920636f6e74656e7420696e636c75646573206120747261696c696e672043524c462e0d0a"
    + "0000"
)
TRAILED = Message(ResponseHead(200), b"This content contains CRLF.\r\n", ((b"trailer", b"text"),))
FIGURE_13 = unhex("0140c8001d5468697320636f6e74656e7420636f6e7461696e732043524c462e0d0a0d07747261696c65720474657874")
EXAMPLES: list[tuple[Kind, bytes, Message]] = [
    ("request", FIGURE_8, REQUEST),
    ("request", FIGURE_9, REQUEST),
    ("response", FIGURE_11, RESPONSE),
    ("response", FIGURE_13, TRAILED),
]
EXAMPLE_NAMES = ["figure 8", "figure 9", "figure 11", "figure 13"]

POST = Message(
    RequestHead("POST", "https", "a.example", "/v1/chat/completions?x=1", ((b"accept", b"*/*"), (b"x", b""))),
    b'{"model": "m"}',
    ((b"t", b"1"), (b"t", b"2")),
)
ANSWER = Message(ResponseHead(404, ((b"content-type", b"application/json"),)), b"{}" * 40, ((b"u", b"3"),))


@pytest.mark.parametrize(("kind", "encoded", "message"), EXAMPLES, ids=EXAMPLE_NAMES)
def test_rfc_examples_are_read(kind: Kind, encoded: bytes, message: Message) -> None:
    assert read(kind, [encoded]) == message
    assert read(kind, one_by_one(encoded)) == message


def test_rfc_examples_are_written() -> None:
    assert bhttp.encode(REQUEST.head) == FIGURE_8
    assert chunked(REQUEST) + bytes(10) == FIGURE_9
    # Figure 11 without its informational responses, which are never sent here.
    assert chunked(RESPONSE) == b"\x03" + FIGURE_11[FIGURE_11.index(unhex("40c8")) :]
    assert bhttp.encode(TRAILED.head, TRAILED.content, TRAILED.trailers) == FIGURE_13
    # The indeterminate form has the same parts.
    assert chunked(TRAILED) == unhex("0340c8001d") + TRAILED.content + unhex("00 07747261696c6572 0474657874 00")


@pytest.mark.parametrize(("kind", "encoded", "message"), EXAMPLES, ids=EXAMPLE_NAMES)
def test_the_other_kind_is_refused(kind: Kind, encoded: bytes, message: Message) -> None:
    with pytest.raises(MalformedMessage):
        read("response" if kind == "request" else "request", [encoded])


@pytest.mark.parametrize("framing", ["04", "3f", "4004", "ffffffffffffffff"])
@pytest.mark.parametrize("kind", ["request", "response"])
def test_unknown_framing(kind: Kind, framing: str) -> None:
    with pytest.raises(MalformedMessage):
        read(kind, [unhex(framing) + FIGURE_8[1:]])


# Truncation (RFC 9292, 3.8).


def sections(message: Message, known: bool) -> list[tuple[int, Message]]:
    """The offsets at which each of our messages may end, and its meaning then: the omitted sections are empty.

    These are after the control data (as in both examples of RFC 9458), after the header, and after the content. In
    the indeterminate form the content includes the zero that ends it.
    """
    if known:
        bare, header, content = (
            bhttp.encode(replace(message.head, fields=()))[:-3],
            bhttp.encode(message.head)[:-2],
            bhttp.encode(message.head, message.content)[:-1],
        )
    else:
        bare = bhttp.encode_head(replace(message.head, fields=()))[:-1]
        header = bhttp.encode_head(message.head)
        content = header + bhttp.encode_content(message.content) + b"\x00"
    return [
        (len(bare), Message(replace(message.head, fields=()))),
        (len(header), Message(message.head)),
        (len(content), Message(message.head, message.content)),
    ]


def known_length(message: Message) -> bytes:
    return bhttp.encode(message.head, message.content, message.trailers)


@pytest.mark.parametrize("known", [True, False], ids=["known", "indeterminate"])
@pytest.mark.parametrize("message", [POST, ANSWER], ids=["request", "response"])
def test_cut_at_every_offset(message: Message, known: bool) -> None:
    """A truncated message is an error, unless it ends at a section's end: then the following sections are empty."""
    kind: Kind = "request" if message is POST else "response"
    encoded = known_length(message) if known else chunked(message)
    allowed = dict(sections(message, known))
    assert len(allowed) == 3
    for end in range(len(encoded)):
        cut = encoded[:end]
        if end in allowed:
            assert read(kind, [cut]) == allowed[end] == read(kind, one_by_one(cut))
            # "Missing truncated fields" and sections of length zero are the same thing.
            assert read(kind, [cut + bytes(5)]) == allowed[end]
        else:
            for parts in ([cut], one_by_one(cut)):
                with pytest.raises(TruncatedMessage):
                    read(kind, parts)
    assert read(kind, [encoded]) == message == read(kind, one_by_one(encoded))


def test_content_that_began_has_to_end() -> None:
    head = bhttp.encode_head(ANSWER.head)
    assert read("response", [head]) == Message(ANSWER.head)
    assert read("response", [head + b"\x00"]) == Message(ANSWER.head)
    with pytest.raises(TruncatedMessage):
        read("response", [head + bhttp.encode_content(b"half of it")])


def test_an_informational_response_is_no_answer() -> None:
    for encoded in ("0140 66", "0140 66 00", "0340 66 00", "034066 00 4067 00"):
        with pytest.raises(TruncatedMessage):
            read("response", [unhex(encoded)])
    assert read("response", [unhex("014066 00 40c8")]) == Message(ResponseHead(200))


@pytest.mark.parametrize("kind", ["request", "response"])
def test_nothing_at_all(kind: Kind) -> None:
    with pytest.raises(TruncatedMessage):
        read(kind, [])


# Padding.


@pytest.mark.parametrize(("kind", "encoded", "message"), EXAMPLES, ids=EXAMPLE_NAMES)
def test_trailing_zeros_only(kind: Kind, encoded: bytes, message: Message) -> None:
    for count in (1, 2, 100):
        assert read(kind, [encoded + bytes(count)]) == message
        assert read(kind, one_by_one(encoded + bytes(count))) == message
        for at in range(count):
            padding = bytearray(count)
            padding[at] = 1
            for parts in ([encoded + bytes(padding)], one_by_one(encoded + bytes(padding))):
                with pytest.raises(MalformedMessage):
                    read(kind, parts)


def test_padding_up_to_a_multiple() -> None:
    for length in range(40):
        encoded = bhttp.encode(ANSWER.head, bytes(length), pad_to=32)
        assert len(encoded) % 32 == 0
        assert len(encoded) - len(bhttp.encode(ANSWER.head, bytes(length))) < 32
        assert read("response", [encoded]) == Message(ANSWER.head, bytes(length))


def test_two_messages_in_one_are_refused() -> None:
    with pytest.raises(MalformedMessage):
        read("response", [known_length(ANSWER) + known_length(ANSWER)])


# Integers, names, values, control data, status.


@pytest.mark.parametrize("size", [2, 4, 8])
def test_longer_integers_mean_the_same(size: int) -> None:
    def long(value: int) -> bytes:
        return (value | {2: 1, 4: 2, 8: 3}[size] << (size * 8 - 2)).to_bytes(size, "big")

    def item(data: bytes) -> bytes:
        return long(len(data)) + data

    head = POST.head
    assert isinstance(head, RequestHead)
    control = b"".join(item(part.encode()) for part in (head.method, head.scheme, head.authority, head.path))
    fields = b"".join(item(part) for line in head.fields for part in line)
    trailers = b"".join(item(part) for line in POST.trailers for part in line)
    known = long(0) + control + item(fields) + item(POST.content) + item(trailers)
    open_ended = long(2) + control + fields + long(0) + item(POST.content) + long(0) + trailers + long(0)
    for encoded in (known, open_ended):
        assert read("request", [encoded]) == POST == read("request", one_by_one(encoded))


def with_line(name: bytes, value: bytes, form: str) -> bytes:
    line = varint.encode(len(name)) + name + varint.encode(len(value)) + value
    whole = varint.encode(len(line)) + line
    return {
        "known header": b"\x01\x40\xc8" + whole + b"\x00\x00",
        "known trailer": b"\x01\x40\xc8\x00\x00" + whole,
        "header": b"\x03\x40\xc8" + line + b"\x00\x00\x00",
        "trailer": b"\x03\x40\xc8\x00\x00" + line + b"\x00",
        "informational": b"\x03\x40\x64" + line + b"\x00\x40\xc8\x00\x00\x00",
    }[form]


FORMS = ["known header", "known trailer", "header", "trailer", "informational"]


@pytest.mark.parametrize("form", FORMS)
def test_a_good_line(form: str) -> None:
    message = read("response", [with_line(b"x-a!#$%&'*+.^_`|~0", b" any \x01 byte \xff\t", form)])
    lines = () if form == "informational" else ((b"x-a!#$%&'*+.^_`|~0", b" any \x01 byte \xff\t"),)
    assert isinstance(message.head, ResponseHead)
    assert (message.trailers if "trailer" in form else message.head.fields) == lines


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"Content-Type", b"x"),
        (b"conteNt", b"x"),
        (b":method", b"x"),
        (b"a b", b"x"),
        (b"a\x00", b"x"),
        (b"a\r\nb", b"x"),
        (b"a\n", b"x"),
        (b"na\xefve", b"x"),
        (b"a", b"x\ry"),
        (b"a", b"x\ny"),
        (b"a", b"x\r\ny: z"),
        (b"a", b"x\x00y"),
        (b"a", b"\n"),
    ],
)
def test_a_bad_line(form: str, name: bytes, value: bytes) -> None:
    for parts in ([with_line(name, value, form)], one_by_one(with_line(name, value, form))):
        with pytest.raises(MalformedMessage) as caught:
            read("response", parts)
        assert not isinstance(caught.value, TruncatedMessage)


@pytest.mark.parametrize(("name", "value"), [(b"A", b""), (b"", b""), (b"a", b"\n"), (b"a\n", b""), (b"a", b"\0")])
def test_a_bad_line_is_not_sent(name: bytes, value: bytes) -> None:
    lines = ((name, value),)
    for call in (
        lambda: bhttp.encode(ResponseHead(200, lines)),
        lambda: bhttp.encode_head(RequestHead("GET", "https", "", "/", lines)),
        lambda: bhttp.encode_end(lines),
    ):
        with pytest.raises(ExchangeMisuse):
            call()


@pytest.mark.parametrize("section", ["02 0000", "05 0161 0162 00", "06 0161 0162 0000"])
def test_an_empty_name_in_a_known_length_section(section: str) -> None:
    for encoded in (unhex("0140c8" + section + "00 00"), unhex("0140c8 00 00" + section)):
        with pytest.raises(MalformedMessage, match=r"^a field name is empty$"):
            read("response", [encoded])


@pytest.mark.parametrize(
    "encoded",
    [
        "0140c8 03 0161 0162 00 00 00",  # the value takes one byte more than the section
        "0140c8 01 0161 0162 00 00 00",  # the name does
        "0140c8 05 0161 0162 01 63 01 64 00 00",  # a second line does
    ],
)
def test_lines_stay_inside_their_section(encoded: str) -> None:
    with pytest.raises(ChannelError):
        read("response", [unhex(encoded)])
    with pytest.raises(ChannelError):
        read("response", one_by_one(unhex(encoded)))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("", "/"),
        ("G ET", "/"),
        ("GET\r\n", "/"),
        ("G\x00", "/"),
        ("GET", ""),
        ("GET", "v1/models"),
        ("GET", "*"),
        ("GET", "https://a.example/"),
        ("GET", "/a b"),
        ("GET", "/a\r\nx: y"),
        ("GET", "/\n"),
        ("GET", "/\x00"),
        ("GET", "/\x7f"),
    ],
)
def test_bad_control_data(method: str, path: str) -> None:
    for encoded in (
        bhttp.encode(RequestHead(method, "https", "a.example", path)),
        bhttp.encode_head(RequestHead(method, "https", "a.example", path)),
    ):
        with pytest.raises(MalformedMessage):
            read("request", [encoded])


@pytest.mark.parametrize("part", range(4))
def test_control_data_is_ascii(part: int) -> None:
    parts = [b"GET", b"https", b"a.example", b"/"]
    parts[part] += b"\xc3\xa4"
    encoded = b"\x00" + b"".join(varint.encode(len(item)) + item for item in parts)
    with pytest.raises(MalformedMessage):
        read("request", [encoded])
    text = [item.decode("utf-8") for item in parts]
    with pytest.raises(ExchangeMisuse):
        bhttp.encode(RequestHead(*text))


@pytest.mark.parametrize("status", [0, 1, 99, 600, 1000, 16384])
def test_status_out_of_range(status: int) -> None:
    for framing in (b"\x01", b"\x03"):
        with pytest.raises(MalformedMessage):
            read("response", [framing + varint.encode(status)])


@pytest.mark.parametrize("status", [200, 204, 404, 599])
def test_status_in_range(status: int) -> None:
    assert read("response", [b"\x01" + varint.encode(status)]) == Message(ResponseHead(status))


# Events are returned as soon as they are complete.


def test_events_come_as_they_are_complete() -> None:
    decoder = Decoder("response")
    head = bhttp.encode_head(ANSWER.head)
    assert decoder.feed(head[:-1]) == []
    assert decoder.feed(head[-1:]) == [ANSWER.head]
    assert decoder.feed(bhttp.encode_content(b"one") + bhttp.encode_content(b"two")) == [
        Content(b"one"),
        Content(b"two"),
    ]
    assert decoder.feed(bhttp.encode_content(b"three")[:-1]) == []
    assert decoder.feed(b"e") == [Content(b"three")]
    assert decoder.feed(bhttp.encode_end(((b"a", b"b"),))) == [Trailers(((b"a", b"b"),))]
    assert decoder.finish() == []


def test_known_length_content_comes_in_pieces() -> None:
    decoder = Decoder("response")
    encoded = bhttp.encode(ResponseHead(200), b"abcdef")
    assert decoder.feed(encoded[:-4]) == [ResponseHead(200), Content(b"abc")]
    assert decoder.feed(encoded[-4:]) == [Content(b"def")]
    assert decoder.finish() == []


def test_no_content_is_no_chunk() -> None:
    assert bhttp.encode_content(b"") == b""


# Use after the end or after an error.


def test_use_after_the_end() -> None:
    decoder = Decoder("response")
    decoder.feed(known_length(ANSWER))
    decoder.finish()
    for call in (lambda: decoder.feed(b""), decoder.finish, lambda: decoder.feed(b"\x00")):
        with pytest.raises(ExchangeMisuse):
            call()


@pytest.mark.parametrize("encoded", [b"\x07", known_length(ANSWER) + b"\x01"])
def test_use_after_an_error(encoded: bytes) -> None:
    decoder = Decoder("response")
    with pytest.raises(MalformedMessage):
        decoder.feed(encoded)
    for call in (lambda: decoder.feed(known_length(ANSWER)), decoder.finish):
        with pytest.raises(ExchangeMisuse):
            call()


def test_use_after_a_cut() -> None:
    decoder = Decoder("response")
    decoder.feed(known_length(ANSWER)[:-1])
    with pytest.raises(TruncatedMessage):
        decoder.finish()
    with pytest.raises(ExchangeMisuse):
        decoder.finish()


# Limits. Each is exact: a value at the limit passes, one more does not, and the default limits accept both.


def line(size: int) -> Fields:
    """One field line that takes `size` bytes on the wire."""
    return ((b"a", b"v" * (size - 3)),)


def response(fields: Fields = (), content: bytes = b"", trailers: Fields = ()) -> Message:
    return Message(ResponseHead(200, fields), content, trailers)


def informational(count: int) -> bytes:
    return b"\x01" + b"\x40\x64\x00" * count + b"\x40\xc8"


def chunks(count: int) -> bytes:
    return bhttp.encode_head(ResponseHead(200)) + b"\x01x" * count + bhttp.encode_end()


LIMITED: list[tuple[str, Limits, Kind, bytes, bytes]] = [
    (
        "control",
        Limits(control=20),
        "request",
        *(bhttp.encode(RequestHead("GET", "https", "", "/" + "p" * size)) for size in (11, 12)),
    ),
    (
        "control, one part",
        Limits(control=20),
        "request",
        *(bhttp.encode_head(RequestHead("M" * size, "", "", "/")) for size in (19, 20)),
    ),
    ("known header", Limits(field_section=50), "response", *(known_length(response(line(size))) for size in (50, 51))),
    ("header", Limits(field_section=50), "response", *(chunked(response(line(size))) for size in (50, 51))),
    (
        "header of two",
        Limits(field_section=50),
        "response",
        *(chunked(response(line(25) + line(size))) for size in (25, 26)),
    ),
    ("trailer", Limits(field_section=50), "response", *(chunked(response(trailers=line(size))) for size in (50, 51))),
    (
        "known trailer",
        Limits(field_section=50),
        "response",
        *(known_length(response(trailers=line(size))) for size in (50, 51)),
    ),
    ("known lines", Limits(field_lines=3), "response", *(known_length(response(line(4) * count)) for count in (3, 4))),
    ("lines", Limits(field_lines=3), "response", *(chunked(response(line(4) * count)) for count in (3, 4))),
    (
        "trailer lines",
        Limits(field_lines=3),
        "response",
        *(chunked(response(trailers=line(4) * count)) for count in (3, 4)),
    ),
    ("informational", Limits(informational=2), "response", informational(2), informational(3)),
    (
        "known content",
        Limits(message=10),
        "response",
        *(known_length(response(content=bytes(size))) for size in (10, 11)),
    ),
    ("content", Limits(message=10), "response", *(chunked(response(content=bytes(size))) for size in (10, 11))),
    (
        "content in chunks",
        Limits(message=10),
        "response",
        *(chunked(response(content=bytes(size)), 4) for size in (10, 11)),
    ),
    ("content chunks", Limits(chunks=5), "response", chunks(5), chunks(6)),
    ("padding", Limits(padding=9), "response", *(known_length(ANSWER) + bytes(size) for size in (9, 10))),
]


@pytest.mark.parametrize(
    ("limits", "kind", "within", "beyond"), [item[1:] for item in LIMITED], ids=[item[0] for item in LIMITED]
)
def test_limit(limits: Limits, kind: Kind, within: bytes, beyond: bytes) -> None:
    for encoded in (within, beyond):
        read(kind, [encoded])
    for parts in ([within], one_by_one(within)):
        read(kind, parts, limits)
    for parts in ([beyond], one_by_one(beyond)):
        with pytest.raises(MessageTooLarge):
            read(kind, parts, limits)


@pytest.mark.parametrize(
    "encoded",
    [
        "00 ffffffffffffffff",  # the method
        "00 03474554 ffffffffffffffff",  # the scheme
        "0140c8 ffffffffffffffff",  # the header
        "0340c8 ffffffffffffffff",  # a name
        "0340c8 0161 ffffffffffffffff",  # a value
        "0140c8 00 ffffffffffffffff",  # the content
        "0340c8 00 ffffffffffffffff",  # a chunk
        "0340c8 00 00 ffffffffffffffff",  # a trailer's name
    ],
)
def test_a_huge_length_is_refused_before_its_bytes_come(encoded: str) -> None:
    data = unhex(encoded)
    decoder = Decoder("request" if data[0] in (0, 2) else "response")
    with pytest.raises(MessageTooLarge):
        decoder.feed(data)


# Round trips and arbitrary bytes.

TOKEN = "abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+.^_`|~-"
FIELDS: st.SearchStrategy[Fields] = st.lists(
    st.tuples(
        st.text(TOKEN, min_size=1, max_size=70).map(str.encode),
        st.binary(max_size=70).map(lambda value: value.translate(None, b"\x00\r\n")),
    ),
    max_size=4,
).map(tuple)
PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
REQUESTS = st.builds(
    RequestHead,
    st.text(TOKEN + "ABC", min_size=1, max_size=8),
    st.sampled_from(("https", "http")),
    st.text(PRINTABLE, max_size=70),
    st.text(PRINTABLE, max_size=70).map("/".__add__),
    FIELDS,
)
RESPONSES = st.builds(ResponseHead, st.integers(200, 599), FIELDS)


@FUZZ
@given(st.one_of(REQUESTS, RESPONSES), st.binary(max_size=200), FIELDS, st.integers(1, 70), cuts(), st.integers(0, 20))
def test_round_trip(head: Head, content: bytes, trailers: Fields, size: int, where: list[int], padding: int) -> None:
    kind: Kind = "request" if isinstance(head, RequestHead) else "response"
    message = Message(head, content, trailers)
    assert read(kind, list(pieces(chunked(message, size) + bytes(padding), where))) == message
    assert read(kind, list(pieces(known_length(message) + bytes(padding), where))) == message
    assert read(kind, list(pieces(bhttp.encode(head, content, pad_to=size), where))) == Message(head, content)


def settle(kind: Kind, parts: list[bytes]) -> Message | type[ChannelError]:
    """A decoder's result for these bytes: the message, or the class of the error."""
    try:
        return read(kind, parts)
    except ChannelError as error:
        return type(error)


@FUZZ
@given(st.sampled_from(("request", "response")), st.binary(max_size=80), st.integers(0, 3), cuts(80))
def test_only_our_errors_escape_from_any_bytes(kind: Kind, data: bytes, framing: int, where: list[int]) -> None:
    data = bytes((framing,)) + data
    assert settle(kind, list(pieces(data, where))) == settle(kind, [data])


@FUZZ
@given(st.sampled_from((POST, ANSWER, REQUEST, RESPONSE, TRAILED)), st.booleans(), mutations(), cuts(300))
def test_only_our_errors_escape_from_changed_messages(
    message: Message, known: bool, edits: list[tuple[str, float, int]], where: list[int]
) -> None:
    kind: Kind = "request" if isinstance(message.head, RequestHead) else "response"
    data = mutate(known_length(message) if known else chunked(message), edits)
    assert settle(kind, list(pieces(data, where))) == settle(kind, [data])
