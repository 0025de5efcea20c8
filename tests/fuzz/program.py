"""A model as source text: `Program.draw(seed)`, then `Program.text()`, which can leave statements out."""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from fuzz.grammar import EARLY, ENDS, HOOKS, KINDS, LOOPS, STARTS, STATE, Statement

PRELUDE = """
import contextlib, functools, operator, random, warnings
from dataclasses import dataclass
from types import SimpleNamespace
import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F
"""

GLOBALS = """
GAIN, MODE, LIMIT, TOTAL = 0.9, "a", 4, 0
SETTINGS = SimpleNamespace(deep=SimpleNamespace(gain=[0.9, 1.1]))
CONFIG, DEFAULTS, STATE = {"scale": 0.8, "on": True}, {}, SimpleNamespace(step=0)
TABLE = torch.linspace(-1, 1, 5)
LOSSES, LOG, STATS, HOOKED, COUNTS = [], [], [], [], {"calls": 0}

def data(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DTYPE)

def gated(module, t):
    return module.g(t).sigmoid() * t

def apply(child, t, times=2):
    for _ in range(times):
        t = child(t).tanh()
    return t

def residual(x, f):
    return x + f

def run_layer(layer_, x, *args, **kwargs):
    return layer_(x, *args, **kwargs)

def first(out):
    return out[0] if isinstance(out, tuple) else out["x"] if isinstance(out, dict) else out.x

@torch.no_grad()
def stopped(t):
    return t * 1.0

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        ctx.save_for_backward(t)
        return t * t.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (t,) = ctx.saved_tensors
        return g * (t.sigmoid() + t * t.sigmoid() * (1 - t.sigmoid()))

@dataclass
class Condition:
    scale: torch.Tensor
    on: bool = True

@dataclass
class Output:
    x: torch.Tensor
    side: torch.Tensor
"""

PARTS = """
    scale = 1.1
    total = 0

    def __init__(self):
        super().__init__()
        self.f, self.g, self.wide, self.narrow = layer(8), layer(8), layer(16), layer(8, 16)
        self.many = nn.ModuleList([layer(8), layer(8)])
        self.norm, self.drop = norm(), nn.Dropout(0.25)
        self.mlp = nn.Sequential(layer(16), nn.GELU(), nn.Dropout(0.1), layer(8, 16))
        self.gamma = nn.Parameter(torch.full(VEC, 0.7))
"""

METHODS = """
    @property
    def factor(self):
        return self.table[-1]

    def act(self, t):
        return self.g(t).tanh()

    def join(self, x, f):
        return x + f
"""

ROOT = """
class Root(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        self.stem, self.mid, self.head = layer(8), layer(8), layer(8)
        self.layers = nn.ModuleList([layer(8) for _ in range(3)])
        self.blocks = nn.ModuleList(make())
        self.line = nn.Sequential(*self.blocks)
        self.cut = 10
"""

SIGNATURE = "x, mask=None, lengths=None, cond=None, extra=None, sink=None, skip=False, scale=1.0"

OUTSIDE = re.compile(
    r"LOSSES|LOG|COUNTS|HOOKED|STATE\.|TOTAL|total|sink|self\.(log|history|losses|statistics|f\.seen)|generator"
    r"|(?<!torch\.)\brandom\.|_random|np\."
)

DRAWS = re.compile(r"rand|rrelu|drop|mlp|bernoulli|noise")
"""Statements that draw random numbers, or may."""

PURE_KINDS = ["pure", "in place", "reads", "modes", "early"]

OUTPUTS = {
    "x": "{}",
    "tuple": "{}, h.mean()",
    "dict": "{{'x': {}, 'side': h.mean()}}",
    "object": "Output({}, h.mean())",
}

RETURNED = {"x": "x", "list": "[x, *hidden]", "dict": "{'out': x, 'hidden': hidden}", "head": "self.head(x)"}

ARGUMENTS = {  # names: how the loop hands them on
    "mask": ("mask=mask",),
    "lengths": ("lengths=lengths",),
    "cond": ("cond=cond",),
    "extra": ("extra=extra",),
    "sink": ("sink=sink",),
    "skip": ("skip=skip",),
    "scale": ("scale=scale",),
}


@dataclass(frozen=True)
class Body:
    """A class of blocks: its statements, each with a number of its own; the last one makes the sum."""

    name: str
    statements: tuple[tuple[int, Statement], ...]
    end: tuple[int, Statement]
    output: str

    def text(self, without: Collection[int]) -> str:
        statements = [s for n, s in self.statements if n not in without]
        end = ENDS[0] if self.end[0] in without else self.end[1]
        needs = "\n".join(dict.fromkeys(s.needs for s in [*statements, end] if s.needs))
        lines = []
        for s in (*statements, end):
            lines.append("\n".join(self._returning(line) for line in s.code.split("\n")) if s.code != "pass" else "")
        code = "\n".join(line for line in lines if line)
        return (
            f"class {self.name}(nn.Module):{PARTS}{textwrap.indent(needs, ' ' * 8)}\n{METHODS}\n"
            f"    def forward(self, {SIGNATURE}):\n        h = x\n{textwrap.indent(code, ' ' * 8)}\n"
            f"        return {self._out('out')}\n"
        )

    def _out(self, expression: str) -> str:
        return OUTPUTS[self.output].format(expression)

    def _returning(self, line: str) -> str:
        head, returns, rest = line.partition("return {")
        return head + "return " + self._out(rest[:-1]) if returns else line


@dataclass(frozen=True)
class Program:
    """A model."""

    seed: int
    image: bool
    dtype: str
    bodies: tuple[Body, ...]
    make: str
    loop: tuple[int, str]
    arguments: tuple[str, ...]
    returned: str
    calls: tuple[tuple[tuple[int, str], ...], ...]
    size: int
    norm: str
    without: frozenset[int] = field(default_factory=frozenset)

    @staticmethod
    def draw(seed: int) -> Program:
        program = _Draw(seed).program()
        again = "checkpoint" in program.loop[1] and "self.batch(" in program.text()
        return program.less(program.loop[0]) if again else program  # statistics would count twice in the original

    def less(self, number: int) -> Program:
        """Without one more statement."""
        return replace(self, without=self.without | {number})

    @property
    def precision(self) -> float:
        """To which the plain rule gives the original, relative to the largest number."""
        used = [s.precision for b in self.bodies for n, s in (*b.statements, b.end) if n not in self.without]
        return max([*used, 1e-9 if self.dtype == "torch.float64" else 1e-4])

    def text(self) -> str:
        layer = "nn.Conv2d(i, o, 1)" if self.image else "nn.Linear(i, o)"
        axes = "1, (0, 2, 3), (8, 1, 1), (1, 1, 1)" if self.image else "-1, (0, 1), (8,), (1, 1)"
        loop = LOOPS[0] if self.loop[0] in self.without else self.loop[1]
        loop = loop.replace("(x, ARGS)", f"(x, {', '.join(self.arguments)})").replace("(t, ARGS)", "(t)")
        loop = (
            loop.replace("x, ARGS)", f"x, {', '.join(self.arguments)})").replace("(x, )", "(x)").replace("x, )", "x)")
        )
        if self.bodies[-1].output != "x":
            loop = loop.replace("block(x", "FIRST(block(x").replace("run_layer(block", "FIRST(run_layer(block")
            loop = _closed(loop)
        return (
            f"{PRELUDE}\nSEED, DTYPE = {self.seed}, {self.dtype}\nC, AXES, VEC, ONES = {axes}\n{GLOBALS}\n"
            f"def layer(o, i=8):\n    return {layer}\n\ndef norm():\n    return {self.norm}\n\n"
            + "\n".join(body.text(self.without) for body in self.bodies)
            + f"\ndef make():\n    {self.make}\n{ROOT}\n"
            "    def one(self, block, x, *args, **kwargs):\n        return block(x, *args, **kwargs)\n\n"
            f"    def forward(self, {SIGNATURE}):\n        hidden, x = [], self.stem(x)\n"
            f"{textwrap.indent(loop, ' ' * 8)}\n        return {RETURNED[self.returned]}\n\n" + self._calls()
        )

    def _calls(self) -> str:
        text = []
        for i, lines in enumerate(self.calls):
            kept = "\n".join(line for n, line in lines if n not in self.without)
            text.append(
                f"def call{i}(model):\n    global GAIN, MODE, LIMIT, TABLE\n    LOSSES.clear()\n    kwargs = {{}}\n"
                f"    model.train({i < 2})\n    size = {self.size}\n{textwrap.indent(kept, ' ' * 4)}\n    return "
                f"(data(*({'(2, 8, size, 3)' if self.image else '(2, size, 8)'}), seed={i}).requires_grad_(),), kwargs\n"
            )
        return "\n".join(text)

    @property
    def may_be_cut(self) -> bool:
        """Whether a unit in chunks is the same to the bit: hooks on what it calls run in each chunk, and chunks draw one
        after the other, so no unit may draw twice (docs/explanation/limits.md, "Chunks").
        """
        used = [(b, s) for b in self.bodies for n, s in (*b.statements, b.end) if n not in self.without]
        draws = [(b, s) for b, s in used if DRAWS.search(s.code)]
        twice = len(draws) > 1 or any(b is not self.bodies[-1] or "for " in s.code for b, s in draws)
        return not twice and not any("hook" in s.code + s.needs for _, s in used)

    def repeats(self, closed: Collection[str]) -> bool:
        """Whether code that a recompute runs again, in blocks of these classes or in hooks, does what is no business of
        tensors, attributes or torch's generators (docs/explanation/limits.md, "State outside of tensors").
        """
        for body in self.bodies:
            for s in (s for n, s in (*body.statements, body.end) if n not in self.without):
                if OUTSIDE.search(s.needs if "hook(" in s.needs else s.code if body.name in closed else ""):
                    return True
        return False

    def essence(self) -> str:
        """What may be left out, and is there."""
        parts = [f"{self.make}  # {self.dtype}, {'image' if self.image else 'tokens'}, {self.norm}, {self.returned}"]
        for body in self.bodies:
            used = [s for n, s in (*body.statements, body.end) if n not in self.without]
            parts += [f"[{body.name}]", *(s.code + (f"  # {s.needs}" if s.needs else "") for s in used)]
        parts += ["[loop]", self.loop[1]] if self.loop[0] not in self.without else []
        for i, lines in enumerate(self.calls):
            parts += [f"[call {i}] {line}" for n, line in lines if n not in self.without]
        return "\n".join(parts)

    def numbers(self) -> list[int]:
        """Of what may be left out."""
        out = [n for b in self.bodies for n, _ in (*b.statements, b.end)]
        out += [self.loop[0], *(n for lines in self.calls for n, _ in lines)]
        return [n for n in out if n not in self.without]


def _closed(loop: str) -> str:
    """The brackets of FIRST( closed."""
    out, depth, opened = [], 0, []
    text = loop.replace("FIRST(", "\0")
    for c in text:
        if c == "\0":
            out.append("first(")
            opened.append(depth)
            depth += 1
            continue
        out.append(c)
        if c == "(":
            depth += 1
        elif c == ")":
            depth -= 1
            if opened and depth == opened[-1] + 1:
                out.append(")")
                depth -= 1
                opened.pop()
    return "".join(out)


class _Draw:
    def __init__(self, seed: int) -> None:
        self.seed, self.random, self.count = seed, random.Random(seed), 0
        self.image = self.random.random() < 0.2

    def number(self) -> int:
        self.count += 1
        return self.count

    def program(self) -> Program:
        r = self.random
        nested = r.random() < 0.2
        sequential = r.random() < 0.12
        loop = "x = self.line(x)" if sequential else r.choice([code for code in LOOPS if "self.line" not in code])
        # under the original's own checkpoint, effects happen twice: no oracle
        kinds = PURE_KINDS if "checkpoint" in loop else list(KINDS)
        bodies = [self.body("Inner", kinds, 1)] if nested else []
        simple = sequential or "checkpoint" in loop or "reduce" in loop
        output = "x" if simple or r.random() < 0.8 else r.choice(["tuple", "dict", "object"])
        bodies.append(self.body("Block", kinds, r.choice([1, 2, 2, 3, 3, 4, 6]), output, nested))
        depth = r.choice([2, 3, 3, 4])
        make = r.choice([f"return [Block() for _ in range({depth})]"] * 6 + [
            f"return [Block()] * {depth}", "a, b = Block(), Block()\n    return [a, b, a, b]",
            "a, b = Block(), Block()\n    b.f, b.norm = a.f, a.norm\n    return [a, b, Block()]",
        ])  # fmt: skip
        names = [] if simple else [n for n in ARGUMENTS if r.random() < 0.4]
        arguments = [ARGUMENTS[n][0] for n in names]
        if "mask" in names and r.random() < 0.4:
            arguments[0] = "mask"
        kinds = ["nn.GroupNorm(2, 8)"] * 3 + ["nn.BatchNorm2d(8)"] if self.image else ["nn.LayerNorm(8)"] * 4
        return Program(
            self.seed,
            self.image,
            "torch.float64" if r.random() < 0.8 else "torch.float32",
            tuple(bodies),
            make,
            (self.number(), loop),
            tuple(arguments),
            r.choice(["x", "x", "list", "dict", "head"]),
            tuple(self.call(i, names) for i in range(3)),
            r.choice([4, 5]),
            r.choice(kinds) if "checkpoint" not in loop else kinds[0],
        )

    def body(self, name: str, kinds: list[str], odd: int, output: str = "x", nested: bool = False) -> Body:
        r = self.random
        drawn = []
        if r.random() < 0.15:
            drawn.append(self.pick(STATE))
        drawn.append(self.pick(STARTS))
        names, weights = kinds, [KINDS[k][1] for k in kinds]
        for kind in r.choices(names, weights, k=odd):
            drawn.append(self.pick(KINDS[kind][0]))
        if nested:
            inner = Statement("for inner_ in self.inner:\n    h = inner_(h)",
                              "self.inner = nn.ModuleList([Inner() for _ in range(2)])")  # fmt: skip
            drawn.insert(r.randrange(1, len(drawn) + 1), inner)
        hooks = [s for s in drawn if s in HOOKS]
        drawn = [s for s in drawn if s not in HOOKS] + hooks
        if output != "x":
            drawn = [s for s in drawn if not ("register_forward_hook" in s.needs and "o *" in s.needs)]
            early = [s for s in drawn if s in EARLY]
            drawn = [s for s in drawn if s not in early] + early
        return Body(name, tuple((self.number(), s) for s in drawn), (self.number(), self.pick(ENDS)), output)

    def pick(self, statements: list[Statement]) -> Statement:
        return self.random.choice([s for s in statements if not (s.tokens and self.image)])

    def call(self, i: int, names: list[str]) -> tuple[tuple[int, str], ...]:
        r = self.random
        made = {
            "mask": f"kwargs['mask'] = data(2, *ONES, seed={i + 5}).sigmoid(){'.requires_grad_()' if r.random() < 0.4 else ''}",
            "lengths": f"kwargs['lengths'] = torch.tensor([{r.randint(1, 4)}, {r.randint(1, 4)}])",
            "cond": f"kwargs['cond'] = Condition(data(2, *ONES, seed=7).sigmoid().requires_grad_(), {r.random() < 0.5})",
            "extra": "kwargs['extra'] = {'scale': data(2, *ONES, seed=8), 'pair': (1, data(2, *ONES, seed=9))}",
            "sink": "kwargs['sink'] = []",
            "skip": f"kwargs['skip'] = {r.random() < (0.1, 0.3, 0.3)[i]}",
            "scale": f"kwargs['scale'] = {r.choice([1.0, 0.7, 0.9])}",
        }
        lines = [made[n] for n in names if i == 0 or r.random() < 0.9]
        if i:
            changes = [
                f"GAIN = {r.choice([0.5, 0.7])}", "MODE = 'b'", "CONFIG['on'] = False", "CONFIG['scale'] = 0.4",
                "SETTINGS.deep.gain[0] = 0.3", "Block.scale = 0.6", "TABLE = TABLE * 0.5", "DEFAULTS['missing'] = 0.5",
                "size = 3", "size = 6", "model.cut = 0", "SETTINGS.deep = SimpleNamespace(gain=[0.2])",
                "model.blocks[0].eval()", "model.blocks[1].requires_grad_(False)", "model.blocks[0].drop.p = 0.4",
                "model.stem.requires_grad_(False)", "model.blocks[0].f.scale = 0.3", "LIMIT = -1",
                "model.blocks[0].table = [0.1]", "LOG.clear()",
            ]  # fmt: skip
            lines += r.sample(changes, r.choice([0, 1, 2, 4]))
        return tuple((self.number(), line) for line in lines)
