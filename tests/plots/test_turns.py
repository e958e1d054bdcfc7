"""How figures mark the turns of a conversation and their roles."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mechlens.plots.attribution import plot_attribution
from mechlens.plots.heads import plot_attention, plot_attention_heatmap
from mechlens.plots.logit_lens import plot_logit_lens
from mechlens.plots.patching import plot_patch_grid
from mechlens.show.section import section
from mechlens.show.terminal import print_section
from mechlens.text.display import turns
from tests import examples
from tests.examples import attribution

CHAT = ("<|im_start|>", "user", "\n", "Hi", "<|im_end|>", "\n", "<|im_start|>", "ass", "istant", "\n")


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (CHAT, {0: "user", 6: "assistant"}),
        (("<s>", "<|user|>", "\n", "Hi", "<|end|>", "<|assistant|>"), {1: "user", 5: "assistant"}),
        (("<bos>", "<start_of_turn>", "model", "\n"), {1: "model"}),
        (("<|start_header_id|>", "system", "<|end_header_id|>", "\n\n"), {0: "system"}),
        (("<s>", "[INST]", " Hi", "[/INST]"), {1: "user", 3: "assistant"}),
        # not conversations: BOS and text about a user, markup, a role without an end
        (("<|im_start|>", "user", " guide", "\n"), {}),
        (("<|im_start|>", "user"), {}),
        (("a < b", "user", "\n"), {}),
        ((" user", "\n", "<|endoftext|>", "The", "\n"), {}),
        ((), {}),
    ],
)
def test_turns_begin_with_a_special_token_and_a_role(tokens, found):
    assert turns(tokens) == found


def test_attention_names_the_roles_and_separates_the_turns():
    patterns = examples.attention(tokens=CHAT)
    figure = plot_attention_heatmap(patterns, 0)
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        labels = dict(zip(axis.tickvals, axis.ticktext, strict=True))
        assert labels[0] == "<b>user</b> &lt;|im_start|&gt;"
        assert labels[6] == "<b>assistant</b> &lt;|im_start|&gt;"
        assert labels[1] == "user"
    assert [(shape.x0, shape.y0) for shape in figure.layout.shapes] == [(5.5, 0), (0, 5.5)]
    shown = plot_attention(patterns).props["tokens"]
    assert [shown[0], shown[1], shown[6]] == ["user: <|im_start|>", "user", "assistant: <|im_start|>"]
    assert not plot_attention_heatmap(examples.attention()).layout.shapes


def test_turns_keep_their_labels_when_others_have_no_room():
    tokens = ("<s>", *["a"] * 100, "<|user|>", *["a"] * 100)
    axis = plot_attention_heatmap(examples.attention(tokens=tokens)).layout.xaxis
    assert "<b>user</b> &lt;|user|&gt;" in axis.ticktext
    assert 101 in axis.tickvals
    gaps = [right - left for left, right in zip(axis.tickvals, axis.tickvals[1:], strict=False)]
    assert min(gaps) >= 6, "no two of 202 positions are closer than a label is high"


def test_the_lens_names_the_roles_and_separates_the_turns():
    result = examples.lens()
    strings = dict(result.strings) | {"0": "<|user|>", "2": "<|assistant|>"}
    chat = dataclasses.replace(result, strings=strings)
    figure = plot_logit_lens(chat, "kl_final")
    assert [text.split("<br>")[1:] for text in figure.layout.xaxis.ticktext] == [
        ["<b>user</b>"],
        [],
        ["<b>assistant</b>"],
    ]
    assert [shape.x0 for shape in figure.layout.shapes] == [1.5]
    # the drawn part begins in the middle of a turn
    figure = plot_logit_lens(chat, "kl_final", positions=[1, 2])
    assert [text.split("<br>")[1:] for text in figure.layout.xaxis.ticktext] == [
        ["<b>user</b>"],
        ["<b>assistant</b>"],
    ]
    assert torch.equal(chat.tokens, result.tokens)
    assert not plot_logit_lens(result, "kl_final").layout.shapes


def test_an_attribution_names_the_role():
    result = attribution()
    assert "(position 1)" in plot_attribution(result).layout.title.text
    chat = dataclasses.replace(result, strings=dict(result.strings) | {"0": "<|assistant|>"})
    assert "(position 1, turn of the assistant)" in plot_attribution(chat).layout.title.text


def test_a_patch_grid_names_the_roles():
    result = examples.patch_grid()
    assert not any("<b>" in label for label in plot_patch_grid(result).layout.xaxis.ticktext)
    # positions 1 to 3 are patched
    chat = dataclasses.replace(result, strings=("<s>", "<|user|>", "a", "a"))
    labels = plot_patch_grid(chat).layout.xaxis.ticktext
    assert list(labels) == ["<b>user</b> &lt;|user|&gt;", "a", "a"]


def test_the_terminal_names_the_roles(capsys):
    print_section(section(examples.attention(tokens=CHAT)))
    out = capsys.readouterr().out
    assert "user: <|im_start|>" in out
    assert "assistant: <|im_start|>" in out
