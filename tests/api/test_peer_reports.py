"""What users of other reversible libraries reported, as tests of this one. Each names the public report it comes from.

Not here, because their text could not be found where the others were looked up: RevTorch #11, reformer-pytorch #144,
momentumnet #19. (They are no pull requests either: those of these numbers do not exist.)
"""

from __future__ import annotations

import gc
import threading
from collections import UserList
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForQuestionAnswering

import revwire
from revwire.measure import peak_bytes, saved_bytes
from revwire.testing import Step, check_gradients

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """x + F(x): a convolution, a normalisation with statistics, an activation in place, dropout."""

    def __init__(self, dropout: float = 0.0, dimensions: int = 2) -> None:
        super().__init__()
        convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if dimensions == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.convolution, self.norm = convolution(8, 8, 3, padding=1), norm(8)
        self.activation, self.dropout = nn.ReLU(inplace=True), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.activation(self.norm(self.convolution(x))))


def network(depth: int = 4, dropout: float = 0.0, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(dropout) for _ in range(depth)))
    return revwire.convert(model, X, **options)


def pairs(model: nn.Module, *inputs: Tensor) -> tuple[Step, Step]:
    """A step of the model, and one with stored activations."""
    step = Step.of(model, inputs)
    with revwire.stored_activations(model):
        return step, Step.of(model, inputs)


# -- memcnn ------------------------------------------------------------------------------------------------------------


def test_memcnn_12_batch_statistics_are_updated_once():
    """«set Fm to eval() mode during reconstruction in backward?»: the recompute moved running statistics a second
    time.
    """
    model = network()
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()(X).sum().backward()
    reference = nn.Sequential(*(Residual() for _ in range(4)))
    reference.load_state_dict({**model.state_dict(), **before})
    revwire.convert(reference, X)
    with revwire.stored_activations(reference):
        reference(X).sum().backward()
    assert all(int(m.norm.num_batches_tracked) == 1 for m in model)
    for (name, got), expected in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(got, expected), name


def test_memcnn_36_and_revtorch_7_a_second_backward_through_the_same_chain():
    """«Backing over reversible network twice», «Trying to backward through the graph a second time»."""
    model = network()
    first, second = (Step.of(model, X, loss) for loss in (lambda y: y.sum(), lambda y: y.square().mean()))
    model.zero_grad()
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    y = model(x)
    y.sum().backward(retain_graph=True)
    y.square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, first.gradients[name] + second.gradients[name])


def test_memcnn_37_what_is_saved_is_less_than_with_stored_activations():
    """«Memory consumption does not seem to reflect ...»: bytes are counted here, not read off a caching allocator."""
    model, x = network(depth=12, coupling="re2tal", exact=True), torch.randn(4, 8, 16, 16)
    mine = saved_bytes(lambda: model(x))
    with revwire.stored_activations(model):
        assert mine < saved_bytes(lambda: model(x)) / 4


def test_memcnn_38_the_callers_tensors_are_never_freed():
    """«keep_input=False ... issue»: the input's storage was resized to zero, and reading it crashed."""
    model, kept = network(coupling="re2tal", exact=True), X.clone()
    for x in (X, X.clone().requires_grad_()):
        y = model(x)
        assert torch.equal(x, kept)
        out = y.detach().clone()
        y.sum().backward()
        assert torch.equal(x, kept)
        assert torch.equal(y, out)
        assert x.untyped_storage().nbytes() == y.untyped_storage().nbytes() == X.nbytes


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_memcnn_41_memory_does_not_grow_with_depth(wants_gradient):
    """«Memory demand not constant in network depth», with activations in place and an input that wants its gradient."""
    x = torch.randn(4, 8, 16, 16).requires_grad_(wants_gradient)

    def peak(depth: int) -> int:
        torch.manual_seed(0)
        model = revwire.convert(
            nn.Sequential(*(Residual() for _ in range(depth))), x.detach(), coupling="re2tal", exact=True
        )
        return peak_bytes(lambda: model(x).sum().backward())

    assert (peak(20) - peak(4)) / 16 < x.nbytes / 16  # what is left for each unit: random states, buffers, records


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("unused", [False, True], ids=["", "find_unused_parameters"])
def test_memcnn_44_reformer_19_performer_14_distributed_data_parallel(tmp_path, unused):
    """«Distributed Data Parallel», «Expected to mark a variable ready only once»: also with dropout, and several
    steps.
    """
    with one_process(tmp_path):
        model, twin = network(dropout=0.2), network(dropout=0.2)
        ddp = DistributedDataParallel(model, find_unused_parameters=unused)
        losses: list[list[float]] = [[], []]
        for seen, owner, call in zip(losses, (model, twin), (ddp, twin), strict=True):
            optimizer = torch.optim.SGD(owner.parameters(), lr=0.1)
            torch.manual_seed(1)
            for _ in range(3):
                loss = call(X).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seen.append(loss.item())
        assert losses[0] == losses[1]
        assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


def test_memcnn_56_dropout_is_the_same_in_the_recompute():
    """«Droupout issue»: the inverse drew another mask, so its result was not the input."""
    model = network(dropout=0.5).train()
    check_gradients(model, X)
    assert revwire.verify(model, X).reconstruction_error == 0
    torch.manual_seed(3)
    first = model(X)
    assert not torch.equal(first, model(X)), "the same mask in every step"


def test_memcnn_69_revtorch_10_reformer_36_replicas_in_threads():
    """«Problems when memcnn is used with data parallel», «Can RevTorch work in multi-gpu?», «strange GPU memory
    overflow».

    Replicas as `nn.DataParallel` makes them, in threads on the CPU: weights have gradients, and nothing is left after
    backward.
    Without dropout: threads on the CPU draw from one generator, each in the midst of the other's branch, which no
    recompute can repeat.
    """
    model = network(dropout=0.0).train()
    replicas = [_replica(model) for _ in range(2)]
    outs: list[Tensor] = []

    def run(i: int) -> None:
        outs.append(replicas[i](X).square().sum())

    for replica in replicas:
        replica(X)  # observed, one after another
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sum(outs).backward()
    assert all(p.requires_grad and p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    outs.clear()

    def step() -> None:
        sum(replica(X).square().sum() for replica in (_replica(model), _replica(model))).backward()
        gc.collect()

    assert saved_bytes(step) < X.nbytes


def _replica(model: nn.Module) -> nn.Module:
    """A replica of a model whose weights are computed from the model's: as `torch.nn.parallel.replicate`, on one
    device.
    """
    copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            copy._modules[name] = copies[child]
        for name, p in module._parameters.items():
            if p is not None:
                setattr(copy, name, p * 1)
        for name, b in module._buffers.items():
            if b is not None:
                copy._buffers[name] = b.clone()
    return copies[model]


def test_memcnn_70_an_activation_before_the_chain():
    """«ReLU before Inversible layers»: what the layer before had saved was freed, and its gradient could not be
    computed.
    """

    class Example(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv3d(1, 8, 1), nn.ReLU())
            self.chain = nn.Sequential(*(Residual(dimensions=3) for _ in range(3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(self.stem(x))

    torch.manual_seed(0)
    x = torch.randn(1, 1, 5, 5, 5)
    model = revwire.convert(Example(), x)
    assert len(revwire.report(model).units) == 3
    check_gradients(model, x)


def test_memcnn_73_two_kinds_of_blocks_in_turn_and_features_that_are_used_later():
    """«The tensor has a non-zero number of elements, but its data is not allocated yet»."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(kind() for _ in range(3) for kind in (Residual, Gate))
            self.fuse = nn.Conv2d(7 * 8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            features = [x]
            for block in self.blocks:
                features.append(block(features[-1]))
            return self.fuse(torch.cat(features, 1)) + features[-1]

    torch.manual_seed(0)
    model = revwire.convert(Dense(), X)
    assert len(revwire.report(model).units) == 7  # what fuses the features is the last
    check_gradients(model, X)


def test_memcnn_77_a_branch_is_evaluated_twice_and_never_more():
    """«Slower training with trivial inverse»: a step costs one evaluation more for each branch, and none for the
    inverse.
    """
    model = network(depth=5)
    counts = UserList([0] * 5)  # no recompute puts it back
    for i, block in enumerate(model):
        block.convolution.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    model(X)  # observed
    counts[:] = [0] * 5
    model(X).sum().backward()
    assert counts == [2, 2, 2, 2, 2]


# -- others ------------------------------------------------------------------------------------------------------------


def test_transformers_10370_backward_in_eval_mode():
    """«ReformerForQuestionAnswering: int() argument must be a string ...»: random state was only noted in train
    mode.
    """
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 40,
    }
    model = BertForQuestionAnswering(BertConfig(**sizes)).eval()
    ids = torch.randint(0, 40, (2, 7))
    call = {"input_ids": ids, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    revwire.convert(model, call)
    assert len(revwire.report(model).units) >= 3
    for training in (False, True, False):
        model.train(training)
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(**call).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        with revwire.stored_activations(model):
            torch.manual_seed(1)
            model(**call).loss.backward()
        assert gradients
        assert all(map(torch.equal, gradients, (p.grad for p in model.parameters() if p.grad is not None)))


@pytest.mark.parametrize("coupling", ["momentum:0.5", "bdia"])
def test_momentumnet_16_memory_of_a_post_activation_network(coupling):
    """«Large memory consumption»: a transformed ResNet that kept nearly what the original kept."""

    class Basic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
            self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))

    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, 16)
    model = revwire.convert(nn.Sequential(*(Basic() for _ in range(8))), x, coupling=coupling)
    step, stored = pairs(model, x)
    step.assert_like(stored)
    mine = saved_bytes(lambda: model(x))
    with revwire.stored_activations(model):
        assert mine < saved_bytes(lambda: model(x)) / 3


@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/8"])
def test_slowfast_613_a_checkpoint_is_as_good_when_it_is_tested(coupling):
    """«REV_MVIT_B_16x4 model error»: tested, a published reversible model was hardly ever right, and the plain ones
    beside it were.
    """

    def classifier() -> nn.Module:
        return nn.Sequential(*(Residual(0.1) for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    torch.manual_seed(0)
    labels = torch.arange(32) % 2
    clips = torch.randn(32, 8, 6, 6)
    clips[:, 0] += 2.0 * labels[:, None, None] - 1.0
    model = revwire.convert(classifier(), clips, coupling=coupling)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(clips), labels).backward()
        optimizer.step()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    expected = model.eval()(clips)
    assert expected.argmax(1).eq(labels).float().mean() > 0.95

    for first in (
        "convert",
        "load",
    ):  # another process tests it, of which only the checkpoint and the coupling are known
        tested = classifier()
        if first == "load":
            tested.load_state_dict(state)
        revwire.convert(tested.eval(), clips[:1], coupling=coupling)
        if first == "convert":
            tested.load_state_dict(state)
        with torch.no_grad():
            together, one_by_one = tested(clips), torch.cat([tested(clip) for clip in clips.split(1)])
        with revwire.stored_activations(tested):
            stored = tested(clips)
        for got in (
            together,
            one_by_one,
            stored,
        ):  # the streams are scaled by another example, and convolutions are of another size
            torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-4, atol=1e-4)
            assert torch.equal(got.argmax(1), expected.argmax(1))
