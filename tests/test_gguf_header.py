"""Headers of GGUF files made byte by byte: whatever they claim is refused in one sentence."""

import struct

import pytest

from loopos import load_model, load_tokenizer
from loopos.errors import ModelFormatError


def header(version=3, tensors=0, values=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


def tensor(name, shape, kind=0, offset=0):
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


HUGE = 2**62


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["does not begin with 'GGUF'"]),
        (b"GG", ["does not begin with 'GGUF'"]),
        (b"PK\3\4" * 9, ["does not begin with 'GGUF'"]),
        (header(1), ["version 1"]),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big-endian"]),
        (b"GGUF" + struct.pack("<I", 3), ["cut off", "number of tensors"]),
        (header(tensors=HUGE), [f"{HUGE} tensors"]),
        (header(values=HUGE), [f"{HUGE} metadata values"]),
        (header(values=1, rest=struct.pack("<Q", HUGE) + b"x" * 9), ["cut off", "key 0"]),
        (header(values=1, rest=text(b"\xff") + bytes(16)), ["key 0", "UTF-8"]),
        (header(values=1, rest=text(b"k") + struct.pack("<IQ", 8, HUGE)), ["cut off", "'k'"]),
        (header(values=1, rest=text(b"k") + struct.pack("<I", 99)), ["'k'", "type 99"]),
        (header(values=1, rest=text(b"k") + struct.pack("<IB", 7, 2)), ["'k' is 2", "boolean"]),
        (header(values=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, HUGE)), ["strings in key"]),
        (header(values=1, rest=text(b"k") + struct.pack("<IIQ", 9, 4, HUGE)), ["numbers in key"]),
        (header(values=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), ["array of the type 9"]),
        (header(values=2, rest=(text(b"k") + struct.pack("<IB", 0, 1)) * 2), ["'k' stands twice"]),
        (header(tensors=1, rest=tensor(b"t", [1] * 9)), ["'t' has 9 dimensions"]),
        (header(tensors=1, rest=tensor(b"t", [0, 4])), ["'t' has shape [4, 0]"]),
        (header(tensors=1, rest=tensor(b"t", [HUGE] * 4)), ["cut off", "'t' ends at"]),
        (header(tensors=1, rest=tensor(b"t", [31], kind=2)), ["rows of 31", "32 for type Q4_0"]),
        (header(tensors=1, rest=tensor(b"t", [1], offset=4) + bytes(99)), ["not aligned"]),
        (header(tensors=1, rest=tensor(b"t", [1], offset=2**63)), ["cut off", "'t' ends at"]),
        (header(tensors=2, rest=tensor(b"t", [1]) * 2 + bytes(99)), ["'t' stands twice"]),
        (
            header(tensors=2, rest=tensor(b"t", [9]) + tensor(b"u", [9], offset=32) + bytes(99)),
            ["'t' and 'u' overlap"],
        ),
        (
            header(values=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0)),
            ["'general.alignment' is 0"],
        ),
    ],
)
def test_damaged_headers_are_refused_in_one_sentence(tmp_path, data, words):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    for read in (load_model, load_tokenizer):
        with pytest.raises(ModelFormatError) as caught:
            read(path)
        found = str(caught.value)
        assert found.startswith(f"{path}: ")
        assert "\n" not in found
        for word in words:
            assert word in found, found
