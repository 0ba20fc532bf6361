"""Triton's interpreter with an eye for what it forgives and a GPU does not.

Programs run in a shuffled order. An access outside of the tensors that a kernel was given is an error, and so is a
number that one program writes and another of the same launch reads or writes: on a GPU they run at the same time.
"""

import random
from typing import Any

import numpy as np

pointed: list[Any] = []  # to by the tables of a step's launches
PIECE = 2  # bytes of a number that are looked at together; one of a single byte by itself


class Launch:
    """What the programs of a launch may touch, and what each of them has touched."""

    def __init__(self, args: list[Any], shuffled: random.Random):
        tensors = [getattr(x, "base", x) for x in args]  # of a descriptor
        self.spans = [span(x) for x in [*tensors, *pointed] if hasattr(x, "data_ptr") and x.numel()]
        self.shuffled, self.order, self.program = shuffled, [], 0
        self.pieces: dict[str, list[np.ndarray]] = {"read": [], "written": []}

    def place(self, grid: tuple[int, ...], index: tuple[int, ...]) -> tuple[int, ...]:
        """The program that runs in place of this one."""
        if not self.order:
            self.order = list(np.ndindex(*grid))
            self.shuffled.shuffle(self.order)
        self.program = int(np.ravel_multi_index(index, grid))
        return self.order[self.program]

    def touch(self, how: str, addresses: np.ndarray, size: int) -> None:
        """Note these numbers of so many bytes; an error where one lies outside."""
        found = np.unique(addresses.astype(np.uint64))
        inside = np.zeros(len(found), dtype=bool)
        for first, last in self.spans:
            inside |= (found >= first) & (found + np.uint64(size) <= last)
        assert inside.all(), f"{(~inside).sum()} of {len(found)} numbers {how} lie outside of the kernel's arguments"
        pieces = (found[:, None] + np.arange(0, size, PIECE, dtype=np.uint64)).ravel()
        self.pieces[how].append(np.stack([pieces, np.full_like(pieces, self.program)]))

    def check(self) -> None:
        """An error where the order of programs matters."""
        empty = np.zeros((2, 0), dtype=np.uint64)
        read, written = (np.unique(np.hstack([empty, *self.pieces[how]]), axis=1) for how in ("read", "written"))
        places = written[0]
        assert (places[1:] != places[:-1]).all(), "two programs write the same number"
        if len(places):
            at = np.searchsorted(places, read[0]).clip(max=len(places) - 1)
            shared = (places[at] == read[0]) & (written[1][at] != read[1])
            assert not shared.any(), "a program reads what another one writes"


def span(x: Any) -> tuple[np.uint64, np.uint64]:
    """Where the numbers of a tensor begin and end."""
    length = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return np.uint64(x.data_ptr()), np.uint64(x.data_ptr() + length * x.element_size())


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, function) of what the interpreter should do instead."""
    from bpo_fast_kernels import triton_adamw
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, place, run = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.set_grid_idx,
        executor.__call__,
    )
    shuffled, launches, row, step = random.Random(0), [], triton_adamw._row, triton_adamw.launch

    def touch(how: str, pointers: Any, mask: Any) -> None:
        chosen = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        launches[-1].touch(how, chosen, pointers.get_element_ty().primitive_bitwidth // 8)

    def watched_load(self, pointers, mask, *args, **options):
        touch("read", pointers, mask)
        return load(self, pointers, mask, *args, **options)

    def watched_store(self, pointers, value, mask, *args, **options):
        touch("written", pointers, mask)
        return store(self, pointers, value, mask, *args, **options)

    def watched_row(tensor, grad, names):
        pointed.extend(x for x in (tensor.weight, grad, tensor.rounded, *tensor.state.values()) if x is not None)
        return row(tensor, grad, names)

    def watched_step(tensors, form):
        try:
            step(tensors, form)
        finally:
            pointed.clear()

    def shuffled_place(self, *index):
        return place(self, *launches[-1].place(self.grid_dim, index))

    def watched_run(self, *args, **options):
        launches.append(Launch([*args, *options.values()], shuffled))
        try:
            result = run(self, *args, **options)
            launches[-1].check()
            return result
        finally:
            launches.pop()

    return [
        (builder, "create_masked_load", watched_load),
        (builder, "create_masked_store", watched_store),
        (builder, "set_grid_idx", shuffled_place),
        (executor, "__call__", watched_run),
        (triton_adamw, "_row", watched_row),
        (triton_adamw, "launch", watched_step),
    ]
