"""The former name of :mod:`visionattn.deployment`: its public names can still be imported from here.

``visionattn.export`` is a verb, too. Python puts an imported module into the place of a package's attribute of that
name, so this module is called as the verb is.
"""

import sys
from types import ModuleType
from typing import Any

from visionattn.deployment import (
    BGRImage,
    ClassifyRunner,
    Detections,
    DetectRunner,
    FeaturesRunner,
    Runner,
    load_runner,
)
from visionattn.verbs import export

__all__ = ["BGRImage", "ClassifyRunner", "DetectRunner", "Detections", "FeaturesRunner", "Runner", "load_runner"]


class _Verb(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
