"""Fixtures of the kit, tested by using them."""

pytest_plugins = ["sagellm.core.protocols.testing.pytest_plugin"]
