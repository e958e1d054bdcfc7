"""The JSON output is strictly valid."""

from __future__ import annotations

import json
import math

from mechlens.show.terminal import print_json


def test_json_has_neither_nan_nor_infinity(capsys):
    print_json({"cells": [{"kl": math.nan, "log_prob": -math.inf, "rank": 1.0}]})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {"cells": [{"kl": None, "log_prob": None, "rank": 1.0}]}
