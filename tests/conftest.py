"""Sixteen simulated devices for every test, and a mesh of eight workers."""

import hypothesis
import jax
import pytest
from jax.sharding import AxisType

jax.config.update("jax_num_cpu_devices", 16)

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="session")
def mesh():
    """Eight workers along "data"."""
    devices = jax.devices()[:8]
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
