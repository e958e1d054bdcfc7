"""What holds for every test: checked signatures, and one thread of arithmetic."""

from __future__ import annotations

import os

# Before anything imports torch, and for the processes that tests start. Each worker of `make test` has about
# a core: threads that wait for each other beside other work take a hundred times as long. Who wants another
# number sets it, as `make test-portable` does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

from tests import checked  # noqa: F401  # the hook finds it in what is imported

# Before anything imports mechlens. Users run without it and pay nothing for the checks.
install_import_hook("mechlens", "tests.checked.once_checked")

pytest_plugins = ["tests.model_fixtures"]
