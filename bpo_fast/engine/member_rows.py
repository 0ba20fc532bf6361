"""Which member of the ensemble each row of vLLM's batch belongs to, so that one batch samples from all of them.

vLLM's layers read the members' own tensors (loader.py) and weigh them row by row; the weights are written here before
every step, when vLLM has settled which requests make up its batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class MemberRows:
    """Weights of the members in every row of a batch.

    Args:
        num_rows: longest batch in tokens.
        num_members: M.
        device: of the batch.
    """

    def __init__(self, num_rows: int, num_members: int, device: torch.device):
        # written in place: CUDA graphs keep the address
        self.weights = torch.ones(num_rows, num_members, device=device)  # 1 everywhere is the average, M that member
        self._choices = torch.cat([torch.ones(1, num_members), num_members * torch.eye(num_members)]).to(device)
        self._member_of: Mapping[int, int | None] = {}

    @contextmanager
    def requests(self, member_of: Mapping[int, int | None]) -> Iterator[None]:
        """Inside, requests come from these members (None: the average), by the keys that are their names in vLLM."""
        self._member_of = member_of
        try:
            yield
        finally:
            self._member_of = {}
            self.weights.fill_(1.0)

    def attach(self, runner: Any) -> None:
        """Has vLLM's model runner write the weights when it prepares a step."""
        prepare = runner._prepare_inputs

        def prepare_with_members(scheduler_output: Any, *args: Any, **options: Any) -> Any:
            out = prepare(scheduler_output, *args, **options)
            self._write(runner.input_batch.req_ids, scheduler_output.num_scheduled_tokens)
            return out

        runner._prepare_inputs = prepare_with_members

    def _write(self, request_ids: list[str], num_tokens: Mapping[str, int]) -> None:
        """Rows of a batch are its requests' tokens, request after request; 0 of `_choices` is the average."""
        if not self._member_of:
            return
        choice = [self._member_of[int(name.partition("-")[0])] for name in request_ids]
        rows = torch.tensor([0 if m is None else m + 1 for m in choice]).repeat_interleave(
            torch.tensor([num_tokens[name] for name in request_ids])
        )
        if self.weights.is_cuda:
            rows = rows.pin_memory()  # or the copy would wait for the step before this one
        self.weights[: len(rows)] = self._choices[rows.to(self.weights.device, non_blocking=True)]
