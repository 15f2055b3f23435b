"""Tensors and messages survive the wire bit for bit, however the stream is cut."""
import socket
import threading

import pytest
import torch
from trainverify.capture import wire
from trainverify.capture.wire import Meta, Post, Reply, Signature
from trainverify.diagnostics import Span

TENSORS = [
    torch.tensor(3.5), torch.tensor([1.0, float("nan"), -0.0]), torch.arange(6).reshape(2, 3).t(), torch.zeros(0, 3),
    torch.tensor([True, False]), torch.randn(3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    torch.tensor([1 + 2j, 3 - 1j]), torch.tensor([1 + 2j]).conj(), torch.arange(8.0)[::2], torch.ones(2, dtype=torch.float8_e4m3fn)]


def bits(t):
    t = t.resolve_conj().contiguous().reshape(-1)
    return bytes(t.view(torch.uint8).tolist()) if t.numel() else b""


def test_tensors_survive():
    metas, parts = wire.pack(TENSORS)
    (got,) = wire.unpack([metas], b"".join(parts))
    for sent, came in zip(TENSORS, got, strict=True):
        assert (came.dtype, came.shape) == (sent.dtype, sent.shape)
        assert bits(came) == bits(sent)


def test_no_payload_is_not_an_empty_payload():
    assert wire.unpack([None, (), (Meta("float32", (1,), 4),)], b"\0\0\0\0") == [None, [], [torch.zeros(1)]]


def test_received_tensors_share_no_storage():
    metas, parts = wire.pack([torch.ones(2), torch.ones(2)])
    (pair,) = wire.unpack([metas], b"".join(parts))
    pair[0].zero_()
    assert pair[1].tolist() == [1, 1]


def test_what_has_no_bytes_is_refused():
    with pytest.raises(TypeError, match="cannot send"):
        wire.pack([torch.zeros(2, 2).to_sparse()])


def test_a_tensor_on_meta_travels_as_its_sizes():
    metas, parts = wire.pack([torch.zeros(1 << 30, 1 << 20, device="meta", dtype=torch.bfloat16), torch.tensor([7])])
    (got,) = wire.unpack([metas], b"".join(parts))
    assert got[0].is_meta and got[0].shape == (1 << 30, 1 << 20) and got[0].dtype == torch.bfloat16 and got[1].tolist() == [7]


@pytest.mark.parametrize("cut", [1, 3, 7, 1000])
def test_a_stream_may_be_cut_anywhere(cut):
    signature = Signature("all_reduce", "sum", ((2, 3),), ("float32",), "tp", Span("train.py", 3, "step"), root=1)
    messages = [(Post(1, (0, 2), 5, signature, (Meta("float32", (1,), 4),), True), [b"abcd"]),
                (Reply(((Meta("uint8", (2,), 2),), None)), [b"", b"xy"])]
    stream = b"".join(bytes(chunk) for message, parts in messages for chunk in wire.frame(message, parts))
    buffer = wire.Buffer()
    got = [pair for i in range(0, len(stream), cut) for pair in buffer.feed(stream[i:i + cut])]
    assert got == [(messages[0][0], b"abcd"), (messages[1][0], b"xy")]


def test_a_packed_storage_can_still_be_resized():
    """FSDP frees what it has sent. (torch forbids that where numpy has seen the memory.)"""
    tensor = torch.arange(6.0)
    _, (part,) = wire.pack([tensor[1:4]])
    assert bytes(part) == tensor[1:4].numpy().tobytes()
    tensor = torch.arange(6.0)
    wire.pack([tensor])
    tensor.untyped_storage().resize_(0)


def test_a_frame_of_many_parts_is_sent_whole():
    """More parts than one system call takes, more bytes than the socket holds."""
    ours, theirs = socket.socketpair()
    parts = [bytes([k % 251]) * (1 + k % 900) for k in range(2000)]
    got = []
    reader = threading.Thread(target=lambda: got.append(wire.read_frame(theirs)))
    reader.start()
    wire.send_frame(ours, wire.Wait(7), parts)
    reader.join(30)
    message, body = got[0]
    assert message == wire.Wait(7) and bytes(body) == b"".join(parts)
    ours.close()
    with pytest.raises(ConnectionError, match="gone"):
        wire.read_frame(theirs)
    theirs.close()


@pytest.mark.parametrize("nbytes, body", [(8, 8), (4, 3)])
def test_sizes_that_do_not_fit_are_refused(nbytes, body):
    with pytest.raises(ValueError, match="does not fit"):
        wire.unpack([(Meta("float32", (1,), nbytes),)], bytes(body))
