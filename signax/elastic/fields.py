"""Messages and plans as values of JSON, which are read strictly.

Every field must be there, once, with the right type, and no other. A field with a default is left
out where it has the default.
"""

import json
import math
import types
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

MAX_TEXT = 128  # characters of a digest
MAX_NUMBER = (1 << 63) - 1  # SQLite's integers


class ProtocolError(ValueError):
    """Bytes that are no message: the text names the field and its value."""


def parse(header: bytes) -> Any:
    """Read the JSON text of a header; `ProtocolError` if it is none."""
    try:
        return json.loads(
            header.decode(), object_pairs_hook=_to_fields, parse_constant=_reject_constant
        )
    except ProtocolError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the header is no JSON text: {error}") from None


def to_json(value: Any) -> Any:
    """A message or a plan as a value of JSON."""
    if hasattr(value, "_asdict"):
        defaults = value._field_defaults
        return {
            name: to_json(field)
            for name, field in value._asdict().items()
            if name not in defaults or field != defaults[name]
        }
    return [*map(to_json, value)] if isinstance(value, tuple) else value


def from_json(kind: Any, value: Any, name: str) -> Any:
    """Check that a value of JSON has a type, and return it as a value of this type."""
    if hasattr(kind, "_fields"):
        return _read_fields(kind, value, name)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ProtocolError(f"{name}={shorten(value)} must be a list")
        return tuple(
            [from_json(get_args(kind)[0], item, f"{name}[{n}]") for n, item in enumerate(value)]
        )
    if get_origin(kind) is types.UnionType:  # an optional field
        return None if value is None else from_json(get_args(kind)[0], value, name)
    if type(value) is not kind:
        raise ProtocolError(f"{name}={shorten(value)} must be of type {kind.__name__}")
    if kind is int and not 0 <= value <= MAX_NUMBER:
        raise ProtocolError(f"{name}={shorten(value)} must be from 0 to {MAX_NUMBER}")
    if kind is float and not math.isfinite(value):
        raise ProtocolError(f"{name}={value} must be finite")
    if kind is str and not 0 < len(value) <= MAX_TEXT:
        raise ProtocolError(f"{name}={shorten(value)} must have 1 to {MAX_TEXT} characters")
    return value


def _read_fields(kind: Any, value: Any, name: str) -> Any:
    found = set(value) if isinstance(value, dict) else set()
    if not set(kind._fields) - set(kind._field_defaults) <= found <= set(kind._fields):
        raise ProtocolError(
            f"{name}={shorten(value)} must have the fields {', '.join(kind._fields)}"
        )
    hints: dict[str, Any] = get_type_hints(kind)
    return kind(**{n: from_json(hints[n], value[n], f"{name}.{n}") for n in found})


def shorten(value: Any) -> str:
    """A value as text for an error."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _to_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ProtocolError(
            f"the header names a field twice: {shorten([name for name, _ in pairs])}"
        )
    return fields


def _reject_constant(text: str) -> NoReturn:
    raise ProtocolError(f"the header holds the number {text}, which is not finite")
