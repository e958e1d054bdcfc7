"""Setup for every test: checked signatures and one compute thread."""

from __future__ import annotations

import os

# Before anything imports torch, and inherited by processes that tests start. Each worker of `make test` has
# about one core, where threads that wait for each other can take a hundred times as long. Set the variable
# for another number, as `make test-portable` does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

from tests import checked  # noqa: F401  # the import hook needs it

# Before anything imports mechlens. Users run without these checks.
install_import_hook("mechlens", "tests.checked.once_checked")

pytest_plugins = ["tests.model_fixtures"]
