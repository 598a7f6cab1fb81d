"""Sixteen simulated devices for every test, a mesh of eight workers, and the marks of tiers.py."""

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
        name = name.removeprefix("test_")
        if item.get_closest_marker("thorough") and name not in tiers.FURTHER_CASES.get(module, ()):
            raise pytest.UsageError(f"FURTHER_CASES of tests/tiers.py lacks {name} of {module}")
        for mark, table in {"thorough": tiers.THOROUGH, "slow": tiers.SLOW}.items():
            if name in table.get(module, ()):
                item.add_marker(mark)
    items.sort(key=lambda item: item.path.stem != "test_notebooks")  # they take longest


@pytest.fixture(scope="session")
def mesh():
    """Eight workers along "data"."""
    devices = jax.devices()[:8]
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
