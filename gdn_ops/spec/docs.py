"""Write the public docstring and the documentation page of an op from its spec."""

from __future__ import annotations

import re

from gdn_ops.spec.language import Attr, OpSpec, TensorArg

_RETURNS = {
    "gated_delta": (
        "o, or (o, final_state) with return_state=True.",
        "final_state is float32 (float64 for float64 inputs).",
    ),
    "gated_delta_step": (
        "(o, state). state has the dtype of the given state, float32 if none was given;",
        "with inplace=True it is the given tensor.",
    ),
    "gated_delta_steps": (
        "(o, state), or (o, state, states) with return_states=True. state and states have the",
        "dtype of the given state, float32 if none was given; between tokens the state stays in",
        "float32. With inplace=True state is the given tensor. To go back to after n tokens, take",
        "states[:, n - 1]. It is meant for a few tokens, up to 8; gated_delta is for more.",
    ),
}

_EXAMPLES = {
    "gated_delta": """
>>> import torch
>>> from gdn_ops import gated_delta
>>> B, T, H, HV, K, V = 1, 100, 2, 4, 16, 32
>>> q, k = torch.randn(2, B, T, H, K)
>>> v = torch.randn(B, T, HV, V)
>>> alpha, beta = torch.rand(2, B, T, HV)
>>> o, state = gated_delta(q, k, v, alpha, beta, qk_l2norm=True, return_state=True)
>>> o.shape, state.shape
(torch.Size([1, 100, 4, 32]), torch.Size([1, 4, 16, 32]))
""",
    "gated_delta_step": """
>>> import torch
>>> from gdn_ops import gated_delta_step
>>> B, H, HV, K, V = 1, 2, 4, 16, 32
>>> q, k = torch.randn(2, B, H, K)
>>> v = torch.randn(B, HV, V)
>>> alpha, beta = torch.rand(2, B, HV)
>>> state = torch.zeros(B, HV, K, V)
>>> o, state = gated_delta_step(q, k, v, alpha, beta, state, qk_l2norm=True, inplace=True)
>>> o.shape, state.shape
(torch.Size([1, 4, 32]), torch.Size([1, 4, 16, 32]))
""",
    "gated_delta_steps": """
>>> import torch
>>> from gdn_ops import gated_delta_steps
>>> B, T, H, HV, K, V = 1, 4, 2, 4, 16, 32
>>> q, k = torch.randn(2, B, T, H, K)
>>> v = torch.randn(B, T, HV, V)
>>> alpha, beta = torch.rand(2, B, T, HV)
>>> state = torch.zeros(B, HV, K, V)
>>> draft = q, k, v, alpha, beta, state
>>> o, state, states = gated_delta_steps(*draft, qk_l2norm=True, return_states=True)
>>> o.shape, states.shape
(torch.Size([1, 4, 4, 32]), torch.Size([1, 4, 4, 16, 32]))
""",
}

_RAISES = (
    ("SpecError", "an argument breaks the specification; the text says which and how."),
    ("BackendUnsupportedError", "the backend, or every backend, has a reason not to run it."),
)


def _dtypes(arg: TensorArg) -> str:
    if arg.same_dtype_as:
        return f"dtype of {arg.same_dtype_as}"
    if arg.gate:
        return "read as float32 (float64 for float64 inputs)"
    return ", ".join(arg.dtypes)


def argument_line(arg: TensorArg | Attr) -> str:
    """Return the line of the documentation for one argument."""
    if isinstance(arg, Attr):
        choices = f" One of {', '.join(map(str, arg.choices))}." if arg.choices else ""
        return f"{arg.meaning}.{choices} Default {arg.default!r}."
    domain = f", in {arg.domain}" if arg.domain else ""
    default = " Default None." if arg.optional else ""
    return f"{_shapes(arg)} {arg.meaning}; {_dtypes(arg)}{domain}.{default}"


def _shapes(arg: TensorArg) -> str:
    """Return the shapes of an argument as text: "(B, T)", "(B, T), or (P, T) with indices:"."""
    return ", or ".join(map(str, arg.shapes)) + (":" if len(arg.shapes) > 1 else "")


def docstring(spec: OpSpec) -> str:
    """Return the Google-style docstring of the public function of a spec."""
    lines = [spec.summary, ""]
    lines += [f"    {equation}" for equation in spec.equations]
    lines += ["", "Value head h reads key head h // (HV / H).", "", "Args:"]
    lines += [f"    {arg.name}: {argument_line(arg)}" for arg in spec.args]
    lines += ["", "Returns:"]
    lines += [f"    {line}" for line in _RETURNS[spec.name]]
    lines += [f"    {output}: {output.meaning}." for output in spec.outputs]
    lines += ["", "Raises:"]
    lines += [f"    {name}: {when}" for name, when in _RAISES]
    lines += ["", "Source:"]
    lines += [f"    {source}" for source in spec.sources]
    lines += ["", "Example:"]
    lines += [f"    {line}" for line in _EXAMPLES[spec.name].strip().splitlines()]
    return "\n".join(lines) + "\n"


def tex(equation: str) -> str:
    """Return an equation of a spec in TeX, aligned at its "="."""
    named = re.sub(r"\b(alpha|beta)_", r"\\\1_", equation.replace("^T", r"^\top"))
    return named.replace("scale ", "s \\, ").replace(" = ", " &= ", 1)


def page(spec: OpSpec) -> str:
    """Return the Markdown page of an op."""
    lines = [f"# `{spec.name}`", "", spec.summary, "", "```text", *_signature(spec), "```", ""]
    lines += ["## What it computes", "", "$$", "\\begin{aligned}"]
    lines += [f"{tex(equation)} \\\\" for equation in spec.equations]
    lines += ["\\end{aligned}", "$$", ""]
    lines += ["## Arguments", "", "| argument | shape | dtype | domain | meaning |"]
    lines += ["|---|---|---|---|---|"]
    for arg in spec.args:
        if isinstance(arg, TensorArg):
            cells = (_shapes(arg).rstrip(":"), _dtypes(arg), str(arg.domain or "any"), arg.meaning)
        else:
            allowed = ", ".join(f"`{c}`" for c in arg.choices) or "any"
            cells = ("", arg.type.replace("|", "or"), allowed, arg.meaning)
        default = "" if isinstance(arg, TensorArg) and not arg.optional else " (optional)"
        lines.append(f"| `{arg.name}`{default} | " + " | ".join(cells) + " |")
    lines += ["", "Axes:", ""]
    lines += [f"- `{axis.name}`: {axis.meaning}" for axis in spec.axes]
    lines += [f"- {constraint}" for constraint in spec.constraints]
    lines += ["", "## Returns", "", " ".join(_RETURNS[spec.name]), ""]
    lines += [f"- `{o.name}` ({', '.join(o.axes)}): {o.meaning}" for o in spec.outputs]
    lines += ["", "## Rules", "", "| `rule=` | decay | erase | write | known as |"]
    lines += ["|---|---|---|---|---|"]
    for rule in spec.rules:
        decay, erase = "alpha" if rule.has_decay else "1", "beta" if rule.has_erase else "0"
        lines.append(f"| `{rule.name}` | {decay} | {erase} | beta | {rule.known_as} |")
    lines += ["", "## Named workloads", ""]
    lines += [
        f"- `{case.name}`: {str(case).partition(': ')[2]} ({case.source})" for case in spec.cases
    ]
    lines += ["", "## Errors", ""]
    lines += [f"- `{name}`: {when}" for name, when in _RAISES]
    lines += ["", "## Sources", ""]
    lines += [f"- {source}" for source in spec.sources]
    return "\n".join(lines) + "\n"


def _signature(spec: OpSpec) -> list[str]:
    """Return the lines of the op's signature, one argument a line."""
    outputs = ", ".join(str(output) for output in spec.outputs)
    arguments = (f"    {part}," for part in spec.printed_parameters())
    return [f"{spec.name}(", *arguments, f") -> {outputs}"]
