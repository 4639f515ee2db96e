"""The checks of the interpreter, compiled, on a card."""

import pytest

from tests.model.kernels.training_checks import *  # noqa: F403

pytestmark = pytest.mark.gpu
