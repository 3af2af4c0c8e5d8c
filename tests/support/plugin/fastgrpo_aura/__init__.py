"""AuraFlow for fastgrpo, a reward and a prompt source: found by the entry points of pyproject.toml."""
