"""Decoding: what is malformed is named, what is fine is untouched."""

from hypothesis import given
from hypothesis import strategies as st

from bestroute.v1 import routing_pb2 as pb
from bestroute.wire import Malformed, decoder

texts = st.text(max_size=20)
requests = st.builds(
    pb.RouteRequest,
    request_id=texts,
    prompt=texts,
    policy=st.builds(
        pb.RoutingPolicy,
        match_threshold=st.none() | st.floats(allow_nan=False),
        allowed_models=st.lists(texts, max_size=3),
        max_samples=st.integers(0, 2**32 - 1),
    ),
    explain=st.booleans(),
)


@given(requests)
def test_a_well_formed_message_is_decoded_as_it_is(request: pb.RouteRequest) -> None:
    assert decoder(pb.RouteRequest)(request.SerializeToString()) == request


@given(requests, st.binary(max_size=30), st.integers(0, 60))
def test_whatever_comes_is_answered(request: pb.RouteRequest, noise: bytes, at: int) -> None:
    """Damaged bytes give a message or say what is wrong; nothing is ever raised."""
    data = request.SerializeToString()

    decoded = decoder(pb.RouteRequest)(data[:at] + noise + data[at:])

    assert isinstance(decoded, pb.RouteRequest | Malformed)
    if isinstance(decoded, Malformed):
        assert decoded.error.field
        assert decoded.error.description


@given(requests, st.binary(min_size=1, max_size=8).filter(lambda b: not _is_utf8(b)))
def test_text_that_is_not_utf8_is_named_with_its_request_id(
    request: pb.RouteRequest, bad: bytes
) -> None:
    field = b"\x22" + bytes([len(bad) + 2]) + b"\x22" + bytes([len(bad)]) + bad

    decoded = decoder(pb.RouteRequest)(request.SerializeToString() + field)

    assert isinstance(decoded, Malformed)
    assert decoded.error.field == f"policy.allowed_models[{len(request.policy.allowed_models)}]"
    assert decoded.request_id == request.request_id


def test_the_same_oneof_member_twice_is_no_fault() -> None:
    """Protocol buffers let a later value replace an earlier one."""
    twice = pb.RouteRequest(prompt="a").SerializeToString() * 2

    assert decoder(pb.RouteRequest)(twice) == pb.RouteRequest(prompt="a")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
