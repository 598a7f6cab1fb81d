"""A fingerprint of what an update does with a decision, which must be the same in all jobs.

Every value in the program of the update gets a hash of the operation that computes it and of the
hashes of its operands. The decision of the vote is hashed as a value that nothing has computed. So
the hashes of the updates stand for the whole way from the decision to the updates: the step size
and its schedule, the decay, a momentum after the vote, and all their constants. What leads to the
ballot is no part of it, since a worker's own momentum or noise may differ from the others'.

Numbers in the state of the optimiser, such as a step size by `optax.inject_hyperparams`, are inputs
of the program, whose values the fingerprint does not contain.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from signax.elastic.tree_bytes import tree_to_bytes

_ADDRESS = re.compile(r"\b0x[0-9a-f]+")  # of an object in memory, another one in each process
_DECISION = hashlib.sha256(b"decision").digest()


def find_fingerprint(tx: optax.GradientTransformation, params: Any, state: Any) -> str:
    """Trace an update, and return the SHA-256 of its way from the decision, in hexadecimal."""

    def update(params: Any, state: Any) -> Any:
        grads = jax.tree.map(jnp.zeros_like, params)
        return tx.update(grads, state, params)[0]

    inputs = [_hash("input", n) for n in range(len(jax.tree.leaves((params, state))))]
    outputs = _hash_outputs(jax.make_jaxpr(update)(params, state), inputs)
    return hashlib.sha256(b"".join(outputs)).hexdigest()


def _hash_outputs(program: Any, inputs: Sequence[bytes]) -> list[bytes]:
    """The hashes of a program's results, from the hashes of its arguments."""
    opened, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    hashes = dict(zip(opened.invars, inputs, strict=True))
    for variable, const in zip(opened.constvars, consts, strict=True):
        hashes[variable] = _hash(variable.aval, tree_to_bytes(const).tobytes())

    def read(atom: Any) -> bytes:
        return _hash(atom.aval, atom.val) if isinstance(atom, core.Literal) else hashes[atom]

    for eqn in opened.eqns:
        operands, numbers = [*map(read, eqn.invars)], range(len(eqn.outvars))
        if eqn.primitive.name == "io_callback":  # the vote
            found = [_DECISION for _ in numbers]
        elif eqn.primitive.name in ("jit", "pjit", "closed_call"):
            found = _hash_outputs(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"], operands)
        else:
            types = [variable.aval for variable in eqn.outvars]
            operation = _hash(eqn.primitive.name, sorted(eqn.params.items()), types, *operands)
            found = [_hash(n, operation) for n in numbers]
        hashes |= zip(eqn.outvars, found, strict=True)
    return [*map(read, opened.outvars)]


def _hash(*parts: Any) -> bytes:
    text = _ADDRESS.sub("", repr([*map(str, parts)]))
    return hashlib.sha256(text.encode()).digest()
