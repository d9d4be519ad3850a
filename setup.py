"""Which packages there are: slope_fx, and as its subpackages the three rooms beside it.

All else about the distribution is in pyproject.toml.
"""

from setuptools import find_packages, setup

ROOMS = ("passes", "ops", "kernels")
IN_ROOMS = [pattern for room in ROOMS for pattern in (room, f"{room}.*")]

setup(
    packages=[
        "slope_fx",
        # In a checkout slope_fx/ has links to the rooms, in an sdist it has none.
        *(f"slope_fx.{name}" for name in find_packages("slope_fx", exclude=IN_ROOMS)),
        *(f"slope_fx.{name}" for name in find_packages(".", include=IN_ROOMS)),
    ],
    package_dir={f"slope_fx.{room}": room for room in ROOMS},
)
