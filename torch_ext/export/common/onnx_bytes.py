"""ModelProtos as bytes, and copies of them, within the size of a message of protobuf."""

from __future__ import annotations

from typing import Any

LIMIT = 2**31 - 2**20  # bytes; protobuf holds less than 2 GiB in one message


def model_bytes(who: str, proto: Any, label: object, advice: str) -> bytes:
    """A ModelProto as bytes.

    Args:
        who: the function that errors name.
        proto: the model.
        label: what errors call it, such as its path.
        advice: how it becomes smaller.

    Raises:
        ValueError: it does not fit into a message.
    """
    from google.protobuf.message import EncodeError

    try:
        data: bytes = proto.SerializeToString()
    except (EncodeError, ValueError) as error:  # asking for its size raises the same
        raise ValueError(
            f"{who}: expected {label} to be a model of at most {LIMIT} bytes, got one that "
            f"protobuf cannot hold ({error}); {advice}"
        ) from error
    if len(data) > LIMIT:
        raise ValueError(
            f"{who}: expected {label} to be a model of at most {LIMIT} bytes, got {len(data)}; "
            f"{advice}"
        )
    return data


def model_copy(who: str, proto: Any, label: object, advice: str) -> Any:
    """A copy of a ModelProto; arguments and errors are those of :func:`model_bytes`."""
    data = model_bytes(who, proto, label, advice)
    return type(proto).FromString(data)
