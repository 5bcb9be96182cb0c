"""The kernels (see kernels/hashattn_kernels), under the name of the package that uses them."""

import hashattn_kernels
from hashattn_kernels import *  # noqa: F403

__all__ = hashattn_kernels.__all__
