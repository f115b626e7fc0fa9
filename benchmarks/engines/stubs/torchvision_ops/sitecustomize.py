"""Make a CUDA build of torchvision importable beside a CPU build of torch.

Its library of compiled operators does not load there, and the import then stops at registering their shapes. Naming the two
operators first is enough for everything that reads a text prompt; calling one still fails.
"""

import sys
from importlib.abc import MetaPathFinder

KEPT = []  # a library's definitions live as long as it does


class _BeforeTorchvision(MetaPathFinder):
    """Names the operators in the moment somebody imports torchvision, then leaves the import to the other finders."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
