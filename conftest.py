"""What all tests are given."""
from support.test_helpers import finished, surroundings  # noqa: F401
