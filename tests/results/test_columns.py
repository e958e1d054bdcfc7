"""How column values are written and results displayed."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from mechlens.results.columns import Column
from tests import examples


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (math.nan, "—"),
        (True, "yes"),
        (1234, "1,234"),
        (np.int64(7), "7"),
        (-0.12345, "\N{MINUS SIGN}0.123"),
        (np.float32(2.0), "2.000"),
        ("L3H5", "L3H5"),
    ],
)
def test_a_value_is_written_for_readers(value, text):
    assert Column("x").text(value) == text


def test_a_column_has_its_digits_its_sign_and_its_unit():
    column = Column("effect", "change of the loss", "nats", digits=1, signed=True)
    assert column.text(0.25) == "+0.2"
    assert column.heading == "change of the loss, nats"
    assert Column("standard_error").heading == "standard error"


def test_jupyter_shows_a_results_summary_rows_with_their_titles():
    found = examples.attention_spread(4, 3)
    page = found._repr_html_()
    assert page.startswith("<p><b>Attention spread of")
    assert "<th>entropy, nats</th>" in page
    assert page.count("<tr>") == 1 + len(found.summary())
    assert f"{len(found.summary())} of 12 rows" in page


def test_texts_of_a_result_are_escaped_where_jupyter_shows_them():
    found = examples.attention_spread(1, 1)
    named = dataclasses.replace(found, model=dataclasses.replace(found.model, name="<b>x"))
    assert "<b>x" not in named._repr_html_()


def test_json_has_every_argument_and_row_but_no_tensors():
    found = examples.attention_spread(2, 3)
    made = json.loads(json.dumps(found.to_json()))
    assert made["model"]["name"] == found.model.name
    assert made["prepend_bos"] is True
    assert "values" not in made
    assert torch.tensor([row["entropy"] for row in made["rows"]]).allclose(found.of("entropy").flatten())
