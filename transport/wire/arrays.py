"""Array types that the rooms of `transport` share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Memory = npt.NDArray[np.uint8]


Indices = npt.NDArray[np.uint32]
