"""What an answer took, read from each of the APIs' own words, however the network cuts them."""

import json

import pytest

from adytum.inference.gateway.accounting.usage import StreamUsage, Usage, of_whole

CHAT = [
    b'data: {"choices":[{"delta":{"content":"\\"usage\\":{\\"prompt_tokens\\":9}"}}]}\n\n',
    b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n',
    b"data: [DONE]\n\n",
]
RESPONSES = [
    b'event: response.created\ndata: {"response":{"usage":null}}\n\n',
    b'event: response.completed\ndata: {"response":{"usage":{"input_tokens":5,"output_tokens":6,'
    b'"input_tokens_details":{"cached_tokens":1}}}}\n\n',
]
MESSAGES = [
    b'event: message_start\ndata: {"message":{"usage":{"input_tokens":3,"output_tokens":0}}}\n\n',
    b'event: message_delta\ndata: {"usage":{"input_tokens":0,"output_tokens":8}}\n\n',
]


@pytest.mark.parametrize("step", [1, 2, 7, 50, 10_000])
@pytest.mark.parametrize(
    ("events", "usage"), [(CHAT, Usage(7, 4, 2)), (RESPONSES, Usage(5, 1, 6)), (MESSAGES, Usage(3, 0, 8))]
)
def test_each_api_is_read_and_passed_on_as_it_was(events: list[bytes], usage: Usage, step: int) -> None:
    stream = StreamUsage(100, hidden=False)
    data = b"".join(events)
    passed = b"".join(stream.feed(data[at : at + step]) for at in range(0, len(data), step))
    assert passed + stream.finish() == data
    assert stream.usage == usage


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_what_the_client_did_not_ask_for_is_taken_out_and_nothing_else(step: int) -> None:
    stream = StreamUsage(100, hidden=True)
    data = b"".join(CHAT)
    passed = b"".join(stream.feed(data[at : at + step]) for at in range(0, len(data), step))
    assert passed == b"".join((*CHAT[:2], CHAT[3]))
    assert stream.usage == Usage(7, 4, 2)


def test_only_openais_event_of_usage_is_ever_taken_out() -> None:
    stream = StreamUsage(100, hidden=True)
    assert stream.feed(b"".join(RESPONSES + MESSAGES)) == b"".join(RESPONSES + MESSAGES)


def test_a_stream_without_a_count_is_estimated_and_says_so() -> None:
    stream = StreamUsage(400, hidden=True)
    stream.feed(CHAT[0])
    stream.feed(CHAT[1])
    assert stream.usage == Usage(100, 0, 2, exact=False)


def test_what_is_not_an_event_passes() -> None:
    stream = StreamUsage(1, hidden=True)
    odd = b'"usage":\n\ndata: {"usage":[]}\n\n: "usage": \n\ndata: {"usage":{"prompt_tokens":true}}\n\n'
    assert stream.feed(odd + b"half") == odd
    assert stream.finish() == b"half"
    assert not stream.usage.exact


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_whole_answer_is_read_from_its_end(separators: tuple[str, str]) -> None:
    text = 'say "usage":{"prompt_tokens":1000}'
    answer = {
        "choices": [{"message": {"content": text}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
        "x": text,
    }
    assert of_whole(json.dumps(answer, separators=separators).encode()) == Usage(3, 0, 4)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"usage":null}', b'{"usage":{}}', b'"usage":' * 1000, b'"usage":{' * 9])
def test_a_whole_answer_that_says_nothing_gives_nothing(body: bytes) -> None:
    assert of_whole(body) is None
