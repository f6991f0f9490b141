"""log sum_v p_v^2 of next-token distributions: values, no gradient, and what it leaves alone."""

import pytest
import torch
from torch import Tensor, nn

from mallowspo_cli.models import head as head_module
from mallowspo_cli.models.head import LogprobHead
from mallowspo_cli.models.logits import LogitTransform, log_collisions, row_statistics

ROWS, WIDTH, WORDS = 11, 6, 23
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.4),
    LogitTransform(softcap=2.0),
    LogitTransform(scale=1.5, softcap=2.0),
]


def made(transform: LogitTransform, dtype: torch.dtype) -> tuple[LogprobHead, Tensor, Tensor]:
    """A head, hidden states (N, d) and targets (N,)."""
    generator = torch.Generator().manual_seed(5)
    head = LogprobHead(WIDTH, WORDS, dtype=dtype)
    head.transform = transform
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    return head, hidden, torch.randint(WORDS, (ROWS,), generator=generator)


def by_definition(logits: Tensor, transform: LogitTransform) -> Tensor:
    """log sum_v p_v^2, (N,), from all logits in float64."""
    z = transform.scale * logits.double()
    if transform.softcap is not None:
        z = transform.softcap * (z / transform.softcap).tanh()
    return z.softmax(dim=1).square().sum(dim=1).log()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("chunk_rows", "kept_rows"), [(1, 0), (3, 4), (4, 11), (512, 11)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_chunked_values_are_those_of_all_logits_and_leave_the_rest_as_it_is(
    chunk_rows: int,
    kept_rows: int,
    frozen: bool,
    transform: LogitTransform,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": dtype.itemsize * WORDS * chunk_rows})
    monkeypatch.setattr(head_module, "KEPT_BYTES", {"cpu": dtype.itemsize * WORDS * kept_rows})
    head, hidden, targets = made(transform, dtype)
    head.requires_grad_(not frozen)
    leaves = [hidden] if frozen else [hidden, *head.parameters()]
    found = head(hidden, targets, entropy=True, collision=True)
    expected = by_definition(nn.functional.linear(hidden, head.weight, head.bias), transform)
    torch.testing.assert_close(found.log_collisions.double(), expected, rtol=0, atol=tolerance)
    assert found.log_collisions.dtype == dtype
    assert not found.log_collisions.requires_grad

    plain = head(hidden, targets, entropy=True)
    assert plain.log_collisions is None
    assert torch.equal(found.logps, plain.logps)
    assert torch.equal(found.entropies, plain.entropies)
    for one, other in zip(
        torch.autograd.grad(found.logps.sum(), leaves),
        torch.autograd.grad(plain.logps.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_uniform_row_has_minus_log_v_and_a_certain_one_zero() -> None:
    logits = torch.zeros(3, WORDS)
    logits[1, 4], logits[2, 1:] = 1e4, -torch.inf
    found = row_statistics(
        logits, torch.zeros(3, dtype=torch.long), TRANSFORMS[0], products=False, overwrite=False
    )
    values = log_collisions(logits, found, TRANSFORMS[0], overwrite=False)
    torch.testing.assert_close(values, torch.tensor([1 / WORDS, 1.0, 1.0]).log())


@pytest.mark.parametrize("overwrite", [False, True])
def test_logits_are_scratch_space_only_where_they_may_be(overwrite: bool) -> None:
    logits = torch.randn(ROWS, WORDS, generator=torch.Generator().manual_seed(0))
    before, targets = logits.clone(), torch.zeros(ROWS, dtype=torch.long)
    found = row_statistics(logits, targets, TRANSFORMS[3], products=False, overwrite=False)
    values = log_collisions(logits, found, TRANSFORMS[3], overwrite)
    torch.testing.assert_close(values.double(), by_definition(before, TRANSFORMS[3]))
    assert torch.equal(logits, before) != overwrite
