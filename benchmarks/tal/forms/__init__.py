"""Annotations in the forms in which data sets publish them, read into ActivityNet's. HACS and FineAction have that form
already, and so do the files that OpenTAD and ActionFormer distribute.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.tal.forms import charades, ego4d, epic_kitchens, thumos
from benchmarks.tal.forms.published import Published as Published
from benchmarks.tal.schema import Form

FORMS: dict[Form, Callable[[Path], Published]] = {
    "charades": charades.read,
    "ego4d_mq": ego4d.read,
    "epic_verb": epic_kitchens.verbs,
    "epic_noun": epic_kitchens.nouns,
    "epic_action": epic_kitchens.actions,
    "thumos": thumos.read,
}
"""By the name in a configuration; ``activitynet`` needs no reader."""
