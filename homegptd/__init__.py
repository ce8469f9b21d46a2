"""homeGPT: many large language models on one GPU box. Keep this file free of imports."""

__version__ = "0.1.0"
