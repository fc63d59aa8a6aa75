"""Pre-train LLaMA from scratch on C4 with little memory."""

__version__ = "0.1.0"
