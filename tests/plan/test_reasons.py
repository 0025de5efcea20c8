"""The reason of what stays: the line of code that is meant, and what would help."""

import inspect
import json
import re

import pytest
import torch
from torch import nn

import revwire
from toys import X, stack


def line_of(code):
    """Where the line that is marked in some code is, as the plan shows it."""
    lines, first = inspect.getsourcelines(code)
    (marked,) = [first + i for i, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return f"{inspect.getsourcefile(code).rsplit('/', 1)[-1]}:{marked}"


def projection(self, x):
    f = self.f(x)
    return f + self.g(x)  # here


def to_its_input(self, x):
    x += self.f(x)  # here
    return x


def other_shape(self, x):
    x = x.mean(1, keepdim=True) * 1.0
    return x + self.f(x).expand(2, 5, 8)  # here


def complex_sum(self, x):
    c = torch.view_as_complex(self.f(x).view(2, 5, 4, 2))
    c = c + c.sin()  # here
    return torch.view_as_real(c).view(2, 5, 8)


def alone(self, x):
    x = x + self.f(x)  # here
    return self.g(x)


def unseen(self, x):
    made = torch.from_numpy(x.detach().numpy() * 2)
    return self.f(x) + made  # here


def inside(self, x):
    h = self.f(x)
    h = h + self.f(h)  # here
    return x + self.g(h)


KINDS = {
    "a projection": (projection, r"\(a projection shortcut\), .*; checkpoint='stays' recomputes its block"),
    "its own input": (
        to_its_input,
        r"^blocks.0 adds in place to its own input \(test_reasons.py:\d+\); write x = x \+ f",
    ),
    "another shape": (other_shape, r"the shortcut changes shape \(2x1x8 -> 2x5x8\); checkpoint="),
    "complex": (complex_sum, r"adds torch.complex128, not floating point; streams are of real"),
    "alone": (alone, r"stands alone: a chain needs at least two units .*; checkpoint='stays' recomputes its block"),
    "unseen": (unseen, r"one operand comes from a tensor that .*; hand it to the module as an argument"),
    "inside": (inside, r"^inside the branch of another unit, which is the larger saving$"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_reason_says_which_line_of_code_is_meant_and_what_would_help(kind):
    forward, reason = KINDS[kind]
    plan = revwire.plan(stack(forward), X)
    assert [s.line for s in plan.skipped] == [line_of(forward)] * 3
    assert re.search(reason, plan.skipped[0].reason)
    assert [s["line"] for s in json.loads(json.dumps(plan.to_dict()))["skipped"]] == [line_of(forward)] * 3
    if kind != "inside":
        assert f"{plan.skipped[2].path}, at {line_of(forward)}: " in str(plan)


def test_the_line_of_a_cause_is_named_where_it_is_another_one():
    def forward(self, x):
        made = x * 0.5
        x = x + self.f(x)
        made += x  # here
        return x + self.g(made)

    plan = revwire.plan(stack(forward), X)
    assert {u.pattern for u in plan.units} == {"block"}
    where = line_of(forward)
    cause = f"as a whole: it writes in place to a tensor that is not its branch's own ({where}); write to a clone"
    assert [s.path for s in plan.skipped if s.reason.endswith(cause)] == [
        f"blocks.{i}.{n}" for i in range(3) for n in "fg"
    ]
    assert all(s.in_closed_block for s in plan.skipped)
    *_, count, listed, _ = str(plan).splitlines()
    assert count == "9 more lie inside the branches of rewired units, 9 of them in blocks that are rewired as a whole"
    assert listed.startswith("  blocks.0.f, blocks.0.g, blocks.1.f, ")
    assert listed.endswith(cause)


def test_a_hundred_adds_of_one_line_of_code_are_one_line_of_the_plan_whatever_their_shapes():
    class Widens(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.f = nn.Linear(width, width + 1)

        def forward(self, x):
            return nn.functional.pad(x, (0, 1)) + self.f(x)  # here

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            return x.mean(1, keepdim=True) + self.f(x)

    plan = revwire.plan(nn.Sequential(*map(Widens, range(8, 108))).double(), X)
    listed = [line for line in str(plan).splitlines() if line.startswith("  ")]
    assert len(listed) == 1
    assert f" and 92 more, at {line_of(Widens.forward)}: " in listed[0]


def test_one_reason_at_several_lines_is_one_line_too():
    plan = revwire.plan(
        nn.Sequential(
            *stack(projection).blocks, *stack(alone).blocks, *stack(lambda self, x: self.f(x) + self.g(x)).blocks
        ).double(),
        X,
    )
    listed = [line for line in str(plan).splitlines() if line.startswith("  ") and "projection" in line]
    assert len(listed) == 1
    assert f", at {line_of(projection)}, test_reasons.py:" in listed[0]


def test_the_line_of_a_module_of_pytorchs_own_is_that_of_its_forward():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plan = revwire.plan(nn.Sequential(layer, nn.Linear(8, 8)).double(), X, exclude="*")
    assert plan.skipped
    file, _, number = plan.skipped[0].line.partition(":")
    assert file == "torch/nn/modules/transformer.py"
    lines, first = inspect.getsourcelines(nn.TransformerEncoderLayer.forward)
    assert first <= int(number) < first + len(lines)


@pytest.mark.filterwarnings("ignore:blocks.[12].f")
def test_a_call_that_goes_another_way_names_the_line():
    def forward(self, x, early=False):
        h = self.f(x).tanh()
        if early:
            return h
        return x + h  # here

    model = revwire.convert(stack(forward), X)
    with pytest.warns(UserWarning, match=rf"blocks\.0\.f \({line_of(forward)}\): a call of its host did not come"):
        model(X.clone().requires_grad_(), early=True)
