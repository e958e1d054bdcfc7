"""The type checker of the import hook in conftest.py."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# An int where a float is wanted is right, as every static checker has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
