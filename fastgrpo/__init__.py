"""fastgrpo: Group Relative Policy Optimization for visual generators."""

__version__ = "0.1.0"
