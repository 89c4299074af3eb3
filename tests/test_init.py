"""The package's public names, and what importing it costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import clipo_ds


@pytest.mark.parametrize("name", [name for name in clipo_ds.__all__ if name != "__version__"])
def test_every_public_function_is_the_one_of_its_module(name):
    module = importlib.import_module(f"clipo_ds.{clipo_ds._HOME[name]}")
    assert getattr(clipo_ds, name) is getattr(module, name)
    assert name in dir(clipo_ds)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'clipo_ds' has no attribute 'policy_gain'"):
        _ = clipo_ds.policy_gain


def test_importing_the_package_loads_no_torch():
    code = "import sys, clipo_ds; clipo_ds.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
