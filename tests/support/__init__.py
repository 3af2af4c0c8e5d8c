"""What several tests use: tiny pipelines and configs, oracles, finished runs, servers."""
