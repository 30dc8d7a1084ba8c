"""Collect the cases of tests/field: small inputs that people have, and attacks, each with its whole outcome and not only
the exit code."""

import pytest

pytest.register_assert_rewrite("tests.field")

from tests.field.classes import *  # noqa: E402, F403
from tests.field.environment import *  # noqa: E402, F403
from tests.field.growing import *  # noqa: E402, F403
from tests.field.photos import *  # noqa: E402, F403
from tests.field.shared_places import *  # noqa: E402, F403
from tests.field.strangers import *  # noqa: E402, F403
