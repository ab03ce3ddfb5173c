"""What docs/architecture.md says of adding a part is enough: each part, added so, does its work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from gdn_ops import Forward, Limits, register_backend
from gdn_ops.backends.naive import Naive
from gdn_ops.call.bind import Call
from gdn_ops.testing import conformance
from gdn_ops.testing.compiled import COMPILED, per_shape, per_width
from gdn_ops.testing.example import Example
from gdn_ops.testing.laws import LAWS
from gdn_ops.testing.mutants import mutant
from gdn_ops.testing.oracle import Verdict
from gdn_ops.testing.runs import Law, compare, forward, installed
from paths import ROOT, copy_package
from processes import output_of


@pytest.fixture(autouse=True)
def added_for_a_while(registry_as_found: None) -> Iterator[None]:
    """Forget every backend, and every row of COMPILED, that a test adds."""
    with mock.patch.dict(COMPILED):
        yield


# In a copy of the repository.


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, for parts that are added by editing or adding a file."""
    return copy_package(tmp_path_factory.mktemp("house"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} should say {old!r} once"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_file_in_backends_is_a_backend(house: Path) -> None:
    source = (ROOT / "tests/third_party_backend/gdn_ops_third_party.py").read_text(encoding="utf-8")
    source = source.replace('distribution = "gdn_ops_third_party"', 'distribution = "gdn_ops"')
    path = house / "backends" / "third_party.py"
    path.write_text(f"{source}\n\nBACKEND = ThirdParty\n", encoding="utf-8")
    check = ("check", "--backend", "third_party", "--seconds", "0.1", "--seed", "0")
    printed = output_of("-m", "gdn_ops", *check, cwd=house)
    assert "third_party: " in printed and ", passed" in printed
    edit(path, "call.scale * torch", "torch")
    code = """if True:
        from gdn_ops.dispatch.registry import get_backend
        from gdn_ops.testing.conformance import run_subject, subjects
        subject = subjects(get_backend("third_party"))[0]
        print(run_subject("third_party", subject, examples=20, seed=0).failure)
    """
    assert "WRONG: o, " in output_of("-c", code, cwd=house)


FACTS = """
import gdn_ops
from gdn_ops.backends.naive import Naive
from gdn_ops.call.bind import Call
from gdn_ops.spec import docs
from gdn_ops.spec.ops import OPS
from gdn_ops.testing import Example, lint, mutants
from gdn_ops.testing.conformance import run_subject, subjects
from dataclasses import replace
import torch

for op in OPS:
    schema = str(getattr(torch.ops.gdn_ops, op.name).default._schema)
    function = getattr(gdn_ops, op.name)
    print(lint.lint(op, function, schema=schema, documentation=docs.page(op)))
print("in [0, 3]" in gdn_ops.gated_delta.__doc__, "renamed" in gdn_ops.gated_delta.__doc__)

arguments = Example(T=5, initial_state=True).arguments() | {"rule": "renamed"}
gdn_ops.gated_delta(**{**arguments, "rule": "gated_delta", "beta": arguments["beta"] + 2})
try:
    gdn_ops.gated_delta(**arguments, backend="torch")
except gdn_ops.BackendUnsupportedError as error:
    print(str(error).splitlines()[2])

@gdn_ops.register_backend
class Wide(Naive):
    name = "wide"
    limits = replace(Naive.limits, rules=(*Naive.limits.rules, "renamed"), grad=False)

same = gdn_ops.gated_delta(**{**arguments, "rule": "gated_delta"}, backend="naive")
print(torch.equal(gdn_ops.gated_delta(**arguments, backend="wide"), same))
seen = set()
subject = subjects(Wide())[0]
judge = lambda backend, example: seen.add(example.rule) or subject.judge("naive", replace(
    example, rule="gated_delta" if example.rule == "renamed" else example.rule))
row = run_subject("wide", replace(subject, judge=judge), examples=40, seed=0)
print(row.failure, "renamed" in seen)
"""


def test_a_fact_and_a_rule_of_an_op_stand_in_its_spec_alone(house: Path) -> None:
    spec = house / "gdn_ops" / "spec" / "ops.py"
    edit(
        spec,
        "strength = Interval(0.0, 1.0), Interval(0.0, 2.0)",
        "strength = Interval(0.0, 1.0), Interval(0.0, 3.0)",
    )
    edit(spec, '    Rule("delta", ', '    Rule("renamed", "nobody"),\n    Rule("delta", ')
    assert output_of("-W", "ignore", "-c", FACTS, cwd=house).splitlines() == [
        *("[]", "[]", "[]"),
        "True True",
        "  torch: rule renamed (supported: gated_delta, delta, gated, linear)",
        "True",
        "None True",
    ]


def test_a_command_is_a_module_and_a_line(house: Path) -> None:
    cli = house / "gdn_ops" / "cli"
    source = '''"""Say hello."""

from gdn_ops.cli.parser import add_command


def add_to(commands):
    """Add the command."""
    add_command(commands, "hello", run, "Greet.")


def run(options):
    """Greet; return the exit code."""
    print("hello")
    return 0
'''
    (cli / "hello_command.py").write_text(source, encoding="utf-8")
    edit(
        cli / "commands.py",
        "    completion_command,\n)\n",
        "    completion_command,\n    hello_command,\n)\n",
    )
    edit(
        cli / "commands.py",
        "generate_command,\n    info",
        "generate_command,\n    hello_command,\n    info",
    )
    assert output_of("-m", "gdn_ops", "hello", cwd=house) == "hello"
    assert "Greet." in output_of("-m", "gdn_ops", "--help", cwd=house)


CLIENT = '''
"""Run the delta rule of a library whose heads stand before its tokens."""

from gdn_ops.ops import gated_delta


def delta_rule(queries, keys, values, strengths):
    """Return o (B, HV, T, V), given (B, H, T, K), (B, HV, T, V) and (B, HV, T)."""
    q, k, v, beta = (x.transpose(1, 2) for x in (queries, keys, values, strengths))
    return gated_delta(q, k, v, beta=beta, rule="delta").transpose(1, 2)
'''

USE = """
import torch
from gdn_ops.compat.heads_first import delta_rule

q, k, v, beta = torch.randn(1, 2, 3, 4), torch.eye(4)[None, None, :3].repeat(1, 2, 1, 1), \\
    torch.randn(1, 2, 3, 5), torch.ones(1, 2, 3)
# Of orthonormal keys, each recalls its value exactly.
print(torch.equal(delta_rule(k * 2, k, v, beta), v))
"""


def test_a_module_in_compat_is_a_client(house: Path) -> None:
    path = house / "gdn_ops" / "compat" / "heads_first.py"
    path.write_text(CLIENT, encoding="utf-8")
    assert output_of("-c", USE, cwd=house) == "True"


# A law.


def a_doubled_scale_doubles_the_output(backend: str, example: Example) -> Verdict:
    """Law 16: the output is linear in scale, to the last bit."""
    example = replace(example, scale=0.5)
    once = forward(example.arguments(), backend)
    twice = forward(example.arguments() | {"scale": 1.0}, backend)
    return compare(example, {"o": twice["o"] / 2}, {"o": once["o"]})


def test_a_law_is_a_function_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    law = Law(a_doubled_scale_doubles_the_output)
    assert (law.number, law.text) == ("16", "the output is linear in scale, to the last bit.")
    monkeypatch.setattr(conformance, "LAWS", (*LAWS, law))
    wrong = register_backend(mutant("dropped_scale", "naive"))
    rows = {}
    for name in ("naive", wrong.name):
        (subject,) = (s for s in conformance.subjects(installed(name)) if s.law is law)
        assert subject.name == "a doubled scale doubles the output"
        rows[name] = conformance.run_subject(name, subject, examples=20)
    assert rows["naive"].passed, rows["naive"].failure
    assert "a_doubled_scale_doubles_the_output('dropped_scale_in_naive', Example(" in str(
        rows[wrong.name].failure
    )


# Few calls of a backend whose compiler is slow.


def test_of_a_backend_that_compiles_few_calls_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Naive):
        name = "slow_compiler"
        limits = Limits(devices=("cpu",), grad=False)

    register_backend(Slow)
    seen: set[tuple[int, int, str]] = set()

    def look(backend: str, example: Example) -> Verdict:
        seen.add((example.K, example.V, example.dtype))
        return Verdict(0.0, "o", 0.0, 0.0)

    for narrow, most in ((per_shape, 2), (per_width, 3)):
        seen.clear()
        monkeypatch.setitem(COMPILED, "slow_compiler", narrow)
        conformance.run_subject("slow_compiler", conformance.Subject("looks", look), examples=40)
        assert len(seen) == most
    assert seen == {(16, 48, "float32"), (48, 80, "bfloat16"), (80, 16, "float16")}
    # A mutant of a backend is made of its kernels.
    assert COMPILED[mutant("dropped_scale", "slow_compiler").name] is per_width


# A class for the base class as it was.


@pytest.mark.parametrize(
    ("member", "now"),
    [
        ("compiles_per_shape", "a row of gdn_ops.testing.compiled.COMPILED"),
        ("compiles_per_width", "a row of gdn_ops.testing.compiled.COMPILED"),
        ("step", "named decode_one"),
        ("steps", "named decode_many"),
    ],
)
def test_a_class_for_an_older_base_class_is_told_what_moved(member: str, now: str) -> None:
    old = type("Old", (Naive,), {"name": "old", member: True, "__module__": "old_package"})
    with pytest.raises(TypeError, match=f"^old_package.Old.{member} is now {now}$"):
        register_backend(old)


def test_a_backend_that_looks_for_a_tensor_where_it_was_is_told_where_it_is() -> None:
    class Old(Naive):
        name = "old"

        def forward(self, call: Call) -> Forward:
            return Forward(call.q, call.state)

    register_backend(Old)
    message = "^Call has no attribute 'q': it is call.tokens.q$"
    with pytest.raises(AttributeError, match=message):
        Example(T=3).run("old", gradients=False)
