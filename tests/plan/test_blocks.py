"""Which modules are the blocks of a network: those that a user would checkpoint, one by one."""

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel

from revwire._capture.arguments import as_call
from revwire._capture.run import fullest_recording
from revwire._plan.blocks import every_block

WIDTH = 8
ROW = torch.randn(2, WIDTH)


def blocks_of(model, example):
    call = as_call(example)
    return every_block(fullest_recording(model.train(), call.args, call.kwargs))


class Residual(nn.Module):
    """x + F(x), by a linear layer or by whatever is given; with a computed shortcut where the width changes."""

    def __init__(self, inner=None, to=WIDTH):
        super().__init__()
        self.inner = nn.Linear(WIDTH, to) if inner is None else inner
        self.shortcut = nn.Linear(WIDTH, to) if to != WIDTH else nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.inner(x).relu()


class NoAdd(Residual):
    """Of a class that inherits its adds, and makes none."""

    def forward(self, x):
        return self.inner(x)


class Loop(nn.Module):
    """Residual adds in the code that runs a stack of pairs."""

    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())])
            for _ in range(depth)
        )

    def forward(self, x):
        for first, second in self.layers:
            x = x + first(x)
            x = x + second(x)
        return x


class Norm(nn.Module):
    """A normalisation that is spelled out: ``x - mean(x)`` is no residual add that would make it a block."""

    def forward(self, x):
        return x + (x - x.mean(-1, keepdim=True))


def test_a_block_that_changes_shape_is_one_too():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Residual(), Norm(), Residual(to=2 * WIDTH))
    assert blocks_of(model, ROW) == ("1", "3")


def test_a_block_without_an_add_is_known_by_its_class():
    class Maybe(Residual):
        adds = True

        def forward(self, x):
            return super().forward(x) if self.adds else self.inner(x)

    model = nn.Sequential(Maybe(), Maybe(), NoAdd())
    model[1].adds = False
    assert blocks_of(model, ROW) == ("0", "1")


def test_a_block_in_a_block_is_a_part_of_it():
    assert blocks_of(nn.Sequential(Residual(Residual()), Residual(Residual())), ROW) == ("0", "1")


def test_what_holds_a_stack_of_blocks_is_none():
    group = Residual(nn.Sequential(Residual(), Residual()))
    assert blocks_of(nn.Sequential(group, nn.Linear(WIDTH, WIDTH)), ROW) == ("0.inner.0", "0.inner.1")


@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.Sequential(nn.Linear(WIDTH, WIDTH), m)])
def test_adds_in_the_code_that_runs_a_stack(around):
    names = blocks_of(around(Loop()), ROW)
    assert [n[-len("layers.0.0") :] for n in names] == [f"layers.{i}.{j}" for i in range(3) for j in range(2)]


def test_a_model_that_adds_around_its_blocks_is_no_block():
    assert blocks_of(Residual(nn.Sequential(Residual(), Residual())), ROW) == ("inner.0", "inner.1")


def test_the_same_module_twice_is_one_name():
    block = Residual()
    assert blocks_of(nn.Sequential(block, nn.ReLU(), block), ROW) == ("0",)


def test_without_residual_adds_the_entries_of_stacks():
    layer = lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())  # noqa: E731
    assert blocks_of(nn.Sequential(layer(), layer()), ROW) == ("0", "1")
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(NoAdd(), NoAdd(), NoAdd()))
    assert blocks_of(model, ROW) == ("1.0", "1.1", "1.2")


def test_a_layer_around_its_attention_is_the_block():
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=32)
    found = blocks_of(BertModel(config), {"input_ids": torch.randint(0, 32, (1, 5))})
    assert found == ("encoder.layer.0", "encoder.layer.1")


def test_every_stage_of_a_network_of_inverted_bottlenecks():
    model = timm.create_model("efficientnet_b0")
    found = blocks_of(model, torch.randn(1, 3, 64, 64))
    stages = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage)) if i]
    assert list(found) == stages
