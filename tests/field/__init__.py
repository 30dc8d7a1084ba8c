"""Inputs that users have and attacks that were tried, by subject. `tests/test_field_cases.py` runs them."""
