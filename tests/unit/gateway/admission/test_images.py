"""Images on their way to an engine: which are taken, how large, and that no two callers' are the same to the engine."""

import base64
import json
import random
import struct
import subprocess
from typing import Any

import pytest

from adytum.inference.gateway.admission import images, media, rewrite
from adytum.inference.gateway.admission.images import BadImage, Image
from adytum.inference.gateway.failures import Refused
from tests.pictures import REDS, bomb, data_url, png
from tests.support import ROOT

ENGINE_PYTHON = ROOT / ".venv-engine" / "bin" / "python"
SALT = "5a" * 32


def image_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def admit(*parts: Any, salt: str = SALT) -> tuple[list[Any], media.MediaCost]:
    """The parts as an engine gets them."""
    body = json.loads(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    found = media.admit(body, salt)
    return body["messages"][0]["content"], found


def refusal(*parts: Any) -> Any:
    with pytest.raises(Refused) as refused:
        admit(*parts)
    return refused.value.refusal


@pytest.mark.parametrize("name", REDS)
def test_each_kind_is_read_and_salted(name: str) -> None:
    kind = name.partition(" ")[0]
    assert images.read(REDS[name]) == Image(kind, 24, 16)
    (part,), found = admit(image_part(data_url(REDS[name], f"image/{kind}")))
    url = part["image_url"]["url"]
    prefix = f"data:image/{kind};base64,"
    assert url.startswith(prefix)
    assert base64.b64decode(url.removeprefix(prefix)) == REDS[name] + SALT.encode()
    assert found.characters == len(url) - len(prefix)
    assert found.tokens == 256


@pytest.mark.engine
def test_the_engines_hash_of_an_image_is_another_for_each_salt() -> None:
    """Real vLLM's: its caches of images go by it."""
    code = """
import sys, json
from vllm.multimodal.media import ImageMediaIO
from vllm.multimodal.hasher import MultiModalHasher
io = ImageMediaIO()
for url in json.load(sys.stdin):
    image = io.load_base64("image/png", url.partition(",")[2])
    print(MultiModalHasher.hash_kwargs("sha256", model_id="m", image=image), *image.size, *image.media.getpixel((5, 5)))
"""
    # An image with transparency is converted, which vLLM hashes another way.
    urls = [
        admit(image_part(data_url(REDS[name], "image/png")), salt=salt)[0][0]["image_url"]["url"]
        for name in REDS
        for salt in ("aa" * 32, "bb" * 32, "aa" * 32)
    ]
    said = subprocess.run(
        [ENGINE_PYTHON, "-c", code], input=json.dumps(urls).encode(), capture_output=True, check=True
    ).stdout.decode()
    lines = [line.split() for line in said.splitlines()[-len(urls) :]]
    for mine, others, again in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        assert mine == again
        assert mine[0] != others[0]
        assert mine[1:] == others[1:]
        assert mine[1:3] == ["24", "16"], "it is still the image"
        assert int(mine[3]) > 200 > 60 > int(mine[4])
    assert len({line[0] for line in lines}) == 2 * len(REDS)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:text/html;base64,PGI+", "unsupported_media"),
        ("data:application/pdf;base64,JVBERi0=", "unsupported_media"),
        ("data:image/svg+xml;base64,PHN2Zz4=", "unsupported_media"),
        ("data:image/tiff;base64,SUkqAA==", "unsupported_media"),
        ("data:;base64,AAAA", "unsupported_media"),
        ("data:image/png,rawbytes", "invalid_image"),
        ("data:image/png;charset=x;base64,AAAA", "invalid_image"),
        ("data:", "invalid_image"),
        ("data:image/png;base64,", "invalid_image"),
        ("data:image/png;base64,iVBORw0KGgo=", "invalid_image"),
        ("data:image/png;base64,\u00e9", "invalid_image"),
        (data_url(png())[:-4] + "*A==", "invalid_image"),
        (data_url(png()) + "\n", "invalid_image"),
        (data_url(b"II*\x00" + bytes(60)), "invalid_image"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "invalid_image"),
        ("https://example.org/a.png", "remote_media"),
        ("blob:x", "remote_media"),
        ("", "remote_media"),
        (None, "remote_media"),
    ],
)
def test_what_is_no_image_is_refused(url: Any, code: str) -> None:
    said = refusal({"type": "text", "text": "what?"}, image_part(url))
    assert (said.status, said.code, said.param) == (400, code, "messages[0].content[1].image_url")
    assert "example.org" not in said.message


def test_the_content_decides_what_it_is() -> None:
    """Clients call a PNG a JPEG; vLLM never minded."""
    (part,), _ = admit(image_part(data_url(png(), "IMAGE/JPG").replace("data", "DATA")))
    assert part["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}},
        {"type": "video_url", "video_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "image_pil", "image_pil": "AAAA"},
    ],
)
def test_other_media_are_refused(part: Any) -> None:
    assert refusal(part).code == "unsupported_media"


def test_every_place_where_an_image_can_stand_is_found() -> None:
    url, raw = data_url(png()), base64.b64encode(png()).decode()
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": raw}}
    parts = [
        image_part(url),
        {"image_url": url},
        {"type": "input_image", "image_url": url},
        source,
        {"type": "image", "source": {"media_type": "image/png", "data": raw}},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "tool_result", "tool_use_id": "1", "content": [source]},
        {"type": "tool_use", "input": {}, "content": [image_part(url)]},
    ]
    changed, found = admit(*parts)
    assert found.tokens == len(parts) * 256 + len(parts) * 24 * 16 // 1024
    assert json.dumps(changed).count(raw[:-4]) == len(parts)
    assert raw not in json.dumps(changed), "each is salted"
    assert len(base64.b64decode(changed[3]["source"]["data"])) == len(png()) + len(SALT)
    for part in parts:
        bad = json.loads(json.dumps(part).replace(url, "http://x/").replace(raw, "AAAA").replace("image/png", "a/b"))
        assert refusal(bad).code in ("remote_media", "unsupported_media")


def test_a_tools_own_fields_are_left() -> None:
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {"image_url": "https://x/", "audio_url": "y"}}
    assert admit(call) == ([call], media.MediaCost())
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}}
    assert admit(document) == ([document], media.MediaCost())


def test_number_bytes_and_pixels_are_bounded() -> None:
    assert admit(*[image_part(data_url(png()))] * 16)[1].tokens == 16 * 256 + 6
    assert refusal(*[image_part(data_url(png()))] * 17).code == "too_many_values"
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    assert refusal(*[source] * 17).code == "too_many_values"
    said = refusal(image_part(data_url(png() + bytes(16 << 20))))
    assert (said.status, said.code) == (413, "too_large")
    # Each alone would do.
    half = png(width=8192, height=2049, rows=1)
    assert admit(image_part(data_url(half)))[1].tokens == 256 + 8192 * 2049 // 1024
    assert refusal(*[image_part(data_url(half))] * 2).code == "too_large"


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    packed = bomb(20_000)
    assert len(packed) < 64 * 1024
    said = refusal(image_part(data_url(packed)))
    assert said.code == "too_large"
    assert "20000 x 20000" in said.message


def test_a_request_is_counted_by_what_its_images_make() -> None:
    """Not as text: a photograph of 4 MB would be a million tokens."""
    body = {"model": "m", "messages": [{"role": "user", "content": [image_part(data_url(png() + bytes(4_000_000)))]}]}
    written, tokens = rewrite.for_engine(body, SALT)
    assert len(written) > 5_000_000
    assert tokens < 400


@pytest.mark.parametrize("name", REDS)
def test_a_truncated_image_has_its_size_or_none(name: str) -> None:
    whole = images.read(REDS[name])
    for end in range(len(REDS[name])):
        try:
            assert images.read(REDS[name][:end]) == whole
        except BadImage:
            continue


@pytest.mark.parametrize(
    "data",
    [
        # A second header, which Pillow would follow.
        png()[:33] + png(width=9999)[8:33] + png()[33:],
        # Two frames' sizes in one JPEG.
        REDS["jpeg"][:2] + b"\xff\xc0\x00\x0b\x08\x00\x10\x00\x18\x01\x01\x11\x00" + REDS["jpeg"][2:],
        REDS["jpeg"][:2] + b"\x00" + REDS["jpeg"][2:],
        REDS["jpeg"][:2] + b"\xff\xd8" + REDS["jpeg"][2:],
        REDS["jpeg"][:2] + b"\xff\xe1\x00\x01" + REDS["jpeg"][2:],
        REDS["gif"][:25] + b"\x07" + REDS["gif"][25:],
        REDS["gif"][:25] + b";",
        REDS["webp"][:12] + b"ICCP" + REDS["webp"][16:],
        png(width=0),
        b"",
    ],
)
def test_what_a_lenient_decoder_would_go_on_with_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        images.read(data)


def test_a_frame_beyond_its_screen_counts() -> None:
    gif = bytearray(REDS["gif"])
    gif[26:34] = struct.pack("<HHHH", 1, 2, 65_000, 60_000)
    assert images.read(bytes(gif)) == Image("gif", 65_001, 60_002)


@pytest.mark.engine
def test_pillow_finds_no_other_size() -> None:
    """What is taken here, the engines' Pillow opens at the same size, as another of its kinds, or not at all."""
    rng = random.Random(7)
    taken: list[tuple[bytes, Image]] = []
    for _ in range(30_000):
        data = bytearray(rng.choice(list(REDS.values())))
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(min(len(data), 200))
            way = rng.randrange(3)
            if way == 0:
                data[place] = rng.randrange(256)
            elif way == 1:
                data[place:place] = rng.randbytes(rng.randint(1, 4))
            else:
                del data[place : place + rng.randint(1, 4)]
        try:
            taken.append((bytes(data), images.read(bytes(data))))
        except BadImage:
            continue
    assert len(taken) > 5_000
    code = """
import io, sys, json, base64, warnings
from vllm.multimodal.image import open_image
warnings.simplefilter("ignore")
for text in json.load(sys.stdin):
    try:
        image = open_image(io.BytesIO(base64.b64decode(text)))
        print("size", image.format, *image.size)
    except Exception:
        print("size none 0 0")
"""
    said = subprocess.run(
        [ENGINE_PYTHON, "-c", code],
        input=json.dumps([base64.b64encode(data).decode() for data, _ in taken]).encode(),
        capture_output=True,
        check=True,
    ).stdout.decode()
    lines = [line.split() for line in said.splitlines() if line.startswith("size ")]
    opened = 0
    for (data, image), (_, kind, width, height) in zip(taken, lines, strict=True):
        if kind.lower() == image.kind:
            opened += 1
            assert (int(width), int(height)) == (image.width, image.height), data.hex()
        else:
            assert int(width) * int(height) <= 768 * 512, (kind, data.hex())
    assert opened > 2_000
