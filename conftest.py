"""What all tests are given."""
from support.testing import finished, surroundings  # noqa: F401
