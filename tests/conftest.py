"""What holds for every test: checked signatures, and no more threads than a small machine has."""

from __future__ import annotations

from jaxtyping import install_import_hook

from tests import checked  # noqa: F401  # the hook finds it in what is imported

# Before anything imports mechlens. Users run without it and pay nothing for the checks.
install_import_hook("mechlens", "tests.checked.checked")

import torch  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))

pytest_plugins = ["tests.model_fixtures"]
