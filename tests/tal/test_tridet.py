"""What is TriDet's own; what it shares with the others is tested with them."""

import pytest
import torch
from small_localizers import batch, tridet


def test_first_weights_of_zero_stay_zero():
    convs = ("psi", "fc", "convw", "convkw", "global_fc")
    dead = convolutions(tridet(weight_std=0.0), convs)
    assert len(dead) == 5 * 5
    assert not any(gradient.any() for gradient in dead)
    assert all(gradient.any() for gradient in convolutions(tridet(), convs))


def convolutions(model, names):
    """Gradients of the blocks' convolutions of these names."""
    sum(model.losses(*batch()).values()).backward()
    return [p.grad for n, p in model.projection.named_parameters() if n.endswith(tuple(f"{c}.weight" for c in names))]


def test_tridet_takes_odd_windows_and_whole_groups():
    with pytest.raises(ValueError, match=r"got windows \[4, 4, 4, 4\], 4 ranges and 32 channels; expected an odd"):
        tridet(window=4)
    with pytest.raises(ValueError, match=r"and 24 channels; expected .* a multiple of 16 channels"):
        tridet(channels=24)


def test_noise_is_for_training_alone():
    model, (features, mask, _, _) = tridet(noise=0.5), batch()
    first, second = (torch.cat(model(features, mask).logits, 2) for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (torch.cat(model.eval()(features, mask).logits, 2) for _ in range(2))
    assert torch.equal(first, second)
