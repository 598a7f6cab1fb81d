"""Nine simulated devices for every test: one more than the workers of the mesh, for odd counts."""

import jax
import pytest
from jax.sharding import AxisType

jax.config.update("jax_num_cpu_devices", 9)


@pytest.fixture(scope="session")
def mesh():
    """Eight workers along "data"."""
    devices = jax.devices()[:8]
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
