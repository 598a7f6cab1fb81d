"""Sixteen simulated devices for every test, a mesh of eight workers, and the mark `thorough`."""

import hypothesis
import jax
import pytest
import tiers
from jax.sharding import AxisType

jax.config.update("jax_num_cpu_devices", 16)

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items):
    for item in items:
        module, name = item.path.stem, getattr(item, "originalname", item.name)
        if name.removeprefix("test_") in tiers.THOROUGH.get(module, ()):
            item.add_marker(pytest.mark.thorough)


@pytest.fixture(scope="session")
def mesh():
    """Eight workers along "data"."""
    devices = jax.devices()[:8]
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
