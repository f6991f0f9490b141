"""Logits: what models do to them, their statistics, and the gradients of log-probs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mallowspo_cli.errors import ModelError
from mallowspo_cli.models import head_kernel
from mallowspo_cli.models.logits import LogitTransform, logit_gradients, row_statistics
from tests.models.families import GROUPED

ROWS, COLUMNS = 7, 19
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.3),
    LogitTransform(softcap=2.5),
    LogitTransform(scale=1.7, softcap=2.5),
]


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels have tests of their own."""
    monkeypatch.setattr(head_kernel, "HAS_TRITON", False)


def draw(dtype: torch.dtype = torch.float64, size: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Raw logits (n, V), targets (n,) and weights (n,)."""
    generator = torch.Generator().manual_seed(11)
    values = size * torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    targets = torch.randint(COLUMNS, (ROWS,), generator=generator)
    weights = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    return values.to(dtype), targets, weights.to(torch.promote_types(dtype, torch.float32))


def transformed(values: Tensor, transform: LogitTransform) -> Tensor:
    """By definition, out of place."""
    z = transform.scale * values
    return z if transform.softcap is None else transform.softcap * (z / transform.softcap).tanh()


def log_probs(values: Tensor, targets: Tensor, transform: LogitTransform) -> Tensor:
    logps = transformed(values, transform).log_softmax(dim=1)
    return logps.gather(1, targets[:, None]).squeeze(1)


def family(prefix: str, **options: Any) -> Any:
    """A tiny configuration."""
    return getattr(transformers, f"{prefix}Config")(**GROUPED, **options)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (lambda: family("Llama"), LogitTransform()),
        (lambda: family("Gemma2"), LogitTransform(softcap=30.0)),
        (lambda: family("Gemma2", final_logit_softcapping=5.0), LogitTransform(softcap=5.0)),
        (lambda: family("Gemma2", final_logit_softcapping=None), LogitTransform()),
        (lambda: family("Cohere"), LogitTransform(scale=0.0625)),
        (lambda: family("Cohere", logit_scale=0.3), LogitTransform(scale=0.3)),
        (lambda: family("Cohere2", logit_scale=0.3), LogitTransform(scale=0.3)),
        (lambda: family("Cohere", logit_scale=None), LogitTransform()),
        (lambda: family("Granite"), LogitTransform()),
        (lambda: family("Granite", logits_scaling=8.0), LogitTransform(scale=0.125)),
        (lambda: family("GraniteMoe", logits_scaling=8.0), LogitTransform(scale=0.125)),
        (lambda: family("FalconH1", lm_head_multiplier=0.5), LogitTransform(scale=0.5)),
        (lambda: transformers.RecurrentGemmaConfig(), LogitTransform(softcap=30.0)),
        (lambda: transformers.xLSTMConfig(), LogitTransform(softcap=30.0)),
    ],
)
def test_what_a_family_does_to_its_logits_is_read_from_its_configuration(
    config: Callable[[], Any], expected: LogitTransform
) -> None:
    assert LogitTransform.of(config()) == expected


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Cohere2", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 4.0}),
        ("GraniteMoe", {"logits_scaling": 4.0, "num_local_experts": 2}),
        ("NanoChat", {"final_logit_softcapping": 3.0}),
    ],
)
def test_the_transform_makes_a_models_logits_of_its_output_layers_result(
    prefix: str, options: dict[str, Any]
) -> None:
    """From `model(...)` itself, so that a family that changes its mind shows here."""
    config = family(prefix, **options)
    config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).double().eval()
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        expected = model(ids).logits
        raw = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
    assert (raw - expected).abs().max() > 1e-2
    found = LogitTransform.of(config)(raw, overwrite=False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logits_scaling", 4.0),
        ("logit_scale", 0.5),
        ("lm_head_multiplier", 0.5),
        ("output_multiplier", 0.5),
        ("output_multiplier_scale", 2.0),
    ],
)
def test_a_scale_of_a_family_of_which_it_is_not_known_how_it_acts_is_refused(
    key: str, value: float
) -> None:
    config = family("Llama")
    setattr(config, key, value)
    with pytest.raises(ModelError) as error:
        LogitTransform.of(config)
    assert str(error.value) == (
        f"models of type llama change their logits by {key}={value} in a way that is not supported."
    )
    for neutral in (None, 1, 1.0):
        setattr(config, key, neutral)
        assert LogitTransform.of(config) == LogitTransform()


@pytest.mark.parametrize(
    ("prefix", "options", "key"),
    [
        # Multiplies by what Granite divides by.
        ("HyperCLOVAX", {"logits_scaling": 8.0}, "logits_scaling"),
        # Divides hidden states, by a number that is not in its configuration's file.
        ("MiniCPM3", {}, "logits_scaling"),
        # Divides hidden states.
        ("InklingText", {}, "logits_mup_width_multiplier"),
    ],
)
def test_families_that_scale_in_another_way_are_refused(
    prefix: str, options: dict[str, Any], key: str
) -> None:
    kind = getattr(transformers, f"{prefix}Config", None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {prefix}")
    with pytest.raises(ModelError, match=rf"{key}=\S+ in a way that is not supported"):
        LogitTransform.of(kind(**options))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_transform_is_that_of_its_definition(transform: LogitTransform, overwrite: bool) -> None:
    values, _, _ = draw()
    expected = transformed(values.clone(), transform)
    torch.testing.assert_close(transform(values, overwrite), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_statistics_are_those_of_the_definition(
    transform: LogitTransform, products: bool, overwrite: bool
) -> None:
    values, targets, _ = draw()
    z = transformed(values.clone(), transform)
    found = row_statistics(values, targets, transform, products, overwrite)
    shifted = z - z.amax(dim=1, keepdim=True)
    close = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(found.maxima, z.amax(dim=1), **close)
    torch.testing.assert_close(found.sums, shifted.exp().sum(dim=1), **close)
    torch.testing.assert_close(found.targets, z.gather(1, targets[:, None]).squeeze(1), **close)
    logps = z.log_softmax(dim=1)
    torch.testing.assert_close(found.logps, logps.gather(1, targets[:, None]).squeeze(1), **close)
    if not products:
        assert found.products is None
        return
    torch.testing.assert_close(found.products, (shifted.exp() * shifted).sum(dim=1), **close)
    torch.testing.assert_close(found.entropies, -(logps.exp() * logps).sum(dim=1), **close)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_gradients_are_those_of_autograd(transform: LogitTransform, overwrite: bool) -> None:
    values, targets, weights = draw()
    leaf = values.clone().requires_grad_()
    log_probs(leaf, targets, transform).backward(weights)
    found = row_statistics(values, targets, transform, False, overwrite=False)
    gradient = logit_gradients(
        values, targets, found.maxima, found.sums, weights, transform, overwrite
    )
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_left_alone_unless_they_may_be_overwritten(
    dtype: torch.dtype, transform: LogitTransform
) -> None:
    values, targets, weights = draw(dtype)
    before = values.clone()
    transform(values, overwrite=False)
    found = row_statistics(values, targets, transform, True, overwrite=False)
    statistics = (targets, found.maxima, found.sums, weights, transform)
    gradient = logit_gradients(values, *statistics, overwrite=False)
    assert torch.equal(values, before)
    assert gradient.dtype == dtype
    # Gradients take the place of the logits where they may and are of the same type.
    again = logit_gradients(values, *statistics, overwrite=True)
    assert torch.equal(again, gradient)
    assert (again.data_ptr() == values.data_ptr()) == (dtype != torch.bfloat16)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_overwriting_statistics_make_no_second_tensor_of_their_size(
    transform: LogitTransform,
) -> None:
    values, targets, _ = draw(torch.float32)
    place, before = values.data_ptr(), values.clone()
    assert transform(values, overwrite=True).data_ptr() == place
    values.copy_(before)
    row_statistics(values, targets, transform, False, overwrite=True)
    assert not torch.equal(values, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_of_half_precision_are_in_float32(
    dtype: torch.dtype, transform: LogitTransform
) -> None:
    values, targets, weights = draw(dtype)
    exact = values.double().requires_grad_()
    expected = log_probs(exact, targets, transform)
    found = row_statistics(values, targets, transform, True, overwrite=False)
    assert {value.dtype for value in found} == {torch.float32}
    torch.testing.assert_close(found.logps.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    expected.backward(weights.double())
    gradient = logit_gradients(
        values, targets, found.maxima, found.sums, weights, transform, overwrite=True
    )
    # Half a unit in the last place, and what is lost where 1 - p is small.
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=rounding, atol=1e-5)


def test_a_sure_target_has_a_log_prob_of_exactly_zero() -> None:
    """The maximum and the sum are kept apart; a rounded log-sum-exp would not give 0."""
    values = torch.full((1, COLUMNS), -1e4)
    values[0, 3] = 1234.567
    found = row_statistics(values, torch.tensor([3]), LogitTransform(), True, overwrite=False)
    assert found.logps.item() == 0
    assert found.entropies.item() == 0


def test_a_word_that_is_shut_out_counts_for_nothing() -> None:
    values, targets, weights = draw()
    targets.fill_(2)
    shut_out = values.clone()
    shut_out[:, 5] = float("-inf")
    rest = [column for column in range(COLUMNS) if column != 5]
    found = row_statistics(shut_out, targets, LogitTransform(), True, overwrite=False)
    expected = row_statistics(values[:, rest], targets, LogitTransform(), True, overwrite=False)
    torch.testing.assert_close(found.logps, expected.logps)
    torch.testing.assert_close(found.entropies, expected.entropies)
    statistics = (targets, found.maxima, found.sums, weights, LogitTransform())
    gradient = logit_gradients(shut_out, *statistics, overwrite=False)
    assert not gradient[:, 5].any()
    assert torch.isfinite(gradient).all()


def test_the_kernels_get_what_they_take_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are there: float64 goes through torch, and logits that must stay are copied."""
    calls: list[tuple[Any, ...]] = []

    def statistics(*args: Any) -> str:
        calls.append(args)
        return "statistics"

    def gradients(place: Tensor, *args: Any) -> Tensor:
        calls.append((place, *args))
        return place

    monkeypatch.setattr(head_kernel, "available", lambda device: True)
    monkeypatch.setattr(head_kernel, "row_statistics", statistics)
    monkeypatch.setattr(head_kernel, "logits_to_gradients_", gradients)
    transform = LogitTransform(scale=0.5, softcap=2.0)
    values, targets, weights = draw(torch.float32)
    assert row_statistics(values, targets, transform, True, overwrite=True) == "statistics"
    assert calls[-1][0] is values
    assert calls[-1][2:] == (0.5, 2.0)
    options = (targets, weights.abs(), weights.abs(), weights, transform)
    assert logit_gradients(values, *options, overwrite=True) is values
    copied = logit_gradients(values, *options, overwrite=False)
    assert copied is not values
    assert torch.equal(copied, values)
    assert calls[-1][4] is weights
    assert calls[-1][5:] == (0.5, 2.0)
    seen = len(calls)
    exact, _, _ = draw(torch.float64)
    found = row_statistics(exact, targets, transform, True, overwrite=False)
    options = (targets, found.maxima, found.sums, weights.double(), transform)
    logit_gradients(exact, *options, overwrite=False)
    assert len(calls) == seen
