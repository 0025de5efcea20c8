"""Statements of which the forwards of blocks are made.

Each is valid by itself: before it, ``x`` is the state, and ``h`` what the branch has so far (of the same shape); so any
of them may be left out. ``needs`` are lines of ``__init__``. Names in capitals are globals of the program.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statement:
    """Some lines of a forward.

    Attributes:
        code: the lines.
        needs: lines of ``__init__`` that they need.
        precision: relative; what casts in it leave of an equality in float64.
        tokens: whether it is only for (batch, tokens, channels).
    """

    code: str
    needs: str = ""
    precision: float = 0.0
    tokens: bool = False


def _s(code: str, needs: str = "", precision: float = 0.0, *, tokens: bool = False) -> Statement:
    return Statement(code.strip("\n"), needs.strip("\n"), precision, tokens)


STARTS = [
    _s("h = self.f(x)"),
    _s("h = self.f(x).tanh()"),
    _s("h = self.f(self.norm(x))"),
    _s("h = self.norm(x)\nh = self.g(self.f(h).tanh())"),
    _s("h = self.f(x * 0.5)"),
    _s("h = self.mlp(x)"),
    _s("h = F.gelu(self.f(self.norm(x)))"),
    _s("y = x.tanh()\nh = self.f(y) * 0.5 + self.g(y) * 0.5"),
]

PURE = [
    _s("h = self.f(h).tanh()"),
    _s("h = F.gelu(self.g(h))"),
    _s("h = self.norm(h)"),
    _s("h = self.drop(h)"),
    _s("h = F.dropout(h, 0.2, self.training)"),
    _s("for i in range(2):\n    h = self.g(h).tanh() * (0.5 + i)"),
    _s("for child in (self.f, self.g):\n    h = child(h).sin()"),
    _s("for child in self.many:\n    h = h + child(h).tanh()"),
    _s("a, b = self.wide(h).chunk(2, C)\nh = a * b.sigmoid()"),
    _s("a, b = self.wide(h).split([8, 8], dim=C)\nh = torch.addcmul(a, b, b, value=0.1)"),
    _s("h = torch.cat([p.tanh() for p in h.split(4, C)], C)"),
    _s("h = torch.cat([h, x], C)\nh = self.narrow(h)"),
    _s("h = self.act(h)"),
    _s("h = self.act(t=h)"),
    _s("h = gated(self, h)"),
    _s("h = apply(self.g, h)"),
    _s("h = self.function(h)", "self.function = lambda t: t.tanh() * 0.9"),
    _s("run = lambda m, t: m(t).tanh()\nh = run(self.g, h)"),
    _s("def inner(t):\n    return self.g(t).tanh() + x * 0.1\n\nh = inner(h)"),
    _s("h = h * self.gamma"),
    _s("h = h.transpose(1, 2).tanh().transpose(1, 2)"),
    _s("h = h.transpose(1, C).contiguous().transpose(1, C)"),
    _s("h = self.batch(h.transpose(1, 2)).transpose(1, 2)", "self.batch = nn.BatchNorm1d(8)", tokens=True),
    _s("h = self.batch(h.flatten(0, 1)).view_as(x)", "self.batch = nn.BatchNorm1d(8)", tokens=True),
    _s("h = h.reshape(len(h), -1).tanh().reshape(x.shape)"),
    _s(
        "b, n, c = x.shape\nh = h.view(b, n, 2, c // 2).transpose(1, 2).reshape(b, 2, n, c // 2).transpose(1, 2).reshape(b, n, c)",
        tokens=True,
    ),
    _s(
        "q, k, v = self.qkv(h).chunk(3, C)\nh = F.scaled_dot_product_attention(q, k, v)",
        "self.qkv = layer(24)",
        tokens=True,
    ),
    _s("w = (h @ h.transpose(1, 2) * 0.1).softmax(-1)\nh = w @ h", tokens=True),
    _s(
        "h, w = self.attn(h, h, h, need_weights=True)\nLOG.append(float(w.detach().mean()))",
        "self.attn = nn.MultiheadAttention(8, 2, batch_first=True)",
        tokens=True,
    ),
    _s("h = (lambda t: t)(h) if h.dim() > 1 else h"),
    _s("h = sum([h, h * 0.5])"),
    _s("h = torch.stack([h, h.tanh()]).mean(0)"),
    _s("h = torch.utils.checkpoint.checkpoint(self.g, h, use_reentrant=False)"),
    _s("h = h.clamp(min=-1.0).where(h > 0, h * 0.1)"),
    _s("h = torch.einsum('b...,b->b...', h, h.flatten(1).mean(1))"),
    _s("h = h - h.mean(C, keepdim=True)\nh = h / (h.square().mean(C, keepdim=True) + 1e-3).sqrt()"),
]

IN_PLACE = [
    _s("h = self.g(h)\nh.mul_(0.5)"),
    _s("h = self.g(h)\nh += 0.1"),
    _s("h = self.g(h)\nh[:, :1] = 0.0"),
    _s("h = self.g(h)\nh[:, 0].add_(1.0)"),
    _s("h = h * 1.5\nh += x"),
    _s("h = h * 1.5\nh += self.g(x)"),
    _s("v = h.clone()\nv[:, 1:] = v[:, 1:] * 0.5\nh = v"),
    _s("h = self.g(h)\nF.relu(h, inplace=True)"),
    _s("h = self.g(h)\nv = h.view(len(h), -1) if h.is_contiguous() else h\nv.mul_(0.7)"),
    _s("out = torch.empty_like(h)\nout.copy_(h)\nh = out * 0.9"),
    _s("out = torch.zeros_like(x)\nout[:, :2] = h[:, :2]\nh = h + out"),
    _s("bias = torch.zeros(8, dtype=x.dtype).reshape(VEC)\nbias += h.detach().mean()\nh = h + bias"),
    _s("h = h.masked_fill_(h > 1.0, 0.3) if not h.requires_grad else h.masked_fill(h > 1.0, 0.3)"),
    _s("h = h.index_add(1, torch.tensor([0]), h[:, 1:2])"),
    _s("h = h * 1.0\nh.data.mul_(1.1)"),
    _s("h = h.clone().requires_grad_() * 1.0"),
]

STATE = [  # what is done to the state, before the branch
    _s("x = x.clone()"),
    _s("x = x * 1.0\nx[:, :1] = x[:, :1] * 0.9"),
    _s("x = x.contiguous()"),
    _s("x = x + 0.1"),
    _s("x.mul_(0.95)"),
    _s("x = x.to(DTYPE)"),
    _s("short = x\nx = self.drop(x)"),
    _s("x = x.view(x.shape)"),
    _s("x = x.transpose(1, 2).contiguous().transpose(1, 2)"),
    _s("x = x * self.gamma"),
    _s("x, rest = x, x.detach()"),
    _s("x = x if self.training else x * 1.0"),
]

RANDOM = [
    _s("h = h * torch.rand(len(x), *ONES, dtype=x.dtype)"),
    _s("h = h + 0.1 * torch.randn_like(h)"),
    _s(
        "h = h * (torch.rand(x.shape, generator=self.generator, dtype=x.dtype) > 0.3)",
        "self.generator = torch.Generator()\nself.generator.manual_seed(3)",
    ),
    _s("h = h * (0.5 + random.random())"),
    _s("h = h * float(np.random.rand())"),
    _s("h = h * float(self.numpy_random.rand())", "self.numpy_random = np.random.RandomState(5)"),
    _s("h = h * self.python_random.choice([0.5, 1.0])", "self.python_random = random.Random(5)"),
    _s(
        "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(3)\n    noise = torch.rand_like(h)\nh = h * noise"
    ),
    _s("with torch.random.fork_rng(devices=[]):\n    h = F.dropout(h, 0.2)"),
    _s("if self.training and torch.rand(()) < 0.5:\n    h = self.g(h).tanh()"),
    _s("order = torch.randperm(x.shape[1])\nh = h[:, order]"),
    _s("h = h * torch.bernoulli(torch.full((len(x), *ONES), 0.8, dtype=x.dtype)) if self.training else h"),
    _s("keep = torch.empty(len(x), *ONES, dtype=x.dtype).bernoulli_(0.7)\nh = h.div(0.7) * keep"),
    _s(
        "h = h + torch.empty_like(h).normal_(generator=self.generator) * 0.1",
        "self.generator = torch.Generator()\nself.generator.manual_seed(3)",
    ),
    _s("state = torch.get_rng_state()\nh = F.dropout(h, 0.5)\ntorch.set_rng_state(state)\nh = F.dropout(h, 0.5)"),
    _s("h = F.rrelu(h, training=self.training)"),
]

EFFECTS = [
    _s("LOSSES.append(h.square().mean())"),
    _s("LOSSES.append(self.g(x).softmax(C).square().sum())"),
    _s("LOSSES.append((x - h).abs().mean())"),
    _s("if self.training:\n    self.losses.append(h.mean())\n    LOSSES.append(self.losses[-1])", "self.losses = []"),
    _s("self.calls += 1\nh = h / self.calls", "self.calls = 0"),
    _s("self.calls = self.calls + 1", "self.calls = 0"),
    _s("COUNTS['calls'] += 1\nh = h * (1.0 + 0.1 * COUNTS['calls'])"),
    _s("self.log['norm'] = float(h.detach().norm())", "self.log = {}"),
    _s("self.log.setdefault('shapes', []).append(tuple(h.shape))", "self.log = {}"),
    _s("self.last = h.detach()", "self.last = None"),
    _s("self.last_input = x.detach().clone()"),
    _s("self.kept = h", "self.kept = None"),
    _s(
        "if self.cache is None or self.cache.shape != h.shape:\n    self.cache = torch.ones_like(h).detach()\nh = h * self.cache",
        "self.cache = None",
    ),
    _s(
        "if self.previous is not None and self.previous.shape == h.shape:\n    h = h + 0.1 * self.previous\n"
        "self.previous = h.detach()",
        "self.previous = None",
    ),
    _s("if sink is not None:\n    sink.append(h.mean())"),
    _s("if sink is not None:\n    sink.append(x.detach())\n    h = h * len(sink) * 0.2"),
    _s("if sink is not None and sink:\n    h = h + sink[-1].mean() * 0.1"),
    _s("LOG.append(round(float(h.detach().abs().mean()), 3))"),
    _s("self.history.append(h.shape[0])", "self.history = []"),
    _s("self.history.append(h.detach())\nh = h + self.history[0].mean()", "self.history = []"),
    _s("STATE.step += 1\nh = h * (1.0 + 0.01 * STATE.step)"),
    _s("type(self).total += 1"),
    _s("globals()['TOTAL'] += 1"),
    _s("h.tag = 'mine'\nLOG.append(getattr(h, 'tag', None))"),
    _s("x.tag = 'state'\nLOG.append(getattr(x, 'tag', None))"),
    _s("self.f.seen = self.f.seen + 1", "self.f.seen = 0"),
    _s("try:\n    h = h + MISSING\nexcept NameError:\n    LOG.append('missing')"),
    _s("h.register_hook(HOOKED.append) if h.requires_grad else None"),
    _s("if h.requires_grad:\n    h.register_hook(lambda g: g * 0.5)"),
    _s("if x.requires_grad and x.grad_fn is not None:\n    x.register_hook(lambda g: g * 0.9)"),
    _s("self.statistics = h.detach().mean(), h.detach().std()"),
]

DECISIONS = [
    _s("if x.mean() > 0:\n    h = self.g(h).tanh()\nelse:\n    h = h * 0.5"),
    _s("if h.detach().abs().max().item() > 0.5:\n    h = h * 0.5"),
    _s("h = self.g(h) if bool((h > 0).any()) else h"),
    _s("if lengths is not None and int(lengths.max()) > 3:\n    h = h * 0.7"),
    _s("if lengths is not None:\n    for i in range(int(lengths.max())):\n        h = h + self.g(h).tanh() * 0.1"),
    _s("if lengths is not None:\n    n = int(lengths.max())\n    h = torch.cat([h[:, :n].tanh(), h[:, n:]], 1)"),
    _s("if self.training:\n    h = self.g(h).tanh()"),
    _s("if not self.training:\n    h = h * 0.8"),
    _s("self.step += 1\nif self.step % 2:\n    h = self.g(h).tanh()", "self.step = 0"),
    _s("if MODE == 'a':\n    h = self.g(h).tanh()\nelif MODE == 'b':\n    h = h.sin()"),
    _s("h = {'a': torch.tanh, 'b': torch.sin}[MODE](h)"),
    _s("if torch.is_grad_enabled():\n    h = h * 1.1"),
    _s("if x.requires_grad:\n    h = h * 0.9"),
    _s("if x.shape[1] > 4:\n    h = h * 0.9"),
    _s("if h.is_contiguous():\n    h = h * 0.9"),
    _s("while h.detach().abs().max() > 2.0:\n    h = h * 0.5"),
    _s("if self.f.weight.requires_grad and self.drop.p > 0.1:\n    h = self.drop(h)"),
    _s("h = self.many[len(LOG) % 2](h)"),
    _s("h = self.many[int(x.sum() > 0)](h)"),
    _s("if isinstance(h, torch.Tensor) and h.grad_fn is not None:\n    h = h * 0.9"),
]

READS = [
    _s("h = h * GAIN"),
    _s("h = h * self.scale"),
    _s("h = h * self.f.scale", "self.f.scale = 0.8"),
    _s("h = h * SETTINGS.deep.gain[0]"),
    _s("h = h * CONFIG['scale']"),
    _s("h = h + TABLE.to(h.dtype).mean()"),
    _s("h = h * self.settings.deep['scale']", "self.settings = SimpleNamespace(deep={'scale': 0.9})"),
    _s("if CONFIG['on']:\n    h = self.g(h).tanh()"),
    _s("h = h * self.drop.p"),
    _s("h = h * scale"),
    _s("h = h if mask is None else h * mask"),
    _s("h = h if cond is None else h * cond.scale"),
    _s("h = h if cond is None or not cond.on else self.g(h).tanh()"),
    _s("h = h if extra is None else h * extra['scale'] + extra['pair'][1]"),
    _s("h = F.linear(h, self.f.weight, self.f.bias)", tokens=True),
    _s("h = h * self.f.weight.sum().tanh()"),
    _s("h = h + len(list(self.parameters())) * 0.01"),
    _s("h = h * (1.0 + 0.1 * sum(p.square().mean() for p in self.f.parameters()))"),
    _s("h = h * self.factor", "self.table = [0.5, 0.9]"),
    _s("h = h * DEFAULTS.get('missing', 0.9)"),
    _s("assert x.shape[C] == 8, x.shape"),
    _s("assert LIMIT > 0, f'limit is {LIMIT}'"),
    _s("if LIMIT < 0:\n    raise ValueError('the limit')"),
]

BUFFERS = [
    _s("self.count += 1\nh = h / self.count.clamp(max=3.0)", "self.register_buffer('count', torch.zeros(()))"),
    _s("self.count = self.count + 1", "self.register_buffer('count', torch.zeros(()))"),
    _s(
        "if self.training:\n    with torch.no_grad():\n        self.ema.mul_(0.9).add_(h.detach().mean(AXES), alpha=0.1)\n"
        "h = h - self.ema.clone().reshape(VEC)",
        "self.register_buffer('ema', torch.zeros(8))",
    ),
    _s(
        "if self.training:\n    self.ema = 0.9 * self.ema + 0.1 * h.detach().mean(AXES)\nh = h - self.ema.reshape(VEC)",
        "self.register_buffer('ema', torch.zeros(8))",
    ),
    _s(
        "if self.memory is None:\n    self.memory = torch.zeros(8, dtype=x.dtype)\n"
        "self.memory = self.memory + h.detach().mean(AXES)\nh = h + self.memory.reshape(VEC) * 0.1",
        "self.register_buffer('memory', None)",
    ),
    _s(
        "self.steps.add_(1)\nif self.steps > 2:\n    h = h * 0.5",
        "self.register_buffer('steps', torch.zeros((), dtype=torch.long))",
    ),
    _s(
        "self.ring[int(self.at) % 4] = h.detach().mean()\nself.at += 1\nh = h + self.ring.mean()",
        "self.register_buffer('ring', torch.zeros(4))\nself.register_buffer('at', torch.zeros((), dtype=torch.long))",
    ),
    _s(
        "t = F.batch_norm(h.transpose(1, C), self.mean, self.var, training=self.training)\nh = t.transpose(1, C)",
        "self.register_buffer('mean', torch.zeros(8))\nself.register_buffer('var', torch.ones(8))",
    ),
    _s("self.f.hits += 1", "self.f.register_buffer('hits', torch.zeros(()))"),
    _s(
        "with torch.no_grad():\n    self.frozen.lerp_(self.gamma, 0.1)\nh = h * (1.0 + self.frozen.clone())",
        "self.register_buffer('frozen', torch.zeros(VEC))",
    ),
]

MODES = [
    _s("with torch.no_grad():\n    gate = self.g(x).sigmoid()\nh = h * gate"),
    _s("with torch.no_grad():\n    gate = h.abs().mean(C, keepdim=True)\nh = h / (1.0 + gate)"),
    _s("h = h + x.detach() * 0.1"),
    _s("h = self.f(h.detach()) + h"),
    _s("with torch.enable_grad():\n    h = self.g(h).tanh()"),
    _s("with torch.set_grad_enabled(self.training):\n    h = self.g(h).tanh()"),
    _s("h = h.float().tanh().to(x.dtype)", precision=1e-5),
    _s("h = h.bfloat16().tanh().to(x.dtype)", precision=3e-2),
    _s(
        "with torch.autocast('cpu', dtype=torch.bfloat16):\n    t = self.g(h.float() if h.dtype is torch.float32 else h)\n"
        "h = t.to(x.dtype).tanh()",
        precision=3e-2,
    ),
    _s("with torch.autocast('cpu', enabled=False):\n    h = self.g(h.to(x.dtype)).tanh()"),
    _s("h = stopped(h)"),
    _s("h = Double.apply(h)"),
    _s("g = torch.autograd.grad(h.sum(), h)[0] if h.requires_grad and torch.is_grad_enabled() else 1.0\nh = h * g"),
    _s("with warnings.catch_warnings():\n    warnings.simplefilter('ignore')\n    h = h.tanh()"),
    _s("with contextlib.suppress(ValueError):\n    h = self.g(h)\n    raise ValueError"),
]

HOOKS = [
    _s("pass", "self.f.register_forward_hook(lambda m, i, o: o * 0.5)"),
    _s("pass", "self.f.register_forward_pre_hook(lambda m, i: (i[0] * 0.9,))"),
    _s("pass", "self.g.register_forward_hook(lambda m, i, o: LOG.append(tuple(o.shape)))"),
    _s("pass", "self.f.register_full_backward_hook(lambda m, i, o: COUNTS.update(back=COUNTS.get('back', 0) + 1))"),
    _s("pass", "self.register_forward_hook(lambda m, i, o: COUNTS.update(block=COUNTS.get('block', 0) + 1))"),
    _s("pass", "self.register_forward_pre_hook(lambda m, i: (i[0] * 0.9, *i[1:]))"),
    _s("pass", "self.register_forward_hook(lambda m, i, o: o * 0.9 if isinstance(o, torch.Tensor) else None)"),
    _s("pass", "self.drop.register_forward_hook(lambda m, i, o: LOSSES.append(o.mean()))"),
    _s("pass", "self.f = nn.utils.parametrizations.weight_norm(self.f)"),
    _s("pass", "self.f.requires_grad_(False)"),
    _s("pass", "self.g = self.f"),
    _s("pass", "self.gamma.register_hook(lambda g: g * 0.5)"),
]

EARLY = [
    _s("if skip:\n    return {x}"),
    _s("if skip:\n    return {h}"),
    _s("if not self.training:\n    return {x + h}"),
    _s("if not self.training and MODE == 'a':\n    return {x + h * 0.5}"),
    _s("if self.training and torch.rand(()) < 0.3:\n    return {x}"),
    _s("if random.random() < 0.3:\n    return {x}"),
    _s("if x.detach().mean() > 0.1:\n    return {x + h}"),
    _s("if h.detach().abs().max() < 1e-3:\n    return {x}"),
    _s("if scale > 1.0:\n    return {x * scale}"),
    _s("if lengths is not None and int(lengths.min()) < 2:\n    return {x - h}"),
    _s("if sink is not None and len(sink) > 3:\n    return {x}"),
]

ENDS = [
    *[_s("out = x + h")] * 24,
    *[_s("out = h + x")] * 8,
    _s("x = x + h\nout = x"),
    _s("h = h * 1.0\nh += x\nout = h"),
    _s("x = x.clone()\nx += h\nout = x"),
    _s("x += h\nout = x"),
    _s("out = torch.add(x, h)"),
    _s("out = torch.add(x, h, alpha=0.5)"),
    _s("out = x.add(h)"),
    _s("out = x.add(h, alpha=0.7)"),
    _s("out = x - h"),
    _s("out = torch.sub(x, h, alpha=0.5)"),
    _s("out = torch.addcmul(x, h, self.gamma)"),
    _s("out = torch.lerp(x, h, 0.3)"),
    _s("out = torch.stack([x, h]).sum(0)"),
    _s("out = sum([x, h])"),
    _s("out = functools.reduce(operator.add, [x, h])"),
    _s("out = x + h * self.gamma"),
    _s("out = x + self.drop(h)"),
    _s("out = x * 0.9 + h"),
    _s("out = self.norm(x + h)"),
    _s("out = (x + h).tanh()"),
    _s("out = F.relu(x + h)"),
    _s("x = x + h\nout = x + self.g(x).tanh()"),
    _s("x = x + h\nx = x + self.mlp(self.norm(x))\nout = x"),
    _s("x = self.norm(x + h)\nout = self.norm(x + self.mlp(x))"),
    _s("y = x + h\nz = y + self.g(y).tanh()\nout = z + self.f(z).sin() * 0.5"),
    _s("out = x + h + self.g(x).tanh()"),
    _s("out = x + (h + self.g(x))"),
    _s("out = x + h if self.training else x + h * 0.9"),
    _s("for i in range(2):\n    x = x + h * 0.5\nout = x"),
    _s("for i in range(2):\n    x = x + self.g(x).tanh() * 0.5 + h * 0.1\nout = x"),
    _s("out = residual(x, h)"),
    _s("out = self.join(x, h)"),
    _s("h = h * 1.0\nh.add_(x)\nout = h"),
    _s("out = torch.add(h, x, out=None)"),
    _s("out = x.clone()\nout[:, 1:] += h[:, 1:]"),
    _s("out = x + h[:, :1]"),
    _s("out = x + h.mean(1, keepdim=True)"),
    _s("out = (x.float() + h.float()).to(x.dtype)", precision=1e-5),
    _s("out = torch.where(h > 0, x + h, x)"),
    _s("x.add_(h)\nout = x"),
    _s("y = x + h\nself.out = y.detach()\nout = y", "self.out = None"),
    _s("y = x + h\nLOSSES.append(y.square().mean() * 0.1)\nout = y"),
    _s("y = x + h\ny = y.view(y.shape)\nout = y"),
    _s("y = x + h\nout = y.clone() if self.training else y"),
    _s("y = x + h\ny.mul_(0.9)\nout = y"),
    _s("y = x + h\nif y.detach().mean() > 0:\n    y = y * 0.9\nout = y"),
]

KINDS = {
    "pure": (PURE, 5),
    "in place": (IN_PLACE, 2),
    "random": (RANDOM, 2),
    "effects": (EFFECTS, 4),
    "decisions": (DECISIONS, 2),
    "reads": (READS, 3),
    "buffers": (BUFFERS, 2),
    "modes": (MODES, 1.5),
    "hooks": (HOOKS, 1),
    "early": (EARLY, 1.5),
}
"""Statements by kind, and how often each kind is drawn."""

LOOPS = [  # how the root runs its blocks
    *["for block in self.blocks:\n    x = block(x, ARGS)"] * 14,
    "for i, block in enumerate(self.blocks):\n    x = block(x, ARGS)\n    hidden.append(x)",
    "for block in self.blocks:\n    if not (self.training and torch.rand(()) < 0.3):\n        x = block(x, ARGS)",
    "for block in self.blocks:\n    if not (self.training and random.random() < 0.3):\n        x = block(x, ARGS)",
    "for block in self.blocks:\n    x = run_layer(block, x, ARGS)",
    "for block in self.blocks:\n    x = self.one(block, x, ARGS)",
    "for block in [*self.blocks, *self.blocks[:1]]:\n    x = block(x, ARGS)",
    "for block in reversed(self.blocks):\n    x = block(x, ARGS)",
    "for i in range(len(self.blocks)):\n    x = self.blocks[i](x, ARGS)\n    if i == self.cut:\n        break",
    "for block in self.blocks:\n    x = block(x, ARGS)\n    x = x * 1.0",
    "for block in self.blocks:\n    x = block(x, ARGS)\n    STATS.append(float(x.detach().mean()))",
    "for i, block in enumerate(self.blocks):\n    x = block(x, ARGS)\n    if i == 1:\n        x = self.mid(x)",
    "for block in self.blocks:\n    x = x.transpose(1, 2).contiguous().transpose(1, 2)\n    x = block(x, ARGS)",
    "for block in self.blocks:\n    x = x + self.stem(block(x, ARGS)).tanh()",
    "for block, layer_ in zip(self.blocks, self.layers):\n    x = block(x, ARGS)\n    x = x + layer_(x).tanh()",
    "for layer_ in self.layers:\n    x = x + layer_(x).tanh()\nfor block in self.blocks:\n    x = block(x, ARGS)",
    "for block in self.blocks:\n    y = block(x, ARGS)\n    x = y if MODE == 'a' else (x + y) * 0.5",
    "for block in self.blocks:\n    x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)",
    "x = self.line(x)",
    "x = self.line(x)",
    "stack_ = list(self.blocks)\nwhile stack_:\n    x = stack_.pop(0)(x, ARGS)",
    "x = functools.reduce(lambda t, block: block(t, ARGS), self.blocks, x)",
    "for block in self.blocks:\n    x = block(x, ARGS)\n    if x.detach().abs().max() > 50:\n        break",
    "for block in self.blocks:\n    before = x\n    x = block(x, ARGS)\n    LOSSES.append((x - before).square().mean())",
    "for block in self.blocks:\n    x = block(x, ARGS)\nhidden.append(x[:, :1])\nx = x[:, :2]",
]
