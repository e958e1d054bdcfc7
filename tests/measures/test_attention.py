"""Scores of attention patterns: known values, literal loops, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlens.measures import attention as measures
from mechlens.measures.attention import Mask, mask_score
from tests.reference import heads as reference

S = 5
N = 2 * S + 1


def uniform(n: int = N) -> torch.Tensor:
    return torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]


def attending(offset: int, n: int = N) -> torch.Tensor:
    """All attention `offset` positions back if there is such a position, else on the first."""
    pattern = torch.zeros(n, n)
    for dest in range(n):
        pattern[dest, max(0, dest - offset)] = 1
    return pattern


def random_pattern(*shape: int, n: int, seed: int = 0) -> torch.Tensor:
    scores = torch.randn(*shape, n, n, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


def score(pattern: torch.Tensor, mask: Mask) -> torch.Tensor:
    """`mask_score` of patterns with arbitrary leading axes."""
    flat = pattern.reshape(1, -1, *pattern.shape[-2:])
    return mask_score(flat, mask)[0].reshape(pattern.shape[:-2])


def copies(count: int, seq_len: int, bos: int, shift: int) -> Mask:
    return measures.copies_mask(bos + seq_len * torch.arange(count)[None], seq_len, shift)


MASKS = {
    "induction": copies(2, S, 1, 1),
    "duplicate": copies(2, S, 1, 0),
    "previous": measures.previous_token_mask(N),
    "first": measures.first_token_mask(N),
    "diagonal": measures.diagonal_mask(N, 1 - S),
}
# 1 / (dest + 1) at dest = 6 .. 10
UNIFORM_SECOND_COPY = (1 / 7 + 1 / 8 + 1 / 9 + 1 / 10 + 1 / 11) / 5
UNIFORM_ALL = sum(1 / (dest + 1) for dest in range(1, N)) / (N - 1)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (uniform(), {"induction": UNIFORM_SECOND_COPY, "duplicate": UNIFORM_SECOND_COPY}),
        (uniform(), {"previous": UNIFORM_ALL, "first": UNIFORM_ALL}),
        (attending(S - 1), {"induction": 1, "duplicate": 0, "previous": 1 / 10, "first": 4 / 10}),
        (attending(S), {"induction": 0, "duplicate": 1, "previous": 1 / 10, "first": 5 / 10}),
        (attending(1), {"induction": 0, "duplicate": 0, "previous": 1, "first": 1 / 10}),
        (torch.eye(N), {"induction": 0, "duplicate": 0, "previous": 0, "first": 0}),
        # the article's diagonal has S + 2 entries, two of which are not induction
        (attending(S - 1), {"diagonal": 1}),
    ],
)
def test_known_patterns_give_the_closed_form(pattern, expected):
    for name, value in expected.items():
        # float32 sums of ten terms
        assert float(score(pattern, MASKS[name])) == pytest.approx(value, abs=1e-6), name


def test_the_articles_diagonal_has_two_more_entries():
    pattern = attending(S - 1)
    pattern[S - 1], pattern[S] = 0, 0
    pattern[S - 1, 1], pattern[S, 2] = 1, 1  # no attention on the two entries before the second copy
    assert float(score(pattern, MASKS["diagonal"])) == pytest.approx(S / (S + 2), abs=1e-6)
    assert float(score(pattern, MASKS["induction"])) == 1


def test_a_perfect_head_scores_half_in_prefix_matching():
    """Attention is spread over the tokens after the earlier copies: 75 / 150 entries."""
    n = 1 + 4 * 25
    pattern = torch.zeros(n, n)
    pattern[:26, 0] = 1
    for copy in range(1, 4):
        for k in range(25):
            for earlier in range(copy):
                pattern[1 + copy * 25 + k, 1 + earlier * 25 + k + 1] = 1 / copy
    assert float(score(pattern, copies(4, 25, 1, 1))) == pytest.approx(0.5, abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(seq_len=st.integers(2, 7), bos=st.integers(0, 1), count=st.integers(2, 4), seed=st.integers(0, 2**31))
def test_every_score_equals_the_literal_loop(seq_len, bos, count, seed):
    two = random_pattern(2, 3, n=bos + 2 * seq_len, seed=seed)
    many = random_pattern(2, 3, n=bos + count * seq_len, seed=seed)
    got = {
        "induction": score(two, copies(2, seq_len, bos, 1)),
        "diagonal": score(two, measures.diagonal_mask(two.shape[-1], 1 - seq_len)),
        "duplicate": score(two, copies(2, seq_len, bos, 0)),
        "previous": score(two, measures.previous_token_mask(two.shape[-1])),
        "first": score(two, measures.first_token_mask(two.shape[-1])),
        "prefix": score(many, copies(count, seq_len, bos, 1)),
    }
    for row in range(2):
        for head in range(3):
            p, q = two[row, head], many[row, head]
            expected = {
                "induction": reference.induction(p, seq_len, bos),
                "diagonal": reference.induction_diagonal(p, seq_len),
                "duplicate": reference.duplicate(p, seq_len, bos),
                "previous": reference.previous(p),
                "first": reference.first(p),
                "prefix": reference.prefix_matching(q, seq_len, count, bos),
            }
            for name, value in expected.items():
                # float32 means of at most a few hundred entries below 1
                assert float(got[name][row, head]) == pytest.approx(value, abs=1e-6), name


def test_masks_of_a_text_known_by_hand():
    tokens = torch.tensor([[7, 1, 2, 1, 3, 1]])
    assert entries(measures.duplicate_token_mask(tokens)) == [(3, 1), (5, 1), (5, 3)]
    # after the earlier 1s come 2 (position 2) and 3 (position 4)
    assert entries(measures.induction_mask(tokens)) == [(3, 2), (5, 2), (5, 4)]
    # A A: the token after the first A is the query position itself, which is not induction
    assert entries(measures.induction_mask(torch.tensor([[4, 4]]))) == []


def entries(mask: Mask) -> list[tuple[int, int]]:
    return list(zip(mask.dest[0].tolist(), mask.src[0].tolist(), strict=True))


def test_rows_with_different_numbers_of_entries():
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[0, 3, 0] = mask[0, 3, 2] = mask[1, 2, 1] = True
    pattern = random_pattern(3, 2, n=4)
    score = mask_score(pattern, Mask.of(mask))
    for head in range(2):
        expected = (pattern[0, head, 3, 0] + pattern[0, head, 3, 2]) / 2
        assert float(score[0, head]) == pytest.approx(float(expected), abs=1e-7)
        assert float(score[1, head]) == pytest.approx(float(pattern[1, head, 2, 1]), abs=1e-7)
    assert score[2].isnan().all(), "a row without entries has no score"


def test_the_null_of_positions_is_the_mean_over_shuffles():
    mask = measures.previous_token_mask(4)
    assert measures.uniform_attention(mask) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


def test_copying_score_by_hand():
    # two sources, three sample tokens; source 0 raises its own token by 3 and token 1 by 1 over the mean
    contribution = torch.tensor([[4.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
    mean = torch.tensor([1.0, 1.0])
    own = torch.tensor([0, 1])
    only_first = measures.copying_score(contribution, mean, torch.tensor([1.0, 0.0]), own)
    assert float(only_first) == pytest.approx(2 * 3 / 4 - 1)
    # source 1 raises only token 2, never its own
    only_second = measures.copying_score(contribution, mean, torch.tensor([0.0, 1.0]), own)
    assert float(only_second) == -1
    both = measures.copying_score(contribution, mean, torch.tensor([3.0, 1.0]), own)
    assert float(both) == pytest.approx(2 * (3 * 0.75) / 4 - 1)
    nothing = measures.copying_score(-contribution.abs(), mean, torch.tensor([1.0, 1.0]), own)
    assert nothing.isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measures.previous_token_mask(1), "at least 2 positions, but there is 1"),
        (lambda: measures.copies_mask(torch.tensor([[1]]), 3, 1), "at least twice, but there is 1 copy"),
        (lambda: measures.diagonal_mask(3, 1), "diagonals -2 to 0, not 1"),
        (lambda: Mask.of(torch.ones(2, 2).bool()), "src must not come after dest"),
        (
            lambda: mask_score(uniform(3)[None, None], measures.previous_token_mask(5)),
            r"reaches \(4, 3\), but the pattern has 3 x 3",
        ),
        (
            lambda: mask_score(
                uniform(3).expand(4, 1, 3, 3), Mask(torch.zeros(2, 1).long(), torch.zeros(2, 1).long())
            ),
            "has 2 rows, but the pattern has 4",
        ),
    ],
)
def test_errors_state_what_was_needed_and_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()
