"""Groups over several hosts: the parts of `HierBackend`."""
