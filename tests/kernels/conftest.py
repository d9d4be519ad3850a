"""Fixtures of the tests of engines that keep operands."""

import pytest

import fake_cusparselt as fake
from slope_fx.kernels import racing


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """The engine with the stand-in, chosen for everything, keeping all that it may."""
    monkeypatch.setenv("SLOPE_FX_ENGINES", "cusparselt")
    monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", "1")
    monkeypatch.setenv("SLOPE_FX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(racing, "_SECONDS", 0.0)
    monkeypatch.setattr(racing, "_QUIET", float("inf"))
    racing.forget_disk()
    with fake.installed(monkeypatch) as engine:
        yield engine
    racing.forget_disk()


@pytest.fixture
def thrifty(engine, monkeypatch):
    """The engine as it is without a word from the environment."""
    monkeypatch.delenv("SLOPE_FX_KEEP_OPERANDS")
    return engine
