"""The methods, one file a paper. A file registers its method; the registry reads them all when it is first asked.

`kvweave methods flowmm --draw` draws what a method keeps on the lab's example.
"""

from kvweave.methods.base import Method
from kvweave.methods.merging import MergingMethod
from kvweave.methods.registry import get_method, list_methods, method_from_dict, parse_method, register

__all__ = ["MergingMethod", "Method", "get_method", "list_methods", "method_from_dict", "parse_method", "register"]
