"""Does one bit pay? Compare a step of each method with a step that averages gradients.

    python -m signax.cost --parameters 8e9 --workers 4 --link 10gbit --step-time 500ms
    python -m signax.cost --parameters 1e9 --workers 4 --link 10gbit --step-time 300ms --buckets 8
    python -m signax.cost --parameters 124M --workers 8 --link 1gbit --step-time 1s --local-steps 8

`signax.diagnostics.exchange_seconds` gives the time of an exchange. All parameters count as one
array. A mean overlaps with the backward pass, which takes two thirds of the step's time. Other
exchanges begin when every gradient is known, or with --buckets of `signax.in_buckets` each begins
when an equal part of the backward pass has ended. With local steps nothing overlaps, and the time
and the bytes of an exchange are divided by the number of steps between two of them.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import NamedTuple

import jax

from signax._core.checks import check_count, check_number
from signax.diagnostics import exchange_seconds, wire_bytes

# Each method's scheme, and the dtype of its message where that is not the gradients'.
METHODS = {
    "f32 mean": ("mean", "float32"),
    "bf16 mean": ("mean", "bfloat16"),
    "vote (signum, lion, sign_sgd)": ("vote", None),
    "vote, agreement=True": ("agreement", None),
    'vote, zeros="abstain"': ("abstain", None),
    "mean of signs (ssdm)": ("mean_signs", None),
    "mean of scaled signs (ef_sign_sgd)": ("scaled_signs", None),
    "mean_quantized, 2 bits": ("quantized_2_bits", None),
    "mean_quantized, 4 bits": ("quantized_4_bits", None),
}
MEAN, VOTE = "bf16 mean", "vote (signum, lion, sign_sgd)"

_BACKWARD = 2 / 3  # of a step's time
_WORTH_IT = 1.1  # times that a step must become shorter
_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_COUNTS = {**_PREFIXES, "b": 1e9}
_RATES = {
    f"{prefix}{unit}": bits * factor
    for prefix, factor in _PREFIXES.items()
    for unit, bits in {"bit": 1.0, "bps": 1.0, "byte": 8.0}.items()
}
_RATE_UNITS = "bit, bps or byte with k, m, g or t before it, such as 10gbit"
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_SIZES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


class Cost(NamedTuple):
    """The cost of a step by one method, on one worker.

    Attributes:
      bytes_sent: bytes that a worker sends per step; with local steps an average.
      exchange: seconds of one exchange.
      step: seconds of a step with its share of the exchange; with local steps an average.
    """

    bytes_sent: float
    exchange: float
    step: float


def estimate(
    parameters: int,
    workers: int,
    link_rate: float,
    step_time: float,
    *,
    dtype: str = "float32",
    local_steps: int = 1,
    buckets: int = 1,
    latency: float = 50e-6,
    memory_bandwidth: float = 1e12,
) -> dict[str, Cost]:
    """Estimate the cost of a step by every method.

    Args:
      parameters: the number of parameters.
      workers: M, the number of workers.
      link_rate: bits per second that a worker sends while it receives at the same rate.
      step_time: seconds that a worker computes in a step.
      dtype: the dtype of gradients.
      local_steps: the number of steps between two exchanges.
      buckets: the number of buckets of every exchange but a mean, of equal sizes.
      latency: seconds of an empty collective among the workers.
      memory_bandwidth: bytes per second that a worker reads.

    Returns:
      For each name in `METHODS` the cost of a step.

    Raises:
      ValueError: a rate is not above 0, `latency` or `step_time` is below 0, or a count is below 1.
      TypeError: a count is not a whole number, or `step_time` is not a number.

    Examples:
      >>> from signax import cost
      >>> costs = cost.estimate(1_000_000_000, 4, link_rate=10e9, step_time=0.3)
      >>> for name in ("f32 mean", "bf16 mean", "vote (signum, lion, sign_sgd)"):
      ...     print(f"{name}: {costs[name].step:.2f} s")
      f32 mean: 4.90 s
      bf16 mean: 2.50 s
      vote (signum, lion, sign_sgd): 0.45 s
    """
    for name, value in {
        "parameters": parameters, "local_steps": local_steps, "buckets": buckets
    }.items():  # fmt: skip
        check_count(name, value)
    check_number("step_time", step_time, low=0)
    costs = {}
    for name, (scheme, message_dtype) in METHODS.items():
        number = 1 if scheme == "mean" else buckets
        bucket = jax.ShapeDtypeStruct((-(-parameters // number),), message_dtype or dtype)
        exchange = exchange_seconds(
            bucket,
            workers,
            link_rate=link_rate,
            scheme=scheme,
            latency=latency,
            memory_bandwidth=memory_bandwidth,
        )
        backward = step_time * _BACKWARD if local_steps == 1 else 0.0
        if scheme == "mean":
            waiting = max(0.0, exchange - backward)
        else:
            # The first bucket is ready after one part of the backward pass, the last at its end.
            waiting = max(exchange, number * exchange - backward * (number - 1) / number)
        costs[name] = Cost(
            bytes_sent=number * wire_bytes(bucket, workers, scheme=scheme) / local_steps,
            exchange=number * exchange,
            step=step_time + waiting / local_steps,
        )
    return costs


def recommend(costs: dict[str, Cost], step_time: float) -> str:
    """Recommend a method, with the reason.

    Args:
      costs: the costs that `estimate` returns.
      step_time: seconds that a worker computes in a step.

    Returns:
      One or two sentences.
    """
    mean, vote = costs[MEAN], costs[VOTE]
    faster = mean.step / vote.step
    if faster < _WORTH_IT:
        return (
            f"Average the gradients in bf16: a step takes {_seconds(mean.step)}, with a vote "
            f"{_seconds(vote.step)}. One bit does not pay here."
        )
    found = (
        f"Vote: a step takes {_seconds(vote.step)}, with a bf16 mean {_seconds(mean.step)}, "
        f"{faster:.1f} times as long."
    )
    waiting = (vote.step - step_time) / vote.step
    if waiting > 0.5:
        found += (
            f" The exchange is still {waiting:.0%} of a step: raise --buckets or --local-steps, or "
            "send less often with accumulate=."
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the costs of all methods and a recommendation, for a command line."""
    args = parse_arguments(arguments)
    costs = estimate(**vars(args))
    print(f"{'':36}{'bytes per step':>15}{'exchange':>12}{'step':>12}{'bf16 mean = 1':>16}")
    for name, cost in costs.items():
        print(
            f"{name:36}{_format(cost.bytes_sent, _SIZES, 4):>15}{_seconds(cost.exchange):>12}"
            f"{_seconds(cost.step):>12}{cost.step / costs[MEAN].step:>16.3f}"
        )
    print(f"\n{recommend(costs, args.step_time)}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check a command line: return the arguments of `estimate`."""
    parser = argparse.ArgumentParser(
        prog="python -m signax.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rate = _quantity("rate", _RATES, _RATE_UNITS)
    add, time = parser.add_argument, _quantity("time", _TIMES, "us, ms, s or min")
    add("--parameters", type=_count, required=True, metavar="N", help="such as 8e9, 124M or 8B")
    add("--workers", type=_count, required=True, metavar="M", help="at least 2")
    add(
        "--link",
        dest="link_rate",
        type=rate,
        required=True,
        metavar="RATE",
        help="of each worker: 10gbit, 1gbyte",
    )
    add("--step-time", type=time, required=True, metavar="TIME", help="of computing: 500ms, 2s")
    add("--dtype", choices=_DTYPES, default="f32", help="of gradients (default f32)")
    add("--local-steps", type=_count, default=1, metavar="H", help="per exchange (default 1)")
    add("--buckets", type=_count, default=1, metavar="B", help="of an exchange (default 1)")
    add(
        "--latency",
        type=time,
        default="50us",
        metavar="TIME",
        help="of an empty collective (default 50us)",
    )
    add(
        "--memory",
        dest="memory_bandwidth",
        type=rate,
        default="1tbyte",
        metavar="RATE",
        help="at which a worker reads its memory (default 1tbyte)",
    )
    args = parser.parse_args(arguments)
    if args.workers < 2:
        parser.error(f"--workers {args.workers} must be at least 2: one worker sends nothing")
    if not (args.link_rate and args.memory_bandwidth and args.step_time):
        parser.error("--link, --memory and --step-time must be above 0")
    if args.buckets > args.parameters:
        parser.error(f"--buckets {args.buckets} must be at most --parameters {args.parameters}")
    args.dtype = _DTYPES[args.dtype]
    args.memory_bandwidth /= 8  # bits to bytes
    return args


def _format(value: float, units: dict[str, float], digits: int = 3) -> str:
    """Write a value in the largest unit that is not above it."""
    unit = max(
        (unit for unit in units if units[unit] <= value), key=units.__getitem__, default=None
    )
    unit = unit or min(units, key=units.__getitem__)
    return f"{float(f'{value / units[unit]:.{digits}g}'):,.10g} {unit}"


def _seconds(value: float) -> str:
    return _format(value, {unit: _TIMES[unit] for unit in ("us", "ms", "s")})


def _quantity(kind: str, units: dict[str, float], names: str) -> Callable[[str], float]:
    """A parser of numbers with units, for argparse."""

    def parse(text: str) -> float:
        match = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)\s*([a-z]+)(?:/s)?", text.strip().lower())
        # In 10GBps the B stands for bytes, and in 10Gbps the b for bits.
        if match is None or match[2] not in units or re.search("B[Pp]", text):
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind}: write a number and {names}")
        try:
            value = float(match[1]) * units[match[2]]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{match[1]!r} in {text!r} is no number") from None
        if math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is too large a {kind}")
        return value

    return parse


def _count(text: str) -> int:
    """Parse a whole number such as 8e9, 124M or 8B, for argparse."""
    number = r"(\d{1,3}(?:,\d{3})+|[\d._]+(?:e\+?\d+)?)"
    match = re.fullmatch(number + r"\s*([kmgbt]?)", text.strip().lower())
    try:
        # Decimals, since the float 8.3 * 1e9 is no whole number.
        value = Decimal(match[1].replace(",", "")) * int(_COUNTS[match[2]]) if match else Decimal(0)
    except ArithmeticError:
        value = Decimal(0)
    if not (1 <= value <= 10**15 and value == int(value)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number from 1 to 1e15: write 8e9, 124M or 8B"
        )
    return int(value)


if __name__ == "__main__":
    main()
