"""Write the text of a function body: shapes, casts, and the operands that all bodies share."""

from __future__ import annotations

import onnx

from gdn_ops.call.numerics import L2NORM_EPSILON
from gdn_ops.export.node.attributes import Variant
from gdn_ops.export.node.schema import SEQUENCE


class BodyText:
    """Collect the lines of a function, and the names of values that every body needs.

    Shapes are (B, tokens..., heads, rows, columns), `tokens` being nothing for a step.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.lines: list[str] = []
        self.sequence = variant.operator is SEQUENCE
        self.heads_axis = 2 if self.sequence else 1
        self._constants()

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    def _constants(self) -> None:
        """Write the sizes: B, K and V from the state, H and HV from attributes, T from q."""
        self("num_qk = Constant <value_int: int = @num_qk_heads> ()")
        self("num_v = Constant <value_int: int = @num_v_heads> ()")
        self("one = Constant <value_ints = [1]> ()")
        self("axis_0 = Constant <value_ints = [0]> ()")
        self("H = Unsqueeze(num_qk, axis_0)")
        self("HV = Unsqueeze(num_v, axis_0)")
        for name, axis in (("B", 0), ("K", 2), ("V", 3)):
            self(f"{name} = Shape <start = {axis}, end = {axis + 1}> (state)")
        if self.sequence:
            self("T = Shape <start = 1, end = 2> (q)")

    def shape(self, name: str, *sizes: str) -> str:
        """Write a shape of B, tokens and sizes."""
        tokens = ("T",) if self.sequence else ()
        self(f"{name} = Concat <axis = 0> ({', '.join(('B', *tokens, *sizes))})")
        return name

    def cast(self, name: str, source: str) -> None:
        """Write a cast to the compute type."""
        to = onnx.TensorProto.DataType.Value(self.variant.compute.upper())
        self(f"{name} = Cast <to = {to}> ({source})")

    def number(self, name: str, value: float) -> None:
        """Write a scalar of the compute type."""
        self(f"{name} = Constant <value = {self.variant.compute} {{{value:g}}}> ()")

    def operand(self, name: str, *sizes: str) -> str:
        """Write an input reshaped to (B, tokens..., *sizes), which checks its size, and cast it."""
        self(f"{name}_g = Reshape <allowzero = 1> ({name}, {self.shape(f'{name}_to', *sizes)})")
        self.cast(f"{name}_x", f"{name}_g")
        return f"{name}_x"

    def query_and_key(self) -> None:
        """Write q_n and k_n, (B, tokens..., H, 1, K), normalised if asked for."""
        for name in ("q", "k"):
            row = self.operand(name, "H", "one", "K")
            if self.variant.qk_l2norm:
                self._normalise(name, row)
            else:
                self(f"{name}_n = Identity({row})")

    def _normalise(self, name: str, row: str) -> None:
        """Write x / sqrt(x xᵀ + 1e-6). A sum over an empty batch goes wrong in onnxruntime."""
        if name == "q":
            self.number("epsilon", L2NORM_EPSILON)
            self.shape("column_to", "H", "K", "one")
        self(f"{name}_column = Reshape <allowzero = 1> ({row}, column_to)")
        self(f"{name}_squares = MatMul({row}, {name}_column)")
        self(f"{name}_shifted = Add({name}_squares, epsilon)")
        self(f"{name}_norm = Sqrt({name}_shifted)")
        self(f"{name}_n = Div({row}, {name}_norm)")

    def repeat_heads(self) -> None:
        """Write q_r and k_r, (B, tokens..., HV, 1, K): value head h reads key head h // R."""
        self("zero = Constant <value_int = 0> ()")
        self("step = Constant <value_int = 1> ()")
        self("v_heads = Range(zero, num_v, step)")
        self("repeats = Div(num_v, num_qk)")
        self("qk_heads = Div(v_heads, repeats)")
        for name in ("q", "k"):
            self(f"{name}_r = Gather <axis = {self.heads_axis}> ({name}_n, qk_heads)")

    def states(self) -> tuple[str, str]:
        """Write the state in the compute type; return its name and that of the next state.

        A cast that changes nothing would be a copy of the whole state: there is none.
        """
        if self.variant.stores_wide:
            return "state", "new_state"
        self.cast("S", "state")
        return "S", "S_next"

    def results(self, o: str, state: str) -> None:
        """Write the outputs, in the types of v and of the state."""
        self.shape("o_to", "HV", "V")
        self(f"o_x = Reshape <allowzero = 1> ({o}, o_to)")
        self("o = CastLike(o_x, v)")
        if state != "new_state":
            self(f"new_state = CastLike({state}, state)")
