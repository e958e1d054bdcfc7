"""A label names one token and is accepted as input."""

from __future__ import annotations

import pytest
import torch

from mechlens.models.load.loading import load_model
from mechlens.text.tokens import target_id, token_strings
from tests.shared import STORIES, needs_shared
from tests.tiny_models import KINDS


def all_labels(model) -> tuple[str, ...]:
    return token_strings(model, torch.arange(model.cfg.d_vocab))


@pytest.mark.parametrize(
    "name", ["bundled", *KINDS, pytest.param(STORIES, id="stories260K", marks=needs_shared)]
)
def test_labels_differ_and_name_their_tokens(name, load_once, tiny_directories):
    model = (
        load_once() if name == "bundled" else load_once(tiny_directories / name if name in KINDS else name)
    )
    labels = all_labels(model)
    assert len(set(labels)) == len(labels)
    told = len(model.tokenizer)
    assert [target_id(model, label) for label in labels[:told]] == list(range(told))
    # ids beyond the tokenizer's last are numbers in brackets, which are also accepted
    assert [target_id(model, label) for label in labels[told:]] == list(range(told, len(labels)))


@needs_shared
@pytest.mark.parametrize("text", [" a", "a", "ed", " the"])
def test_a_leading_space_makes_another_token(stories260k, text):
    """Decoded on its own, a Llama token loses its space."""
    found = target_id(stories260k, text)
    piece = stories260k.tokenizer.convert_ids_to_tokens(found)
    assert piece == text.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")


def test_a_target_of_several_tokens_shows_them_and_suggests_another(bundled):
    with pytest.raises(ValueError, match=r"the target 'xqz' is \d tokens, not one: \["):
        target_id(bundled, "xqz")
    ids = {label: token for token, label in enumerate(all_labels(bundled))}
    words = (label for label in ids if label.startswith(" ") and label[1:].isalpha())
    one = next(word for word in words if word[1:] not in ids)
    with pytest.raises(ValueError, match=f"did you mean '{one}', which is one\\?"):
        target_id(bundled, one[1:])


def test_a_lone_surrogate_is_an_error(tiny_directories):
    with pytest.raises(ValueError, match=r"the target is not text: character 1 is '\\udcff'"):
        target_id(load_model(tiny_directories / "gpt2"), "a\udcff")
