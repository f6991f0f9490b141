"""Pure link functions log g(s): the probability that the central ranking's winner wins.

`s` is the gap (beta times the log-ratio difference; positive when the chosen response is ahead),
`theta = -log phi(x) >= 0` the neg-log dispersion. Everything is elementwise, in the dtype given
(float32 or float64; 16-bit input is refused: at a log-prob of -300, bfloat16 resolves whole nats).

The Kendall link has a removable 0/0 at s = 0, where every pair of a run starts, and cancels badly
for small theta; the forms below do neither. With u = |t| - 1/2 and q(u) = u / (e^(theta u) - 1),

    1 - G(|t|) = q(u) - q(u + 1)                                      smooth form, centred at 0
    1 - g(|s|) = 1 - G(|s| + 1/2)                                     the paper's link ("exact")
"""

from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

# B_2k / (2k)!, k = 1..7: the Taylor coefficients of x / (e^x - 1) beyond 1 - x/2. With seven of
# them and theta (|t| + 1/2) < 1/2 the first term left out is below 2e-16.
_SERIES: Final = (
    1 / 12,
    -1 / 720,
    1 / 30240,
    -1 / 1209600,
    1 / 47900160,
    -691 / 1307674368000,
    1 / 74724249600,
)
_SERIES_BELOW: Final = 0.5


def logistic_log_link(s: Tensor, theta: Tensor) -> Tensor:
    """log sigma(2 theta s), the Mallows-theta link (Spearman's rho); theta = 1/2 is Bradley-Terry.

    Shapes: s and theta of one shape, typically (B,). Raises TypeError for 16-bit input.
    Source: MallowsPO (arXiv 2405.14953); the method notes of this project, 1.2.
    """
    refuse_half_precision(s)
    return functional.logsigmoid(2 * theta * s)


def kendall_log_link(
    s: Tensor, theta: Tensor, form: Literal["exact", "smooth"] = "exact"
) -> Tensor:
    """log g(s), the Mallows-phi link (Kendall's tau); differentiable in s and theta.

    Shapes: s and theta of one shape, typically (B,). Raises TypeError for 16-bit input, ValueError
    for another form.

    "exact" is the paper's link, which jumps at s = 0; s = 0 is read as 0+ (value and slope).
    "smooth" (derived) is the sigmoid G with g(s) = G(s + sgn(s)/2): infinitely smooth, G(0) = 1/2.
    Both satisfy g(s) + g(-s) = 1, tend to 1/2 as theta -> 0 (theta = 0 included) and, for large
    negative s, have slope theta (the logistic link has 2 theta).
    """
    return kendall_log_links(s, theta, form)[0]


def kendall_log_links(
    s: Tensor, theta: Tensor, form: Literal["exact", "smooth"] = "exact"
) -> tuple[Tensor, Tensor]:
    """(log g(s), log(1 - g(s))): the label as given and the flipped label, for label smoothing.

    At s = 0 the exact form takes both from the same side, g(0+) and g(0-) = 1 - g(0+), so that
    the two probabilities add to 1; calling `kendall_log_link(-s)` there would give g(0+) twice.
    """
    refuse_half_precision(s)
    if form not in ("exact", "smooth"):
        raise ValueError(f"expected the form exact or smooth, found {form!r}")
    ahead = s >= 0
    # Not s.abs(): its gradient at 0 is 0, and every pair starts at s = 0.
    distance = torch.where(ahead, s, -s)
    log_loser = _log_tail(distance + 0.5 if form == "exact" else distance, theta)
    log_winner = torch.log1p(-log_loser.exp())
    return torch.where(ahead, log_winner, log_loser), torch.where(ahead, log_loser, log_winner)


def refuse_half_precision(values: Tensor) -> None:
    """Raise TypeError unless `values` is float32 or float64."""
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"expected float32 or float64, found {values.dtype}: upcast before summing")


def _log_tail(centre: Tensor, theta: Tensor) -> Tensor:
    """log(1 - G(centre)) for centre >= 0 (derived; the method notes, 1.5).

    Each branch sees harmless values where it is not used: a NaN or inf there would reach the
    gradient through `where` as 0 * inf.
    """
    near = theta * (centre + 0.5) < _SERIES_BELOW
    series = _tail_by_series(centre, torch.where(near, theta, 0.0))
    closed = _log_tail_closed(torch.where(near, 1.0, centre), torch.where(near, 1.0, theta))
    return torch.where(near, series.log(), closed)


def _tail_by_series(centre: Tensor, theta: Tensor) -> Tensor:
    """1 - G(centre) = 1/2 - sum_k B_2k/(2k)! theta^(2k-1) (above^2k - below^2k), above = below + 1.

    The difference of powers is built as (above^2 - below^2) times the sum of mixed products, so
    nothing cancels; above^2 - below^2 = 2 centre.
    """
    above = (theta * (centre + 0.5)) ** 2
    below = (theta * (centre - 0.5)) ** 2
    mixed, power = torch.ones_like(above), torch.ones_like(above)
    total = _SERIES[0] * mixed
    for coefficient in _SERIES[1:]:
        power = power * below
        mixed = mixed * above + power
        total = total + coefficient * mixed
    return 0.5 - 2 * theta * centre * total


def _log_tail_closed(centre: Tensor, theta: Tensor) -> Tensor:
    """log(1 - G(centre)) where theta (centre + 1/2) is not small.

    q(u) - q(u + 1), written with p(u) = u / (1 - e^(-theta u)) so that no two large numbers are
    subtracted whatever theta is:

        u >= 0:  e^(-theta u) (p(u) (1 - e^-theta) - e^-theta) / (1 - e^(-theta (u + 1)))
        u <  0:  (p(-u) (1 - e^-theta) - e^(-theta (u + 1))) / (1 - e^(-theta (u + 1)))

    The second is the first with e^(-theta u) > 1 taken inside, which cannot overflow.
    """
    u = centre - 0.5
    positive = u >= 0
    ahead, behind = torch.where(positive, u, 0.0), torch.where(positive, 0.0, u)
    pull = _p(ahead - behind, theta) * -torch.expm1(-theta) - torch.exp(-theta * (1 + behind))
    return pull.log() - theta * ahead - torch.log(-torch.expm1(-theta * (u + 1)))


def _p(u: Tensor, theta: Tensor) -> Tensor:
    """u / (1 - e^(-theta u)) for u >= 0 and theta > 0; 1 / theta at u = 0."""
    x = theta * u
    tiny = x < 1e-3
    safe = torch.where(tiny, 1.0, x)
    # The term left out, x^4 / 720, is below 2e-15.
    ratio = torch.where(tiny, 1 + x / 2 + x**2 / 12, safe / -torch.expm1(-safe))
    return ratio / theta
