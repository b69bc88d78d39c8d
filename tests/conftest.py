"""Every test starts from the same seeds and leaves no global setting behind."""

import pytest
import torch
from hypothesis import HealthCheck, settings

from curvext import registry

torch.set_num_threads(1)  # small tensors, and the suite runs in several processes

settings.register_profile(
    "curvext", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("curvext")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    dtype, rules = torch.get_default_dtype(), dict(registry.RULES)
    yield
    if list(registry.RULES.items()) != list(rules.items()):  # some tests replace a rule
        registry.RULES.clear()
        registry.RULES.update(rules)
    assert torch.get_default_dtype() is dtype, "a test changed the default dtype"


@pytest.fixture
def float64():
    """Float64 as the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
