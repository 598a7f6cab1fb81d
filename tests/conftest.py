"""Eight simulated devices for every test, and dtypes that never mix by accident."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def mesh():
    """Eight workers along "data"."""
    return jax.make_mesh((8,), ("data",))
