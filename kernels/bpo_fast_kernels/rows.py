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
class RowStats:
    """What one pass over the logits leaves of a row; enough to rebuild its softmax from its logits.

    Attributes:
        token_logps: [T] float32. log-prob of the target in nats.
        shift: [T] float32. r above.
        inv_sum: [T] float32. 1 / S.
        miss: [T] float32. S' / S = 1 - p(target).
    """

    token_logps: torch.Tensor
    shift: torch.Tensor
    inv_sum: torch.Tensor
    miss: torch.Tensor


@dataclass(frozen=True)
class Kept:
    """Rows whose E was kept for a backward pass; `e` is laid out as its backend likes it.

    Attributes:
        e: E times the derivative of the cap; the target's entry is -S' times that derivative.
        stats: the rows' statistics.
        unit_dx: [T, H] float32. d token_logp_t / d hidden_t, where the backend formed it with E.
    """

    e: Any
    stats: RowStats
    unit_dx: torch.Tensor | None = None


class Backend(Protocol):
    """The passes over the head that every backend offers.

    Attributes:
        name: how the caller chose it.
        chunk_bytes: bytes of E behind one chunk of pairs, by default.
    """

    name: str
    chunk_bytes: int

    def score(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> RowStats:
        """2THV: statistics only."""
        ...

    def score_dx(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[RowStats, torch.Tensor]:
        """4THV: statistics and d token_logp_t / d hidden_t, [T, H] float32. No E survives a tile."""
        ...

    def score_keep(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head, with_dx: bool) -> Kept:
        """2THV: statistics, with E kept; `with_dx` says that no row's dX will be skipped, so it may be formed now."""
        ...

    def kept_dx(self, kept: Kept, coefs: torch.Tensor, head: Head) -> torch.Tensor:
        """2THV: coefs_t * d token_logp_t / d hidden_t, [T, H] float32; a row with coefficient 0 may cost nothing."""
        ...

    def kept_dw_(self, dw: torch.Tensor, kept: Kept, coefs: torch.Tensor, hidden: torch.Tensor, head: Head) -> None:
        """2THV: add sum over rows of coefs_t * d token_logp_t / d weight to `dw` [V, H] float32."""
        ...

    def recompute_dw_(
        self,
        dw: torch.Tensor,
        stats: RowStats,
        coefs: torch.Tensor,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        head: Head,
    ) -> None:
        """4THV: the same from the statistics alone."""
        ...

    def kept_bytes(self, num_rows: int, head: Head) -> int:
        """Bytes of E for so many rows."""
        ...

    def sequence_sums(self, token_values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """[T] -> [N] float32, in a fixed order."""
        ...
