"""Process groups for torch programs: ours by a registered name, and others wrapped."""

__all__: list[str] = []
