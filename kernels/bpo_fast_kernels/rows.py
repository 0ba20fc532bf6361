"""The values that travel between the operators and the backends.

T rows, H hidden size, V vocabulary, N sequences. For row t with target y, logits z and a shift r (the target logit z_y
unless that would overflow):

    E_v = exp(z_v - r)      miss sum S' = sum over v != y of E_v      S = S' + exp(z_y - r)      logp = z_y - r - log S
    d logp / d z_v = -E_v / S for v != y, and S' / S at y, which never cancels where p_y is near 1
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Head:
    """An output head: z = cap(hidden @ weight.T) * scale.

    Attributes:
        weight: [V, H]. head matrix.
        scale: 1 / temperature.
        softcap: cap(z) = softcap * tanh(z / softcap), applied before the temperature; None for no cap.
    """

    weight: torch.Tensor
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Rows:
    """Rows that meet a head.

    Attributes:
        hidden: [T, H]. hidden states.
        targets: [T] int64. target ids.
        head: the head.
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    head: Head


@dataclass(frozen=True)
class RowStats:
    """What one pass over the logits leaves of a row; enough to rebuild its softmax from its logits.

    Attributes:
        token_logps: [T] float32. log-prob of the target in nats.
        shift: [T] float32. r above.
        inv_sum: [T] float32. 1 / S.
        push: [T] float32. S' / S = 1 - p(target), times the slope of the cap at the target's logit.
    """

    token_logps: torch.Tensor
    shift: torch.Tensor
    inv_sum: torch.Tensor
    push: torch.Tensor


@dataclass(frozen=True)
class Scored:
    """What `Backend.score` returns.

    Attributes:
        stats: the rows' statistics.
        unit_dx: [T, H] float32. d token_logp_t / d hidden_t, where it was formed.
        e: E times the slope of the cap, 0 at the target, where it was kept; laid out as the backend likes it.
        behavior_logps: [T] float32. token log-probs of the behavior rows, where there were any.
        e_in_dw: `WeightSums.total`, where the first rows of E lie in it and not in `e`.
    """

    stats: RowStats
    unit_dx: torch.Tensor | None = None
    e: Any = None
    behavior_logps: torch.Tensor | None = None
    e_in_dw: torch.Tensor | None = None


def row_factors(stats: RowStats, coefs: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """What E of a row is multiplied by in the gradients, and its target's row: kept E is 0 at the target.

    The target's part is as large as all others together. Apart from E it is never bfloat16: where few numbers make up
    dW, as with targets of tiny probability, the errors of rounding E, of rounding the factors and of rounding the
    result would not average out.
    """
    return (stats.inv_sum * coefs).mul_(-head.scale), (stats.push * coefs).mul_(head.scale)


@dataclass(frozen=True)
class LossSpec:
    """A loss by name with its two numbers."""

    loss: str
    beta: float
    label_smoothing: float


@dataclass
class WeightSums:
    """dW while calls of `kept_dw_` and `recompute_dw_` add to it.

    Attributes:
        total: [V, H]. float32 or the weight's type.
        begun: whether `total` holds a sum; before that a backend may keep E in it.
    """

    total: torch.Tensor
    begun: bool

    def result(self) -> torch.Tensor:
        """dW; zeros where nothing was added."""
        return self.total if self.begun else self.total.zero_()


class Backend(Protocol):
    """The passes over a head that every backend offers. FLOP in units of THV.

    Attributes:
        name: how the caller chose it.
        chunk_bytes: bytes of E behind one chunk of pairs, by default.
    """

    name: str
    chunk_bytes: int

    def release(self) -> None:
        """Gives back the memory that this thread's calls leave for the next one."""
        ...

    def score(
        self, rows: Rows, *, dx: bool, keep: bool, behavior: Rows | None = None, sums: WeightSums | None = None
    ) -> Scored:
        """Statistics, 2THV; `dx` adds 2THV for the gradient by hidden; `keep` keeps E.

        With both a backend may leave `unit_dx` out and have `kept_dx` called. `behavior` has the same targets; its rows
        keep nothing. `sums` may lend E its memory until E is added to it.
        """
        ...

    def kept_dx(self, scored: Scored, coefs: torch.Tensor, rows: Rows, *, zeros: bool) -> torch.Tensor:
        """2THV: coefs_t * d token_logp_t / d hidden_t from E, [T, H] float32.

        `zeros` says that rows with coefficient 0 are to be expected: their work is skipped.
        """
        ...

    def draw(
        self, hidden: torch.Tensor, head: Head, uniforms: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """2THV: `linear_draw`."""
        ...

    def dw_sums(self, weight: torch.Tensor, visits: int) -> WeightSums:
        """An empty sum [V, H] for so many calls of `kept_dw_` or `recompute_dw_`."""
        ...

    def free_rows(self, weight: torch.Tensor) -> int:
        """Rows of E that `dw_sums` of this trained weight can hold before its first sum."""
        ...

    def kept_dw_(self, sums: WeightSums, scored: Scored, coefs: torch.Tensor, rows: Rows, *, zeros: bool) -> None:
        """2THV: add the sum over rows of coefs_t * d token_logp_t / d weight. E may be gone then."""
        ...

    def recompute_dw_(self, sums: WeightSums, stats: RowStats, coefs: torch.Tensor, rows: Rows) -> None:
        """4THV: the same from the statistics alone."""
        ...

    def kept_bytes(self, num_rows: int, head: Head) -> int:
        """Bytes of E for so many rows."""
        ...

    def tile_bytes(self, num_rows: int, head: Head) -> int:
        """Bytes of a tile of logits and its E, where no E is kept of so many rows."""
        ...

    def sequence_sums(self, token_values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """[T] -> [N] float32, in a fixed order."""
        ...

    def pair_loss(
        self, policy_logps: torch.Tensor, ref_logps: torch.Tensor, lengths: torch.Tensor | None, spec: LossSpec
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss [P], margins [P], d loss_p / d policy_logps [2P]); `lengths` are there for ipo."""
        ...
