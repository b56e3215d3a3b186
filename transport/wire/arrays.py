"""Array types that the rooms of `transport` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    pass


Memory = npt.NDArray[np.uint8]


Indices = npt.NDArray[np.uint32]
