"""Points fla's test files at our kernels, from the repository root of gdn2-eval, with fla installed:

    python -m pytest -p tests.peer_fla.plugin PATH/TO/fla/tests/ops/test_gdn2.py PATH/TO/fla/tests/ops/test_kda.py

The functions are replaced in the modules fla's tests import them from, before any test file is read.
"""

from importlib import import_module

import pytest

from tests.peer_fla.adapter import REPLACED


def pytest_configure(config: pytest.Config) -> None:
    for module, functions in REPLACED.items():
        for function in functions:
            setattr(import_module(module), function.__name__, function)
