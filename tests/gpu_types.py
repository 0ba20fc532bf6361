"""bfloat16 as a GPU has it, in Triton's interpreter, which cuts off instead of rounding and multiplies bit patterns."""

from typing import Any


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, function) of what the interpreter should do instead."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def to_nearest(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.tensor(data).bfloat16().view(torch.int16).numpy().view("uint16")

    def dot_f32(self, a, b, *args):
        return dot(self, *(self.create_fp_ext(one, tl.float32) for one in (a, b)), *args)

    return [(interpreter, "_convert_float", to_nearest), (interpreter.InterpreterBuilder, "create_dot", dot_f32)]
