"""Copies of stateful arguments."""

from types import SimpleNamespace

import torch

from revwire._surroundings.copies import snapshot


class Slotted:
    __slots__ = ("keys",)

    def __init__(self, keys):
        self.keys = keys


def test_each_of_many_objects_is_copied_and_none_of_their_tensors():
    weight = torch.ones(3, requires_grad=True)
    layers = [make(keys=weight * i) for i in range(4) for make in (SimpleNamespace, Slotted)]
    copied = snapshot(SimpleNamespace(layers=layers, by_name=dict(enumerate(layers))))
    assert [*copied.by_name.values()] == copied.layers
    for layer, now in zip(layers, copied.layers, strict=True):
        assert now is not layer
        assert now.keys is not layer.keys
        assert now.keys.data_ptr() == layer.keys.data_ptr()
        assert now.keys.grad_fn is None
        assert now.keys.requires_grad
