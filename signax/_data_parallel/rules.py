"""Flax's logical axis rules, for a model that runs inside one worker."""

from collections.abc import Hashable, Iterable
from typing import Any

from signax._core.checks import check_axis_name
from signax._core.leaves import axis_names

Rule = tuple[str, Any]


def inner_rules(rules: Iterable[Any], axis_name: Hashable) -> tuple[Rule, ...]:
    """Remove the workers' axis from Flax's logical axis rules.

    Inside :meth:`signax.DataParallel.value_and_grad` the workers' axis is mapped, and each worker
    sees its own share of the batch only. A sharding constraint of the model may not name this axis
    there. Use the result around the loss function, and the original rules outside.

    Args:
      rules: pairs of a logical name and a mesh axis, several mesh axes or `None`, as
        `flax.linen.logical_axis_rules` takes them.
      axis_name: the workers' axis, or a tuple of axes.

    Returns:
      The pairs without the workers' axis. A logical name with no other axis is paired with `None`.

    Raises:
      TypeError: `axis_name` names no axis, or a rule is not a pair.

    Examples:
      >>> import signax
      >>> rules = [("batch", ("data", "fsdp")), ("embed", "fsdp"), ("length", "data")]
      >>> signax.inner_rules(rules, "data")
      (('batch', 'fsdp'), ('embed', 'fsdp'), ('length', None))
    """
    check_axis_name(axis_name)
    workers = axis_names(axis_name)
    kept = []
    for rule in rules:
        if not isinstance(rule, (tuple, list)) or len(rule) != 2:
            raise TypeError(f"rules has {rule!r}, but needs pairs of a logical name and mesh axes")
        name, axes = rule
        axes = tuple(axes) if isinstance(axes, list) else axes  # as configurations have them
        inner = [axis for axis in axis_names(axes) if axis is not None and axis not in workers]
        kept.append((name, inner[0] if len(inner) == 1 else tuple(inner) or None))
    return tuple(kept)
