"""The localizers by independent oracles: dense attention, loops over points and boxes, torchvision's losses; and that
they learn.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_localizers import CHANNELS, MAKERS, actionformer, batch, vsgn
from torch.nn import functional as F
from torchvision.ops import distance_box_iou_loss, generalized_box_iou_loss

from benchmarks.tal.localizers import LOCALIZERS, VSGN, ActionFormer, TriDet, load_published, normalizers
from benchmarks.tal.localizers.anchors import Matches, anchors, boxes_of
from benchmarks.tal.localizers.graph_pyramid import EdgeConv, GraphUnit
from benchmarks.tal.localizers.losses import diou_loss, giou_loss
from benchmarks.tal.localizers.points import Points
from benchmarks.tal.localizers.transformer import ConvAttention, local_attention
from benchmarks.tal.localizers.vsgn import boundary_loss, boundary_targets
from benchmarks.tal.segments.detections import Selection

# -- parts
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 20])
@pytest.mark.parametrize("reach", [1, 2, 4, 9])
def test_local_attention_is_dense_attention_within_a_band(steps, reach):
    generator = torch.Generator().manual_seed(steps)
    query, key, value = torch.randn(3, 2, 2, steps, 3, dtype=torch.float64, generator=generator)
    mask = torch.arange(steps) < torch.tensor([[steps], [max(steps // 2, 1)]])
    logits = query @ key.transpose(2, 3) / 3**0.5 + torch.where(mask, 0, -1e4)[:, None, None]
    far = (torch.arange(steps)[:, None] - torch.arange(steps)).abs() > reach
    expected = logits.masked_fill(far, -torch.inf).softmax(-1) @ value * mask[:, None, :, None]
    torch.testing.assert_close(local_attention(query, key, value, mask, reach), expected)


def test_a_wide_window_is_full_attention_where_all_steps_are_valid():
    torch.manual_seed(0)
    local, full = (ConvAttention(8, 2, window, 2).double() for window in (33, -1))
    full.load_state_dict(local.state_dict())
    x, mask = torch.randn(2, 8, 16, dtype=torch.float64), torch.ones(2, 8, dtype=torch.bool)
    torch.testing.assert_close(local(x, mask), full(x, mask))


def test_diou_and_giou_are_those_of_boxes_of_one_height():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, 50, 2, generator=generator, dtype=torch.float64).cumsum(-1)).unbind()
    boxes = [torch.stack([s[:, 0] * 1e4, torch.zeros(50), s[:, 1] * 1e4, torch.ones(50)], 1).double() for s in (a, b)]
    torch.testing.assert_close(giou_loss(a, b), generalized_box_iou_loss(*boxes), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        diou_loss(a, b), distance_box_iou_loss(*boxes), rtol=0, atol=1e-6
    )  # the height hardly counts in the hull
    torch.testing.assert_close(giou_loss(a.flip(1), b), giou_loss(a, b))


def test_targets_of_points_are_those_of_a_loop():
    ranges = [(0.0, 4.0), (4.0, 8.0), (8.0, 1e4)]
    points = Points.of([32, 16, 8], ranges, torch.zeros((), dtype=torch.float64))
    segments = torch.tensor([[2.0, 5.5], [3.0, 6.5], [1.0, 30.0], [10.2, 20.0], [22.0, 22.3]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0])
    classes, offsets = points.targets(segments, labels, 3, 1.5)
    assert classes.any()
    for i, (t, low, high, stride) in enumerate(
        zip(points.position, points.low, points.high, points.stride, strict=True)
    ):
        candidates = []
        for n, (start, end) in enumerate(segments.tolist()):
            centre = (start + end) / 2
            inside = max(start, centre - 1.5 * stride) < t < min(end, centre + 1.5 * stride)
            if inside and low <= max(t - start, end - t) <= high:
                candidates.append((end - start, n))
        shortest = min((length for length, _ in candidates), default=0)
        expected = {labels[n].item() for length, n in candidates if length <= shortest + 1e-3}
        assert set(classes[i].nonzero()[:, 0].tolist()) == expected
        if candidates:
            start, end = segments[min(candidates)[1]]
            torch.testing.assert_close(offsets[i], torch.stack([t - start, end - t]) / stride)
            torch.testing.assert_close(points.segments(offsets[None])[0, i], torch.stack([start, end]))


def test_matches_of_boxes_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    boxes = (20 * torch.rand(40, 2, generator=generator)).sort(1).values
    segments, labels = (20 * torch.rand(3, 2, generator=generator)).sort(1).values, torch.tensor([2, 0, 1])
    matches = Matches.of(boxes[None], [segments], [labels], 0.6)
    overlap = torch.zeros(40, 3)
    for i, (a, b) in enumerate(boxes.tolist()):
        for j, (c, d) in enumerate(segments.tolist()):
            inter = max(0.0, min(b, d) - max(a, c))
            overlap[i, j] = inter / ((b - a + 1) + (d - c) - inter)
    for i in range(40):
        j = overlap[i].argmax()
        best_of_some = any(overlap[i, n] == overlap[:, n].max() for n in range(3))
        positive = overlap[i, j] >= 0.6 or best_of_some
        assert matches.labels[0, i] == (labels[j] + 1 if positive else 0)
        assert not positive or torch.equal(matches.segments[0, i], segments[j])


def test_a_video_without_actions_is_background():
    matches = Matches.of(torch.rand(1, 5, 2), [torch.zeros(0, 2)], [torch.zeros(0, dtype=torch.int64)], 0.5)
    assert not matches.positive.any()


def test_anchors_stand_around_their_positions():
    boxes = anchors((2, 4), 8, (3.0, 5.0))
    assert boxes.shape == (2 * (4 + 2), 2)
    torch.testing.assert_close(boxes[:3], torch.tensor([[-1.5, 3.5], [-3.5, 5.5], [0.5, 5.5]]))
    torch.testing.assert_close(boxes_of(torch.zeros(12, 2), boxes), boxes)
    torch.testing.assert_close(
        boxes_of(torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 9.0]])), torch.tensor([[5.0, 14.0]])
    )
    assert boxes_of(torch.tensor([[0.0, 1e9]]), torch.tensor([[0.0, 9.0]])).isfinite().all()


def test_boundaries_are_cells_that_are_covered_wholly():
    targets = boundary_targets([torch.tensor([[2.0, 6.5]])], torch.zeros(1, 3, 10))
    assert [row.nonzero()[:, 0].tolist() for row in targets[0]] == [[1, 2], [5, 6, 7], [2, 3, 4, 5]]


def test_boundary_loss_weighs_both_sides_the_same():
    logits, targets = torch.randn(2, 3, 10), torch.zeros(2, 3, 10, dtype=torch.bool)
    targets[0, 0, :3] = targets[:, 2] = True
    each = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").transpose(0, 1).flatten(1)
    first = (each[0][targets[:, 0].flatten()].mean() + each[0][~targets[:, 0].flatten()].mean()) / 2
    torch.testing.assert_close(boundary_loss(logits, targets), first + each[1].mean() + each[2].mean())


def test_edges_are_those_of_a_loop():
    torch.manual_seed(0)
    edge = EdgeConv(4, 3).double()
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    for video, out in zip(x, edge(x), strict=True):
        for i in range(9):
            order = sorted(range(9), key=lambda j: ((video[:, i] - video[:, j]) ** 2).sum())[:3]
            mapped = [edge.mlp(torch.cat([video[:, j], video[:, i]])) for j in order]
            torch.testing.assert_close(out[:, i], torch.stack(mapped).amax(0))


def test_a_graph_needs_enough_steps():
    with pytest.raises(ValueError, match="a level of 4 steps; expected at least the number of neighbours, 5"):
        GraphUnit(4, 5)(torch.randn(1, 4, 4), torch.ones(1, 4, dtype=torch.bool))


def test_selection():
    segments, scores = torch.rand(4, 2), torch.tensor([[0.5, 0.0], [0.9, 0.4], [0.0, 0.001], [0.2, 0.8]])
    chosen = Selection(0.001, 3)(segments, scores)
    torch.testing.assert_close(chosen.scores, torch.tensor([0.9, 0.8, 0.5]))
    assert chosen.labels.tolist() == [0, 1, 0]
    assert torch.equal(chosen.segments, segments[[1, 3, 0]])
    agnostic = Selection(0.5, 1)(segments, scores[:, :1])
    assert len(agnostic.scores) == 4
    assert not agnostic.labels.any()


# -- both localizers
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("classes", [1, 3])
def test_a_short_input_is_one_that_is_padded(make, classes):
    model = make(classes).eval()
    features, mask, _, _ = batch()
    mask[:, 40:] = False
    short = model.decode(features[:, :, :40], mask[:, :40])
    padded = model.decode(features * mask.unsqueeze(1), mask)
    for a, b in zip(short, padded, strict=True):
        torch.testing.assert_close(a.scores, b.scores)
        torch.testing.assert_close(a.segments, b.segments)


@pytest.mark.parametrize("make", MAKERS)
def test_losses_without_any_action(make):
    model = make()
    features, mask, _, _ = batch()
    losses = model.losses(
        features.requires_grad_(), mask, [torch.zeros(0, 2)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    )
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert features.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_losses_in_mixed_precision_are_float32(make):
    features, mask, segments, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = make().losses(features, mask, segments, labels)
        detections = make().eval().decode(features, mask)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    assert detections[0].segments.dtype == torch.float32


@pytest.mark.parametrize("make", MAKERS)
def test_the_averages_of_positives_are_part_of_the_state(make):
    model, fresh = make(), make()
    features, mask, segments, labels = batch()
    model.losses(features, mask, segments, labels)
    fresh.load_state_dict(model.state_dict())
    first, second = (m.losses(features, mask, segments, labels) for m in (model, fresh))
    assert {n: v.item() for n, v in first.items()} == {n: v.item() for n, v in second.items()}
    state = model.eval().state_dict()
    before = {name: value.clone() for name, value in state.items() if "normalizer" in name}
    model.losses(features, mask, segments, labels)
    assert before
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("make", MAKERS)
def test_it_learns(make):
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(40):
        optimizer.zero_grad()
        sum(model.losses(*batch(8, seed=step)).values()).backward()
        optimizer.step()
    features, mask, segments, labels = batch(8, seed=1000)
    hits = 0
    for detections, of_video, of_label in zip(model.eval().decode(features, mask), segments, labels, strict=True):
        for segment, label in zip(of_video, of_label, strict=True):
            same = detections.labels == label
            best = detections.segments[same][detections.scores[same].argsort(descending=True)[:5]]
            inter = (best.clamp(segment[0], segment[1]).diff(dim=1)[:, 0]).clamp(min=0)
            union = best.diff(dim=1)[:, 0] + segment.diff() - inter
            hits += bool((inter / union > 0.5).any())
    assert hits >= 12  # of 16


def test_names():
    assert [LOCALIZERS[name] for name in ("actionformer", "tridet", "vsgn")] == [ActionFormer, TriDet, VSGN]


@pytest.mark.parametrize("make", MAKERS)
def test_published_weights_of_a_whole_detector(make):
    source, target = make(), make()
    for parameter in target.parameters():
        torch.nn.init.zeros_(parameter)
    state = {
        f"module.{name}": value for name, value in source.state_dict().items() if not name.startswith("loss_normalizer")
    }
    load_published(target, {"state_dict_ema": state | {"module.backbone.model.backbone.norm3.weight": torch.zeros(1)}})
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


# -- ActionFormer, VSGN
# ------------------------------------------------------------------------------------------------------


def test_longer_inputs_in_evaluation():
    model = actionformer(positions=True).eval()
    features, mask, segments, labels = batch(steps=100)
    outputs = model(features, mask)
    assert outputs.masks[0].shape[1] % model.multiple == 0
    assert outputs.masks[0].sum(1).tolist() == [100, 100]
    with pytest.raises(ValueError, match="got 128 steps in training; expected at most max_steps, 64"):
        model.train().losses(features, mask, segments, labels)


def test_one_window_and_range_per_level():
    assert [block.attn.reach for block in actionformer(window=[9, 5, -1, 3]).projection.branch] == [2, None, 1]
    with pytest.raises(ValueError, match="got 2 windows and 4 ranges; expected one for each of 4 levels"):
        actionformer(window=[3, 3])


def test_a_weight_that_balances_both_losses():
    features, mask, segments, labels = batch()
    losses = actionformer(regression_weight=0).losses(features, mask, segments, labels)
    torch.testing.assert_close(losses["regression"], losses["classification"])


def test_default_ranges_double():
    assert actionformer(levels=4).ranges == [(0, 4), (4, 8), (8, 16), (16, 10000)]


def test_vsgn_has_one_length():
    with pytest.raises(ValueError, match="got 65 steps; expected at most max_steps, 64"):
        vsgn()(torch.zeros(1, CHANNELS, 65), torch.ones(1, 65, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got strides \[2, 6\]; expected an even number"):
        vsgn(strides=(2, 6))


# -- processes
# ---------------------------------------------------------------------------------------------------------------


class Group:
    """Two processes that share counts, as two threads; it stands in for `torch.distributed`."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=60)
        self.held = []

    def is_available(self):
        return True

    is_initialized = is_available

    def get_world_size(self):
        return 2

    def all_reduce(self, tensor):
        self.held.append(tensor.clone())
        self.barrier.wait()
        total = sum(self.held[-2:])
        self.barrier.wait()
        tensor.copy_(total)


def gradients_of_videos(model, videos):
    features, mask, segments, labels = batch(4)
    labels = [of_video.clamp(max=model.num_classes - 1) for of_video in labels[videos]]
    sum(model.losses(features[videos].double(), mask[videos], segments[videos], labels).values()).backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    return flat, {name: value for name, value in model.state_dict().items() if "normalizer" in name}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("classes", [1, 3])
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(make, classes, monkeypatch):
    expected, averages = gradients_of_videos(make(classes).double(), slice(0, 4))
    models = [make(classes).double() for _ in range(2)]
    monkeypatch.setattr(normalizers, "dist", Group())
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(gradients_of_videos, models, (slice(0, 2), slice(2, 4))))
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, expected)
    assert found[0][1].keys() == averages.keys()
    for _, moved in found:
        torch.testing.assert_close(moved, averages)
