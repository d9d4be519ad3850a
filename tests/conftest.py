"""What all tests share: repeatable draws, a fresh Dynamo, and no unexpected warnings of ours."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# The suite runs on the CPU engine, whatever a measurement on a busy machine would choose, and
# away from the user's cache. Tests of the choice itself say otherwise.
ON_GPU = torch.cuda.is_available()
os.environ["SLOPE_FX_ENGINES"] = "cpu,triton" if ON_GPU else "cpu"
os.environ["SLOPE_FX_CACHE_DIR"] = str(Path(__file__).parent.parent / "build" / "cache")

# Triton's kernels run in its interpreter where there is no GPU. They see this when they are
# imported; the tests of what the compiler makes of them run in processes without it.
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "explore", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)
def pytest_warning_recorded(warning_message):
    """Send warnings between the processes of pytest-xdist as plain UserWarnings.

    Its main process imports the module of a warning's class, in a thread for each worker. An import
    of slope_fx there, beside another one, has ended a run: the thread's error counts as a crash of
    the worker, whose next report then has no place.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        text = f"{warning_message.category.__name__}: {warning_message.message}"
        warning_message.message, warning_message.category = UserWarning(text), UserWarning


@pytest.fixture(autouse=True)
def _fresh_torch():
    """Each test starts with the same random state and nothing compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks():
    """Runs a function on several processes: ``ranks.run(2, function, *arguments)``."""
    from ranks import Ranks

    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def backend():
    """The rewriting backend over ``aot_eager``, its count of compiled graphs at zero."""
    import slope_fx

    backend = slope_fx.rewriting_backend("aot_eager")
    backend.graphs = 0
    return backend
