"""What holds for every test: checked signatures, and no more threads than a small machine has."""

from __future__ import annotations

from jaxtyping import install_import_hook

# Before anything imports mechlens. Users run without it and pay nothing for the checks.
install_import_hook("mechlens", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(2)
